"""The text form of programs and graphs, for people, goldens and reproducers.

Everything here is deterministic: the same program gives the same text in every process. No object's address, time or
hash order gets in, and JAX's own printer is not used.
"""

import dataclasses
import enum
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.encoding import Encoded, nbytes
from compax.ir import Graph, Literal, Op, Operand, Value

if TYPE_CHECKING:
    from compax.capture import Captured, Input
    from compax.program import Program
    from compax.raising import Site
    from compax.transform import PassRecord

WIDTH = 100
_MANY_SITES = 24
_MANY_ARRAYS = 4
_NUMBERED = re.compile(r"(.*_)?(\d+)")


# -- Numbers ----------------------------------------------------------------------------------------------------------


def count_text(count: float) -> str:
    """A number of things: 950, 12.3K, 124.4M, 6.74B."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def bytes_text(count: float) -> str:
    """A number of bytes in powers of 1000: 950 B, 12.3 kB, 62.2 MB."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB", " PB"))


def flops_text(count: float) -> str:
    """A number of floating-point operations: 950 FLOPs, 1.2 GFLOPs."""
    return _scaled(count, (" FLOPs", " kFLOPs", " MFLOPs", " GFLOPs", " TFLOPs", " PFLOPs"))


def share_text(share: float) -> str:
    """A share in percent. Only what is all reads 100 %, and only what is nothing 0 %."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def _scaled(count: float, units: Sequence[str]) -> str:
    power = 0
    while power < len(units) - 1 and abs(count) >= 999.95:
        count /= 1000
        power += 1
    return f"{count:.1f}{units[power]}" if power else f"{round(count)}{units[0]}"


def plural(count: int, noun: str) -> str:
    """A number of things with the noun in its form: 1 site, 2 sites."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_text(x: Any) -> str:
    """How a parameter is stored: `bf16[32000,768]`, or with its encoding `int8[768,2304]`."""
    if isinstance(x, Encoded):
        return f"{x.format}[{','.join(map(str, x.shape))}]"
    return _jax.aval_text(x)


# -- Programs ---------------------------------------------------------------------------------------------------------


def program_text(program: "Program", entry: str | None = None, *, ops: bool = False, width: int | None = None) -> str:
    """A program as text: what goes in and out, a line for each site, totals, and what passes did.

    Equal layers are gathered in one line (`blocks.{0..29}.attn.query`) where there are many sites. Percentages are
    shares of the floating-point operations of all sites, counted from the graph.

    Args:
        program: the program.
        entry: whose graph to show; the first one by default.
        ops: show every operation instead of sites.
        width: columns that lines should keep within; 100 by default.

    Raises:
        SignatureError: there is no such entry.
    """
    width = width or WIDTH
    captured = program.graph(entry)
    lines = _header(program, captured, width)
    if ops:
        lines.append(graph_text(captured.graph, captured.inputs))
    else:
        sites = program.sites(entry)
        lines += _table(_site_rows(program, sites), width)
        lines += [f"  {line}" for line in _totals(program, sites)]
    for number, record in enumerate(program.history, start=1):
        lines += _record(number, record, width)
    return "\n".join(lines)


def _header(program: "Program", captured: "Captured", width: int) -> list[str]:
    name = program.name if len(program.entries) == 1 else f"{program.name}.{captured.entry.name}"
    store = program.params.values()
    size = f"{count_text(sum(math.prod(x.shape) for x in store))} parameters, {bytes_text(sum(map(nbytes, store)))}"
    arguments = _arguments(captured)
    title = f"program {name}({', '.join(arguments)}) -> {_outputs(captured)}"
    if len(title) + 2 + len(size) <= width:
        return [title + size.rjust(width - len(title))]
    if len(title) > width:
        title = "\n".join([f"program {name}(", *(f"    {a}," for a in arguments), f") -> {_outputs(captured)}"])
    return [*title.split("\n"), size.rjust(width)]


def _arguments(captured: "Captured") -> list[str]:
    groups: dict[str, list[tuple[str, Value]]] = {}
    for tag, value in zip(captured.inputs, captured.graph.inputs, strict=True):
        if tag.kind == "argument":
            groups.setdefault(tag.path.partition(".")[0], []).append((tag.path, value))
    written = []
    for top, members in groups.items():
        if len(members) > _MANY_ARRAYS:
            written.append(f"{top}: {len(members)} arrays")
        else:
            written += [f"{path}: {_jax.aval_text(value.aval)}" for path, value in members]
    return written


def _outputs(captured: "Captured") -> str:
    arrays = [_jax.aval_text(captured.graph.outputs[i].aval) for i in captured.output_leaves if isinstance(i, int)]
    if len(arrays) > _MANY_ARRAYS:
        return f"{len(arrays)} arrays"
    return arrays[0] if len(arrays) == 1 else f"({', '.join(arrays)})"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the table, or several that are alike but for numbers in the name.

    Attributes:
        name: components of the site's name; those with a number are (stem, numbers).
        suffix: the occurrence, such as "#2".
        kind: the site's kind.
        uses: for each parameter its path and how it is stored.
        notes: what else is to be said.
        opaque: why the sites cannot be rewritten, or empty.
        flops: floating-point operations.
    """

    name: tuple[Any, ...]
    suffix: str
    kind: str
    uses: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    opaque: str
    flops: int


def _site_rows(program: "Program", sites: "Sequence[Site]") -> list[_Row]:
    rows = []
    for site in sites:
        name, _, occurrence = site.name.partition("#")
        rows.append(
            _Row(
                name=tuple(map(_component, name.split("."))),
                suffix=f"#{occurrence}" if occurrence else "",
                kind=site.kind,
                uses=tuple((use.parameter, format_text(program.params[use.parameter])) for use in site.uses),
                notes=tuple(_notes(program, site)),
                opaque=site.opaque,
                flops=site.flops,
            )
        )
    return _gather_rows(rows) if len(rows) > _MANY_SITES else rows


def _notes(program: "Program", site: "Site") -> Iterator[str]:
    if site.op.equation is None:
        for key, value in site.op.attributes.items():
            if value is True:
                yield key
            elif isinstance(value, str):
                yield f"{key} {value}"
    if any(site.loops):
        yield " ".join(f"x{length}" for length in site.loops if length)
    if 0 in site.loops:
        yield "in a loop of unknown length"
    if site.uses and all(use.parameter in program.frozen for use in site.uses):
        yield "frozen"


def _component(text: str) -> Any:
    match = _NUMBERED.fullmatch(text)
    return (match[1] or "", (int(match[2]),)) if match and str(int(match[2])) == match[2] else text


def _gather_rows(rows: list[_Row]) -> list[_Row]:
    """Rows with those merged that differ in one number of their names only; in order of the first of each."""
    deepest = max(len(row.name) for row in rows)
    for position in reversed(range(deepest)):
        merged: dict[Any, _Row] = {}
        for row in rows:
            if position >= len(row.name) or not isinstance(row.name[position], tuple):
                merged[id(row)] = row
                continue
            stem, numbers = row.name[position]
            key = (
                (*row.name[:position], stem, None, *row.name[position + 1 :]),
                row.suffix,
                row.kind,
                tuple((_mask(path, position, stem, numbers), text) for path, text in row.uses),
                row.notes,
                row.opaque,
            )
            if key in merged:
                first = merged[key]
                name = list(first.name)
                name[position] = (stem, (*first.name[position][1], *numbers))
                merged[key] = dataclasses.replace(first, name=tuple(name), flops=first.flops + row.flops)
            else:
                merged[key] = row
        rows = list(merged.values())
    return rows


def _mask(path: str, position: int, stem: str, numbers: tuple[int, ...]) -> tuple[str, ...]:
    """A parameter's path without the number that it shares with the name of its site."""
    parts = path.split(".")
    if position < len(parts) and parts[position] == f"{stem}{numbers[0]}":
        parts[position] = f"{stem}*"
    return tuple(parts)


def _component_text(component: Any) -> str:
    if isinstance(component, str):
        return component
    stem, numbers = component
    return f"{stem}{numbers[0]}" if len(numbers) == 1 else f"{stem}{{{ranges(sorted(numbers))}}}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs written as such: 0..29, or 0,2,4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _table(rows: Sequence[_Row], width: int) -> list[str]:
    lines = _lines(rows, _full_parameter)
    if any(len(line) > width for line in lines):
        lines = _lines(rows, _relative_parameter)
    return lines


def _full_parameter(row: _Row, path: str) -> str:
    """The path, its numbers gathered like those of the name."""
    parts = path.split(".")
    for position, component in enumerate(row.name[: len(parts)]):
        if isinstance(component, tuple) and parts[position] == f"{component[0]}{component[1][0]}":
            parts[position] = _component_text(component)
    return "@" + ".".join(parts)


def _relative_parameter(row: _Row, path: str) -> str:
    """The path from the site on, `@.kernel`, where it lies below it."""
    name, full = _name_text(row, suffix=False), _full_parameter(row, path)
    return f"@{full[1 + len(name) :]}" if full.startswith(f"@{name}.") else full


def _name_text(row: _Row, *, suffix: bool = True) -> str:
    return ".".join(map(_component_text, row.name)) + (row.suffix if suffix else "")


def _lines(rows: Sequence[_Row], parameter: Callable[[_Row, str], str]) -> list[str]:
    total = sum(row.flops for row in rows)
    cells: list[list[str]] = []
    for row in rows:
        uses = [(parameter(row, path), text) for path, text in row.uses] or [("", "")]
        share = share_text(row.flops / total) if row.flops else ""
        cells.append([_name_text(row), row.kind, *uses[0], share.rjust(5), ", ".join(row.notes)])
        cells += [["", "", path, text, "", ""] for path, text in uses[1:]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = iter("  ".join(["", *map(str.ljust, line, widths)]).rstrip() for line in cells)
    lines: list[str] = []
    for row in rows:
        lines += [next(table) for _ in row.uses or (None,)]
        lines += [f"    left as it is: {row.opaque}"] if row.opaque else []
    return lines


def _totals(program: "Program", sites: "Sequence[Site]") -> Iterator[str]:
    used = {use.parameter for site in sites for use in site.uses}
    rest = [x for path, x in program.params.items() if path not in used]
    if rest:
        yield f"and {plural(len(rest), 'parameter')} that no site consumes, {bytes_text(sum(map(nbytes, rest)))}"
    kinds: dict[str, int] = {}
    for site in sites:
        kinds[site.kind] = kinds.get(site.kind, 0) + 1
    flops = flops_text(sum(site.flops for site in sites))
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    yield f"{plural(len(sites), 'site')}: {listed}; {flops} a call (predicted)" if sites else "no sites"
    if program.frozen:
        yield f"{len(program.frozen)} of {plural(len(program.params), 'parameter')} frozen"
    if program.state:
        yield f"state: {plural(len(program.state), 'array')}, {bytes_text(sum(map(nbytes, program.state.values())))}"
    if len(program.entries) > 1:
        yield f"entries: {', '.join(program.entries)}"


def _record(number: int, record: "PassRecord", width: int) -> list[str]:
    counts = [f"{record.count(s)} {s}" for s in ("rewritten", "matched", "skipped") if record.count(s)]
    before, after = record.before, record.after
    sizes = "" if before == after else f"{bytes_text(before.nbytes)} -> {bytes_text(after.nbytes)}"
    parts = [record.text, ", ".join(counts) or "no sites", *([sizes] if sizes else [])]
    lines = [f"  {number}. {'; '.join(parts)}"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for site in record.sites:
        if site.reason:
            reasons.setdefault((site.status, site.reason), []).append(site.name)
    for (status, reason), names in reasons.items():
        lines.append(_shortened(f"     {status} ", names, f": {reason}", width))
    return [*lines, *(f"     {note}" for note in record.notes)]


def _shortened(before: str, names: Sequence[str], after: str, width: int) -> str:
    """A line with as many of the names as fit, and how many more there are."""
    for shown in range(len(names), 1, -1):
        more = f" and {len(names) - shown} more" if shown < len(names) else ""
        line = f"{before}{', '.join(names[:shown])}{more}{after}"
        if len(line) <= width:
            return line
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{before}{names[0]}{more}{after}"


# -- Graphs -----------------------------------------------------------------------------------------------------------


def graph_text(graph: Graph, inputs: "Sequence[Input] | None" = None) -> str:
    """Every operation of a graph as text, a line each, bodies indented below the operation that holds them.

    Values are numbered in the order in which the text defines them. A body is `^1`, `^2`, ..., printed where it is
    first held; others that hold it repeat its name only. Attributes that are false, empty or unspecified are left out.

    Args:
        graph: the graph.
        inputs: what its inputs stand for, shown beside them.
    """
    printer = _GraphPrinter()
    tags = [f" {tag.kind} {tag.path}" for tag in inputs] if inputs is not None else [""] * len(graph.inputs)
    lines = ["graph {"]
    lines += [f"  {printer.define(value)}{tag}" for value, tag in zip(graph.inputs, tags, strict=True)]
    printer.contents(graph, "  ", lines)
    return "\n".join([*lines, "}"])


class _GraphPrinter:
    """Names of the values and bodies that were printed so far."""

    def __init__(self) -> None:
        self.values: dict[Value, str] = {}
        self.bodies: dict[int, str] = {}

    def define(self, value: Value) -> str:
        self.values[value] = f"%{len(self.values)}"
        return f"{self.values[value]}: {_jax.aval_text(value.aval)}"

    def read(self, operand: Operand) -> str:
        return _literal_text(operand) if isinstance(operand, Literal) else self.values[operand]

    def contents(self, graph: Graph, indent: str, lines: list[str]) -> None:
        for value, array in graph.constants:
            lines.append(f"{indent}{self.define(value)} = constant {_array_text(array)}")
        for op in graph.ops:
            self.operation(op, indent, lines)
        lines.append(f"{indent}return {', '.join(map(self.read, graph.outputs))}".rstrip())

    def operation(self, op: Op, indent: str, lines: list[str]) -> None:
        operands = ", ".join(map(self.read, op.inputs))
        new = [body for body in _unique(op.bodies) if id(body) not in self.bodies]
        for body in new:
            self.bodies[id(body)] = f"^{len(self.bodies) + 1}"
        held = "".join(f" {self.bodies[id(body)]}" for body in op.bodies)
        outputs = ", ".join(map(self.define, op.outputs))
        attributes = _attributes_text(op.attributes)
        lines.append(f"{indent}{outputs} = {op.name}{held}({operands}){attributes}")
        for body in new:
            inner = f"{indent}    "
            inputs = ", ".join(map(self.define, body.inputs))
            lines.append(f"{indent}  {self.bodies[id(body)]}({inputs})")
            self.contents(body, inner, lines)


def _unique(bodies: Iterable[Graph]) -> list[Graph]:
    return list({id(body): body for body in bodies}.values())


def _literal_text(literal: Literal) -> str:
    return f"{_array_text(literal.value)}:{_jax.dtype_text(literal.dtype)}"


def _array_text(array: Any) -> str:
    """A scalar as it is, anything else by its type and a digest of its contents."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    if array.ndim == 0:
        return str(array.item())
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]
    return f"{_jax.aval_text(array)} sha256:{digest}"


def _attributes_text(attributes: Mapping[str, Any]) -> str:
    written = [f"{key}={_attribute_text(attributes[key])}" for key in sorted(attributes) if not _empty(attributes[key])]
    return f" {', '.join(written)}" if written else ""


def _empty(value: Any) -> bool:
    if value is None or value is False or type(value).__name__ == "UnspecifiedValue":
        return True
    if isinstance(value, (tuple, list)):
        return all(map(_empty, value))
    if isinstance(value, (dict, frozenset, set, str)):
        return not value
    if isinstance(value, enum.Enum):
        return value.name == "AUTO"
    return isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)) and value.empty


def _attribute_text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array_text(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _jax.dtype_text(np.dtype(value))
    if isinstance(value, jax.sharding.PartitionSpec):
        return f"P({', '.join('-' if part is None else _attribute_text(part) for part in value)})"
    if isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        return f"mesh({', '.join(f'{name}={size}' for name, size in value.shape.items())})"
    if isinstance(value, jax.sharding.NamedSharding):
        return f"sharding({_attribute_text(value.mesh)}, {_attribute_text(value.spec)})"
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return _call_text(type(value).__name__, zip(names, value, strict=True))
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_attribute_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, (frozenset, set)):
        return f"{{{', '.join(sorted(map(_attribute_text, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_attribute_text(k)}: {_attribute_text(v)}' for k, v in value.items()))}}}"
    if isinstance(value, functools.partial):
        return f"partial({_attribute_text(value.func)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _call_text(
            type(value).__name__, ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return f"<{value.__qualname__}>"
    text = _without_addresses(repr(value))
    return f"<{type(value).__name__}>" if "\n" in text or text.startswith("<") else text


def _call_text(name: str, fields: Iterable[tuple[str, Any]]) -> str:
    return f"{name}({', '.join(f'{key}={_attribute_text(value)}' for key, value in fields if not _empty(value))})"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
