"""What a train step takes, predicted from its graph before anything is compiled: work, time, and memory over the step.

One device is looked at, with its part of the batch. Where the mesh splits parameters as well, the compiler decides how
values in between are split: work and time are then an even share of the whole step, and memory over the step is not
predicted; its peak is where the pass `shard` lays them (`plan_memory`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

import compax
from compax.analysis.cost import Cost, function_cost
from compax.analysis.liveness import Alive, liveness
from compax.analysis.program_cost import owner_names, owner_of, traced_cost
from compax.analysis.tracing import Place
from compax.analysis.training import Optimizer, train_step
from compax.encoding import leaf_nbytes
from compax.errors import CompaxError
from compax.experiments import programs
from compax.experiments.config import Config
from compax.experiments.optimizer import optimizer
from compax.experiments.shardings import StepSpecs, follow
from compax.placement import axes_of
from compax.target import Target

_POINTS = 240
_LARGEST = 12

PHASES = ("forward", "recompute", "backward", "update")
"""The phases of a step, in order."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Buffers of one site that are in memory at the peak, together.

    Attributes:
        site: the site or composite that they belong to; empty for those of none, such as the loss's own.
        phase: of the step: "forward" for activations that the backward pass needs.
        what: shape and dtype of the largest, or the loop whose turn it is.
        count: how many.
        bytes: of all of them.
    """

    site: str
    phase: str
    what: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A train step on one device. Predicted, all of it.

    Attributes:
        share: what the device computes, in words.
        product_flops: floating-point operations of matrix products by phase, recomputation included.
        update_flops: those of the optimizer's update: all of them where the optimizer's state is not split over the
            mesh, else the share of the device.
        traffic: bytes between the device and its memory, after fusion.
        seconds: the roofline, kernel by kernel, collectives left out.
        peak: bytes at the peak; none if it is not predicted.
        temporaries: bytes at the peak besides arguments; likewise.
        activations: bytes besides arguments in the forward pass, at most.
        timeline: bytes in memory along the step, at most 240 points that keep its peaks.
        phases: for each point of the timeline the phase of the step.
        held: what is in memory at the peak besides arguments, largest first.
        missing: why memory over the step is not predicted, or empty.
    """

    share: str
    product_flops: Mapping[str, int]
    update_flops: int
    traffic: int
    seconds: float
    peak: int | None = None
    temporaries: int | None = None
    activations: int | None = None
    timeline: tuple[int, ...] = ()
    phases: tuple[str, ...] = ()
    held: tuple[Held, ...] = ()
    missing: str = ""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Prediction:
        """A prediction that went through JSON."""
        given: dict[str, Any] = {**found, "held": tuple(Held(**each) for each in found["held"])}
        return cls(**given)

    @property
    def flops(self) -> int:
        """Floating-point operations of all matrix products of the device."""
        return sum(self.product_flops.values())

    def kept(self, *phases: str) -> int:
        """Bytes at the peak that were made in some phases."""
        return sum(each.bytes for each in self.held if each.phase in phases)


def predict(
    config: Config, program: compax.Program, specs: StepSpecs, axes: Mapping[str, int], target: Target
) -> Prediction:
    """Predicts the train step of a program on one device of a mesh.

    Args:
        config: batch, sequence and optimizer.
        program: the program, its pipeline applied; its parameters may be shapes.
        specs: of the step.
        axes: sizes of the mesh's axes.
        target: the slice.

    Raises:
        CompaxError: the program cannot be lowered for the target.
    """
    platform, split = target.chip.platform, math.prod(axes[name] for name in specs.batch)
    rule, trainable = update_rule(config), program.partition()[0]
    state = jax.eval_shape(rule.init, trainable)
    update = function_cost(rule.update, trainable, state, trainable, target=target)
    parts, devices = config.optimizer.accumulation, math.prod(axes.values())
    reason = _undecided(specs, axes) or _elsewhere(program)
    alone = program
    if not reason and split > 1:
        try:
            alone = _share(config, program, split)
        except CompaxError as error:
            reason = f"the program cannot be taken with the batch of one device: {' '.join(str(error).split())}"
    captured = alone.graph(programs.TRAIN)
    step = train_step(alone, captured, rule)
    traced = step.traced(captured, platform)
    cost = traced_cost(traced, alone, target=target)
    scale = devices if reason else 1
    updating = 1 / _ways(trainable, state, specs, axes)
    found = Prediction(
        share=f"an even share of {devices} devices" if reason else "its part of the batch, and all of the update",
        product_flops={
            phase: round(part.product_flops * (updating if phase == "update" else parts / scale))
            for phase in PHASES
            if (part := cost.by_phase.get(phase)) is not None and part.product_flops
        },
        update_flops=round(update.product_flops * updating),
        traffic=round((parts * cost.bytes_fused - (parts - 1) * update.bytes_fused) / scale),
        seconds=(parts * _seconds(cost, target) - (parts - 1) * _seconds(update, target)) / scale,
        missing=reason,
    )
    if reason:
        return found
    needed = liveness(traced, platform, donated=step.donated)
    # Sums of gradients, while several micro-batches are added up.
    sums = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainable)) if parts > 1 else 0
    chosen = _chosen(needed.timeline)
    phases = [_phase(place) for place in needed.places]
    forward = [size for size, phase in zip(needed.timeline, phases, strict=True) if phase == "forward"]
    return dataclasses.replace(
        found,
        peak=needed.peak + sums,
        temporaries=needed.temporaries + sums,
        activations=max(forward) - (needed.peak - needed.temporaries) if forward else 0,
        timeline=tuple(needed.timeline[index] + sums for index in chosen),
        phases=tuple(phases[index] for index in chosen),
        held=_held(needed.alive, owner_names(alone, programs.TRAIN)),
    )


def update_rule(config: Config) -> Optimizer:
    """The optimizer of a config, as a train step sees it."""
    import optax

    made = optimizer(config)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, after = made.update(gradients, state, params)
        return optax.apply_updates(params, updates), after

    return Optimizer(made.init, update)


def _seconds(cost: Cost, target: Target) -> float:
    return cost.on(target).seconds


def _ways(trainable: Mapping[str, Any], state: Any, specs: StepSpecs, axes: Mapping[str, int]) -> float:
    """Bytes of the optimizer's state by those that a device keeps of it."""
    spread = follow(state, trainable, specs.optimizer)
    whole = device = 0.0
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(spread, is_leaf=_is_spec), strict=True):
        whole += leaf_nbytes(leaf)
        device += leaf_nbytes(leaf) / math.prod(axes[name] for name in axes_of(spec))
    return whole / device if device else 1.0


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _undecided(specs: StepSpecs, axes: Mapping[str, int]) -> str:
    """Whether the compiler decides how values in between are split."""
    for path, spec in specs.params.items():
        if any(axes[name] > 1 for name in axes_of(spec)):
            return f"parameters are split over the mesh, such as {path}: the compiler decides how activations are"
    return ""


def _elsewhere(program: compax.Program) -> str:
    return "a part lives in the host's memory: the compiler decides when it is moved" * bool(program.placement.memories)


def _share(config: Config, program: compax.Program, split: int) -> compax.Program:
    """A program whose only graph is that of training on one device's part of a micro-batch."""
    batch = programs.micro_batch(config) // split
    tokens = jax.ShapeDtypeStruct((batch, config.data.sequence_length + 1), jax.numpy.int32)
    known = set(program.graphs)
    made = program.specialize({"tokens": tokens}, entry=programs.TRAIN)
    only = {key: captured for key, captured in made.graphs.items() if key not in known}
    return made.replace(graphs=only) if only else made


def _chosen(timeline: Sequence[int]) -> list[int]:
    """Points of a timeline, of each stretch the highest."""
    size = max(1, math.ceil(len(timeline) / _POINTS))
    stretches = (range(first, min(first + size, len(timeline))) for first in range(0, len(timeline), size))
    return [max(stretch, key=lambda index: timeline[index]) for stretch in stretches]


def _held(alive: Sequence[Alive], owners: Mapping[Any, str]) -> tuple[Held, ...]:
    """Buffers by site and phase."""
    found: dict[tuple[str, str], list[Alive]] = collections.defaultdict(list)
    for each in alive:
        place = each.place
        site = "" if place is None or place.path is None else owner_of(owners, place.path)
        found[site, _phase(place)].append(each)
    sums = [
        Held(site, phase, _what(some[0]), len(some), sum(each.nbytes for each in some))
        for (site, phase), some in found.items()
    ]
    return tuple(sorted(sums, key=lambda held: -held.bytes))


def _phase(place: Place | None) -> str:
    return "update" if place is None else place.phase


def _what(alive: Alive) -> str:
    return alive.operation if alive.shape is None else f"{alive.dtype}{list(alive.shape)}"
