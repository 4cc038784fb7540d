"""Names of the axes of a graph, from the composites, tables and loops that they belong to."""

import collections
import math
from collections.abc import Sequence

from compax.analysis.atoms import Atom, Factors
from compax.analysis.axes import Axis
from compax.composites.base import Attention, Composite, Experts, FeedForward
from compax.composites.view import View
from compax.raising import common_prefix
from compax.sources import Annotations

AXIS_KINDS = (
    "batch", "sequence", "model", "heads", "groups", "head_size", "hidden", "experts", "vocabulary", "layers"
)  # fmt: skip
"""Names of axes whose meaning is plain."""

_WORDS = frozenset(AXIS_KINDS) | {"repeats", "value_size", "fused", "rows"}


class AxisNames:
    """Names of atoms, from the composites that they belong to."""

    def __init__(self, view: View, composites: Sequence[Composite], annotations: Annotations):
        self.view = view
        self.composites = composites
        self.engine = view.engine
        self.names: dict[Atom, str] = {}
        self.taken: collections.Counter[str] = collections.Counter()
        self.parameters = self._parameters()
        self._from_composites()
        self._from_tables()
        self._from_loops()
        self.annotated = self._annotated(annotations)
        self._from_annotations()
        self._from_places()

    def _parameters(self) -> dict[Atom, dict[str, list[int]]]:
        """For each leaf the parameters and their dimensions in which it occurs."""
        result: dict[Atom, dict[str, list[int]]] = {}
        for x in self.view.normal.inputs:
            assert x.input is not None
            if x.input.kind == "parameter":
                for dim, factors in enumerate(self.engine.dims[x]):
                    for atom in self.engine.atoms.leaves(factors):
                        result.setdefault(atom, {}).setdefault(x.input.path, []).append(dim)
        return result

    def _from_composites(self) -> None:
        model: list[tuple[Factors, str]] = []
        for composite in self.composites:
            if isinstance(composite, FeedForward):
                self.put(composite.hidden, f"{composite.name}.hidden")
                model.append((self.view.contracted(self.view.linears[composite.up]), composite.name))
            elif isinstance(composite, Experts):
                self.put(composite.experts, f"{composite.name}.experts")
                self.put(composite.hidden, f"{composite.name}.hidden")
                model.append((self.view.contracted(self.view.linears[composite.router]), composite.name))
            elif isinstance(composite, Attention):
                grouped = bool(composite.repeats)
                self.put(composite.groups, f"{composite.name}.{'groups' if grouped else 'heads'}")
                self.put(composite.repeats, f"{composite.name}.{'repeats' if composite.groups else 'heads'}")
                self.put(composite.head_size, f"{composite.name}.head_size")
                self.put(composite.value_size, f"{composite.name}.value_size")
                for x in (composite.query, composite.key):
                    model += [(self.view.contracted(linear), composite.name) for linear in self.view.sources(x)]
        self.shared([(factors, "model", name) for factors, name in model])
        attentions = [composite for composite in self.composites if isinstance(composite, Attention)]
        self.shared([(attention.batch, "batch", attention.name) for attention in attentions])
        positions = [(a.queries, "sequence", a.name) for a in attentions]
        self.shared(positions + [(a.keys, "sequence", a.name) for a in attentions])

    def _from_tables(self) -> None:
        """Tables whose rows are picked by an argument: vocabularies, learned positions."""
        tables: list[tuple[int, Factors, str]] = []
        for node in self.view.normal.nodes_named("gather"):
            table = node.inputs[0]
            paths = self.view.parameters(table) if not table.static else ()
            if len(table.shape) >= 2 and paths:
                dims = node.attributes["dimension_numbers"].collapsed_slice_dims
                tables += [(table.shape[dim], self.view.factors(table, dim), paths[0]) for dim in dims]
        tables.sort(key=lambda item: -item[0])
        for position, (_, factors, path) in enumerate(tables):
            self.put(factors, "vocabulary" if position == 0 else f"{path.rpartition('.')[0] or path}.rows")
            if position == 0:
                self._from_heads(factors, path)

    def _from_heads(self, vocabulary: Factors, table: str) -> None:
        """Heads of their own: linear layers from what the table's rows lie along to as many results as it has rows."""
        size = math.prod(atom.size for atom in vocabulary)
        rows = {atom for atom, paths in self.parameters.items() if table in paths}
        for linear in self.view.linears.values():
            if not rows.intersection(self.view.contracted(linear)):
                continue
            for dim, length in enumerate(linear.weight.shape):
                factors = self.view.factors(linear.weight, dim)
                if length == size and not rows.intersection(factors):
                    path = self.view.parameters(linear.weight)[0]
                    self.put(factors, f"{path.rpartition('.')[0] or path}.vocabulary")

    def _from_loops(self) -> None:
        turns = self.engine.loops
        for factors in turns:
            owners = sorted({path for atom in factors for path in self.parameters.get(atom, ())})
            prefix = common_prefix([path.rpartition(".")[0] for path in owners]) if len(turns) > 1 else ""
            self.put(factors, f"{prefix}.layers" if prefix else "layers")

    def _annotated(self, annotations: Annotations) -> dict[Atom, dict[str, str]]:
        """For each atom the logical names that partitioning metadata gives it, with the first place of each.

        A name of dimensions of different sizes is no logical one: it is an axis of a mesh, which says nothing of what
        belongs together.
        """
        found: dict[Atom, dict[str, str]] = {}
        sizes: dict[str, set[int]] = {}
        for x in self.view.normal.inputs:
            assert x.input is not None
            names = annotations.get(x.input.path, ()) if x.input.kind == "parameter" else ()
            if len(names) != len(x.shape):
                continue
            for dim, name in enumerate(names):
                factors = self.view.factors(x, dim)
                if name is not None:
                    sizes.setdefault(name, set()).add(x.shape[dim])
                    if len(factors) == 1:
                        found.setdefault(factors[0], {}).setdefault(name, f"{x.input.path}.{dim}")
        logical = {name for name, each in sizes.items() if len(each) == 1}
        return {
            atom: {name: place for name, place in names.items() if name in logical} for atom, names in found.items()
        }

    def _from_annotations(self) -> None:
        """What the graph gives no better name is called as its author calls it."""
        found: list[tuple[Factors, str, str]] = []
        for atom, names in self.annotated.items():
            if atom not in self.names and names:
                name, place = next(iter(names.items()))
                found.append(((atom,), name, place.rpartition(".")[0].rpartition(".")[0]))
        self.shared(found)

    def _from_places(self) -> None:
        """What has no better name is called after the first parameter or argument that it occurs in."""
        for x in self.view.normal.inputs:
            assert x.input is not None
            for dim, factors in enumerate(self.engine.dims[x]):
                for atom in self.engine.atoms.expand(factors):
                    if atom not in self.names:
                        named = [self.names[part] for part in self.engine.atoms.leaves((atom,)) if part in self.names]
                        owner = common_prefix(named) if atom.segments else ""
                        self.put((atom,), f"{owner}.fused" if owner else f"{x.input.path}.{dim}")

    def shared(self, found: Sequence[tuple[Factors, str, str]]) -> None:
        """Names of axes that several composites share: plain if there is one, with a prefix if there are more."""
        owners: dict[Atom, list[str]] = {}
        words: dict[Atom, str] = {}
        for factors, word, owner in found:
            for atom in factors:
                if atom not in self.names:
                    owners.setdefault(atom, []).append(owner)
                    words[atom] = word
        kinds = collections.Counter(words.values())
        for atom, names in owners.items():
            prefix = common_prefix(names) if kinds[words[atom]] > 1 else ""
            self.put((atom,), f"{prefix}.{words[atom]}" if prefix else words[atom])

    def put(self, factors: Factors, name: str) -> None:
        """Names atoms; several factors of one dimension are numbered, so are parts of a sum."""
        factors = self.engine.atoms.expand(factors)
        for atom in factors:
            if atom in self.names or atom.table:
                continue
            self.taken[name] += 1
            own = name if self.taken[name] == 1 else f"{name}#{self.taken[name]}"
            self.names[atom] = own
            for segment in dict.fromkeys(atom.segments):
                for part in self.engine.atoms.expand(segment):
                    if part not in self.names and not part.table:
                        self.put((part,), f"{own}.part")

    def text(self, factors: Factors) -> str:
        parts = [self.names.get(atom, f"({atom.size})") for atom in self.engine.atoms.expand(factors)]
        return "*".join(parts) or "1"

    def words(self, factors: Factors) -> str:
        """One dimension by kinds of axes alone, parts of an axis as the axis; nothing where no factor has a kind."""
        found: dict[str, None] = {}
        for atom in self.engine.atoms.expand(factors):
            parts = [part for part in self.names.get(atom, "").partition("#")[0].split(".") if part != "part"]
            found[parts[-1] if parts and parts[-1] in _WORDS else str(atom.size)] = None
        return "" if all(map(str.isdigit, found)) else "*".join(found).replace("groups*repeats", "heads")

    def axes(self) -> list[Axis]:
        """The axes that parameters, state and arguments have."""
        inputs: dict[Atom, None] = {}
        for x in self.view.normal.inputs:
            for factors in self.engine.dims[x]:
                inputs.update(dict.fromkeys(self.engine.atoms.leaves(factors)))
        for atom in inputs:
            if atom not in self.names:
                self.put((atom,), "axis")
        result = []
        for atom in inputs:
            parameters = {path: tuple(dims) for path, dims in self.parameters.get(atom, {}).items()}
            result.append(
                Axis(
                    self.names[atom],
                    atom.size,
                    atom,
                    parameters,
                    tuple(atom.reasons),
                    tuple(self.annotated.get(atom, ())),
                )
            )
        return result
