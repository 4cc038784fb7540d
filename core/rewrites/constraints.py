"""Puts constraints into a graph: on results of operations, on parameters where they are used, on single operands.

A parameter is constrained in the innermost body that it goes into whole: inside of a scan on the turn's own slice, and
inside of what the backward pass computes again, so that it is gathered again there instead of kept; and after a cast to
fewer bits.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from compax import _jax, ir
from compax.capture import Captured
from compax.composites.sides import CALLS
from compax.constraint import CONSTRAIN, constrain
from compax.errors import RewriteError
from compax.ir import Graph, Op, Operand, Path, Value
from compax.rewrites.splice import emit

GATHERED = "compax.gathered"
"""The name of parameters gathered for their use, which no backward pass should find kept."""

_CALLS = CALLS | {"remat", "remat2", "checkpoint"}
ENTERED = _CALLS | {"scan", "while", "cond"}
"""Operations in whose bodies results are constrained."""


@dataclasses.dataclass(frozen=True)
class Laid:
    """How a value lies.

    Attributes:
        spec: one entry for each dimension.
        gradient: how its gradient lies; as the value if none.
        gathered: whether it is a parameter put together for its use.
    """

    spec: PartitionSpec
    gradient: PartitionSpec | None = None
    gathered: bool = False

    def inner(self) -> "Laid | None":
        """The same for a slice of the leading dimension; none where that dimension is split."""
        if any(spec and spec[0] is not None for spec in (self.spec, self.gradient)):
            return None
        back = None if self.gradient is None else PartitionSpec(*self.gradient[1:])
        return Laid(PartitionSpec(*self.spec[1:]), back, self.gathered)


Chain = tuple[Laid, ...]
"""Constraints that follow each other."""


def _inner(chain: Chain) -> Chain | None:
    found = [laid.inner() for laid in chain]
    return tuple(laid for laid in found if laid is not None) if all(found) else None


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What is to be constrained in a graph.

    Attributes:
        mesh: axes and sizes.
        parameters: by path.
        results: by the operation; of its first result.
        operands: by the operation and the position of the operand; for that operation alone.
        layers: where layers start and stop among the operations at the top. Parameters that are gathered for one are
            not kept for the backward pass.
    """

    mesh: AbstractMesh
    parameters: Mapping[str, Chain] = dataclasses.field(default_factory=dict)
    results: Mapping[Path, Chain] = dataclasses.field(default_factory=dict)
    operands: Mapping[tuple[Path, int], Laid] = dataclasses.field(default_factory=dict)
    layers: tuple[tuple[int, int], ...] = ()


def constrained(captured: Captured, constraints: Constraints) -> Captured:
    """A captured graph with constraints, or the one given if there are none in it."""
    inputs = {
        value: constraints.parameters[tag.path]
        for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True)
        if tag.kind == "parameter" and tag.path in constraints.parameters
    }
    graph = _Inserter(captured, constraints).graph(captured.graph, (), inputs)
    return captured if graph is captured.graph else dataclasses.replace(captured, graph=graph)


class _Inserter:
    def __init__(self, captured: Captured, constraints: Constraints):
        self.captured = captured
        self.constraints = constraints
        self.holders = {path[:d] for path in self._paths() for d in range(1, len(path))}
        self.memo: dict[object, Graph] = {}

    def _paths(self) -> list[Path]:
        return [*self.constraints.results, *(path for path, _ in self.constraints.operands)]

    def graph(self, graph: Graph, prefix: Path, inputs: Mapping[Value, Chain]) -> Graph:
        """A body, reached by some steps, with constraints on inputs that come in whole and on what it computes."""
        key = (graph, self._below(prefix), tuple((graph.inputs.index(x), laid) for x, laid in inputs.items()))
        if key not in self.memo:
            self.memo[key] = self._rewritten(graph, prefix, inputs)
        return self.memo[key]

    def _below(self, prefix: Path) -> frozenset[object]:
        """What is to be done below some steps, said from there: equal bodies with equal constraints stay one."""
        if prefix and not any(holder[: len(prefix)] == prefix for holder in self.holders):
            return frozenset()
        depth = len(prefix)
        results = {(p[depth:], laid) for p, laid in self.constraints.results.items() if p[:depth] == prefix}
        operands = {(p[depth:], i, laid) for (p, i), laid in self.constraints.operands.items() if p[:depth] == prefix}
        return frozenset(results | operands)

    def _rewritten(self, graph: Graph, prefix: Path, inputs: Mapping[Value, Chain]) -> Graph:
        env: dict[Value, Operand] = {}
        special: dict[tuple[Value, Laid], Operand] = {}
        ops: list[Op] = []
        deeper = _deeper(graph, inputs)

        def read(x: Operand) -> Operand:
            return env.get(x, x) if isinstance(x, Value) else x

        cast: dict[Op, Chain] = {}
        waiting: dict[Value, Chain] = {}  # put together at their first use
        for x, laid in inputs.items():
            if x in deeper:
                continue
            if casts := _casts(graph, x):
                cast |= dict.fromkeys(casts, laid)
            else:
                waiting[x] = laid

        def arrive(values: Sequence[Operand]) -> None:
            for x in values:
                if isinstance(x, Value) and (laid := waiting.pop(x, None)) is not None:
                    env[x] = self._put(ops, x, laid)

        begins: list[int] = []
        for position, op in enumerate(graph.ops):
            begins.append(len(ops))
            arrive(op.inputs)
            path, original = (*prefix, (position, -1)), op
            operands = list(map(read, op.inputs))
            for i, x in enumerate(op.inputs):
                laid = self.constraints.operands.get((path, i))
                if laid is not None and isinstance(x, Value):
                    if (x, laid) not in special:
                        special[x, laid] = self._put(ops, operands[i], (laid,))
                    operands[i] = special[x, laid]
            bodies = self._bodies(op, (*prefix, (position, 0)), {x: deeper[x] for x in op.inputs if x in deeper})
            if bodies != op.bodies or any(a is not b for a, b in zip(operands, op.inputs, strict=True)):
                op = dataclasses.replace(op, inputs=tuple(operands), bodies=bodies)
            ops.append(op)
            if original in cast:
                env[op.outputs[0]] = self._put(ops, op.outputs[0], cast[original])
            if chain := self.constraints.results.get(path):
                env[op.outputs[0]] = self._put(ops, read(op.outputs[0]), chain)
        arrive(graph.outputs)
        outputs = tuple(map(read, graph.outputs))
        if len(ops) == len(graph.ops) and all(a is b for a, b in zip(ops, graph.ops, strict=True)):
            return graph
        result = dataclasses.replace(graph, ops=tuple(ops), outputs=outputs, imported=False)
        if self._is_turn(prefix):
            return _forgetting(result, [(0, len(ops))], in_loop=True)
        begins.append(len(ops))
        layers = [(begins[start], begins[stop]) for start, stop in self.constraints.layers] if not prefix else []
        return _forgetting(result, layers, in_loop=False)

    def _is_turn(self, prefix: Path) -> bool:
        """Whether steps lead to the body of a loop."""
        if not prefix:
            return False
        *before, (position, _) = prefix
        return ir.resolve(self.captured.graph, (*before, (position, -1))).name == "scan"

    def _bodies(self, op: Op, first: Path, deeper: Mapping[Operand, Chain]) -> tuple[Graph, ...]:
        if op.name not in ENTERED or op.equation is None:
            return op.bodies
        *before, (position, _) = first
        found = []
        for index, body in enumerate(op.bodies):
            steps = (*before, (position, index))
            inside = dict(_handed(op, body, deeper)) if deeper else {}
            found.append(self.graph(body, steps, inside) if inside or steps in self.holders else body)
        return tuple(found)

    def _put(self, ops: list[Op], x: Operand, chain: Chain) -> Operand:
        mesh = self.constraints.mesh

        def function(value: Any) -> Any:
            for laid in chain:
                value = constrain(value, mesh, laid.spec, laid.gradient)
                value = checkpoint_name(value, GATHERED) if laid.gathered else value
            return value

        try:
            new, (result,) = emit(function, x)
        except RewriteError as error:
            raise RewriteError(f"a sharding constraint: {error}") from error
        ops.extend(new)
        return result


def _forgetting(graph: Graph, stretches: Sequence[tuple[int, int]], *, in_loop: bool) -> Graph:
    """A graph that keeps everything for the backward pass but the parameters gathered in some stretches of it.

    Kept, they would be all parameters on every device: more than what their storage in parts saves.
    """
    ops, position = list[Op](), 0
    for start, stop in stretches:
        inside = graph.ops[start:stop]
        if not any(map(_gathers, inside)):
            continue
        later = {x for op in graph.ops[stop:] for x in op.inputs} | set(graph.outputs)
        ops += [*graph.ops[position:start], _checkpoint(inside, later, in_loop=in_loop)]
        position = stop
    return dataclasses.replace(graph, ops=(*ops, *graph.ops[position:])) if ops else graph


def _gathers(op: Op) -> bool:
    """Whether an operation names a gathered parameter, or a call that keeps what its body does."""
    if op.name == "name":
        return op.attributes["name"] == GATHERED
    return op.name in CALLS and any(map(_gathers, op.bodies[0].ops))


def _checkpoint(inside: Sequence[Op], later: Collection[Operand], *, in_loop: bool) -> Op:
    """Operations as one, under `jax.checkpoint`."""
    like = _jax.abstract(jax.ShapeDtypeStruct((), jnp.float32))
    wrapped = jax.checkpoint(jnp.sin, policy=_all_but_gathered, prevent_cse=not in_loop)
    (remat,) = ir.trace(wrapped, like).ops
    made = {y for op in inside for y in op.outputs}
    given = dict.fromkeys(x for op in inside for x in op.inputs if isinstance(x, Value) and x not in made)
    results = tuple(y for op in inside for y in op.outputs if y in later)
    inner: dict[Value, Any] = {x: Value(x.aval) for x in given}
    steps = tuple(ir.copied(op, inner) for op in inside)
    body = Graph(tuple(inner[x] for x in given), steps, tuple(inner[y] for y in results))
    return dataclasses.replace(remat, inputs=tuple(given), outputs=results, bodies=(body,))


def _all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`. What is constrained comes from its source, which takes less where it is split."""
    return primitive.name != CONSTRAIN and not (primitive.name == "name" and parameters["name"] == GATHERED)


def _casts(graph: Graph, x: Value) -> list[Op]:
    """The casts to fewer bits that alone use a value: what they give is put together in place of it, in fewer bytes."""
    users = [op for op in graph.ops if x in op.inputs]
    narrow = all(op.name == "convert_element_type" and op.outputs[0].dtype.itemsize < x.dtype.itemsize for op in users)
    return users if users and narrow and x not in graph.outputs else []


def _deeper(graph: Graph, inputs: Mapping[Value, Chain]) -> dict[Operand, Chain]:
    """Those inputs that are used by nothing but operations into whose bodies they go whole, or slice by slice."""
    found: dict[Operand, Chain] = {}
    for x, laid in inputs.items():
        users = [op for op in graph.ops if x in op.inputs]
        if users and x not in graph.outputs and all(_handed(op, None, {x: laid}) for op in users):
            found[x] = laid
    return found


def _handed(op: Op, body: Graph | None, given: Mapping[Operand, Chain]) -> list[tuple[Value, Chain]]:
    """Inputs of an operation's body that are the operands given, whole, or slices of them in a scan."""
    if op.equation is None or op.name not in _CALLS | {"scan"} or len(op.bodies) != 1:
        return []
    inner, found = body or op.bodies[0], []
    if len(inner.inputs) != len(op.inputs):
        return []
    sliced = sum(_jax.scan_counts(dict(op.attributes))) if op.name == "scan" else len(op.inputs)
    constants = _jax.scan_counts(dict(op.attributes))[0] if op.name == "scan" else len(op.inputs)
    for i, x in enumerate(op.inputs):
        if x not in given:
            continue
        if constants <= i < sliced:
            return []
        chain = _inner(given[x]) if i >= sliced else given[x] if op.name != "scan" else None
        if chain is None:
            return []
        found.append((inner.inputs[i], chain))
    return found
