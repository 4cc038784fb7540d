"""Splicing: some values of a graph are computed otherwise, by operations that are put between the others.

`emit` makes the operations, from a JAX function and what it is applied to; `splice` puts them in, at the first place
where all that they read is there, and leaves out what nothing needs any more.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from compax import _jax, ir
from compax.errors import RewriteError
from compax.ir import Graph, Op, Operand, Path, Value


def emit(function: Callable[..., Any], *operands: Operand) -> tuple[list[Op], list[Operand]]:
    """The operations of a JAX function of some values, and its results.

    Args:
        function: takes arrays and returns one or several; it closes over nothing that is large.
        *operands: what it is applied to; their types alone are used.

    Raises:
        RewriteError: the function closes over an array; or it would be traced for the inside of a `shard_map` that
            checks over which axes values vary, and these are not known outside of it.
    """
    for x in operands:
        kind = getattr(x.aval, "manual_axis_type", None)
        if kind is not None and kind.varying:
            raise RewriteError(
                "operations cannot be put inside of a shard_map that checks over which axes values vary; write it with "
                "check_vma=False, or the computation outside of it"
            )
    graph = ir.trace(function, *(x.aval for x in operands))
    if graph.constants:
        raise RewriteError("a function that closes over arrays cannot be put into a graph: pass them as operands")
    env: dict[Value, Operand] = dict(zip(graph.inputs, operands, strict=True))
    ops = [ir.copied(op, env) for op in graph.ops]
    return ops, [env[x] if isinstance(x, Value) else x for x in graph.outputs]


def splice(graph: Graph, ops: Iterable[Op], instead: Mapping[Value, Operand]) -> Graph:
    """A graph with more operations, in which some values are replaced.

    Args:
        graph: the graph; it is not changed.
        ops: operations that define values of their own; they may read whatever the graph has, and each other's results.
        instead: for values of the graph what is read in their place, everywhere, also by the new operations.

    Raises:
        RewriteError: what replaces a value is computed from that value.
    """
    new = list(ops)
    producers = {value: op for op in (*graph.ops, *new) for value in op.outputs}

    def read(x: Operand) -> Operand:
        while isinstance(x, Value) and x in instead:
            x = instead[x]
        return x

    outputs = tuple(map(read, graph.outputs))
    needed = _needed([*outputs, *(x for op in graph.ops if _kept(op) for x in map(read, op.inputs))], producers, read)
    ordered: list[Op] = []
    done: set[Op] = set()
    for op in (*graph.ops, *new):
        if op in needed or _kept(op):
            _put(op, producers, read, ordered, done)
    result = tuple(_reading(op, read) for op in ordered)
    return dataclasses.replace(graph, ops=result, outputs=outputs, imported=False)


def with_body(graph: Graph, steps: Path, body: Graph) -> Graph:
    """A graph with one of its bodies replaced.

    Args:
        graph: the graph.
        steps: how the body is reached; the graph itself if there are none.
        body: what stands in its place.
    """
    if not steps:
        return body
    (position, index), *rest = steps
    ops = list(graph.ops)
    bodies = list(ops[position].bodies)
    bodies[index] = with_body(bodies[index], tuple(rest), body)
    ops[position] = dataclasses.replace(ops[position], bodies=tuple(bodies))
    return dataclasses.replace(graph, ops=tuple(ops), imported=False)


def live(graph: Graph) -> set[Op]:
    """The operations that an output needs, and those that do something besides."""
    producers = graph.producers()
    kept = [op for op in graph.ops if _kept(op)]
    needed = _needed([*graph.outputs, *(x for op in kept for x in op.inputs)], producers, lambda x: x)
    return needed | set(kept)


def _kept(op: Op) -> bool:
    return _jax.has_effects(op.equation)


def _needed(wanted: Sequence[Operand], producers: Mapping[Value, Op], read: Callable[[Operand], Operand]) -> set[Op]:
    found: set[Op] = set()
    waiting = list(wanted)
    while waiting:
        x = waiting.pop()
        op = producers.get(x) if isinstance(x, Value) else None
        if op is not None and op not in found:
            found.add(op)
            waiting.extend(map(read, op.inputs))
    return found


def _put(
    op: Op,
    producers: Mapping[Value, Op],
    read: Callable[[Operand], Operand],
    ordered: list[Op],
    done: set[Op],
) -> None:
    """Appends an operation, and before it what it reads."""
    stack, open_ = [(op, False)], set[Op]()
    while stack:
        current, ready = stack.pop()
        if current in done:
            continue
        if ready:
            open_.discard(current)
            done.add(current)
            ordered.append(current)
            continue
        if current in open_:
            raise RewriteError(f"what would replace a value is computed from it, through '{current.name}'")
        open_.add(current)
        stack.append((current, True))
        for x in reversed(current.inputs):
            source = read(x)
            before = producers.get(source) if isinstance(source, Value) else None
            if before is not None and before not in done:
                if before in open_:
                    raise RewriteError(f"what would replace a value is computed from it, through '{before.name}'")
                stack.append((before, False))


def _reading(op: Op, read: Callable[[Operand], Operand]) -> Op:
    inputs = tuple(map(read, op.inputs))
    same = all(new is old for new, old in zip(inputs, op.inputs, strict=True))
    return op if same else dataclasses.replace(op, inputs=inputs)
