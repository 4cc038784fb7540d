"""Feed-forward networks: linear, elementwise, linear.

Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, has the gated ones. The last product is the anchor:
its operand is an elementwise function of the results of one or two products of one source. Which function, and which of
two products is the gate, is told by evaluating it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from compax.analysis.atoms import Factors
from compax.analysis.folding import Folder, TooLarge, Unknown
from compax.analysis.normal import Depends, Node, Val
from compax.composites.activations import name_activation
from compax.composites.attention import drop_rate
from compax.composites.base import FeedForward
from compax.composites.view import LAYOUT, Linear, View, parameter_only, rearranged

_ELEMENTWISE = frozenset(
    "abs add add_any cbrt clamp cos div erf erfc exp exp2 expm1 integer_pow log log1p logistic max min mul neg pow "
    "rsqrt select_n sign sin sqrt square sub tanh".split()
)
_TESTS = frozenset({"gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not"})
_LARGEST = 96


@dataclasses.dataclass(frozen=True, eq=False)
class _Cone:
    """What lies between products.

    Attributes:
        ends: the values that it starts from: results of products, or their parts.
        nodes: its nodes.
        sides: values that parameters alone determine.
        random: masks that random numbers determine.
    """

    ends: tuple[Val, ...]
    nodes: tuple[Node, ...]
    sides: tuple[Val, ...]
    random: tuple[Val, ...]


def find_feed_forwards(view: View) -> list[FeedForward]:
    """All feed-forward networks of a graph, those of experts among them, in order."""
    found = (_feed_forward(view, linear) for linear in view.linears.values())
    return [feed_forward for feed_forward in found if feed_forward is not None]


def _feed_forward(view: View, down: Linear) -> FeedForward | None:
    if down.node.name == "conv_general_dilated":
        return None
    cone = _cone(view, down.x)
    if cone is None or not 1 <= len(cone.ends) <= 2:
        return None
    products = [_product(view, end) for end in cone.ends]
    if any(product is None for product in products):
        return None
    linears = [product for product in products if product is not None]
    sources = {rearranged(linear.x) for linear in linears}
    if len(sources) != 1 or any(linear.node.name == "conv_general_dilated" for linear in linears):
        return None
    hidden = _hidden(view, down, linears)
    if hidden is None:
        return None
    told = _evaluated(view, down.x, cone)
    if told is None:
        return None
    activation, gate = told
    up = linears[0] if gate is None else linears[1 - gate]
    output, after = _with_bias(view, down.node.outputs[0])
    weights = [*(linear.weight for linear in linears), *cone.sides, down.weight]
    if after is not None:
        weights.append(after)
    between = {node for end in cone.ends for node in _path(end)}
    nodes = {*cone.nodes, *between, *(linear.node for linear in linears), down.node}
    if output is not down.node.outputs[0] and output.node is not None:
        nodes.add(output.node)
    return FeedForward(
        inputs=(linears[0].x, *dict.fromkeys(weights)),
        output=output,
        nodes=tuple(sorted(nodes, key=lambda node: node.number)),
        parameters=tuple(dict.fromkeys(path for weight in weights for path in view.parameters(weight))),
        loops=down.node.loops,
        x=linears[0].x,
        up=up.node,
        gate=None if gate is None else linears[gate].node,
        down=down.node,
        activation=activation,
        hidden=hidden,
        dropout=next((rate for x in cone.random if (rate := drop_rate(view, x)) is not None), None),
    )


def _cone(view: View, x: Val) -> _Cone | None:
    """The elementwise function that gives `x`, back to the results of products."""
    ends: dict[Val, None] = {}
    nodes: dict[Node, None] = {}
    sides: dict[Val, None] = {}
    random: dict[Val, None] = {}
    waiting, seen = [x], {x}
    while waiting:
        value = waiting.pop()
        node = value.node
        if value.static:
            continue
        if parameter_only(value):
            sides[value] = None
        elif _product(view, value) is not None:
            ends[value] = None
        elif node is None or len(nodes) > _LARGEST:
            return None
        elif value.depends & Depends.RANDOM and not _moving(view, value):
            random[value] = None
        elif node.name in _ELEMENTWISE | _TESTS | LAYOUT - {"concatenate", "pad", "rev", "stack"}:
            nodes[node] = None
            fresh = [y for y in node.inputs if y not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        else:
            return None
    ordered = sorted(ends, key=lambda end: (-1 if end.node is None else end.node.number, end.index))
    return _Cone(tuple(ordered), tuple(nodes), tuple(sides), tuple(random))


def _moving(view: View, x: Val) -> bool:
    return view.follows_product(x)


def _product(view: View, x: Val) -> Linear | None:
    """The linear layer whose result a value is, all of it or a part, rearranged or not, with its bias or without."""
    for _ in range(_LARGEST):
        node = x.node
        if node is None:
            return None
        if node in view.linears:
            return view.linears[node]
        if node.name in ("slice", "split", "unstack", "squeeze", "reshape", "transpose"):
            x = node.inputs[0]
        elif node.name == "add" and sum(parameter_only(y) for y in node.inputs) == 1:
            x = next(y for y in node.inputs if not parameter_only(y))
        else:
            return None
    return None


def _path(x: Val) -> list[Node]:
    """The nodes from a product's result, exclusive, to its part or biased form."""
    nodes: list[Node] = []
    while x.node is not None and x.node.name in ("slice", "split", "unstack", "squeeze", "reshape", "transpose", "add"):
        nodes.append(x.node)
        x = next((y for y in x.node.inputs if not parameter_only(y)), x.node.inputs[0])
    return nodes


def _hidden(view: View, down: Linear, ups: Sequence[Linear]) -> Factors | None:
    """The dimension that the last product contracts, if it is one that the first ones give, and their source lacks."""
    if down.node.name == "dot_general":
        dims = down.node.attributes["dimension_numbers"][0][down.position]
    else:
        dims = down.node.attributes["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][down.position]
    atoms = view.engine.atoms
    contracted = [atom for dim in dims for atom in view.factors(down.weight, dim)]
    leaves = set(atoms.leaves(contracted))
    if not leaves:
        return None
    for up in ups:
        given = view.leaves(up.weight)
        if not leaves <= given or leaves & view.leaves(up.x):
            return None
    return tuple(contracted)


def _evaluated(view: View, x: Val, cone: _Cone) -> tuple[str, int | None] | None:
    """The activation's name and which of two ends is the gate; none if it is no activation."""
    cut = {end: f"end {i}" for i, end in enumerate(cone.ends)}
    cut |= dict.fromkeys(cone.sides, "side") | dict.fromkeys(cone.random, "random")
    rates = tuple(drop_rate(view, y) or 0.0 for y in cone.random)
    key = ("activation", view.key(x, cut), rates)
    if key not in view.memo:
        kept = math.prod(1.0 - rate for rate in rates)
        told = [_decide(x, cone, share) for share in dict.fromkeys((kept, float(jnp.asarray(kept, jnp.bfloat16))))]
        view.memo[key] = next((each for each in told if each is not None and each[0] != "custom"), told[0])
    return view.memo[key]


def _decide(x: Val, cone: _Cone, kept: float) -> tuple[str, int | None] | None:
    """The same; `kept` is the share that dropout keeps, whose inverse it multiplies with."""

    def given(values: Sequence[np.ndarray]) -> dict[Val, np.ndarray]:
        result = {end: v.astype(np.float32) for end, v in zip(cone.ends, values, strict=True)}
        for side in (*cone.sides, *cone.random):
            dtype = np.dtype(bool) if side.dtype == bool else np.dtype(np.float32)
            result[side] = np.full([1] * len(side.shape), 0 if side in cone.sides else 1, dtype)
        return result

    def function(*values: np.ndarray) -> np.ndarray:
        """The cone's result for many numbers at once: the first dimension carries them, which is free to."""
        arrays = [v.reshape([-1, *[1] * (len(end.shape) - 1)]) for end, v in zip(cone.ends, values, strict=True)]
        try:
            result = Folder(given(arrays))(x, tuple((0, size) for size in x.shape)).reshape(-1)
            if result.shape == values[0].shape:
                return result * kept
        except (ValueError, IndexError):
            pass  # a layout in between minds the size of that dimension: one number at a time, then
        window = tuple((0, 1) for _ in x.shape)
        singles = [
            [np.full([1] * len(end.shape), n) for end, n in zip(cone.ends, numbers, strict=True)]
            for numbers in zip(*values, strict=True)
        ]
        return kept * np.asarray([float(Folder(given(single))(x, window).reshape(-1)[0]) for single in singles])

    try:
        if len(cone.ends) == 1:
            name = name_activation(function)
            return None if name == "identity" else (name, None)
        ones = np.ones(5, np.float32)
        samples = np.asarray([-2.0, -0.5, 0.25, 1.0, 3.0], np.float32)
        for gate in (0, 1):

            def pair(g: np.ndarray, u: np.ndarray, gate: int = gate) -> np.ndarray:
                return function(*((g, u) if gate == 0 else (u, g)))

            single = pair(samples, ones)
            linear = all(np.allclose(pair(samples, ones * u), single * u, rtol=1e-3, atol=1e-5) for u in (-2.0, 0.5))
            if linear and not np.allclose(single, single[0]):
                name = name_activation(lambda g, pair=pair: pair(g, np.ones_like(g)))
                if name != "identity":
                    return name, gate
    except (Unknown, TooLarge):
        pass
    return None


def _with_bias(view: View, x: Val) -> tuple[Val, Val | None]:
    readers = view.normal.readers(x)
    if len(readers) == 1 and readers[0].name == "add" and readers[0].outputs[0].shape == x.shape:
        (node,) = readers
        other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
        if parameter_only(other):
            return node.outputs[0], other
    return x, None
