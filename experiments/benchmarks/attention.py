"""Time and memory of attention in blocks against the model's own and JAX's.

Claim: on a CPU the pass `flash` computes causal attention, forward and backward, several times as fast as a model that
writes the scores out, and as `jax.nn.dot_product_attention`, in memory that grows with the length and not with its
square. Short sequences, of one block, take as long as before, within what repetitions differ by.

Command: `python -m compax.experiments.benchmarks.attention`. About five minutes on two idle cores; `--lengths 256,1024`
alone takes one. `--kernels splash,plain --interpret` checks that it runs, not how fast.

The layer is the attention of our decoder (8 heads on 4, size 64, float32) with its projections. Times are medians of
repetitions in which the candidates take turns, so that what else the machine does falls on all of them. Temporaries
are what XLA's compiler says of the compiled gradient.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compax
from compax.experiments.benchmarks import reporting
from compax.models.decoder import attend

MODEL, HEADS, GROUPS, SIZE = 128, 8, 4, 64
MASKS = ("causal", "full", "window")
WINDOW = 256

Function = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass
class Candidate:
    """One way to compute the layer.

    Attributes:
        name: what it is called.
        forward: compiled, of parameters and activations.
        gradient: compiled, of the same.
        temporary_bytes: temporaries of the gradient, as compiled.
        forward_seconds: a sample for each repetition.
        gradient_seconds: the same.
    """

    name: str
    forward: Any
    gradient: Any
    temporary_bytes: int
    forward_seconds: list[float] = dataclasses.field(default_factory=list[float])
    gradient_seconds: list[float] = dataclasses.field(default_factory=list[float])


def seen(mask: str, length: int) -> np.ndarray:
    """Which keys each query sees: bool[T, T]."""
    distance = np.arange(length)[:, None] - np.arange(length)
    if mask == "full":
        return np.ones((length, length), bool)
    return (distance >= 0) & (distance < WINDOW) if mask == "window" else distance >= 0


def layer(mask: str, length: int, *, builtin: bool) -> Function:
    """The projections and the attention between them: the decoder's own, or JAX's."""

    def function(params: Any, x: jax.Array) -> jax.Array:
        query, key, value = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("query", "key", "value"))
        if builtin:
            options: dict[str, Any] = {"is_causal": mask != "full"}
            if mask == "window":
                options["local_window_size"] = (WINDOW - 1, 0)
            out = jax.nn.dot_product_attention(query, key, value, **options)
        else:
            out = attend(query, key, value, jnp.asarray(seen(mask, length)))
        return jnp.einsum("bthk,hkd->btd", out, params["out"])

    return function


def parameters() -> dict[str, jax.Array]:
    """Normally distributed projections, the same at every call."""
    random = np.random.default_rng(0)
    shapes = {"query": HEADS, "key": GROUPS, "value": GROUPS}
    made = {name: random.normal(0.0, MODEL**-0.5, (MODEL, heads, SIZE)) for name, heads in shapes.items()}
    made["out"] = random.normal(0.0, (HEADS * SIZE) ** -0.5, (HEADS, SIZE, MODEL))
    return {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}


def candidate(name: str, function: Function, params: Any, x: jax.Array) -> Candidate:
    """A way to compute the layer, compiled."""
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(function(params, x))), argnums=(0, 1)))
    compiled = gradient.lower(params, x).compile()
    forward = jax.jit(function).lower(params, x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say what it needs"
    return Candidate(name, forward, compiled, memory.temp_size_in_bytes)


def candidates(mask: str, length: int, batch: int, pipelines: dict[str, str]) -> list[Candidate]:
    """The model's own attention, JAX's, and one for each pipeline."""
    params = parameters()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, length, MODEL)), jnp.float32)
    own = layer(mask, length, builtin=False)
    found = [
        candidate("the model's own", own, params, x),
        candidate("jax.nn", layer(mask, length, builtin=True), params, x),
    ]
    before = compax.capture(own, params, x)
    for name, text in pipelines.items():
        program = compax.Pipeline.parse(text)(before, x)
        if skipped := [site.reason for site in program.history[-1].sites if site.status == "skipped"]:
            raise SystemExit(f"{text} left the attention as it is: {skipped[0]}")
        found.append(candidate(name, lambda params, x, p=program: p.apply(params, {}, x)[0], params, x))
    return found


def measure(found: list[Candidate], length: int, batch: int, repetitions: int) -> None:
    """Times all candidates in turns."""
    params = parameters()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, length, MODEL)), jnp.float32)
    for repetition in range(repetitions + 1):
        for one in found:
            for function, samples in ((one.forward, one.forward_seconds), (one.gradient, one.gradient_seconds)):
                start = time.perf_counter()
                jax.block_until_ready(function(params, x))
                if repetition:  # the first run touches memory for the first time
                    samples.append(time.perf_counter() - start)


def rows(found: list[Candidate]) -> list[tuple[str, ...]]:
    """A row of the table for each candidate; ratios are those of the model's own to it."""
    base = found[0]
    result: list[tuple[str, ...]] = []
    for one in found:
        ratios = [
            statistics.median(mine) / statistics.median(samples)
            for mine, samples in (
                (base.forward_seconds, one.forward_seconds),
                (base.gradient_seconds, one.gradient_seconds),
            )
        ]
        figures = (
            reporting.seconds(one.forward_seconds),
            f"{ratios[0]:.2f}",
            reporting.seconds(one.gradient_seconds),
            f"{ratios[1]:.2f}",
            reporting.mebibytes(one.temporary_bytes),
        )
        result.append((one.name, *figures))
    return result


def main() -> None:
    """Prints a table for each mask and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128,256,512,1024,2048", help="positions, with commas between")
    parser.add_argument("--masks", default="causal", help=f"of {', '.join(MASKS)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--kernels", default="auto", help="implementations of the pass flash")
    parser.add_argument("--blocks", default="", help="sizes of blocks to compare, such as 128,256,512")
    parser.add_argument("--interpret", action="store_true", help="interpret Pallas kernels")
    options = parser.parse_args()
    more = ", interpret=true" if options.interpret else ""
    pipelines = {f"flash, {kernel}": f"flash(implementation={kernel}{more})" for kernel in options.kernels.split(",")}
    for block in filter(None, options.blocks.split(",")):
        pipelines[f"flash, blocks of {block}"] = f"flash(block_q={block}, block_k={block})"
    for mask in options.masks.split(","):
        for length in map(int, options.lengths.split(",")):
            found = candidates(mask, length, options.batch, pipelines)
            measure(found, length, options.batch, options.repetitions)
            reporting.print_table(
                f"{mask} attention over {length} positions, batch {options.batch}",
                ("attention", "forward, s", "times as fast", "gradient, s", "times as fast", "temporaries, MiB"),
                rows(found),
                basis="measured",
                footer=("Temporaries are the compiler's figure (compiled), of the gradient.",),
            )


if __name__ == "__main__":
    main()
