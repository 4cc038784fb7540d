"""Predicted peak memory against what the compiler allocates, of calls and of train steps.

Claim: the peak that `compax.analysis.liveness` predicts from a graph is close to the compiler's own figure, so that a
memory budget can be planned before anything is compiled.

Command: `python -m compax.experiments.benchmarks.liveness`, about three minutes on two cores.

The train step is that of Adam: parameters and two float32 moments are donated. What differs: XLA for CPUs materializes
some operands of its matrix library that the model takes as fused (gradients of unrolled layers come out 15 to 20 % too
small), and merges what is computed again outside of loops with the first computation. A TPU holds arrays of up to about
100 MB in its vector memory, which small programs' peaks in HBM do not show.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import compax
from compax import lowering
from compax.analysis.liveness import Liveness, liveness
from compax.analysis.tracing import argument_shapes, evaluated, traced
from compax.analysis.training import train_step
from compax.experiments.benchmarks import reporting, zoo
from compax.models import decoder
from compax.printing import bytes_text

SHAPES: Mapping[str, tuple[str, int, int, dict[str, Any]]] = {
    "tiny": ("tiny", 4, 32, {}),
    "small": ("small", 4, 256, {}),
    "smollm2-135m": ("smollm2-135m", 4, 1024, {}),
    "1b": (
        "small",
        2,
        2048,
        {
            "vocab_size": 32768,
            "context_length": 2048,
            "model_dim": 2048,
            "hidden_dim": 8192,
            "num_layers": 16,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 64,
            "dtype": "bfloat16",
        },
    ),
}
"""Shapes of the decoder: size, batch, length, and what is changed."""

FORMS: Mapping[str, dict[str, bool]] = {
    "unrolled": {},
    "scanned": {"scan": True},
    "scanned, remat": {"scan": True, "remat": True},
}
MODELS = ("tunix_qwen3", "tunix_gemma3", "flax_gpt2", "flax_bert", "flax_vit")


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation to compile, and what is predicted of it.

    Attributes:
        name: what it is.
        function: of its arguments in order.
        arguments: their shapes.
        donated: which are donated.
        predicted: for each platform, the prediction.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    predicted: Callable[[str], Liveness]


def call_of(name: str, program: compax.Program) -> Case:
    """A call of a program."""
    captured = program.graph()
    shapes = argument_shapes(captured)
    params, state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (program.params, program.state))

    def predicted(platform: str) -> Liveness:
        return liveness(traced(evaluated, captured, parameter=params, state=state, argument=shapes), platform)

    def function(params: Any, state: Any, argument: Any) -> Any:
        return lowering.evaluate(
            captured.graph,
            [
                {"parameter": params, "state": state, "argument": argument}[tag.kind][tag.path]
                for tag in captured.inputs
            ],
        )

    return Case(f"{name} forward", function, (params, state, shapes), (), predicted)


def step_of(name: str, program: compax.Program) -> Case:
    """A train step of a program that returns a loss."""
    captured = program.graph()
    step = train_step(program, captured, 2)
    function, arguments, donated = step.plain(captured)
    return Case(
        f"{name} train step",
        function,
        arguments,
        donated,
        lambda platform: liveness(step.traced(captured), platform, donated=step.donated),
    )


def decoder_cases(shape: str, form: str) -> list[Case]:
    """A call and a train step of the decoder, with abstract parameters."""
    size, batch, length, changes = SHAPES[shape]
    config = dataclasses.replace(decoder.SIZES[size], **changes, **FORMS[form])
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(model: decoder.Decoder, tokens: jax.Array) -> jax.Array:
        import optax

        return optax.softmax_cross_entropy_with_integer_labels(model(tokens).astype(jnp.float32), tokens).mean()

    name = f"decoder {shape}, {form}"
    cases = [step_of(name, compax.capture(model, tokens, loss=loss))]
    return cases if form == "scanned, remat" else [call_of(name, compax.capture(model, tokens)), *cases]


def model_cases(name: str) -> list[Case]:
    """A call and a train step (the mean square of its output as the loss) of somebody else's model."""
    case = zoo.build(name)
    program = case.capture()
    captured = program.graph()

    def squared(params: Any, *inputs: Any) -> jax.Array:
        given = iter(inputs)
        values = [params[tag.path] if tag.kind == "parameter" else next(given) for tag in captured.inputs]
        return jnp.mean(lowering.evaluate(captured.graph, values)[0].astype(jnp.float32) ** 2)

    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype)
        for tag, x in zip(captured.inputs, captured.graph.inputs, strict=True)
        if tag.kind != "parameter"
    ]
    return [call_of(name, program), step_of(name, compax.capture(squared, dict(program.params), *shapes))]


def allocated(case: Case) -> int:
    """Bytes that the compiler of this machine allocates for a case."""
    memory = jax.jit(case.function, donate_argnums=case.donated).lower(*case.arguments).compile().memory_analysis()
    assert memory is not None
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,small", help="of the decoder, such as tiny,small,smollm2-135m")
    parser.add_argument("--models", default=",".join(MODELS), help="of the zoo; empty for none")
    args = parser.parse_args()
    cases = [case for shape in args.shapes.split(",") if shape for form in FORMS for case in decoder_cases(shape, form)]
    cases += [case for name in args.models.split(",") if name for case in model_cases(name)]
    platform = jax.default_backend()
    rows: list[tuple[str, ...]] = []
    errors: list[float] = []
    for case in cases:
        compiled, predicted = allocated(case), case.predicted(platform)
        errors.append(predicted.peak / compiled - 1)
        rows.append((case.name, bytes_text(predicted.peak), bytes_text(compiled), f"{errors[-1]:+.1%}"))
    within = sum(abs(error) <= 0.05 for error in errors)
    reporting.print_table(
        f"peak of {len(rows)} computations on the {platform}: predicted from the graph, and as XLA allocates it",
        ("computation", "predicted", "compiled", "error"),
        rows,
        basis="compiled",
        footer=(f"{within} of {len(rows)} within 5 %",),
    )


if __name__ == "__main__":
    main()
