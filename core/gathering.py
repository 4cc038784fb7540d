"""Lines of a print that are alike but for a number in their names, gathered: `blocks.{0..29}.attn.query`."""

import dataclasses
import re
from collections.abc import Hashable, Sequence

_NUMBERED = re.compile(r"(.*_)?(\d+)")


@dataclasses.dataclass(frozen=True)
class Line:
    """What is compared of a line.

    Attributes:
        name: its dotted name.
        paths: other dotted names, which may have the name's numbers at the same places.
        rest: what has to be equal.
    """

    name: str
    paths: tuple[str, ...] = ()
    rest: Hashable = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Lines that are alike.

    Attributes:
        name: their name, numbers that differ in braces.
        paths: their other names, the same numbers in braces.
        members: which lines they are.
    """

    name: str
    paths: tuple[str, ...]
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A component of a name that ends in a number, or in several numbers of lines that were merged."""

    stem: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        numbers = sorted(set(self.numbers))
        return f"{self.stem}{numbers[0]}" if len(numbers) == 1 else f"{self.stem}{{{ranges(numbers)}}}"


_Parts = tuple["str | _Numbered", ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    name: _Parts
    suffix: str
    paths: tuple[tuple[str, ...], ...]
    members: tuple[int, ...]


def gather(lines: Sequence[Line]) -> list[Group]:
    """Lines with those merged that differ in numbers of their names only; in order of the first of each.

    Numbers are merged one place of the name after the other, the last one first: where blocks of several stages are
    alike, `stages.{0..3}.blocks.{0..2}` stands for all of them.
    """
    rows = []
    for index, line in enumerate(lines):
        name, _, occurrence = line.name.partition("#")
        parts = tuple(map(_part, name.split(".")))
        suffix = f"#{occurrence}" if occurrence else ""
        rows.append(_Row(parts, suffix, tuple(tuple(path.split(".")) for path in line.paths), (index,)))
    for position in reversed(range(max((len(row.name) for row in rows), default=0))):
        merged: dict[Hashable, _Row] = {}
        for row in rows:
            part = row.name[position] if position < len(row.name) else ""
            if not isinstance(part, _Numbered):
                merged[row] = row
                continue
            before, after = row.name[:position], row.name[position + 1 :]
            masked = tuple(_masked(path, position, part) for path in row.paths)
            key = (before, part.stem, after, row.suffix, masked, lines[row.members[0]].rest)
            first = merged.get(key)
            if first is None:
                merged[key] = row
                continue
            own = first.name[position]
            assert isinstance(own, _Numbered)
            name = (*before, _Numbered(part.stem, (*own.numbers, *part.numbers)), *after)
            merged[key] = dataclasses.replace(first, name=name, members=(*first.members, *row.members))
        rows = list(merged.values())
    return [_group(row) for row in rows]


def _part(text: str) -> "str | _Numbered":
    match = _NUMBERED.fullmatch(text)
    return _Numbered(match[1] or "", (int(match[2]),)) if match and str(int(match[2])) == match[2] else text


def _masked(path: tuple[str, ...], position: int, part: _Numbered) -> tuple[str, ...]:
    """A path without the number that it shares with the name of its line."""
    if position < len(path) and path[position] == f"{part.stem}{part.numbers[0]}":
        return (*path[:position], f"{part.stem}*", *path[position + 1 :])
    return path


def _group(row: _Row) -> Group:
    paths = []
    for path in row.paths:
        parts = list(path)
        for position, part in enumerate(row.name[: len(parts)]):
            if isinstance(part, _Numbered) and parts[position] == f"{part.stem}{part.numbers[0]}":
                parts[position] = str(part)
        paths.append(".".join(parts))
    return Group(".".join(map(str, row.name)) + row.suffix, tuple(paths), row.members)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs written as such: 0..29, or 0,2,4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
