"""Coverage: how much of a program is in composites, how many of its parameters are encoded, what is left out, and why.

Everything is counted from the graph, nothing is run or compiled: the figures predict. Floating-point operations count a
multiply-add as two, loops of known length in full, a loop of unknown length once, and every branch.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from compax import _jax, lowering, printing
from compax.encoding import Encoded, nbytes
from compax.ir import Graph, Op, Path

if TYPE_CHECKING:
    from compax.capture import Captured
    from compax.program import Program
    from compax.raising import Site

_MOST_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A contraction or convolution in no composite.

    Attributes:
        name: the operation and what it returns, such as `dot_general i32[8,8]`.
        inside: the operations around it, outermost first.
        flops: operations in one call of the program.
        reason: why it is in none.
    """

    name: str
    inside: tuple[str, ...]
    flops: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """An encoding that is unpacked because no rule computes with it.

    Attributes:
        operation: what needs the dense array.
        format: the encoding's format.
        shape: the dense shape.
        nbytes: bytes of the dense array, each time.
        times: how often it stands in the graph.
        loop: whether it is in a loop, and so happens in every turn.
    """

    operation: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    times: int
    loop: bool


@dataclasses.dataclass(frozen=True)
class Left:
    """A site that is not as the others are: its parameter is dense, or its operation cannot be rewritten.

    Attributes:
        name: the site.
        kind: its kind.
        parameter: the parameter in question.
        nbytes: bytes of that parameter.
        reason: why.
    """

    name: str
    kind: str
    parameter: str
    nbytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What a program's composites cover. Predicted: every figure is counted from the graph.

    Attributes:
        program: name of the program.
        entry: name of the entry.
        flops: operations of all contractions and convolutions in one call.
        flops_in_composites: those in composites of any kind.
        flops_with_parameter: those in composites that consume a parameter.
        parameter_bytes: bytes of all parameters as dense arrays.
        consumed_bytes: dense bytes of the parameters that composites consume.
        encoded_bytes: dense bytes of the parameters that are encoded.
        stored_bytes: bytes that all parameters occupy as they are stored.
        uncovered: contractions in no composite.
        unpacked: encodings that are unpacked although no pass asked for it.
        dense: sites whose parameter is not encoded.
        opaque: sites whose operation cannot be rewritten.
    """

    program: str
    entry: str
    flops: int
    flops_in_composites: int
    flops_with_parameter: int
    parameter_bytes: int
    consumed_bytes: int
    encoded_bytes: int
    stored_bytes: int
    uncovered: tuple[Uncovered, ...]
    unpacked: tuple[Unpacked, ...]
    dense: tuple[Left, ...]
    opaque: tuple[Left, ...]

    @property
    def share_in_composites(self) -> float:
        """Share of the floating-point operations that is in composites; 1 if there are none."""
        return _share(self.flops_in_composites, self.flops)

    @property
    def share_with_parameter(self) -> float:
        """Share of the floating-point operations that is in composites with a parameter; 1 if there are none."""
        return _share(self.flops_with_parameter, self.flops)

    @property
    def share_consumed(self) -> float:
        """Share of parameter bytes that composites consume; 1 if there are no parameters."""
        return _share(self.consumed_bytes, self.parameter_bytes)

    @property
    def share_encoded(self) -> float:
        """Share of parameter bytes, as dense arrays, that is encoded; 1 if there are no parameters."""
        return _share(self.encoded_bytes, self.parameter_bytes)

    def __str__(self) -> str:
        dense, stored = printing.bytes_text(self.parameter_bytes), printing.bytes_text(self.stored_bytes)
        rows = [
            ("contractions", f"{printing.flops_text(self.flops)} a call"),
            ("  in composites", printing.share_text(self.share_in_composites)),
            ("  with a parameter", printing.share_text(self.share_with_parameter)),
            ("parameters", f"{dense} dense, {stored} as stored"),
            ("  in composites", printing.share_text(self.share_consumed)),
            ("  encoded", printing.share_text(self.share_encoded)),
        ]
        lines = [f"coverage of {self.program}, entry {self.entry} (predicted: counted from the graph)"]
        lines += [f"  {name:<20}{value}" for name, value in rows]
        lines += _listed("contractions in no composite", map(_uncovered_text, self.uncovered))
        lines += _listed("unpacked for want of a rule", map(_unpacked_text, self.unpacked))
        lines += _listed("sites that cannot be rewritten", map(_left_text, self.opaque))
        if self.encoded_bytes:
            lines += _listed("sites left dense", map(_left_text, self.dense))
        return "\n".join(lines)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _listed(title: str, items: Iterator[str]) -> list[str]:
    listed = list(items)
    if not listed:
        return [f"  {title}: none"]
    rest = len(listed) - _MOST_LISTED
    more = [f"    and {rest} more"] if rest > 0 else []
    return [f"  {title}: {len(listed)}", *(f"    {text}" for text in listed[:_MOST_LISTED]), *more]


def _uncovered_text(x: Uncovered) -> str:
    place = f" in {'/'.join(x.inside)}" if x.inside else ""
    return f"{x.name}{place}, {printing.flops_text(x.flops)}: {x.reason}"


def _unpacked_text(x: Unpacked) -> str:
    times = f" {x.times} times" if x.times > 1 else ""
    shape = ",".join(map(str, x.shape))
    return (
        f"{x.format}[{shape}] for {x.operation}{times}: {printing.bytes_text(x.nbytes * x.times)} dense"
        f"{' in every turn of a loop' if x.loop else ''}"
    )


def _left_text(x: Left) -> str:
    return f"{x.name} ({x.kind} @{x.parameter}, {printing.bytes_text(x.nbytes)}): {x.reason}"


def coverage(program: "Program", entry: str | None = None) -> Coverage:
    """What share of an entry's work and of a program's parameters composites hold, and what is left out.

    Args:
        program: the program; its parameters may be shapes.
        entry: whose graph is looked at; the first one by default.

    Raises:
        SignatureError: there is no such entry.
        LoweringError: the program cannot be lowered as it is.
    """
    captured = program.graph(entry)
    sites = program.sites(entry)
    uncovered = tuple(_uncovered(captured.graph, {site.path for site in sites}))
    opaque = (_left(program, site, use.parameter, site.opaque) for site in sites if site.opaque for use in site.uses)
    consumed = {use.parameter for site in sites for use in site.uses}
    in_composites = sum(site.flops for site in sites)
    sizes = {path: _dense_bytes(x) for path, x in program.params.items()}
    return Coverage(
        program=program.name,
        entry=captured.entry.name,
        flops=in_composites + sum(x.flops for x in uncovered),
        flops_in_composites=in_composites,
        flops_with_parameter=sum(site.flops for site in sites if site.uses),
        parameter_bytes=sum(sizes.values()),
        consumed_bytes=sum(size for path, size in sizes.items() if path in consumed),
        encoded_bytes=sum(size for path, size in sizes.items() if isinstance(program.params[path], Encoded)),
        stored_bytes=sum(map(nbytes, program.params.values())),
        uncovered=uncovered,
        unpacked=_unpacked(program, captured),
        dense=tuple(_left_dense(program, sites)),
        opaque=tuple(opaque),
    )


def _dense_bytes(x: Any) -> int:
    return nbytes(jax.ShapeDtypeStruct(x.shape, x.dtype))


# -- Contractions in no composite -------------------------------------------------------------------------------------


def _uncovered(
    graph: Graph, sites: set[Path], prefix: Path = (), times: int = 1, inside: tuple[str, ...] = ()
) -> Iterator[Uncovered]:
    for position, op in enumerate(graph.ops):
        if (*prefix, (position, -1)) in sites:
            continue
        if op.name in _FLOPS and (flops := _FLOPS[op.name](op)):
            name = f"{op.name} {_jax.aval_text(op.outputs[0].aval)}"
            yield Uncovered(name, inside, flops * times, _reason(op))
        turns = op.attributes["length"] if op.name == "scan" else 1
        for index, body in enumerate(op.bodies):
            yield from _uncovered(body, sites, (*prefix, (position, index)), times * turns, (*inside, op.name))


def _reason(op: Op) -> str:
    if not jnp.issubdtype(op.outputs[0].dtype, jnp.inexact):
        return "a product of integers"
    if op.name == "ragged_dot_general":
        return "a grouped product of computed values, or one that sums over groups"
    return "not recognized"


def _dot_flops(op: Op) -> int:
    contract = op.attributes["dimension_numbers"][0][0]
    # Without a contraction it multiplies, and adds nothing up.
    return 2 * math.prod(op.outputs[0].shape) * math.prod(op.inputs[0].shape[d] for d in contract) if contract else 0


def _ragged_dot_flops(op: Op) -> int:
    contract = op.attributes["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0]
    return 2 * math.prod(op.outputs[0].shape) * math.prod(op.inputs[0].shape[d] for d in contract)


def _convolution_flops(op: Op) -> int:
    kernel, numbers = op.inputs[1].shape, op.attributes["dimension_numbers"]
    return 2 * math.prod(op.outputs[0].shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]


_FLOPS = {
    "dot_general": _dot_flops,
    "ragged_dot_general": _ragged_dot_flops,
    "conv_general_dilated": _convolution_flops,
}


# -- Encodings that are unpacked --------------------------------------------------------------------------------------


def _unpacked(program: "Program", captured: "Captured") -> tuple[Unpacked, ...]:
    """What lowering unpacks for want of a rule, found by evaluating the graph with shapes in place of arrays."""
    if not any(isinstance(x, Encoded) for x in program.params.values()):
        return ()
    # An observer has every call evaluated: otherwise a function that many layers share would count once.
    evaluator = lowering.Evaluator(rebuild=True, observer=lambda op, outputs: None)

    def evaluate(params: Mapping[str, Any], rest: list[Any]) -> list[Any]:
        others = iter(rest)
        values = [params[tag.path] if tag.kind == "parameter" else next(others) for tag in captured.inputs]
        return evaluator.whole(captured.graph, values)

    inputs = zip(captured.inputs, captured.graph.inputs, strict=True)
    rest = [_jax.as_struct(value.aval) for tag, value in inputs if tag.kind != "parameter"]
    with captured.under_mesh():
        jax.eval_shape(evaluate, program.params, rest)
    counted = collections.Counter(evaluator.decodes)
    found = [Unpacked(x.operation, x.format, x.shape, x.nbytes, times, x.loop) for x, times in counted.items()]
    return tuple(sorted(found, key=lambda x: -x.nbytes * x.times))


# -- Sites left as they are -------------------------------------------------------------------------------------------


def _left_dense(program: "Program", sites: "tuple[Site, ...]") -> Iterator[Left]:
    reasons = {
        report.name: report.reason
        for record in program.history
        for report in record.sites
        if report.status == "skipped" and report.reason
    }
    for site in sites:
        for use in site.uses:
            if not isinstance(program.params[use.parameter], Encoded):
                yield _left(program, site, use.parameter, reasons.get(site.name, "no pass encoded it"))


def _left(program: "Program", site: "Site", parameter: str, reason: str) -> Left:
    return Left(site.name, site.kind, parameter, _dense_bytes(program.params[parameter]), reason)
