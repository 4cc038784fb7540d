"""The pass: every attention that is understood becomes one operation, computed by a fused kernel."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from compax.capture import Captured
from compax.composites.base import Attention
from compax.contracts import Contract, rounding_tolerance
from compax.errors import RewriteError
from compax.ir import Value
from compax.meaning import Declaration, Meaning
from compax.passes.flash.contract import Rounding
from compax.passes.flash.lower import OPERATION
from compax.passes.flash.plan import KERNELS, Options, Planned, plan, platform_of
from compax.passes.flash.spec import Kernel
from compax.program import Program
from compax.rewrites.outline import Region, outline
from compax.transform import Context, Pass, PassResult, SiteReport, register

Implementation = Literal["auto", "splash", "cudnn", "pallas", "plain"]


@register("flash")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Flash(Pass):
    """Computes attention by a fused kernel, which never holds the matrix of queries and keys.

    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, arXiv:2205.14135;
    Dao, "FlashAttention-2", 2023, arXiv:2307.08691; Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory",
    2021, arXiv:2112.05682. What a mask leaves out of whole blocks is not computed. Scores and softmax are in float32.

    1. `splash`, on TPU: full, causal, windowed and chunked masks, padding, a cap on scores, shared keys.
    2. `cudnn`, on NVIDIA GPUs: in 16 bits; full, causal and windows that look back, padding, biases, shared keys.
    3. `pallas`, on NVIDIA GPUs: a Triton kernel for full and causal masks.
    4. `plain`, on any platform, and what `auto` takes on a CPU: a loop over blocks in ordinary operations; any mask,
       also one that is an argument, and any bias, with its gradient.

    What the kernel of a platform cannot compute is left as the model has it, with the reason in the report. The
    backward pass computes scores anew; `jax.checkpoint` policies that keep the names `compax.attention.out` and
    `compax.attention.lse` spare a second run of the forward kernel (of `splash` both carry the first name; cuDNN and
    `pallas` name nothing). Kernels have no forward-mode derivative.

    Compilers do not take Pallas kernels apart. Where the program has a placement over a mesh, put the pass behind the
    one that made it: the kernel then runs on each device for its own sequences, and for its own heads where the
    projections of queries and keys are spread by heads.

    A query that sees no key gets the mean of all values, which is what a softmax over equally masked scores is.

    It is of the phase placement: what a kernel takes depends on the dtype that precision passes leave, sizes are those
    that structure passes leave, and what is rematerialized or sharded afterwards is the kernel.

    Args:
        implementation: the kernel; `auto` takes the best one for the platform of the target, or of JAX.
        block_q: how many queries are computed together; by default what suits the kernel.
        block_k: the same of keys.
        compute: the dtype that the program computes in, where that is coarser than the dtype of its results: what the
            contract allows.
        interpret: interpret Pallas kernels, operation by operation, on any platform: slow, for checking numbers.

    Raises:
        SelectorError: `at` selects no attention.
    """

    implementation: Implementation = "auto"
    block_q: int | None = None
    block_k: int | None = None
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    interpret: bool = False

    phase: ClassVar[str] = "placement"
    contract: ClassVar[Contract] = Rounding(rounding_tolerance("float32"))
    paper: ClassVar[str] = "Dao et al. 2022, arXiv:2205.14135"
    example: ClassVar[str] = "flash(at=blocks.*.attn)"

    def promise(self) -> Contract:
        return Rounding(rounding_tolerance("float32"), self.compute)

    def run(self, program: Program, context: Context) -> PassResult:
        platform = platform_of(context.target)
        kernels = list(KERNELS.get(platform, ("plain",)) if self.implementation == "auto" else (self.implementation,))
        given = [(key, captured, self._meaning(program, captured)) for key, captured in program.graphs.items()]
        every = {attention.name: attention for _, _, meaning in given for attention in meaning.of_kind(Attention)}
        chosen = sorted(attention.name for attention in self.select(every.values(), "attention"))
        declared = [dataclasses.asdict(declaration) for declaration in program.declared]
        decisions = {"sites": chosen, "kernels": kernels, "declared": declared, "placement": program.placement}
        reports: dict[str, SiteReport] = {}
        graphs = dict(program.graphs)
        for key, captured, meaning in given:
            graphs[key], found = self._rewritten(captured, meaning, decisions)
            for name, report in found.items():
                known = reports.get(name)
                if known is None or known.status != "rewritten":
                    reports[name] = report
        sites = tuple(reports.values())
        if not any(site.status == "rewritten" for site in sites):
            return PassResult(program, sites)
        return PassResult(program.replace(graphs=graphs), sites, decisions)

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        if not decisions:
            return captured
        declared = [Declaration(**each) for each in decisions["declared"]]
        return self._rewritten(captured, Meaning(captured, declared), decisions)[0]

    @staticmethod
    def _meaning(program: Program, captured: Captured) -> Meaning:
        name = captured.entry.name
        return program.meaning(name) if program.graph(name) is captured else Meaning(captured, program.declared)

    def _rewritten(
        self, captured: Captured, meaning: Meaning, decisions: Mapping[str, Any]
    ) -> tuple[Captured, dict[str, SiteReport]]:
        """A graph with chosen attentions replaced, and what was done with each."""
        kernels: tuple[Kernel, ...] = tuple(decisions["kernels"])
        options = Options(kernels, self.block_q, self.block_k, self.interpret, decisions["placement"])
        declared = [Declaration(**each) for each in decisions["declared"]]
        reports: dict[str, SiteReport] = {}
        while True:
            regions: dict[str, Region] = {}
            for attention in meaning.of_kind(Attention):
                name = attention.name
                if name not in decisions["sites"] or name in reports:
                    continue
                if is_fused(meaning, attention):
                    reports[name] = SiteReport.of(attention, "matched", "a kernel computes it already")
                    continue
                planned = plan(meaning.view, attention, options)
                region = planned if isinstance(planned, str) else _region(attention, planned)
                reason = region if isinstance(region, str) else _obstacle(captured, meaning, region)
                if reason:
                    reports[name] = SiteReport.of(attention, "skipped", reason)
                elif isinstance(region, Region):
                    regions[name] = region
            together = _compatible(meaning, regions)
            if not together:
                return captured, reports
            captured = outline(captured, meaning.view.normal, list(together.values()))
            for name, region in together.items():
                attention = next(x for x in meaning.of_kind(Attention) if x.name == name)
                reports[name] = SiteReport.of(attention, "rewritten", region.attributes["spec"].kernel)
            if len(together) == len(regions):
                return captured, reports
            meaning = Meaning(captured, declared)


def _region(attention: Attention, planned: Planned) -> Region:
    return Region(OPERATION, attention.output, planned.operands, {"spec": planned.spec}, planned.others)


def _obstacle(captured: Captured, meaning: Meaning, region: Region) -> str:
    """Why an attention cannot become one operation where it stands, or an empty string."""
    try:
        outline(captured, meaning.view.normal, [region])
    except RewriteError as error:
        return str(error)
    return ""


def is_fused(meaning: Meaning, attention: Attention) -> bool:
    """Whether an attention is in the body of an operation that a kernel computes."""
    path = attention.pv.path
    graph = meaning.view.normal.captured.graph
    for position, index in path:
        op = graph.ops[position]
        if op.name == OPERATION:
            return True
        if index < 0:
            return False
        graph = op.bodies[index]
    return False


def _compatible(meaning: Meaning, regions: Mapping[str, Region]) -> dict[str, Region]:
    """The regions that can be replaced together.

    Layers that share a body and differ in what they are, such as by a mask that is handed in, get bodies of their own
    one after another.
    """
    bodies: dict[Value, Any] = {}
    chosen: dict[str, Region] = {}
    for name, region in regions.items():
        spec = region.attributes["spec"]
        places = _places(meaning, region)
        if all(bodies.get(value, spec) == spec for value in places):
            bodies.update(dict.fromkeys(places, spec))
            chosen[name] = region
    return chosen


def _places(meaning: Meaning, region: Region) -> Sequence[Value]:
    """What a region's output is called in the bodies that have it."""

    def found() -> Iterator[Value]:
        for frame in meaning.view.normal.frames.values():
            for value, val in frame.items():
                if val is region.output:
                    yield value

    return tuple(found())
