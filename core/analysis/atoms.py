"""Atoms: what the dimensions of arrays are made of.

A dimension is an ordered list of *factors*, the major one first, and a factor is an atom. Two algebraic facts relate
atoms: a **product**, where a reshape shows that one atom is several (heads x head size), and a **sum**, where a
concatenation, split or partial slice shows that one atom is several in a row (queries, keys, values). Refining an atom
refines it wherever it occurs. Dimensions of size one have no factors.

Atoms of *tables* (arrays of constants, and what a broadcast repeats) never become one with others: a table that many
places share says nothing about what these places have in common.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence


class Tangle(Exception):
    """Two ways to take dimensions apart do not fit together; the message says which."""


class Atom:
    """One factor of a dimension. Compared by identity; after a union several objects stand for one, see `Atoms.find`.

    Attributes:
        size: number of indices.
        number: order of creation.
        table: whether it belongs to constants or repetitions only.
        parent: the atom that it became one with, if any.
        factors: the atoms it is the product of, or none.
        segments: the factor lists that it is the sum of, or none.
        reasons: why its indices must stay where they are.
    """

    __slots__ = ("factors", "number", "parent", "reasons", "segments", "size", "table")

    def __init__(self, size: int, number: int, table: bool):
        self.size = size
        self.number = number
        self.table = table
        self.parent: Atom | None = None
        self.factors: tuple[Atom, ...] = ()
        self.segments: tuple[Factors, ...] = ()
        self.reasons: dict[str, None] = {}

    def __repr__(self) -> str:
        return f"Atom({self.number}, size={self.size}{', table' if self.table else ''})"


Factors = tuple[Atom, ...]
"""One dimension: its atoms, the major one first; empty for size one."""


def size_of(factors: Iterable[Atom]) -> int:
    """The size of a dimension."""
    return math.prod(atom.size for atom in factors)


@dataclasses.dataclass
class Atoms:
    """Makes atoms, and takes note of what is found out about them."""

    count: int = 0
    sums: list[Atom] = dataclasses.field(default_factory=list)
    known: dict[tuple[Factors, ...], Atom] = dataclasses.field(default_factory=dict)

    def fresh(self, size: int, *, table: bool = False) -> Factors:
        """A dimension of which nothing is known yet."""
        if size == 1:
            return ()
        self.count += 1
        return (Atom(int(size), self.count, table),)

    @staticmethod
    def find(atom: Atom) -> Atom:
        """The one object that stands for an atom."""
        root = atom
        while root.parent is not None:
            root = root.parent
        while atom.parent is not None:
            atom.parent, atom = root, atom.parent
        return root

    def expand(self, factors: Iterable[Atom]) -> Factors:
        """A dimension in the finest factors that are known; sums stay whole."""
        result: list[Atom] = []
        for atom in factors:
            root = self.find(atom) if atom.parent is not None else atom
            if root.factors:
                result.extend(self.expand(root.factors))
            else:
                result.append(root)
        return tuple(result)

    def leaves(self, factors: Iterable[Atom]) -> list[Atom]:
        """The atoms that a dimension comes down to, through products and sums."""
        result: dict[Atom, None] = {}
        for atom in self.expand(factors):
            if atom.segments:
                for segment in atom.segments:
                    result.update(dict.fromkeys(self.leaves(segment)))
            else:
                result[atom] = None
        return list(result)

    # -- becoming one -------------------------------------------------------------------------------------------------

    def unify(self, left: Iterable[Atom], right: Iterable[Atom]) -> None:
        """Two dimensions are one and the same.

        Raises:
            Tangle: they are made of factors that do not line up.
        """
        a, b = list(self.expand(left)), list(self.expand(right))
        i = j = 0
        while i < len(a) and j < len(b):
            x, y = self.find(a[i]), self.find(b[j])
            if x.factors or y.factors:  # refined meanwhile, by a step before
                a[i : i + 1], b[j : j + 1] = self.expand((x,)), self.expand((y,))
            elif x.size == y.size:
                self._merge(x, y)
                i, j = i + 1, j + 1
            elif x.size > y.size and x.size % y.size == 0:
                a[i : i + 1] = self.split_product(x, x.size // y.size)
            elif y.size % x.size == 0:
                b[j : j + 1] = self.split_product(y, y.size // x.size)
            else:
                raise Tangle(f"a dimension is {_sizes(left)} here and {_sizes(right)} there")
        if i < len(a) or j < len(b):
            raise Tangle(f"dimensions of size {size_of(a)} and {size_of(b)} meet")

    def _merge(self, x: Atom, y: Atom) -> None:
        if x is y or x.table or y.table:
            return
        if y.number < x.number:
            x, y = y, x
        y.parent = x
        x.reasons.update(y.reasons)
        factors, segments = y.factors, y.segments
        if factors and x.segments:
            factors, segments, x.segments, x.factors = (), x.segments, (), factors
        if factors and x.factors:
            self.unify(x.factors, factors)
        elif factors:
            x.factors = factors
        elif segments and x.factors:
            self._distribute(x, segments)
        elif segments and x.segments:
            self._align(x, segments)
        elif segments:
            x.segments = segments
            self.sums.append(x)
        for reason in x.reasons:
            for part in (x.factors, *x.segments):
                self.freeze(part, reason)

    def _align(self, atom: Atom, segments: Sequence[Factors]) -> None:
        """An atom that is a sum is another sum too: cut both where either is cut."""
        mine, theirs = self._flat(atom.segments), self._flat(segments)
        if _shifted(mine, theirs):
            # Such as tokens beside those that follow them: to line these up would cut the axis into single indices.
            for factors in ((atom,), *mine, *theirs):
                self.freeze(factors, "set beside itself, shifted")
            atom.segments = ()
            return
        self._refine(mine, _cuts(map(size_of, theirs)))
        self._refine(theirs, _cuts(map(size_of, mine)))
        atom.segments = tuple(mine)
        for one, other in zip(mine, theirs, strict=True):
            self.unify(one, other)

    def _flat(self, segments: Iterable[Factors]) -> list[Factors]:
        """Segments in a row, those that are sums themselves taken apart."""
        result: list[Factors] = []
        for segment in segments:
            segment = self.expand(segment)
            if len(segment) == 1 and segment[0].segments:
                result += self._flat(segment[0].segments)
            else:
                result.append(segment)
        return result

    def _refine(self, segments: list[Factors], borders: Iterable[int]) -> None:
        """Cuts segments at borders."""
        for border in borders:
            position = 0
            for index, segment in enumerate(segments):
                size = size_of(segment)
                if position < border < position + size:
                    inside = border - position
                    segments[index : index + 1] = [self.cut(segment, 0, inside), self.cut(segment, inside, size)]
                    break
                position += size

    def _distribute(self, atom: Atom, segments: Sequence[Factors]) -> None:
        """An atom that is a product is a sum as well: its major factor is the sum."""
        inner = atom.factors[1:]
        size = size_of(inner)
        majors: list[Factors] = []
        for segment in segments:
            if size_of(segment) % size:
                raise Tangle(f"a dimension of {_sizes(atom.factors)} is cut after {size_of(segment)}")
            major, minor = self.partition(segment, (size_of(segment) // size, size))
            self.unify(minor, inner)
            majors.append(major)
        self.unify(atom.factors[:1], self.join(majors))

    # -- products -----------------------------------------------------------------------------------------------------

    def split_product(self, atom: Atom, inner: int) -> Factors:
        """An atom as a major factor and one of size `inner`."""
        outer = atom.size // inner
        if not atom.segments:
            atom.factors = (*self.fresh(outer, table=atom.table), *self.fresh(inner, table=atom.table))
            for factor in atom.factors:
                factor.reasons.update(atom.reasons)
            return atom.factors
        segments, majors, minors = atom.segments, [], []
        if any(size_of(segment) % inner for segment in segments):
            raise Tangle(f"a dimension in segments of {_sizes_of(segments)} is taken apart into {outer} x {inner}")
        for segment in segments:
            major, minor = self.partition(segment, (size_of(segment) // inner, inner))
            majors.append(major)
            minors.append(minor)
        for minor in minors[1:]:
            self.unify(minors[0], minor)
        atom.segments = ()
        atom.factors = (*self.join(majors), *minors[0])
        return atom.factors

    def partition(self, factors: Iterable[Atom], sizes: Sequence[int]) -> list[Factors]:
        """Factors in a row as dimensions of given sizes, refined where needed.

        Raises:
            Tangle: a factor lies across a border and cannot be split there.
        """
        rest = list(self.expand(factors))
        result: list[Factors] = []
        for size in sizes:
            taken: list[Atom] = []
            missing = size
            while missing > 1:
                if not rest:
                    raise Tangle(f"factors {_sizes(factors)} do not fill {tuple(sizes)}")
                atom = self.find(rest[0])
                if atom.factors:
                    rest[:1] = self.expand((atom,))
                elif missing % atom.size == 0:
                    taken.append(atom)
                    missing //= atom.size
                    del rest[:1]
                elif atom.size % missing == 0:
                    rest[:1] = self.split_product(atom, atom.size // missing)
                else:
                    raise Tangle(f"factors {_sizes(factors)} are regrouped into {tuple(sizes)}")
            result.append(tuple(taken))
        return result

    # -- sums ---------------------------------------------------------------------------------------------------------

    def join(self, segments: Sequence[Factors]) -> Factors:
        """A dimension that is several in a row."""
        segments = [self.expand(segment) for segment in segments]
        if len(segments) == 1:
            return segments[0]
        key = self._key(segments)
        if key is not None and key in self.known:
            return self.expand((self.known[key],))
        table = all(atom.table for segment in segments for atom in segment) and any(segments)
        (whole,) = self.fresh(sum(map(size_of, segments)), table=table)
        whole.segments = tuple(self._flat(segments))
        self.sums.append(whole)
        if key is not None:
            self.known[key] = whole
        return (whole,)

    def cut(self, factors: Factors, start: int, stop: int) -> Factors:
        """The indices from `start` to `stop` of a dimension.

        Raises:
            Tangle: factors lie across the cuts.
        """
        factors = self.expand(factors)
        size = size_of(factors)
        if (start, stop) == (0, size):
            return factors
        if len(factors) == 1:
            (atom,) = factors
            for border in (start, stop):
                self._cut(atom, border)
            if atom.factors:  # a product of segments, since it was a sum
                return self.cut(self.expand((atom,)), start, stop)
            position, chosen = 0, []
            for segment in atom.segments:
                if start <= position < stop:
                    chosen.append(segment)
                position += size_of(segment)
            return self.join(chosen)
        inner = size_of(factors[1:])
        if start % inner == 0 and stop % inner == 0:
            return (*self.cut(factors[:1], start // inner, stop // inner), *factors[1:])
        if start // inner == (stop - 1) // inner:
            index = start // inner
            self.cut(factors[:1], index, index + 1)
            return self.cut(factors[1:], start - index * inner, stop - index * inner)
        raise Tangle(f"a dimension of {_sizes(factors)} is cut from {start} to {stop}")

    def _cut(self, atom: Atom, border: int) -> None:
        """Makes an atom a sum with a border at an index."""
        if border in (0, atom.size):
            return
        if not atom.segments:
            table = atom.table
            atom.segments = (self.fresh(border, table=table), self.fresh(atom.size - border, table=table))
            for segment in atom.segments:
                for part in segment:
                    part.reasons.update(atom.reasons)
            self.sums.append(atom)
            return
        segments = self._flat(atom.segments)
        self._refine(segments, (border,))
        atom.segments = tuple(segments)

    def _key(self, segments: Sequence[Factors]) -> tuple[Factors, ...] | None:
        """What sums of the same parts have in common; nothing where a part has no identity of its own."""
        expanded = tuple(self._flat(segments))
        if any(not segment or any(atom.table for atom in segment) for segment in expanded):
            return None
        return expanded

    def close(self) -> list[str]:
        """Makes sums of the same parts one, until there are no more; returns what did not fit together."""
        problems: list[str] = []
        changed = True
        while changed:
            changed = False
            known: dict[tuple[Factors, ...], Atom] = {}
            for atom in dict.fromkeys(map(self.find, self.sums)):
                if not atom.segments or atom.table:
                    continue
                key = self._key(atom.segments)
                if key is None:
                    continue
                other = self.find(known.setdefault(key, atom))
                if other is not atom:
                    changed = True
                    try:
                        self._merge(other, atom)
                    except Tangle as tangle:
                        problems.append(str(tangle))
        return problems

    def freeze(self, factors: Iterable[Atom], reason: str) -> None:
        """Notes that the indices of a dimension must stay where they are."""
        for atom in self.expand(factors):
            atom.reasons[reason] = None
            for segment in atom.segments:
                self.freeze(segment, reason)


def _shifted(left: Sequence[Factors], right: Sequence[Factors]) -> bool:
    """Whether a part of one row is in another one at another place."""
    places: dict[Factors, int] = {}
    position = 0
    for segment in left:
        places.setdefault(segment, position)
        position += size_of(segment)
    position = 0
    for segment in right:
        if segment and places.get(segment, position) != position:
            return True
        position += size_of(segment)
    return False


def _cuts(sizes: Iterable[int]) -> list[int]:
    borders, position = [], 0
    for size in sizes:
        position += size
        borders.append(position)
    return borders[:-1]


def _sizes(factors: Iterable[Atom]) -> str:
    return " x ".join(str(atom.size) for atom in factors) or "1"


def _sizes_of(segments: Iterable[Factors]) -> str:
    return " + ".join(map(_sizes, segments))
