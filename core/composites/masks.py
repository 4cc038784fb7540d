"""What happens to a score between the product and the softmax, told by evaluating it.

The region is a function of the raw score and of the values that join in. Evaluated at score zero with padding arguments
"all there", it shows the static part of the mask and static biases; with patterns written into the arguments, how these
mask; at single scores, scale and softcap. Every claim is checked against what the region computes: a hypothesis that
does not reproduce it bit by bit is dropped, and the mask is then said to be unknown, with the reason.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compax.analysis.atoms import Factors
from compax.analysis.folding import Folder, TooLarge, Unknown
from compax.analysis.normal import Val, rearranged
from compax.composites.base import Mask
from compax.composites.view import View, parameter_only

_MASKED = -9e3
"""From here on down a score is as good as none; some models mask with -10000."""
_MOST_LEAVES = 8
_ENDLESS = int(np.iinfo(np.int32).max)
_POINTS = (1.0, -1.0, 2.0, 30.0, -300.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What the region does to a score that is seen.

    Attributes:
        scale: what it is multiplied with.
        softcap: `cap * tanh(scale * score / cap)`, or none.
        form: "dot", or "custom" where it is another function.
        bias: values that are added.
        alibi: whether what is added is linear in the key's position.
    """

    scale: float = 1.0
    softcap: float | None = None
    form: str = "dot"
    bias: tuple[Val, ...] = ()
    alibi: bool = False


def classify(
    view: View,
    product: Val,
    scores: Val,
    sides: Sequence[Val],
    key_dims: Sequence[int],
    queries: Factors,
) -> tuple[Mask, Score]:
    """The mask and the score function of an attention.

    Args:
        view: the graph.
        product: the raw scores.
        scores: what the softmax takes.
        sides: what joins in between.
        key_dims: the dimensions of `scores` that the softmax sums over.
        queries: the positions of queries.
    """
    rows = [
        dim
        for dim in range(len(scores.shape))
        if dim not in key_dims and (factors := view.factors(scores, dim)) and set(factors) <= set(queries)
    ]
    columns = [dim for dim in key_dims if scores.shape[dim] != 1] or list(key_dims[:1])
    if len(rows) > 1 or len(columns) > 1:
        return Mask("unknown", unknown="positions lie in several dimensions"), Score(form="custom")
    region = _Region(view, product, scores, sides, rows[0] if rows else None, columns[0])
    stand_in: dict[Val, Hashable] = {product: "product"}
    stand_in |= {side: f"bias {i}" for i, side in enumerate(sides) if parameter_only(side)}
    key = ("mask", view.key(scores, stand_in), region.row, region.column)
    if key not in view.memo:
        mask, score = region.classify()
        view.memo[key] = (
            mask,
            dataclasses.replace(score, bias=()),
            [i for i, x in enumerate(sides) if x in score.bias],
        )
    mask, score, biases = view.memo[key]
    return mask, dataclasses.replace(score, bias=tuple(sides[i] for i in biases))


class _Region:
    """The region between a product and its softmax."""

    def __init__(
        self, view: View, product: Val, scores: Val, sides: Sequence[Val], row: int | None, column: int
    ) -> None:
        self.view = view
        self.product = product
        self.scores = scores
        self.sides = sides
        self.row = row
        self.column = column
        self.given: dict[Val, np.ndarray] = {product: np.zeros([1] * len(product.shape), np.float32)}
        self.leaves: list[Val] = []
        self.bias: list[Val] = []
        self.computed: list[Val] = []

    def classify(self) -> tuple[Mask, Score]:
        try:
            base = self._settle()
            if base is None:
                return Mask("unknown", unknown="it depends on values that are computed"), Score(form="custom")
            mask = next(filter(None, map(self._by_position, self.leaves)), None)
            if mask is not None:
                base = Folder(self.given)(self.scores)
        except TooLarge:
            return Mask("unknown", unknown="too large to evaluate; declare it"), Score(form="custom")
        visible = self._visible(base)
        if visible is None:
            return Mask("unknown", unknown="it differs between heads or sequences"), self._score(base, None)
        mask = self._with_arguments(mask or _static_kind(visible), visible)
        return mask, self._score(base, visible)

    # -- evaluating ---------------------------------------------------------------------------------------------------

    def _settle(self) -> np.ndarray | None:
        """The region at score zero, once every value that it needs has been given one."""
        for _ in range(_MOST_LEAVES):
            try:
                return Folder(self.given)(self.scores)
            except Unknown as unknown:
                if not self._give(unknown.val):
                    return None
        return None

    def _give(self, leaf: Val) -> bool:
        """Gives a value that nobody knows: an argument is "all there", a computed side counts as zero."""
        kind = "" if leaf.input is None else leaf.input.kind
        if kind in ("argument", "state") and leaf.dtype is not None:
            self.leaves.append(leaf)
            whole = jnp.issubdtype(leaf.dtype, jnp.integer)
            self.given[leaf] = np.full([1] * len(leaf.shape), 0 if whole and not leaf.shape else 1, _dtype(leaf))
            return True
        for side in self.sides:
            if side not in self.given and any(x is leaf for x in self.view.upstream(side, lambda node: True)):
                if side.dtype == jnp.bool_:
                    self.computed.append(rearranged(side, ("broadcast_in_dim", "convert_element_type")))
                else:
                    self.bias.append(side)
                self.given[side] = np.full([1] * len(side.shape), side.dtype == jnp.bool_, _dtype(side))
                return True
        return False

    def _at(self, changes: Mapping[Val, np.ndarray]) -> np.ndarray | None:
        """Which keys are seen with other values of some leaves: bool[queries, keys]."""
        try:
            return self._visible(Folder({**self.given, **changes})(self.scores))
        except (Unknown, TooLarge):
            return None

    def _visible(self, array: np.ndarray) -> np.ndarray | None:
        """Which keys are seen; none if that differs between heads or sequences."""
        lowest = float(array.min()) if array.size else 0.0
        seen = ~(array <= (-1e8 if lowest <= -1e8 else _MASKED)) & ~np.isnan(array)
        kept = [self.column] if self.row is None else [self.row, self.column]
        rest = tuple(dim for dim in range(array.ndim) if dim not in kept)
        first = np.asarray(seen.all(axis=rest, keepdims=True))
        if not (first == seen).all():
            return None
        first = np.moveaxis(first, kept, range(-len(kept), 0)).reshape([first.shape[dim] for dim in kept])
        first = first if self.row is not None else first[None]
        return np.broadcast_to(first, (self.num_queries, self.num_keys))

    @property
    def num_queries(self) -> int:
        return 1 if self.row is None else self.scores.shape[self.row]

    @property
    def num_keys(self) -> int:
        return self.scores.shape[self.column]

    # -- masks --------------------------------------------------------------------------------------------------------

    def _by_position(self, leaf: Val) -> Mask | None:
        """The mask, if an argument says where queries stand: as a number for the first of them, or one for each."""
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            return None
        rank, rows, columns = len(leaf.shape), self.num_queries, self.num_keys
        spread = [dim for dim, size in enumerate(leaf.shape) if size == rows and rows > 1]
        for dim in spread or ([None] if rows == 1 or not rank else []):
            single = dim is None

            def given(positions: np.ndarray, dim: int | None = dim) -> np.ndarray:
                array = positions.astype(_dtype(leaf))
                return array[:1].reshape([1] * rank) if dim is None else array.reshape(_along(rank, {dim: rows}))

            room = max(columns - rows, 0)
            starts = dict.fromkeys((room - 1 if single else room, room // 2, room // 3, 0))
            places = [np.arange(rows) + max(start, 0) for start in starts]
            if not single:
                places.append(np.random.default_rng(0).permutation(columns)[:rows])
            seen = [self._at({leaf: given(p)}) for p in places]
            band = _common_band(places[: len(starts)], seen)
            if band is None or band == (-1, -1):
                continue
            if band == (0, 0):
                return None  # equality: segments, not positions
            for by_keys in (False, True) if rows == columns and not single else (False,):
                if all(
                    found is not None
                    and (found == in_band(p[:, None] - (p if by_keys else np.arange(columns)), band)).all()
                    for p, found in zip(places, seen, strict=True)
                ):
                    last = places[0]
                    self.given[leaf] = given(last)
                    kind = "causal" if band == (-1, 0) else "window"
                    return Mask(kind, window=band, position=leaf, offset=int(last[0]), by_keys=by_keys)
        return None

    def _with_arguments(self, mask: Mask, visible: np.ndarray) -> Mask:
        """A mask with what the arguments do to it."""
        padding, given, unknown = [], list(self.computed), []
        for leaf in self.leaves:
            if leaf is mask.position:
                continue
            role = self._role(leaf, visible)
            if role == "padding":
                padding.append(leaf)
            elif role == "given":
                given.append(leaf)
            elif role == "bias":
                self.bias.append(leaf)
            elif role is None:
                name = leaf.input.path if leaf.input is not None else leaf.name
                unknown.append(f"it depends on '{name}' in a way that has no name")
        return dataclasses.replace(
            mask,
            padding=tuple(padding),
            given=tuple(given),
            unknown="; ".join(unknown),
            kind="unknown" if unknown else mask.kind,
        )

    def _role(self, leaf: Val, visible: np.ndarray) -> str | None:
        """What an argument does to the mask, by what the region computes for patterns in it; none if it has no name."""
        if not self.view.leaves(leaf) <= self.view.leaves(self.scores):
            return None  # activations, say: what a mask makes of them cannot be told by patterns of zero and one
        one = np.asarray(self.given[leaf]).reshape(-1)[0]
        random = np.random.default_rng(0)
        rank, rows, columns = len(leaf.shape), self.num_queries, self.num_keys
        for first, second in _pairs(leaf.shape, rows, columns):
            pattern = random.integers(0, 2, (rows, columns))
            arranged = (pattern if first < second else pattern.T).astype(_dtype(leaf))
            seen = self._at({leaf: arranged.reshape(_along(rank, {first: rows, second: columns}))})
            if seen is not None and (seen == (visible & pattern.astype(bool))).all():
                return "given"
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                added = ((arranged - 1.0) * 1e9).astype(np.float32)
                seen = self._at({leaf: added.reshape(_along(rank, {first: rows, second: columns}))})
                if seen is not None and (seen == (visible & pattern.astype(bool))).all():
                    return "bias"
        for dim in [d for d, size in enumerate(leaf.shape) if size == columns]:
            pattern = random.integers(0, 2, columns)
            seen = self._at({leaf: (pattern * one).astype(_dtype(leaf)).reshape(_along(rank, {dim: columns}))})
            if seen is not None and (seen == (visible & pattern.astype(bool))).all():
                return "padding"
        unchanged = self._at({leaf: np.zeros([1] * rank, _dtype(leaf))})
        if unchanged is not None and (unchanged == visible).all() and self._ignored(leaf, visible):
            return "ignored"
        return None

    def _ignored(self, leaf: Val, visible: np.ndarray) -> bool:
        random = np.random.default_rng(1)
        for count in (1, 2, 3):
            seen = self._at({leaf: np.full([1] * len(leaf.shape), count, _dtype(leaf))})
            if seen is None or not (seen == visible).all():
                return False
        for dim, size in enumerate(leaf.shape):
            pattern = random.integers(0, 2, size).astype(_dtype(leaf)).reshape(_along(len(leaf.shape), {dim: size}))
            seen = self._at({leaf: pattern})
            if seen is None or not (seen == visible).all():
                return False
        return True

    # -- scores -------------------------------------------------------------------------------------------------------

    def _score(self, base: np.ndarray, visible: np.ndarray | None) -> Score:
        rank = len(self.scores.shape)
        index = [0] * rank
        if visible is not None:
            where = np.argwhere(visible)
            if not len(where):
                return Score(form="custom")
            i, j = where[len(where) // 2]
            index[self.column] = int(j)
            if self.row is not None:
                index[self.row] = int(i)
        elif not np.isfinite(base).any() or base.max() <= _MASKED:
            return Score(form="custom")
        else:
            position = np.unravel_index(int(np.argmax(base)), base.shape)
            index = [int(p) for p in position]
        window = tuple((p, p + 1) for p in index)

        def at(score: float) -> float:
            given = {**self.given, self.product: np.full([1] * len(self.product.shape), score, np.float32)}
            return float(Folder(given)(self.scores, window).reshape(()))

        scale, softcap, form = _function(at)
        static = self._static_bias(base, visible)
        bias = [*self.bias, *(x for x in static if x not in self.bias)]
        return Score(scale, softcap, form, tuple(bias), bool(static) and self._is_linear(base, visible))

    def _static_bias(self, base: np.ndarray, visible: np.ndarray | None) -> list[Val]:
        """The sides that add something to scores that are seen."""
        seen = base[base > _MASKED] if visible is None else _where(base, self._placed(visible))
        if not seen.size or float(np.abs(seen).max()) <= 1e-6:
            return []
        found = []
        for side in self.sides:
            whole = self.scores.shape[len(self.scores.shape) - len(side.shape) :]
            fits = all(size in (1, other) for size, other in zip(side.shape, whole, strict=True))
            if side in self.given or side.dtype == jnp.bool_ or not fits:
                continue
            values = Folder(self.given)(side)
            values = values[values > _MASKED]
            if values.size and float(np.abs(values).max()) > 1e-6 and side.shape:
                found.append(side)
        return found

    def _placed(self, visible: np.ndarray) -> np.ndarray:
        """A matrix of queries and keys, laid out like the scores."""
        shape = [1] * len(self.scores.shape)
        shape[self.column] = visible.shape[1]
        if self.row is None:
            return visible[:1].reshape(shape)
        shape[self.row] = visible.shape[0]
        return (visible if self.row < self.column else visible.T).reshape(shape)

    def _is_linear(self, base: np.ndarray, visible: np.ndarray | None) -> bool:
        """Whether what is added grows by the same amount from key to key, for each head."""
        if visible is None or base.shape[self.column] < 3:
            return False
        array = np.where(self._placed(visible), base, np.nan)
        array = np.moveaxis(array, self.column, -1)
        steps = np.diff(array, axis=-1)
        if self.row is not None:
            row = self.row - (self.column < self.row)
            steps = np.moveaxis(steps, row, -2).reshape(-1, steps.shape[row] * steps.shape[-1])
        steps = steps.reshape(-1, steps.shape[-1])
        if np.isnan(steps).all(axis=-1).any():
            return False
        spread = np.nanmax(steps, -1) - np.nanmin(steps, -1)
        return bool((spread <= 1e-4 * np.abs(np.nanmean(steps, -1)) + 1e-6).all() and np.nanmax(np.abs(steps)) > 0)


def _dtype(x: Val) -> np.dtype:
    return np.dtype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else np.dtype(x.dtype)


def _where(array: np.ndarray, test: np.ndarray) -> np.ndarray:
    """What passes a test; both are broadcast."""
    array, test = np.broadcast_arrays(array, test)
    return array[test]


def _along(rank: int, sizes: Mapping[int, int]) -> list[int]:
    return [sizes.get(dim, 1) for dim in range(rank)]


def _pairs(shape: Sequence[int], rows: int, columns: int) -> list[tuple[int, int]]:
    return [
        (i, j)
        for i, one in enumerate(shape)
        for j, other in enumerate(shape)
        if i != j and one == rows and other == columns
    ]


def _band(positions: np.ndarray, seen: np.ndarray) -> tuple[int, int] | None:
    """How far back and ahead of its position a query sees, -1 for without end, if that is the same for all queries."""
    columns = seen.shape[1]
    first, last = seen.argmax(1), columns - 1 - seen[:, ::-1].argmax(1)
    if not seen.any(1).all() or (seen.sum(1) != last - first + 1).any():
        return None
    ends = []
    for reach, clipped in ((positions - first, first == 0), (last - positions, last == columns - 1)):
        if clipped.all():
            ends.append(-1)
            continue
        (span, *others) = np.unique(reach[~clipped])
        if others or span < 0 or (reach[clipped] > span).any():
            return None
        ends.append(int(span))
    return ends[0], ends[1]


def _common_band(places: Sequence[np.ndarray], seen: Sequence[np.ndarray | None]) -> tuple[int, int] | None:
    """The band that fits queries at several places: an end that one of them shows is the end."""
    before, after = -1, -1
    for positions, visible in zip(places, seen, strict=False):
        band = None if visible is None else _band(positions, visible)
        if band is None:
            return None
        before, after = max(before, band[0]), max(after, band[1])
    return before, after


def in_band(distance: Any, band: tuple[int, int]) -> Any:
    """Whether keys are seen by how far back they are, where a query sees so far back and ahead; -1: without end."""
    before, after = (_ENDLESS if reach < 0 else reach for reach in band)
    return (distance <= before) & (distance >= -after)


def _static_kind(visible: np.ndarray) -> Mask:
    """The name of a matrix of what is seen, for the lengths it has."""
    if visible.all():
        return Mask("full")
    num_queries, num_keys = visible.shape
    for offset in dict.fromkeys((num_keys - num_queries, 0)):
        band = _band(np.arange(num_queries) + offset, visible)
        if band is not None and (band[1] >= 0 or offset == 0):
            return Mask("causal" if band == (-1, 0) else "window", window=band, offset=offset)
    for chunk in range(2, max(num_queries, num_keys)):
        rows, columns = np.arange(num_queries)[:, None], np.arange(num_keys)
        if (visible == ((rows // chunk == columns // chunk) & (rows >= columns))).all():
            return Mask("chunked", window=(-1, 0), chunk=chunk)
        if not visible[min(chunk, num_queries) - 1, 0] and num_queries > 1:
            break
    return Mask("other", allowed=visible)


def _function(at: Callable[[float], float]) -> tuple[float, float | None, str]:
    """Scale and softcap of a function of one score, and whether there is no more to it."""
    zero = at(0.0)
    scale = (at(1e-2) - zero) / 1e-2 if abs(zero) < 1.0 else at(1.0) - zero
    values = [at(point) - zero for point in _POINTS]
    wanted = [scale * point for point in _POINTS]
    if all(abs(value - w) <= 1e-3 * abs(w) + 1e-5 for w, value in zip(wanted, values, strict=True)):
        slope = values[2] / _POINTS[2] if abs(zero) < 1.0 else scale
        return float(f"{slope:.7g}"), None, "dot"
    cap = at(1e9) - zero
    if scale > 0 and cap > 0 and np.isfinite(cap):
        wanted = [cap * np.tanh(scale * point / cap) for point in _POINTS]
        if np.allclose(values, wanted, rtol=2e-3, atol=1e-4):
            return float(f"{scale:.5g}"), float(f"{cap:.7g}"), "dot"
    return scale, None, "custom"
