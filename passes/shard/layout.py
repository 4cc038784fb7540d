"""How values lie on a mesh: which axes of a graph are split, and what that makes of each dimension of each value."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from compax import _jax, ir
from compax.analysis.atoms import Atom, Factors
from compax.analysis.normal import Val
from compax.capture import Captured
from compax.composites.base import Attention
from compax.constraint import even_entries
from compax.encoding import Encoded
from compax.errors import EncodingError, ShardingError
from compax.meaning import Meaning
from compax.passes.shard.rules import AxisRule, entry, spec_of, spec_text
from compax.placement import Placement, axes_of, entries_of
from compax.rewrites.constraints import Laid
from compax.transform import SiteReport

RING = "fsdp_ring"
"""The second axis of the mesh for `fsdp` or `data`, where these are laid over a whole torus of three dimensions."""
BATCH, SEQUENCE, MODEL = "batch", "sequence", "model"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Atoms that are split together, where they stand in front of a dimension in this order.

    Attributes:
        atoms: the major one first.
        mesh_axes: what they are split over.
        padded: whether into unequal parts, if they do not divide.
    """

    atoms: Factors
    mesh_axes: tuple[str, ...]
    padded: bool = False


class Layout:
    """Splits of a graph's axes.

    Args:
        meaning: of the graph.
        sizes: of the mesh: by axis.
    """

    def __init__(self, meaning: Meaning, sizes: Mapping[str, int]):
        self.meaning = meaning
        self.engine = meaning.view.engine
        self.sizes = sizes
        self.taken: dict[Atom, Unit] = {}

    def expand(self, factors: Iterable[Atom]) -> Factors:
        """A dimension in its finest factors."""
        return self.engine.atoms.expand(factors)

    def split(self, factors: Iterable[Atom], mesh_axes: Sequence[str], *, padded: bool = False) -> None:
        """Splits some atoms, together, over mesh axes. What is split already stays as it is."""
        atoms = self.expand(factors)
        if atoms and mesh_axes and not any(atom in self.taken for atom in atoms):
            unit = Unit(atoms, tuple(mesh_axes), padded)
            self.taken |= dict.fromkeys(atoms, unit)

    def parts(self, mesh_axes: Iterable[str]) -> int:
        """Into how many parts mesh axes split."""
        return math.prod(self.sizes[name] for name in mesh_axes)

    def dimension(self, factors: Iterable[Atom]) -> tuple[str, ...] | None:
        """The mesh axes that split a dimension; none where it is whole; `None` where that is left to the compiler."""
        atoms = self.expand(factors)
        if not atoms:
            return ()
        unit = self.taken.get(atoms[0])
        if unit is not None and atoms[: len(unit.atoms)] == unit.atoms:
            size = math.prod(atom.size for atom in unit.atoms)
            return unit.mesh_axes if unit.padded or size % self.parts(unit.mesh_axes) == 0 else ()
        touched = any(atom in self.taken for atom in self.engine.atoms.leaves(atoms))
        return None if touched else ()

    def over(self, factors: Iterable[Atom]) -> tuple[str, ...]:
        """The mesh axes of the atoms of a dimension, also where how they split it is left to the compiler."""
        units = [self.taken.get(atom) for atom in self.expand(factors)]
        return tuple(name for unit in units if unit is not None for name in unit.mesh_axes)

    def entries(self, dims: Sequence[Factors]) -> list[tuple[str, ...] | None]:
        """The mesh axes of each dimension of a value; an axis splits the first dimension that it could."""
        used: set[str] = set()
        found: list[tuple[str, ...] | None] = []
        for factors in dims:
            names = self.dimension(factors)
            if names and used.intersection(names):
                names = ()
            used.update(names or ())
            found.append(names)
        return found

    def dims(self, x: Val) -> Sequence[Factors]:
        """The dimensions of a value."""
        return self.engine.dims[x]

    def parameters(self) -> dict[str, Sequence[Factors]]:
        """The dimensions of each parameter of the graph, by path."""
        inputs = self.meaning.view.normal.inputs
        return {x.input.path: self.dims(x) for x in inputs if x.input is not None and x.input.kind == "parameter"}

    def named(self, name: str) -> Factors:
        """The atom of the axis that is called so; nothing if there is none."""
        return next((self.expand((axis.atom,)) for axis in self.meaning.axes if axis.name == name), ())


@dataclasses.dataclass(frozen=True, eq=False)
class Laying:
    """How a program lies on a mesh.

    Attributes:
        placement: where arrays live.
        compute: how parameters lie where they are used.
        gathered: how those are stored that are put together for it.
        layouts: of the graphs.
        reports: on parameters.
        notes: what a person should know.
        even: of parameters that are used in unequal parts, how they would be without.
    """

    placement: Placement
    compute: Mapping[str, PartitionSpec]
    gathered: Mapping[str, PartitionSpec]
    layouts: Mapping[Any, Layout]
    reports: tuple[SiteReport, ...]
    notes: tuple[str, ...]
    even: Mapping[str, PartitionSpec]


def activation_spec(entries: Sequence[tuple[str, ...] | None]) -> PartitionSpec:
    """The spec of a value, with what is left to the compiler unconstrained."""
    return PartitionSpec(*(PartitionSpec.UNCONSTRAINED if names is None else entry(names) for names in entries))


def batches_of(meaning: Meaning) -> list[Factors]:
    """The axes of the batch: those that are called so, and those that attentions share; else what arguments lead with.

    There are several where a model has several inputs that are batches apart, such as images and texts.
    """
    engine = meaning.view.engine
    found = {engine.atoms.expand((axis.atom,)): None for axis in meaning.axes if word(axis.name) == BATCH}
    for attention in meaning.of_kind(Attention):
        if leading := engine.atoms.expand(attention.batch)[:1]:
            found[leading] = None
    if not found:
        arguments = [x for x in meaning.view.normal.inputs if x.input is not None and x.input.kind == "argument"]
        found = {engine.atoms.expand(engine.dims[x][0]): None for x in arguments if x.shape}
        found = found if len(found) == 1 else {}
    return [factors for factors in found if factors]


def word(name: str) -> str:
    """What kind of axis a name says: the last word, without a number."""
    return name.partition("#")[0].rpartition(".")[2]


def split_by_rules(layout: Layout, rules: Sequence[AxisRule], *, strict: bool = True) -> None:
    """Splits the axes that rules name.

    Raises:
        ShardingError: a rule names no axis, two rules disagree about one, or an axis does not divide.
    """
    axes = layout.meaning.axes
    decided: dict[Atom, AxisRule] = {}
    for rule in rules:
        chosen = [axis for axis in axes if rule.matches(axis.name)] or _heads(layout.meaning, rule)
        if not chosen and strict:
            kinds = dict.fromkeys(word(axis.name) for axis in axes)
            raise ShardingError(f"the rule '{rule.text}' names no axis; there are: {', '.join(kinds)}")
        for axis in chosen:
            before = decided.setdefault(axis.atom, rule)
            if before.mesh_axes != rule.mesh_axes:
                raise ShardingError(
                    f"the rules '{before.text}' and '{rule.text}' disagree about the axis {axis.name}: leave one out, "
                    "or name the axes more narrowly"
                )
            if rule.mesh_axes and axis.size % layout.parts(rule.mesh_axes):
                raise ShardingError(indivisible(layout, axis.name, axis.size, axis.parameters, rule.mesh_axes))
    for atom, rule in decided.items():
        layout.split((atom,), rule.mesh_axes)


def _heads(meaning: Meaning, rule: AxisRule) -> list[Any]:
    """The axes of groups, for a rule that speaks of heads where keys are shared by several."""
    if rule.axis != "heads":
        return []
    return [axis for axis in meaning.axes if word(axis.name) == "groups"]


def indivisible(layout: Layout, name: str, size: int, parameters: Iterable[str], mesh_axes: Sequence[str]) -> str:
    """Says that an axis cannot be split as asked, where it is, and what would work."""
    parts = layout.parts(mesh_axes)
    over = "+".join(mesh_axes)
    fits = [n for n in range(2, min(size, 4 * parts) + 1) if size % n == 0]
    where = ", ".join(list(parameters)[:3])
    return (
        f"the axis {name} of {size} does not divide over {over} ({parts}); it is in {where or 'no parameter'}. It "
        f"divides by {', '.join(map(str, fits)) or 'nothing near'}; pad it to {math.ceil(size / parts) * parts} in the "
        f"model, leave it whole with rules=[{word(name)}->-], or, if it is a hidden axis or a vocabulary, have the "
        "compiler pad it with pad=true"
    )


def even_spec(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """A spec without the splits of dimensions that do not divide."""
    return spec_of(even_entries(spec, shape, sizes))


def use_chain(
    stored: PartitionSpec, compute: PartitionSpec, even: PartitionSpec | None, *, gathered: bool
) -> tuple[Laid, ...]:
    """From how a parameter is stored to how it is used, step by step.

    Over the ring first, so that most moves but once; and what is used in unequal parts is put together and then cut.

    Args:
        stored: where it comes from, and where its gradient goes.
        compute: where it is used.
        even: the same without the splits that do not divide; none if all do.
        gathered: whether it is put together for its use.
    """
    whole = compute if even is None else even
    specs = [stored, whole] if stored != whole else [whole]
    if stored != whole and RING in axes_of(stored):
        specs.insert(1, spec_of([n for n in names if n != RING] for names in entries_of(stored, len(stored))))
    specs += [compute] if even is not None else []
    return tuple(Laid(after, before, gathered=gathered) for before, after in itertools.pairwise(specs))


def split_attention(layout: Layout, attention: Attention, mesh_axes: Sequence[str], params: Sequence[str]) -> str:
    """Splits the heads of an attention; where there are too few groups, those of the queries alone.

    Returns:
        What a person should know of it.

    Raises:
        ShardingError: they do not divide.
    """
    parts = layout.parts(mesh_axes)
    groups, repeats = layout.expand(attention.groups), layout.expand(attention.repeats)
    if any(atom in layout.taken for atom in (*groups, *repeats)):
        return ""
    count, each = (math.prod(atom.size for atom in atoms) for atoms in (groups, repeats))
    if count % parts == 0:
        layout.split(groups, mesh_axes)
        return ""
    if (count * each) % parts == 0 and parts % count == 0:
        layout.split((*groups, *repeats), mesh_axes)
        return f"{count} key-value head(s) for {parts} devices, so keys and values are on each of them"
    fits = [n for n in range(2, count * each + 1) if count % n == 0 or (n % count == 0 and count * each % n == 0)]
    raise ShardingError(
        f"the {count * each} heads of {attention.name} ({count} of keys and values) cannot be split over "
        f"{'+'.join(mesh_axes)} ({parts}); they are in {', '.join(list(params)[:3])}. {_any(fits)} would do, or leave "
        "them whole with rules=[heads->-]"
    )


def _any(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes)) or "No size"


def turns_of(layout: Layout) -> dict[str, set[int]]:
    """The dimensions of parameters of which each turn of a loop takes a part, by path."""
    layers = {axis.atom for axis in layout.meaning.axes if word(axis.name) == "layers"}
    return {p: {0} for p, dims in layout.parameters().items() if dims and layers.intersection(layout.expand(dims[0]))}


def windows_of(layout: Layout) -> dict[str, set[int]]:
    """The dimensions of parameters along which convolutions move their window, by path.

    They are never split: XLA may sum the gradient of such a kernel more often than once (jax 0.10.2, CPU).
    """
    atoms = {
        atom
        for node in layout.meaning.view.normal.nodes_named("conv_general_dilated")
        for d in node.attributes["dimension_numbers"].rhs_spec[2:]
        for atom in layout.expand(layout.dims(node.inputs[1])[d])
    }
    found = {
        path: {d for d, factors in enumerate(dims) if atoms.intersection(layout.expand(factors))}
        for path, dims in layout.parameters().items()
    }
    return {path: dims for path, dims in found.items() if dims}


def refuse_windows(specs: Mapping[str, PartitionSpec], windows: Mapping[str, set[int]]) -> None:
    """Raises `ShardingError` for a kernel that is split along the window of its convolution."""
    for path, dims in windows.items():
        if split := [d for d, names in enumerate(specs[path]) if names and d in dims]:
            raise ShardingError(
                f"{spec_text(specs[path])} splits dimension {split[0]} of {path}, along which a convolution moves its "
                "window, and XLA sums gradients wrongly then: split its input or output features instead"
            )


def encodable(value: Any, spec: PartitionSpec) -> tuple[PartitionSpec, str]:
    """The spec, or none and the reason where an encoding cannot be split so."""
    if isinstance(value, Encoded) and axes_of(spec):
        try:
            value.spec(spec)
        except EncodingError as error:
            return PartitionSpec(), f"{value.format} cannot be split by {spec_text(spec)}: {error}"
    return spec, ""


def fused_parameters(layout: Layout) -> dict[str, str]:
    """Parameters in which axes that are split lie side by side or behind others, and why they are whole."""
    return {
        path: "what is split lies side by side in one dimension of it: whole, and computed on each device"
        for path, dims in layout.parameters().items()
        if None in layout.entries(dims)
    }


def refuse_explicit(captured: Captured) -> None:
    """Raises `ShardingError` for a graph in which a model says by types how values lie."""
    for _, op in ir.walk(captured.graph):
        if any(map(_jax.says_how_it_lies, (value.aval for value in op.outputs))):
            raise ShardingError(
                f"'{captured.entry.name}' says by the type of '{op.name}' how a value lies (Explicit axes of a mesh), "
                "and shard decides that by itself: capture the model under a mesh whose axes are Auto, or under none, "
                "without out_sharding and reshard"
            )
