"""Normalizations, anchored on the reciprocal root of a variance or a mean square.

Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167; Ba et al., "Layer Normalization", 2016,
arXiv:1607.06450; Ulyanov et al., "Instance Normalization", 2016, arXiv:1607.08022; Wu and He, "Group Normalization",
2018, arXiv:1803.08494; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.

From the root on, readers are followed until it meets what it was computed from, then the weight and the bias, whatever
the order of the factors. That statistics stand where they were taken, and the weight on features, is told by following
every dimension through the whole region. Only epsilon under the root counts: `x / (std + epsilon)` is none of these,
and neither is a division by a norm, which is no mean.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp

from compax.analysis.folding import Folder, TooLarge, Unknown
from compax.analysis.normal import REARRANGING, Depends, Node, Val, rearranged
from compax.composites.alignment import Alignment, Digit, Misaligned, Row, region
from compax.composites.base import Normalization
from compax.composites.view import View, scalar, unbroadcast

_REGROUP = ("reshape", "squeeze", "transpose", "convert_element_type")
_PICKED = ("reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "scan_slice", "slice", "dynamic_slice")
_DEEPEST = 16


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistic:
    """What is under the root.

    Attributes:
        kind: "variance", "square" (mean square) or "running" (a stored variance).
        x: what it is taken of; none if stored.
        axes: the dimensions of `x` that it is taken over.
        epsilon: what is added.
        stored: the stored variance.
    """

    kind: str
    x: Val | None
    axes: tuple[int, ...]
    epsilon: float
    stored: Val | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Numerator:
    """What the root divides: `x`, or `x` less its mean, perhaps times a weight."""

    x: Val
    centered: bool
    mean: Val | None = None
    weight: Val | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Quotient:
    """A normalized value, at first without what follows.

    Attributes:
        output: its value.
        numerator: what was divided.
        factor: what `x` was multiplied with: the reciprocal root, perhaps times the weight; none after a division.
        weight: the weight, as it enters.
        bias: the bias, as it enters.
    """

    output: Val
    numerator: _Numerator
    factor: Val | None
    weight: Val | None
    bias: Val | None = None


def find_normalizations(view: View) -> list[Normalization]:
    """All normalizations of activations in a graph, in order."""
    outputs = set(view.normal.outputs)
    found: list[Normalization] = []
    for node in view.normal.nodes_named("rsqrt", "sqrt", "pow"):
        value = node.inputs[0]
        if value.static or not value.shape:
            continue
        exponent = {"rsqrt": -0.5, "sqrt": 0.5}.get(node.name)
        if exponent is None:
            exponent = number(view, node.inputs[1])
        if exponent not in (-0.5, 0.5):
            continue
        statistic = _statistic(view, value)
        if statistic is None:
            continue
        for quotient in _quotients(view, node.outputs[0], exponent < 0, statistic):
            normalization = _normalization(view, statistic, list(_chain(view, quotient, statistic, outputs)))
            if normalization is not None:
                found.append(normalization)
    return sorted(found, key=lambda norm: norm.nodes[-1].number)


def number(view: View, x: Val) -> float | None:
    """The number that a static value is everywhere; none if it is not static, or not one number."""
    if not x.static:
        return None
    x = unbroadcast(x)
    if math.prod(x.shape) != 1:
        return None
    if x.constant is not None:
        return scalar(x)
    key = ("number", x)
    if key not in view.memo:
        try:
            view.memo[key] = float(Folder()(x).reshape(()))
        except (Unknown, TooLarge, TypeError):
            view.memo[key] = None
    return view.memo[key]


# -- Statistics -------------------------------------------------------------------------------------------------------


def _statistic(view: View, x: Val) -> _Statistic | None:
    epsilon = 0.0
    for _ in range(_DEEPEST):
        x = _finite(view, _bare(x))
        node = x.node
        if node is None or node.name not in ("add", "max"):
            break
        operand = _with_number(view, node)
        if operand is None:
            break
        x, constant = operand
        if (constant > 0 and epsilon) or (constant < 0 and node.name == "add"):
            return None
        epsilon = max(epsilon, constant)
    if _stored(x):
        return _Statistic("running", None, (), epsilon, stored=x)
    mean = _mean(view, x)
    base = None if mean is None else _squared(view, mean[0])
    if mean is not None and base is not None:
        axes, inner = mean[1], base.node
        if inner is not None and inner.name == "sub" and _is_mean(view, inner.inputs[1], inner.inputs[0], axes):
            return _Statistic("variance", inner.inputs[0], axes, epsilon)
        return _Statistic("square", base, axes, epsilon)
    node = x.node
    if node is None or node.name != "sub":
        return None
    mean, second = _mean(view, node.inputs[0]), _bare(node.inputs[1])
    square, root = None if mean is None else _squared(view, mean[0]), _squared(view, second)
    if mean is None or square is None or second.node is None:
        return None
    factors = second.node.inputs if root is None and second.node.name == "mul" else [root]
    if any(y is None or not _is_mean(view, y, square, mean[1]) for y in factors):
        return None
    return _Statistic("variance", square, mean[1], epsilon)


def _with_number(view: View, node: Node) -> tuple[Val, float] | None:
    """The operands of a sum or maximum, one of them a number."""
    for i in (0, 1):
        constant = number(view, node.inputs[i])
        if constant is not None:
            return node.inputs[1 - i], constant
    return None


def _finite(view: View, x: Val) -> Val:
    """A value that is not a number only where there are no elements to take a mean of, as such."""
    node = x.node
    if node is None or node.name != "select_n" or len(node.inputs) != 3 or not node.inputs[0].static:
        return x
    for i in (1, 2):
        other = number(view, node.inputs[i])
        if other is not None and math.isnan(other):
            return _bare(node.inputs[3 - i])
    return x


def _mean(view: View, x: Val) -> tuple[Val, tuple[int, ...]] | None:
    """What a value is the mean of, and over which dimensions."""
    x = _finite(view, _bare(x))
    total, count, exact = _counted(view, x) or (x, 1.0, True)
    node = _bare(total).node
    if node is None or node.name != "reduce_sum":
        return None
    operand, axes = node.inputs[0], tuple(sorted(node.attributes["axes"]))
    if count == 1.0:  # each element was divided, or there is but one
        operand, count, exact = _counted(view, operand) or (operand, 1.0, True)
    size = math.prod(operand.shape[dim] for dim in axes)
    tolerance = 1e-5 if exact else 4e-3
    return (operand, axes) if size > 1 and abs(count / size - 1) < tolerance else None


def _counted(view: View, x: Val) -> tuple[Val, float, bool] | None:
    """A value by which number it is divided, and whether that was written in float32."""
    node = x.node
    if node is None or node.name not in ("div", "mul"):
        return None
    for i in (1,) if node.name == "div" else (0, 1):
        constant = number(view, node.inputs[i])
        if constant:
            exact = jnp.dtype(node.inputs[i].dtype).itemsize >= 4
            return node.inputs[1 - i], constant if node.name == "div" else 1 / constant, exact
    return None


def _squared(view: View, x: Val) -> Val | None:
    """What a value is the square of."""
    node = x.node
    if node is None:
        return None
    if node.name == "square" or (node.name == "integer_pow" and node.attributes["y"] == 2):
        return node.inputs[0]
    if node.name == "pow" and number(view, node.inputs[1]) == 2.0:
        return node.inputs[0]
    return node.inputs[0] if node.name == "mul" and node.inputs[0] is node.inputs[1] else None


def _is_mean(view: View, mean: Val, x: Val, axes: tuple[int, ...]) -> bool:
    """Whether a value is the mean of `x` over some dimensions; where `x` was rearranged, these are compared later."""
    found = _mean(view, mean)
    return found is not None and _same(found[0], x) and (found[1] == axes or found[0] is not x)


def _same(one: Val, other: Val) -> bool:
    """Whether two values are one, perhaps rearranged."""
    return one is other or rearranged(one, _REGROUP) is rearranged(other, _REGROUP)


def _bare(x: Val) -> Val:
    """A value without what repeats or rearranges it."""
    return rearranged(x, (*REARRANGING, "convert_element_type"))


def _stored(x: Val) -> bool:
    """Whether a value is state or a parameter as it is, perhaps that of one layer of several."""
    source = rearranged(x, _PICKED)
    return source.input is not None and source.input.kind in ("state", "parameter")


def _affine(x: Val) -> bool:
    """Whether parameters or state alone determine a value."""
    given = Depends.PARAMETER | Depends.STATE
    return bool(x.depends & given) and not x.depends & ~(given | Depends.TURN)


# -- From the root to the output --------------------------------------------------------------------------------------


def _quotients(view: View, root: Val, inverse: bool, statistic: _Statistic) -> Iterator[_Quotient]:
    """Where the root, or its reciprocal, meets what the statistic was taken of."""
    waiting: list[tuple[Val, bool, Val | None]] = [(root, inverse, None)]
    for value, inverted, weight in waiting:
        if len(waiting) > _DEEPEST:
            return
        for node in view.normal.readers(value):
            output = node.outputs[0]
            if node.name in REARRANGING:
                waiting.append((output, inverted, weight))
            elif node.name == "integer_pow" and node.attributes["y"] == -1 and not inverted:
                waiting.append((output, True, weight))
            elif node.name in ("mul", "div") and node.inputs[0] is not node.inputs[1]:
                divides = node.name == "div"
                if divides and (inverted or node.inputs[1] is not value):
                    continue
                if not divides and not inverted:
                    continue
                other = node.inputs[0] if node.inputs[1] is value else node.inputs[1]
                numerator = _numerator(view, other, statistic)
                if numerator is not None:
                    if weight is None or numerator.weight is None:
                        factor = None if divides else value
                        yield _Quotient(output, numerator, factor, numerator.weight if weight is None else weight)
                elif number(view, other) == 1.0:
                    waiting.append((output, True, weight))
                elif _affine(other) and weight is None:
                    waiting.append((output, True, other))


def _numerator(view: View, x: Val, statistic: _Statistic, *, weighted: bool = True) -> _Numerator | None:
    """A value as what the root divides; none if it is something else."""
    given, node = statistic.x, x.node
    if given is not None and _same(x, given):
        return _Numerator(x, centered=False)
    if node is not None and node.name == "sub" and _is_center(view, node.inputs[1], node.inputs[0], statistic):
        return _Numerator(node.inputs[0], True, node.inputs[1])
    if node is not None and node.name == "mul" and weighted:
        for i in (0, 1):
            if _affine(node.inputs[i]):
                inner = _numerator(view, node.inputs[1 - i], statistic, weighted=False)
                return None if inner is None else dataclasses.replace(inner, weight=node.inputs[i])
    if node is not None and node.name in _REGROUP:
        return _numerator(view, node.inputs[0], statistic, weighted=weighted)
    # Of stored statistics anything may be the operand: what is subtracted from it tells.
    return _Numerator(x, centered=False) if given is None and not x.static and not _affine(x) else None


def _is_center(view: View, mean: Val, x: Val, statistic: _Statistic) -> bool:
    """Whether a value is the mean of `x` that belongs to a variance."""
    if statistic.kind == "running":
        return _stored(mean) and not _affine(x) and not x.static
    if statistic.x is None or statistic.kind != "variance" or not _same(x, statistic.x):
        return False
    return _is_mean(view, mean, x, statistic.axes if x is statistic.x else ())


def _chain(view: View, quotient: _Quotient, statistic: _Statistic, outputs: Collection[Val]) -> Iterator[_Quotient]:
    """A quotient, it with a weight, and it with a bias as well, as far as there."""
    value = quotient.output
    yield quotient
    for _ in range(_DEEPEST):
        readers = view.normal.readers(value)
        if value in outputs or len(readers) != 1:
            return
        (node,) = readers
        if node.name in REARRANGING:
            value = node.outputs[0]
            continue
        if node.name not in ("mul", "add", "sub") or node.inputs[0] is node.inputs[1]:
            return
        position = 1 if node.inputs[0] is value else 0
        other, value = node.inputs[position], node.outputs[0]
        if node.name == "mul" and _affine(other) and quotient.weight is None and quotient.bias is None:
            quotient = dataclasses.replace(quotient, output=value, weight=other)
        elif not quotient.numerator.centered and quotient.factor is not None and statistic.kind != "square":
            sign = {"add": 1, "sub": -1}.get(node.name, 0)
            shift = _shift(view, other, sign, quotient, statistic) if sign == 1 or position == 1 else None
            if shift is None:
                return
            numerator = dataclasses.replace(quotient.numerator, centered=True, mean=shift[0])
            quotient = dataclasses.replace(quotient, output=value, numerator=numerator, bias=shift[1])
        elif node.name == "add" and _affine(other) and quotient.bias is None:
            quotient = dataclasses.replace(quotient, output=value, bias=other)
        else:
            return
        yield quotient


def _shift(view: View, x: Val, sign: int, quotient: _Quotient, statistic: _Statistic) -> tuple[Val, Val | None] | None:
    """The mean and the bias in `- mean * factor + bias`, which follows where `x` was not centered before."""
    x = _bare(x)
    node, factor = x.node, quotient.factor
    if node is None or factor is None:
        return None
    if node.name == "neg":
        return _shift(view, node.inputs[0], -sign, quotient, statistic)
    if node.name == "mul":
        for i in (0, 1):
            if _bare(node.inputs[i]) is _bare(factor):
                mean = _bare(node.inputs[1 - i])
                if mean.node is not None and mean.node.name == "neg":
                    mean, sign = mean.node.inputs[0], -sign
                fits = sign == -1 and _is_center(view, mean, quotient.numerator.x, statistic)
                return (mean, None) if fits else None
    if node.name in ("add", "sub") and sign == 1:
        for i in (0, 1) if node.name == "add" else (0,):
            if _affine(node.inputs[i]):
                found = _shift(view, node.inputs[1 - i], 1 if node.name == "add" else -1, quotient, statistic)
                if found is not None and found[1] is None:
                    return found[0], node.inputs[i]
    return None


# -- What was found ---------------------------------------------------------------------------------------------------


def _normalization(view: View, statistic: _Statistic, chain: list[_Quotient]) -> Normalization | None:
    """The longest part of a chain that stands up to following every dimension through it."""
    for quotient in reversed(chain):
        if quotient.numerator.centered != (statistic.kind != "square"):
            continue
        x = _common(quotient.numerator.x, statistic.x)
        if not x.depends & ~(Depends.PARAMETER | Depends.TURN):
            return None
        weight, bias = (None if y is None else unbroadcast(y) for y in (quotient.weight, quotient.bias))
        stored: tuple[Val, ...] = ()
        if statistic.stored is not None and quotient.numerator.mean is not None:
            stored = (unbroadcast(quotient.numerator.mean), statistic.stored)
        given = {"weight": weight, "bias": bias} | {f"stored {i}": y for i, y in enumerate(stored)}
        inputs = (x, *dict.fromkeys(y for y in given.values() if y is not None))
        nodes = region(quotient.output, inputs)
        told = _type(view, statistic, quotient, x, given, nodes)
        if told is None:
            continue
        kind, axes = told
        return Normalization(
            inputs=inputs,
            output=quotient.output,
            nodes=nodes,
            parameters=tuple(dict.fromkeys(path for y in inputs[1:] for path in view.parameters(y))),
            loops=nodes[-1].loops,
            type=kind,
            x=x,
            weight=weight,
            bias=bias,
            epsilon=statistic.epsilon,
            axes=axes,
        )
    return None


def _common(one: Val, other: Val | None) -> Val:
    """What two values that are the same, perhaps regrouped, both come from."""
    if other is None or one is other:
        return one
    chain = set(_regrouped(one))
    return next(x for x in _regrouped(other) if x in chain)


def _regrouped(x: Val) -> Iterator[Val]:
    yield x
    while x.node is not None and x.node.name in _REGROUP:
        x = x.node.inputs[0]
        yield x


def _type(
    view: View,
    statistic: _Statistic,
    quotient: _Quotient,
    x: Val,
    given: dict[str, Val | None],
    nodes: tuple[Node, ...],
) -> tuple[str, tuple[int, ...]] | None:
    """Type and axes of a normalization; none if its dimensions do not line up, or the weight stands on wrong ones."""
    alignment = Alignment(("x",))
    # Parts of a dimension are told from dimensions one reshape further up.
    regroup = x.node if x.node is not None and x.node.name == "reshape" else None
    base = x if regroup is None else regroup.inputs[0]
    alignment.place(base, "x")
    for name, y in given.items():
        if y is not None and y is not base:
            alignment.place(y, name)
    try:
        alignment.follow(nodes if regroup is None else (regroup, *nodes))
    except Misaligned:
        return None
    digits = [digit for row in alignment.dims[quotient.output] for digit in row]
    if any(digit.root != "x" for digit in digits) or math.prod(quotient.output.shape) != math.prod(x.shape):
        return None
    weighted = [digit for name in ("weight", "bias") for digit in alignment.met.get(name, ())]
    if statistic.x is None:
        features = {digit.dim for met in alignment.met.values() for digit in met}
        size = math.prod(base.shape[dim] for dim in features)
        stored = [math.prod(y.shape) for name, y in given.items() if y is not None and name.startswith("stored")]
        return ("batch_running", ()) if {*stored} == {size} and size < math.prod(base.shape) else None
    reductions = [
        {digit for dim in node.attributes["axes"] for digit in alignment.dims[node.inputs[0]][dim]}
        for node in nodes
        if node.name == "reduce_sum"
    ]
    if any(other != reductions[0] for other in reductions):
        return None
    reduced, axes = reductions[0], statistic.axes
    if statistic.x is not x:
        mine = tuple(dim for dim, row in enumerate(alignment.dims[x]) if row and reduced.issuperset(row))
        axes = mine if sum(len(alignment.dims[x][dim]) for dim in mine) == len(reduced) else axes
    places = alignment.dims[x if axes is not statistic.axes else statistic.x]
    kind = _kind(view, base, places, axes, weighted, regrouped=statistic.x is not quotient.numerator.x)
    return None if kind is None else (kind if statistic.kind != "square" else "rms", axes)


def _kind(
    view: View, x: Val, places: Sequence[Row], axes: tuple[int, ...], weighted: Sequence[Digit], *, regrouped: bool
) -> str | None:
    """The type of a normalization by what its statistics and its weights are over.

    Digits are of the dimensions of `x`. `places` are dimensions of what statistics are taken of over `axes`, `weighted`
    is where weight and bias stand; `regrouped` says that what is normalized is arranged in another way.
    """
    bare = [dim for dim in range(len(places)) if dim not in axes]
    reduced = [digit for dim in axes for digit in places[dim]]
    kept = [digit for dim in bare for digit in places[dim]]
    on_reduced = any(digit.overlaps(other) for digit in weighted for other in reduced)
    on_kept = [digit for digit in kept if any(digit.overlaps(other) for other in weighted)]
    partly = {digit.dim for digit in reduced}
    foreign = {digit.dim for digit in on_kept if digit.dim not in partly and not _free(view, x, digit.dim)}
    if foreign and (on_reduced or len(foreign) > 1):
        return None
    split = partly & {digit.dim for digit in kept}
    trailing = axes == tuple(range(len(bare), len(places)))
    if split:
        apart = regrouped or bool(on_reduced and on_kept)
        return "layer" if trailing and not apart and partly == split else "group"
    if on_reduced or (trailing and not weighted):
        return "layer"
    if weighted:
        covered = [dim for dim in bare if any(digit in on_kept for digit in places[dim])]
        return "batch" if covered == bare else "group"
    if 0 not in axes:
        return "group"
    return "batch" if any(not _free(view, x, digit.dim) for digit in reduced) else "layer"


def _free(view: View, x: Val, dim: int) -> bool:
    """Whether nothing outside of the program orders a dimension, as examples and positions are ordered."""
    reasons = {reason for atom in view.engine.atoms.leaves(view.factors(x, dim)) for reason in atom.reasons}
    return reasons <= {"an output"}
