"""Axes of a program taken straight from the analysis, and what tests of reindexing compare with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import Program
from compax.analysis.axes import Axis
from compax.rewrites.narrowing import Narrowing
from compax.rewrites.reindex import decide


def axes_of(program: Program, entry: str | None = None) -> list[Axis]:
    """The axes of parameters and state, the free ones first."""
    narrowing = Narrowing(program.graph(entry))
    found: dict[Any, dict[str, list[int]]] = {}
    for x in narrowing.normal.inputs:
        if x.input is None or x.input.kind == "argument":
            continue
        for dim, factors in enumerate(narrowing.engine.dims[x]):
            for atom in narrowing.engine.atoms.leaves(factors):
                found.setdefault(atom, {}).setdefault(x.input.path, []).append(dim)
    axes = [
        Axis(
            name=f"axis{atom.number}",
            size=atom.size,
            atom=atom,
            parameters={path: tuple(dims) for path, dims in paths.items()},
            fixed=tuple(atom.reasons),
        )
        for atom, paths in found.items()
    ]
    return sorted(axes, key=lambda axis: bool(axis.fixed))


def axis_at(program: Program, path: str, dim: int, factor: int = 0) -> Axis:
    """The axis that is a factor of a dimension of a parameter."""
    narrowing = Narrowing(program.graph())
    (x,) = (x for x in narrowing.normal.inputs if x.input is not None and x.input.path == path)
    atom = narrowing.engine.atoms.expand(narrowing.engine.dims[x][dim])[factor]
    return next(axis for axis in axes_of(program) if axis.atom.number == atom.number)


def two_thirds(axis: Axis, seed: int = 0) -> list[int]:
    """Two thirds of the indices, in order, some from the middle missing."""
    count = max(1, axis.size * 2 // 3)
    return sorted(np.random.default_rng(seed).permutation(axis.size)[:count].tolist())


def shuffled(axis: Axis, seed: int = 0) -> list[int]:
    """All indices in another order."""
    return np.random.default_rng(seed).permutation(axis.size).tolist()


def zeroed(program: Program, keep: Mapping[Axis, Sequence[int]]) -> Program:
    """The program at its old sizes, with what is not kept set to zero in all parameters and the state."""
    stores: dict[str, dict[str, Any]] = {"parameter": dict(program.params), "state": dict(program.state)}
    for (kind, path, dim), indices in decide(program, keep).items():
        x = np.array(stores[kind][path])
        lost = np.setdiff1d(np.arange(x.shape[dim]), indices)
        x[(slice(None),) * dim + (lost,)] = 0
        stores[kind][path] = jnp.asarray(x)
    return program.replace(params=stores["parameter"], state=stores["state"])


def gradients(run: Callable[[Any], jax.Array], program: Program) -> dict[str, jax.Array]:
    """Gradients of a fixed combination of a program's outputs."""

    def objective(params: Any) -> jax.Array:
        output = run(program.replace(params=params))
        return jnp.vdot(output, np.random.default_rng(3).normal(size=output.shape).astype(np.float32))

    return jax.jit(jax.grad(objective))(program.params)
