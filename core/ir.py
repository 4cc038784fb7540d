"""The intermediate representation: values and operations in order, with nested graphs as bodies.

A `Graph` is imported from a jaxpr and keeps what is needed to bind every operation again exactly as JAX recorded it.
Everything here is immutable; a rewrite builds new graphs and leaves untouched bodies as the very same objects, so that
one body that serves many layers stays one body.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compax import _jax

Path = tuple[tuple[int, int], ...]
"""Where an operation stands: (position of the enclosing operation, index of its body) pairs, then (position, -1)."""


class Value:
    """One array in a graph: assigned once, by an operation or as a graph input. Compared by identity.

    Attributes:
        aval: JAX's abstract value: shape, dtype, weak type, sharding, and varying manual axes.
    """

    __slots__ = ("aval",)

    def __init__(self, aval: _jax.AbstractValue):
        self.aval = aval

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def dtype(self) -> Any:
        return getattr(self.aval, "dtype", None)

    def __repr__(self) -> str:
        return f"Value({_jax.aval_text(self.aval)})"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Literal:
    """A constant written at its use.

    Attributes:
        value: the array or scalar.
        aval: its abstract value; a scalar's weak type is kept.
    """

    value: Any
    aval: _jax.AbstractValue

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(np.shape(self.value))

    @property
    def dtype(self) -> Any:
        return getattr(self.aval, "dtype", None)


Operand = Value | Literal


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One operation: a JAX primitive, or one of ours that a pass put there.

    Attributes:
        name: the primitive's name, or that of an operation of ours (`compax.lowering.operation`).
        inputs: operands in order.
        outputs: the values that it defines.
        attributes: static parameters without nested computations.
        bodies: nested graphs. For an operation of ours, `bodies[0]` takes the same inputs and defines its meaning.
        equation: for a primitive, what JAX recorded, to bind it again; `None` for an operation of ours.
    """

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Any]
    bodies: tuple["Graph", ...] = ()
    equation: _jax.Equation | None = None

    @property
    def imported(self) -> bool:
        """Whether every body is still the one that JAX recorded, so that the operation can be bound as it is."""
        return self.equation is not None and all(body.imported for body in self.bodies)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Graph:
    """One computation.

    Attributes:
        inputs: values that the caller provides.
        ops: operations in order of evaluation.
        outputs: what is returned.
        constants: values with their arrays, closed over by the computation.
        imported: whether this graph is, bodies included, what JAX recorded.
    """

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Operand, ...]
    constants: tuple[tuple[Value, Any], ...] = ()
    imported: bool = False

    def producers(self) -> dict[Value, Op]:
        """The operation that defines each value of this graph (bodies not entered)."""
        return {value: op for op in self.ops for value in op.outputs}

    def users(self) -> dict[Value, list[Op]]:
        """The operations that read each value of this graph (bodies not entered)."""
        users: dict[Value, list[Op]] = {}
        for op in self.ops:
            for operand in op.inputs:
                if isinstance(operand, Value):
                    users.setdefault(operand, []).append(op)
        return users


def walk(graph: Graph, prefix: Path = ()) -> Iterator[tuple[Path, Op]]:
    """Every operation with its path, bodies included: an operation with bodies comes before what is in them."""
    for position, op in enumerate(graph.ops):
        yield (*prefix, (position, -1)), op
        for index, body in enumerate(op.bodies):
            yield from walk(body, (*prefix, (position, index)))


def resolve(graph: Graph, path: Path) -> Op:
    """The operation at `path`."""
    for position, index in path[:-1]:
        graph = graph.ops[position].bodies[index]
    return graph.ops[path[-1][0]]


def forwarded(graph: Graph, operand: Operand) -> Operand:
    """The value that `operand` is a copy of, where operations with bodies only hand a value on."""
    producers = graph.producers()
    while isinstance(operand, Value) and operand in producers:
        op = producers[operand]
        index = op.outputs.index(operand)
        source = _handed_on(op, index)
        if source is None:
            return operand
        operand = source
    return operand


def _handed_on(op: Op, index: int) -> Operand | None:
    """The operand that output `index` of an operation with bodies repeats, if that is plain."""
    if op.name in ("jit", "pjit", "remat", "remat2", "checkpoint"):
        offset = 0
    elif op.name == "scan":
        constants, carry = _jax.scan_counts(dict(op.attributes))
        if index < carry:
            body = op.bodies[0]
            same = forwarded(body, body.outputs[index]) is body.inputs[constants + index]
            return op.inputs[constants + index] if same else None
        offset = constants + carry
    else:
        return None
    body = op.bodies[0]
    source = forwarded(body, body.outputs[index])
    for position, value in enumerate(body.inputs):
        if value is source and position >= offset:
            return op.inputs[position]
    return None


Replacement = Callable[[Op], Sequence[Op]]


def rewrite(graph: Graph, replacements: Mapping[Path, Replacement]) -> Graph:
    """Replaces single operations, wherever they are nested.

    Args:
        graph: the graph; it is not changed.
        replacements: for each path a function from the operation there to the operations that stand in its place. They
            must define the same output values.

    Returns:
        A new graph. A body that several operations share, and in which the same functions replace the same operations,
        stays one body; what has no replacement is shared with the input.
    """
    memo: dict[Any, Graph] = {}

    def rebuild(graph: Graph, replacements: Mapping[Path, Replacement]) -> Graph:
        if not replacements:
            return graph
        key = (id(graph), frozenset(replacements.items()))
        if key in memo:
            return memo[key]
        here = {path[0][0]: function for path, function in replacements.items() if len(path) == 1}
        nested: dict[tuple[int, int], dict[Path, Replacement]] = {}
        for path, function in replacements.items():
            if len(path) > 1:
                nested.setdefault(path[0], {})[path[1:]] = function
        ops: list[Op] = []
        for position, op in enumerate(graph.ops):
            bodies = tuple(rebuild(body, nested.get((position, index), {})) for index, body in enumerate(op.bodies))
            if any(new is not old for new, old in zip(bodies, op.bodies, strict=True)):
                op = dataclasses.replace(op, bodies=bodies)
            ops.extend(here[position](op) if position in here else (op,))
        memo[key] = dataclasses.replace(graph, ops=tuple(ops), imported=False)
        return memo[key]

    return rebuild(graph, dict(replacements))


def inline(graph: Graph, inputs: Sequence[Operand], outputs: Sequence[Value]) -> list[Op]:
    """The operations of `graph` with its inputs replaced by `inputs` and its outputs written to `outputs`.

    Raises:
        ValueError: an output of `graph` is one of its inputs, a literal, or occurs twice, or `graph` has constants.
    """
    if graph.constants:
        raise ValueError("a graph with constants cannot be inlined; pass them as inputs")
    if len(set(map(id, graph.outputs))) != len(graph.outputs):
        raise ValueError("a graph that returns one value twice cannot be inlined")
    env: dict[Value, Operand] = dict(zip(graph.inputs, inputs, strict=True))
    produced = {value for op in graph.ops for value in op.outputs}
    for inner, outer in zip(graph.outputs, outputs, strict=True):
        if not isinstance(inner, Value) or inner not in produced:
            raise ValueError("a graph that returns an input or a literal cannot be inlined")
        env[inner] = outer
    return [copied(op, env) for op in graph.ops]


def copied(op: Op, env: dict[Value, Any]) -> Op:
    """An operation with what `env` says in place of its operands and results; results that it lacks are made and noted.

    Args:
        op: the operation.
        env: what stands for each value; results of `op` are added.
    """
    for value in op.outputs:
        env.setdefault(value, Value(value.aval))
    return dataclasses.replace(
        op,
        inputs=tuple(env[x] if isinstance(x, Value) else x for x in op.inputs),
        outputs=tuple(env[value] for value in op.outputs),
    )


def trace(function: Callable[..., Any], *avals: _jax.AbstractValue) -> Graph:
    """The graph of a JAX function at given abstract values: the way to make new operations for a rewrite."""
    return import_jaxpr(_jax.trace(function, *avals))


def import_jaxpr(closed: _jax.ClosedJaxpr, memo: dict[int, "Graph"] | None = None) -> Graph:
    """Imports a closed jaxpr with all nested ones; a jaxpr met twice becomes one body.

    Args:
        closed: what `jax.make_jaxpr` returns.
        memo: graphs of nested jaxprs by identity; one dictionary per imported program.
    """
    memo = {} if memo is None else memo
    env: dict[Any, Value] = {}

    def define(variable: Any) -> Value:
        env[variable] = Value(variable.aval)
        return env[variable]

    def read(atom: Any) -> Operand:
        return Literal(atom.val, atom.aval) if _jax.is_literal(atom) else env[atom]

    def body(nested: Any) -> Graph:
        if id(nested) not in memo:
            memo[id(nested)] = import_jaxpr(_jax.close(nested), memo)
        return memo[id(nested)]

    jaxpr, constants = _jax.open_jaxpr(closed)
    inputs = tuple(define(v) for v in jaxpr.invars)
    captured = tuple((define(v), array) for v, array in zip(jaxpr.constvars, constants, strict=True))
    ops = []
    for equation in jaxpr.eqns:
        attributes, nested = _jax.split_parameters(equation)
        operands = tuple(read(atom) for atom in equation.invars)
        ops.append(
            Op(
                name=equation.primitive.name,
                inputs=operands,
                outputs=tuple(define(v) for v in equation.outvars),
                attributes=attributes,
                bodies=tuple(body(n) for n in nested),
                equation=equation,
            )
        )
    outputs = tuple(read(atom) for atom in jaxpr.outvars)
    return Graph(inputs, tuple(ops), outputs, captured, imported=True)
