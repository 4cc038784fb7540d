"""What would make a step fit that does not: changed configs, each with the memory that is predicted for its step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Generator, Iterator

import compax
from compax.errors import CompaxError, TargetError
from compax.experiments import programs
from compax.experiments.config import Config
from compax.experiments.plan_memory import predicted_peak
from compax.experiments.plan_report import Report
from compax.printing import bytes_text
from compax.target import Target
from compax.transform import PHASES, Pass

_SHOWN = 6
_FRACTIONS = (2, 4, 8, 16)

Peak = Callable[[Config, Target], int]
"""Bytes at the peak of a config's step on one device of a target. May raise `CompaxError`."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A change.

    Attributes:
        words: how to make it.
        config: with the change.
        target: likewise.
    """

    words: str
    config: Config
    target: Target


def shortage_text(report: Report, config: Config, peak: Peak = predicted_peak) -> str:
    """Says in one line by how much a step does not fit, and what would make it fit.

    Args:
        report: of a step with a shortage.
        config: what it was made of.
        peak: what predicts memory.
    """
    shortage = report.compiled.shortage
    assert shortage is not None
    what = f"a step of {report.name} on {report.target} does not fit"
    if shortage.needed is None or shortage.limit is None:
        lines = [line for line in shortage.message.splitlines() if line.strip()]
        return f"{what}: {lines[0] if lines else 'the compiler ran out of memory'}"
    over = shortage.needed - shortage.limit
    found = (
        f"{what}: it needs {bytes_text(shortage.needed)} of {bytes_text(shortage.limit)} on a chip, "
        f"{bytes_text(over)} too much (compiled)"
    )
    advice = advised(config, report.target, shortage.needed, shortage.limit, peak)
    return "; ".join([found, f"what would help: {advice[0]}", *advice[1:]] if advice else [found])


def advised(config: Config, target: Target, needed: int, limit: int, peak: Peak) -> list[str]:
    """Changes that make a step fit; or, where none does, those that come closest.

    Args:
        config: of the step.
        target: the slice.
        needed: bytes of one device, as compiled.
        limit: bytes that it has.
        peak: what predicts memory. What it says of the step as it is, against `needed`, corrects its other answers.
    """
    try:
        ratio = needed / peak(config, target)
    except CompaxError:
        ratio = 1.0
    found = list[tuple[int, str]]()
    for family in proposals(config, target):
        for proposal in family:
            try:
                with _quiet():
                    size = round(ratio * peak(proposal.config, proposal.target))
            except CompaxError:
                continue  # the change is not possible here
            if size < needed:
                found.append((size, proposal.words))
            if size <= limit:
                break
    fitting = [each for each in found if each[0] <= limit]
    return [
        f"{words}: {bytes_text(size)} predicted{'' if size <= limit else ', not enough alone'}"
        for size, words in (fitting or sorted(found))[:_SHOWN]
    ]


def proposals(config: Config, target: Target) -> Iterator[list[Proposal]]:
    """Changes to a train step that need less memory, in families: of each the first that is enough will do.

    More passes, all of them together last; a smaller batch, or smaller parts of it; a larger slice.
    """
    names = {pass_.name for pass_ in compax.Pipeline.parse(config.pipeline).passes}
    again = [] if "remat" in names or config.model.overrides.get("remat", False) else ["remat()"]
    chunks = [] if "tile_loss" in names else ["tile_loss()"]
    split = [] if "shard" in names else ["shard(fsdp=-1)"]
    here = split if target.num_devices > 1 else []
    singles = [[text] for text in (*here, *again, *chunks)]
    for texts in singles:
        yield [_with_passes(config, target, texts)]
    if len(singles) > 1:
        yield [_with_passes(config, target, [*here, *again, *chunks])]
    batch, parts = config.data.batch_size, config.optimizer.accumulation
    yield [_with_batch(config, target, batch // n, parts) for n in _FRACTIONS if batch % n == 0]
    yield [_with_batch(config, target, batch, parts * n) for n in _FRACTIONS if batch % (parts * n) == 0]
    larger = _larger(target)
    if larger is not None:
        laid = _with_passes(config, larger, split)
        laid.config.plan.topology = str(larger)
        yield [dataclasses.replace(laid, words=" with ".join([f"--topology={larger}", *split]))]


def _with_batch(config: Config, target: Target, batch: int, parts: int) -> Proposal:
    changed = programs.with_pipeline(config, config.pipeline)
    changed.data.batch_size, changed.optimizer.accumulation = batch, parts
    words = f"--batch={batch}" if batch != config.data.batch_size else f"--config.optimizer.accumulation={parts}"
    return Proposal(words, changed, target)


def _with_passes(config: Config, target: Target, texts: list[str]) -> Proposal:
    """A config with more passes, each after those of its phase and of the phases before."""
    passes = list(compax.Pipeline.parse(config.pipeline).passes)
    for pass_ in compax.Pipeline.parse(" | ".join(texts)).passes:
        before = [i for i, other in enumerate(passes) if _phase(other) <= _phase(pass_)]
        passes.insert(before[-1] + 1 if before else 0, pass_)
    changed = programs.with_pipeline(config, " | ".join(map(str, passes)))
    if any(text.startswith("shard") for text in texts):
        # What the pass lays replaces the mesh and the rules that were written by hand.
        changed.plan.mesh, changed.sharding.params, changed.sharding.optimizer = "", (), ()
    return Proposal(" | ".join(texts), changed, target)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without warnings of passes that have nothing to do in a program."""
    logger = logging.getLogger("compax")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _phase(pass_: Pass) -> int:
    return PHASES.index(pass_.phase) if pass_.phase in PHASES else -1


def _larger(target: Target) -> Target | None:
    """The same slice, twice as long in its shortest dimension; none if there is none."""
    shape = list(target.shape)
    shape[shape.index(min(shape))] *= 2
    try:
        return Target(target.chip, tuple(sorted(shape)), target.slices)
    except TargetError:
        return None
