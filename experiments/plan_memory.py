"""What a train step needs of one device's memory over time, predicted from the graph."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import compax
from compax.analysis.liveness import liveness
from compax.analysis.program_cost import owner_names, owner_of
from compax.analysis.training import train_step
from compax.errors import CompaxError
from compax.experiments import programs

_POINTS = 400
_LARGEST = 8


def over_step(
    program: compax.Program, sequences: int, length: int, platform: str, resident: int, accumulated: int
) -> dict[str, Any]:
    """Memory of one device over a train step, as JSON.

    The step is traced with the sequences of one device. What it keeps of values in between is counted as if they were
    split along the batch alone, gradients whole: on a mesh that splits more, it is too much. The update is counted as
    Adam's: for an optimizer that computes with whole matrices, as Muon does, it is too little.

    Args:
        program: with its entry `train`; parameters may be shapes.
        sequences: that a device reads at a time.
        length: tokens of a sequence, and one.
        platform: "cpu", "gpu" or "tpu".
        resident: bytes of parameters and of the optimizer's state on one device.
        accumulated: bytes of gradients that are summed up beside.

    Returns:
        `timeline` (bytes after steps, evenly thinned, peaks kept), `peak` (bytes), `alive` (what makes the peak: pairs
        of a site with its phase, and bytes); or `missing`, why not.
    """
    if program.placement.memories:
        return {"missing": "a part lives in the host's memory: what of it is on the device is the compiler's choice"}
    try:
        one = _with_batch(program, {"tokens": jax.ShapeDtypeStruct((sequences, length), jnp.int32)})
        captured = one.graph(programs.TRAIN)
        step = train_step(one, captured, 2)
        traced = step.traced(captured, platform)
        found = liveness(traced, platform, donated=step.donated)
        names = owner_names(one, programs.TRAIN)
    except CompaxError as error:
        return {"missing": str(error)}
    whole = sum(found.arguments.get(kind, 0) for kind in ("parameter", "frozen", "optimizer"))
    more = resident + accumulated - whole
    alive: collections.Counter[str] = collections.Counter()
    for each in found.alive:
        place = each.place
        owner = owner_of(names, place.path) if place is not None and place.path is not None else ""
        alive[f"{owner or each.operation} ({place.phase if place is not None else 'update'})"] += each.nbytes
    return {
        "timeline": [size + more for size in _thinned(found.timeline)],
        "peak": found.peak + more,
        "alive": alive.most_common(_LARGEST),
    }


def _with_batch(program: compax.Program, batch: Mapping[str, Any]) -> compax.Program:
    """The program with its training graph for a batch alone."""
    known = {key: graph for key, graph in program.graphs.items() if key[0] == programs.TRAIN}
    made = program.specialize(batch, entry=programs.TRAIN).graphs
    found = {key: graph for key, graph in made.items() if key[0] == programs.TRAIN and key not in known}
    others = {key: graph for key, graph in program.graphs.items() if key[0] != programs.TRAIN}
    return program.replace(graphs={**(found or known), **others})


def _thinned(timeline: tuple[int, ...]) -> list[int]:
    """At most so many points: of those that fall together the largest."""
    every = -(-len(timeline) // _POINTS) or 1
    return [max(timeline[place : place + every]) for place in range(0, len(timeline), every)]
