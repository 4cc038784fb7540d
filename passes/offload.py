"""Offloading: the optimizer's state, and parameters, in the host's memory between their uses."""

import dataclasses
from typing import Any, ClassVar

from compax.contracts import Exact
from compax.errors import PipelineError
from compax.placement import HOST
from compax.program import Program
from compax.transform import Context, Pass, PassResult, SiteReport, register

__all__ = ["Offload"]


@dataclasses.dataclass(frozen=True)
class _Array:
    """A parameter, or the optimizer's state, in the place of a site, so that selectors apply to it."""

    name: str
    kind: str
    parameter: str | None = None


OPTIMIZER = _Array("optimizer", "optimizer")
"""The optimizer's state in reports."""


@register("offload")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload(Pass):
    """Keeps arrays in host memory and moves them to the device for their use: `program.placement` says which.

    1. `optimizer`: the optimizer's state, which nothing but the update reads: with Adam twice the trainable parameters
       in float32, which then need no device memory between updates. As in Ren et al., "ZeRO-Offload: Democratizing
       Billion-Scale Model Training", 2021, arXiv 2101.06840, but that the update itself stays on the device.
    2. `parameters`: those whose path `at` selects. They are moved at the start of a step, as wholes, and back at its
       end: that frees their memory between steps, not within one.

    Graphs stay as they are. The train step, and plans for a slice, follow the placement; where a device reaches no such
    memory, they say so before anything runs. Bytes cross the link to the host twice a step: worth it where memory is
    short and steps are long.

    Args:
        optimizer: whether the optimizer's state moves.
        parameters: whether the parameters that `at` selects move.

    Raises:
        PipelineError: nothing is to move, or `at` is given without `parameters`.
        SelectorError: `at` matches no parameter.
    """

    optimizer: bool = True
    parameters: bool = False

    phase: ClassVar[str] = "memory"
    contract: ClassVar[Any] = Exact()
    paper: ClassVar[str] = "Ren et al. 2021, arXiv 2101.06840"
    example: ClassVar[str] = "offload(optimizer=true)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optimizer and not self.parameters:
            raise PipelineError("offload moves nothing: give optimizer=true, parameters=true, or both")
        if self.at != "**" and not self.parameters:
            raise PipelineError(f"offload: at={self.at} selects parameters; give parameters=true with it")

    def run(self, program: Program, context: Context) -> PassResult:
        before = program.placement
        after = before.replace(optimizer_memory=HOST) if self.optimizer else before
        already = {OPTIMIZER} if before.optimizer_memory == HOST else set[_Array]()
        moved = [OPTIMIZER] if self.optimizer else []
        if self.parameters:
            arrays = [_Array(path, "parameter", path) for path in program.params]
            chosen = self.select(arrays, "parameter")
            already |= {array for array in chosen if before.memory_kind(array.name) == HOST}
            after = after.replace(memory={**before.memory, **{array.name: HOST for array in chosen}})
            moved += chosen
        reports = tuple(
            SiteReport.of(array, "matched", "in host memory already")
            if array in already
            else SiteReport.of(array, "rewritten")
            for array in moved
        )
        if after == before:
            return PassResult(program, reports)
        return PassResult(program.replace(placement=after), reports)
