"""The price of every pass: what a program computes, moves and needs before it and after it.

`Price` is an instrument; what it finds is in the records of `program.history`. Figures are predicted, counted from
shapes and graphs, but for the loss and the loyalty, which are measured by running the program on the sample inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from compax import ir, metrics
from compax.analysis.cost import Cost
from compax.analysis.exchange import exchange_seconds, exchanged
from compax.analysis.liveness import liveness
from compax.analysis.program_cost import traced_cost
from compax.analysis.tracing import Traced, traced_call
from compax.analysis.training import returns_loss, train_step
from compax.contracts import Observation
from compax.encoding import leaf_nbytes
from compax.errors import CompaxError
from compax.instruments import Instrument, Measured, Step, comparable, computes_the_same, observe, with_equal_draws
from compax.printing import figure_text
from compax.program import Program
from compax.target import Target
from compax.transform import Context, Inputs, Pass, PassRecord

PREDICTED = (
    "forward_flops",
    "step_flops",
    "peak_bytes",
    "collective_bytes",
    "forward_seconds",
    "step_seconds",
    "collective_seconds",
)
"""What is predicted of a program, in this order."""

MEASURED = ("loss", "label_loyalty", "probability_loyalty")
"""What is measured on sample inputs."""


@dataclasses.dataclass(frozen=True)
class Priced:
    """What a program costs.

    Attributes:
        figures: by name, which ends in the unit; those that could be had.
        missing: why the others could not, by name.
    """

    figures: Mapping[str, float]
    missing: Mapping[str, str]


def priced(program: Program, target: Target | None = None, entry: str | None = None, slots: int = 2) -> Priced:
    """What a call and a train step of a program cost. Predicted; nothing runs.

    - `forward_flops`, `step_flops`: floating-point operations of a call, and of a train step with gradients and update,
      on all devices together
    - `peak_bytes`: the most that is in memory: in a train step if the entry returns a loss, else in a call
    - `collective_bytes`, `collective_seconds`: of the collectives that the shardings of parameters ask for in a train
      step at least, on one device; exchanges of activations are not in it
    - `forward_seconds`, `step_seconds`: rooflines, kernel by kernel, if the devices of the mesh share the work evenly;
      collectives are not in it

    Args:
        program: the program; its parameters may be shapes.
        target: what it runs on; without one there are no seconds, and memory is that on JAX's platform.
        entry: which entry; the first one by default.
        slots: float32 arrays of the size of each trained parameter that the optimizer keeps: two for Adam.

    Raises:
        SignatureError: there is no such entry.
    """
    captured = program.graph(entry)
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    platform = jax.default_backend() if target is None else target.chip.platform
    mesh = program.placement.mesh
    devices = 1 if mesh is None else mesh.size

    def find(names: tuple[str, ...], compute: Callable[[], Mapping[str, float]]) -> None:
        """Computes some figures; what cannot be computed is missing, and so are all of them if that fails."""
        try:
            found = compute()
        except CompaxError as error:
            missing.update(dict.fromkeys(names, str(error)))
            return
        figures.update(found)

    def of(what: str, traced: Traced) -> Mapping[str, float]:
        cost = traced_cost(traced, program, target=target)
        if cost.unknown:
            missing[f"{what}_flops"] = f"of {len(cost.unknown)} operations nothing is known: {cost.unknown[0]}"
            missing[f"{what}_seconds"] = missing[f"{what}_flops"]
            return {}
        found: dict[str, float] = {f"{what}_flops": cost.flops}
        if reason := _no_seconds(cost, traced, devices):
            missing[f"{what}_seconds"] = reason
        else:
            assert cost.time is not None
            found[f"{what}_seconds"] = cost.time.seconds / devices
        return found

    def memory(traced: Traced, donated: tuple[str, ...]) -> Mapping[str, float]:
        if devices > 1:
            missing["peak_bytes"] = f"values are split over {devices} devices, by the compiler: `compax plan` compiles"
        elif program.placement.memories:
            missing["peak_bytes"] = "a part lives in the host's memory, moved by the compiler: `compax plan` compiles"
        else:
            return {"peak_bytes": liveness(traced, platform, donated=donated).peak}
        return {}

    def forward() -> Mapping[str, float]:
        traced = traced_call(program, entry, platform=platform)
        loss = returns_loss(captured)
        return {**of("forward", traced), **({} if loss else memory(traced, ()))}

    def step() -> Mapping[str, float]:
        made = train_step(program, captured, slots)
        traced = made.traced(captured, platform)
        return {**of("step", traced), **memory(traced, made.donated)}

    find(("forward_flops", "forward_seconds"), forward)
    if returns_loss(captured):
        find(("step_flops", "peak_bytes", "step_seconds"), step)
        find(("collective_bytes", "collective_seconds"), lambda: _collectives(program, target, missing))
    else:
        names = ("step_flops", "step_seconds", "collective_bytes", "collective_seconds")
        why = f"the entry '{captured.entry.name}' returns no loss, so there is no train step"
        missing.update(dict.fromkeys(names, why))
    return Priced(figures, missing)


def _no_seconds(cost: Cost, traced: Traced, devices: int) -> str:
    if cost.time is None:
        return "no target was given"
    if devices > 1 and any(op.name == "shard_map" for _, op in ir.walk(traced.graph)):
        return "a part is split over devices by shard_map, the rest by the compiler: what one device does is not known"
    return ""


def _collectives(program: Program, target: Target | None, missing: dict[str, str]) -> Mapping[str, float]:
    placement = program.placement
    if placement.mesh is None or placement.mesh.size == 1:
        return {"collective_bytes": 0, "collective_seconds": 0.0}
    trainable, _ = program.partition()
    shardings = placement.shardings(trainable)
    sizes = {path: _device_bytes(trainable[path], shardings[path]) for path in trainable}
    found = exchanged(
        sizes,
        placement.specs,
        placement.batch,
        placement.mesh.shape,
        gradients=placement.gradients,
        optimizer=placement.optimizer,
    )
    figures: dict[str, float] = {"collective_bytes": sum(found.values())}
    try:
        if target is None:
            missing["collective_seconds"] = "no target was given"
        else:
            figures["collective_seconds"] = exchange_seconds(target, found, placement.batch_shards)
    except CompaxError as error:
        missing["collective_seconds"] = str(error)
    return figures


def _device_bytes(value: Any, shardings: Any) -> int:
    """Bytes of a parameter on one device."""

    def size(leaf: Any, sharding: NamedSharding) -> int:
        return leaf_nbytes(jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype))

    return sum(jax.tree.leaves(jax.tree.map(size, value, shardings)))


class Price(Instrument):
    """Records what a program costs before and after each pass: pairs in the metrics of the record, by name.

    Predicted: `PREDICTED`, see `priced`. Measured on the sample inputs: `loss`, if the entry returns one; else
    `label_loyalty` and `probability_loyalty` to the program before the first pass, over the last dimension of the first
    output (Xu et al., "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression", 2021,
    arXiv:2109.03228). Number and bytes of the parameters are in every record: `PassRecord.before` and `after`. A figure
    that cannot be had is `None` in its pair, or is left out if it is missing on both sides; a note says why.

    Args:
        target: what the program is priced for, as an object or a text such as "v5e:4x4"; without one there are no
            seconds.
        slots: float32 arrays of the size of each trained parameter that the optimizer keeps: two for Adam.

    Raises:
        TargetError: there is no such target.
    """

    def __init__(self, target: Target | str | None = None, slots: int = 2) -> None:
        self.target = Target.parse(target) if isinstance(target, str) else target
        self._slots = slots
        self._last: tuple[Program, str | None, Priced] | None = None
        self._seen: tuple[Program, Inputs, Observation] | None = None
        self._first: Observation | None = None

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Prices what a pass is given; and runs it, because the pass may be allowed to delete what it converts."""
        self._priced(program, context)
        inputs = comparable(pass_, program, context)
        if isinstance(inputs, str):
            self._seen = self._first = None
            return
        seen = self._seen
        if seen is None or not computes_the_same(seen[0], program) or seen[1].entry != inputs.entry:
            self._seen = program, inputs, observe(program, inputs, compiled=True)
            self._first = self._seen[2]

    def _priced(self, program: Program, context: Context) -> Priced:
        entry = None if context.inputs is None else context.inputs.entry
        if self._last is None or not _costs_the_same(self._last[0], program) or self._last[1] != entry:
            self._last = program, entry, priced(program, self.target, entry, self._slots)
        return self._last[2]

    def after(self, step: Step) -> Measured:
        """Prices what a pass left."""
        if not step.result.changed:
            return Measured()
        assert self._last is not None
        old = self._last[2]
        new = self._priced(step.program, step.context)
        found: dict[str, Any] = {}
        reasons: dict[str, dict[str, None]] = {}
        for name in PREDICTED:
            if name in old.figures or name in new.figures:
                found[name] = old.figures.get(name), new.figures.get(name)
            for side in (old, new):
                if name in side.missing:
                    reasons.setdefault(side.missing[name], {})[LABELS[name].removesuffix(", at least")] = None
        measured = self._fidelity(step)
        if isinstance(measured, str):
            reasons.setdefault(measured, {})["fidelity"] = None
        else:
            found |= measured
        return Measured(found, tuple(f"no {', '.join(names)}: {why}" for why, names in reasons.items()))

    def _fidelity(self, step: Step) -> Mapping[str, Any] | str:
        """Loss or loyalty before and after a pass, or why there is none."""
        inputs = comparable(step.pass_, step.before, step.context)
        if isinstance(inputs, str):
            return inputs
        assert self._seen is not None
        assert self._first is not None
        before = self._seen[2]
        after = observe(with_equal_draws(step.pass_, step.before, step.program), inputs, compiled=True)
        self._seen = step.program, inputs, after
        if before.loss is not None and after.loss is not None:
            return {"loss": (before.loss, after.loss)}
        teacher, old, new = (_logits(each) for each in (self._first, before, after))
        if teacher is None or old is None or new is None or not teacher.shape == old.shape == new.shape:
            return "the first output is no array of floating-point numbers over labels, of one shape before and after"
        return {
            name: tuple(float(function(teacher, each)) for each in (old, new))
            for name, function in (
                ("label_loyalty", metrics.label_loyalty),
                ("probability_loyalty", metrics.probability_loyalty),
            )
        }


def _costs_the_same(one: Program, other: Program) -> bool:
    """Whether two programs are the same also in where they live and what is trained."""
    return computes_the_same(one, other) and one.placement is other.placement and one.frozen == other.frozen


def _logits(observed: Observation) -> jax.Array | None:
    """The first output, if it can be logits: floating, with several labels in the last dimension."""
    first = next((leaf for name, leaf in observed.leaves.items() if name.startswith("output")), None)
    if first is None or first.ndim < 1 or first.shape[-1] < 2 or not jnp.issubdtype(first.dtype, np.inexact):
        return None
    return jnp.asarray(first, jnp.float32)


# -- As text ----------------------------------------------------------------------------------------------------------

LABELS: Mapping[str, str] = {
    "parameters": "parameters",
    "stored_bytes": "parameters as stored",
    "forward_flops": "work of a call",
    "step_flops": "work of a train step",
    "peak_bytes": "memory at the peak",
    "collective_bytes": "collectives of a device",
    "forward_seconds": "time of a call, at least",
    "step_seconds": "time of a train step, at least",
    "collective_seconds": "time of collectives",
    "loss": "loss",
    "label_loyalty": "label loyalty",
    "probability_loyalty": "probability loyalty",
}
"""What the figures are called."""

COLUMNS = ("", "before", "after", "change", "")
"""The columns of `price_rows`."""

Pairs = Mapping[str, Sequence[float | None]]


def price_pairs(record: PassRecord) -> dict[str, tuple[float | None, float | None]]:
    """What a program cost before and after a pass, by name: what `Price` recorded, and the size of the parameters."""
    found: dict[str, tuple[float | None, float | None]] = {
        "parameters": (record.before.parameters, record.after.parameters),
        "stored_bytes": (record.before.nbytes, record.after.nbytes),
    }
    return found | {name: record.metrics[name] for name in LABELS if name in record.metrics}


def price_json(record: PassRecord) -> dict[str, Any]:
    """What a pass changed of the price, as JSON: `pass`, `figures` ({name: [before, after]}) and `notes`."""
    figures = {name: list(pair) for name, pair in price_pairs(record).items()}
    return {"pass": record.text, "figures": figures, "notes": list(record.notes)}


def price_rows(pairs: Pairs) -> list[tuple[str, str, str, str, str]]:
    """The rows of a table: what, before, after, the change, and whether it is predicted or measured."""
    return [
        (
            LABELS[name],
            _figure(name, before),
            _figure(name, after),
            _change(before, after),
            "measured" if name in MEASURED else "predicted",
        )
        for name, (before, after) in pairs.items()
    ]


def _figure(name: str, value: float | None) -> str:
    return f"{value:,}" if name == "parameters" else figure_text(name, value)


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "unknown"
    if before == after:
        return "none"
    return f"{100 * (after / before - 1):+.3g} %" if before else "new"
