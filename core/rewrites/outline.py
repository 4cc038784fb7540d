"""Outlining: the operations between some values become one operation of ours.

The operation's body is what was there: its reference, and what runs until somebody registers a lowering. Where the
region ends inside a nested `jit`, that `jit` is inlined, and no other; a loop, a branch or a derivative rule is never
cut in two.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from compax import _jax
from compax.analysis.normal import Normal, Val
from compax.capture import Captured
from compax.errors import RewriteError
from compax.ir import Graph, Op, Operand, Path, Value, copied, resolve

_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})

Step = tuple[Value, int]
"""How a nested body is reached, whatever moves: the first result of the operation that holds it, and which body."""

_End = tuple[tuple[Step, ...], Value]
"""A value, and the calls within a body that lead to it."""

_Ends = tuple["Region", tuple[_End, ...]]
"""A region with its output, its inputs and the others."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """What becomes one operation.

    Attributes:
        name: the operation's name.
        output: the value that it computes.
        inputs: the values that it starts from: what is computed from them belongs to the region, and to nothing else.
        attributes: the operation's static parameters.
        others: further values that its lowering wants, such as masks and biases. Operands are `inputs`, `others`, and
            behind them whatever else the region reads.
    """

    name: str
    output: Val
    inputs: tuple[Val, ...]
    attributes: Mapping[str, Any]
    others: tuple[Val, ...] = ()


def outline(captured: Captured, normal: Normal, regions: Sequence[Region]) -> Captured:
    """A graph in which regions are operations of ours.

    Args:
        captured: the graph; it is not changed.
        normal: its normal form, in whose values the regions are given.
        regions: regions that do not overlap.

    Raises:
        RewriteError: a region ends inside a loop, a branch or a derivative rule of which it is not a part as a whole;
            or something that it computes from its inputs is used outside of it.
    """
    places = _Places(normal)
    by_frame: dict[tuple[Step, ...], list[_Ends]] = {}
    for region in regions:
        steps, ends = places.frame(captured.graph, region)
        by_frame.setdefault(steps, []).append((region, ends))
    graph = captured.graph
    memo: dict[Any, Graph] = {}
    # The deepest frames first: what holds them is rebuilt by outer ones.
    for steps in sorted(by_frame, key=len, reverse=True):
        graph = _replaced(graph, steps, by_frame[steps], memo)
    return dataclasses.replace(captured, graph=graph)


class _Places:
    """Where values of the normal form are in the graph."""

    def __init__(self, normal: Normal):
        self.normal = normal
        self.places: dict[Val, dict[Path, Value]] = {}
        for prefix, frame in normal.frames.items():
            for value, val in frame.items():
                self.places.setdefault(val, {}).setdefault(prefix, value)

    def frame(self, graph: Graph, region: Region) -> tuple[tuple[Step, ...], tuple[_End, ...]]:
        """The innermost body that has the region's ends, themselves or in calls that can be inlined, and these ends."""
        every = (region.output, *region.inputs, *region.others)
        outermost = sorted({p[:n] for p in self.places.get(region.output, {}) for n in range(len(p) + 1)}, key=len)
        for inlining in (False, True):
            for prefix in reversed(outermost):
                ends = [self._end(graph, prefix, x, inlining=inlining) for x in every]
                if all(end is not None for end in ends):
                    return self.steps(graph, prefix), tuple(end for end in ends if end is not None)
        raise RewriteError(
            f"the operation '{region.name}' cannot be put in place: {region.output} and what it is computed from are "
            "in different bodies, and one of these is a loop or a derivative rule; inline it in the model"
        )

    def _end(self, graph: Graph, prefix: Path, x: Val, *, inlining: bool) -> _End | None:
        """Where a body has a value, itself or in a call."""
        found = self.places.get(x, {})
        if prefix in found:
            return (), found[prefix]
        for path in sorted(found, key=len) if inlining else ():
            if path[: len(prefix)] != prefix:
                continue
            if all(resolve(graph, path[: n + 1]).name in _INLINED for n in range(len(prefix), len(path))):
                return self.steps(graph, path)[len(prefix) :], found[path]
        return None

    @staticmethod
    def steps(graph: Graph, prefix: Path) -> tuple[Step, ...]:
        """How the body at a path is reached."""
        steps: list[Step] = []
        for position, index in prefix:
            op = graph.ops[position]
            steps.append((op.outputs[0], index))
            graph = op.bodies[index]
        return tuple(steps)


def _replaced(graph: Graph, steps: Sequence[Step], ends: Sequence[_Ends], memo: dict[Any, Graph]) -> Graph:
    """A graph with regions replaced in the body that steps lead to."""
    if not steps:
        key = (id(graph), tuple((places, region.name, str(region.attributes)) for region, places in ends))
        if key not in memo:
            result, found = _inlined(graph, [end for _, places in ends for end in places])
            given = iter(found)
            for region, places in ends:
                output, *inputs = (next(given) for _ in places)
                result = _outlined(result, region, output, inputs)
            memo[key] = dataclasses.replace(result, imported=False)
            memo[id(graph), "kept"] = graph
        return memo[key]
    (value, index), *rest = steps
    ops = list(graph.ops)
    position = next(i for i, op in enumerate(ops) if op.outputs and op.outputs[0] is value)
    bodies = list(ops[position].bodies)
    bodies[index] = _replaced(bodies[index], rest, ends, memo)
    ops[position] = dataclasses.replace(ops[position], bodies=tuple(bodies))
    return dataclasses.replace(graph, ops=tuple(ops), imported=False)


def _inlined(graph: Graph, ends: Sequence[_End]) -> tuple[Graph, list[Value]]:
    """A graph with the calls inlined that ends are in, and the ends in it."""
    ends = list(ends)
    while steps := next((steps for steps, _ in ends if steps), None):
        (first, _), *_ = steps
        call = next(op for op in graph.ops if op.outputs and op.outputs[0] is first)
        graph, env = _without(graph, call)
        for i, (path, value) in enumerate(ends):
            if not path or path[0][0] is not first:
                continue
            rest = path[1:]
            if rest:
                ends[i] = ((_value(env, rest[0][0]), rest[0][1]), *rest[1:]), value
            else:
                ends[i] = (), _value(env, value)
    return graph, [value for _, value in ends]


def _value(env: Mapping[Value, Operand], value: Value) -> Value:
    x = env[value]
    assert isinstance(x, Value), "a region starts from a value, not from a literal"
    return x


def _outlined(graph: Graph, region: Region, output: Value, inputs: Sequence[Value]) -> Graph:
    """A graph in which what lies between some of its values is one operation."""
    kept: set[Op] = set()
    while True:
        chosen, cut = _between(graph, output, inputs)
        if cut is None:
            moving = _moving(chosen, inputs[: len(region.inputs)])
            kept, cut = _kept_outside(graph, chosen, output, moving, region)
        if cut is None:
            break
        graph = inline_call(graph, cut)
    if not chosen:
        raise RewriteError(f"the operation '{region.name}' would compute nothing: its result is one of its inputs")
    chosen = [op for op in chosen if op not in kept]
    inside = {value for op in chosen for value in op.outputs}
    extra: dict[Value, None] = {}
    for op in chosen:
        for x in op.inputs:
            if isinstance(x, Value) and x not in inside and x not in inputs:
                extra[x] = None
    operands = (*inputs, *extra)
    body = _body(chosen, operands, output)
    replacement = Op(region.name, operands, (output,), dict(region.attributes), (body,), None)
    gone = set(chosen)
    ops = [replacement if op is chosen[-1] else op for op in graph.ops if op not in gone or op is chosen[-1]]
    return dataclasses.replace(graph, ops=tuple(ops), imported=False)


def _between(graph: Graph, output: Value, inputs: Sequence[Value]) -> tuple[list[Op], Op | None]:
    """The operations that lead from inputs to an output, in order; and a call that has to be inlined first, if any."""
    producers, ends = graph.producers(), set(inputs)
    chosen: set[Op] = set()
    waiting: list[Value] = [output]
    while waiting:
        value = waiting.pop()
        op = producers.get(value)
        if op is None or op in chosen or value in ends:
            continue
        if ends & set(op.outputs) or (value is not output and output in op.outputs):
            if op.name not in _INLINED:
                raise RewriteError(
                    f"a region ends inside '{op.name}'{_where(op)}, which is never cut in two; "
                    "leave this site out, or write the model without it there"
                )
            return [], op
        chosen.add(op)
        waiting.extend(x for x in op.inputs if isinstance(x, Value))
    return [op for op in graph.ops if op in chosen], None


def _moving(chosen: Sequence[Op], inputs: Sequence[Value]) -> set[Value]:
    """What is computed from some values."""
    moving = set(inputs)
    for op in chosen:
        if any(isinstance(x, Value) and x in moving for x in op.inputs):
            moving.update(op.outputs)
    return moving


def _kept_outside(
    graph: Graph, chosen: Sequence[Op], output: Value, moving: set[Value], region: Region
) -> tuple[set[Op], Op | None]:
    """Operations that stay where they are: others need them too, and they do not depend on the inputs.

    And a call that has to be inlined first, if any: others need some of its results.
    """
    kept: set[Op] = set()
    gone = set(chosen)
    needed = {x for op in graph.ops if op not in gone for x in op.inputs if isinstance(x, Value)}
    needed |= {x for x in graph.outputs if isinstance(x, Value)}
    for op in reversed(chosen):
        used = [value for value in op.outputs if value in needed and value is not output]
        if not used:
            continue
        if any(value in moving for value in op.outputs):
            if op.name in _INLINED and len(used) < len(op.outputs):
                return set(), op
            raise RewriteError(
                f"the operation '{region.name}' would hide the result of '{op.name}'{_where(op)}, which is used "
                "outside of it; leave this site out"
            )
        kept.add(op)
        needed.update(x for x in op.inputs if isinstance(x, Value))
    return kept, None


def _body(ops: Sequence[Op], operands: Sequence[Value], output: Value) -> Graph:
    """Operations as a graph of their own, with values of its own."""
    env: dict[Value, Value] = {x: Value(x.aval) for x in operands}
    own = tuple(copied(op, env) for op in ops)
    return Graph(tuple(env[x] for x in operands), own, (env[output],))


def inline_call(graph: Graph, call: Op) -> Graph:
    """A graph with a nested `jit` replaced by what is in it.

    Args:
        graph: the graph that has the operation.
        call: the operation.

    Raises:
        RewriteError: it is no plain call.
    """
    if call.name not in _INLINED:
        raise RewriteError(f"'{call.name}'{_where(call)} is no plain call and cannot be inlined")
    return _without(graph, call)[0]


def _without(graph: Graph, call: Op) -> tuple[Graph, dict[Value, Operand]]:
    """A graph with a call inlined, and what the values of the call's body are in it."""
    body = call.bodies[0]
    env: dict[Value, Operand] = dict(zip(body.inputs, call.inputs, strict=True))
    handed: dict[Value, Operand] = {}
    produced = {value for op in body.ops for value in op.outputs}
    for inner, outer in zip(body.outputs, call.outputs, strict=True):
        if isinstance(inner, Value) and inner in produced and inner not in env:
            env[inner] = outer
        else:
            handed[outer] = env[inner] if isinstance(inner, Value) and inner in env else inner
    captured = {value: Value(value.aval) for value, _ in body.constants}
    env.update(captured)
    ops: list[Op] = []
    for op in graph.ops:
        if op is call:
            ops += [copied(inner, env) for inner in body.ops]
        elif any(isinstance(x, Value) and x in handed for x in op.inputs):
            ops.append(dataclasses.replace(op, inputs=tuple(_handed(x, handed) for x in op.inputs)))
        else:
            ops.append(op)
    inlined = dataclasses.replace(
        graph,
        ops=tuple(ops),
        outputs=tuple(_handed(x, handed) for x in graph.outputs),
        constants=(*graph.constants, *((captured[value], array) for value, array in body.constants)),
        imported=False,
    )
    return inlined, env


def _handed(x: Operand, handed: Mapping[Value, Operand]) -> Operand:
    while isinstance(x, Value) and x in handed:
        x = handed[x]
    return x


def _where(op: Op) -> str:
    return "" if op.equation is None else f" ({_jax.source_text(op.equation)})"
