"""What a program means, as text: its composites, its axes, and what remains open."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compax.printing import plural, ranges

if TYPE_CHECKING:
    from compax.analysis.axes import Axis
    from compax.composites.base import Composite
    from compax.program import Program

_MOST_PLACES = 3


@dataclasses.dataclass
class _Gathered:
    """Lines that differ in one number of their names."""

    name: tuple[str, str]
    numbers: list[int]
    cells: tuple[str, ...]

    @property
    def text(self) -> str:
        before, after = self.name
        if not self.numbers:
            return before
        shown = str(self.numbers[0]) if len(self.numbers) == 1 else f"{{{ranges(sorted(set(self.numbers)))}}}"
        return f"{before}{shown}{after}"


def composites_text(program: "Program", entry: str | None = None) -> str:
    """A line for each composite with all that is known of it, equal layers gathered; then what remains open.

    Raises:
        SignatureError: there is no such entry.
        DeclarationError: a declaration fits nothing in that entry.
    """
    meaning = program.meaning(entry)
    rows = _gather((composite.name, (composite.kind, _facts(composite))) for composite in meaning.composites)
    lines = [f"composites of {program.name} (found in its graph; nothing was rewritten)"]
    lines += _table([(row.text, *row.cells) for row in rows]) or ["  none"]
    counts: dict[str, int] = {}
    for composite in meaning.composites:
        counts[composite.kind] = counts.get(composite.kind, 0) + 1
    if counts:
        lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if meaning.streams:
        additions = ", ".join(plural(len(stream), "addition") for stream in meaning.streams)
        lines.append(f"  {plural(len(meaning.streams), 'residual stream')}: {additions}")
    lines += _questions(program, entry)
    return "\n".join(lines)


def _facts(composite: "Composite") -> str:
    loops = [f"x{length}" for length in composite.loops if length]
    return ", ".join([*(f"{name} {text}" for name, text in composite.facts().items()), *loops])


def _questions(program: "Program", entry: str | None) -> list[str]:
    found = program.meaning(entry).questions
    if not found:
        return ["  open questions: none"]
    rows = _gather((x.where, (x.what, _masked(x.remedy, x.where))) for x in found)
    lines = [f"  {plural(len(found), 'open question')}"]
    for row in rows:
        what, remedy = row.cells
        lines += [f"    {row.text}: {what}", f"      {remedy.replace('{where}', row.text)}"]
    return lines


def _masked(text: str, name: str) -> str:
    return text.replace(name, "{where}")


def axes_text(program: "Program", entry: str | None = None) -> str:
    """A line for each axis: its size, the parameters that have it, and why its indices must stay, if they must.

    Raises:
        SignatureError: there is no such entry.
        DeclarationError: a declaration fits nothing in that entry.
    """
    meaning = program.meaning(entry)
    rows = _gather((axis.name, (str(axis.size), _places(axis), _fixed(axis))) for axis in meaning.axes)
    lines = [f"axes of {program.name} (from its graph)"]
    lines += _table([("axis", "size", "parameter.dimension", "fixed"), *((row.text, *row.cells) for row in rows)])
    free = sum(not axis.fixed for axis in meaning.axes)
    lines.append(
        f"  {plural(len(meaning.axes), 'axis').replace('axiss', 'axes')}, {free} free to move or to lose indices"
    )
    return "\n".join(lines)


def _places(axis: "Axis") -> str:
    """Where an axis occurs; the number that its own name has is written as `*`."""
    number = next(iter(re.findall(r"(?<=\.)\d+(?=\.)", axis.name)), None)
    places = [
        ".".join(["*" if part == number else part for part in path.split(".")] + [str(dim)])
        for path, dims in axis.parameters.items()
        for dim in dims
    ]
    rows = _gather((place, ()) for place in places)
    shown = [row.text for row in rows[:_MOST_PLACES]]
    more = [f"and {len(rows) - _MOST_PLACES} more"] if len(rows) > _MOST_PLACES else []
    return ", ".join([*shown, *more])


def _fixed(axis: "Axis") -> str:
    return "; ".join(axis.fixed[:2])


def _gather(items: Iterable[tuple[str, tuple[str, ...]]]) -> list[_Gathered]:
    """Items with those merged that differ in the first number of their names only; in order of the first of each."""
    found: dict[Any, _Gathered] = {}
    for name, cells in items:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        if match is None:
            found[name, cells] = _Gathered((name, ""), [], cells)
            continue
        parts = (name[: match.start()], name[match.end() :])
        gathered = found.setdefault((parts, cells), _Gathered(parts, [], cells))
        gathered.numbers.append(int(match[0]))
    return list(found.values())


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["", *map(str.ljust, row, widths)]).rstrip() for row in rows]
