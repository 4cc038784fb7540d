"""Which indices of every dimension of a graph are kept, once those of some axes are chosen."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from compax.analysis.atoms import Atom, Factors, size_of
from compax.analysis.axes import Engine
from compax.analysis.normal import Normal, Val
from compax.capture import Captured
from compax.errors import RewriteError

Kept = np.ndarray | None
"""The indices of a dimension that are kept, in their new order, as they were counted before; `None`: all in place."""

Dims = tuple[Kept, ...]
"""What is kept of each dimension of a value."""

Decisions = Mapping[tuple[str, str, int], Sequence[int]]
"""For ("parameter" or "state", path, dimension) the indices that are kept, in their new order."""

_BORDERS = frozenset({"an input", "an output"})


def same(one: Kept, other: Kept) -> bool:
    """Whether the same indices are kept in the same order."""
    if one is None or other is None:
        return one is other
    return one is other or np.array_equal(one, other)


def spelled(kept: Kept, size: int) -> np.ndarray:
    """The indices one by one."""
    return np.arange(size) if kept is None else kept


def new_shape(shape: Sequence[int], dims: Dims) -> tuple[int, ...]:
    """The shape of a value of which `dims` are kept."""
    return tuple(size if kept is None else len(kept) for size, kept in zip(shape, dims, strict=True))


def signature(dims: Dims) -> tuple[bytes | None, ...]:
    """What two equal `dims` have in common, to be hashed."""
    return tuple(None if kept is None else kept.astype(np.int64).tobytes() for kept in dims)


class Narrowing:
    """A graph with its axes, and the indices that are kept of some of them.

    Attributes:
        captured: the graph.
        normal: its normal form.
        engine: its axes.
        keep: the atoms that change, with their kept indices.
    """

    def __init__(self, captured: Captured):
        self.captured = captured
        self.normal = Normal(captured)
        self.engine = Engine(self.normal)
        self.engine.run()
        self.keep: dict[Atom, np.ndarray] = {}
        self._known: dict[Factors, Kept] = {}

    # -- asking -------------------------------------------------------------------------------------------------------

    def kept(self, factors: Iterable[Atom]) -> Kept:
        """The indices of a dimension that are kept."""
        expanded = self.engine.atoms.expand(factors)
        if expanded not in self._known:
            self._known[expanded] = self._compose(expanded)
        return self._known[expanded]

    def _compose(self, factors: Factors) -> Kept:
        parts = [self._of_atom(atom) for atom in factors]
        if all(part is None for part in parts):
            return None
        result = np.zeros(1, np.int64)
        for atom, part in zip(factors, parts, strict=True):
            result = (result[:, None] * atom.size + spelled(part, atom.size)).reshape(-1)
        return result

    def _of_atom(self, atom: Atom) -> Kept:
        if not atom.segments:
            return self.keep.get(atom)
        parts, start, changed = [], 0, False
        for segment in atom.segments:
            size, part = size_of(segment), self.kept(segment)
            changed |= part is not None
            parts.append(spelled(part, size) + start)
            start += size
        return np.concatenate(parts) if changed else None

    def dims(self, x: Val) -> Dims:
        """What is kept of each dimension of a value."""
        return tuple(map(self.kept, self.engine.dims[x]))

    def alive(self, x: Val) -> bool:
        """Whether any output of the graph needs a value."""
        return x in self.engine.dims

    def decisions(self) -> dict[tuple[str, str, int], tuple[int, ...]]:
        """What is kept of parameters and state."""
        found: dict[tuple[str, str, int], tuple[int, ...]] = {}
        for x in self.normal.inputs:
            assert x.input is not None
            if x.input.kind == "argument":
                continue
            for dim, kept in enumerate(self.dims(x)):
                if kept is not None:
                    found[x.input.kind, x.input.path, dim] = tuple(map(int, kept))
        return found

    def complete(self, decisions: Decisions) -> bool:
        """Whether decisions say all that is kept of parameters and state here."""
        here = self.decisions()
        known = {(x.input.kind, x.input.path) for x in self.normal.inputs if x.input is not None}
        return here == {key: tuple(v) for key, v in decisions.items() if key[:2] in known}

    # -- choosing -----------------------------------------------------------------------------------------------------

    def leaf(self, number: int, paths: Iterable[str]) -> Atom | None:
        """The atom of some number that occurs in parameters or state."""
        wanted = set(paths)
        for x in self.normal.inputs:
            if x.input is None or x.input.kind == "argument" or (wanted and x.input.path not in wanted):
                continue
            for factors in self.engine.dims[x]:
                for atom in self.engine.atoms.leaves(factors):
                    if atom.number == number:
                        return atom
        return None

    def decide(self, decisions: Decisions) -> None:
        """Keeps indices of dimensions of parameters and state, as far as this graph has them.

        Raises:
            RewriteError: an axis cannot change, the graph takes a dimension apart so that the indices make no whole, or
                decisions contradict each other.
        """
        inputs = {(x.input.kind, x.input.path): x for x in self.normal.inputs if x.input is not None}
        for (kind, path, dim), indices in decisions.items():
            x = inputs.get((kind, path))
            if x is None:
                continue
            what = f"dimension {dim} of the {kind} '{path}'"
            if not 0 <= dim < len(x.shape):
                raise RewriteError(f"{what} does not exist: it has the shape {list(x.shape)}")
            self.assign(self.engine.dims[x][dim], check_indices(indices, x.shape[dim], what), what)

    def assign(self, factors: Iterable[Atom], indices: np.ndarray, what: str) -> None:
        """Keeps indices of one dimension.

        Raises:
            RewriteError: they are not indices of axes each by itself, or an axis is fixed or decided otherwise.
        """
        factors = self.engine.atoms.expand(factors)
        if not factors:
            return
        if len(factors) == 1 and not factors[0].segments:
            self.choose(factors[0], indices, what)
            return
        if len(factors) == 1:
            self._assign_segments(factors[0], indices, what)
            return
        sizes = tuple(atom.size for atom in factors)
        parts = [np.asarray(list(dict.fromkeys(x.tolist()))) for x in np.unravel_index(indices, sizes)]
        together = np.ravel_multi_index(np.meshgrid(*parts, indexing="ij"), sizes).reshape(-1)
        if not np.array_equal(together, indices):
            raise RewriteError(
                f"{what} is a product of {' x '.join(map(str, sizes))} in the graph '{self._name}', and the indices "
                "that are to be kept are not all combinations of indices of these; choose indices of each factor"
            )
        for atom, part in zip(factors, parts, strict=True):
            self.assign((atom,), part, what)

    def _assign_segments(self, atom: Atom, indices: np.ndarray, what: str) -> None:
        start, parts = 0, []
        for segment in atom.segments:
            size = size_of(segment)
            parts.append(indices[(indices >= start) & (indices < start + size)])
            if not len(parts[-1]):
                raise RewriteError(
                    f"{what} is several in a row in the graph '{self._name}', and nothing would be left of the indices "
                    f"{start} to {start + size - 1}; keep at least one of them"
                )
            self.assign(segment, parts[-1] - start, what)
            start += size
        if not np.array_equal(np.concatenate(parts), indices):
            raise RewriteError(
                f"{what} is several in a row in the graph '{self._name}', and the indices that are to be kept mix "
                f"them; put those of each of {[size_of(segment) for segment in atom.segments]} in a row together"
            )

    def choose(self, atom: Atom, indices: np.ndarray, what: str) -> None:
        """Keeps indices of an atom that is neither a product nor a sum.

        Raises:
            RewriteError: its indices must stay where they are, or it is decided otherwise.
        """
        if np.array_equal(indices, np.arange(atom.size)):
            if atom in self.keep:
                self._contradiction(what)
            return
        reasons = [reason for reason in atom.reasons if reason not in _BORDERS or self._outermost]
        if reasons or atom.table:
            raise RewriteError(
                f"the indices of {what} must stay where they are in the graph '{self._name}': "
                f"{'; '.join(reasons) or 'they belong to a table'}; keep all of them, in their order"
            )
        if atom in self.keep and not np.array_equal(self.keep[atom], indices):
            self._contradiction(what)
        self.keep[atom] = indices
        self._known.clear()

    def _contradiction(self, what: str) -> None:
        raise RewriteError(
            f"{what} is the same axis as another dimension in the graph '{self._name}', of which other indices are to "
            "be kept; choose the same for both"
        )

    @property
    def _name(self) -> str:
        return self.captured.entry.name

    @property
    def _outermost(self) -> bool:
        return any(tag.kind != "operand" for tag in self.captured.inputs)


def check_indices(indices: Sequence[int], size: int, what: str) -> np.ndarray:
    """Indices as an array.

    Raises:
        RewriteError: they are none, repeated, or out of range.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise RewriteError(f"what is kept of {what} has to be a list of at least one index, not {indices!r}")
    if array.min() < 0 or array.max() >= size or len(set(array.tolist())) != len(array):
        raise RewriteError(f"what is kept of {what} has to be different indices from 0 to {size - 1}, not {indices!r}")
    return array.astype(np.int64)
