"""What a program means, as text: its composites, its axes, and what remains open."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compax.gathering import Line, gather
from compax.printing import plural

if TYPE_CHECKING:
    from compax.analysis.axes import Axis
    from compax.composites.base import Composite
    from compax.program import Program

_MOST_PLACES = 3


def composites_text(program: "Program", entry: str | None = None) -> str:
    """A line for each composite with all that is known of it, equal layers gathered; then what remains open.

    Raises:
        SignatureError: there is no such entry.
        DeclarationError: a declaration fits nothing in that entry.
    """
    meaning = program.meaning(entry)
    rows = _gathered([(composite.name, (composite.kind, _facts(composite))) for composite in meaning.composites])
    lines = [f"composites of {program.name} (found in its graph; nothing was rewritten)"]
    lines += _table([(name, *cells) for name, cells in rows]) or ["  none"]
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
    lines = [f"  {plural(len(found), 'open question')}"]
    for where, (what, remedy) in _gathered([(x.where, (x.what, x.remedy.replace(x.where, "{where}"))) for x in found]):
        lines += [f"    {where}: {what}", f"      {remedy.replace('{where}', where)}"]
    return lines


def axes_text(program: "Program", entry: str | None = None) -> str:
    """A line for each axis: size, what the model's author calls it, parameters that have it, why its indices are fixed.

    Raises:
        SignatureError: there is no such entry.
        DeclarationError: a declaration fits nothing in that entry.
    """
    meaning = program.meaning(entry)
    cells = [(x.name, (str(x.size), ", ".join(x.annotated), _places(x), _fixed(x))) for x in meaning.axes]
    rows = [("axis", "size", "annotated", "parameter.dimension", "fixed")]
    rows += [(name, *rest) for name, rest in _gathered(cells)]
    if not any(axis.annotated for axis in meaning.axes):
        rows = [(*row[:2], *row[3:]) for row in rows]
    lines = [f"axes of {program.name} (from its graph)", *_table(rows)]
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
    names = [name for name, _ in _gathered([(place, ()) for place in places])]
    shown = names[:_MOST_PLACES]
    more = [f"and {len(names) - _MOST_PLACES} more"] if len(names) > _MOST_PLACES else []
    return ", ".join([*shown, *more])


def _fixed(axis: "Axis") -> str:
    return "; ".join(axis.fixed[:2])


def _gathered(items: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Names with cells, those merged that differ in numbers of their names only."""
    groups = gather([Line(name, rest=cells) for name, cells in items])
    return [(group.name, items[group.members[0]][1]) for group in groups]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(["", *map(str.ljust, row, widths)]).rstrip() for row in rows]
