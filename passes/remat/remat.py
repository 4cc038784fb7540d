"""The pass `remat`: by a preset, by selectors, or under a memory budget."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax

from compax import compilers
from compax.analysis.training import returns_loss
from compax.capture import Captured
from compax.composites.base import Attention
from compax.contracts import ApproximateGradients, Contract, Exact
from compax.errors import PipelineError, SelectorError
from compax.ir import Graph, Path
from compax.meaning import Meaning
from compax.passes.remat.approximating import BOUND, refusals, residual_bytes
from compax.passes.remat.planning import Planner
from compax.passes.remat.searching import Meter, search, told
from compax.printing import bytes_text, graph_text, plural
from compax.program import Program
from compax.raising import Site, find_sites
from compax.rewrites.checkpoint import Mark, Region, checkpointed, find_regions, value_names, without_checkpoints
from compax.selectors import Selector
from compax.target import Target
from compax.text import Bytes
from compax.transform import Context, Pass, PassResult, SiteReport, register

__all__ = ["Remat"]


@register("remat")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat(Pass):
    """Computes values again in the backward pass instead of keeping them from the forward pass.

    A layer is what lies between two points of a residual stream at which it repeats itself, or the body of a scan.
    `at` selects layers. Each keeps what goes into it, and of its own values

    1. what a preset says: `keep=nothing`; `dots`, the results of products with parameters; `attention`, the results of
       attentions, so that these are not computed again; `everything`, which takes rematerialization out of a model;
    2. what `save`, `offload` and `compress` select: results of sites and composites, on the device, in host memory, and
       on the device as int8 with scales;
    3. under a `budget`: what makes the rest the quickest to compute again while the peak of a train step stays within
       it, by a mixed-integer program. The prediction is checked by compiling, corrected, and compiled again, three
       times at most. The step is that of an optimizer with `optimizer` float32 arrays for each parameter, on one
       device, donated. With `lossy=int8` values may be kept as int8, too: a half or a quarter of the bytes for the time
       to encode and decode.

    What is kept as int8 changes gradients, and nothing else: the forward pass goes on with the values themselves, and
    the backward pass reads what int8 stands for. Without `compress` and `lossy` nothing is approximated. Never int8 are
    values of which exponentials are taken, such as scores of attention, statistics, integers, and what kernels keep.

    Rematerialization that the layers have already is replaced. XLA for CPUs merges what is computed again with the
    first computation wherever both are outside of loops: there, layers that are not scanned keep everything.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174. The choice under a budget
    follows Jain et al., "Checkmate", 2019, arXiv:1910.02653, with the schedule given by the layers. Int8 follows
    Chakrabarti & Moseley, "Backprop with Approximate Activations for Memory-efficient Network Training", 2019,
    arXiv:1901.07988, and Chen et al., "ActNN", 2021, arXiv:2104.14129, but rounds to nearest, not at random.

    Attributes:
        keep: the preset.
        save: a selector of sites and composites whose results are kept.
        offload: a selector of sites and composites whose results are kept in host memory.
        compress: a selector of sites and composites whose results are kept as int8.
        lossy: what the search under a budget may do to values that it keeps.
        budget: bytes that one device has for the step.
        target: the chip, such as `v5e`; by default the one that the context says, or the machine's own.
        optimizer: float32 arrays that the optimizer keeps for each parameter.

    Raises:
        SelectorError: there are no layers, or none is selected; or `compress` selects only what cannot be int8.
        BudgetError: the budget cannot be met; says what the least is, and what holds it up.
        PipelineError: a budget is given beside presets or selectors, `lossy` without a budget; or a value is selected
            twice.
    """

    keep: Literal["nothing", "dots", "attention", "everything"] = "nothing"
    save: str | None = None
    offload: str | None = None
    compress: str | None = None
    lossy: Literal["none", "int8"] = "none"
    budget: Bytes | None = None
    target: str | None = None
    optimizer: int = 2

    phase: ClassVar[str] = "memory"
    contract: ClassVar[Any] = Exact()
    paper: ClassVar[str] = (
        "Chen et al. 2016, arXiv:1604.06174; Jain et al. 2019, arXiv:1910.02653; "
        "Chakrabarti & Moseley 2019, arXiv:1901.07988"
    )
    example: ClassVar[str] = "remat(budget=12GiB, target=v5e)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for selector in (self.save, self.offload, self.compress):
            if selector is not None:
                Selector.parse(selector)
        if self.budget is not None and (self.keep != "nothing" or self.save or self.offload or self.compress):
            raise PipelineError(
                "remat: a budget decides what is kept; leave out keep, save, offload and compress beside it, and allow "
                "it int8 by lossy=int8"
            )
        if self.budget is None and self.lossy != "none":
            raise PipelineError(
                "remat: lossy is a permission for the search under a budget; give a budget, or say what is kept as "
                "int8: compress=SELECTOR"
            )
        if self.keep == "everything" and self.compress:
            raise PipelineError(
                "remat: with keep=everything layers keep what is computed from values, exactly, and int8 would come on "
                "top of it; take keep=dots beside compress"
            )
        if self.optimizer < 0:
            raise PipelineError(f"remat: optimizer={self.optimizer}: an optimizer keeps 0 arrays or more")

    def promise(self) -> Contract:
        return ApproximateGradients(BOUND) if self.compress or self.lossy != "none" else self.contract

    def run(self, program: Program, context: Context) -> PassResult:
        views = [_View.of(captured) for captured in program.graphs.values()]
        layers = {region.name: region for view in views for region in view.regions}
        if not layers:
            raise SelectorError(
                f"the program '{program.name}' has no residual stream to which layers add, so there is nothing to "
                "checkpoint by layers; use jax.checkpoint in the model"
            )
        chosen = {region.name for region in self.select(layers.values(), what="layer")}
        views = [view.without_checkpoints(chosen) for view in views]
        notes: tuple[str, ...] = ()
        declined: tuple[SiteReport, ...] = ()
        if self.budget is not None:
            regions, marks, notes = self._planned(program, context, views, chosen)
        else:
            marks, declined = self._marked(views, chosen)
            regions = () if self.keep == "everything" else tuple(sorted(chosen))
        decisions = {"layers": tuple(sorted(chosen)), "regions": regions, "marks": marks}
        graphs = self.rewrite_graphs(program, decisions)
        changed = graphs is not program.graphs
        if "compress" in marks.values():
            notes += (self._approximated(program, decisions),)
        kept = _by_layer(views, chosen, marks)
        sites = tuple(
            SiteReport(
                name,
                "layer",
                "rewritten" if changed else "matched",
                _kept(kept.get(name, {})) if name in regions else "kept whole",
            )
            for name in layers
            if name in chosen
        )
        result = program.replace(graphs=graphs) if changed else program
        return PassResult(result, (*sites, *declined), decisions, notes)

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        result = self._rewritten(captured, decisions)
        return captured if graph_text(result.graph) == graph_text(captured.graph) else result

    def _rewritten(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        view = _View.of(captured).without_checkpoints(decisions["layers"])
        regions = [region for region in view.regions if region.name in decisions["regions"]]
        names = view.names(decisions["layers"])
        marks = {names[name]: mark for name, mark in decisions["marks"].items() if name in names}
        return checkpointed(view.captured, regions, marks)

    def _approximated(self, program: Program, decisions: Mapping[str, Any]) -> str:
        """What int8 saves, beside the same values kept as they are."""
        marks = decisions["marks"]
        exact = {**decisions, "marks": {name: "save" if marks[name] == "compress" else marks[name] for name in marks}}
        captured = next((each for each in program.graphs.values() if returns_loss(each)), None)
        captured = captured or next(iter(program.graphs.values()))
        before, after = (residual_bytes(program, self._rewritten(captured, each)) for each in (exact, decisions))
        if after >= before:
            raise SelectorError(
                f"remat: nothing is saved by keeping what '{self.compress}' selects as int8: the backward pass reads "
                "none of it"
            )
        return (
            f"gradients are approximated: {list(marks.values()).count('compress')} values are kept as int8, for the "
            f"backward pass {bytes_text(before)} -> {bytes_text(after)} predicted"
        )

    # -- By preset and selector ---------------------------------------------------------------------------------------

    def _marked(self, views: "Sequence[_View]", chosen: set[str]) -> tuple[dict[str, Mark], tuple[SiteReport, ...]]:
        """The values that presets and selectors keep, by name; and what cannot be int8."""
        marks: dict[str, Mark] = {}
        preset: dict[str, Mark] = {}
        declined: dict[str, SiteReport] = {}
        given: tuple[tuple[str | None, Mark], ...] = (
            (self.save, "save"),
            (self.offload, "offload"),
            (self.compress, "compress"),
        )
        unmatched = {text for text, _ in given if text is not None}
        for view in views:
            names = {path: name for name, path in view.names(chosen).items()}
            refused = view.refusals(chosen) if self.compress is not None else {}
            for name, kind, path in view.results():
                if path not in names:
                    continue
                value = names[path]
                for text, mark in given:
                    if text is None or not Selector.parse(text).matches(name, kind):
                        continue
                    unmatched.discard(text)
                    if mark == "compress" and path in refused:
                        declined[value] = SiteReport(name, kind, "skipped", f"not kept as int8: {refused[path]}")
                    elif mark == "compress" and marks.get(value, mark) != mark:
                        raise PipelineError(
                            f"remat: the result of '{name}' is selected by {marks[value]} and by compress; exclude it "
                            f"from one of them, as in compress='{self.compress}, !{name}'"
                        )
                    else:
                        marks[value] = mark
                by_preset = (self.keep == "dots" and kind in ("linear", "convolution")) or (
                    self.keep == "attention" and kind == "attention"
                )
                if by_preset:
                    preset[value] = "save"
        if unmatched:
            raise SelectorError(f"remat: '{sorted(unmatched)[0]}' selects no result of a site or composite in a layer")
        if self.compress is not None and "compress" not in marks.values():
            first = next(iter(declined.values()))
            raise SelectorError(
                f"remat: nothing that compress='{self.compress}' selects can be kept as int8, such as '{first.name}': "
                f"{first.reason.removeprefix('not kept as int8: ')}"
            )
        return {**preset, **marks}, tuple(declined.values())

    # -- Under a budget -----------------------------------------------------------------------------------------------

    def _planned(
        self, program: Program, context: Context, views: "Sequence[_View]", chosen: set[str]
    ) -> tuple[tuple[str, ...], dict[str, Mark], tuple[str, ...]]:
        assert self.budget is not None
        target = Target.parse(self.target) if self.target else context.target or Target.parse(_own_chip())
        view = _with_loss(views)
        regions = [region for region in view.regions if region.name in chosen]
        planner = Planner(program, view.captured, regions, target, self.optimizer, lossy=self.lossy == "int8")
        found = search(planner, self.budget, _meter(context, target), view.meaning)
        plan, notes = found.plan, (told(found, planner, self.budget),)
        names = {path: name for name, path in view.names(chosen).items()}
        marks: dict[str, Mark] = {names[path]: mark for path, mark in plan.marks.items()}
        return tuple(region.name for region in plan.regions), marks, notes


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """A graph with its meaning, its sites and its layers."""

    captured: Captured
    meaning: Meaning
    sites: tuple[Site, ...]
    regions: tuple[Region, ...]

    @classmethod
    def of(cls, captured: Captured) -> "_View":
        meaning = Meaning(captured)
        return cls(captured, meaning, find_sites(captured), tuple(find_regions(captured, meaning)))

    def without_checkpoints(self, layers: Collection[str]) -> "_View":
        """The same without the rematerialization that some layers have."""
        plain = without_checkpoints(self.captured, [region for region in self.regions if region.name in layers])
        return self if plain is self.captured else _View.of(plain)

    def names(self, layers: Collection[str]) -> dict[str, Path]:
        """The values in some layers by name."""
        regions = [region for region in self.regions if region.name in layers]
        return value_names(self.captured, self.meaning, self.sites, regions)

    def refusals(self, layers: Collection[str]) -> dict[Path, str]:
        """What in some layers cannot be kept as int8, and why."""
        return refusals(self.captured, [region for region in self.regions if region.name in layers])

    def results(self) -> list[tuple[str, str, Path]]:
        """What selectors choose among: names, kinds, and the operation that gives the result."""
        found = [(site.name, site.kind, site.path) for site in self.sites]
        for composite in self.meaning.composites:
            if composite.output.node is not None:
                node = composite.pv if isinstance(composite, Attention) else composite.output.node
                found.append((composite.name, composite.kind, _whole(self.captured.graph, node.path)))
        return found


def _by_layer(views: Sequence[_View], layers: Collection[str], marks: Mapping[str, Mark]) -> dict[str, dict[str, Mark]]:
    """The values that are kept, for each layer that keeps some."""
    found: dict[str, dict[str, Mark]] = {}
    for view in views:
        for name, path in view.names(layers).items():
            if name in marks:
                region = next(region for region in view.regions if region.holds(path))
                found.setdefault(region.name, {})[name] = marks[name]
    return found


def _kept(marks: Mapping[str, Mark]) -> str:
    """What a layer keeps, in words: values that are approximated by name."""
    coded = [name for name, mark in marks.items() if mark == "compress"]
    exact = len(marks) - len(coded)
    parts = [f"{plural(exact, 'value')} kept"] if exact else []
    parts += [f"kept as int8: {', '.join(coded)}"] if coded else []
    return "; ".join(parts) or "nothing kept"


def _whole(graph: Graph, path: Path) -> Path:
    """Where an operation stands, or the operation of ours that it is in the body of: a kernel is kept as a whole."""
    for depth, (position, index) in enumerate(path[:-1]):
        op = graph.ops[position]
        if op.equation is None:
            return (*path[:depth], (position, -1))
        graph = op.bodies[index]
    return path


def _with_loss(views: Sequence[_View]) -> _View:
    """The first graph that returns a loss; else the first one, which is then refused."""
    return next((view for view in views if returns_loss(view.captured)), views[0])


def _own_chip() -> str:
    if jax.default_backend() == "cpu":
        return "cpu"
    raise PipelineError(
        f"remat: say which chip the budget is for, as in target=h100: JAX names this one "
        f"'{jax.devices()[0].device_kind}', and rates are looked up by the name of the chip"
    )


def _meter(context: Context, target: Target) -> Meter:
    """What compiles a step and returns its peak."""

    def compiled(function: Callable[..., Any], shapes: tuple[Any, ...], donated: tuple[int, ...]) -> int:
        return compilers.peak_bytes(function, shapes, donated, target)

    return context.compiled_peak or compiled
