"""Feed-forward networks: linear, elementwise, linear.

Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, has the gated ones. The last product is the anchor:
what it multiplies has to be an elementwise function of the results of one or two products of one source, or of the two
halves of one product, and what it contracts has to be what these take from their weights. Which function that is, and
which of two products is the gate, is told by evaluating it; that nothing else mixes elements, by following dimensions.

No two have a product in common: of a chain of linear layers every second is the last one of a network.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import jax.numpy as jnp
import numpy as np

from compax.analysis.folding import Folder, TooLarge, Unknown
from compax.analysis.normal import REARRANGING, Depends, Node, Val, rearranged
from compax.composites.activations import GRID, name_activation
from compax.composites.alignment import ELEMENTWISE, Alignment, Misaligned, Row, region
from compax.composites.attention import drop_rate
from compax.composites.base import FeedForward
from compax.composites.normalization import number
from compax.composites.view import Linear, View, parameter_only, unbroadcast

_CUTS = frozenset({"slice", "split", "unstack", "dynamic_slice"})
_DRAWS = frozenset({"random_bits", "rng_uniform", "rng_bit_generator", "threefry2x32"})
_PRODUCTS = frozenset({"dot_general", "ragged_dot_general"})
_FORMATS = (np.float64, jnp.bfloat16, np.float16)
_LARGEST = 128
_OTHERS = np.asarray([1.0, -2.0, 0.5, 3.0, 0.0], np.float32)
"""Numbers for a gated value, to see whether the result is proportional to it."""


@dataclasses.dataclass(frozen=True, eq=False)
class _End:
    """Where an elementwise function starts.

    Attributes:
        value: its operand: a product's result, or half of it.
        linear: the product.
        half: which half, of which dimension, and how far apart in it neighbours are; none if all of it.
        biases: what was added to the product before it was cut.
    """

    value: Val
    linear: Linear
    half: tuple[int, int, int] | None = None
    biases: tuple[Val, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Cone:
    """An elementwise function.

    Attributes:
        ends: what it starts from, one or two.
        nodes: its nodes, in order.
        sides: operands that parameters alone determine.
        masks: operands that say at random which elements are kept.
    """

    ends: tuple[_End, ...]
    nodes: tuple[Node, ...]
    sides: tuple[Val, ...]
    masks: tuple[Val, ...]


@dataclasses.dataclass(frozen=True)
class _Told:
    """What evaluating a function shows.

    Attributes:
        activation: its name.
        gate: which end is the gate, if one is.
        kept: what a random mask has where an element is kept.
    """

    activation: str
    gate: int | None
    kept: bool


def find_feed_forwards(view: View) -> list[FeedForward]:
    """All feed-forward networks of a graph, those of single experts among them, in order."""
    outputs = set(view.normal.outputs)
    found: list[FeedForward] = []
    last: set[Node] = set()
    for down in view.linears.values():
        cone = _cone(view, down)
        if cone is None or any(end.linear.node in last for end in cone.ends):
            continue
        feed_forward = _feed_forward(view, down, cone, outputs)
        if feed_forward is not None:
            found.append(feed_forward)
            last.add(down.node)
    return found


def _feed_forward(view: View, down: Linear, cone: _Cone, outputs: set[Val]) -> FeedForward | None:
    linears = [end.linear for end in cone.ends]
    x = _source(linears)
    if x is None:
        return None
    atoms, contract = view.engine.atoms, _dims(down.node)[0][down.position]
    hidden = tuple(atom for dim in contract for atom in view.factors(down.weight, dim))
    if not hidden or set(atoms.leaves(hidden)) & view.leaves(x):
        return None
    alignment = _aligned(down, cone, x)
    told = None if alignment is None else _told(view, down.x, cone)
    if alignment is None or told is None:
        return None
    rates = [rate if told.kept else 1 - rate for mask in cone.masks if (rate := drop_rate(view, mask)) is not None]
    output, bias = _biased(view, down, alignment, outputs)
    biases = (*(bias for end in cone.ends for bias in end.biases), *cone.sides, *(() if bias is None else (bias,)))
    given = [*(linear.weight for linear in (*linears, down)), *map(unbroadcast, biases)]
    groups = [y for linear in (*linears, down) for y in linear.node.inputs[2:]]
    inputs = tuple(dict.fromkeys((x, *given, *groups, *cone.masks)))
    return FeedForward(
        inputs=inputs,
        output=output,
        nodes=region(output, inputs),
        parameters=tuple(dict.fromkeys(path for y in given for path in view.parameters(y))),
        loops=down.node.loops,
        x=x,
        up=linears[0 if told.gate is None else 1 - told.gate].node,
        gate=None if told.gate is None else linears[told.gate].node,
        down=down.node,
        activation=told.activation,
        hidden=hidden,
        dropout=round(1 - math.prod(1 - rate for rate in rates), 6) if rates else None,
    )


def _dims(node: Node) -> tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]:
    """The dimensions that a product contracts, and those of its batch; for each operand."""
    if node.name == "dot_general":
        return node.attributes["dimension_numbers"]
    return node.attributes["ragged_dot_dimension_numbers"].dot_dimension_numbers


def _source(linears: Sequence[Linear]) -> Val | None:
    """What products have in common as an operand."""
    if len({tuple(linear.node.inputs[2:]) for linear in linears}) > 1:
        return None
    if len({linear.x for linear in linears}) == 1:
        return linears[0].x
    found = {rearranged(linear.x) for linear in linears}
    return found.pop() if len(found) == 1 else None


# -- The elementwise function -----------------------------------------------------------------------------------------


def _cone(view: View, down: Linear) -> _Cone | None:
    """The elementwise function that a product takes the result of; none if it starts from anything but products."""
    if down.node.name not in _PRODUCTS or down.x.node is None or down.x.node in view.linears:
        return None
    ends: list[_End] = []
    nodes: list[Node] = []
    sides: list[Val] = []
    masks: list[Val] = []
    waiting, seen = [down.x], {down.x}
    for value in waiting:
        node, linear = value.node, view.linear(value)
        if value.static:
            if number(view, value) is None:
                return None
        elif linear is not None:
            ends.append(_End(value, linear))
        elif parameter_only(value):
            sides.append(value)
        elif _is_mask(view, value):
            masks.append(value)
        elif node is not None and node.name in _CUTS:
            end = _half(view, value, node)
            if end is None:
                return None
            ends.append(end)
        elif node is not None and (node.name in ELEMENTWISE or node.name in REARRANGING):
            nodes.append(node)
            fresh = [y for y in dict.fromkeys(node.inputs) if y not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        else:
            return None
        if len(ends) > 2 or len(waiting) > _LARGEST:
            return None
    if not _complete(ends):
        return None
    ends.sort(key=lambda end: (end.linear.node.number, end.half or ()))
    return _Cone(tuple(ends), tuple(sorted(nodes, key=lambda node: node.number)), tuple(sides), tuple(masks))


def _complete(ends: Sequence[_End]) -> bool:
    """Whether a function starts from one or two whole products, or from both halves of one."""
    if not ends or any(end.linear.node.name not in _PRODUCTS for end in ends):
        return False
    if all(end.half is None for end in ends):
        return True
    if len(ends) != 2 or ends[0].linear.node is not ends[1].linear.node:
        return False
    one, other = ends[0].half, ends[1].half
    return one is not None and other is not None and one[1:] == other[1:] and one[0] != other[0]


def _is_mask(view: View, x: Val) -> bool:
    """Whether a value says for each element, at random, whether it is kept."""
    if x.dtype != bool or not x.depends & Depends.RANDOM:
        return False
    found = list(view.upstream(x, lambda node: node.name not in _DRAWS and node.name not in _PRODUCTS, limit=64))
    names = {y.node.name for y in found if y.node is not None}
    return bool(names & _DRAWS) and not names & _PRODUCTS


def _half(view: View, value: Val, node: Node) -> _End | None:
    """Half of a product's result, as an end."""
    half = _which_half(view, value, node)
    x, biases = node.inputs[0], []
    while half is not None and x.node is not None and len(biases) < _LARGEST:
        linear = view.linear(x)
        if linear is not None:
            return _End(value, linear, half, tuple(biases))
        if x.node.name in ("add", "add_any") and sum(map(parameter_only, x.node.inputs)) == 1:
            side = 0 if parameter_only(x.node.inputs[0]) else 1
            biases.append(x.node.inputs[side])
            x = x.node.inputs[1 - side]
        elif x.node.name in REARRANGING:
            x = x.node.inputs[0]
        else:
            return None
    return None


def _which_half(view: View, value: Val, node: Node) -> tuple[int, int, int] | None:
    """Which of two halves a value is, of which dimension, and how far apart in it neighbours are."""
    before = node.inputs[0].shape
    if node.name == "unstack":
        return (value.index, node.attributes["axis"], 1) if len(node.outputs) == 2 else None
    if node.name == "split":
        sizes = node.attributes["sizes"]
        return (value.index, node.attributes["axis"], 1) if len(sizes) == 2 and sizes[0] == sizes[1] else None
    strides: Sequence[int] = (1,) * len(before)
    if node.name == "slice":
        starts: Sequence[float | None] = node.attributes["start_indices"]
        strides = node.attributes["strides"] or strides
    else:
        starts = [number(view, index) for index in node.inputs[1:]]
    cut = [dim for dim, size in enumerate(before) if size != value.shape[dim]]
    if len(cut) != 1 or before[cut[0]] != 2 * value.shape[cut[0]]:
        return None
    (dim,) = cut
    second = 1 if strides[dim] == 2 else value.shape[dim]
    if starts[dim] not in (0, second) or strides[dim] not in (1, 2):
        return None
    return int(starts[dim] == second), dim, strides[dim]


# -- Dimensions -------------------------------------------------------------------------------------------------------


def _aligned(down: Linear, cone: _Cone, x: Val) -> Alignment | None:
    """Dimensions from the source through the last product; none unless it contracts all of what lies between."""
    alignment = Alignment(("x", "up", "gate"), (frozenset(("up", "gate")),))
    alignment.place(x, "x")
    try:
        for end, root in zip(cone.ends, ("up", "gate"), strict=False):
            if end.linear.output not in alignment.dims:
                alignment.follow(region(end.linear.x, (x,)))
                _multiply(alignment, end.linear, root)
            if end.half is not None and end.value.node is not None:
                for bias in end.biases:
                    alignment.place(bias, "side")
                uncut = end.value.node.inputs[0]
                alignment.follow(region(uncut, (end.linear.output, *end.biases)))
                alignment.dims[end.value] = _halved(alignment.of(uncut), end)
        for side in (*cone.sides, *cone.masks):
            alignment.place(side, "side")
        alignment.follow(cone.nodes)
        contract, batch = (dims[1 - down.position] for dims in _dims(down.node))
        for dim, row in enumerate(alignment.of(down.x)):
            inside = [digit.root in ("up", "gate") for digit in row]
            if not (all(inside) if dim in contract else dim in batch or not any(inside)):
                return None
        _multiply(alignment, down, "down")
    except Misaligned:
        return None
    return alignment


def _multiply(alignment: Alignment, linear: Linear, root: str) -> None:
    """Finds the dimensions of a product."""
    alignment.place(linear.weight, root)
    node, side = linear.node, linear.position
    rows = [alignment.of(y) for y in node.inputs[:2]]
    contract, batch = _dims(node)
    groups: Sequence[int] = ()
    if node.name == "ragged_dot_general":
        groups = node.attributes["ragged_dot_dimension_numbers"].rhs_group_dimensions
    result: list[Row] = []
    for one, other in zip(batch[1 - side], batch[side], strict=True):
        of_x, of_weight = rows[1 - side][one], rows[side][other]
        result.append(of_x if any(digit.root is not None for digit in of_x) else of_weight)
    for i in (0, 1):
        gone = {*contract[i], *batch[i], *(groups if i else ())}
        result += [row for dim, row in enumerate(rows[i]) if dim not in gone]
    if len(result) != len(linear.output.shape):
        raise Misaligned("a contraction in groups")
    alignment.dims[linear.output] = tuple(result)


def _halved(rows: tuple[Row, ...], end: _End) -> tuple[Row, ...]:
    """The dimensions of half of a product: the same for both halves."""
    assert end.half is not None
    _, dim, stride = end.half
    if len(rows[dim]) != 1 or rows[dim][0].root != "up":
        raise Misaligned("something else than the product is halved")
    ((digit),) = rows[dim]
    size = digit.size // 2
    half: Row = (digit._replace(stride=digit.stride * stride, size=size),) if size > 1 else ()
    dropped = len(rows) > len(end.value.shape)
    return (*rows[:dim], *(() if dropped else (half,)), *rows[dim + 1 :])


def _biased(view: View, down: Linear, alignment: Alignment, outputs: set[Val]) -> tuple[Val, Val | None]:
    """The last product with the bias that is added to it, if one is."""
    value = down.output
    try:
        while value not in outputs and len(view.normal.readers(value)) == 1:
            (node,) = view.normal.readers(value)
            if node.name in REARRANGING:
                alignment.visit(node)
                value = node.outputs[0]
                continue
            if node.name not in ("add", "add_any") or sum(map(parameter_only, node.inputs)) != 1:
                break
            bias = node.inputs[0] if parameter_only(node.inputs[0]) else node.inputs[1]
            alignment.place(unbroadcast(bias), "side")
            alignment.follow(region(bias, (unbroadcast(bias),)))
            pairs = zip(alignment.of(value), alignment.of(bias), strict=True)
            varies = [row for row, other in pairs if any(digit.root is not None for digit in other)]
            # A table of positions is added to positions; a bias is not.
            if any(digit.root == "x" for row in varies for digit in row):
                break
            return node.outputs[0], bias
    except Misaligned:
        pass
    return down.output, None


# -- Evaluation -------------------------------------------------------------------------------------------------------

Word = tuple[str, float]
"""What an operand is: "end" and which, "step" and which, "number" and its value, "side" and whether it is a factor, or
"mask"."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Steps:
    """An elementwise function without shapes.

    Attributes:
        steps: for each operation its node, and what its operands are.
        result: what the result is.
        key: what tells it from other functions.
    """

    steps: tuple[tuple[Node, tuple[Word, ...]], ...]
    result: Word
    key: Hashable


def _told(view: View, x: Val, cone: _Cone) -> _Told | None:
    """The activation and the gate; none if there is no function that has both."""
    steps = _steps(view, x, cone)
    rates = [drop_rate(view, mask) for mask in cone.masks]
    key = ("feed_forward", len(cone.ends), tuple(rates), steps.key)
    if key not in view.memo:
        view.memo[key] = None
        for kept in (True, False) if cone.masks else (True,):
            known = [1 - rate if kept else rate for rate in rates if rate is not None]
            # The share is rounded where a model is written in half precision.
            shares = [math.prod(float(np.asarray(x).astype(dtype)) for x in known) for dtype in _FORMATS]
            try:
                found = _decide(steps, len(cone.ends), kept, tuple(dict.fromkeys((*shares, 1.0))))
            except (Unknown, TooLarge):
                break
            if found is not None:
                view.memo[key] = found
                break
    return view.memo[key]


def _steps(view: View, x: Val, cone: _Cone) -> _Steps:
    known: dict[Val, Word] = {end.value: ("end", i) for i, end in enumerate(cone.ends)}
    known |= dict.fromkeys(cone.masks, ("mask", 0))
    sides = set(cone.sides)
    steps: list[tuple[Node, tuple[Word, ...]]] = []
    for node in cone.nodes:
        words: list[Word] = []
        for y in node.inputs:
            if y in sides:
                words.append(("side", float(node.name in ("mul", "div"))))
            elif y.static:
                words.append(("number", number(view, y) or 0.0))
            else:
                words.append(known[y])
        if node.name in REARRANGING:
            known[node.outputs[0]] = words[0]
        else:
            known[node.outputs[0]] = ("step", len(steps))
            steps.append((node, tuple(words)))
    key = tuple((node.name, str(sorted(node.attributes.items(), key=str)), words) for node, words in steps)
    return _Steps(tuple(steps), known[x], (key, known[x]))


def _decide(steps: _Steps, num_ends: int, kept: bool, shares: Sequence[float]) -> _Told | None:
    """What evaluating shows; by the inverse of one of some shares dropout may have multiplied what it keeps."""
    has_factor = any(word == ("side", 1.0) for _, words in steps.steps for word in words)
    for factor in (1.0, 0.5) if has_factor else (1.0,):
        for gate in range(num_ends):
            told = _gated(steps, num_ends, gate, kept, shares, factor)
            if told is not None:
                return told
    return None


def _gated(steps: _Steps, num_ends: int, gate: int, kept: bool, shares: Sequence[float], factor: float) -> _Told | None:
    """What it shows if one end is the gate: the result has to be proportional to the other."""
    ends = [GRID[:, None] if i == gate else _OTHERS[None] for i in range(num_ends)]
    table = _run(steps, ends, (len(GRID), len(_OTHERS)), kept, factor)
    first = table[:, 0]
    if not np.isfinite(table).all() or _is_affine(first):
        return None
    if num_ends == 2 and not np.allclose(table, first[:, None] * _OTHERS, rtol=1e-4, atol=1e-5):
        return None
    name = "custom"
    if factor == 1.0:
        names = (name_activation(lambda _, share=share: first * share) for share in shares)
        name = next((each for each in names if each != "custom"), "custom")
    return _Told(name, gate if num_ends == 2 else None, kept)


def _is_affine(values: np.ndarray) -> bool:
    line = np.linspace(values[0], values[-1], len(values))
    return bool(np.abs(values - line).max() <= 1e-4 * (1e-6 + np.abs(values).max()))


def _run(steps: _Steps, ends: Sequence[np.ndarray], shape: tuple[int, ...], kept: bool, factor: float) -> np.ndarray:
    """What a function gives for arrays of one shape: its nodes once more, in that shape."""
    given = {Val(shape, np.dtype(np.float32), Depends.NOTHING): array for array in ends}
    starts, results = list(given), list[Val]()

    def operand(word: Word, like: Val) -> Val:
        kind, content = word
        if kind in ("end", "step"):
            return (starts if kind == "end" else results)[int(content)]
        if kind == "mask":
            return Val((), np.dtype(bool), Depends.NOTHING, constant=np.asarray(kept))
        dtype = np.dtype(like.dtype) if np.dtype(like.dtype).kind in "biu" else np.dtype(np.float32)
        constant = np.asarray(factor * content if kind == "side" else content, dtype)
        return Val((), dtype, Depends.NOTHING, constant=constant)

    for node, words in steps.steps:
        inputs = [operand(word, like) for word, like in zip(words, node.inputs, strict=True)]
        again = Node(node.name, inputs, node.attributes, node.path, node.op, ())
        again.outputs = [Val(shape, node.outputs[0].dtype, Depends.NOTHING, again)]
        results += again.outputs
    kind, index = steps.result
    result = (starts if kind == "end" else results)[int(index)]
    return Folder(given).full(result).astype(np.float64)
