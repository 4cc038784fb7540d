"""Re-inference: a graph in other dtypes.

An imported graph is fixed in its dtypes, and a value that takes another one changes everything after it. `reinfer`
walks the graph in order, bodies included, and gives each operation operands of one dtype, which a policy chooses.
Operations in the table of `compax.infer_rules` then compute in that dtype, with constants and dtype parameters changed
to fit; carried values of loops and results of branches are brought to one dtype; everything else gets its operands in
the dtypes that JAX recorded, by conversions that are counted. Outputs keep their dtypes, so callers, state and caches
see no change.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.errors import InferenceError
from compax.infer_rules import OPERANDWISE, POLYMORPHIC, Change, retypable, why_not, widest
from compax.ir import Graph, Literal, Op, Operand, Path, Value

_MOST_ROUNDS = 8


class Kind(NamedTuple):
    """What is known of a value besides its shape.

    Attributes:
        dtype: its dtype.
        tag: what the policy notes about it.
    """

    dtype: Any
    tag: Hashable


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Typed:
    """An operand of the graph that is being made.

    Attributes:
        operand: the value or literal.
        tag: what the policy notes about it.
    """

    operand: Operand
    tag: Hashable

    @property
    def kind(self) -> Kind:
        return Kind(self.operand.dtype, self.tag)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where an operation stands.

    Attributes:
        graph: the graph, as it was recorded.
        path: the operation's path from the outermost graph.
    """

    graph: Graph
    path: Path


class Policy:
    """Chooses the dtype in which each operation computes. This one does what JAX does: operands are promoted.

    A tag is whatever a policy wants to remember of a value; here, whether it is weak: made of literals alone, which
    take the dtype of what they meet. Choices have to depend on operations, tags and paths alone, so that equal bodies
    in equal circumstances stay one body.
    """

    def source(self, dtype: Any) -> Hashable:
        """The tag of a value that nothing with a tag led to: an input, a constant, a conversion from integers."""
        return False

    def literal(self, literal: Literal) -> Hashable:
        """The tag of a literal."""
        return True

    def decide(self, op: Op, operands: Sequence[Kind], place: Place) -> Kind:
        """The dtype in which a polymorphic operation computes, and the tag of its outputs.

        Args:
            op: the operation as it was recorded.
            operands: its floating operands, as they are now; at least one. What `Op.inputs` says is how they were.
            place: where it stands.

        Returns:
            A dtype of `None` leaves operands as they come, promoted if they differ.
        """
        strong = [kind.dtype for kind in operands if not kind.tag]
        if op.name == "convert_element_type" and op.inputs[0].dtype != op.outputs[0].dtype:
            return Kind(op.outputs[0].dtype, False) if retypable(op.outputs[0].dtype) else Kind(None, False)
        return Kind(widest(*strong) if strong else None, not strong)

    def recorded(self, op: Op, operands: Sequence[Kind]) -> Hashable:
        """The tag of the outputs of an operation that is evaluated in the dtypes that JAX recorded."""
        return False

    def passed(self, kind: Kind) -> Kind:
        """How an operand enters a body."""
        return kind

    def carried(self, kind: Kind) -> Kind:
        """How a value that a loop carries enters its first turn."""
        return Kind(kind.dtype, False)

    def carried_on(self, before: Kind, after: Kind) -> Kind:
        """How a value that a loop carries enters every turn, if one that enters as `before` leaves as `after`."""
        return Kind(widest(before.dtype, after.dtype), False)

    def joined(self, results: Sequence[Kind]) -> Kind:
        """What branches that give `results` have to give."""
        return Kind(widest(*(kind.dtype for kind in results)), all(kind.tag for kind in results))

    def scope(self, path: Path) -> Hashable:
        """Whatever of the choices inside a body depends on its path, the same for bodies that may stay one."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Reinferred:
    """What re-inference gives.

    Attributes:
        graph: the new graph; the one that was given if nothing changes.
        fallbacks: operations that got operands in the dtypes that JAX recorded, (name, reason) to how many there are;
            those in a body that serves several layers count once.
    """

    graph: Graph
    fallbacks: Mapping[tuple[str, str], int]


def reinfer(
    graph: Graph,
    changes: Mapping[Value, Any] | None = None,
    policy: Policy | None = None,
    tags: Mapping[Value, Hashable] | None = None,
) -> Reinferred:
    """A graph in other dtypes.

    Args:
        graph: the graph; it is not changed.
        changes: inputs of the graph that come in another floating dtype, with that dtype.
        policy: chooses the dtypes in which operations compute; JAX's promotion by default.
        tags: tags of inputs, where they are not what the policy says of any input.

    Raises:
        InferenceError: `changes` names what is no floating input of the graph, or a loop finds no dtypes to carry.
    """
    policy, changes, tags = policy or Policy(), changes or {}, tags or {}
    for value, dtype in changes.items():
        if value not in graph.inputs or not retypable(value.dtype) or not retypable(dtype):
            raise InferenceError(
                f"{_jax.aval_text(value.aval)} cannot become {_jax.dtype_text(dtype)}: only floating inputs of the "
                "graph, of 16 bits or more, change their dtype; convert where the value is used instead"
            )
    engine = _Engine(policy)
    kinds = []
    for value in graph.inputs:
        dtype = changes.get(value, value.dtype)
        tag = tags[value] if value in tags else policy.source(dtype)
        kinds.append(Kind(dtype, tag if retypable(dtype) else None))
    wanted = [x.dtype for x in graph.outputs]
    new, _ = engine.graph(graph, kinds, (), wanted, None)
    return Reinferred(new, dict(engine.fallbacks))


class _Engine:
    """Re-infers graphs; a body is made once for each set of kinds that it is entered with."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.fallbacks: collections.Counter[tuple[str, str]] = collections.Counter()
        self._memo: dict[Any, tuple[Graph, list[Kind], Graph]] = {}

    def graph(
        self,
        graph: Graph,
        inputs: Sequence[Kind],
        path: Path,
        wanted: Sequence[Any],
        beside: _jax.Equation | None,
    ) -> tuple[Graph, list[Kind]]:
        """A graph for inputs of other kinds.

        Args:
            graph: the graph as it was recorded.
            inputs: the kind of each input.
            path: the path of what is in it, without the last step.
            wanted: the dtype of each output, or `None`: whatever comes out.
            beside: an equation whose settings conversions take, if the graph has none.

        Returns:
            The new graph, and the kind of each output as it came out, before it was brought to the wanted dtype.
        """
        key = (id(graph), tuple(inputs), tuple(wanted), self.policy.scope(path))
        if key not in self._memo:
            new, kinds = _Frame(self, graph, path, beside).run(inputs, wanted)
            self._memo[key] = (new, kinds, graph)
        return self._memo[key][:2]


class _Frame:
    """Re-inference of one graph."""

    def __init__(self, engine: _Engine, graph: Graph, path: Path, beside: _jax.Equation | None):
        self.engine = engine
        self.policy = engine.policy
        self.source = graph
        self.path = path
        self.beside = next((op.equation for op in graph.ops if op.equation is not None), beside)
        self.env: dict[Value, Typed] = {}
        self.ops: list[Op] = []
        self.casts: dict[tuple[Value, Any], Value] = {}

    def run(self, inputs: Sequence[Kind], wanted: Sequence[Any]) -> tuple[Graph, list[Kind]]:
        graph = self.source
        values = [self.retype(value, kind.dtype) for value, kind in zip(graph.inputs, inputs, strict=True)]
        for old, new, kind in zip(graph.inputs, values, inputs, strict=True):
            self.env[old] = Typed(new, kind.tag)
        for value, _ in graph.constants:
            self.env[value] = Typed(value, self.policy.source(value.dtype) if retypable(value.dtype) else None)
        for position, op in enumerate(graph.ops):
            self.operation(op, position)
        results = [self.read(x) for x in graph.outputs]
        outputs = [
            x.operand if dtype is None or not retypable(x.operand.dtype) else self.convert(x, dtype)
            for x, dtype in zip(results, wanted, strict=True)
        ]
        kinds = [x.kind for x in results]
        same = len(self.ops) == len(graph.ops) and all(new is old for new, old in zip(self.ops, graph.ops, strict=True))
        if same and all(
            new is old for new, old in zip((*values, *outputs), (*graph.inputs, *graph.outputs), strict=True)
        ):
            return graph, kinds
        return Graph(tuple(values), tuple(self.ops), tuple(outputs), graph.constants), kinds

    def read(self, x: Operand) -> Typed:
        if isinstance(x, Literal):
            return Typed(x, self.policy.literal(x) if retypable(x.dtype) else None)
        return self.env[x]

    def operation(self, op: Op, position: int) -> None:
        operands = [self.read(x) for x in op.inputs]
        self.beside = op.equation or self.beside
        if op.equation is None and op.bodies:
            self.ours(op, operands, (*self.path, (position, 0)))
        elif op.name in _BODIES:
            _BODIES[op.name](self, op, operands, (*self.path, (position, 0)))
        elif not any(retypable(x.operand.dtype) for x in operands):
            tags = [self.policy.source(x.dtype) if retypable(x.dtype) else None for x in op.outputs]
            self.emit(op, [x.operand for x in operands], tags)
        elif op.name in OPERANDWISE and op.equation is not None:
            kept = [x.operand for x in operands]
            outputs = [self.retype(v, x.dtype) for v, x in zip(op.outputs, kept, strict=True)]
            self.emit(op, kept, [x.tag for x in operands], outputs)
        elif op.name == "convert_element_type" and op.attributes.get("sharding") is None:
            self.conversion(op, operands[0], (*self.path, (position, -1)))
        elif op.name in POLYMORPHIC and op.equation is not None:
            self.polymorphic(op, operands, (*self.path, (position, -1)))
        else:
            self.as_recorded(op, operands)

    # -- operations without bodies that are entered -------------------------------------------------------------------

    def polymorphic(self, op: Op, operands: list[Typed], path: Path) -> None:
        decision = self.policy.decide(op, [x.kind for x in operands if retypable(x.operand.dtype)], self.place(path))
        current = [x.operand.dtype for x in operands if retypable(x.operand.dtype)]
        recorded = [x.dtype for x in op.inputs if retypable(x.dtype)]
        if current == recorded and decision.dtype is None:
            self.emit(op, [x.operand for x in operands], [decision.tag] * len(op.outputs))
            return
        dtype = jnp.dtype(widest(*current) if decision.dtype is None else decision.dtype)
        if all(r == dtype for r in recorded):
            change: Change | None = Change({}, None)
        else:
            change = POLYMORPHIC[op.name](op, dtype)
        if change is None:
            self.as_recorded(op, operands)
            return
        inputs = [self.convert(x, dtype) if retypable(x.operand.dtype) else x.operand for x in operands]
        outputs = [v if change.output is None else self.retype_floating(v, change.output) for v in op.outputs]
        if change.bodies:
            op = dataclasses.replace(op, bodies=change.bodies)
        self.emit(op, inputs, [decision.tag] * len(outputs), outputs, change.parameters)

    def conversion(self, op: Op, x: Typed, path: Path) -> None:
        """The model's own conversion: may have become one to another dtype, or none at all."""
        (output,) = op.outputs
        decision = self.policy.decide(op, [x.kind], self.place(path))
        dtype = x.operand.dtype if decision.dtype is None else jnp.dtype(decision.dtype)
        if not retypable(output.dtype):
            self.emit(op, [self.convert(x, dtype)], [decision.tag], [output])
        elif x.operand.dtype == op.inputs[0].dtype and dtype == output.dtype:
            self.emit(op, [x.operand], [decision.tag])
        else:
            self.env[output] = Typed(self.convert(x, dtype), decision.tag)

    def as_recorded(self, op: Op, operands: list[Typed]) -> None:
        """Evaluates an operation in the dtypes that JAX recorded, whatever its operands have become."""
        inputs = [
            self.convert(x, recorded.dtype) if retypable(x.operand.dtype) else x.operand
            for x, recorded in zip(operands, op.inputs, strict=True)
        ]
        if any(new is not x.operand for new, x in zip(inputs, operands, strict=True)):
            self.engine.fallbacks[op.name, why_not(op)] += 1
        tag = self.policy.recorded(op, [x.kind for x in operands if retypable(x.operand.dtype)])
        self.emit(op, inputs, [tag] * len(op.outputs))

    # -- operations with bodies ---------------------------------------------------------------------------------------

    def ours(self, op: Op, operands: list[Typed], step: Path) -> None:
        """An operation of ours follows the body that defines it, which keeps its form: conversions stay outside."""
        inner = op.bodies[0]
        body, _ = self.body(op, 0, [x.kind for x in operands], step, [None] * len(inner.outputs))
        readers = body.users()
        for index, value in enumerate(body.inputs):
            users = readers.get(value, ())
            targets = {user.outputs[0].dtype for user in users if user.name == "convert_element_type"}
            if len(targets) == 1 and all(user.name == "convert_element_type" for user in users):
                x = operands[index]
                operands[index] = Typed(self.convert(x, targets.pop()), x.tag)
        self.call(op, operands, step)

    def call(self, op: Op, operands: list[Typed], step: Path) -> None:
        """`jit`, `remat`, `shard_map`: one body with the operation's operands and results."""
        entered = [self.enter(x, self.policy.passed) for x in operands]
        body, results = self.body(op, 0, [x.kind for x in entered], step, [None] * len(op.outputs))
        outputs = [self.retype(v, k.dtype) for v, k in zip(op.outputs, results, strict=True)]
        self.emit(self.with_bodies(op, (body,)), [x.operand for x in entered], [k.tag for k in results], outputs)

    def scan(self, op: Op, operands: list[Typed], step: Path) -> None:
        constants, carry = _jax.scan_counts(dict(op.attributes))
        held = [self.enter(x, self.policy.passed) for x in operands[:constants]]
        rows = [self.enter(x, self.policy.passed) for x in operands[constants + carry :]]
        num_ys = len(op.outputs) - carry

        def turn(kinds: list[Kind]) -> tuple[tuple[Graph, ...], list[Kind]]:
            given = [*(x.kind for x in held), *kinds, *(x.kind for x in rows)]
            body, results = self.body(op, 0, given, step, [k.dtype for k in kinds] + [None] * num_ys)
            return (body,), results

        initial = operands[constants : constants + carry]
        bodies, entered, kinds = self.fixpoint(op, initial, turn)
        inputs = [x.operand for x in (*held, *entered, *rows)]
        outputs = [self.retype(v, k.dtype) for v, k in zip(op.outputs, kinds, strict=True)]
        self.emit(self.with_bodies(op, bodies), inputs, [k.tag for k in kinds], outputs)

    def loop(self, op: Op, operands: list[Typed], step: Path) -> None:
        """`while`: a condition and a body over the same carried values."""
        first, second = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
        held = [self.enter(x, self.policy.passed) for x in operands[: first + second]]

        def turn(kinds: list[Kind]) -> tuple[tuple[Graph, ...], list[Kind]]:
            test, _ = self.body(op, 0, [*(x.kind for x in held[:first]), *kinds], step, [None])
            second_step = (*step[:-1], (step[-1][0], 1))
            given = [*(x.kind for x in held[first:]), *kinds]
            body, results = self.body(op, 1, given, second_step, [k.dtype for k in kinds])
            return (test, body), results

        bodies, entered, kinds = self.fixpoint(op, operands[first + second :], turn)
        outputs = [self.retype(v, k.dtype) for v, k in zip(op.outputs, kinds, strict=True)]
        inputs = [x.operand for x in (*held, *entered)]
        self.emit(self.with_bodies(op, bodies), inputs, [k.tag for k in kinds], outputs)

    def fixpoint(
        self, op: Op, initial: Sequence[Typed], turn: Callable[[list[Kind]], tuple[tuple[Graph, ...], list[Kind]]]
    ) -> tuple[tuple[Graph, ...], list[Typed], list[Kind]]:
        """Bodies for which carried values leave a turn as they enter it, those values, and the kinds of all results."""
        kinds = [self.policy.carried(x.kind) if retypable(x.operand.dtype) else x.kind for x in initial]
        for _ in range(_MOST_ROUNDS):
            bodies, results = turn(kinds)
            after = [
                self.policy.carried_on(k, r) if retypable(k.dtype) else k for k, r in zip(kinds, results, strict=False)
            ]
            if after == kinds:
                entered = [Typed(self.to(x, k.dtype), k.tag) for x, k in zip(initial, kinds, strict=True)]
                return bodies, entered, [*kinds, *results[len(kinds) :]]
            kinds = after
        raise InferenceError(
            f"the values that '{op.name}' carries find no dtypes that stay the same from turn to turn "
            f"({_jax.source_text(op.equation)}); the policy has to widen them only"
        )

    def branches(self, op: Op, operands: list[Typed], step: Path) -> None:
        entered = [self.enter(x, self.policy.passed) for x in operands[1:]]
        kinds = [x.kind for x in entered]
        steps = [(*step[:-1], (step[-1][0], index)) for index in range(len(op.bodies))]
        natural: list[Any] = [None] * len(op.outputs)
        results = [self.body(op, index, kinds, each, natural)[1] for index, each in enumerate(steps)]
        joined = [
            self.policy.joined(each) if retypable(each[0].dtype) else each[0] for each in zip(*results, strict=True)
        ]
        wanted = [k.dtype for k in joined]
        bodies = tuple(self.body(op, index, kinds, each, wanted)[0] for index, each in enumerate(steps))
        outputs = [self.retype(v, k.dtype) for v, k in zip(op.outputs, joined, strict=True)]
        inputs = [operands[0].operand, *(x.operand for x in entered)]
        self.emit(self.with_bodies(op, bodies), inputs, [k.tag for k in joined], outputs)

    def body(
        self, op: Op, index: int, kinds: Sequence[Kind], step: Path, wanted: Sequence[Any]
    ) -> tuple[Graph, list[Kind]]:
        return self.engine.graph(op.bodies[index], kinds, step, wanted, op.equation or self.beside)

    def enter(self, x: Typed, how: Callable[[Kind], Kind]) -> Typed:
        if not retypable(x.operand.dtype):
            return x
        kind = how(x.kind)
        return Typed(self.to(x, kind.dtype), kind.tag)

    # -- making operations --------------------------------------------------------------------------------------------

    def place(self, path: Path) -> Place:
        return Place(self.source, path)

    @staticmethod
    def with_bodies(op: Op, bodies: tuple[Graph, ...]) -> Op:
        same = all(new is old for new, old in zip(bodies, op.bodies, strict=True))
        return op if same else dataclasses.replace(op, bodies=bodies)

    @staticmethod
    def retype(value: Value, dtype: Any) -> Value:
        return value if value.dtype == dtype else Value(_jax.with_dtype(value.aval, dtype))

    def retype_floating(self, value: Value, dtype: Any) -> Value:
        return self.retype(value, dtype) if retypable(value.dtype) else value

    def to(self, x: Typed, dtype: Any) -> Operand:
        return self.convert(x, dtype) if retypable(x.operand.dtype) else x.operand

    def convert(self, x: Typed, dtype: Any) -> Operand:
        """An operand in a dtype; each value is converted once to each."""
        operand, dtype = x.operand, jnp.dtype(dtype)
        if operand.dtype == dtype:
            return operand
        if isinstance(operand, Literal):
            return Literal(np.asarray(operand.value).astype(dtype), _jax.with_dtype(operand.aval, dtype))
        if (operand, dtype) not in self.casts:
            assert self.beside is not None, "a graph in which nothing is recorded computes nothing to convert"
            equation = _jax.conversion(self.beside, operand.aval, dtype)
            attributes, _ = _jax.split_parameters(equation)
            output = Value(_jax.with_dtype(operand.aval, dtype))
            self.ops.append(Op("convert_element_type", (operand,), (output,), attributes, (), equation))
            self.casts[operand, dtype] = output
        return self.casts[operand, dtype]

    def emit(
        self,
        op: Op,
        inputs: Sequence[Operand],
        tags: Sequence[Hashable],
        outputs: Sequence[Value] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends an operation with other operands, outputs and parameters; the very same one if nothing differs."""
        outputs = op.outputs if outputs is None else outputs
        for old, new, tag in zip(op.outputs, outputs, tags, strict=True):
            self.env[old] = Typed(new, tag if retypable(new.dtype) else None)
        types = [*zip(inputs, op.inputs, strict=True), *zip(outputs, op.outputs, strict=True)]
        if parameters or any(new.dtype != old.dtype for new, old in types):
            op = self.rebound(op, inputs, outputs, parameters or {})
        if any(new is not old for new, old in types):
            op = dataclasses.replace(op, inputs=tuple(inputs), outputs=tuple(outputs))
        self.ops.append(op)

    @staticmethod
    def rebound(op: Op, inputs: Sequence[Operand], outputs: Sequence[Value], parameters: Mapping[str, Any]) -> Op:
        """An operation whose equation is of the new types; one that is rebuilt from its bodies needs none."""
        if op.equation is None or not op.imported:
            return op
        changed = {**op.equation.params, **parameters}
        equation = _jax.retyped(op.equation, changed, [x.aval for x in inputs], [v.aval for v in outputs])
        attributes, _ = _jax.split_parameters(equation)
        return dataclasses.replace(op, equation=equation, attributes=attributes)


_BODIES: Mapping[str, Callable[[_Frame, Op, list[Typed], Path], None]] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "shard_map"), _Frame.call),
    "scan": _Frame.scan,
    "while": _Frame.loop,
    "cond": _Frame.branches,
}
assert _BODIES.keys() == _jax.ENTERABLE
