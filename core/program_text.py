"""The print of a program: what goes in and out, its composites with their sites, totals, and what passes did."""

import dataclasses
import math
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from compax import _jax
from compax.encoding import nbytes
from compax.errors import DeclarationError
from compax.gathering import Group, Line, gather
from compax.ir import Path, Value
from compax.placement import entries_of
from compax.printing import bytes_text, count_text, flops_text, format_text, graph_text, plural, share_text

if TYPE_CHECKING:
    from compax.capture import Captured
    from compax.composites.base import Composite
    from compax.meaning import Meaning
    from compax.program import Program
    from compax.raising import Site
    from compax.transform import PassRecord

WIDTH = 100
_MANY_LINES = 24
_MANY_ARRAYS = 4
_BEFORE_USES = 3
_NARROWEST = 24


def program_text(program: "Program", entry: str | None = None, *, ops: bool = False, width: int | None = None) -> str:
    """A program as text: what goes in and out, its composites and below each its sites, totals, and what passes did.

    Equal layers are gathered in one line (`blocks.{0..29}.attn.query`) where there are many. Percentages are shares of
    the floating-point operations of all sites, counted from the graph. Names of axes stand beside the sizes of
    parameters, and behind them, as in `1536@tensor`, the axes of a mesh that they are split over. Where that is too
    wide, names begin at the line above (`.query` of `blocks.0.attn`), then axes go.

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
        lines += _sites_text(program, entry, width)
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


# -- Composites and sites ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Item:
    """What a line says: a composite, or a site in one or in none.

    Attributes:
        name: its name.
        kind: its kind.
        flops: its floating-point operations; of a composite those of its sites.
        summary: what there is to say of a composite; none for a site.
        uses: of a site, for each parameter its path, how it is stored, and that with names of axes.
        notes: what else is to be said.
        opaque: why a site cannot be rewritten, or empty.
        sites: of a composite the lines of its sites.
    """

    name: str
    kind: str
    flops: int = 0
    summary: str | None = None
    uses: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    opaque: str = ""
    sites: "list[_Item]" = dataclasses.field(default_factory=list)

    def line(self, rest: Hashable = None) -> Line:
        said = (self.kind, self.summary, tuple(use[1:] for use in self.uses), self.notes, self.opaque, rest)
        return Line(self.name, tuple(path for path, _, _ in self.uses), said)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the table: an item, or several that are alike but for numbers in the name; of a composite, if any."""

    item: _Item
    group: Group
    owner: str | None
    flops: int


def _sites_text(program: "Program", entry: str | None, width: int) -> list[str]:
    sites = program.sites(entry)
    meaning, failure = None, []
    try:
        meaning = program.meaning(entry)
    except DeclarationError as e:
        failure = [f"  composites are not shown, because a declaration does not fit this entry: {e}"]
    rows = _rows(_items(program, meaning, sites))
    total = sum(site.flops for site in sites)
    lines = _table(rows, total, width, relative=False, axes=True)
    for relative, axes in ((True, True), (True, False)):
        if any(len(line) > width for line in lines):
            lines = _table(rows, total, width, relative=relative, axes=axes)
    return [*lines, *failure, *(f"  {line}" for line in _totals(program, meaning, sites))]


def _items(program: "Program", meaning: "Meaning | None", sites: "Sequence[Site]") -> list[_Item]:
    """Composites and sites in order of evaluation, a composite at the place of its first site or of its result."""
    owners: dict[Path, Composite] = {} if meaning is None else meaning.owners()
    words = {} if meaning is None else meaning.parameter_words()
    order = {site.path: number for number, site in enumerate(sites)}
    placed: list[tuple[Path, _Item]] = []
    heads: dict[Composite, _Item] = {}
    for composite in () if meaning is None else meaning.composites:
        head = heads[composite] = _Item(composite.name, composite.kind, summary=", ".join(composite.summary()))
        head.notes = tuple(_loops(composite.loops))
        assert composite.output.node is not None
        paths = [path for path, owner in owners.items() if owner is composite and path in order]
        placed.append((min(paths, default=composite.output.node.path), head))
    for site in sites:
        uses = tuple(_use(program, use.parameter, words.get(use.parameter, ())) for use in site.uses)
        owner = owners.get(site.path)
        notes = [*_notes(program, site)]
        if owner is None or owner.loops != site.loops:
            notes += _loops(site.loops)
        item = _Item(site.name, site.kind, site.flops, None, uses, tuple(notes), site.opaque)
        if owner is None:
            placed.append((site.path, item))
        else:
            heads[owner].sites.append(item)
            heads[owner].flops += site.flops
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def _use(program: "Program", path: str, words: Sequence[str]) -> tuple[str, str, str]:
    """A parameter's path, how it is stored, and that with the names of axes: `f32[model 576@fsdp, hidden 1536@tensor]`.

    Behind `@` are the axes of the mesh that a dimension is split over.
    """
    x = program.params[path]
    stored = format_text(x)
    split = entries_of(program.placement.spec(path), len(x.shape))
    sizes = [f"{size}@{'+'.join(over)}" if over else str(size) for size, over in zip(x.shape, split, strict=True)]
    if any(split):
        stored = f"{stored.partition('[')[0]}[{','.join(sizes)}]"
    if len(words) != len(x.shape) or not any(words):
        return path, stored, stored
    named = (f"{word} {size}".lstrip() for word, size in zip(words, sizes, strict=True))
    return path, stored, f"{stored.partition('[')[0]}[{', '.join(named)}]"


def _notes(program: "Program", site: "Site") -> Iterator[str]:
    if site.op.equation is None:
        for key, value in site.op.attributes.items():
            if value is True:
                yield key
            elif isinstance(value, str):
                yield f"{key} {value}"
    if site.uses and all(use.parameter in program.frozen for use in site.uses):
        yield "frozen"


def _loops(lengths: Sequence[int]) -> Iterator[str]:
    """The loops around something: how often it runs."""
    if any(lengths):
        yield " ".join(f"x{length}" for length in lengths if length)
    if 0 in lengths:
        yield "in a loop of unknown length"


def _rows(items: list[_Item]) -> list[_Row]:
    """The lines in order: each composite, then its sites."""
    many = sum(1 + len(item.sites) for item in items) > _MANY_LINES
    rows: list[_Row] = []
    for group in _groups(items, many):
        heads = [items[i] for i in group.members]
        rows.append(_row(heads, group, None))
        below = [site for head in heads for site in head.sites]
        rows += [_row([below[i] for i in inner.members], inner, group.name) for inner in _groups(below, many)]
    return rows


def _groups(items: list[_Item], many: bool) -> list[Group]:
    lines = [item.line() for item in items]
    if many:
        return gather(lines)
    return [Group(line.name, line.paths, (i,)) for i, line in enumerate(lines)]


def _row(items: list[_Item], group: Group, owner: str | None) -> _Row:
    return _Row(items[0], group, owner, sum(item.flops for item in items))


def _table(rows: Sequence[_Row], total: int, width: int, *, relative: bool, axes: bool) -> list[str]:
    cells: list[list[str]] = []
    for row in rows:
        name = row.group.name
        if row.owner is not None:
            name = f"  {_below(row.owner, name) if relative else name}"
        share = share_text(row.flops / total) if row.flops else ""
        notes = ", ".join(row.item.notes)
        paths = [f"@{_below(row.group.name, path) if relative else path}" for path in row.group.paths]
        uses = [(path, use[2 if axes else 1]) for path, use in zip(paths, row.item.uses, strict=True)]
        first, *more = uses or [("", "")]
        cells.append([name, row.item.kind, share.rjust(5), *first, notes])
        cells += [["", "", "", *use, ""] for use in more]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)] if cells else []
    shown = [i for i, size in enumerate(widths) if size]
    indent = 2 + sum(widths[i] + 2 for i in shown if i < _BEFORE_USES)
    lines: list[str] = []
    written = iter(cells)
    for row in rows:
        for number in range(max(1, len(row.item.uses))):
            line = next(written)
            if row.item.summary is None or number:
                lines.append("  ".join(["", *(line[i].ljust(widths[i]) for i in shown)]).rstrip())
                continue
            before = "  ".join(["", *(line[i].ljust(widths[i]) for i in shown if i < _BEFORE_USES), ""])
            text = ", ".join(filter(None, (row.item.summary, line[-1])))
            lines += textwrap.wrap(
                text, max(width, indent + _NARROWEST), initial_indent=before, subsequent_indent=" " * indent
            )
        lines += [f"    left as it is: {row.item.opaque}"] if row.item.opaque else []
    return lines


def _below(name: str, path: str) -> str:
    """A path from a name on, `.kernel`, where it lies below it."""
    name = name.partition("#")[0]
    return path[len(name) :] if path.startswith(f"{name}.") else path


# -- Totals -----------------------------------------------------------------------------------------------------------


def _totals(program: "Program", meaning: "Meaning | None", sites: "Sequence[Site]") -> Iterator[str]:
    used = {use.parameter for site in sites for use in site.uses}
    used |= {path for composite in (meaning.composites if meaning else ()) for path in composite.parameters}
    rest = [x for path, x in program.params.items() if path not in used]
    if rest:
        size = bytes_text(sum(map(nbytes, rest)))
        yield f"and {plural(len(rest), 'parameter')} outside of composites and sites, {size}"
    if meaning is not None and meaning.composites:
        yield f"{plural(len(meaning.composites), 'composite')}: {_counts(x.kind for x in meaning.composites)}"
    flops = flops_text(sum(site.flops for site in sites))
    kinds = _counts(site.kind for site in sites)
    yield f"{plural(len(sites), 'site')}: {kinds}; {flops} a call (predicted)" if sites else "no sites"
    if program.frozen:
        yield f"{len(program.frozen)} of {plural(len(program.params), 'parameter')} frozen"
    if program.state:
        yield f"state: {plural(len(program.state), 'array')}, {bytes_text(sum(map(nbytes, program.state.values())))}"
    if len(program.entries) > 1:
        yield f"entries: {', '.join(program.entries)}"


def _counts(kinds: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


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
