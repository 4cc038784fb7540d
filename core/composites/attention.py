"""Attention, anchored on a softmax between two products.

The softmax tells keys (what it sums over) from queries. Backward from it a chain of scores (scale, softcap, masks,
biases, in any order) has to end in a product of two values of which one has the keys; forward the weights have to reach
a product that contracts the keys. Which dimensions are batch, groups, heads and positions is told by the axes: heads
are those that the projections' weights have. What the chain does to a score is told by evaluating it.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from compax.analysis.atoms import Atom, Factors
from compax.analysis.normal import Depends, Node, Val, rearranged
from compax.analysis.provenance import reshape_groups
from compax.composites import masks, positions
from compax.composites.alignment import region
from compax.composites.base import Attention
from compax.composites.view import LAYOUT, Linear, View, parameter_only, scalar, unbroadcast

_DEEPEST = 64
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "select_n", "tanh", "neg", "max", "min", "clamp", "add_any"})
_DROPPED = frozenset({"mul", "div", "select_n"})


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """An exponential that is divided by its sum.

    Attributes:
        scores: what it takes.
        exponential: the exponential.
        total: its sum.
        weights: the quotient; none if the division comes after the product with the values.
        dims: which dimensions of `scores` are summed over.
    """

    scores: Val
    exponential: Val
    total: Val
    weights: Val | None
    dims: tuple[int, ...]


def find_attentions(view: View) -> list[Attention]:
    """All attentions of a graph, in order."""
    return [found for softmax in softmaxes(view) if (found := _attention(view, softmax)) is not None]


def softmaxes(view: View) -> Iterator[Softmax]:
    """Every softmax: an exponential, its sum over some dimensions, and their quotient."""
    for node in view.normal.nodes_named("exp"):
        (exponential,) = node.outputs
        for reader in view.normal.readers(exponential):
            if reader.name != "reduce_sum" or not exponential.shape:
                continue
            (total,) = reader.outputs
            quotient = _quotient(view, exponential, total)
            dims = tuple(reader.attributes["axes"])
            yield Softmax(_without_shift(node.inputs[0], dims), exponential, total, quotient, dims)


def _quotient(view: View, exponential: Val, total: Val) -> Val | None:
    for node in view.normal.readers(exponential):
        if node.name == "div" and node.inputs[0] is exponential and rearranged(node.inputs[1]) is total:
            return node.outputs[0]
        if node.name == "mul":
            other = node.inputs[1] if node.inputs[0] is exponential else node.inputs[0]
            inverse = rearranged(other)
            if _is_reciprocal(inverse, total):
                return node.outputs[0]
    return None


def _is_reciprocal(x: Val, of: Val) -> bool:
    if x.node is None:
        return False
    if x.node.name == "div":
        return scalar(x.node.inputs[0]) == 1.0 and rearranged(x.node.inputs[1]) is of
    return x.node.name == "integer_pow" and x.node.attributes["y"] == -1 and rearranged(x.node.inputs[0]) is of


def _without_shift(x: Val, dims: Sequence[int]) -> Val:
    """The scores, where something that is the same for all keys was subtracted, as their maximum is."""
    node = x.node
    if node is None or node.name != "sub" or node.inputs[0].shape != x.shape:
        return x
    shift = node.inputs[1]
    if not shift.shape or all(shift.shape[d] == 1 for d in dims):
        return node.inputs[0]
    if shift.node is None or shift.node.name != "broadcast_in_dim":
        return x
    placed, operand = shift.node.attributes["broadcast_dimensions"], shift.node.inputs[0]
    varies = any(out in dims and operand.shape[dim] != 1 for dim, out in enumerate(placed))
    return x if varies else node.inputs[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """From a product to the scores.

    Attributes:
        dot: the product of queries and keys.
        dims: for each of the product's dimensions whether the softmax sums over it.
        sides: values that join in on the way: masks, biases, scales.
        nodes: the nodes of the way, from the scores back to the product, which is not among them.
    """

    dot: Node
    dims: tuple[int, ...]
    sides: tuple[Val, ...]
    nodes: tuple[Node, ...]


def _chain(view: View, x: Val, dims: tuple[int, ...], depth: int = 0) -> Chain | None:
    """The chain of scores that ends in `x`; `dims` are the dimensions of the softmax there."""
    node = x.node
    if node is None or depth > _DEEPEST:
        return None
    if node.name == "dot_general":
        return Chain(node, dims, (), ()) if node not in view.linears else None
    if node.name in LAYOUT:
        inner = _back(node, x, dims)
        found = None if inner is None else _chain(view, node.inputs[0], inner, depth + 1)
        return None if found is None else dataclasses.replace(found, nodes=(node, *found.nodes))
    if node.name not in _ELEMENTWISE:
        return None
    chains: list[tuple[int, Chain]] = []
    for i, operand in enumerate(node.inputs):
        if operand.shape == x.shape and not operand.static and operand.dtype != bool:
            found = _chain(view, operand, dims, depth + 1)
            if found is not None:
                chains.append((i, found))
    if len(chains) > 1 and node.name not in ("add", "add_any", "select_n"):
        return None
    for i, found in chains[:1]:
        sides = tuple(y for j, y in enumerate(node.inputs) if j != i)
        return dataclasses.replace(found, sides=(*sides, *found.sides), nodes=(node, *found.nodes))
    return None


def _back(node: Node, x: Val, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where dimensions of a rearranged value were before; none if they are mixed with others."""
    operand = node.inputs[0]
    if node.name == "transpose":
        return tuple(node.attributes["permutation"][d] for d in dims)
    if node.name == "convert_element_type":
        return dims
    if node.name == "squeeze":
        gone = {d % len(operand.shape) for d in node.attributes["dimensions"]}
        kept = [d for d in range(len(operand.shape)) if d not in gone]
        return tuple(kept[d] for d in dims)
    if node.name == "broadcast_in_dim":
        source = {out: dim for dim, out in enumerate(node.attributes["broadcast_dimensions"])}
        if any(d not in source or operand.shape[source[d]] != x.shape[d] for d in dims):
            return None
        return tuple(source[d] for d in dims)
    if node.name == "reshape":
        result: list[int] = []
        for before, after in reshape_groups(operand.shape, x.shape):
            wanted = [d for d in after if d in dims]
            if not wanted:
                continue
            if any(d not in dims and x.shape[d] != 1 for d in after):
                return None
            result += [d for d in before if operand.shape[d] != 1] or before[:1]
        return tuple(result)
    return None


def _ahead(node: Node, x: Val, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where dimensions of a value are after it was rearranged; none if they are mixed with others."""
    (output,) = node.outputs
    if node.name == "transpose":
        return tuple(node.attributes["permutation"].index(d) for d in dims)
    if node.name == "convert_element_type":
        return dims
    if node.name == "squeeze":
        gone = {d % len(x.shape) for d in node.attributes["dimensions"]}
        kept = [d for d in range(len(x.shape)) if d not in gone]
        return tuple(kept.index(d) for d in dims) if not gone & set(dims) else None
    if node.name == "broadcast_in_dim":
        return tuple(node.attributes["broadcast_dimensions"][d] for d in dims)
    if node.name == "reshape":
        result: list[int] = []
        for before, after in reshape_groups(x.shape, output.shape):
            if any(d in dims for d in before):
                if any(d not in dims and x.shape[d] != 1 for d in before):
                    return None
                result += [d for d in after if output.shape[d] != 1] or after[:1]
        return tuple(result)
    return None


def _product(view: View, x: Val, dims: tuple[int, ...]) -> tuple[Node, int, tuple[Node, ...]] | None:
    """The product that contracts the keys of weights: the node, which operand they are, and what lies between."""
    waiting: list[tuple[Val, tuple[int, ...], tuple[Node, ...]]] = [(x, dims, ())]
    for value, where, passed in waiting:
        if len(waiting) > _DEEPEST:
            return None
        for node in view.normal.readers(value):
            if node.name == "dot_general":
                contract, _ = node.attributes["dimension_numbers"]
                for side in (0, 1):
                    if node.inputs[side] is value and set(contract[side]) == set(where):
                        return node, side, passed
            elif node.name in LAYOUT and node.inputs[0] is value and len(node.inputs) == 1:
                after = _ahead(node, value, where)
                if after is not None:
                    waiting.append((node.outputs[0], after, (*passed, node)))
            elif node.name in _DROPPED and node.outputs[0].shape == value.shape:
                waiting.append((node.outputs[0], where, (*passed, node)))
    return None


def _attention(view: View, softmax: Softmax) -> Attention | None:
    chain = _chain(view, softmax.scores, softmax.dims)
    if chain is None:
        return None
    start = softmax.weights if softmax.weights is not None else softmax.exponential
    ahead = _product(view, start, softmax.dims)
    if ahead is None:
        return None
    pv, weight_side, between = ahead
    dot = chain.dot
    key_side = _key_side(dot, chain.dims)
    if key_side is None:
        return None
    query, key, value = dot.inputs[1 - key_side], dot.inputs[key_side], pv.inputs[1 - weight_side]
    if any(_is_parameter(view, x) for x in (query, key, value)):
        return None
    output = pv.outputs[0]
    divided: tuple[Node, ...] = ()
    if softmax.weights is None:
        found = _divided(view, output, softmax.total)
        if found is None:
            return None
        output, divided = found
    axes = _axes(view, dot, key_side, chain.dims, pv, weight_side)
    sources = [view.sources(x) for x in (query, key)]
    nodes = _region(softmax, chain, start, between, pv, divided)
    mask, score = masks.classify(view, dot.outputs[0], softmax.scores, chain.sides, softmax.dims, axes["queries"])
    rotation, query_scale = positions.query_rotation(view, query, axes["head_size"])
    cache = _cache(view, key)
    return Attention(
        inputs=(query, key, value, *(x for x in chain.sides if not x.static)),
        output=output,
        nodes=nodes,
        parameters=(),
        loops=pv.loops,
        query=query,
        key=key,
        value=value,
        scores=softmax.scores,
        weights=start,
        qk=dot,
        pv=pv,
        key_side=key_side,
        value_side=1 - weight_side,
        mask=mask,
        scale=score.scale,
        query_scale=query_scale,
        softcap=score.softcap,
        score=score.form,
        bias=score.bias,
        alibi=score.alibi,
        dropout=_dropout(view, between),
        rotation=rotation,
        cross=not cache and not _same_source(*sources),
        cached=cache,
        batch=axes["batch"],
        groups=axes["groups"],
        repeats=axes["repeats"],
        queries=axes["queries"],
        keys=axes["keys"],
        head_size=axes["head_size"],
        value_size=axes["value_size"],
    )


def _is_parameter(view: View, x: Val) -> bool:
    """Whether a value is a parameter, only rearranged: then a product with it is a linear layer."""
    through = lambda node: node.name in LAYOUT  # noqa: E731
    return parameter_only(x) and all(
        y.node is None or y.node.name in LAYOUT for y in view.upstream(x, through) if not y.static
    )


def _key_side(dot: Node, dims: Sequence[int]) -> int | None:
    """Which operand of the product has the keys: `dims` of its result, all of that operand's free dimensions."""
    (contract, batch) = dot.attributes["dimension_numbers"]
    first = len(batch[0])
    for side in (0, 1):
        rank = len(dot.inputs[side].shape)
        count = rank - len(contract[side]) - len(batch[side])
        free = set(range(first, first + count))
        sized = {d for d in free if dot.outputs[0].shape[d] != 1}
        if set(dims) and set(dims) <= free and sized <= set(dims):
            return side
        first += count
    return None


def _divided(view: View, x: Val, total: Val) -> tuple[Val, tuple[Node, ...]] | None:
    """The quotient by the softmax's sum, where it is taken after the product with the values."""
    passed: list[Node] = []
    for _ in range(_DEEPEST):
        readers = view.normal.readers(x)
        if len(readers) != 1:
            return None
        (node,) = readers
        passed.append(node)
        if node.name == "div" and node.inputs[0] is x and rearranged(node.inputs[1]) is total:
            return node.outputs[0], tuple(passed)
        if node.name not in LAYOUT:
            return None
        x = node.outputs[0]
    return None


# -- Axes -------------------------------------------------------------------------------------------------------------


def _axes(
    view: View, dot: Node, key_side: int, key_dims: Sequence[int], pv: Node, weight_side: int
) -> dict[str, Factors]:
    """Batch, groups, repeats, queries, keys, head size and value size of an attention."""
    (contract, batch) = dot.attributes["dimension_numbers"]
    query_side = 1 - key_side
    query, key = dot.inputs[query_side], dot.inputs[key_side]
    (_, pv_batch) = pv.attributes["dimension_numbers"]
    value, value_contract = pv.inputs[1 - weight_side], pv.attributes["dimension_numbers"][0][1 - weight_side]
    value_size = [
        atom
        for dim in range(len(value.shape))
        if dim not in value_contract and dim not in pv_batch[1 - weight_side]
        for atom in view.factors(value, dim)
    ]
    heads = _head_atoms(view, query, key, value, pv)
    shared, groups, repeats = [], [], []
    for query_dim, key_dim in zip(batch[query_side], batch[key_side], strict=True):
        for mine, theirs in _aligned(view, query, query_dim, key, key_dim):
            if theirs.table and not mine.table:
                (repeats if _any(view, mine, heads) else shared).append(mine)
            elif _any(view, mine, heads):
                groups.append(mine)
            else:
                shared.append(mine)
    queries = []
    gone = {*contract[query_side], *batch[query_side]}
    for dim in range(len(query.shape)):
        if dim not in gone:
            for atom in view.factors(query, dim):
                (repeats if _any(view, atom, heads) else queries).append(atom)
    keys = [
        atom
        for dim in range(len(key.shape))
        if dim not in contract[key_side] and dim not in batch[key_side]
        for atom in view.factors(key, dim)
    ]
    size = [atom for dim in contract[query_side] for atom in view.factors(query, dim)]
    return {
        "batch": tuple(shared),
        "groups": tuple(groups),
        "repeats": tuple(repeats),
        "queries": tuple(queries),
        "keys": tuple(keys),
        "head_size": tuple(size),
        "value_size": tuple(value_size),
    }


def _aligned(view: View, x: Val, dim: int, y: Val, other: int) -> list[tuple[Atom, Atom]]:
    one, two = view.factors(x, dim), view.factors(y, other)
    if [a.size for a in one] == [a.size for a in two]:
        return list(zip(one, two, strict=True))
    return [(atom, atom) for atom in one]


def _any(view: View, atom: Atom, among: set[Atom]) -> bool:
    return any(leaf in among for leaf in view.engine.atoms.leaves((atom,)))


def _head_atoms(view: View, query: Val, key: Val, value: Val, pv: Node) -> set[Atom]:
    """Atoms of the weights that project onto heads, and of what the output projection contracts."""
    around = view.projections((query, key, value), pv.outputs[0])
    return {atom for linear in around for atom in view.leaves(linear.weight)}


# -- What else there is to say ----------------------------------------------------------------------------------------


def _region(
    softmax: Softmax,
    chain: Chain,
    start: Val,
    between: Sequence[Node],
    pv: Node,
    divided: Sequence[Node],
) -> tuple[Node, ...]:
    """All nodes of an attention, in order of evaluation."""
    found = {*chain.nodes, chain.dot, *between, pv, *divided}
    for x in (softmax.total, start):
        found.update(region(x, (softmax.scores,)))
    return tuple(sorted(found, key=lambda node: node.number))


def _same_source(queries: Sequence[Linear], keys: Sequence[Linear]) -> bool:
    if not queries or not keys:
        return True
    return bool({rearranged(q.x) for q in queries} & {rearranged(k.x) for k in keys})


def _cache(view: View, key: Val) -> bool:
    """Whether keys are written into, or put behind, an array that comes from outside of the call."""
    through = lambda node: node not in view.linears and node.name not in ("dot_general", "exp")  # noqa: E731
    for x in view.upstream(key, through, limit=128):
        node = x.node
        if node is None:
            continue
        if node.name in ("dynamic_update_slice", "scatter", "concatenate", "select_n"):
            for y in node.inputs[: 1 if node.name == "dynamic_update_slice" else None]:
                inner = rearranged(y, (*LAYOUT - {"concatenate", "pad"}, "scan_slice"))
                if inner.input is not None and inner.input.kind != "parameter" and len(inner.shape) > 2:
                    return True
    return False


def _dropout(view: View, between: Sequence[Node]) -> float | None:
    """The share of weights that random numbers drop on the way."""
    for node in between:
        for x in node.inputs:
            if x.depends & Depends.RANDOM and node.name in _DROPPED:
                rate = drop_rate(view, x)
                if rate is not None:
                    return rate
    return None


def drop_rate(view: View, x: Val) -> float | None:
    """The share that a random mask drops, from the comparison that makes it."""
    for y in view.upstream(x, lambda node: bool(node.outputs[0].depends & Depends.RANDOM), limit=64):
        node = y.node
        if node is not None and node.name in ("lt", "gt", "ge", "le"):
            for i, operand in enumerate(node.inputs):
                keep = scalar(unbroadcast(operand))
                if keep is not None:
                    kept = keep if (node.name in ("lt", "le")) == (i == 1) else 1.0 - keep
                    return round(1.0 - kept, 6)
    return None
