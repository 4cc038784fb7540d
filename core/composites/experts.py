"""Experts: a router, and feed-forwards with a dimension of experts that is neither summed over nor kept.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
arXiv:1701.06538; Fedus et al., "Switch Transformers", 2021, arXiv:2101.03961. Per-expert weights are told by the axes:
products of which the experts are a batch dimension, grouped products, or products with single slices of stacked
weights. The router is the linear layer that has the same axis as its result.
"""

from collections.abc import Sequence

from compax.analysis.atoms import Atom
from compax.analysis.normal import Node, Val, rearranged
from compax.composites.base import Experts, FeedForward
from compax.composites.view import LAYOUT, Linear, View, parameter_only

_FORWARD = 512


def find_experts(view: View, feed_forwards: Sequence[FeedForward]) -> list[Experts]:
    """All mixtures of experts of a graph, in order.

    Args:
        view: the graph.
        feed_forwards: those found in it; those of experts become part of what is returned.
    """
    families: dict[Atom, list[Linear]] = {}
    for linear in view.linears.values():
        for atom in _expert_atoms(view, linear):
            families.setdefault(atom, []).append(linear)
    result: list[Experts] = []
    for atom, linears in families.items():
        inner = [ff for ff in feed_forwards if ff.down in {linear.node for linear in linears}]
        router = next((r for r in view.linears.values() if r not in linears and _gives(view, r, atom)), None)
        if router is None or not inner:
            continue
        found = _experts(view, atom, router, linears, inner)
        if found is not None:
            result.append(found)
    return sorted(result, key=lambda experts: experts.nodes[0].number)


def _expert_atoms(view: View, linear: Linear) -> list[Atom]:
    """Dimensions of a weight of which its product takes one index at a time."""
    node, side = linear.node, linear.position
    member = view.engine.members.get(linear.weight)
    if member is not None:
        return list(view.engine.atoms.expand(member[0]))
    if node.name == "dot_general":
        dims = node.attributes["dimension_numbers"][1][side]
    elif node.name == "ragged_dot_general":
        dims = node.attributes["ragged_dot_dimension_numbers"].rhs_group_dimensions
    else:
        return []
    return [atom for dim in dims for atom in view.factors(linear.weight, dim)]


def _gives(view: View, router: Linear, atom: Atom) -> bool:
    """Whether a linear layer has a logit for each index of an axis, and the axis nowhere else."""
    node, side = router.node, router.position
    if node.name != "dot_general":
        return False
    (contract, batch) = node.attributes["dimension_numbers"]
    rank = range(len(router.weight.shape))
    free = [dim for dim in rank if dim not in contract[side] and dim not in batch[side]]
    given = [a for dim in free for a in view.factors(router.weight, dim)]
    return given == [atom] and atom not in view.leaves(router.x)


def _experts(
    view: View, atom: Atom, router: Linear, linears: Sequence[Linear], inner: Sequence[FeedForward]
) -> Experts | None:
    x = rearranged(router.x, ("broadcast_in_dim", "squeeze"))
    output = _combined(view, x, [ff.output for ff in inner], atom)
    if output is None:
        return None
    nodes = _between(view, x, output)
    if router.node not in nodes:
        return None
    capacity, form = None, "dense"
    if any(linear.node.name == "ragged_dot_general" for linear in linears):
        form = "grouped"
    else:
        own = view.leaves(inner[0].x) - view.leaves(x) - {atom}
        if own and not view.leaves(x) - set(view.engine.atoms.leaves(view.contracted(router))) <= view.leaves(
            inner[0].x
        ):
            form, capacity = "dispatch", max(a.size for a in own)
    first = inner[0]
    weights = [linear.weight for linear in (router, *linears)]
    return Experts(
        inputs=(x, *dict.fromkeys(weights)),
        output=output,
        nodes=nodes,
        parameters=tuple(dict.fromkeys(path for weight in weights for path in view.parameters(weight))),
        loops=router.node.loops,
        x=x,
        router=router.node,
        experts=(atom,),
        top_k=_top_k(view, router, nodes),
        form=form,
        capacity=capacity,
        activation=first.activation if all(ff.activation == first.activation for ff in inner) else "custom",
        gated=first.gated,
        hidden=first.hidden,
    )


def _top_k(view: View, router: Linear, nodes: Sequence[Node]) -> int | None:
    """How many experts the router's logits pick."""
    inside = set(nodes)
    waiting, seen = [router.output], {router.output}
    for value in waiting:
        for node in view.normal.readers(value):
            if node not in inside:
                continue
            if node.name == "top_k":
                return int(node.outputs[0].shape[node.attributes.get("axis", -1)])
            if node.name == "argmax":
                return 1
            if len(waiting) < _FORWARD and node.name not in ("dot_general", "ragged_dot_general"):
                fresh = [y for y in node.outputs if y not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return None


def _combined(view: View, x: Val, results: Sequence[Val], atom: Atom) -> Val | None:
    """Where what the experts gave has become one value of the dimensions of `x`."""
    wanted = view.leaves(x)
    waiting = set(results)
    position = min(result.number for result in results)
    open_: dict[Val, int] = {}
    for node in view.normal.nodes[position : position + _FORWARD * max(1, len(results))]:
        fresh = [y for y in node.outputs if y in waiting]
        if not fresh and any(y in open_ for y in node.inputs):
            fresh = list(node.outputs)
        for y in dict.fromkeys(node.inputs):
            if y in open_:
                open_[y] -= 1
                if not open_[y]:
                    del open_[y]
        waiting.difference_update(fresh)
        for y in fresh:
            open_[y] = len(view.normal.readers(y))
        if not waiting and len(open_) == 1:
            (last,) = open_
            if last not in results and view.leaves(last) == wanted and atom not in view.leaves(last):
                return last
    return None


def _between(view: View, x: Val, output: Val) -> tuple[Node, ...]:
    """The nodes from `x` to `output`."""
    found: set[Node] = set()
    waiting = [output]
    while waiting:
        value = waiting.pop()
        node = value.node
        if node is None or node in found or value is x or value.static:
            continue
        if parameter_only(value) and node.name not in LAYOUT:
            continue
        found.add(node)
        waiting.extend(node.inputs)
    return tuple(sorted(found, key=lambda node: node.number))
