"""Predicted peak memory against what the compiler allocates, of calls and of train steps.

Claim: the peak that `compax.analysis.liveness` predicts from a graph is close to the compiler's own figure, so that a
memory budget can be planned before anything is compiled.

Command: `python -m compax.experiments.benchmarks.liveness`: one CPU, about three minutes on two cores. With
`--targets cpu,v5e,v5p,v6e` for chips that need not be there too, some twenty seconds a program and chip.

The train step is that of Adam: parameters and two float32 moments are donated. On a TPU the compiler says two figures.
Its peak is what is in use at a time in all memories of the chip, as the prediction is. Its allocation is what it sets
aside of main memory (HBM), with gaps, and without what it lays into vector memory. Where a program does not fit, the
allocation is what the compiler says that it would need. On a CPU the allocation is all there is.

What still differs:

- A TPU holds up to about 100 MB in vector memory, so that the allocation of a small program is far below its peak; and
  what it fetches ahead from HBM lies there twice, which may be why small forward passes have larger peaks.
- A TPU stores an embedding whose rows do not fill tiles (SmolLM2: 576 of 640) by columns, and copies it, its moments
  and their updates into rows for the lookup and its gradient: 126 MB each, up to six at a time. Not predicted: with
  remat SmolLM2's step is 11 to 18 % too small in allocation, without it 5 %.
- Allocations have gaps: 1B with remat on v5p takes 24.2 GB and uses 21.3 at most; predicted are 20.9. On a CPU its
  train step takes 65.2 GB of temporaries and uses 44.7, and comes out 27 % too small; 7B's 18 %. Where a program comes
  near a chip's memory the compiler computes again by itself, so that figures of a v5e are below a v5p's.
- On a CPU without units for bfloat16, operands of bfloat16 products are float32 in memory, those made from weights
  included; here they are bfloat16.
- On a CPU a few buffers of small programs: a broadcast mask that XLA writes (GPT-2 forward, 8 %); not explained are the
  scanned tiny decoder's train step (9 % too large, with remat 6 % too small) and SmolLM2's with remat (13 % too small).
- `erfc` is several operations on a CPU, and an exponential among them is kept; here it is one (Bert).
"""

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compax
from compax import lowering
from compax.analysis.liveness import Liveness, liveness
from compax.analysis.tracing import argument_shapes, evaluated, traced
from compax.analysis.training import train_step
from compax.errors import CompileError
from compax.experiments.benchmarks import reporting, zoo
from compax.models import decoder
from compax.printing import bytes_text
from compax.target import Target
from compax.tpu import Request, compile_for
from compax.tpu.worker import Built

BUILDER = f"{__name__ if __name__ != '__main__' else 'compax.experiments.benchmarks.liveness'}:build"

SHAPES: Mapping[str, tuple[str, int, int, dict[str, Any]]] = {
    "tiny": ("tiny", 4, 32, {}),
    "small": ("small", 4, 256, {}),
    "smollm2-135m": ("smollm2-135m", 4, 1024, {}),
    "7b": ("llama2-7b", 1, 2048, {"dtype": "bfloat16"}),
    "70b": ("llama2-70b", 1, 2048, {"dtype": "bfloat16"}),
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
UNROLLED = ("tiny", "small")
"""Shapes that are compiled unrolled as well: of the others that takes minutes."""

MODELS = ("tunix_qwen3", "tunix_gemma3", "flax_gpt2", "flax_bert", "flax_vit")


@dataclasses.dataclass(frozen=True)
class Case:
    """A computation to compile, and what is predicted of it.

    Attributes:
        function: of its arguments in order.
        arguments: their shapes.
        donated: which are donated.
        predicted: for each platform, the prediction.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    predicted: Callable[[str], Liveness]


def call_of(program: compax.Program) -> Case:
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

    return Case(function, (params, state, shapes), (), predicted)


def step_of(program: compax.Program) -> Case:
    """A train step of a program that returns a loss."""
    captured = program.graph()
    step = train_step(program, captured, 2)
    function, arguments, donated = step.plain(captured)
    return Case(
        function,
        arguments,
        donated,
        lambda platform: liveness(step.traced(captured), platform, donated=step.donated),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A computation by name, so that a child process can build it.

    Attributes:
        model: "decoder", or a name of the zoo.
        shape: of the decoder.
        form: of the decoder.
        step: the train step; else the forward pass.
    """

    model: str
    shape: str = ""
    form: str = ""
    step: bool = False

    @property
    def name(self) -> str:
        """As the table calls it."""
        what = f"decoder {self.shape}, {self.form}" if self.model == "decoder" else self.model
        return f"{what} {'train step' if self.step else 'forward'}"

    def case(self) -> Case:
        """Captures it."""
        return decoder_case(self) if self.model == "decoder" else model_case(self)


def rows_of(shapes: list[str], models: list[str]) -> list[Row]:
    """Calls and train steps of decoders and of other people's models; rematerialization changes only the steps."""
    rows = [
        Row("decoder", shape, form, step)
        for shape in shapes
        for form in FORMS
        for step in (False, True)
        if (form != "unrolled" or shape in UNROLLED) and (step or form != "scanned, remat")
    ]
    return rows + [Row(name, step=step) for name in models for step in (False, True)]


def decoder_case(row: Row) -> Case:
    """A call or a train step of the decoder, with abstract parameters."""
    size, batch, length, changes = SHAPES[row.shape]
    config = dataclasses.replace(decoder.SIZES[size], **changes, **FORMS[row.form])
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(model: decoder.Decoder, tokens: jax.Array) -> jax.Array:
        import optax

        return optax.softmax_cross_entropy_with_integer_labels(model(tokens).astype(jnp.float32), tokens).mean()

    if row.step:
        return step_of(compax.capture(model, tokens, loss=loss))
    return call_of(compax.capture(model, tokens))


def model_case(row: Row) -> Case:
    """A call or a train step (the mean square of its output as the loss) of somebody else's model."""
    program = zoo.build(row.model).capture()
    if not row.step:
        return call_of(program)
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
    return step_of(compax.capture(squared, dict(program.params), *shapes))


def build(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """What a child process compiles: a row, whole on the one chip of a mesh."""
    case = Row(**arguments).case()
    whole = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), case.arguments)
    return Built(jax.jit(case.function, donate_argnums=case.donated).trace(*given), {})


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What the compiler says of a computation on one device.

    Attributes:
        peak: the most bytes that are in use at a time, in all memories of the device together; None on a CPU, whose
            figure leaves temporaries out, and where it does not fit.
        allocated: bytes set aside for arguments, results that take no argument's place, and temporaries in main memory
            with the gaps between them; where it does not fit, what the compiler says that it would need.
    """

    peak: int | None
    allocated: int


def compiled(row: Row, case: Case, target: str, hlo: str | None) -> Allocation:
    """Compiles a case for one device.

    Raises:
        CompileError: it does not fit, and the compiler does not say by how much.
    """
    if target == "cpu":
        made = jax.jit(case.function, donate_argnums=case.donated).lower(*case.arguments).compile()
        memory = made.memory_analysis()
        assert memory is not None
        if hlo:
            pathlib.Path(hlo).write_text(made.as_text() or "", encoding="utf-8")
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Allocation(None, kept + memory.temp_size_in_bytes)
    found = compile_for(Request(Target.parse(target), {"data": 1}, BUILDER, dataclasses.asdict(row), hlo))
    if found.memory is None:
        assert found.shortage is not None
        if found.shortage.needed is None:
            raise CompileError(f"{row.name} does not fit {target}, and the compiler does not say by how much")
        return Allocation(None, found.shortage.needed)
    memory = found.memory
    return Allocation(memory.peak, memory.arguments + memory.outputs + memory.temporaries)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,small", help=f"of the decoder: {','.join(SHAPES)}")
    parser.add_argument("--models", default=",".join(MODELS), help="of the zoo; empty for none")
    parser.add_argument("--targets", default="cpu", help="such as cpu,v5e,v5p,v6e; one chip of each")
    parser.add_argument("--only", default="*", help="names of computations, as a glob")
    parser.add_argument("--out", help="where to keep the rows: a JSON object a line, written as they come")
    parser.add_argument("--hlo", help="a folder for the compiled texts")
    args = parser.parse_args()
    rows = rows_of([x for x in args.shapes.split(",") if x], [x for x in args.models.split(",") if x])
    table: list[tuple[str, ...]] = []
    errors: dict[str, list[float]] = {"peak": [], "allocated": []}
    for row in rows:
        if not fnmatch.fnmatch(row.name, args.only):
            continue
        case = row.case()
        for target in args.targets.split(","):
            hlo = None
            if args.hlo:
                hlo = str(pathlib.Path(args.hlo) / f"{target}-{row.name}.txt".replace(", ", "-").replace(" ", "-"))
            predicted = case.predicted(Target.parse(target).chip.platform).peak
            found = compiled(row, case, target, hlo)
            cells: list[str] = []
            for name, size in dataclasses.asdict(found).items():
                if size is None:
                    cells += ["not said", ""]
                else:
                    errors[name].append(predicted / size - 1)
                    cells += [bytes_text(size), f"{errors[name][-1]:+.1%}"]
            table.append((target, row.name, bytes_text(predicted), *cells))
            print(*table[-1], sep="  ", file=sys.stderr, flush=True)
            if args.out:
                kept = {"target": target, "computation": row.name, "predicted": predicted, **dataclasses.asdict(found)}
                with open(args.out, "a", encoding="utf-8") as lines:
                    print(json.dumps(kept), file=lines)
    reporting.print_table(
        f"peak of {len(table)} computations: predicted from the graph, and as XLA has it",
        ("target", "computation", "predicted", "compiled peak", "error", "compiled allocation", "error"),
        table,
        basis="compiled",
        footer=tuple(
            f"within 5 % of the compiler's {name}: {sum(abs(error) <= 0.05 for error in found)} of {len(found)}"
            for name, found in errors.items()
        ),
    )


if __name__ == "__main__":
    main()
