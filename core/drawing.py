"""A drawing of what a program means: composites as boxes on its residual streams, as SVG and as a page.

The streams are the spines, top to bottom; each part of the model hangs off its spine, between where it reads the stream
and the plus sign at which it adds to it. Equal layers are drawn once. No library and no network is needed to draw or to
look: text is monospaced, so that what fits is known.
"""

import dataclasses
import html
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from compax import printing
from compax.composites.base import Attention, Composite, Normalization
from compax.composites.streams import Residual, on_the_way
from compax.gathering import ranges
from compax.meaning_text import axes_text, composites_text

if TYPE_CHECKING:
    from compax.analysis.normal import Node
    from compax.meaning import Meaning
    from compax.program import Program
    from compax.raising import Site

FILLS = {
    "attention": "#cfe3ff",
    "feed_forward": "#d7f2d0",
    "experts": "#ffe2b8",
    "normalization": "#e9e9ee",
    "embedding": "#f3d9f7",
    "linear": "#fff3b0",
    "convolution": "#c9f0ee",
    "matmul": "#f7cfcf",
}
"""The colour of each kind of box."""

_FONT, _SMALL, _ADVANCE = 12, 10.5, 0.61
_BOX, _PAD, _GAP, _LINE = 272, 8, 12, 15
_LANE, _MARGIN, _INDENT = 372, 24, 46


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A program as a picture.

    Attributes:
        svg: the picture, as an SVG document.
        html: a page with the picture, the composites and the axes, that needs nothing else.
    """

    svg: str
    html: str

    def save(self, path: str) -> None:
        """Writes the picture or the page, as the file's ending says: `.svg` or `.html`.

        Raises:
            ValueError: it ends otherwise.
        """
        text = {".svg": self.svg, ".html": self.html}.get(pathlib.PurePath(path).suffix)
        if text is None:
            raise ValueError(f"'{path}' ends neither in .svg nor in .html: a drawing is one of these")
        pathlib.Path(path).write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        return self.svg


@dataclasses.dataclass(frozen=True)
class _Box:
    """What is drawn of a composite or site.

    Attributes:
        kind: its kind, which gives the colour.
        title: the last part of its name.
        lines: what else is written in it.
        tooltip: all there is to say.
        key: what equal boxes of other layers have in common.
        cross: whether it reads another stream.
        share: its share of the program's FLOPs.
        formats: how its parameters are stored.
    """

    kind: str
    title: str
    lines: tuple[str, ...]
    tooltip: str
    key: tuple[str, ...]
    cross: bool = False
    share: float = 0.0
    formats: str = ""

    @property
    def height(self) -> int:
        return 2 * _PAD + _LINE * (1 + len(self.lines) + bool(self.share))

    def written(self, times: int) -> tuple[str, ...]:
        """What is written in it below the title, where it stands for several equal ones."""
        flops = f"{printing.share_text(min(self.share * times, 1.0))} of FLOPs"
        return (*self.lines, *([", ".join(filter(None, (self.formats, flops)))] if self.share else []))


@dataclasses.dataclass
class _Branch:
    """One addition to a stream, with the boxes on its way; or boxes on the spine itself, without an addition."""

    boxes: list[_Box]
    adds: bool
    layer: str
    times: int = 1
    loop: bool = False
    names: tuple[int, ...] = ()

    @property
    def signature(self) -> tuple[Any, ...]:
        return (self.adds, *(box.key for box in self.boxes))


def draw(program: "Program", entry: str | None = None) -> Drawing:
    """Draws an entry of a program.

    Args:
        program: the program; its parameters may be shapes.
        entry: which entry; the first one by default.

    Raises:
        SignatureError: there is no such entry.
    """
    meaning = program.meaning(entry)
    lanes = _lanes(program, meaning, _boxes(program, meaning, entry))
    svg = _Canvas(program.name, lanes).document()
    return Drawing(svg, _page(program, entry, svg))


# -- What is drawn ----------------------------------------------------------------------------------------------------


def _boxes(program: "Program", meaning: "Meaning", entry: str | None) -> list[tuple[_Box, "Node"]]:
    """A box for each composite, and for each site that belongs to none, with the node that gives its result."""
    sites = {site.path: site for site in program.sites(entry)}
    total = sum(site.flops for site in sites.values()) or 1
    nodes = {node.path: node for node in meaning.view.normal.nodes}
    taken = meaning.owners()
    flops: dict[str, int] = {}
    for path, site in sites.items():
        if path in taken:
            flops[taken[path].name] = flops.get(taken[path].name, 0) + site.flops
    result: list[tuple[_Box, Node]] = []
    for composite in meaning.composites:
        if composite.output.node is not None:
            share = flops.get(composite.name, 0) / total
            result.append((_composite_box(program, composite, share), composite.output.node))
    for path, site in sites.items():
        if path not in taken and path in nodes:
            result.append((_site_box(program, site, site.flops / total), nodes[path]))
    return sorted(result, key=lambda item: item[1].number)


def _composite_box(program: "Program", composite: Composite, share: float) -> _Box:
    lines = composite.summary()
    stored = [program.params[path] for path in composite.parameters if path in program.params]
    formats = sorted({printing.format_text(x).partition("[")[0] for x in stored})
    described = [f"{name}: {text}" for name, text in composite.facts().items()]
    kind = composite.kind
    return _Box(
        kind,
        _title(composite.name, kind),
        lines,
        "\n".join([f"{composite.name} ({kind})", *described, *composite.parameters]),
        (kind, _masked(composite.name), *lines),
        isinstance(composite, Attention) and composite.cross,
        0.0 if isinstance(composite, Normalization) else share,
        ", ".join(formats),
    )


def _site_box(program: "Program", site: "Site", share: float) -> _Box:
    uses = [f"{_last(use.parameter)} {printing.format_text(program.params[use.parameter])}" for use in site.uses]
    tooltip = "\n".join([f"{site.name} ({site.kind})", *(use.parameter for use in site.uses)])
    return _Box(
        site.kind,
        _title(site.name, site.kind),
        tuple(uses),
        tooltip,
        (site.kind, _masked(site.name), *uses),
        share=share,
    )


def _title(name: str, kind: str) -> str:
    """The last part of a name that says more than the kind, and the kind."""
    parts = name.split(".")
    while parts and parts[-1].partition("#")[0] == kind:
        parts.pop()
    word = kind.replace("_", " ")
    return f"{_last('.'.join(parts))} · {word}" if parts else word


def _last(name: str) -> str:
    parts = name.split(".")
    return parts[-1] if not parts[-1].isdigit() or len(parts) == 1 else ".".join(parts[-2:])


def _masked(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)


def _layer(names: Iterable[str]) -> tuple[str, int]:
    """The part of names before their first number, and that number; -1 without one."""
    for name in names:
        match = re.match(r"(.*?)(?<![^.])(\d+)(?![^.])", name)
        if match:
            return match[1], int(match[2])
    return "", -1


def _lanes(program: "Program", meaning: "Meaning", boxes: Sequence[tuple[_Box, "Node"]]) -> list[list[_Branch]]:
    """A list of branches for each stream; one list where there is no stream."""
    streams = meaning.streams
    names = {composite.output.node: composite.name for composite in meaning.composites}
    owner: dict[Any, tuple[int, int]] = {}
    for lane, stream in enumerate(streams):
        for index, residual in enumerate(stream):
            for node in on_the_way(residual):
                owner.setdefault(node, (lane, index))
    lanes: list[list[tuple[int, _Branch]]] = [[] for _ in range(max(1, len(streams)))]
    places = _Places(meaning, streams)
    hanging: dict[tuple[int, int], _Branch] = {}
    for box, node in boxes:
        place = owner.get(node)
        if place is not None:
            branch = hanging.get(place)
            if branch is None:
                loops = bool(node.loops)
                times = node.loops[0] if loops and node.loops[0] else 1
                branch = hanging[place] = _Branch([], True, "", times, loops)
                lanes[place[0]].append((streams[place[0]][place[1]].node.number, branch))
            branch.boxes.append(box)
            branch.layer, number = _layer([names.get(node, box.tooltip.partition(" ")[0])])
            branch.names = (number,) if number >= 0 else branch.names
        else:
            lane = places.of(node)
            lanes[lane].append((node.number, _Branch([box], False, "")))
    return [_collapsed([branch for _, branch in sorted(lane, key=lambda item: item[0])]) for lane in lanes]


class _Places:
    """Which stream a box outside of all branches belongs to: the one that it feeds, or else the one that it reads."""

    def __init__(self, meaning: "Meaning", streams: Sequence[Sequence[Residual]]):
        view = meaning.view
        self.feeds = [
            {x.node for x in view.upstream(stream[0].stream, lambda node: True, limit=1 << 20)} for stream in streams
        ]
        self.ends = {stream[-1].node: lane for lane, stream in enumerate(streams)}
        self.view = view

    def of(self, node: "Node") -> int:
        """The number of the stream."""
        for lane, feeding in enumerate(self.feeds):
            if node in feeding:
                return lane
        through = lambda upstream: upstream not in self.ends  # noqa: E731
        found = self.view.upstream(node.outputs[0], through, limit=1 << 20)
        return max((self.ends[x.node] for x in found if x.node in self.ends), default=0)


def _collapsed(branches: list[_Branch]) -> list[_Branch]:
    """Branches with equal layers in a row drawn once."""
    groups: list[list[_Branch]] = []
    for branch in branches:
        same = groups and branch.names and groups[-1][-1].names == branch.names and groups[-1][-1].layer == branch.layer
        if same:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    result: list[list[_Branch]] = []
    for group in groups:
        signature = [branch.signature for branch in group]
        if result and group[0].names and [branch.signature for branch in result[-1]] == signature:
            for branch, other in zip(result[-1], group, strict=True):
                branch.times += 1
                branch.names = (*branch.names, *other.names)
        else:
            result.append(group)
    return [branch for group in result for branch in group]


# -- Drawing ----------------------------------------------------------------------------------------------------------


class _Canvas:
    """Lays lanes out side by side and writes the SVG."""

    def __init__(self, name: str, lanes: Sequence[Sequence[_Branch]]):
        self.name = name
        self.lanes = lanes
        self.frames: list[str] = []
        self.parts: list[str] = []
        self.height = 0
        self.crossings: list[tuple[int, int, int]] = []
        self.ends: list[tuple[int, int]] = []

    def document(self) -> str:
        top = 96
        for lane, branches in enumerate(self.lanes):
            self.lane(lane, branches, top)
        self.arrows()
        width = 2 * _MARGIN + _LANE * len(self.lanes)
        body = "\n".join([self.legend(width), *self.frames, *self.parts])
        height = self.height + _MARGIN
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="{_FONT}">\n'
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
        )

    def legend(self, width: int) -> str:
        used = {box.kind for lane in self.lanes for branch in lane for box in branch.boxes}
        parts = [self.text(_MARGIN, 28, self.name, 16, width - 2 * _MARGIN, weight="bold")]
        x, y = _MARGIN, 44
        for kind, fill in FILLS.items():
            label = kind.replace("_", " ")
            step = 22 + round(len(label) * _SMALL * _ADVANCE) + 12
            if kind not in used:
                continue
            if x + step > width - _MARGIN:
                x, y = _MARGIN, y + 18
            parts.append(f'<rect x="{x}" y="{y}" width="13" height="13" rx="3" fill="{fill}" stroke="#777"/>')
            parts.append(self.text(x + 18, y + 11, label, _SMALL, step))
            x += step
        return "\n".join(parts)

    def lane(self, lane: int, branches: Sequence[_Branch], top: int) -> None:
        spine = _MARGIN + lane * _LANE + 22
        y = top
        start = len(self.parts)
        index = 0
        while index < len(branches):
            group = [branches[index]]
            framed = branches[index].times > 1
            while framed and index + len(group) < len(branches):
                other = branches[index + len(group)]
                if (other.times, other.names, other.layer, other.loop) != (
                    group[0].times, group[0].names, group[0].layer, group[0].loop
                ):  # fmt: skip
                    break
                group.append(other)
            if framed:
                y = self.frame(lane, spine, y, group)
            else:
                y = self.branch(lane, spine, y, group[0])
            index += len(group)
        line = f'<line x1="{spine}" y1="{top - 14}" x2="{spine}" y2="{y}" stroke="#444" stroke-width="4"/>'
        self.parts.insert(start, line)
        self.parts.append(f'<path d="M{spine - 7} {y} h14 l-7 11 z" fill="#444"/>')
        self.ends.append((spine, y))
        self.height = max(self.height, y + 20)

    def frame(self, lane: int, spine: int, y: int, group: Sequence[_Branch]) -> int:
        """Equal layers, drawn once, in a frame that says how many there are."""
        top = y
        y += 24
        for branch in group:
            y = self.branch(lane, spine, y, branch)
        numbers = sorted(set(group[0].names))
        which = f"{group[0].layer}{{{ranges(numbers)}}}" if len(numbers) > 1 else group[0].layer.rstrip(".")
        caption = f"{which or 'layers'} × {group[0].times}{' (scan)' if group[0].loop else ''}"
        width = _LANE - 14
        self.frames.append(
            f'<rect x="{spine - 18}" y="{top}" width="{width}" height="{y - top}" rx="9" fill="#fafafa" stroke="#bbb" '
            f'stroke-dasharray="5 4"/>'
        )
        self.parts.append(self.text(spine + 14, top + 17, caption, _SMALL, width - 40, weight="bold"))
        return y + _GAP

    def branch(self, lane: int, spine: int, y: int, branch: _Branch) -> int:
        """Boxes beside the spine, and the plus at which they join it; or boxes on it."""
        x = spine + _INDENT if branch.adds else spine + 18
        first = y + 8
        middle = x + _BOX / 2
        if branch.adds:
            self.parts.append(
                f'<path d="M{spine} {y} H{middle} V{first + 4}" fill="none" stroke="#888" stroke-width="1.5"/>'
            )
        else:
            self.parts.append(f'<line x1="{spine}" y1="{first + 14}" x2="{x}" y2="{first + 14}" stroke="#888"/>')
        y = first
        for position, box in enumerate(branch.boxes):
            if position:
                self.parts.append(f'<line x1="{middle}" y1="{y - _GAP}" x2="{middle}" y2="{y}" stroke="#888"/>')
            self.box(lane, x, y, box, 1 if branch.loop else branch.times)
            y += box.height + _GAP
        if branch.adds:
            join = y + 8
            self.parts.append(
                f'<path d="M{middle} {y - _GAP} V{join} H{spine + 9}" fill="none" stroke="#888" stroke-width="1.5"/>'
                f'<circle cx="{spine}" cy="{join}" r="9" fill="#fff" stroke="#444" stroke-width="2"/>'
                f'<path d="M{spine - 5} {join} h10 M{spine} {join - 5} v10" stroke="#444" stroke-width="2"/>'
            )
            y = join + 16
        return y

    def box(self, lane: int, x: int, y: int, box: _Box, times: int) -> None:
        fill = FILLS.get(box.kind, "#eeeeee")
        room = _BOX - 2 * _PAD
        self.parts.append(
            f"<g><title>{html.escape(box.tooltip)}</title>"
            f'<rect x="{x}" y="{y}" width="{_BOX}" height="{box.height}" rx="6" fill="{fill}" stroke="#666"/>'
        )
        self.parts.append(self.text(x + _PAD, y + _PAD + 11, box.title, _FONT, room, weight="bold"))
        for number, line in enumerate(box.written(times), start=1):
            self.parts.append(self.text(x + _PAD, y + _PAD + 11 + number * _LINE, line, _SMALL, room))
        self.parts.append("</g>")
        if box.cross:
            self.crossings.append((lane, x, y + box.height // 2))

    def arrows(self) -> None:
        """From the end of the stream before to what reads it."""
        for lane, x, y in self.crossings:
            if lane == 0:
                continue
            spine, end = self.ends[lane - 1]
            turn = x - _INDENT - 33
            self.parts.append(
                f'<path d="M{spine} {end + 11} V{end + 16} H{turn} V{y} H{x - 7}" fill="none" stroke="#c2571a" '
                f'stroke-width="1.5" stroke-dasharray="6 4"/><path d="M{x - 8} {y - 5} v10 l8 -5 z" fill="#c2571a"/>'
            )

    @staticmethod
    def text(x: float, y: float, text: str, size: float, room: float, *, weight: str = "normal") -> str:
        fitted = shortened(text, size, room)
        extra = f"<title>{html.escape(text)}</title>" if fitted != text else ""
        return (
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" fill="#1b1b1b">{extra}'
            f"{html.escape(fitted)}</text>"
        )


def shortened(text: str, size: float, room: float) -> str:
    """As much of a text as fits a number of pixels, with an ellipsis if that is not all of it."""
    fits = int(room / (size * _ADVANCE))
    return text if len(text) <= fits else f"{text[: max(fits - 1, 0)]}…"


def _page(program: "Program", entry: str | None, svg: str) -> str:
    views = (("Composites", composites_text(program, entry)), ("Axes", axes_text(program, entry)))
    details = "\n".join(
        f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" for title, text in views
    )
    name = html.escape(program.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        "<style>body{margin:24px;font-family:system-ui,sans-serif;background:#f4f4f6;color:#1b1b1b}"
        "svg{max-width:100%;height:auto;border:1px solid #ddd;border-radius:8px}"
        "pre{overflow-x:auto;background:#fff;border:1px solid #ddd;border-radius:8px;padding:12px}"
        "summary{cursor:pointer;margin:12px 0;font-weight:600}</style></head>\n"
        f"<body>\n{svg}\n{details}\n</body></html>\n"
    )
