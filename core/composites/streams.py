"""Residual streams: values that are carried on, and to which each part of a model adds.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from compax.analysis.normal import Node, Val, rearranged
from compax.composites.base import Normalization
from compax.composites.view import View, parameter_only


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """One addition to a stream.

    Attributes:
        node: the addition.
        stream: the stream before it.
        branch: what is added: computed from the stream.
        output: the stream after it.
    """

    node: Node
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
        inside: nodes of composites, whose additions are their own business.
    """
    normalized = {norm.output: norm.x for norm in normalizations}
    ends: dict[Val, list[Residual]] = {}
    streams: list[list[Residual]] = []
    for node in view.normal.nodes_named("add", "add_any"):
        residual = None if node in inside else _residual(node)
        if residual is None:
            continue
        before = rearranged(residual.stream)
        stream = ends.pop(before, None) or ends.pop(normalized.get(before, before), None)
        if stream is None:
            stream = []
            streams.append(stream)
        stream.append(residual)
        ends[residual.output] = stream
    return [tuple(stream) for stream in streams]


def _residual(node: Node) -> Residual | None:
    if len(node.inputs) != 2:
        return None
    one, other = node.inputs
    if one.shape != other.shape or not one.shape or any(x.static or parameter_only(x) for x in node.inputs):
        return None
    for stream, branch in ((one, other), (other, one)):
        if _derives(branch, rearranged(stream)):
            return Residual(node, stream, branch, node.outputs[0])
    return None


def _derives(x: Val, source: Val) -> bool:
    """Whether `x` is computed from `source`."""
    return any(value is source for value in _since(x, source))


def on_the_way(residual: Residual) -> set[Node]:
    """The nodes of what is added to a stream: those that come after what it is computed from."""
    values = _since(residual.branch, residual.stream)
    return {value.node for value in values if value.node is not None and _comes_after(value, residual.stream)}


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
