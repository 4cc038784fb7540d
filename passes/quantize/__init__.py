"""Quantization: parameters in fewer bits, and products in integers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from compax import ir
from compax.capture import Captured
from compax.contracts import Lossy
from compax.encoding import Encoded
from compax.errors import PipelineError
from compax.passes.quantize.encoding import QuantizedArray, SimulatedArray, quantize_array
from compax.passes.quantize.rules import QUANTIZED
from compax.program import Program
from compax.raising import Site, Use, find_sites
from compax.transform import Context, Pass, PassResult, SiteReport, Status, register

__all__ = ["Quantize", "QuantizedArray", "SimulatedArray"]

KINDS = ("linear", "embedding", "convolution")


@register("quantize")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Stores parameters as int8, and computes products in int8 where activations are quantized too.

    1. `weights=int8`: each weight of a linear, an embedding or a convolution becomes integers with one float32 scale
       for each output channel (each row of an embedding); stacked layers and experts keep their own. Products read the
       integers and apply the scales to their output.
    2. `activations=int8` besides: the input of each linear is rounded when the program runs, with one scale for each
       row (of a convolution: each example), and the product is int8 x int8 into int32 (Dettmers et al., "LLM.int8()",
       2022, arXiv 2208.07339, without its outliers).
    3. `train=true`: quantization-aware training. Parameters stay float masters that are seen through int8; gradients
       pass straight through (Jacob et al., 2017, arXiv 1712.05877; Bengio et al., 2013, arXiv 1308.3432). Running the
       pass again with `train=false` stores what was trained.

    Rounding is to nearest, halves to even, symmetric within -127..127; the scale is the largest magnitude over 127.

    Args:
        weights: format of the parameters: "int8".
        activations: format of the inputs of products: "int8", or none.
        train: simulate, for training.

    Raises:
        SelectorError: `at` matches no linear, embedding or convolution.
        PipelineError: a format that there is not.
    """

    weights: str = "int8"
    activations: str | None = None
    train: bool = False

    phase: ClassVar[str] = "precision"
    contract: ClassVar[Any] = Lossy("relative output error", bound=0.25)
    paper: ClassVar[str] = "Jacob et al. 2017, arXiv 1712.05877"
    example: ClassVar[str] = "quantize(weights=int8, activations=int8)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, known in (
            ("weights", self.weights, ("int8",)),
            ("activations", self.activations, (None, "int8")),
        ):
            if value not in known:
                names = ", ".join(str(k).lower() for k in known)
                raise PipelineError(f"quantize has no {option}={value}; there is: {names}")

    def run(self, program: Program, context: Context) -> PassResult:
        sites = [site for captured in program.graphs.values() for site in find_sites(captured) if site.kind in KINDS]
        chosen = {site.name for site in self.select(sites)}
        by_parameter = uses_by_parameter(sites)
        params = dict(program.params)
        selected = {path for path, uses in by_parameter.items() if any(site.name in chosen for site, _ in uses)}
        refused: dict[str, str] = {}
        for path in selected:
            outside = [site.name for site, _ in by_parameter[path] if site.name not in chosen]
            if reason := self._refuse(params[path], outside, path in program.frozen):
                refused[path] = reason
        _refuse_together(sites, chosen, refused)
        for path in [path for path in by_parameter if path in selected and path not in refused]:
            reduced = sorted({dim for _, use in by_parameter[path] for dim in use.reduced})
            params[path] = self._encode(params[path], reduced)
            context.release(program.params[path], params[path])
        decisions, reports = self._decide(sites, chosen, refused)
        graphs = self.rewrite_graphs(program, decisions)
        encoded = any(params[path] is not program.params[path] for path in params)
        if not encoded and graphs is program.graphs:
            return PassResult(program=program, sites=reports, decisions=decisions)
        result = program.replace(params=params if encoded else program.params, graphs=graphs)
        return PassResult(program=result, sites=reports, decisions=decisions)

    def _refuse(self, x: Any, outside: list[str], frozen: bool) -> str:
        """Why a parameter stays as it is, or an empty string."""
        if outside:
            return f"shared with {outside[0]}, which is not selected"
        if isinstance(x, QuantizedArray):
            return "already int8"
        if isinstance(x, SimulatedArray):
            return "already simulated int8" if self.train else ""
        if isinstance(x, Encoded):
            return f"already encoded as {x.format}"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return f"holds {x.dtype}, no floating-point numbers"
        return "frozen: there is nothing to train" if self.train and frozen else ""

    def _encode(self, x: Any, reduced: list[int]) -> Any:
        if isinstance(x, SimulatedArray):
            return _store(x.master, [dim % len(x.shape) for dim in x.reduced])
        if self.train:
            return SimulatedArray(x, tuple(dim - len(x.shape) for dim in reduced))
        return _store(x, reduced)

    def _decide(
        self, sites: list[Site], chosen: set[str], refused: Mapping[str, str]
    ) -> tuple[dict[str, Any], tuple[SiteReport, ...]]:
        decisions: dict[str, Any] = {}
        reports: dict[str, SiteReport] = {}
        for site in sites:
            if site.name not in chosen:
                continue
            reasons = [refused[use.parameter] for use in site.uses if use.parameter in refused]
            status: Status = "skipped" if reasons else "rewritten"
            reason = reasons[0] if reasons else ""
            usable = not reasons or reasons[0].startswith("already")
            if self.activations and site.kind != "embedding" and usable:
                if kept := keeps_activations(site):
                    reason = f"activations stay as they are: {kept}"
                elif site.op.name == QUANTIZED and site.op.attributes["simulated"] == self.train:
                    reason = reason or "activations are int8 already"
                else:
                    decisions[site.name] = {"simulated": self.train}
                    status, reason = "rewritten", ""
            reports.setdefault(site.name, SiteReport.of(site, status, reason))
        return decisions, tuple(reports.values())

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        """Puts the activations' rounding at each decided site."""
        replacements: dict[ir.Path, ir.Replacement] = {}
        made: dict[tuple[int, bool], ir.Replacement] = {}
        for site in find_sites(captured) if decisions else ():
            if site.name not in decisions or keeps_activations(site):
                continue
            simulated = decisions[site.name]["simulated"]
            if site.op.name == QUANTIZED and site.op.attributes["simulated"] == simulated:
                continue
            # One function for each operation: sites that share a body go on sharing it.
            key = (id(site.op), simulated)
            made.setdefault(key, _Round(site.weight, simulated))
            replacements[site.path] = made[key]
        if not replacements:
            return captured
        return dataclasses.replace(captured, graph=ir.rewrite(captured.graph, replacements))


@dataclasses.dataclass(frozen=True, eq=False)
class _Round:
    """Replaces a product by one whose activations are rounded to int8."""

    weight: int
    simulated: bool

    def __call__(self, op: ir.Op) -> tuple[ir.Op]:
        attributes = {"activations": "int8", "weight": self.weight, "simulated": self.simulated}
        if op.name == QUANTIZED:
            return (dataclasses.replace(op, attributes=attributes),)
        inputs = tuple(ir.Value(x.aval) for x in op.inputs)
        outputs = tuple(ir.Value(x.aval) for x in op.outputs)
        body = ir.Graph(inputs, (dataclasses.replace(op, inputs=inputs, outputs=outputs),), outputs, imported=True)
        return (ir.Op(QUANTIZED, op.inputs, op.outputs, attributes, (body,)),)


def _refuse_together(sites: list[Site], chosen: set[str], refused: dict[str, str]) -> None:
    """Where a site reads several parameters in a row and one stays dense, so do the others: one product reads them."""
    fused = [site for site in sites if site.name in chosen and len(site.uses) > 1]
    again = True
    while again:
        again = False
        for site in fused:
            dense = [
                use.parameter for use in site.uses if not refused.get(use.parameter, "already").startswith("already")
            ]
            for use in site.uses:
                if dense and use.parameter not in refused:
                    refused[use.parameter] = f"read together with {dense[0]}, which stays as it is"
                    again = True


def keeps_activations(site: Site) -> str:
    """Why the activations of a site cannot be rounded, or an empty string."""
    activations = site.primitive.inputs[1 - site.weight]
    if not jnp.issubdtype(activations.dtype, jnp.floating):
        return f"they are {activations.dtype}, which int8 cannot round"
    return site.opaque


def uses_by_parameter(sites: list[Site]) -> dict[str, list[tuple[Site, Use]]]:
    """The sites that consume each parameter, with how they use it."""
    uses: dict[str, list[tuple[Site, Use]]] = {}
    for site in sites:
        for use in site.uses:
            uses.setdefault(use.parameter, []).append((site, use))
    return uses


_quantize_jit = jax.jit(quantize_array, static_argnums=1)


def _store(x: Any, reduced: list[int]) -> QuantizedArray:
    """A parameter as stored int8, converted on its device by one compiled function for each shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return quantize_array(x, reduced)
    return _quantize_jit(x, tuple(reduced))
