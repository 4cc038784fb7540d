"""Mixed precision: parameters as they are stored, computation in fewer bits."""

import collections
import dataclasses
import enum
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from compax import ir, selectors
from compax.capture import Captured
from compax.contracts import Contract, Lossy
from compax.infer import Kind, Place, Policy, Reinferred, reinfer
from compax.infer_rules import POLYMORPHIC, floating, retypable, why_not, widest
from compax.program import Program
from compax.raising import Site, find_sites
from compax.selectors import Selector
from compax.transform import Context, Pass, PassResult, SiteReport, register

__all__ = ["Cast"]

PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
"""What the arithmetic units of every accelerator do in 16 bits, accumulating in 32."""

_SUMS = "cumlogsumexp cumprod cumsum reduce_prod reduce_sum reduce_window_sum scatter-add scatter-mul scatter-sub"
SUMS = frozenset(_SUMS.split())
"""Sums of many terms: computed in float32. Maxima and minima are not among them: they are exact in any dtype."""

_SENSITIVE = """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf_inv exp exp2 expm1 igamma
    igammac lgamma log log1p pow rsqrt sin sinh sqrt tan
"""
SENSITIVE = frozenset(_SENSITIVE.split())
"""Functions that amplify rounding of their argument, or whose range 16 bits do not hold: computed in float32."""

_MOVING = """
    all_gather all_gather_invariant all_to_all concatenate dynamic_slice dynamic_update_slice gather pad ppermute rev
    scatter slice split stack tile transpose unstack
"""
MOVING = frozenset(_MOVING.split())
"""Operations that write their result to memory: they move 16 bits even where only float32 operations read it."""

BOUNDS: Mapping[str, float] = {"bfloat16": 0.05, "float16": 0.01, "float32": 0.05}
"""Relative output errors. The unit roundoff of bfloat16 is 2**-9, of float16 2**-11, and a model rounds many times:
SmolLM2-135M's logits differ by 0.015 in bfloat16."""

Compute = Literal["bfloat16", "float16", "float32"]


class Tag(enum.Enum):
    """What is known of a floating value."""

    WEAK = "made of parameters and literals alone: takes the dtype of what it meets"
    NARROW = "in the compute dtype"
    WIDE = "computed in float32 from what the network computes, such as a normalized activation"
    STATISTIC = "a float32 sum, or something that no parameter reaches: inputs, positions, running averages"
    CARRIED = "carried from turn to turn of a loop in float32: what it accumulates stays in it"
    KEPT = "a parameter that `keep` selects"


class MixedPrecision(Policy):
    """The policy of `Cast`.

    Args:
        compute: the dtype to compute in.
        kept: paths of products and lookups that stay in float32.
        narrow_streams: whether a float32 activation that meets one in the compute dtype is rounded, so that the stream
            of activations stays narrow; otherwise the wider dtype wins.
    """

    def __init__(self, compute: Any, kept: frozenset[ir.Path] = frozenset(), *, narrow_streams: bool = True):
        self.compute = jnp.dtype(compute)
        self.kept = kept
        self.narrow_streams = narrow_streams
        self.narrowed: set[ir.Value] = set()
        self._demanded: dict[int, tuple[ir.Graph, frozenset[ir.Value]]] = {}

    def source(self, dtype: Any) -> Hashable:
        return Tag.NARROW if self._is_narrow(dtype) else Tag.STATISTIC

    def literal(self, literal: ir.Literal) -> Hashable:
        return Tag.WEAK if fits(literal.value, self.compute) else Tag.STATISTIC

    def decide(self, op: ir.Op, operands: Sequence[Kind], place: Place) -> Kind:
        tags = {kind.tag for kind in operands}
        if op.name in PRODUCTS and _contracts(op) and tags != {Tag.STATISTIC}:
            if Tag.KEPT in tags or self._is_kept(place.path):
                return Kind(self._wide(operands), Tag.WIDE)
            self.narrowed.add(op.outputs[0])
            return Kind(self.compute, Tag.NARROW)
        if op.name == "gather" and tags <= {Tag.WEAK, Tag.KEPT}:
            if Tag.KEPT in tags or self._is_kept(place.path):
                return Kind(None, Tag.WIDE)
            # Rows are looked up as they are stored, and rounded where they are read: their gradients add up in float32.
            self.narrowed.add(op.outputs[0])
            return Kind(None, Tag.NARROW)
        recorded_narrow = all(self._is_narrow(op.inputs[index].dtype) for index in floating(op.inputs))
        if op.name == "convert_element_type":
            return self._conversion(op, operands, place, recorded_narrow)
        if recorded_narrow or op.name not in SUMS | SENSITIVE:
            return self._meet(operands, demanded=op.outputs[0] in self._demand(place))
        if op.name in SUMS and not op.name.startswith(("cum", "scatter")):
            return Kind(self._wide(operands), Tag.STATISTIC)
        strong = tags - {Tag.WEAK}
        if strong <= {Tag.STATISTIC, Tag.KEPT}:
            return Kind(self._wide(operands), Tag.STATISTIC)
        return Kind(self._wide(operands), Tag.CARRIED if Tag.CARRIED in strong else Tag.WIDE)

    def _conversion(self, op: ir.Op, operands: Sequence[Kind], place: Place, recorded_narrow: bool) -> Kind:
        """The model's own conversion: down to the compute dtype, up to float32, or to what is no float."""
        (kind,), source, target = operands, op.inputs[0].dtype, op.outputs[0].dtype
        if not retypable(target):
            return Kind(None if recorded_narrow else self._wide(operands), None)
        if source == target:
            return self._meet(operands, demanded=op.outputs[0] in self._demand(place))
        if kind.tag is Tag.KEPT:
            return Kind(None, Tag.KEPT)
        if self._is_narrow(target):
            return Kind(self.compute, Tag.NARROW)
        return Kind(widest(target, kind.dtype), Tag.WIDE if kind.tag is Tag.NARROW else kind.tag)

    def _meet(self, operands: Sequence[Kind], *, demanded: bool = False) -> Kind:
        """Operands of one elementwise operation, or values of which one becomes the result."""
        strong = {kind.tag for kind in operands} - {Tag.WEAK}
        if not strong:
            return Kind(None, Tag.WEAK)
        if strong == {Tag.KEPT}:
            return Kind(None, Tag.KEPT)
        if Tag.CARRIED in strong:
            return Kind(self._wide(operands), Tag.CARRIED)
        narrow = strong == {Tag.NARROW} or (strong == {Tag.NARROW, Tag.WIDE} and self.narrow_streams)
        if narrow and not demanded:
            return Kind(self.compute, Tag.NARROW)
        return Kind(self._wide(operands), Tag.STATISTIC if strong <= {Tag.STATISTIC, Tag.KEPT} else Tag.WIDE)

    def recorded(self, op: ir.Op, operands: Sequence[Kind]) -> Hashable:
        tags = {kind.tag for kind in operands}
        dtypes = [x.dtype for x in op.outputs if retypable(x.dtype)]
        if dtypes and all(map(self._is_narrow, dtypes)):
            return Tag.NARROW
        if Tag.CARRIED in tags:
            return Tag.CARRIED
        return Tag.WIDE if tags & {Tag.NARROW, Tag.WIDE} else Tag.STATISTIC

    def passed(self, kind: Kind) -> Kind:
        return Kind(self.compute, Tag.NARROW) if kind.tag is Tag.NARROW else kind

    def carried(self, kind: Kind) -> Kind:
        if kind.tag in (Tag.WEAK, Tag.KEPT):
            return kind
        return self.passed(kind) if kind.tag is Tag.NARROW else Kind(kind.dtype, Tag.CARRIED)

    def carried_on(self, before: Kind, after: Kind) -> Kind:
        if before.tag is Tag.CARRIED or before.tag == after.tag:
            return before
        rounded = {Tag.WEAK, Tag.WIDE} if self.narrow_streams else {Tag.WEAK}
        if before.tag is Tag.NARROW and after.tag in rounded:
            return before
        return Kind(self._wide((before,)), Tag.CARRIED)

    def joined(self, results: Sequence[Kind]) -> Kind:
        met = self._meet(results)
        return Kind(widest(*(kind.dtype for kind in results)), met.tag) if met.dtype is None else met

    def scope(self, path: ir.Path) -> Hashable:
        below = frozenset(kept[len(path) :] for kept in self.kept if kept[: len(path)] == path)
        return below, bool(path) and (*path[:-1], (path[-1][0], -1)) in self.kept

    def _is_kept(self, path: ir.Path) -> bool:
        """Whether a path is kept, or that of the operation of ours whose body it is in."""
        around = (*path[:-2], (path[-2][0], -1)) if len(path) > 1 else path
        return path in self.kept or around in self.kept

    def _is_narrow(self, dtype: Any) -> bool:
        return retypable(dtype) and jnp.dtype(dtype).itemsize <= self.compute.itemsize

    def _wide(self, operands: Sequence[Kind]) -> Any:
        wide = [kind.dtype for kind in operands if kind.tag is not Tag.NARROW and not self._is_narrow(kind.dtype)]
        return widest(jnp.float32, *wide)

    def _demand(self, place: Place) -> frozenset[ir.Value]:
        """Values that only operations in float32 read: what makes them computes in float32 as well."""
        graph = place.graph
        if id(graph) not in self._demanded:
            self._demanded[id(graph)] = (graph, demanded(graph, outermost=len(place.path) == 1))
        return self._demanded[id(graph)][1]


def demanded(graph: ir.Graph, *, outermost: bool) -> frozenset[ir.Value]:
    """Values of a graph that are read by float32 operations alone, through elementwise operations and reshapes."""
    readers: dict[ir.Value, list[bool]] = collections.defaultdict(list)
    for x in graph.outputs:
        if isinstance(x, ir.Value):
            readers[x].append(outermost)
    found: set[ir.Value] = set()
    for op in reversed(graph.ops):
        wanted = all(readers[value] and all(readers[value]) for value in op.outputs)
        if wanted:
            found.update(op.outputs)
        to_integer = op.name == "convert_element_type" and not retypable(op.outputs[0].dtype)
        follows = op.name in {"convert_element_type", *POLYMORPHIC} - PRODUCTS - MOVING
        for x in op.inputs:
            if isinstance(x, ir.Value):
                readers[x].append(to_integer or op.name in SUMS | SENSITIVE or (follows and wanted))
    return frozenset(found)


def fits(value: Any, dtype: Any) -> bool:
    """Whether a constant stays finite, and not zero, in a dtype."""
    if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating):
        return True
    exact = np.asarray(value, np.float64)
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray(value).astype(dtype).astype(np.float64)
    lost = (np.isfinite(exact) & ~np.isfinite(rounded)) | ((exact != 0) & (rounded == 0))
    return not bool(lost.any())


def _contracts(op: ir.Op) -> bool:
    """A dot without contraction is a multiplication."""
    return op.name != "dot_general" or bool(op.attributes["dimension_numbers"][0][0])


_selector = functools.cache(Selector.parse)


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter in the place of a site, so that selectors apply to it."""

    name: str
    kind: str = "parameter"


@register("cast")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast(Pass):
    """Computes in another floating dtype over parameters that stay as they are stored.

    Mixed precision as in Micikevicius et al., "Mixed Precision Training", 2017, arXiv 1710.03740, with bfloat16 as in
    Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019, arXiv 1905.12322: float32 master
    parameters, products in 16 bits, sums in float32. Parameters are converted where they are used, so their gradients
    are float32. Which operation computes in what:

    1. Products with or of activations (`PRODUCTS`): the compute dtype. Their backward products are then in it as well.
    2. Sums (`SUMS`) and sensitive functions (`SENSITIVE`): float32. That is every mean and variance, softmax,
       logsumexp, and the loss.
    3. Elementwise and layout operations follow what they get. A parameter or literal takes the dtype of what it meets,
       unless it would overflow or vanish in it. Statistics, and what no parameter reaches (rotary angles, inputs), make
       the result float32; a float32 activation that meets a narrow one is rounded, so the residual stream stays narrow.
       What only float32 operations read is computed in float32: one rounding fewer at no cost.
    4. A loop carries a value in the dtype in which it arrives; one that arrives in float32 accumulates in float32.
    5. Anything else, custom derivative rules above all, is evaluated in the dtypes that JAX recorded, and counted.

    Results, state and caches keep their dtypes; integers and random keys are untouched. float16 has a small range:
    scale the loss, as the first paper does. `compute=float32` takes a program that computes in 16 bits back up.

    Args:
        compute: "bfloat16", "float16" or "float32".
        keep: a selector of sites, by name, and of parameters, by path, that compute in float32.

    Raises:
        SelectorError: `at` matches no site, or `keep` neither a site nor a parameter.
    """

    compute: Compute = "bfloat16"
    keep: str | None = None

    phase: ClassVar[str] = "precision"
    paper: ClassVar[str] = "Micikevicius et al. 2017, arXiv 1710.03740"
    example: ClassVar[str] = "cast(compute=bfloat16, keep=head)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            Selector.parse(self.keep)

    def promise(self) -> Contract:
        return Lossy("relative output error", bound=BOUNDS[self.compute])

    def run(self, program: Program, context: Context) -> PassResult:
        found = {key: find_sites(captured) for key, captured in program.graphs.items()}
        sites = [site for each in found.values() for site in each]
        chosen = {site.name for site in self.select(sites, "product or lookup")}
        if self.keep is not None and self.strict:
            selectors.select(self.keep, [*sites, *map(_Parameter, program.params)], what="site or parameter")
        decisions = {"narrow_streams": all(site.name in chosen for site in sites)}
        graphs = dict(program.graphs)
        reports: dict[str, SiteReport] = {}
        fallbacks: collections.Counter[tuple[str, str]] = collections.Counter()
        for key, captured in program.graphs.items():
            policy, result = self._reinfer(captured, found[key], decisions)
            changed = result.graph is not captured.graph
            if changed:
                graphs[key] = dataclasses.replace(captured, graph=result.graph)
            fallbacks.update(result.fallbacks)
            for site in found[key]:
                if site.name in chosen:
                    report = self._report(site, policy, changed=changed)
                    known = reports.setdefault(site.name, report)
                    reports[site.name] = report if report.status == "rewritten" else known
        if not any(report.status == "rewritten" for report in reports.values()):
            return PassResult(program, tuple(reports.values()), decisions)
        notes = tuple(f"{count} {name} as recorded: {reason}" for (name, reason), count in sorted(fallbacks.items()))
        return PassResult(program.replace(graphs=graphs), tuple(reports.values()), decisions, notes)

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        _, result = self._reinfer(captured, find_sites(captured), decisions)
        return captured if result.graph is captured.graph else dataclasses.replace(captured, graph=result.graph)

    def _keeps(self, name: str, kind: str) -> bool:
        return self.keep is not None and _selector(self.keep).matches(name, kind)

    def _reinfer(
        self, captured: Captured, sites: Sequence[Site], decisions: Mapping[str, Any]
    ) -> tuple[MixedPrecision, Reinferred]:
        at = _selector(self.at)
        kept = frozenset(
            site.path for site in sites if not at.matches(site.name, site.kind) or self._keeps(site.name, site.kind)
        )
        policy = MixedPrecision(self.compute, kept, narrow_streams=decisions["narrow_streams"])
        tags = {
            value: Tag.KEPT if self._keeps(tag.path, "parameter") else Tag.WEAK
            for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True)
            if tag.kind == "parameter" and retypable(value.dtype)
        }
        return policy, reinfer(captured.graph, policy=policy, tags=tags)

    def _report(self, site: Site, policy: MixedPrecision, *, changed: bool) -> SiteReport:
        op = site.primitive
        dtypes = {op.inputs[index].dtype for index in floating(op.inputs)}
        if self._keeps(site.name, site.kind):
            return SiteReport.of(site, "skipped", "kept in float32")
        if site.opaque:
            return SiteReport.of(site, "skipped", site.opaque)
        if not dtypes or POLYMORPHIC[op.name](op, policy.compute) is None:
            return SiteReport.of(site, "skipped", why_not(op))
        if dtypes != {policy.compute} and op.outputs[0] not in policy.narrowed:
            return SiteReport.of(site, "skipped", "computes only with inputs and statistics, or with a kept parameter")
        if dtypes == {policy.compute} or not changed:
            return SiteReport.of(site, "matched", f"computes in {self.compute} already")
        return SiteReport.of(site, "rewritten")
