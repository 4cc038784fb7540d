"""Verification: a program's graphs hold together, and every operation computes what its outputs declare.

Two halves. *Structure*: each value is defined once and before it is read, bodies agree with the operations around them,
inputs, outputs and the store agree. *Re-inference*: the graphs are evaluated abstractly, as lowering would evaluate
them, with the encodings that the program has, and each operation's outputs are compared with what it declares.

An operation that is bound as JAX recorded it, on operands of the shapes and dtypes that it was recorded with, declares
what JAX itself inferred: evaluating it again could only repeat that. So it is enough to establish that this is the case
(equations and values are connected as JAX connected them, bodies included, and the types are those of then), and a
graph of which this holds throughout, with no encoded input, is not evaluated.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax

from compax import _jax
from compax.capture import Captured, Static
from compax.encoding import Encoded
from compax.errors import VerificationError
from compax.ir import Graph, Literal, Op, Operand, Value
from compax.lowering import Evaluator

if TYPE_CHECKING:
    from compax.program import Program

_CALLS = frozenset({"jit", "pjit", "remat", "remat2", "checkpoint"})
Types = Sequence[tuple[tuple[int, ...], Any]]


def verify(program: "Program") -> None:
    """Checks a program: the store, the structure of every graph, and what every operation declares.

    Args:
        program: the program; encoded parameters are followed in the encodings that they have.

    Raises:
        VerificationError: something does not hold; names the entry, the operation and where it stands, what was
            declared and what re-inference gives.
    """
    structure = _Structure()
    for captured in program.graphs.values():
        structure.check(captured)
    program.check()
    if unknown := sorted(program.frozen - program.params.keys()):
        raise VerificationError(
            f"'{unknown[0]}' is frozen, but the program '{program.name}' has no such parameter; take it out of `frozen`"
        )
    for name, _ in program.graphs:
        if name not in program.entries:
            raise VerificationError(
                f"the program '{program.name}' has a graph of the entry '{name}', but no such entry; its entries: "
                f"{', '.join(program.entries)}"
            )
    for captured in program.graphs.values():
        inputs = [_stored(program, tag.kind, tag.path, value) for value, tag in _tagged(captured)]
        if any(isinstance(x, Encoded) for x in inputs) or not structure.recorded(captured.graph):
            _infer(captured, inputs)


def _tagged(captured: Captured) -> Iterator[tuple[Value, Any]]:
    return zip(captured.graph.inputs, captured.inputs, strict=True)


def _stored(program: "Program", kind: str, path: str, value: Value) -> Any:
    """A graph input as the program holds it: an encoding where there is one, else its shape."""
    held: Mapping[str, Any] = program.params if kind == "parameter" else {}
    x = held.get(path)
    return x if isinstance(x, Encoded) else _jax.as_struct(value.aval)


# -- structure --------------------------------------------------------------------------------------------------------


class _Structure:
    """Checks that graphs are well formed; a body that several operations share is checked once."""

    def __init__(self) -> None:
        self._checked: dict[int, Graph] = {}
        self._faithful: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._recorded: dict[int, tuple[Graph, bool]] = {}

    def check(self, captured: Captured) -> None:
        """Checks the graph of one entry, and how its inputs and outputs are tagged."""
        graph, name = captured.graph, captured.entry.name
        if len(graph.inputs) != len(captured.inputs):
            raise VerificationError(
                f"the graph '{name}' has {len(graph.inputs)} inputs, but {len(captured.inputs)} are tagged; "
                "change `Captured.inputs` together with the graph"
            )
        stored = [tag for tag in captured.inputs if tag.kind != "argument"]
        for tag in stored:
            if stored.count(tag) > 1:
                raise VerificationError(f"the graph '{name}' takes the {tag.kind} '{tag.path}' twice; use one input")
        leaves = sum(not isinstance(leaf, Static) for leaf in captured.output_leaves)
        counts = (leaves, len(captured.updates), len(captured.aux), captured.object_updates)
        if sum(counts) != len(graph.outputs):
            raise VerificationError(
                f"the graph '{name}' returns {len(graph.outputs)} values, but its caller expects {sum(counts)}: "
                "%d outputs, %d state updates, %d new values and %d updates of argument objects" % counts
            )
        self._graph(captured, graph, ())

    def recorded(self, graph: Graph) -> bool:
        """Whether every operation is what JAX recorded, wired as recorded, between values of the recorded types."""
        if id(graph) not in self._recorded:
            variables: dict[Value, Any] = {}
            known = all(self._as_recorded(op, variables) for op in graph.ops)
            self._recorded[id(graph)] = (graph, known and len(set(variables.values())) == len(variables))
        return self._recorded[id(graph)][1]

    @staticmethod
    def _as_recorded(op: Op, variables: dict[Value, Any]) -> bool:
        """Whether an operation is as recorded, given the variables that JAX called values by; adds those it meets.

        An equation that a pass made, or took from elsewhere, calls values by other names than its neighbours do.
        """
        if op.equation is None or not op.imported:
            return False
        values = (*op.inputs, *op.outputs)
        for x, atom in zip(values, (*op.equation.invars, *op.equation.outvars), strict=True):
            if not _jax.same_type(x.aval, atom.aval) or isinstance(x, Literal) != _jax.is_literal(atom):
                return False
            if isinstance(x, Value) and variables.setdefault(x, atom) is not atom:
                return False
        return True

    def _graph(self, captured: Captured, graph: Graph, stack: tuple[Op, ...]) -> None:
        if id(graph) in self._checked:
            return
        self._checked[id(graph)] = graph
        defined: set[Value] = set()

        def define(values: Sequence[Value], where: tuple[Op, ...]) -> None:
            for value in values:
                if value in defined:
                    _fail(captured, where, f"{_text(value)} is defined twice; give every operation outputs of its own")
                defined.add(value)

        def read(operands: Sequence[Operand], where: tuple[Op, ...], what: str) -> None:
            for index, x in enumerate(operands):
                if isinstance(x, Value) and x not in defined:
                    _fail(
                        captured,
                        where,
                        f"{what} {index}, {_text(x)}, is not defined before it; define it earlier in the same graph, "
                        "or pass it into the body as an operand",
                    )

        define([*graph.inputs, *(value for value, _ in graph.constants)], stack)
        for op in graph.ops:
            here = (*stack, op)
            read(op.inputs, here, "operand")
            define(op.outputs, here)
            self._bodies(captured, op, here)
        read(graph.outputs, stack, "output")

    def _bodies(self, captured: Captured, op: Op, here: tuple[Op, ...]) -> None:
        if op.equation is None:
            if not op.bodies:
                _fail(captured, here, "an operation of ours needs a body that defines what it computes")
        elif op.imported:
            self._equation(captured, op, here)
        elif op.name not in _jax.ENTERABLE:
            _fail(
                captured,
                here,
                "its body was changed, but it can only be bound as JAX recorded it; leave the body as it was, and "
                "change its operands instead",
            )
        for index, (operands, results) in enumerate(_interfaces(op)):
            body = op.bodies[index]
            _agree(captured, here, f"body {index} takes", body.inputs, "the operation gives", operands)
            _agree(captured, here, f"body {index} returns", body.outputs, "the operation declares", results)
        for body in op.bodies:
            self._graph(captured, body, here)

    def _equation(self, captured: Captured, op: Op, here: tuple[Op, ...]) -> None:
        """An operation that is bound as recorded must be wired as recorded: its bodies are not looked at again."""
        assert op.equation is not None
        if op.name != op.equation.primitive.name:
            _fail(captured, here, f"it is named '{op.name}', but binds '{op.equation.primitive.name}'")
        if len(op.inputs) != len(op.equation.invars) or len(op.outputs) != len(op.equation.outvars):
            _fail(captured, here, "it has another number of operands or outputs than the equation that it binds")
        _, nested = _jax.split_parameters(op.equation)
        if len(nested) != len(op.bodies):
            _fail(captured, here, f"it has {len(op.bodies)} bodies, but the equation that it binds has {len(nested)}")
        for index, (body, jaxpr) in enumerate(zip(op.bodies, nested, strict=True)):
            key = (id(body), id(jaxpr))
            if key in self._faithful:
                continue
            if not _same_wiring(body, jaxpr):
                _fail(
                    captured,
                    here,
                    f"body {index} is marked as imported, but is not what JAX recorded, so that its changes would have "
                    "no effect; build changed graphs with imported=False, as compax.ir.rewrite does",
                )
            self._faithful[key] = (body, jaxpr)


def _same_wiring(body: Graph, jaxpr: Any) -> bool:
    recorded, _ = _jax.open_jaxpr(_jax.close(jaxpr))
    if len(body.ops) != len(recorded.eqns) or len(body.inputs) != len(recorded.invars):
        return False
    env: dict[Any, Value] = dict(zip(recorded.invars, body.inputs, strict=True))
    env.update(zip(recorded.constvars, (value for value, _ in body.constants), strict=True))

    def same(atoms: Sequence[Any], operands: Sequence[Operand]) -> bool:
        if len(atoms) != len(operands):
            return False
        return all(
            isinstance(x, Literal) if _jax.is_literal(atom) else env.get(atom) is x
            for atom, x in zip(atoms, operands, strict=True)
        )

    for op, equation in zip(body.ops, recorded.eqns, strict=True):
        if op.equation is not equation or not same(equation.invars, op.inputs):
            return False
        env.update(zip(equation.outvars, op.outputs, strict=True))
    return same(recorded.outvars, body.outputs)


def _interfaces(op: Op) -> list[tuple[Types, Types]]:
    """Types of operands and results that each body has to have; a shape of `None` is not compared."""
    operands, results = _types(op.inputs), _types(op.outputs)
    if op.equation is None or op.name in _CALLS:
        return [(operands, results)]
    if op.name == "shard_map":
        return [(_anyshape(operands), _anyshape(results))]
    if op.name == "cond":
        return [(operands[1:], results)] * len(op.bodies)
    if op.name == "scan":
        constants, carry = _jax.scan_counts(dict(op.attributes))
        whole = constants + carry
        return [([*operands[:whole], *_rows(operands[whole:])], [*results[:carry], *_rows(results[carry:])])]
    if op.name == "while":
        condition, body = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
        carried = operands[condition + body :]
        test = [((), jax.numpy.dtype(bool))]
        return [
            ([*operands[:condition], *carried], test),
            ([*operands[condition : condition + body], *carried], results),
        ]
    return []


def _types(operands: Sequence[Operand]) -> Any:
    return [(x.shape, x.dtype) for x in operands]


def _anyshape(types: Any) -> Any:
    return [(None, dtype) for _, dtype in types]


def _rows(types: Any) -> Any:
    return [(shape[1:], dtype) for shape, dtype in types]


def _agree(captured: Captured, here: tuple[Op, ...], inner: str, have: Any, outer: str, want: Any) -> None:
    if len(have) != len(want):
        _fail(captured, here, f"{inner} {len(have)} values, but {outer} {len(want)}")
    for index, (x, (shape, dtype)) in enumerate(zip(have, want, strict=True)):
        if x.dtype != dtype or (shape is not None and x.shape != shape):
            given = x.shape if shape is None else shape
            _fail(captured, here, f"{inner} {_text(x)} as value {index}, but {outer} {_type_text(given, dtype)}")


# -- re-inference -----------------------------------------------------------------------------------------------------


class _Inference(Evaluator):
    """An evaluator that compares what each operation gives with what it declares."""

    def __init__(self, captured: Captured):
        super().__init__()
        self._captured = captured
        self._stack: list[Op] = []

    def apply(self, op: Op, operands: list[Any]) -> list[Any]:
        # A rule may evaluate the operation that it stands for once more, on what an encoding wraps.
        if any(op.outputs and op.outputs[:1] == active.outputs[:1] for active in self._stack):
            return super().apply(op, operands)
        with self._entered(op):
            outputs = super().apply(op, operands)
            self._compare(op, outputs)
            if op.equation is None:
                self._compare(op, self.run(op.bodies[0], operands), " by its body")
        return outputs

    @contextlib.contextmanager
    def _entered(self, op: Op) -> Generator[None]:
        self._stack.append(op)
        try:
            yield
        except VerificationError:
            raise
        except Exception as error:
            where = _location(self._captured, tuple(self._stack))
            raise VerificationError(f"{where}: it cannot be evaluated: {_reason(error)}") from error
        finally:
            self._stack.pop()

    def _compare(self, op: Op, outputs: Sequence[Any], how: str = "") -> None:
        where = tuple(self._stack)
        if len(outputs) != len(op.outputs):
            _fail(self._captured, where, f"it declares {len(op.outputs)} outputs and gives {len(outputs)}{how}")
        for index, (value, x) in enumerate(zip(op.outputs, outputs, strict=True)):
            if tuple(x.shape) != value.shape or x.dtype != value.dtype:
                _fail(
                    self._captured,
                    where,
                    f"output {index} is declared {_text(value)}, but re-inference gives {_type_text(x.shape, x.dtype)}"
                    f"{how}; re-infer the users of what was changed (compax.infer.reinfer), or declare what the "
                    "operation computes",
                )


def _infer(captured: Captured, inputs: Sequence[Any]) -> None:
    evaluator = _Inference(captured)
    mesh = captured.signature.mesh
    context = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)

    with context:
        jax.eval_shape(lambda *arrays: evaluator.whole(captured.graph, arrays), *inputs)


# -- where ------------------------------------------------------------------------------------------------------------


def _fail(captured: Captured, where: Sequence[Op], message: str) -> NoReturn:
    raise VerificationError(f"{_location(captured, where)}: {message}")


def _location(captured: Captured, where: Sequence[Op]) -> str:
    graph: Graph | None = captured.graph
    steps: list[str] = []
    for depth, op in enumerate(where):
        position = next((i for i, other in enumerate(graph.ops) if other is op), None) if graph else None
        steps.append(f"'{op.name}'" if position is None else f"operation {position} '{op.name}'")
        follower = where[depth + 1] if depth + 1 < len(where) else None
        bodies = [b for b in op.bodies if follower is None or any(other is follower for other in b.ops)]
        graph = bodies[0] if bodies else None
    text = " > ".join([f"graph '{captured.entry.name}'", *steps])
    if where:
        if reads := _parameters(captured, where):
            text += f", which reads {', '.join(reads)}"
        if where[-1].equation is not None:
            text += f", recorded at {_jax.source_text(where[-1].equation)}"
    return text


def _parameters(captured: Captured, where: Sequence[Op]) -> list[str]:
    """Parameters and state that the operands of the last operation are plain rearrangements of."""
    graph = captured.graph
    names: dict[Value, str] = {}
    if len(captured.inputs) == len(graph.inputs):
        names = {value: f"'{tag.path}'" for value, tag in _tagged(captured) if tag.kind != "argument"}
    for op, follower in zip(where, (*where[1:], None), strict=True):
        producers = graph.producers()
        found = [_origin(x, producers, names) for x in op.inputs]
        if follower is None:
            return list(dict.fromkeys(name for name in found if name is not None))
        body = next((b for b in op.bodies if any(other is follower for other in b.ops)), None)
        if body is None:
            return []
        given = found[1:] if op.name == "cond" else found
        if len(given) != len(body.inputs):
            return []
        graph = body
        names = {value: name for value, name in zip(body.inputs, given, strict=True) if name is not None}
    return []


def _origin(x: Operand, producers: Mapping[Value, Op], names: Mapping[Value, str]) -> str | None:
    """The name of the value that `x` comes from by operations with one operand."""
    for _ in range(len(producers) + 1):
        if not isinstance(x, Value) or x in names or x not in producers:
            break
        values = [y for y in producers[x].inputs if isinstance(y, Value)]
        if len(values) != 1:
            break
        x = values[0]
    return names.get(x) if isinstance(x, Value) else None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def _text(x: Operand) -> str:
    return _jax.aval_text(x.aval)


def _type_text(shape: Sequence[int], dtype: Any) -> str:
    return f"{_jax.dtype_text(dtype)}[{','.join(map(str, shape))}]"
