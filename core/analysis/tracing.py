"""What a program is once it is lowered and differentiated, with every operation traced back to where it comes from.

The program is evaluated under names that say which of its operations is at work; JAX carries names into what it makes
of operations: tangents, transposes, rematerialized copies. So the operations of a whole train step know where they come
from, and in which phase they are.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax

from compax import _jax, ir, lowering
from compax.ir import Graph, Op, Path

if TYPE_CHECKING:
    from compax.capture import Captured
    from compax.program import Program

Phase = Literal["forward", "recompute", "backward", "update"]

_SCOPE = re.compile(r"compax_op(\d+)")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation of a traced computation comes from.

    Attributes:
        path: where the operation that it was made of stands in the captured graph; none if it is not of the program, as
            the optimizer's are not.
        phase: "forward"; "recompute" (a rematerialized copy); "backward"; "update" (what is not of the program).
    """

    path: Path | None
    phase: Phase


class Scoped(lowering.Evaluator):
    """An evaluator under which every operation is traced in a scope with its number.

    Bodies are entered and evaluated anew, so that the operations in them have scopes as well.
    """

    def __init__(self, captured: "Captured", platform: str | None = None):
        super().__init__(platform, rebuild=True)
        self.captured = captured
        self._numbers = _numbers(captured.graph)

    def apply(self, op: Op, operands: list[Any]) -> list[Any]:
        number = self._numbers.get(id(op))
        if number is None:
            return super().apply(op, operands)
        with jax.named_scope(f"compax_op{number}"):
            return super().apply(op, operands)


@dataclasses.dataclass(frozen=True)
class Role:
    """What an input of a traced computation is.

    Attributes:
        kind: such as "parameter"; as `traced` was told.
        path: its place in that argument, such as `blocks.0.mlp.up.kernel`.
    """

    kind: str
    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A computation with a program in it.

    Attributes:
        graph: the whole computation, as JAX hands it to XLA.
        inputs: what its inputs are.
        captured: the graph of the program in it.
        places: for each operation of `graph`, bodies included, where it comes from.
    """

    graph: Graph
    inputs: tuple[Role, ...]
    captured: "Captured"
    places: Mapping[Path, Place]


def traced(
    function: Callable[..., Any], captured: "Captured", *, platform: str | None = None, **arguments: Any
) -> Traced:
    """Traces a computation that evaluates a program.

    Args:
        function: takes a `Scoped` evaluator, by which it evaluates the program, and the arguments by name.
        captured: the program's graph.
        platform: what the program is lowered for; by default JAX's platform.
        **arguments: pytrees of shapes (`jax.ShapeDtypeStruct`) or arrays; the names are the kinds of the inputs.

    Returns:
        The computation, its inputs and outputs flat, in the order of the arguments.
    """
    evaluator = Scoped(captured, platform)
    names = tuple(arguments)
    closed = _jax.make_jaxpr(
        lambda *given: function(evaluator, **dict(zip(names, given, strict=True))), *arguments.values()
    )
    graph = ir.import_jaxpr(closed)
    inputs = tuple(
        Role(kind, jax.tree_util.keystr(path, simple=True, separator="."))
        for kind, argument in arguments.items()
        for path, _ in jax.tree_util.tree_flatten_with_path(argument)[0]
    )
    return Traced(graph, inputs, captured, dict(_places(graph, _Paths(captured.graph))))


def traced_call(program: "Program", entry: str | None = None, *, platform: str | None = None) -> Traced:
    """A call of a program: from its parameters, its state and the arguments of an entry to all of its outputs.

    Args:
        program: the program; its parameters may be shapes.
        entry: which entry; the first one by default.
        platform: what it is lowered for; by default JAX's platform.

    Raises:
        SignatureError: there is no such entry.
    """
    captured = program.graph(entry)
    return traced(
        evaluated,
        captured,
        platform=platform,
        parameter=program.params,
        state=program.state,
        argument=argument_shapes(captured),
    )


def argument_shapes(captured: "Captured") -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the arguments that a graph takes, by path."""
    return {
        tag.path: _jax.as_struct(value.aval)
        for tag, value in zip(captured.inputs, captured.graph.inputs, strict=True)
        if tag.kind == "argument"
    }


def evaluated(
    evaluator: Scoped, parameter: Mapping[str, Any], state: Mapping[str, Any], argument: Mapping[str, Any]
) -> list[jax.Array]:
    """All outputs of a captured graph under a `Scoped` evaluator."""
    captured = evaluator.captured
    stores = {"parameter": parameter, "state": state, "argument": argument}
    with captured.under_mesh():
        return evaluator.whole(captured.graph, [stores[tag.kind][tag.path] for tag in captured.inputs])


def _numbers(graph: Graph) -> dict[int, int]:
    """A number for each operation of a graph, bodies included; an operation of a shared body has one."""
    numbers: dict[int, int] = {}
    for _, op in ir.walk(graph):
        numbers.setdefault(id(op), len(numbers))
    return numbers


class _Paths:
    """Where the operations with some numbers stand in a captured graph."""

    def __init__(self, graph: Graph):
        numbers = _numbers(graph)
        self.of_number: dict[int, list[Path]] = {}
        for path, op in ir.walk(graph):
            self.of_number.setdefault(numbers[id(op)], []).append(path)

    def last(self, numbers: Sequence[int]) -> Path | None:
        """The path of the last of some operations, which is inside of those before it as far as they hold it."""
        if not numbers:
            return None
        found = self.of_number[numbers[-1]]
        for outer in numbers[:-1]:
            inside = [path for path in found if any(_holds(holder, path) for holder in self.of_number[outer])]
            found = inside or found
        return found[0]


def _holds(outer: Path, inner: Path) -> bool:
    depth = len(outer) - 1
    return len(inner) > len(outer) and inner[:depth] == outer[:depth] and inner[depth][0] == outer[depth][0]


def _places(graph: Graph, paths: _Paths) -> Iterator[tuple[Path, Place]]:
    def visit(graph: Graph, prefix: Path, outer: str) -> Iterator[tuple[Path, Place]]:
        for position, op in enumerate(graph.ops):
            stack = f"{outer}/{_jax.name_stack(op.equation)}"
            found = [int(number) for number in _SCOPE.findall(stack)]
            yield (*prefix, (position, -1)), Place(paths.last(found), _phase(stack, bool(found)))
            for index, body in enumerate(op.bodies):
                yield from visit(body, (*prefix, (position, index)), stack)

    return visit(graph, (), "")


def _phase(stack: str, of_program: bool) -> Phase:
    if "rematted_computation" in stack:
        return "recompute"
    if "transpose(" in stack:
        return "backward"
    return "forward" if of_program or "jvp(" in stack else "update"
