"""Passes on a trained program, each with its price: what it matched, and what parameters, bytes and loss became."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

import jax

import compax
from compax import text
from compax.experiments import checkpoint, programs
from compax.experiments.console import Console, amount
from compax.experiments.evaluate import Evaluation, Evaluator
from compax.instruments import Instrument, Journal, Measured
from compax.instruments import Step as PassStep
from compax.transform import Footprint, Pass, PassRecord, default, field_types


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pipeline did to a trained program.

    Attributes:
        program: The program that came out.
        before: Loss of the program that went in.
        footprint: Size of its parameters.
        records: What each pass did, in order.
        evaluations: Loss after each pass.
    """

    program: compax.Program
    before: Evaluation
    footprint: Footprint
    records: tuple[PassRecord, ...]
    evaluations: tuple[Evaluation, ...]

    def show(self, console: Console) -> None:
        """Prints a table with a line for each pass, and below it what the passes matched."""
        rows = [("(none)", "", *_size(self.footprint), *_loss(self.before), "")]
        for record, evaluation in zip(self.records, self.evaluations, strict=True):
            counts = [f"{record.count(s)} {s}" for s in ("rewritten", "matched", "skipped") if record.count(s)]
            rows.append(
                (_text(record), ", ".join(counts), *_size(record.after), *_loss(evaluation), f"{record.seconds:.2f}")
            )
        console.table(
            f"passes, evaluated on {self.before.tokens} tokens",
            ("pass", "sites", "parameters", "bytes (measured)", "loss (measured)", "perplexity", "seconds (measured)"),
            rows,
        )
        for record in self.records:
            for line in _matched(record):
                console.say(line)

    def save(self, directory: pathlib.Path, config: dict[str, Any]) -> None:
        """Writes the report as `compress.json` and the program into the folder `compressed`.

        Of several processes all call this; each one writes its part of the program, the first one the report.

        Raises:
            CheckpointError: It cannot be written.
        """
        compax.save(self.program, directory / checkpoint.COMPRESSED, config=config, overwrite=True)
        passes = [
            {
                "pass": record.text,
                "sites": [dataclasses.asdict(site) for site in record.sites],
                "parameters": record.after.parameters,
                "bytes": record.after.nbytes,
                "eval_loss": evaluation.loss,
                "eval_perplexity": evaluation.perplexity,
                "seconds": record.seconds,
            }
            for record, evaluation in zip(self.records, self.evaluations, strict=True)
        ]
        before = {
            "parameters": self.footprint.parameters,
            "bytes": self.footprint.nbytes,
            "eval_loss": self.before.loss,
        }
        report = {"before": before, "passes": passes}
        if jax.process_index() == 0:
            checkpoint.write_whole(directory / "compress.json", json.dumps(report, indent=2) + "\n")


def _size(footprint: Footprint) -> tuple[str, str]:
    return amount(footprint.parameters), amount(footprint.nbytes, "B")


def _loss(evaluation: Evaluation) -> tuple[str, str]:
    return f"{evaluation.loss:.4f}", f"{evaluation.perplexity:.2f}"


def _matched(record: PassRecord) -> list[str]:
    """Says in a line for each outcome which sites had it, grouped by kind, and why."""
    lines = []
    for status in ("rewritten", "matched", "skipped"):
        found = [site for site in record.sites if site.status == status]
        for reason in dict.fromkeys(site.reason for site in found):
            sites = [site for site in found if site.reason == reason]
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(site.kind for site in sites).items())
            names = ", ".join(site.name for site in sites[:3]) + (", ..." if len(sites) > 3 else "")
            lines.append(f"{_text(record)} {status} {kinds}: {names}{f' ({reason})' if reason else ''}")
    return [*lines, *(f"{_text(record)}: {note}" for note in record.notes)]


def _text(record: PassRecord) -> str:
    """Spells out a pass: its own options also where they have their defaults, unless those mean 'not used'."""
    pass_, types = record.pass_, field_types(type(record.pass_))
    common = {field.name: default(field) for field in dataclasses.fields(Pass)}
    written = []
    for field in dataclasses.fields(pass_):
        value = getattr(pass_, field.name)
        unsaid = value == common[field.name] if field.name in common else value in (None, False)
        if not unsaid:
            written.append(f"{field.name}={text.write(value, types[field.name])}")
    return f"{pass_.name}({', '.join(written)})"


class _Loss(Instrument):
    """Evaluates what every pass leaves."""

    def __init__(self, evaluator: Evaluator):
        self._evaluator = evaluator
        self.evaluations: list[Evaluation] = []

    def after(self, step: PassStep) -> Measured:
        """Evaluates the pass's result and adds the loss to its record."""
        evaluation = self._evaluator.of(step.result.program)
        self.evaluations.append(evaluation)
        return Measured({"eval_loss": evaluation.loss})


def compress(
    passes: str, program: compax.Program, evaluator: Evaluator, batch: dict[str, jax.Array], *, seed: int = 0
) -> Report:
    """Applies a pipeline to a trained program and measures the loss after each of its passes.

    Args:
        passes: The pipeline's text.
        program: With the entries `train` and `eval`.
        evaluator: Measures on the evaluation text.
        batch: A sample, for calibration and for the passes' contracts.
        seed: The passes' source of randomness.

    Raises:
        CompaxError: The pipeline is malformed, a pass failed or broke its contract.
    """
    pipeline = compax.Pipeline.parse(passes)
    before = evaluator.of(program)
    loss, journal = _Loss(evaluator), Journal()
    changed: Any = pipeline(program, batch, entry=programs.EVAL, instruments=[loss, journal], seed=seed)
    return Report(changed, before, Footprint.of(program), tuple(journal.records), tuple(loss.evaluations))
