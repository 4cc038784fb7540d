"""A plan, or a sweep of plans, as one HTML page: pictures and tables, no network, no library, nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compax.experiments import plan_pictures, plan_text
from compax.experiments.plan_report import Report
from compax.price import COLUMNS, price_rows
from compax.printing import bytes_text

if TYPE_CHECKING:
    from compax.experiments.sweep import Point

_STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --quiet: #6a7180; --line: #e3e6ec; --plot: #f7f8fa; --page: #ffffff;
  --yes: #1d7a46; --no: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ee; --quiet: #9aa3b2; --line: #363c48; --plot: #20252e;
  --page: #16191f; --yes: #5cc98a; --no: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--text);
  background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
td { font-variant-numeric: tabular-nums; white-space: pre; }
td.wide { white-space: normal; overflow-wrap: anywhere; }
.mono { font-family: ui-monospace, monospace; font-size: .85rem; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .quiet { fill: var(--quiet); } svg .plot { fill: var(--plot); } svg .grid { stroke: var(--line); }
svg .stroke { stroke: var(--text); fill: none; } svg .limit { stroke: var(--no); }
svg .front { stroke: var(--yes); fill: none; }
.yes { color: var(--yes); } .no { color: var(--no); } .note { color: var(--quiet); }
"""
_SITES = 12
_LONGEST = 160


def page(reports: Sequence[Report], points: Sequence[Point] = ()) -> str:
    """A page of one plan, or of a sweep with its plans.

    Args:
        reports: the plans.
        points: of the sweep that they belong to, if any.
    """
    parts: list[str] = []
    if points:
        parts += [f"<h1>{len(points)} plans</h1>", plan_pictures.pareto(points), _sweep_table(points)]
    named = [(report, "") for report in reports]
    if points:
        named = [(point.report, f"{index + 1}. {point.label}") for index, point in enumerate(points) if point.report]
    for report, name in named:
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
    parts += [f"<{lower}>Memory of a device</{lower}>", plan_pictures.memory(report)]
    if brief:
        return parts
    parts.append(_table(("", "predicted", "compiled"), plan_text.memory_rows(report)))
    parts += _over_the_step(report)
    if report.compiled.buffers:
        parts += ["<h2>Largest buffers (compiled)</h2>", _buffers(report)]
    parts += ["<h2>Largest parameters (predicted)</h2>", _parameters(report)]
    if report.totals:
        columns = ("kind", "count", "payload", "predicted", "on links", "seconds (predicted)")
        parts += ["<h2>Collectives of a device, one step (compiled)</h2>", plan_pictures.collectives(report)]
        parts.append(_table(columns, plan_text.collective_rows(report)))
    if report.fits:
        parts += ["<h2>Where the time goes (predicted)</h2>", plan_pictures.times(report)]
        parts.append(_table(("", "predicted", "compiled"), plan_text.step_rows(report)))
        parts += ["<h2>Roofline (predicted peaks, compiled work)</h2>", plan_pictures.roofline(report)]
        parts += ["<h2>Training (predicted)</h2>", _table(("", ""), plan_text.training_rows(report))]
    if report.facts.passes:
        parts += ["<h2>What each pass changed (predicted, all devices)</h2>", _passes(report)]
    parts += ["<h2>Where the chip's figures are from</h2>", _sources(report)]
    return parts


def _over_the_step(report: Report) -> list[str]:
    """Memory along the step, and what is there at the peak."""
    prediction = report.facts.prediction
    if prediction is None:
        return []
    parts = ["<h2>Memory over the step (predicted)</h2>"]
    if prediction.missing:
        return [*parts, f'<p class="note">Not predicted: {html.escape(prediction.missing)}.</p>']
    parts.append(plan_pictures.timeline(report, prediction))
    parts += ["<h2>Beside arguments at the peak, by site (predicted)</h2>"]
    columns = ("size", "number", "site", "phase", "largest")
    return [*parts, _table(columns, plan_text.held_rows(report)[:_SITES], mono=(2, 4))]


# -- Tables -----------------------------------------------------------------------------------------------------------


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], mono: Sequence[int] = (), wide: Sequence[int] = ()
) -> str:
    """A table; cells of the columns `mono` are in letters of one width, those of `wide` may be broken."""

    def kind(place: int) -> str:
        classes = ["mono"] * (place in mono) + ["wide"] * (place in wide)
        return f' class="{" ".join(classes)}"' if classes else ""

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind(place)}>{html.escape(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _buffers(report: Report) -> str:
    rows = [
        (bytes_text(each.bytes), each.shape, plan_text.operation_text(each.op_name or each.name, most=_LONGEST))
        for each in report.compiled.buffers
    ]
    return _table(("size", "shape", "operation"), rows, mono=(1, 2), wide=(2,))


def _passes(report: Report) -> str:
    """The price after each pass, as a share of that before the first one, and the figures."""
    found: list[str] = []
    for each in report.facts.passes:
        found += [f'<h3 class="mono">{html.escape(each["pass"])}</h3>', plan_pictures.deltas(each["figures"])]
        found.append(_table(COLUMNS, price_rows(each["figures"])))
        found += [f'<p class="note">Note: {html.escape(note)}.</p>' for note in each["notes"]]
    if (words := plan_text.exchange_note(report)) is not None:
        found.append(f'<p class="note">Note: {html.escape(words)}.</p>')
    return "".join(found)


def _parameters(report: Report) -> str:
    rows = [
        (path, f"{form}{list(shape)}", spec, bytes_text(size)) for path, form, shape, spec, size in report.facts.largest
    ]
    return _table(("path", "stored as", "split", "on a device"), rows, mono=(0, 1, 2))


def _sources(report: Report) -> str:
    chip = report.target.chip
    return _table(
        (chip.name, ""), [(name.replace("_", " "), source) for name, source in chip.sources.items()], wide=(1,)
    )


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
