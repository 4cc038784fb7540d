"""Which values to keep: a mixed-integer program over the operations of layers.

Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization", 2019, arXiv:1910.02653, pose
rematerialization as an integer program over the whole schedule. Layers repeat, and each is computed again as a whole at
its place in the backward pass; so here the schedule is given, and what remains to be chosen is small.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Item:
    """The result of one operation of a layer.

    Attributes:
        sources: which items of the layer it is computed from.
        needed: whether the backward pass reads it.
        keepable: whether it may be kept.
        seconds: time to compute it again.
        kept_bytes: what it occupies if it is kept.
        coded_bytes: what it occupies if it is kept as int8; none where it may not be.
        coding_seconds: time to encode it for that, and to decode it.
        working_bytes: what it occupies while its layer is computed again; 0 where it is fused away.
    """

    sources: tuple[int, ...]
    needed: bool
    keepable: bool
    seconds: float
    kept_bytes: int
    working_bytes: int
    coded_bytes: int | None = None
    coding_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layers:
    """Equal layers.

    Attributes:
        items: their operations in order.
        times: how many layers.
    """

    items: tuple[Item, ...]
    times: int

    def exact(self) -> "Layers":
        """The same layers, of which nothing may be kept as int8."""
        return Layers(
            tuple(dataclasses.replace(item, coded_bytes=None, coding_seconds=0.0) for item in self.items), self.times
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is kept.

    Attributes:
        kept: for each kind of layers which items are kept.
        coded: for each kind of layers which items are kept as int8.
        seconds: time to compute the others again, and to encode and decode.
        coding_seconds: the part of it for encoding and decoding.
        kept_bytes: what is kept, in all layers.
        working_bytes: the most that computing a layer again occupies.
    """

    kept: tuple[frozenset[int], ...]
    coded: tuple[frozenset[int], ...]
    seconds: float
    coding_seconds: float
    kept_bytes: int
    working_bytes: int

    @property
    def approximates(self) -> bool:
        """Whether anything is kept as int8."""
        return any(self.coded)


def choose(layers: Sequence[Layers], budget_bytes: float, *, limit_seconds: float = 5.0) -> Choice | None:
    """What to keep so that recomputing the rest takes the least time.

    Keeping `s`, keeping as int8 `q` and computing again `r` of each item: what is needed is one of them, what is
    computed again needs its sources, and all that is kept plus the largest layer at work stays within the budget. Where
    `s` and `q` are whole numbers the least `r` are so too.

    Args:
        layers: the layers.
        budget_bytes: for what is kept, and for the layer that is computed again.
        limit_seconds: after which the best choice so far is taken.

    Returns:
        The choice, or none if even keeping nothing does not fit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    offsets = np.cumsum([0, *(len(each.items) for each in layers)])
    count = int(offsets[-1])
    if not count:
        none = tuple(frozenset[int]() for _ in layers)
        return Choice(none, none, 0.0, 0.0, 0, 0)
    size = 3 * count + 1  # what is kept, what is kept as int8, what is computed again, and the largest layer at work
    unit = max(1.0, float(max(item.kept_bytes for each in layers for item in each.items)))
    scale = max(1e-12, max(item.seconds for each in layers for item in each.items))
    cost = np.zeros(size)
    upper: Any = np.ones(size)
    upper[3 * count] = np.inf
    rows: list[tuple[dict[int, float], float]] = []
    total: dict[int, float] = {3 * count: -1.0}
    for first, each in zip(offsets, layers, strict=False):
        work: dict[int, float] = {3 * count: 1.0}
        for i, item in enumerate(each.items):
            kept, coded, again = (part * count + int(first) + i for part in range(3))
            cost[again] = each.times * item.seconds / scale
            cost[kept] = 1e-9 * each.times * item.kept_bytes / unit  # of equal choices the one that keeps less
            cost[coded] = each.times * item.coding_seconds / scale
            total[kept] = -each.times * item.kept_bytes / unit
            total[coded] = -each.times * (item.coded_bytes or 0) / unit
            upper[kept] = item.keepable
            upper[coded] = item.coded_bytes is not None
            if item.working_bytes:
                work[again] = work[coded] = -item.working_bytes / unit
            if item.needed:
                rows.append(({kept: 1.0, coded: 1.0, again: 1.0}, 1.0))
            rows += [
                ({**{part * count + int(first) + u: 1.0 for part in range(3)}, again: -1.0}, 0.0) for u in item.sources
            ]
        rows.append((work, 0.0))
    rows.append((total, -budget_bytes / unit))
    places = [(i, j, x) for i, (row, _) in enumerate(rows) for j, x in row.items()]
    matrix = coo_matrix(
        ([x for *_, x in places], ([i for i, *_ in places], [j for _, j, _ in places])), shape=(len(rows), size)
    )
    least: Any = np.array([least for _, least in rows])
    lower: Any = np.zeros(size)
    integral = np.zeros(size)
    integral[: 2 * count] = 1
    found = milp(
        cost,
        constraints=LinearConstraint(matrix.tocsr(), lb=least),
        bounds=Bounds(lower, upper),
        integrality=integral,
        options={"time_limit": limit_seconds, "mip_rel_gap": 1e-3},
    )
    if found.x is None:
        return None

    def chosen(part: int) -> list[frozenset[int]]:
        return [
            frozenset(i for i in range(len(each.items)) if found.x[part * count + int(first) + i] > 0.5)
            for first, each in zip(offsets, layers, strict=False)
        ]

    kept = chosen(0)
    return priced(layers, kept, [coded - exact for coded, exact in zip(chosen(1), kept, strict=True)])


def priced(
    layers: Sequence[Layers], kept: Sequence[frozenset[int]], coded: Sequence[frozenset[int]] | None = None
) -> Choice:
    """What a choice costs: what is computed again follows from what is kept."""
    coded = [frozenset[int]() for _ in kept] if coded is None else coded
    seconds, coding_seconds, kept_bytes, working = 0.0, 0.0, 0, 0
    for each, exact, as_int8 in zip(layers, kept, coded, strict=True):
        again: set[int] = set()
        for i in reversed(range(len(each.items))):
            item = each.items[i]
            if i not in exact | as_int8 and (item.needed or i in again):
                again.add(i)
                again.update(item.sources)
        again -= exact | as_int8
        coding_seconds += each.times * sum(each.items[i].coding_seconds for i in as_int8)
        seconds += each.times * sum(each.items[i].seconds for i in again)
        kept_bytes += each.times * sum(each.items[i].kept_bytes for i in exact)
        kept_bytes += each.times * sum(each.items[i].coded_bytes or 0 for i in as_int8)
        working = max(working, sum(each.items[i].working_bytes for i in again | as_int8))
    return Choice(tuple(kept), tuple(coded), seconds + coding_seconds, coding_seconds, kept_bytes, working)
