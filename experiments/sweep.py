"""Plans for every combination of settings, side by side: `compax plan --sweep`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from compax import metrics
from compax.errors import CompaxError, ConfigError
from compax.experiments import config as configs
from compax.experiments import plan, plan_text
from compax.experiments.config import Config
from compax.experiments.console import Console, amount
from compax.experiments.plan_report import Report
from compax.printing import bytes_text

SHORT: Mapping[str, str] = {
    "batch": "data.batch_size",
    "sequence": "data.sequence_length",
    "remat": "model.overrides.remat",
}
"""Short names of config fields in a sweep."""

_OPTIONS = ("topology", "mesh")


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of settings.

    Attributes:
        settings: texts by name, as they were given.
        report: what its plan found; None if the combination is not valid.
        error: why it is not valid, or empty.
    """

    settings: Mapping[str, str]
    report: Report | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """The settings in one line."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())

    def to_json(self) -> dict[str, Any]:
        """The point as JSON."""
        report = None if self.report is None else self.report.to_json()
        return {"settings": dict(self.settings), "report": report, "error": self.error or None}


def parse(texts: Sequence[str]) -> list[dict[str, str]]:
    """Reads a sweep, such as `["batch=16,32", "mesh=data=16|data=4,model=4"]`: all combinations, the last fastest.

    Raises:
        ConfigError: a setting is malformed, unknown or there twice.
    """
    choices: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep {text}: write NAME=VALUE,VALUE as in batch=16,32")
        if name in choices:
            raise ConfigError(f"--sweep {text}: '{name}' is there twice")
        field = SHORT.get(name, name)
        if name not in _OPTIONS and field not in configs.FIELDS and not field.startswith("model.overrides."):
            near = configs.closest(name, [*SHORT, *_OPTIONS, *configs.FIELDS])
            raise ConfigError(f"--sweep {text}: there is no setting '{name}'{near}")
        # A mesh has commas of its own: of those there is one, unless bars stand between several.
        separator = "|" if "|" in values or name == "mesh" else ","
        choices[name] = [value.strip() for value in values.split(separator) if value.strip()]
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def sweep(config: Config, options: plan.Options, texts: Sequence[str], console: Console) -> list[Point]:
    """Plans all combinations one after another, prints a table, and writes the files that were asked for.

    A combination that is not valid, or does not fit, is a row that says so.

    Raises:
        CompaxError: the sweep is malformed, or there is no compiler.
    """
    plan.check_writable(options.json, options.html)
    if options.hlo is not None:
        raise ConfigError("--hlo keeps the compiled text of one plan: leave it out of a sweep")
    combinations = parse(texts)
    points: list[Point] = []
    for number, settings in enumerate(combinations, start=1):
        point = Point(settings)
        with plan.progress(console, f"{number} of {len(combinations)}, {point.label}") as tell:
            points.append(_planned(config, options, settings, tell))
    show(points, console)
    if options.json is not None:
        plan.write(options.json, json.dumps({"points": [point.to_json() for point in points]}, indent=1) + "\n")
        console.say(f"figures: {options.json}")
    if options.html is not None:
        from compax.experiments.plan_page import page

        plan.write(options.html, page([point.report for point in points if point.report is not None], points))
        console.say(f"page: {options.html}")
    return points


def _planned(config: Config, options: plan.Options, settings: Mapping[str, str], tell: plan.Tell) -> Point:
    changed = configs.from_json(configs.to_json(config), where="the config")
    chosen = {name: value for name, value in settings.items() if name in _OPTIONS}
    try:
        for name, value in settings.items():
            if name not in _OPTIONS:
                configs.override(changed, SHORT.get(name, name), value)
        configs.check(changed)
        return Point(settings, plan.make_report(changed, dataclasses.replace(options, **chosen), tell))
    except CompaxError as error:
        return Point(settings, error=" ".join(str(error).split()))


def best(points: Sequence[Point]) -> tuple[int, ...]:
    """The points that no other beats in both memory and time of a token: their places in `points`."""
    fitting = [index for index, point in enumerate(points) if _axes(point) is not None]
    coordinates = [_axes(points[index]) or (0.0, 0.0) for index in fitting]
    if not fitting:
        return ()
    return tuple(fitting[place] for place in metrics.pareto_set(coordinates, ("min", "min")))


def _axes(point: Point) -> tuple[float, float] | None:
    """Peak memory and predicted cost of a token (device seconds), of a point that fits."""
    return None if point.report is None else coordinates(point.report)


def coordinates(report: Report) -> tuple[float, float] | None:
    """Peak memory of a device in bytes, and predicted device-seconds for a token; None for what does not fit."""
    times, peak = report.times, report.peak_bytes
    if times is None or peak is None:
        return None
    return float(peak), times.step * report.devices / report.facts.tokens


def show(points: Sequence[Point], console: Console) -> None:
    """Prints the table of a sweep."""
    names = list(points[0].settings) if points else []
    front = best(points)
    rows: list[list[str]] = []
    notes: list[str] = []
    for index, point in enumerate(points):
        row = [("* " if index in front else "  ") + point.settings[names[0]], *(point.settings[n] for n in names[1:])]
        report = point.report
        if report is None:
            notes.append(f"{point.label}: {point.error}")
            rows.append([*row, f"not valid ({len(notes)})", "", "", "", ""])
            continue
        times, economy, peak = report.times, report.economy(), report.peak_bytes
        if times is None or economy is None or peak is None:
            rows.append([*row, plan_text.fits_text(report).partition(" (")[0], "", "", "", ""])
            continue
        rows.append(
            [
                *row,
                bytes_text(peak),
                plan_text.seconds_text(times.step),
                times.bound,
                f"{economy.mfu:.1%}",
                amount(economy.tokens_per_second),
            ]
        )
    columns = [*names, "peak (compiled)", "step", "bound by", "MFU", "tokens/s"]
    console.table("sweep: peak memory compiled, the rest predicted; * no other is better in both", columns, rows)
    for number, note in enumerate(notes, start=1):
        console.say(f"({number}) {note}")
