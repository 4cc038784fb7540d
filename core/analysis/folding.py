"""Folding: values of the normal form computed before anything runs, as far as somebody asks for them.

Only the window that is asked for is computed: a causal mask of 2048 x 2048 of which a model uses a corner costs that
corner. Values that are not static can be given, so that a region (a mask from its padding argument, an activation from
its input) is understood by what it computes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.analysis.normal import Node, Val
from compax.analysis.provenance import reshape_groups

Window = tuple[tuple[int, int], ...]
"""For each dimension where it starts and stops."""

BUDGET = 1 << 26
"""How many elements may be computed at a time."""


class Unknown(Exception):
    """A value is needed that nobody knows before the program runs.

    Attributes:
        val: that value.
    """

    def __init__(self, val: Val):
        super().__init__(f"{val} is not known")
        self.val = val


class TooLarge(Exception):
    """More elements would be computed than the budget allows."""


class Folder:
    """Computes values of a normal form.

    Attributes:
        given: values that are not static, as arrays of the same rank; a dimension of size one stands for any.
    """

    def __init__(self, given: Mapping[Val, Any] | None = None, budget: int = BUDGET):
        self.given = {x: np.asarray(array) for x, array in (given or {}).items()}
        self.budget = budget
        self._memo: dict[tuple[Val, Window], np.ndarray] = {}

    def __call__(self, x: Val, window: Window | None = None) -> np.ndarray:
        """An array with what is in a window of a value; all of it by default.

        Floating numbers come in float32, whatever they are in the program. Dimensions over which the value is known to
        repeat may have size one.

        Raises:
            Unknown: it depends on a value that is neither static nor given.
            TooLarge: it goes beyond the budget.
        """
        window = tuple((0, size) for size in x.shape) if window is None else window
        key = (x, window)
        if key not in self._memo:
            self._memo[key] = self._compute(x, window)
        return self._memo[key]

    def full(self, x: Val, window: Window | None = None) -> np.ndarray:
        """The same, without repeated dimensions left out."""
        window = tuple((0, size) for size in x.shape) if window is None else window
        return np.broadcast_to(self(x, window), [stop - start for start, stop in window])

    def _compute(self, x: Val, window: Window) -> np.ndarray:
        if x in self.given:
            return _windowed(self.given[x], window)
        if x.constant is not None:
            return _plain(_windowed(np.asarray(x.constant), window))
        node = x.node
        if node is None:
            raise Unknown(x)
        function = _ELEMENTWISE.get(node.name)
        with np.errstate(all="ignore"):
            if function is not None:
                operands = [self(y, _narrowed(y, window)) for y in node.inputs]
                self._check(math.prod(np.broadcast_shapes(*(array.shape for array in operands))))
                return _plain(np.asarray(function(node, *operands)))
            rule = _RULES.get(node.name)
            if rule is not None:
                return rule(self, node, x, window)
        if not x.static or node.op.equation is None or node.op.name != node.name:
            raise Unknown(x)
        return _windowed(self._bound(node, x.index), window)

    def check_window(self, window: Window) -> None:
        """Raises `TooLarge` if a window has more elements than may be computed."""
        self._check(math.prod(stop - start for start, stop in window))

    def _check(self, size: int) -> None:
        if size > self.budget:
            raise TooLarge

    def _bound(self, node: Node, index: int) -> np.ndarray:
        """A static operation without a rule here, computed by JAX."""
        self._check(sum(math.prod(y.shape) for y in (*node.inputs, *node.outputs)))
        operands = [
            jnp.asarray(self.full(y), source.dtype) for y, source in zip(node.inputs, node.op.inputs, strict=True)
        ]
        with jax.ensure_compile_time_eval():
            outputs = _jax.bind(node.op.equation, operands)
        for output, array in zip(node.outputs, outputs, strict=True):
            full = tuple((0, size) for size in output.shape)
            self._memo[output, full] = _plain(np.asarray(array))
        return self._memo[node.outputs[index], tuple((0, size) for size in node.outputs[index].shape)]


def _plain(array: np.ndarray) -> np.ndarray:
    """Floating numbers of any format as float32."""
    if array.dtype == np.float32 or array.dtype.kind in "biu":
        return array
    return array if array.dtype.kind == "c" else array.astype(np.float32)


def _windowed(array: np.ndarray, window: Window) -> np.ndarray:
    return array[tuple(slice(None) if size == 1 else slice(*w) for size, w in zip(array.shape, window, strict=True))]


def _narrowed(x: Val, window: Window) -> Window:
    """The window of an operand: all of a dimension of size one, none of a scalar's."""
    if len(x.shape) != len(window):
        return ()
    return tuple((0, 1) if size == 1 else w for size, w in zip(x.shape, window, strict=True))


# -- Elementwise ------------------------------------------------------------------------------------------------------


def _divide(node: Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return a / b
    return np.where(b == 0, -1, np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))).astype(a.dtype)


def _convert(node: Node, x: np.ndarray) -> np.ndarray:
    dtype = jnp.dtype(node.attributes["new_dtype"])
    return x.astype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype)


def _select(node: Node, which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    if len(cases) == 2 and which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(which.astype(np.int32), cases)


def _logistic(node: Node, x: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * x) + 1.0)


def _special(name: str) -> Callable[..., np.ndarray]:
    """Functions that NumPy lacks, in JAX's own words."""

    def function(node: Node, *operands: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.asarray(getattr(jax.lax, name)(*map(jnp.asarray, operands)))

    return function


def _of(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    return lambda node, *operands: function(*operands)


def _add(node: Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + b


_ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "abs": _of(np.abs),
    "add": _add,
    "add_any": _add,
    "and": _of(np.bitwise_and),
    "ceil": _of(np.ceil),
    "clamp": lambda node, low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": _convert,
    "cos": _of(np.cos),
    "div": _divide,
    "eq": _of(np.equal),
    "erf": _special("erf"),
    "erfc": _special("erfc"),
    "erf_inv": _special("erf_inv"),
    "exp": _of(np.exp),
    "exp2": _of(np.exp2),
    "expm1": _of(np.expm1),
    "floor": _of(np.floor),
    "ge": _of(np.greater_equal),
    "gt": _of(np.greater),
    "integer_pow": lambda node, x: np.power(
        x.astype(np.float32) if node.attributes["y"] < 0 else x, node.attributes["y"]
    ),
    "is_finite": _of(np.isfinite),
    "le": _of(np.less_equal),
    "log": _of(np.log),
    "log1p": _of(np.log1p),
    "logistic": _logistic,
    "lt": _of(np.less),
    "max": _of(np.maximum),
    "min": _of(np.minimum),
    "mul": _of(np.multiply),
    "ne": _of(np.not_equal),
    "neg": _of(np.negative),
    "not": _of(np.invert),
    "or": _of(np.bitwise_or),
    "pow": lambda node, a, b: np.power(a, b),
    "rem": lambda node, a, b: np.fmod(a, b),
    "rsqrt": lambda node, x: 1 / np.sqrt(x),
    "select_n": _select,
    "shift_left": _of(np.left_shift),
    "shift_right_logical": _of(np.right_shift),
    "sign": _of(np.sign),
    "sin": _of(np.sin),
    "sqrt": _of(np.sqrt),
    "square": _of(np.square),
    "sub": _of(np.subtract),
    "tan": _of(np.tan),
    "tanh": _of(np.tanh),
    "xor": _of(np.bitwise_xor),
}


# -- Layout and reductions --------------------------------------------------------------------------------------------


def _broadcast(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    (operand, *_), placed = node.inputs, node.attributes["broadcast_dimensions"]
    inner = tuple((0, 1) if size == 1 else window[out] for size, out in zip(operand.shape, placed, strict=True))
    array = folder(operand, inner)
    order = sorted(range(len(placed)), key=lambda dim: placed[dim])
    array = np.transpose(array, order)
    shape = [1] * len(window)
    for dim in order:
        shape[placed[dim]] = array.shape[order.index(dim)]
    return array.reshape(shape)


def _transpose(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    permutation = node.attributes["permutation"]
    inner: list[tuple[int, int]] = [(0, 0)] * len(permutation)
    for out, dim in enumerate(permutation):
        inner[dim] = window[out]
    return np.transpose(folder(node.inputs[0], tuple(inner)), permutation)


def _reshape(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    (operand, *_), sizes = node.inputs, x.shape
    inner: list[tuple[int, int]] = [(0, size) for size in operand.shape]
    whole: list[bool] = []
    for before, after in reshape_groups(operand.shape, sizes):
        sources = [dim for dim in before if operand.shape[dim] != 1]
        targets = [dim for dim in after if sizes[dim] != 1]
        if len(sources) == len(targets) == 1:
            inner[sources[0]] = window[targets[0]]
        whole.append(len(sources) <= 1 and len(targets) <= 1)
    if all(whole):
        array = folder.full(operand, tuple(inner))
        return array.reshape([stop - start for start, stop in window])
    return _windowed(folder.full(operand).reshape(sizes), window)


def _squeeze(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    (operand,) = node.inputs
    gone = {dim % len(operand.shape) for dim in node.attributes["dimensions"]}
    rest = iter(window)
    inner = tuple((0, 1) if dim in gone else next(rest) for dim in range(len(operand.shape)))
    return np.squeeze(folder(operand, inner), tuple(gone))


def _slice(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    strides = node.attributes["strides"] or (1,) * len(window)
    starts = node.attributes["start_indices"]
    inner = tuple(
        (first + start * stride, first + (stop - 1) * stride + 1)
        for (start, stop), first, stride in zip(window, starts, strides, strict=True)
    )
    array = folder(node.inputs[0], inner)
    return array[
        tuple(slice(None) if n == 1 else slice(None, None, s) for n, s in zip(array.shape, strides, strict=True))
    ]


def _iota(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    dim = node.attributes["dimension"]
    dtype = np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else np.dtype(x.dtype)
    return np.arange(*window[dim]).astype(dtype).reshape([-1 if i == dim else 1 for i in range(len(window))])


def _concatenate(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    dim = node.attributes["dimension"]
    parts, position = [], 0
    for operand in node.inputs:
        size = operand.shape[dim]
        start, stop = max(window[dim][0] - position, 0), min(window[dim][1] - position, size)
        if start < stop:
            parts.append(folder.full(operand, (*window[:dim], (start, stop), *window[dim + 1 :])))
        position += size
    return np.concatenate(parts, dim)


def _stack(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    axis = node.attributes["axis"]
    inner = (*window[:axis], *window[axis + 1 :])
    return np.stack([folder.full(node.inputs[i], inner) for i in range(*window[axis])], axis)


def _unstack(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    axis = node.attributes["axis"]
    inner = (*window[:axis], (x.index, x.index + 1), *window[axis:])
    return np.squeeze(folder.full(node.inputs[0], inner), axis)


def _tile(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    (operand,) = node.inputs
    folder.check_window(window)
    array = folder.full(operand)
    indices = [np.arange(*w) % max(size, 1) for w, size in zip(window, operand.shape, strict=True)]
    return array[np.ix_(*indices)]


def _split(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    dim = node.attributes["axis"]
    first = sum(node.attributes["sizes"][: x.index])
    moved = (window[dim][0] + first, window[dim][1] + first)
    return folder(node.inputs[0], (*window[:dim], moved, *window[dim + 1 :]))


def _dynamic_slice(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    operand, *indices = node.inputs
    inner = []
    for (start, stop), index, size, whole in zip(window, indices, x.shape, operand.shape, strict=True):
        first = min(max(int(folder(index)), 0), whole - size) if size != whole else 0
        inner.append((start + first, stop + first))
    return folder(operand, tuple(inner))


def _gather(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    """Rows of a table: the only form of gather that is known here."""
    table, indices = node.inputs[:2]
    numbers, sizes = node.attributes["dimension_numbers"], node.attributes["slice_sizes"]
    indexed = numbers.start_index_map
    if numbers.operand_batching_dims or tuple(sorted(numbers.collapsed_slice_dims)) != tuple(sorted(indexed)):
        raise Unknown(x)
    kept = [dim for dim in range(len(table.shape)) if dim not in indexed]
    if any(sizes[dim] != table.shape[dim] for dim in kept):
        raise Unknown(x)
    batch = [out for out in range(len(window)) if out not in numbers.offset_dims]
    where = folder.full(indices, (*(window[out] for out in batch), (0, indices.shape[-1])))
    inner: list[tuple[int, int]] = [(0, size) for size in table.shape]
    for out, dim in zip(numbers.offset_dims, kept, strict=True):
        inner[dim] = window[out]
    array = np.transpose(folder.full(table, tuple(inner)), (*indexed, *kept))
    rows = array[tuple(np.clip(where[..., i], 0, table.shape[dim] - 1) for i, dim in enumerate(indexed))]
    return np.moveaxis(rows, range(len(batch), len(window)), numbers.offset_dims)


def _pad(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    operand, value = node.inputs
    config = node.attributes["padding_config"]
    if any(interior or low < 0 or high < 0 for low, high, interior in config):
        raise Unknown(x)
    array = np.pad(folder.full(operand), [(low, high) for low, high, _ in config], constant_values=folder(value).item())
    return _windowed(array, window)


def _reduction(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def rule(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
        axes = tuple(node.attributes["axes"])
        rest = iter(window)
        operand = node.inputs[0]
        inner = tuple((0, size) if dim in axes else next(rest) for dim, size in enumerate(operand.shape))
        folder.check_window(inner)
        return _plain(np.asarray(function(folder.full(operand, inner), axis=axes)))

    return rule


def _cumulative(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def rule(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
        axis, operand = node.attributes["axis"], node.inputs[0]
        inner = tuple((0, operand.shape[axis]) if dim == axis else w for dim, w in enumerate(window))
        folder.check_window(inner)
        array = folder.full(operand, inner)
        if node.attributes["reverse"]:
            array = np.flip(array, axis)
        array = function(array, axis=axis).astype(array.dtype)
        if node.attributes["reverse"]:
            array = np.flip(array, axis)
        return array[tuple(slice(*w) if dim == axis else slice(None) for dim, w in enumerate(window))]

    return rule


def _join_row(folder: Folder, node: Node, x: Val, window: Window) -> np.ndarray:
    """A row of a scanned array is known where all rows are the same."""
    array = folder.full(node.inputs[0], ((0, node.inputs[0].shape[0]), *window))
    if not (array == array[:1]).all():
        raise Unknown(x)
    return array[0]


_RULES: dict[str, Callable[[Folder, Node, Val, Window], np.ndarray]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cummax": _cumulative(np.maximum.accumulate),
    "cumsum": _cumulative(np.cumsum),
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _reduction(np.all),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_or": _reduction(np.any),
    "reduce_sum": _reduction(np.sum),
    "reshape": _reshape,
    "scan_slice": _join_row,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
