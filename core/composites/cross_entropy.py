"""Cross-entropy over the logits of a linear layer, with whatever else is computed of them token by token.

Anchored on a logsumexp whose argument comes from a product with a parameter; `logits` follows what is computed of that
product. One-hots are told by what they compare, positions by evaluating them: no function is known by its name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from compax.analysis.normal import Node, Normal
from compax.capture import Captured
from compax.composites.logits import Declined, Escapes, Use, Walk
from compax.composites.sides import CALLS, CONSTRAINTS, Inline, Scalar, Spread
from compax.ir import Graph, Op, Operand, Path, resolve
from compax.placement import entries_of
from compax.raising import Site, find_sites
from compax.rewrites.outline import inline_call

_MOST_UPSTREAM = 512


@dataclasses.dataclass(frozen=True, eq=False)
class CrossEntropy:
    """A cross-entropy that can be computed from statistics of its logits.

    Attributes:
        site: the linear layer that makes the logits; its path is that in the captured graph.
        steps: the body that has it all, in the captured graph.
        graph: that body, with the calls inlined that the logits enter or leave.
        head: the product, in that body.
        dim: where the vocabulary is in the product's result.
        chain: elementwise operations between the product and the softmax, in that body.
        sides: what joins in them, by operand.
        uses: everything that is computed of the logits.
    """

    site: Site
    steps: Path
    graph: Graph
    head: Op
    dim: int
    chain: tuple[Op, ...]
    sides: Mapping[Operand, Scalar | Spread]
    uses: tuple[Use, ...]

    @property
    def split_over(self) -> tuple[str, ...]:
        """The mesh axes that a constraint splits the vocabulary of the logits over; none where it is whole."""
        for op in self.chain:
            spec: PartitionSpec = getattr(op.attributes.get("sharding"), "spec", PartitionSpec())
            if op.name in CONSTRAINTS and (names := entries_of(spec, len(self.head.outputs[0].shape))[self.dim]):
                return names
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class NoCrossEntropy:
    """A linear layer whose outputs enter a logsumexp, and why that is not followed.

    Attributes:
        site: the layer.
        reason: why.
        within: the operation of ours that it is in, if it is in one.
    """

    site: Site
    reason: str
    within: str = ""


def find_cross_entropies(captured: Captured) -> tuple[CrossEntropy | NoCrossEntropy, ...]:
    """Every linear layer whose outputs enter a logsumexp, in order of evaluation."""
    heads = _anchored(Normal(captured))
    found: list[CrossEntropy | NoCrossEntropy] = []
    for site in find_sites(captured) if heads else ():
        inside = (*site.path[:-1], (site.path[-1][0], 0))
        if site.kind != "linear" or not any(p == site.path or p[: len(inside)] == inside for p in heads):
            continue
        try:
            found.append(_recognized(captured.graph, site))
        except Declined as declined:
            found.append(NoCrossEntropy(site, str(declined), _within(captured.graph, site.path)))
    return tuple(found)


def _anchored(normal: Normal) -> set[Path]:
    """The products nearest upstream of logarithms of sums of exponentials."""
    paths: set[Path] = set()
    for logarithm in normal.nodes_named("log"):
        total = logarithm.inputs[0].node
        while total is not None and total.name in ("abs", "broadcast_in_dim", "reshape", "squeeze", "div", "add"):
            total = total.inputs[0].node
        if total is None or total.name != "reduce_sum":
            continue
        exponential = total.inputs[0].node
        while exponential is not None and exponential.name in ("mul", "select_n", "reshape"):
            exponential = next((x.node for x in exponential.inputs if x.node and x.node.name == "exp"), None)
        if exponential is not None and exponential.name == "exp":
            paths |= _products(exponential)
    return paths


def _products(node: Node) -> set[Path]:
    waiting, seen, paths = [node], {node}, set[Path]()
    for current in waiting:
        if current.name == "dot_general":
            paths.add(current.path)
            continue
        for x in current.inputs[:1] if current.name == "carry" else current.inputs:
            if x.node is not None and x.node not in seen and len(waiting) < _MOST_UPSTREAM:
                seen.add(x.node)
                waiting.append(x.node)
    return paths


def _within(graph: Graph, path: Path) -> str:
    for depth in range(len(path) - 1):
        op = resolve(graph, (*path[:depth], (path[depth][0], -1)))
        if op.equation is None:
            return op.name
    return ""


def _recognized(graph: Graph, site: Site) -> CrossEntropy:
    """Follows the logits in the innermost body that has all of what is computed of them.

    Raises:
        Declined: there is none.
    """
    if site.opaque:
        raise Declined(site.opaque)
    numbers: Any = site.primitive.attributes["dimension_numbers"] if site.primitive.name == "dot_general" else None
    if numbers is None or len(site.op.inputs) != 2 or numbers[1][0]:
        raise Declined(f"a '{site.primitive.name}' with batched weights, or in groups, is not taken apart")
    free = len(site.op.inputs[site.weight].shape) - len(numbers[0][site.weight])
    if free != 1:
        raise Declined(f"the weight has {free} dimensions of outputs, not one vocabulary")
    path, leaving = site.path, "the logits are among what the program returns; return the loss alone"
    for depth in reversed(range(len(path))):
        if depth < len(path) - 1:
            enclosing = resolve(graph, (*path[:depth], (path[depth][0], -1)))
            if enclosing.name not in CALLS:
                leaving = f"the logits leave the '{enclosing.name}' around the layer"
                break
        try:
            return _followed(graph, site, depth)
        except Escapes:
            continue
    raise Declined(leaving)


def _followed(graph: Graph, site: Site, depth: int) -> CrossEntropy:
    steps, (position, *inner) = site.path[:depth], [step[0] for step in site.path[depth:]]
    for place, index in steps:
        graph = graph.ops[place].bodies[index]
    for place in inner:
        graph = inline_call(graph, graph.ops[position])
        position += place
    logits = graph.ops[position].outputs[0]
    while True:
        walk = Walk(graph, logits, site.weight)
        try:
            walk.run()
        except Inline as call:
            graph = inline_call(graph, call.op)
            continue
        chain = walk.common_chain()
        used = {x for op in chain for x in op.inputs}
        sides = {x: side for x, side in walk.sides.items() if x in used}
        return CrossEntropy(site, steps, graph, walk.head, walk.dim, chain, sides, tuple(walk.uses))
