"""Activations kept as int8 against the same kept exactly, and against computing them again.

Claim: where `remat` keeps the results of products as int8, a train step needs less memory than with JAX's
`dots_with_no_batch_dims_saveable`, computes no product more, has the same loss, to the bit, before the first update,
and trains to the same loss as without, within what another seed changes.

Command: `python -m compax.experiments.benchmarks.compressed_activations`; `--only=memory` or `--only=training`. No
accelerator is needed. Compiling takes half a minute for each row and chip; training some minutes on two cores.

Memory and FLOPs are the compiler's, of a train step with Adam, donated, of a scanned decoder of the SmolLM2-135M shape
in bfloat16. FLOPs computed again are those of products beyond the step that keeps everything. Training is on bytes of
Python's own library, or of `--text=FILE`: a decoder of four scanned layers, Adam, `--steps` steps, three seeds for
weights and batches, float32.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import compax
from compax.analysis.liveness import liveness
from compax.analysis.training import train_step
from compax.compilers import needed_bytes
from compax.experiments.benchmarks import reporting
from compax.instruments import gradient_of
from compax.models import decoder
from compax.printing import bytes_text
from compax.rewrites.checkpoint import checkpointed, find_regions
from compax.target import Target
from compax.tpu.functions import compile_function
from compax.transform import Inputs

RIVAL = "dots_with_no_batch_dims_saveable"
PIPELINES = (
    "",
    "remat()",
    "remat(keep=dots)",
    'remat(compress="**:linear")',
    'remat(keep=dots, compress="**.mlp.*:linear")',
)
SEEDS = (0, 1, 2)


def _loss(model: Any, tokens: jax.Array) -> jax.Array:
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# -- Memory -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to keep activations. Bytes and FLOPs of one step on one device.

    Attributes:
        name: the pipeline, or JAX's policy.
        predicted: bytes at the peak.
        compiled: bytes at the peak.
        flops: of products, compiled.
    """

    name: str
    predicted: int
    compiled: int
    flops: int


def rows(chip: str, batch: int, length: int) -> Iterator[Row]:
    """The rival, and each pipeline."""
    target = Target.parse(chip)
    platform = target.chip.platform
    config = dataclasses.replace(decoder.SIZES["smollm2-135m"], scan=True, dtype="bfloat16")
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    program = compax.capture(model, jax.ShapeDtypeStruct((batch, length + 1), jnp.int32), loss=_loss)
    captured = program.graph()
    policy = getattr(jax.checkpoint_policies, RIVAL)
    graphs = {RIVAL: checkpointed(captured, find_regions(captured, program.meaning()), {}, policy)}
    for text in PIPELINES:
        graphs[text or "everything kept"] = (compax.Pipeline.parse(text)(program) if text else program).graph()
    for name, graph in graphs.items():
        step = train_step(program, graph, 2)
        predicted = liveness(step.traced(graph, platform), platform, donated=step.donated).peak
        found = compile_function(*step.plain(graph), target)
        if found.memory is None:
            assert found.shortage is not None
            assert found.shortage.needed is not None
            yield Row(name, predicted, found.shortage.needed, 0)
            continue
        memory = found.memory
        peak = needed_bytes(platform, memory.arguments + memory.outputs, memory.temporaries, memory.peak)
        yield Row(name, predicted, peak, sum(found.flops.values()))


def print_memory(chip: str, batch: int, length: int) -> None:
    """Prints a table for a chip."""
    found = []
    for row in rows(chip, batch, length):
        found.append(row)
        print(
            f"{chip}: {row.name}: {bytes_text(row.predicted)} predicted, {bytes_text(row.compiled)} compiled",
            flush=True,
        )
    rival = found[0]
    base = next(row for row in found if row.name == "everything kept")
    reporting.print_table(
        f"a step of SmolLM2's shape, scanned, {batch} x {length}, on {chip}",
        ("kept", "peak", f"against {RIVAL}", "GFLOP computed again"),
        [
            (
                row.name,
                bytes_text(row.compiled),
                f"x{row.compiled / rival.compiled:.2f}",
                f"{(row.flops - base.flops) / 1e9:.1f}" if row.flops and base.flops else "does not fit",
            )
            for row in found
        ],
        basis="compiled",
    )


# -- Training ---------------------------------------------------------------------------------------------------------


def text_bytes(path: str | None) -> np.ndarray:
    """A file, or Python's own library, some 10 MB."""
    if path is not None:
        return np.frombuffer(pathlib.Path(path).read_bytes(), np.uint8)
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)


def trained(text: np.ndarray, pipeline: str, seed: int, steps: int) -> tuple[list[float], np.ndarray, float]:
    """Losses of all steps, the first gradient, and seconds of a step."""
    config = dataclasses.replace(
        decoder.SIZES["tiny"],
        vocab_size=256,
        context_length=128,
        model_dim=128,
        hidden_dim=384,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        num_layers=4,
        scan=True,
    )
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(text) - 129, (steps, 16))
    batches = text[starts[..., None] + np.arange(129)].astype(np.int32)
    program = compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(seed)), jnp.asarray(batches[0]), loss=_loss)
    if pipeline:
        program = compax.Pipeline.parse(pipeline)(program)
    gradient = gradient_of(program, Inputs((jnp.asarray(batches[0]),)))
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(lambda params: program.apply(params, program.state, tokens)[0])(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = program.params, optimizer.init(program.params)
    losses: list[float] = []
    seconds: list[float] = []
    for tokens in batches:
        started = time.perf_counter()
        params, state, value = step(params, state, jnp.asarray(tokens))
        losses.append(float(value))
        seconds.append(time.perf_counter() - started)
    return losses, gradient, statistics.median(seconds[1:])


def print_training(path: str | None, steps: int) -> None:
    """Prints losses of exact and of compressed runs, and how far apart they are."""
    text = text_bytes(path)
    shown = sorted({0, steps // 4, steps // 2, steps - 1})
    table, finals = [], {}
    for seed in SEEDS:
        runs = {name: trained(text, name, seed, steps) for name in ("", "remat()", 'remat(compress="**:linear")')}
        exact, _, int8 = runs.values()
        error = float(np.linalg.norm(int8[1] - exact[1]) / np.linalg.norm(exact[1]))
        assert int8[0][0] == exact[0][0], "the loss before the first update is not the same bits"
        for name, (losses, _, seconds) in runs.items():
            last = statistics.mean(losses[-10:])
            finals.setdefault(name, []).append(last)
            figures = [f"{losses[i]:.4f}" for i in shown]
            off = f"{error:.4f}" if "compress" in name else "-"
            table.append((f"seed {seed}, {name or 'everything kept'}", *figures, f"{last:.4f}", off, f"{seconds:.3f}"))
    base, *_, int8 = finals.values()
    away = statistics.mean(abs(one - other) for one, other in zip(base, int8, strict=True))
    footer = (
        f"int8 ends {away:.4f} from exact, mean over seeds; the seeds' own standard deviation is "
        f"{statistics.stdev(base):.4f}"
    )
    reporting.print_table(
        f"{steps} steps on {len(text) / 1e6:.1f} MB of text",
        ("run", *(f"loss {i + 1}" for i in shown), "last ten", "gradient error", "s a step"),
        table,
        basis="measured",
        footer=[footer],
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "training"))
    parser.add_argument("--chips", default="cpu,v5e")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--text", help="a file to train on")
    args = parser.parse_args()
    if args.only != "training":
        for chip in args.chips.split(","):
            print_memory(chip, args.batch, args.length)
    if args.only != "memory":
        print_training(args.text, args.steps)


if __name__ == "__main__":
    main()
