"""Residual streams: values that are carried on, and to which each part of a model adds.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from compax.analysis.normal import Node, Val, rearranged
from compax.composites.base import Normalization
from compax.composites.view import View, parameter_only

_BY_ELEMENT = frozenset({"add", "add_any", "sub", "mul", "div", "max", "min", "tanh", "logistic", "erf"})


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """One addition to a stream.

    Attributes:
        node: the addition.
        source: the stream before it.
        stream: what is added to: the stream, or a projection of it.
        branch: what is added: computed from the source.
        output: the stream after it.
    """

    node: Node
    source: Val
    stream: Val
    branch: Val
    output: Val


def find_streams(
    view: View, normalizations: Sequence[Normalization], inside: Collection[Node]
) -> list[tuple[Residual, ...]]:
    """The residual streams of a graph, each with its additions in order.

    Args:
        view: the graph.
        normalizations: those found in it: a stream may be normalized between two additions.
        inside: nodes of composites, whose additions are their own business. An addition of a branch with no composite
            and no linear layer, as in the logarithm of a sum of exponentials, is none to a stream.
    """
    normalized = {norm.output: norm.x for norm in normalizations}
    ends: dict[Val, list[Residual]] = {}
    streams: list[list[Residual]] = []
    for node in view.normal.nodes_named("add", "add_any"):
        if node in inside or not _adds(node):
            continue
        residual = _identity(node) or _projected(view, node, normalized)
        if residual is None or not any(x in inside or x in view.linears for x in on_the_way(residual)):
            continue
        stream = ends.pop(_end(residual.source, ends, normalized), None)
        if stream is None:
            stream = []
            streams.append(stream)
        stream.append(residual)
        ends[residual.output] = stream
    return [tuple(stream) for stream in streams]


def _adds(node: Node) -> bool:
    """Whether an addition is one of two computed values of one shape."""
    shapes = {x.shape for x in node.inputs}
    computed = not any(x.static or parameter_only(x) for x in node.inputs)
    return len(node.inputs) == 2 and len(shapes) == 1 and shapes != {()} and computed


def _identity(node: Node) -> Residual | None:
    """An addition to a value of something that is computed from it."""
    one, other = node.inputs
    for stream, branch in ((one, other), (other, one)):
        if _derives(branch, rearranged(stream)):
            return Residual(node, stream, stream, branch, node.outputs[0])
    return None


def _projected(view: View, node: Node, normalized: Mapping[Val, Val]) -> Residual | None:
    """An addition to one product of something, as where its size changes, of what several products made of it."""
    one, other = node.inputs
    for stream, branch in ((one, other), (other, one)):
        linear = view.linear(_through(stream, lambda x: x.node in view.linears, normalized))
        if linear is None:
            continue
        source = rearranged(linear.x)
        values = set(_since(branch, source))
        way = {x.node for x in values}
        if source in values and linear.node not in way and len(way & view.linears.keys()) > 1:
            return Residual(node, linear.x, stream, branch, node.outputs[0])
    return None


def _end(x: Val, ends: Collection[Val], normalized: Mapping[Val, Val]) -> Val:
    """The end of a stream that a value is, but for a normalization or an activation; else the value itself."""
    found = _through(x, lambda y: y in ends, normalized)
    return found if found in ends else rearranged(x)


def _through(x: Val, stop: Callable[[Val], bool], normalized: Mapping[Val, Val]) -> Val:
    """What a value is computed from by normalizations and operations on each element with one computed operand."""
    while True:
        x = rearranged(x)
        computed = [] if x.node is None else [y for y in x.node.inputs if not (y.static or parameter_only(y))]
        if stop(x):
            return x
        if x in normalized:
            x = normalized[x]
        elif x.name in _BY_ELEMENT and len(computed) == 1:
            (x,) = computed
        else:
            return x


def _derives(x: Val, source: Val) -> bool:
    """Whether `x` is computed from `source`."""
    return any(value is source for value in _since(x, source))


def on_the_way(residual: Residual) -> set[Node]:
    """The nodes of what is added to a stream: those that come after what it is computed from."""
    values = [*_since(residual.branch, residual.source), *_since(residual.stream, residual.source)]
    return {value.node for value in values if value.node is not None and _comes_after(value, residual.source)}


def _since(x: Val, source: Val) -> Iterator[Val]:
    """A value and what it comes from, back to where `source` is computed."""
    waiting, seen = [x], {x}
    while waiting:
        value = waiting.pop()
        yield value
        if value.node is not None and _comes_after(value, source):
            fresh = [y for y in value.node.inputs if y not in seen and not y.static]
            seen.update(fresh)
            waiting.extend(fresh)


def _comes_after(x: Val, source: Val) -> bool:
    """Whether a value is computed later than another, in the same turn of a loop."""
    return x.number > source.number and x.name != "carry"
