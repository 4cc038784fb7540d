"""The pictures of a plan's page, as SVG: they take their colours from the page, for light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compax.experiments import plan_text
from compax.experiments.plan_predict import PHASES, Prediction
from compax.experiments.plan_report import Report
from compax.price import MEASURED, Pairs, price_rows
from compax.printing import bytes_text, flops_text

if TYPE_CHECKING:
    from compax.experiments.sweep import Point

COLOURS = {
    "parameters": "#5b8def",
    "optimizer state": "#9b7fe0",
    "other arguments": "#c3c7d1",
    "temporaries": "#f2a65a",
    "outputs": "#6cc3a0",
    "code": "#8a8f9c",
    "all-gather": "#5b8def",
    "reduce-scatter": "#6cc3a0",
    "all-reduce": "#e4708a",
    "all-to-all": "#9b7fe0",
    "permute": "#f2a65a",
    "compute": "#5b8def",
    "memory": "#f2a65a",
    "links that hide": "#b9e0cf",
    "links that wait": "#e4708a",
    "arguments": "#c3c7d1",
    "forward": "#5b8def",
    "recompute": "#9b7fe0",
    "backward": "#f2a65a",
    "update": "#6cc3a0",
}
"""The colour of each kind."""

_WIDTH = 900


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'


def _stacked(parts: Sequence[tuple[str, float, str]], most: float, label: str, limit: tuple[float, str] | None) -> str:
    """A bar of parts (kind, size, size in words), with a limit marked."""
    scale, drawn, place, legend = (_WIDTH - 40) / most if most else 0.0, list[str](), 20.0, 20.0
    row = 74.0
    for kind, size, words in parts:
        width = size * scale
        drawn.append(
            f'<rect x="{place:.2f}" y="20" width="{max(width, 0.5):.2f}" height="34" fill="{COLOURS[kind]}">'
            f"<title>{html.escape(f'{kind}: {words}')}</title></rect>"
        )
        place += width
        entry = f"{kind} {words}"
        if legend + len(entry) * 6.6 + 30 > _WIDTH:
            legend, row = 20.0, row + 20
        drawn.append(f'<rect x="{legend}" y="{row - 10}" width="11" height="11" fill="{COLOURS[kind]}"/>')
        drawn.append(_text(legend + 16, row, entry))
        legend += len(entry) * 6.6 + 36
    if limit is not None:
        x = 20 + limit[0] * scale
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="60" class="limit" stroke-width="2"/>')
        drawn.append(_text(x - 4, 12, limit[1], anchor="end"))
    return _svg(row + 14, drawn, label)


def memory(report: Report) -> str:
    """Memory of a device by kind, against what there is."""
    facts, memory, limit, shortage = report.facts, report.compiled.memory, report.limit_bytes, report.compiled.shortage
    sizes = {
        "parameters": facts.parameter_bytes,
        "optimizer state": facts.optimizer_bytes,
        "other arguments": facts.state_bytes + facts.batch_bytes,
    }
    if memory is not None:
        # Padding of layouts is the arguments' as well.
        sizes["other arguments"] += max(memory.arguments - facts.argument_bytes, 0)
        sizes |= {"temporaries": memory.temporaries, "outputs": memory.outputs, "code": memory.code}
    elif shortage is not None and shortage.needed is not None:
        sizes["temporaries"] = max(shortage.needed - facts.argument_bytes, 0)
    parts = [(kind, float(size), bytes_text(size)) for kind, size in sizes.items() if size]
    most = max(sum(sizes.values()), limit or 0)
    mark = None if limit is None else (float(limit), f"{bytes_text(limit)} there are")
    return _stacked(parts, most * 1.02, "memory of a device by kind", mark)


def timeline(report: Report, prediction: Prediction) -> str:
    """Bytes in memory after each step of the computation, by phase, with the compiler's peak and what there is."""
    left, right, top, bottom = 90.0, _WIDTH - 30.0, 26.0, 280.0
    marks = [("stroke", peak, f"compiler's peak {bytes_text(peak)} (compiled)") for peak in [report.peak_bytes] if peak]
    limit, floor = report.limit_bytes, report.facts.argument_bytes
    shortage = report.compiled.shortage
    if shortage is not None and shortage.needed is not None:
        marks.append(("stroke", shortage.needed, f"needed {bytes_text(shortage.needed)} (compiled)"))
    highest = max([*prediction.timeline, floor, *(size for _, size, _ in marks)])
    # What is there is drawn where that leaves the rest readable.
    if limit is not None and limit < 3 * highest:
        marks.append(("limit", limit, f"{bytes_text(limit)} there are"))
        highest = max(highest, limit)
    most, count = highest * 1.08, len(prediction.timeline)

    def y(size: float) -> float:
        return bottom - size / most * (bottom - top)

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="plot"/>']
    for part in range(6):
        size = most * part / 5
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{y(size):.1f}" y2="{y(size):.1f}" class="grid"/>')
        drawn.append(_text(left - 8, y(size) + 4, bytes_text(size), anchor="end", quiet=True))
    width = (right - left) / count
    for place, (size, phase) in enumerate(zip(prediction.timeline, prediction.phases, strict=True)):
        drawn.append(
            f'<rect x="{left + place * width:.2f}" y="{y(size):.1f}" width="{width + 0.3:.2f}" '
            f'height="{max(y(min(floor, size)) - y(size), 0.5):.1f}" fill="{COLOURS[phase]}">'
            f"<title>{html.escape(f'{phase}: {bytes_text(size)}')}</title></rect>"
        )
    drawn.append(
        f'<rect x="{left}" y="{y(floor):.1f}" width="{right - left}" height="{bottom - y(floor):.1f}" '
        f'fill="{COLOURS["arguments"]}"><title>arguments: {bytes_text(floor)}</title></rect>'
    )
    placed: list[float] = []
    for kind, size, words in sorted(marks, key=lambda mark: mark[1]):
        drawn.append(
            f'<line x1="{left}" x2="{right}" y1="{y(size):.1f}" y2="{y(size):.1f}" class="{kind}" stroke-width="1.5" '
            'stroke-dasharray="5 3"/>'
        )
        # Lines that are close have their words one above the other.
        place = min([y(size) - 5, *(other - 15 for other in placed[-1:])])
        placed.append(place)
        drawn.append(_text(right - 4, place, words, anchor="end"))
    place = left
    for kind in ("arguments", *(phase for phase in PHASES if phase in prediction.phases)):
        drawn.append(f'<rect x="{place}" y="{bottom + 14}" width="11" height="11" fill="{COLOURS[kind]}"/>')
        drawn.append(_text(place + 16, bottom + 24, kind))
        place += len(kind) * 6.6 + 40
    drawn.append(_text(right, bottom + 24, "in the order of the computation", anchor="end", quiet=True))
    return _svg(bottom + 36, drawn, "memory over the step")


def deltas(figures: Pairs) -> str:
    """Bars of what a pass left of each figure: all of it reaches to the line."""
    rows = [
        (label, after / before, change)
        for (name, (before, after)), (label, _, _, change, _) in zip(figures.items(), price_rows(figures), strict=True)
        if name not in MEASURED and before and after is not None
    ]
    if not rows:
        return ""
    scale = (_WIDTH - 330) / max(1.0, *(share for _, share, _ in rows))
    drawn: list[str] = []
    for place, (label, share, change) in enumerate(rows):
        y = 6 + place * 22
        colour = COLOURS["outputs"] if share < 1 else COLOURS["all-reduce"] if share > 1 else COLOURS["other arguments"]
        drawn.append(_text(212, y + 13, label, anchor="end"))
        drawn.append(f'<rect x="220" y="{y}" width="{max(share * scale, 0.5):.2f}" height="16" fill="{colour}"/>')
        drawn.append(_text(220 + share * scale + 6, y + 13, change, quiet=True))
    x, bottom = 220 + scale, 6 + len(rows) * 22
    drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" class="stroke" stroke-dasharray="4 3"/>')
    return _svg(bottom + 4, drawn, "what the pass left of each figure")


def collectives(report: Report) -> str:
    """What goes over links, by kind."""
    parts = [(kind, total.wire_bytes, bytes_text(total.wire_bytes)) for kind, total in report.totals.items()]
    return _stacked(parts, sum(size for _, size, _ in parts) * 1.02, "bytes over links by kind", None)


def times(report: Report) -> str:
    """What runs side by side, and what waits: bars on one scale of time."""
    times = report.times
    assert times is not None
    rows = [
        ("compute", times.compute, 0.0),
        ("memory", times.memory, 0.0),
        ("links that hide", times.hidden, 0.0),
        ("links that wait", times.waits, times.step - (times.waits or 0.0)),
    ]
    scale = (_WIDTH - 260) / times.step if times.step else 0.0
    drawn: list[str] = []
    for place, (kind, known, start) in enumerate(rows):
        y, seconds = 12 + place * 30, known or 0.0
        x = 130 + start * scale
        drawn.append(_text(122, y + 14, kind, anchor="end"))
        drawn.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(seconds * scale, 0.5):.2f}" height="20" fill="{COLOURS[kind]}"/>'
        )
        drawn.append(_text(x + seconds * scale + 6, y + 14, plan_text.seconds_text(known), quiet=True))
    x = 130 + times.step * scale
    drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="134" class="stroke" stroke-dasharray="4 3"/>')
    drawn.append(_text(x, 150, f"step: {plan_text.seconds_text(times.step)}", anchor="end"))
    return _svg(160, drawn, "where the time of a step goes")


def roofline(report: Report) -> str:
    """FLOPs for each byte, against what chip and memory allow, on logarithmic scales."""
    target, compiled = report.target, report.compiled
    flops, traffic = sum(compiled.flops.values()), compiled.traffic
    if not flops or not traffic:
        return '<p class="note">The step has no matrix products, or moves nothing.</p>'
    peak, bandwidth = target.rate(report.dtype).flops_per_second, target.device_memory_bandwidth
    intensity, ridge = flops / traffic, peak / bandwidth
    left, right, top, bottom = 110.0, _WIDTH - 30.0, 24.0, 300.0
    low = math.floor(math.log10(min(intensity, ridge))) - 1
    high = math.ceil(math.log10(max(intensity, ridge))) + 1
    ceiling = math.log10(peak) + 0.4
    floor = math.log10(bandwidth) + low

    def x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (right - left)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - floor) / (ceiling - floor) * (bottom - top)

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="plot"/>']
    for power in range(low, high + 1):
        place = x(10.0**power)
        drawn.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}" class="grid"/>')
        drawn.append(_text(place, bottom + 18, f"{10.0**power:g}", anchor="middle", quiet=True))
    for power in range(math.ceil(floor), math.floor(ceiling) + 1):
        place = y(10.0**power)
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" class="grid"/>')
        drawn.append(_text(left - 8, place + 4, f"{flops_text(10.0**power)}/s", anchor="end", quiet=True))
    drawn.append(
        f'<polyline class="stroke" stroke-width="2" points="{x(10.0**low):.1f},{y(10.0**floor):.1f} '
        f'{x(ridge):.1f},{y(peak):.1f} {right:.1f},{y(peak):.1f}"/>'
    )
    reached = min(peak, intensity * bandwidth)
    drawn.append(f'<circle cx="{x(intensity):.1f}" cy="{y(reached):.1f}" r="6" fill="#e4708a"/>')
    middle = "end" if x(intensity) > (left + right) / 2 else "start"
    shift = -12 if middle == "end" else 12
    words = f"the step: {intensity:.0f} FLOPs a byte, at most {flops_text(reached)}/s"
    drawn.append(_text(x(intensity) + shift, y(reached) + 22, words, anchor=middle))
    drawn.append(_text(right, y(peak) - 8, f"peak {flops_text(peak)}/s of {report.dtype}", anchor="end"))
    drawn.append(_text((left + right) / 2, bottom + 38, "FLOPs for each byte of memory traffic", anchor="middle"))
    return _svg(bottom + 50, drawn, "roofline of the step")


def pareto(points: Sequence[Point]) -> str:
    """Peak memory against device time of a token, for what fits."""
    from compax.experiments.sweep import best, coordinates

    front = best(points)
    found = [
        (index, point, place)
        for index, point in enumerate(points)
        if point.report is not None and (place := coordinates(point.report)) is not None
    ]
    if not found:
        return '<p class="no">None of them fits.</p>'
    left, right, top, bottom = 90.0, _WIDTH - 40.0, 20.0, 340.0
    most = (max(place[0] for *_, place in found) * 1.1, max(place[1] for *_, place in found) * 1.15)

    def x(value: float) -> float:
        return left + value / most[0] * (right - left)

    def y(value: float) -> float:
        return bottom - value / most[1] * (bottom - top)

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="plot"/>']
    for part in range(6):
        size, seconds = most[0] * part / 5, most[1] * part / 5
        drawn.append(_text(x(size), bottom + 18, bytes_text(size), anchor="middle", quiet=True))
        drawn.append(_text(left - 8, y(seconds) + 4, plan_text.seconds_text(seconds), anchor="end", quiet=True))
    line = sorted(place for index, _, place in found if index in front)
    drawn.append(
        '<polyline class="front" stroke-dasharray="4 3" points="'
        + " ".join(f"{x(size):.1f},{y(seconds):.1f}" for size, seconds in line)
        + '"/>'
    )
    for index, point, (size, seconds) in found:
        colour = "#1d7a46" if index in front else "#8a8f9c"
        drawn.append(
            f'<circle cx="{x(size):.1f}" cy="{y(seconds):.1f}" r="6" fill="{colour}">'
            f"<title>{html.escape(point.label)}</title></circle>"
        )
    taken: list[tuple[float, float]] = []
    for index, _, (size, seconds) in found:
        words = str(index + 1)
        places = [(x(size) + 9 + 20 * out, y(seconds) + 4 + up) for out in range(len(found)) for up in (-14, 14, 0)]
        # A number stands beside its point where no other number and no other point is.
        others = [(x(a) - 6, y(b) + 4) for other, _, (a, b) in found if other != index]
        free = (
            place
            for place in places
            if all(abs(place[0] - a) > 9 * len(words) + 8 or abs(place[1] - b) > 12 for a, b in [*taken, *others])
        )
        taken.append(next(free, places[0]))
        drawn.append(_text(*taken[-1], words))
    words = "peak memory (compiled) against device-seconds for a token (predicted), numbered as in the table"
    drawn.append(_text(left, bottom + 40, words))
    return _svg(bottom + 50, drawn, "plans by memory and time")
