"""A plan's figures: what was compiled, and what follows from it for time, money and energy.

Every figure carries how it was come by: `predicted` (from shapes, the graph, or the chip's table), `compiled` (said by
the compiler, or counted in what it made) or `measured` (by a clock).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from compax import metrics
from compax.analysis.hlo import Collective, Total, by_kind
from compax.analysis.times import Times
from compax.experiments.plan_build import Facts
from compax.target import Target
from compax.tpu import Compiled

TOKENS_PER_PARAMETER = 20
"""Tokens to train on for each parameter, unless told: Hoffmann et al., "Training Compute-Optimal Large Language
Models", 2022, arXiv 2203.15556."""

PUE = 1.1
"""Power usage effectiveness, for energy: `compax.metrics.energy_kwh`."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a plan found.

    Attributes:
        name: of the experiment.
        target: the slice.
        axes: of the mesh: sizes by name.
        pipeline: passes of the program.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        facts: what was known before compiling.
        compiled: what the compiler made.
        tokens: to train on.
        chosen: what passes said of what they chose by themselves.
        quick: compiled with the least of the compiler's effort.
    """

    name: str
    target: Target
    axes: Mapping[str, int]
    pipeline: str
    batch_size: int
    sequence_length: int
    facts: Facts
    compiled: Compiled
    tokens: float
    chosen: tuple[str, ...] = ()
    quick: bool = False

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.compiled.shortage is None

    @property
    def devices(self) -> int:
        """Devices that the step runs on."""
        return math.prod(self.axes.values())

    @property
    def peak_bytes(self) -> int | None:
        """The most memory of a device at any time; None for a program that does not fit.

        The compiler's own peak; that of a CPU leaves out temporaries, so there it is what is set aside.
        """
        memory = self.compiled.memory
        if memory is None:
            return None
        return memory.allocated if self.target.chip.platform == "cpu" else memory.peak

    @property
    def limit_bytes(self) -> int | None:
        """Memory of a device that a program can have: the compiler's word if it gave it, else the chip's table's."""
        if self.compiled.shortage is not None and self.compiled.shortage.limit is not None:
            return self.compiled.shortage.limit
        return None if self.target.chip.platform == "cpu" else self.target.device_memory_bytes

    @property
    def totals(self) -> dict[str, Total]:
        """Collectives by kind."""
        return by_kind(self.compiled.collectives)

    def seconds(self, collective: Collective) -> float | None:
        """Predicted seconds of one execution of a collective; None if nothing is known of the links."""
        return collective_seconds(self.target, collective)

    def kind_seconds(self, kind: str) -> float | None:
        """Predicted seconds of all collectives of a kind in a step; None if nothing is known of the links."""
        return _sum(self.target, [found for found in self.compiled.collectives if found.kind == kind])

    @property
    def times(self) -> Times | None:
        """Where the time of a step goes; None for a program that does not fit."""
        if not self.fits:
            return None
        share = self._sharing
        work = {dtype: flops * share for dtype, flops in self.compiled.flops.items()}
        roofline = self.target.roofline(work, self.compiled.traffic * share)
        apart = [found for found in self.compiled.collectives if found.asynchronous]
        awaited = [found for found in self.compiled.collectives if not found.asynchronous]
        compute = sum(roofline.compute_seconds.values())
        return Times(compute, roofline.memory_seconds, _sum(self.target, apart), _sum(self.target, awaited))

    @property
    def graph_seconds(self) -> float | None:
        """Predicted seconds of a step by its graph, kernel by kernel; None for the loss alone."""
        prediction = self.facts.prediction
        return None if prediction is None else prediction.seconds * self._sharing

    @property
    def _sharing(self) -> int:
        """How many devices share a chip's speed: those that a CPU stands for do."""
        return self.devices if self.target.chip.platform == "cpu" else 1

    @property
    def dtype(self) -> str:
        """The dtype of most matrix products."""
        return max(self.compiled.flops, key=lambda dtype: self.compiled.flops[dtype], default="bfloat16")

    def economy(self) -> Economy | None:
        """What training costs; None for a program that does not fit."""
        times, chip = self.times, self.target.chip
        if times is None or not times.step:
            return None
        peak = self.target.rate(self.dtype).flops_per_second
        devices = self.devices if chip.platform != "cpu" else 1
        speed = metrics.tokens_per_second(self.facts.tokens, times.step)
        seconds = self.tokens / speed
        price, watts, chips = chip.price_per_hour, chip.power_watts, self.target.num_chips
        return Economy(
            tokens_per_second=speed,
            mfu=metrics.mfu(self.facts.model_flops, times.step, peak, devices),
            days=seconds / 86400,
            money=None if price is None else metrics.money(seconds, chips, price),
            kwh=None if watts is None else metrics.energy_kwh(seconds, watts, chips, PUE),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON; the schema is in `compax.experiments.plan`."""
        return _json(self)


@dataclasses.dataclass(frozen=True)
class Economy:
    """What training costs at the predicted time of a step. All of it is predicted.

    Attributes:
        tokens_per_second: of the whole slice.
        mfu: FLOPs that the model needs, by what the slice could do.
        days: to train on all tokens, without checkpoints, evaluations and failures.
        money: US dollars for the chips on demand; None without a public price.
        kwh: energy at the most that the chips draw, and of the building; None if it is unknown.
    """

    tokens_per_second: float
    mfu: float
    days: float
    money: float | None
    kwh: float | None


def collective_seconds(target: Target, collective: Collective) -> float | None:
    """Predicted seconds of one execution of a collective; None if nothing is known of a target's links.

    Groups inside a slice use its links, those between slices the network.
    """
    kind: Any = collective.kind
    if collective.between_slices:
        return target.collective_seconds(kind, collective.bytes, collective.group_size, over="dcn")
    if target.chip.link.kind == "none":
        return None
    return target.collective_seconds(kind, collective.bytes, collective.group_size)


def _sum(target: Target, some: list[Collective]) -> float | None:
    total = 0.0
    for collective in some:
        seconds = collective_seconds(target, collective)
        if seconds is None:
            return None
        total += collective.count * seconds
    return total


def _json(report: Report) -> dict[str, Any]:
    facts, compiled, target = report.facts, report.compiled, report.target
    memory, times, economy = compiled.memory, report.times, report.economy()
    shortage = compiled.shortage
    made = dataclasses.asdict(memory) if memory else {}
    graph = facts.prediction and dataclasses.asdict(facts.prediction)
    return {
        "name": report.name,
        "target": str(target),
        "chips": target.num_chips,
        "mesh": dict(report.axes),
        "pipeline": report.pipeline,
        "entry": facts.entry,
        "batch_size": report.batch_size,
        "sequence_length": report.sequence_length,
        "parameters": facts.parameters,
        "trainable": facts.trainable,
        "fits": report.fits,
        "graph": {"predicted": graph},
        "shortage": dataclasses.asdict(shortage) if shortage else None,
        "memory": {
            "limit": report.limit_bytes,
            "predicted": {
                "parameters": facts.parameter_bytes,
                "optimizer": facts.optimizer_bytes,
                "state": facts.state_bytes,
                "batch": facts.batch_bytes,
                "arguments": facts.argument_bytes,
            },
            "compiled": {**made, "needed": report.peak_bytes} if memory else {},
        },
        "chosen": list(report.chosen),
        "passes": {"predicted": [dict(each) for each in facts.passes]},
        "largest_parameters": [
            {"path": path, "format": form, "shape": list(shape), "spec": spec, "bytes": size}
            for path, form, shape, spec, size in facts.largest
        ],
        "buffers": [dataclasses.asdict(buffer) for buffer in compiled.buffers],
        "flops": {
            "predicted": {"model": facts.model_flops},
            "compiled": {"device": dict(compiled.flops), "unknown_loops": list(compiled.unknown_loops)},
        },
        "traffic": {"compiled": compiled.traffic},
        "collectives": {
            "predicted": {"bytes": dict(facts.exchanged)},
            "compiled": {
                kind: {**dataclasses.asdict(total), "predicted_seconds": report.kind_seconds(kind)}
                for kind, total in report.totals.items()
            },
            "each": [
                {**dataclasses.asdict(found), "predicted_seconds": report.seconds(found)}
                for found in compiled.collectives
            ],
        },
        "time": {"predicted": {**dataclasses.asdict(times), "step": times.step, "bound": times.bound}}
        if times
        else None,
        "training": {"tokens": report.tokens, "predicted": dataclasses.asdict(economy)} if economy else None,
        "compiling": {
            "quick": report.quick,
            "measured": {
                "seconds": dict(compiled.seconds),
                "processor_seconds": compiled.processor_seconds,
                "host_bytes": compiled.host_bytes,
            },
        },
    }
