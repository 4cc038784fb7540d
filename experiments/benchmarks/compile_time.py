"""What compax adds to the time that it takes to compile a model.

Goal: capture, raising, passes and lowering to StableHLO together add less than 5 % of XLA's compile time to what
`jax.jit(...).lower()` of the same model takes anyway. On a CPU, whose compiler is quick, it is missed: plain lowering
alone takes 8 to 21 % there. Capture adds no function; rules of a pass add a few, however many layers there are.

Command: `python -m compax.experiments.benchmarks.compile_time`. A few minutes on two cores; `--models smollm2` alone
takes one. Parameters are abstract, so that a 7B shape needs no memory for them. The batch is small because XLA's CPU
compiler is what is compared against: its time hardly depends on it.

`added` is everything of compax's, less the plain lowering, relative to XLA's compile time of the plain model.
"""

import argparse
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from compax.experiments.benchmarks import reporting
from compax.models import decoder

MODELS: dict[str, tuple[str, bool]] = {
    "smollm2": ("smollm2-135m", False),
    "smollm2-scanned": ("smollm2-135m", True),
    "llama2-7b": ("llama2-7b", False),
    "llama2-7b-scanned": ("llama2-7b", True),
}
DEFAULT_PIPELINE = "quantize(weights=int8)"
_FUNCTION = re.compile(r"^  func\.func ", re.MULTILINE)


@dataclasses.dataclass
class Timings:
    """Durations of each step in seconds, a sample for each repetition.

    Attributes:
        plain: Tracing and lowering the model by `jax.jit`.
        capture: Tracing it to a program.
        raising: Finding sites.
        passes: Running the pipeline.
        lower: Lowering the transformed program.
        compile: XLA's compilation of the plain model.
        functions: Functions in the StableHLO of the plain model, of the captured program, and after the pipeline.
    """

    plain: list[float] = dataclasses.field(default_factory=list)
    capture: list[float] = dataclasses.field(default_factory=list)
    raising: list[float] = dataclasses.field(default_factory=list)
    passes: list[float] = dataclasses.field(default_factory=list)
    lower: list[float] = dataclasses.field(default_factory=list)
    compile: list[float] = dataclasses.field(default_factory=list)
    functions: tuple[int, int, int] = (0, 0, 0)

    @property
    def added(self) -> list[float]:
        """For each repetition, compax's time less the plain lowering's, relative to the shortest compile time."""
        steps = zip(self.capture, self.raising, self.passes, self.lower, self.plain, strict=True)
        return [(sum(ours) - plain) / min(self.compile) for *ours, plain in steps]


def timed(function: Callable[[], Any], samples: list[float]) -> Any:
    """Calls a function, notes how long it took, and returns what it returned."""
    start = time.perf_counter()
    result = function()
    samples.append(time.perf_counter() - start)
    return result


def num_functions(lowered: Any) -> int:
    """How many functions the StableHLO of a lowered computation has."""
    return len(_FUNCTION.findall(lowered.as_text()))


def plain_function(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its variables, and their shapes."""
    graphdef, variables = nnx.split(model)
    return lambda variables, tokens: nnx.merge(graphdef, variables)(tokens), variables


def measure(size: str, scan: bool, pipeline: str, shape: tuple[int, int], repetitions: int) -> Timings:
    """Times one model.

    Args:
        size: A key of `decoder.SIZES`.
        scan: Whether the layers are stacked and scanned.
        pipeline: What is applied between capture and lowering.
        shape: Batch and sequence length of the tokens.
        repetitions: How often to repeat all but the compilation. JAX's caches are emptied before each.
    """
    import compax

    config = dataclasses.replace(decoder.SIZES[size], scan=scan, param_dtype="bfloat16", dtype="bfloat16")
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    passes = compax.Pipeline.parse(pipeline)
    timings = Timings()

    def lower(program: Any) -> Any:
        function = lambda params, state, tokens: program.apply(params, state, tokens)[0]  # noqa: E731
        return jax.jit(function).lower(program.params, program.state, tokens)

    for repetition in range(repetitions + 1):
        taken = Timings() if repetition == 0 else timings  # the first one also imports and fills caches of functions
        jax.clear_caches()
        function, variables = plain_function(model)
        plain = timed(lambda: jax.jit(function).lower(variables, tokens), taken.plain)  # noqa: B023 (called at once)
        jax.clear_caches()
        program = timed(lambda: compax.capture(model, tokens), taken.capture)
        timed(program.sites, taken.raising)
        transformed = timed(lambda: passes(program), taken.passes)  # noqa: B023
        lowered = timed(lambda: lower(transformed), taken.lower)  # noqa: B023
        if repetition == 0:
            timed(plain.compile, timings.compile)
            timings.functions = (num_functions(plain), num_functions(lower(program)), num_functions(lowered))
    return timings


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS), help="rows")
    parser.add_argument("--pipeline", default=DEFAULT_PIPELINE, help="what is applied (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--sequence", type=int, default=64, help="tokens in each (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each figure but compile (%(default)s)")
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    shape = (arguments.batch, arguments.sequence)
    for name in arguments.models:
        size, scan = MODELS[name]
        timings = measure(size, scan, arguments.pipeline, shape, arguments.repetitions)
        steps = (timings.plain, timings.capture, timings.raising, timings.passes, timings.lower, timings.compile)
        added = sorted(timings.added)
        functions = " / ".join(map(str, timings.functions))
        rows.append((name, *map(reporting.seconds, steps), f"{added[len(added) // 2]:.1%}", functions))
    reporting.print_table(
        f"Seconds, median (range) of {arguments.repetitions}; {arguments.pipeline}; tokens {shape[0]} x {shape[1]}",
        (
            "model",
            "plain\nlower",
            "capture",
            "raise",
            "passes",
            "lower",
            "XLA\ncompile",
            "added",
            "functions:\nplain / captured / passes",
        ),
        rows,
        basis="measured",
    )


if __name__ == "__main__":
    main()
