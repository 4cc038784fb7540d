"""A plan, or a sweep of plans, as one HTML page: pictures and tables, no network, no library, nothing beside it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compax.experiments import plan_text
from compax.experiments.plan_report import Report
from compax.price import COLUMNS, MEASURED, Pairs, price_rows
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
}
"""The colour of each kind."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1d2129; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #e3e6ec; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; } td:first-child { white-space: nowrap; }
.mono { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #1d2129; }
svg .quiet { fill: #6a7180; } svg .edge { stroke: #1d2129; }
svg .ground { fill: #f7f8fa; } svg .grid { stroke: #e3e6ec; } :root { color-scheme: light dark; }
.yes { color: #1d7a46; } .no { color: #b3261e; } .note { color: #6a7180; }
@media (prefers-color-scheme: dark) {
  body { background: #15181d; color: #e4e7ec; } th, td { border-color: #353b45; } svg text { fill: #e4e7ec; }
  svg .quiet, .note { fill: #9aa3b2; color: #9aa3b2; } svg .edge { stroke: #e4e7ec; }
  svg .ground { fill: #1e232b; } svg .grid { stroke: #353b45; } .yes { color: #5fce91; } .no { color: #ff8a80; }
}
"""
_WIDTH = 900


def page(reports: Sequence[Report], points: Sequence[Point] = ()) -> str:
    """A page of one plan, or of a sweep with its plans.

    Args:
        reports: the plans.
        points: of the sweep that they belong to, if any.
    """
    parts: list[str] = []
    if points:
        parts += [f"<h1>{len(points)} plans</h1>", _pareto(points), _sweep_table(points)]
    names = [f"{index + 1}. {point.label}" for index, point in enumerate(points) if point.report is not None]
    for report, name in zip(reports, names or [""], strict=True):
        parts += _report(report, name)
    title = html.escape(reports[0].name if reports else "plans")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: plan</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _report(report: Report, name: str) -> list[str]:
    """One plan; in brief if it has a name within a sweep."""
    brief, heading = bool(name), "h2" if name else "h1"
    lower = "h3" if brief else "h2"
    lines = plan_text.head(report)
    fits = "yes" if report.fits else "no"
    parts = [f"<{heading}>{html.escape(f'{name}: {lines[0]}' if name else lines[0])}</{heading}>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in lines[1:-1]]
    parts.append(f'<p class="{fits}"><b>{html.escape(lines[-1])}</b></p>')
    parts += [f'<p class="note">Note: {html.escape(note)}.</p>' for note in plan_text.notes(report)]
    parts += [f"<{lower}>Memory of a device</{lower}>", _memory(report)]
    if brief:
        return parts
    parts.append(_table(("", "predicted", "compiled"), plan_text.memory_rows(report)))
    if report.facts.over_step.get("timeline"):
        parts += ["<h2>Memory over the step (predicted from the graph)</h2>", _over_step(report)]
        parts.append(_table(("size", "at the peak: site (phase)"), plan_text.alive_rows(report), mono=(1,)))
    if report.compiled.buffers:
        parts += ["<h2>Largest buffers (compiled)</h2>", _buffers(report)]
    parts += ["<h2>Largest parameters (predicted)</h2>", _parameters(report)]
    if report.totals:
        columns = ("kind", "count", "payload", "predicted", "on links", "seconds (predicted)")
        parts += ["<h2>Collectives of a device, one step (compiled)</h2>", _collectives(report)]
        parts.append(_table(columns, plan_text.collective_rows(report)))
    if report.fits:
        parts += ["<h2>Where the time goes (predicted)</h2>", _times(report)]
        parts.append(_table(("", "predicted", "compiled"), plan_text.step_rows(report)))
        parts += ["<h2>Roofline (predicted peaks, compiled work)</h2>", _roofline(report)]
        parts += ["<h2>Training (predicted)</h2>", _table(("", ""), plan_text.training_rows(report))]
    if report.facts.passes:
        parts += ["<h2>What each pass changed (predicted, all devices)</h2>", _passes(report)]
    parts += ["<h2>Where the chip's figures are from</h2>", _sources(report)]
    return parts


# -- Tables -----------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], mono: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="mono">{html.escape(cell)}</td>' if place in mono else f"<td>{html.escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _buffers(report: Report) -> str:
    rows = [(bytes_text(each.bytes), each.shape, each.op_name or each.name) for each in report.compiled.buffers]
    return _table(("size", "shape", "operation"), rows, mono=(1, 2))


def _passes(report: Report) -> str:
    """The price after each pass, as a share of that before the first one, and the figures."""
    found: list[str] = []
    for each in report.facts.passes:
        found += [f'<h3 class="mono">{html.escape(each["pass"])}</h3>', _deltas(each["figures"])]
        found.append(_table(COLUMNS, price_rows(each["figures"])))
        found += [f'<p class="note">Note: {html.escape(note)}.</p>' for note in each["notes"]]
    return "".join(found)


def _parameters(report: Report) -> str:
    rows = [
        (path, f"{form}{list(shape)}", spec, bytes_text(size)) for path, form, shape, spec, size in report.facts.largest
    ]
    return _table(("path", "stored as", "split", "on a device"), rows, mono=(0, 1, 2))


def _sources(report: Report) -> str:
    chip = report.target.chip
    return _table((chip.name, ""), [(name.replace("_", " "), source) for name, source in chip.sources.items()])


def _sweep_table(points: Sequence[Point]) -> str:
    from compax.experiments.sweep import best

    front = best(points)
    rows: list[tuple[str, ...]] = []
    for index, point in enumerate(points):
        report = point.report
        name = f"{'★ ' if index in front else ''}{index + 1}. {point.label}"
        if report is None:
            rows.append((name, f"not valid: {point.error}", "", ""))
        elif (times := report.times) is None or (peak := report.peak_bytes) is None:
            rows.append((name, plan_text.fits_text(report), "", ""))
        else:
            economy = report.economy()
            mfu = f"{economy.mfu:.1%}" if economy else ""
            rows.append((name, bytes_text(peak), plan_text.seconds_text(times.step), mfu))
    return _table(("settings", "peak of a device (compiled)", "step (predicted)", "MFU (predicted)"), rows, mono=(0,))


# -- Pictures ---------------------------------------------------------------------------------------------------------


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
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="60" stroke="#b3261e" stroke-width="2"/>')
        drawn.append(_text(x - 4, 12, limit[1], anchor="end"))
    return _svg(row + 14, drawn, label)


def _memory(report: Report) -> str:
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


def _over_step(report: Report) -> str:
    """Memory of a device while the step runs, beside what the compiler says and what there is."""
    points: list[int] = report.facts.over_step["timeline"]
    lines = [
        (float(size), f"{what}: {bytes_text(size)}", colour)
        for size, what, colour in (
            (report.peak_bytes, "needed (compiled)", "#e4708a"),
            (report.limit_bytes, "there are", "#b3261e"),
        )
        # A limit that is far away would flatten the picture.
        if size is not None and size <= 3 * max(points)
    ]
    left, right, top, bottom = 90.0, _WIDTH - 20.0, 24.0, 260.0
    most = max(max(points), *(size for size, _, _ in lines), 1.0) * 1.08

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top)

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="ground"/>']
    marks = [most * part / 5 for part in range(6)]
    drawn += [_text(left - 8, y(mark) + 4, bytes_text(mark), anchor="end", quiet=True) for mark in marks]
    step = (right - left) / max(len(points) - 1, 1)
    path = " ".join(f"{left + place * step:.1f},{y(size):.1f}" for place, size in enumerate(points))
    colour = COLOURS["parameters"]
    drawn.append(
        f'<polygon points="{left},{bottom} {path} {right},{bottom}" fill="{colour}" fill-opacity=".35" '
        f'stroke="{colour}"/>'
    )
    # Labels at opposite ends, so that lines that are close do not write over each other.
    for place, (size, words, stroke) in enumerate(lines):
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{y(size):.1f}" y2="{y(size):.1f}" stroke="{stroke}"/>')
        end = ("end", right - 6) if place else ("start", left + 6)
        drawn.append(_text(end[1], y(size) - 5, words, anchor=end[0]))
    drawn.append(
        _text((left + right) / 2, bottom + 18, "operations of the step, in order", anchor="middle", quiet=True)
    )
    return _svg(bottom + 28, drawn, "memory over the step")


def _deltas(figures: Pairs) -> str:
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
    drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" class="edge" stroke-dasharray="4 3"/>')
    return _svg(bottom + 4, drawn, "what the pass left of each figure")


def _collectives(report: Report) -> str:
    """What goes over links, by kind."""
    parts = [(kind, total.wire_bytes, bytes_text(total.wire_bytes)) for kind, total in report.totals.items()]
    return _stacked(parts, sum(size for _, size, _ in parts) * 1.02, "bytes over links by kind", None)


def _times(report: Report) -> str:
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
        y = 12 + place * 30
        words = plan_text.seconds_text(known)
        seconds = known or 0.0
        x = 130 + start * scale
        drawn.append(_text(122, y + 14, kind, anchor="end"))
        drawn.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(seconds * scale, 0.5):.2f}" height="20" fill="{COLOURS[kind]}"/>'
        )
        drawn.append(_text(x + seconds * scale + 6, y + 14, words, quiet=True))
    x = 130 + times.step * scale
    drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="134" class="edge" stroke-dasharray="4 3"/>')
    drawn.append(_text(x, 150, f"step: {plan_text.seconds_text(times.step)}", anchor="end"))
    return _svg(160, drawn, "where the time of a step goes")


def _roofline(report: Report) -> str:
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

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="ground"/>']
    for power in range(low, high + 1):
        place = x(10.0**power)
        drawn.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}" class="grid"/>')
        drawn.append(_text(place, bottom + 18, f"{10.0**power:g}", anchor="middle", quiet=True))
    for power in range(math.ceil(floor), math.floor(ceiling) + 1):
        place = y(10.0**power)
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}" class="grid"/>')
        drawn.append(_text(left - 8, place + 4, f"{flops_text(10.0**power)}/s", anchor="end", quiet=True))
    drawn.append(
        f'<polyline fill="none" class="edge" stroke-width="2" points="{x(10.0**low):.1f},{y(10.0**floor):.1f} '
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


def _pareto(points: Sequence[Point]) -> str:
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

    drawn = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" class="ground"/>']
    for part in range(6):
        size, seconds = most[0] * part / 5, most[1] * part / 5
        drawn.append(_text(x(size), bottom + 18, bytes_text(size), anchor="middle", quiet=True))
        drawn.append(_text(left - 8, y(seconds) + 4, plan_text.seconds_text(seconds), anchor="end", quiet=True))
    line = sorted(place for index, _, place in found if index in front)
    drawn.append(
        '<polyline fill="none" stroke="#1d7a46" stroke-dasharray="4 3" points="'
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
