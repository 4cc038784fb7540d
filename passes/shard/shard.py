"""The pass `shard`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from compax.analysis.atoms import Factors
from compax.capture import Captured
from compax.composites.base import Attention, Experts, FeedForward
from compax.contracts import Exact
from compax.errors import PipelineError, ShardingError
from compax.meaning import Meaning
from compax.passes.shard import choosing
from compax.passes.shard.activations import activation_constraints
from compax.passes.shard.candidates import Candidate
from compax.passes.shard.layout import (
    RING,
    Laying,
    Layout,
    batches_of,
    encodable,
    even_spec,
    fused_parameters,
    indivisible,
    refuse_explicit,
    refuse_windows,
    split_attention,
    split_by_rules,
    turns_of,
    use_chain,
    windows_of,
    word,
)
from compax.passes.shard.rules import (
    ARROW,
    AxisRule,
    ParameterPath,
    ParameterRule,
    parameter_specs,
    parse_spec,
    spec_of,
    spec_text,
)
from compax.placement import axes_of, entries_of
from compax.program import Program
from compax.rewrites.checkpoint import find_regions
from compax.rewrites.constraints import Constraints, constrained
from compax.target import Target
from compax.text import Bytes
from compax.transform import Context, Pass, PassResult, SiteReport, register

__all__ = ["Shard"]

AXES = ("dcn_data", "data", "fsdp", "expert", "tensor", "model")
"""Axes of the mesh, the slowest network first."""
_REST = -1
_AUTO = "auto"
_STAGES = 3
_GRADIENTS, _TORUS, _MATRIX = 2, 3, 2
_ROWS, _COLUMNS = 8, 128


@register("shard")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard(Pass):
    """Lays a program over a mesh of devices, by what its axes mean.

    The sizes of the mesh's axes say what is done:

    - `data`: the batch is split; each device has all parameters.
    - `fsdp`: the batch is split, and parameters are stored in parts, put together where they are used and forgotten
      after it; their gradients are scattered as they are summed.
    - `tensor` (or `model`, another name of it): the heads of attentions, the hidden axes of feed-forwards and experts,
      and the vocabulary are split.
    - `expert`: experts are split, and the batch too.
    - `dcn_data`: the batch is split over slices that a slower network connects.

    `zero` is the stage of ZeRO over `fsdp`, or over `data` where there is no `fsdp`: 1 splits the optimizer's state, 2
    gradients too, 3 parameters too. `sequence=tensor` splits positions over that axis wherever nothing else is: in
    residual streams and norms.

    What is split is found by the analysis of axes, on any model; nothing is asked of it. `rules` change it, by axis
    (`hidden->tensor`, `vocabulary->-`) or by parameter (`"blocks.**.up.kernel: -,tensor"`, `"re:.*/up/kernel:
    -,tensor"`); see `compax.passes.shard.rules`. `at` selects parameters that may be split at all.

    `auto` chooses the sizes, the stage and `sequence` by the least time of a train step within the budget, of the
    program as it is captured and with the passes that follow. Times are predicted (`compax.passes.shard.predicting`
    says how, and what overlaps); the best few are compiled for the target, if a compiler is at hand. Notes list the
    alternatives. History has the pass with what was chosen: nothing is chosen anew where it is replayed.

    The program's placement has the mesh and the specs; `program.place()` puts its arrays there.

    Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053; Korthikanti et al., "Reducing Activation Recomputation in
    Large Transformer Models", 2022, arXiv:2205.05198 (sequence); Rajbhandari et al., "ZeRO", 2019, arXiv:1910.02054;
    Xu et al., "GSPMD", 2021, arXiv:2105.04663.

    Attributes:
        data: size of the axis; -1 for the devices that are left, for one of the axes.
        fsdp: likewise.
        tensor: likewise.
        model: likewise.
        expert: likewise.
        dcn_data: likewise.
        sequence: the axis over which positions are split as well.
        zero: the stage; by default 3 where there is `fsdp`, otherwise 0.
        rules: in place of what is found.
        pad: split hidden axes and vocabularies that do not divide too: in unequal parts, which the compiler pads where
            they are used. They are stored without that split.
        auto: choose the sizes, the stage and `sequence` by predicted time.
        mesh: sizes that are given to `auto`, such as "fsdp=32,tensor=4".
        budget: bytes that one device has for a train step; by default its memory, less what predictions may be off.
        target: the slice, such as `v5p:4x4x8`; by default the one that the context says, or the machine's CPU.
        optimizer: float32 arrays that the optimizer keeps for each parameter.
        compiles: how many of the best are compiled for the target; none to go by predictions.

    Raises:
        ShardingError: sizes that do not fit the devices, an axis that does not divide, a rule that names no axis, two
            that disagree, or a program that has no batch to split.
        BudgetError: nothing that `auto` could choose fits; says what the least is, and what would help.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None
    model: int | None = None
    expert: int | None = None
    dcn_data: int | None = None
    sequence: str | None = None
    zero: int | None = None
    rules: tuple[str, ...] = ()
    pad: bool = False
    auto: bool = False
    mesh: str = _AUTO
    budget: Bytes | None = None
    target: str | None = None
    optimizer: int = 2
    compiles: int = 3

    phase: ClassVar[str] = "placement"
    contract: ClassVar[Any] = Exact()
    paper: ClassVar[str] = "Shoeybi et al. 2019, arXiv:1909.08053; Rajbhandari et al. 2019, arXiv:1910.02054"
    example: ClassVar[str] = "shard(fsdp=-1, tensor=4, sequence=tensor)"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self._given
        self._check_auto()
        if self.auto:
            return
        if not sizes:
            raise PipelineError(f"shard: give the size of an axis: {', '.join(AXES)}; as in shard(data=-1, tensor=4)")
        for name, size in sizes.items():
            if size < 1 and size != _REST:
                raise PipelineError(f"shard: {name}={size}: a size is 1 or more, or -1 for the devices that are left")
        if (rest := [name for name, size in sizes.items() if size == _REST]) and len(rest) > 1:
            raise PipelineError(f"shard: only one axis can be -1, {' and '.join(rest)} are")
        if "tensor" in sizes and "model" in sizes:
            raise PipelineError("shard: 'tensor' and 'model' are two names of one axis: give one of them")
        if self.sequence is not None and self.sequence not in (self._tensor or ()):
            raise PipelineError(
                f"shard: sequence={self.sequence}: positions are split over the axis that splits heads, "
                f"{'which is ' + self._tensor[0] if self._tensor else 'and there is none: give tensor=...'}"
            )
        if self.zero not in (None, *range(_STAGES + 1)):
            raise PipelineError(f"shard: zero={self.zero}: the stages are 0 to {_STAGES}")
        if self.zero and self._zero_axes == (RING,):
            raise PipelineError(f"shard: zero={self.zero} splits over 'fsdp' or 'data', and neither is given")
        if self.fsdp is not None and self.zero == 0:
            raise PipelineError("shard: zero=0 over 'fsdp' splits nothing but the batch: call the axis 'data'")

    def _check_auto(self) -> None:
        chosen = [name for name in (*AXES, "sequence", "zero") if getattr(self, name) is not None]
        if self.auto and chosen:
            given = 'shard(auto, mesh="fsdp=32,tensor=4")'
            raise PipelineError(f"shard: auto chooses '{chosen[0]}': leave it out, or give sizes as in {given}")
        for name in ("mesh", "budget", "target"):
            if not self.auto and getattr(self, name) not in (None, _AUTO):
                raise PipelineError(f"shard: '{name}' is for auto: shard(auto, {name}=...)")
        if self.optimizer < 0 or self.compiles < 0:
            raise PipelineError("shard: optimizer and compiles are 0 or more")

    @property
    def undecided(self) -> bool:
        return self.auto

    # -- The mesh -----------------------------------------------------------------------------------------------------

    @property
    def _given(self) -> dict[str, int]:
        return {name: size for name in AXES if (size := getattr(self, name)) is not None}

    @property
    def _tensor(self) -> tuple[str, ...]:
        return tuple(name for name in ("tensor", "model") if name in self._given)

    @property
    def _zero_axes(self) -> tuple[str, ...]:
        return (*tuple(name for name in ("fsdp", "data") if name in self._given)[:1], RING)

    @property
    def _stage(self) -> int:
        return self.zero if self.zero is not None else _STAGES if self.fsdp is not None else 0

    @property
    def _batch(self) -> tuple[str, ...]:
        return tuple(name for name in ("dcn_data", "data", "fsdp", "expert") if name in self._given)

    def _batch_axes(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        zero = self._zero_axes[0]
        return tuple(n for name in self._batch for n in ((name, RING) if name == zero and RING in sizes else (name,)))

    def mesh_axes(self, target: Target | None) -> dict[str, int] | None:
        return None if self.auto else self._mesh_axes(target)

    def _mesh_axes(self, target: Target | None) -> dict[str, int]:
        if target is None or target.chip.platform == "cpu":
            return self.sizes(None)
        sizes, zero = self.sizes(target.num_devices), self._zero_axes[0]
        if self._stage < _GRADIENTS or len(target.shape) < _TORUS or min(target.shape) < _TORUS:
            return sizes
        if sizes.get(zero, 1) * sizes.get("dcn_data", 1) != target.num_devices:
            return sizes
        # At once over all rings of a three-dimensional torus XLA gathers by summing and sums gradients whole: twice the
        # bytes (libtpu 0.0.42). Over two of them and then the third one it does not.
        ring, result = target.shape[-1], dict[str, int]()
        for name, size in sizes.items():
            result |= {name: size // ring, RING: ring} if name == zero else {name: size}
        return result

    def sizes(self, devices: int | None) -> dict[str, int]:
        """The sizes of the axes that are given, over so many devices; over those of this process's JAX if none."""
        sizes = self._given
        known = math.prod(size for size in sizes.values() if size != _REST)
        if devices is None:
            devices = jax.device_count() if _REST in sizes.values() else known
        if devices % known or (_REST not in sizes.values() and known != devices):
            raise ShardingError(
                f"{self} is of {known}{' times what is left of' if _REST in sizes.values() else ''} devices, and there "
                f"are {devices}: make the sizes multiply to {devices}, or give one axis as -1"
            )
        return {name: devices // known if size == _REST else size for name, size in sizes.items()}

    # -- Parameters ---------------------------------------------------------------------------------------------------

    def run(self, program: Program, context: Context) -> PassResult:
        if program.placement.mesh is not None:
            raise ShardingError(f"'{program.name}' is laid over a mesh already: shard a program once")
        for captured in program.graphs.values():
            refuse_explicit(captured)
        meanings = {key: Meaning(captured, program.declared) for key, captured in program.graphs.items()}
        if self.auto:
            return self._chosen(program, meanings, context)
        return self._run(program, meanings, self._mesh_axes(context.target))

    def _run(self, program: Program, meanings: Mapping[Any, Meaning], sizes: Mapping[str, int]) -> PassResult:
        laid = self._laid(program, meanings, sizes)
        decisions = {
            "mesh": tuple(sizes.items()),
            "compute": {path: spec_text(spec) for path, spec in laid.compute.items() if axes_of(spec)},
            "gathered": {path: spec_text(spec) for path, spec in laid.gathered.items()},
            "even": {path: spec_text(spec) for path, spec in laid.even.items()},
            "declared": program.declared,
        }
        graphs = {key: self._rewritten(program.graphs[key], meanings[key], decisions) for key in meanings}
        program = program.replace(graphs=graphs, placement=laid.placement)
        return PassResult(program, laid.reports, decisions, laid.notes)

    def _laid(self, program: Program, meanings: Mapping[Any, Meaning], sizes: Mapping[str, int]) -> Laying:
        """How the parameters of a program lie."""
        chosen = {path.name for path in self.select(map(ParameterPath, program.params), what="parameter")}
        notes: dict[str, list[str]] = {}
        compute: dict[str, PartitionSpec] = {}
        fused, turns, windows = dict[str, str](), dict[str, set[int]](), dict[str, set[int]]()
        layouts = dict[Any, Layout]()
        for key, meaning in meanings.items():
            layout = layouts[key] = self._layout(meaning, sizes, notes, strict=not compute)
            for path, spec in self._compute(layout).items():
                if path in chosen:
                    compute.setdefault(path, spec)
            fused |= fused_parameters(layout)
            turns, windows = turns | turns_of(layout), windows | windows_of(layout)
        texts = [rule for rule in self.rules if ARROW not in rule]
        ruled = {path for text in texts for path in ParameterRule.parse(text, sizes, "shard").matched(program.params)}
        compute = parameter_specs(program.params, texts, sizes, compute)
        self._check_use(program, compute)
        refuse_windows(compute, windows)
        # What does not divide is used in unequal parts, which the compiler pads, and stored without them.
        even = {path: even_spec(compute[path], value.shape, sizes) for path, value in program.params.items()}
        reports, stored = [], dict[str, PartitionSpec]()
        if self._batch:
            reports.append(SiteReport("batch", "axis", "rewritten", f"split over {'+'.join(self._batch_axes(sizes))}"))
        for path, value in program.params.items():
            spec, why = encodable(value, compute[path])
            compute[path], even[path] = spec, encodable(value, even[path])[0]
            split, reason = (
                self._stored(value, even[path], sizes, turns.get(path, set()) | windows.get(path, set()))
                if path in chosen and path not in ruled
                else (even[path], "")
            )
            stored[path] = split
            used = axes_of(split) or axes_of(spec)
            declined = why or (fused.get(path) or reason if not used else "")
            reports.append(
                SiteReport(path, "parameter", "rewritten" if used else "skipped" if declined else "matched",
                           declined or self._told(spec, split), path)
            )  # fmt: skip
        # What a rule says is how a parameter is stored; it is used without the axes of ZeRO.
        for path in ruled:
            entries = entries_of(compute[path], program.params[path].ndim)
            compute[path] = spec_of([n for n in names if n not in self._zero_axes] for names in entries)
        zero3 = self._stage >= _STAGES
        placement = program.placement.replace(
            mesh=_mesh(sizes),
            specs={path: stored[path] if zero3 else even[path] for path in stored if axes_of(stored[path])},
            optimizer={path: stored[path] for path in stored if self._stage and axes_of(stored[path])},
            gradients={path: stored[path] for path in stored if self._stage > 1 and axes_of(stored[path])},
            batch=self._batch_axes(sizes),
        )
        told = tuple(
            f"{', '.join(list(dict.fromkeys(names))[:2])}{', ...' if len(names) > 2 else ''}: {note}"
            for note, names in notes.items()
        )
        kept = stored if self._stage >= _GRADIENTS else even
        gathered = {path: kept[path] for path in kept if kept[path] != compute[path]}
        uneven = {path: spec for path, spec in even.items() if spec != compute[path]}
        return Laying(placement, compute, gathered, layouts, tuple(reports), told, uneven)

    def _chosen(self, program: Program, meanings: Mapping[Any, Meaning], context: Context) -> PassResult:
        """What `auto` chose, done."""
        found = choosing.choose(self.problem(program, meanings, context), self.compiles)
        settled = self._plain(found.best.candidate)
        result = settled._run(program, meanings, settled._mesh_axes(found.problem.target))
        return dataclasses.replace(result, notes=(*result.notes, *found.told()), settled=settled)

    def problem(self, program: Program, meanings: Mapping[Any, Meaning], context: Context) -> choosing.Problem:
        """What `auto` chooses for.

        Args:
            program: the program.
            meanings: of its graphs.
            context: what else is known.

        Raises:
            ShardingError: the program has no loss.
            PipelineError: the target is not known, or the mesh that is given is malformed.
        """
        target = choosing.target_of(self.target, context)

        def lay(candidate: Candidate) -> Laying:
            made = self._plain(candidate)
            return made._laid(program, meanings, made._mesh_axes(target))

        def apply(candidate: Candidate) -> Program:
            made = self._plain(candidate)
            return made._run(program, meanings, made._mesh_axes(target)).program

        key, given = choosing.loss_of(program), None if self.mesh == _AUTO else choosing.parse_mesh(self.mesh)
        return choosing.Problem(
            program, key, meanings[key], context, target, self.optimizer, self.budget, given, lay, apply
        )

    def _plain(self, candidate: Candidate) -> "Shard":
        """The same pass with the options of a candidate."""
        return Shard(at=self.at, strict=self.strict, rules=self.rules, pad=self.pad, **candidate.options())

    def _layout(
        self,
        meaning: Meaning,
        sizes: Mapping[str, int],
        notes: dict[str, list[str]] | None = None,
        *,
        strict: bool = False,
    ) -> Layout:
        """How the axes of a graph are split; `strict` refuses one without a batch or without what rules name."""
        layout = Layout(meaning, sizes)
        batches = batches_of(meaning)
        for batch in batches if self._batch else ():
            layout.split(batch, self._batch_axes(sizes))
        if self._batch and not batches and strict:
            raise ShardingError(
                "no axis of the program is known to be the batch: say which one it is, "
                "program.declare(axis=..., kind='batch'); program.axes() lists them"
            )
        rules = [AxisRule.parse(rule, sizes) for rule in self.rules if ARROW in rule]
        split_by_rules(layout, rules, strict=strict)
        whole = [rule for rule in rules if not rule.mesh_axes]

        def asked(name: str) -> bool:
            return not any(rule.matches(name) for rule in whole)

        def split(name: str, factors: Factors, parameters: Sequence[str], over: tuple[str, ...]) -> None:
            atoms = layout.expand(factors)
            size = math.prod(atom.size for atom in atoms)
            if any(atom in layout.taken for atom in atoms) or not asked(name):
                return
            padded = self.pad and len(atoms) == 1
            if size % layout.parts(over) and not padded:
                raise ShardingError(indivisible(layout, name, size, parameters, over))
            layout.split(atoms, over, padded=padded)

        for composite in meaning.composites:
            if isinstance(composite, Experts) and self.expert is not None:
                split(f"{composite.name}.experts", composite.experts, composite.parameters, ("expert",))
            if not self._tensor:
                continue
            if isinstance(composite, Attention) and asked("heads"):
                note = split_attention(layout, composite, self._tensor, composite.parameters)
                if note and notes is not None:
                    notes.setdefault(note, []).append(composite.name)
            elif isinstance(composite, (FeedForward, Experts)):
                split(f"{composite.name}.hidden", composite.hidden, composite.parameters, self._tensor)
        for axis in meaning.axes if self._tensor else ():
            if word(axis.name) == "vocabulary" and axis.parameters:
                split(axis.name, (axis.atom,), list(axis.parameters), self._tensor)
        return layout

    def _compute(self, layout: Layout) -> dict[str, PartitionSpec]:
        """How parameters lie where they are used."""
        batch = set(self._batch_axes(layout.sizes)) - {"expert"}
        return {
            path: spec_of([n for n in names or () if n not in batch] for names in layout.entries(dims))
            for path, dims in layout.parameters().items()
        }

    def _check_use(self, program: Program, compute: Mapping[str, PartitionSpec]) -> None:
        """Refuses axes of the mesh that split nothing."""
        used = {name for spec in compute.values() for name in axes_of(spec)}
        for axis, what in (
            *((name, "heads, hidden axes or vocabulary") for name in self._tensor),
            ("expert", "experts"),
        ):
            if axis in self._given and axis not in used and not any(axis in rule for rule in self.rules):
                raise ShardingError(
                    f"no parameter of '{program.name}' has {what} that {axis}={self._given[axis]} could split: "
                    "leave that axis out, or say by rules what it splits; program.axes() lists the axes"
                )

    def _stored(
        self, value: Any, compute: PartitionSpec, sizes: Mapping[str, int], whole: set[int]
    ) -> tuple[PartitionSpec, str]:
        """How a parameter, its gradient or its optimizer's state is stored under ZeRO, or why it is whole."""
        if not self._stage:
            return compute, ""
        dims = [d for d in range(value.ndim) if d not in whole]
        if len(dims) < _MATRIX:
            return compute, "a vector: whole on each device"
        over, entries = [n for n in self._zero_axes if n in sizes], entries_of(compute, value.ndim)
        parts = math.prod(sizes[name] for name in over)
        room = [value.shape[d] // math.prod(sizes[name] for name in entries[d]) for d in range(value.ndim)]

        def rank(d: int) -> tuple[Any, ...]:
            # Whole dimensions first; then those of which a part fills the tiles of a TPU (8 x 128); rather rows than
            # columns; then the largest.
            last = d == value.ndim - 1
            unfilled = (room[d] // parts) % (_COLUMNS if last else _ROWS) != 0
            return bool(entries[d]), unfilled, last, -room[d]

        for d in sorted(dims, key=rank):
            if room[d] % parts == 0:
                found = spec_of([*entries[:d], (*entries[d], *over), *entries[d + 1 :]])
                if encodable(value, found)[0] == found:
                    return found, ""
        return compute, f"no dimension of {list(value.shape)} divides by {parts}: whole on each device"

    def _told(self, compute: PartitionSpec, stored: PartitionSpec) -> str:
        if not axes_of(stored):
            return "whole on each device"
        if stored == compute:
            return spec_text(stored)
        what = {1: "optimizer", 2: "gradient and optimizer", 3: "stored"}[self._stage]
        return f"{spec_text(compute)} used, {spec_text(stored)} {what}"

    # -- Graphs -------------------------------------------------------------------------------------------------------

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        return self._rewritten(captured, Meaning(captured, decisions["declared"]), decisions)

    def _rewritten(self, captured: Captured, meaning: Meaning, decisions: Mapping[str, Any]) -> Captured:
        sizes = dict(decisions["mesh"])
        layout = self._layout(meaning, sizes)
        compute = {path: parse_spec(text) for path, text in decisions["compute"].items()}
        gathered = {path: parse_spec(text) for path, text in decisions["gathered"].items()}
        even = {path: parse_spec(text) for path, text in decisions.get("even", {}).items()}
        kept = self._stage >= _STAGES
        parameters = {
            path: use_chain(spec, compute.get(path, PartitionSpec()), even.get(path), gathered=kept)
            for path, spec in gathered.items()
        }
        results, operands = activation_constraints(captured, layout, self.sequence)
        layers = [(region.start, region.stop) for region in find_regions(captured, meaning) if not region.holder]
        return constrained(captured, Constraints(_mesh(sizes), parameters, results, operands, tuple(layers)))


def _mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
