"""The cost of a program, as it is lowered: what a call or a whole train step costs, by composite, site and phase.

Operations are counted as they run: an encoded weight by the rule that computes with it, a gradient as JAX
differentiates. Each is attributed to the operation of the captured graph that it was made of
(`compax.analysis.tracing`), and so to a site or a composite.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from compax.analysis.cost import UNOWNED, Cost, graph_cost
from compax.analysis.tracing import Traced, traced_call
from compax.encoding import nbytes
from compax.ir import Op, Path

if TYPE_CHECKING:
    from compax.program import Program
    from compax.target import Target


def program_cost(program: "Program", target: "Target | str | None" = None, entry: str | None = None) -> Cost:
    """What one call of an entry costs. Predicted.

    Args:
        program: the program; its parameters may be shapes.
        target: what it is lowered for, as an object or a text such as "v5e:4x4"; by default JAX's platform.
        entry: which entry; the first one by default.

    Raises:
        SignatureError: there is no such entry.
        TargetError: there is no such target.
        LoweringError: the program cannot be lowered as it is.
    """
    chosen = _target(target)
    found = traced_call(program, entry, platform=None if chosen is None else chosen.chip.platform)
    return traced_cost(found, program, target=chosen, name=f"{program.name}, entry {found.captured.entry.name}")


def traced_cost(
    found: Traced, program: "Program", *, target: "Target | str | None" = None, name: str | None = None
) -> Cost:
    """What a computation with a program in it costs, such as a train step.

    Args:
        found: the computation.
        program: the program in it.
        target: what it is meant for.
        name: what to call it.

    Raises:
        TargetError: there is no such target.
    """
    owners = owner_names(program, found.captured.entry.name)

    def owner(op: Op, path: Path) -> str:
        place = found.places.get(path)
        return UNOWNED if place is None or place.path is None else owner_of(owners, place.path)

    def phase(op: Op, path: Path) -> str:
        place = found.places.get(path)
        return "update" if place is None else place.phase

    input_bytes: dict[str, int] = collections.defaultdict(int)
    for role, value in zip(found.inputs, found.graph.inputs, strict=True):
        input_bytes[role.kind] += nbytes(value)
    return graph_cost(
        found.graph,
        owner,
        phase=phase,
        input_bytes=dict(input_bytes),
        name=name or program.name,
        target=_target(target),
    )


def _target(target: "Target | str | None") -> "Target | None":
    if not isinstance(target, str):
        return target
    from compax.target import Target

    return Target.parse(target)


def owner_names(program: "Program", entry: str | None = None) -> dict[Path, str]:
    """For operations of a captured graph the site with a parameter that each is, or the composite it is part of."""
    sites = program.sites(entry)
    names = {site.path: site.name for site in sites}
    names |= {path: composite.name for path, composite in program.meaning(entry).owners().items()}
    return names | {site.path: site.name for site in sites if site.uses}


def owner_of(names: Mapping[Path, str], path: Path) -> str:
    """The name of what an operation or the nearest one around it belongs to."""
    if path in names:
        return names[path]
    for depth in range(len(path) - 1, 0, -1):
        around = (*path[: depth - 1], (path[depth - 1][0], -1))
        if around in names:
            return names[around]
    return UNOWNED


# -- What lies in memory ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """Bytes that a program and its training keep in memory, in one copy. Predicted: counted from shapes.

    Attributes:
        parameters: as they are stored, encodings to the byte.
        dense_parameters: the same parameters as dense arrays.
        trainable: those that get gradients.
        gradients: one for each leaf of a trainable parameter.
        optimizer: the optimizer's state.
        state: the program's state.
    """

    parameters: int
    dense_parameters: int
    trainable: int
    gradients: int
    optimizer: int
    state: int

    @property
    def training(self) -> int:
        """Everything that a train step holds besides activations."""
        return self.parameters + self.gradients + self.optimizer + self.state


def stored_bytes(program: "Program", init: Callable[[Any], Any] | None = None) -> Stored:
    """Bytes of parameters, gradients and an optimizer's state; nothing is allocated.

    Args:
        program: the program.
        init: makes the optimizer's state from the trainable parameters, such as `optax.adamw(1e-3).init`; without one
            there is no optimizer.
    """
    trainable, _ = program.partition()
    state = jax.eval_shape(init, trainable) if init is not None and trainable else ()
    gradients = (leaf for leaf in jax.tree.leaves(trainable) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact))
    return Stored(
        parameters=_bytes(program.params.values()),
        dense_parameters=_bytes(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.params.values()),
        trainable=_bytes(trainable.values()),
        gradients=_bytes(gradients),
        optimizer=_bytes(jax.tree.leaves(state)),
        state=_bytes(program.state.values()),
    )


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(map(nbytes, arrays))
