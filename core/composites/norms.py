"""Normalizations, anchored on the reciprocal root of a variance or a mean square.

Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167; Ba et al., "Layer Normalization", 2016,
arXiv:1607.06450; Wu and He, "Group Normalization", 2018, arXiv:1803.08494; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019, arXiv:1910.07467. Casts lie outside the normal form; the order of division, weight and bias, and
the form of the variance, are the model's own. A weight that depends on what is normalized is none.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from compax.analysis.normal import Depends, Node, Val
from compax.analysis.provenance import reshape_groups
from compax.composites.base import Normalization
from compax.composites.view import View, parameter_only, rearranged, scalar

_SHAPED = ("broadcast_in_dim", "reshape", "squeeze", "transpose")
_LONGEST = 12


@dataclasses.dataclass(frozen=True, eq=False)
class _Root:
    """Where something is divided by a root.

    Attributes:
        radicand: what is under the root, epsilon left out.
        epsilon: what was added to it.
        factor: the value that is multiplied with (a reciprocal root), or divided by (a root).
        divides: whether it is divided by.
    """

    radicand: Val
    epsilon: float
    factor: Val
    divides: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistics:
    """What is under a root.

    Attributes:
        x: what is normalized, before its mean is subtracted; none for stored statistics.
        axes: its dimensions that the mean square is taken over.
        centered: whether its mean is subtracted.
        stored: whether the variance is a parameter or state.
    """

    x: Val | None
    axes: tuple[int, ...]
    centered: bool
    stored: bool


def find_normalizations(view: View) -> list[Normalization]:
    """All normalizations of a graph, in order."""
    found: dict[Val, Normalization] = {}
    for root in _roots(view):
        normalization = _normalization(view, root)
        if normalization is not None:
            found.setdefault(normalization.output, normalization)
    return sorted(found.values(), key=lambda x: x.nodes[-1].number)


def _roots(view: View) -> Iterator[_Root]:
    for node in view.normal.nodes:
        reciprocal = node.name == "rsqrt" or (node.name == "pow" and scalar(node.inputs[1]) == -0.5)
        if (not reciprocal and node.name != "sqrt") or node.inputs[0].static:
            continue
        radicand, epsilon = _without_epsilon(node.inputs[0])
        yield _Root(radicand, epsilon, node.outputs[0], divides=not reciprocal)
        for reader in () if reciprocal else view.normal.readers(node.outputs[0]):
            inverted = reader.name == "div" and scalar(reader.inputs[0]) == 1.0
            if inverted or (reader.name == "integer_pow" and reader.attributes["y"] == -1):
                yield _Root(radicand, epsilon, reader.outputs[0], divides=False)


def _without_epsilon(x: Val) -> tuple[Val, float]:
    node = x.node
    if node is not None and node.name in ("add", "max"):
        for i in (0, 1):
            number = scalar(node.inputs[i])
            if number is not None and 0 <= number < 1:
                return node.inputs[1 - i], number
    return x, 0.0


# -- Statistics -------------------------------------------------------------------------------------------------------


def _statistics(radicand: Val) -> _Statistics | None:
    x = _unwrapped(radicand)
    if _stored(x):
        return _Statistics(None, (), centered=True, stored=True)
    mean = _mean(x)
    if mean is not None:
        squared, axes = mean
        base = _squared(squared)
        if base is None:
            return None
        inner = _centered(base, axes)
        return _Statistics(base if inner is None else inner, axes, inner is not None, stored=False)
    node = x.node
    if node is not None and node.name == "sub":  # E[x^2] - E[x]^2
        mean, square = _mean(_unwrapped(node.inputs[0])), _squared(_unwrapped(node.inputs[1]))
        base = None if mean is None else _squared(mean[0])
        center = None if square is None else _mean(_unwrapped(square))
        if mean is not None and base is not None and center == (base, mean[1]):
            return _Statistics(base, mean[1], centered=True, stored=False)
    return None


def _unwrapped(x: Val) -> Val:
    """A value without rearrangements, and without being kept above zero."""
    while True:
        x = rearranged(x, _SHAPED)
        node = x.node
        if node is not None and node.name == "max" and 0.0 in map(scalar, node.inputs):
            x = node.inputs[0] if scalar(node.inputs[1]) == 0.0 else node.inputs[1]
        elif node is not None and node.name == "select_n" and len(node.inputs) == 3:
            kept = [y for y in node.inputs[1:] if not y.static]  # jnp.var guards its count
            if len(kept) != 1 or not node.inputs[0].static:
                return x
            x = kept[0]
        else:
            return x


def _stored(x: Val) -> bool:
    """Whether parameters or state alone determine a value."""
    kept = Depends.PARAMETER | Depends.STATE
    return bool(x.depends & kept) and not x.depends & ~(kept | Depends.TURN)


def _mean(x: Val) -> tuple[Val, tuple[int, ...]] | None:
    """What a value is the mean of, over which dimensions."""
    node = x.node
    if node is None or node.name not in ("div", "mul"):
        return None
    numbers = [scalar(y) for y in node.inputs]
    if node.name == "div":
        factor, inner = (None if not numbers[1] else 1.0 / numbers[1]), node.inputs[0]
    else:
        position = 0 if numbers[0] is not None else 1
        factor, inner = numbers[position], node.inputs[1 - position]
    inner = rearranged(inner, _SHAPED)
    if factor is None or inner.node is None or inner.node.name != "reduce_sum":
        return None
    source, axes = inner.node.inputs[0], tuple(inner.node.attributes["axes"])
    count = math.prod(source.shape[axis] for axis in axes)
    return (source, axes) if abs(factor * count - 1.0) < 1e-3 else None


def _squared(x: Val) -> Val | None:
    node = x.node
    if node is None:
        return None
    if node.name == "square" or (node.name == "integer_pow" and node.attributes["y"] == 2):
        return rearranged(node.inputs[0], ("abs",))
    if node.name == "mul":
        one, other = (rearranged(y, ("abs",)) for y in node.inputs)
        return one if one is other else None
    return None


def _centered(x: Val, axes: Sequence[int]) -> Val | None:
    """What `x` is before its mean over some dimensions was subtracted; none if nothing was."""
    node = x.node
    if node is None or node.name != "sub":
        return None
    mean = _mean(_unwrapped(node.inputs[1]))
    if mean is None or mean[0] is not node.inputs[0] or set(mean[1]) != set(axes):
        return None
    return node.inputs[0]


# -- From the root to the end -----------------------------------------------------------------------------------------


def _normalization(view: View, root: _Root) -> Normalization | None:
    statistics = _statistics(root.radicand)
    quotient = None if statistics is None else _quotient(view, root, statistics)
    if statistics is None or quotient is None:
        return None
    node, x, weights = quotient
    if parameter_only(x) or x.static:
        return None
    output, more, bias = _affine(view, node.outputs[0], weights)
    weights = [*weights, *more]
    weight = weights[-1] if weights else None
    parameters = [y for y in (*weights, bias) if y is not None]
    return Normalization(
        inputs=(x, *dict.fromkeys(parameters)),
        output=output,
        nodes=_nodes(x, output),
        parameters=tuple(dict.fromkeys(path for y in parameters for path in view.parameters(y))),
        loops=node.loops,
        type="batch_running" if statistics.stored else _type(x, statistics.axes, statistics.centered),
        x=x,
        weight=weight,
        bias=bias,
        epsilon=root.epsilon,
        axes=statistics.axes,
    )


def _quotient(view: View, root: _Root, statistics: _Statistics) -> tuple[Node, Val, list[Val]] | None:
    """The node at which what is normalized meets the root: the node, what is normalized, and weights met before."""
    waiting: list[tuple[Val, list[Val]]] = [(root.factor, [])]
    for factor, weights in waiting:
        if len(waiting) > _LONGEST:
            return None
        for node in view.normal.readers(factor):
            if node.name in _SHAPED:
                waiting.append((node.outputs[0], weights))
            elif (node.name == "mul" and not root.divides) or (node.name == "div" and node.inputs[1] is factor):
                other = node.inputs[1] if node.inputs[0] is factor else node.inputs[0]
                base = _normalized(other, statistics)
                if base is not None:
                    return node, base[0], [*weights, *base[1]]
                if _stored(other) and node.name == "mul":
                    waiting.append((node.outputs[0], [*weights, other]))
    return None


def _normalized(x: Val, statistics: _Statistics) -> tuple[Val, list[Val]] | None:
    """What is normalized, if `x` is it: centered if it has to be, multiplied with a weight before or not."""
    weights: list[Val] = []
    for _ in range(3):
        node = x.node
        if statistics.stored:
            if node is not None and node.name == "sub" and _stored(node.inputs[1]):
                return node.inputs[0], weights
        elif statistics.centered:
            inner = _centered(x, statistics.axes)
            if inner is not None and inner is statistics.x:
                return inner, weights
        elif x is statistics.x:
            return x, weights
        if node is None or node.name != "mul":
            return None
        parts = [y for y in node.inputs if _stored(y)]
        if len(parts) != 1:
            return None
        weights.append(parts[0])
        x = node.inputs[1] if node.inputs[0] is parts[0] else node.inputs[0]
    return None


def _affine(view: View, x: Val, weights: Sequence[Val]) -> tuple[Val, list[Val], Val | None]:
    """Weight and bias behind a quotient: the last value, the weights, the bias."""
    found: list[Val] = []
    for _ in range(3):
        readers = view.normal.readers(x)
        if len(readers) != 1:
            break
        (node,) = readers
        if len(node.inputs) != 2 or node.outputs[0].shape != x.shape:
            break
        other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
        if not _stored(other):
            break
        if node.name == "mul" and not found and not weights:
            found.append(other)
            x = node.outputs[0]
        elif node.name == "add":
            return node.outputs[0], found, other
        else:
            break
    return x, found, None


def _type(x: Val, axes: Sequence[int], centered: bool) -> str:
    last = len(x.shape) - 1
    if not centered:
        return "rms"
    if set(axes) == set(range(last - len(axes) + 1, last + 1)) and not _groups(x, axes):
        return "layer"
    return "batch" if 0 in axes and len(axes) == last else "group"


def _groups(x: Val, axes: Sequence[int]) -> bool:
    """Whether a reshape made some of the normalized dimensions, and others, out of one: groups of channels."""
    node = x.node
    if node is None or node.name != "reshape":
        return False
    for before, after in reshape_groups(node.inputs[0].shape, x.shape):
        wide = [d for d in after if x.shape[d] != 1]
        inside = [d for d in wide if d in axes]
        if len(before) < len(wide) and inside and len(inside) < len(wide) and len(axes) > 1:
            return True
    return False


def _nodes(x: Val, output: Val) -> tuple[Node, ...]:
    found: set[Node] = set()
    waiting = [output]
    while waiting:
        value = waiting.pop()
        node = value.node
        if node is None or node in found or value is x or value.static or _stored(value):
            continue
        found.add(node)
        waiting.extend(node.inputs)
    return tuple(sorted(found, key=lambda node: node.number))
