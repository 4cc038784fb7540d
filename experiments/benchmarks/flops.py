"""Floating-point operations as `compax.analysis.cost` counts them, beside XLA's own count.

Goal: within 1 % of `compiled.cost_analysis()["flops"]` for models without loops, forward and gradient, float32. Each
model is counted three ways by XLA:

- lowered: before it optimizes. Ours is the same to some operations on scalars, to the choices that a gather writes out,
  and to what has a literal zero in it (Flax's RMSNorm subtracts a mean of zero)
- compiled without fusion: after dead code, equal subexpressions and constants are gone
- compiled: as it runs. XLA computes cheap results again in every kernel that needs them and counts them each time, so
  on models as tiny as these, where they weigh a few percent, its count is higher. `with kernels` is ours with what
  `compax.analysis.kernels` expects to be computed again

What differs by itself is listed below the table (`cost_rules.DEVIATIONS`): loops above all, of which XLA counts one
turn. A maximum over windows (ResNet's pooling) has a gradient that the CPU's compiler writes out as a search, which
only the compiled figures count. Bytes: ours after fusion beside what XLA's compiled program accesses; a simple model
of fusion against one backend's.

Command: `python -m compax.experiments.benchmarks.flops` (some minutes; `--models flax_bert` for one)
"""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compax import lowering
from compax.analysis import cost_rules
from compax.analysis.cost import Cost, function_cost
from compax.capture import Captured
from compax.experiments.benchmarks import reporting, zoo

MODELS = (
    *("compax_decoder", "tunix_llama3", "tunix_qwen3", "tunix_gemma3", "flax_gpt2", "flax_bert", "flax_vit"),
    *("flax_resnet", "flax_whisper"),
)
"""Models of the zoo without loops, of every kind."""

_UNFUSED: dict[str, str | bool] = {"xla_disable_hlo_passes": "fusion"}


def functions(captured: Captured) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A program's forward pass and the gradient of a loss on its outputs, each with the shapes of its arguments."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in captured.graph.inputs]
    tagged = enumerate(zip(captured.inputs, shapes, strict=True))
    trained = [i for i, (tag, x) in tagged if tag.kind == "parameter" and jnp.issubdtype(x.dtype, jnp.floating)]

    def forward(*given: Any) -> list[jax.Array]:
        return lowering.evaluate(captured.graph, given)

    def loss(params: list[Any], rest: list[Any]) -> jax.Array:
        given = list(rest)
        for i, x in zip(trained, params, strict=True):
            given[i] = x
        floating = [x for x in forward(*given) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((jnp.square(x).mean() for x in floating), jnp.zeros((), jnp.float32))

    return {
        "forward": (forward, tuple(shapes)),
        "gradient": (jax.value_and_grad(loss), ([shapes[i] for i in trained], shapes)),
    }


def computed_with_kernels(cost: Cost) -> int:
    """Operations and transcendental functions, those that kernels compute again counted each time."""
    return sum((sum(flops for _, flops in x.products) + x.others) * x.count for x in cost.kernels)


def analysis(stage: Any) -> Mapping[str, float]:
    """What XLA counts in a lowered or a compiled computation."""
    return stage.cost_analysis() or {}


def row(name: str, what: str, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, ...]:
    """One line of the table: our figure and its ratios to XLA's."""
    begun = time.perf_counter()
    cost = function_cost(function, *args)
    seconds = time.perf_counter() - begun
    lowered = jax.jit(function).lower(*args)
    compiled = analysis(lowered.compile())
    counted = (analysis(lowered), analysis(lowered.compile(compiler_options=_UNFUSED)), compiled)
    everything = compiled["flops"] + compiled.get("transcendentals", 0.0)
    notes = len(cost.unknown) + len(cost.loops)
    return (
        f"{name}, {what}",
        f"{cost.flops / 1e6:,.2f}",
        f"{cost.product_flops / cost.flops:.1%}",
        *(f"{cost.flops / x['flops']:.4f}" for x in counted),
        f"{computed_with_kernels(cost) / everything:.4f}",
        f"{cost.bytes_fused / compiled['bytes accessed']:.2f}",
        str(notes),
        f"{seconds:.2f}",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(zoo.ENTRIES), default=list(MODELS), help="rows")
    rows: list[tuple[str, ...]] = []
    for name in parser.parse_args().models:
        captured = zoo.build(name).capture().graph()
        rows += [row(name, what, *call) for what, call in functions(captured).items()]
    reporting.print_table(
        "Operations counted from the graph, and their ratio to XLA's count, float32",
        (
            "model",
            "ours\nMFLOPs",
            "in\nproducts",
            "ours /\nlowered",
            "ours / compiled\nwithout fusion",
            "ours /\ncompiled",
            "with kernels /\ncompiled",
            "bytes:\nours / compiled",
            "not counted,\nor unknown loops",
            "traced and\ncounted, s",
        ),
        rows,
        basis="predicted",
        footer=(
            "XLA's counts are compiled for the CPU. Where ours differs by itself:",
            *(f"  {what}: {why}" for what, why in cost_rules.DEVIATIONS.items()),
        ),
    )


if __name__ == "__main__":
    main()
