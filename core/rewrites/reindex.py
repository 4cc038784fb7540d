"""Reindexing: a program that keeps some indices of some axes, in a given order.

An axis loses or reorders its indices wherever it occurs: in parameters and state, in constants and other tables where
they are used, and in the parameters of operations that carry sizes. What the result computes is what the same model
computes with the dropped entries of its parameters zeroed: numbers that the model's code derived from sizes, such as
the divisor of a mean or the scale `1 / sqrt(head_dim)` of scores, are literals in the graph and stay what they were.
Reordering alone changes nothing but the order of sums.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.analysis.atoms import Atoms
from compax.analysis.axes import Axis
from compax.capture import Captured
from compax.encoding import Encoded
from compax.errors import RewriteError
from compax.program import Program
from compax.rewrites.narrowing import Decisions, Narrowing, check_indices
from compax.rewrites.resizing import Resizer


def reindex(program: Program, keep: Mapping[Axis, Sequence[int]], entry: str | None = None) -> Program:
    """A program that keeps the given indices of axes, in the given order, everywhere.

    Args:
        program: the program; it is not changed.
        keep: axes of the first graph of `entry`, each with the indices that are kept.
        entry: which entry; the first one by default.

    Returns:
        A program whose parameters, state and graphs, those of all entries, have the new sizes.

    Raises:
        RewriteError: an axis is fixed, occurs in no parameter and no state, or cannot be followed through an operation;
            or another graph over the same parameters takes a dimension apart so that the indices make no whole.
    """
    return reindex_by(program, decide(program, keep, entry))


def reindex_by(program: Program, decisions: Decisions) -> Program:
    """A program of which `decide` found the decisions."""
    if not decisions:
        return program
    stores = {"parameter": dict(program.params), "state": dict(program.state)}
    chosen: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for (kind, path, dim), indices in decisions.items():
        chosen.setdefault((kind, path), {})[dim] = np.asarray(indices)
    for (kind, path), dims in chosen.items():
        stores[kind][path] = take_indices(stores[kind][path], dims, path)
    graphs = {key: reindex_captured(captured, decisions) for key, captured in program.graphs.items()}
    return program.restructured(params=stores["parameter"], state=stores["state"], graphs=graphs)


def decide(
    program: Program, keep: Mapping[Axis, Sequence[int]], entry: str | None = None
) -> dict[tuple[str, str, int], tuple[int, ...]]:
    """What `reindex` keeps of parameters and state, in all graphs together: data to replay it on another graph.

    Args:
        program: the program.
        keep: as for `reindex`.
        entry: likewise.

    Raises:
        RewriteError: as `reindex`, as far as it can be told from parameters and state.
    """
    first = program.graph(entry)
    narrowing = Narrowing(first)
    for axis, indices in keep.items():
        _choose(narrowing, axis, indices)
    others = [Narrowing(captured) for captured in program.graphs.values() if captured is not first]
    decisions = narrowing.decisions()
    while True:
        for each in (narrowing, *others):
            each.decide(decisions)
            decisions |= each.decisions()
        if all(each.complete(decisions) for each in (narrowing, *others)):
            return decisions


def reindex_captured(captured: Captured, decisions: Decisions) -> Captured:
    """One graph of a program, with the indices that are kept of parameters and state.

    Args:
        captured: the graph; it is not changed.
        decisions: what is kept, by (kind, path, dimension), as `decide` returns it.

    Returns:
        The new graph, or the one that was given if it has none of these dimensions.

    Raises:
        RewriteError: as `reindex`; or an axis of the graph is among the decisions in some parameters and not in others.
    """
    narrowing = Narrowing(captured)
    narrowing.decide(decisions)
    missing = sorted(narrowing.decisions().keys() - decisions.keys())
    if missing:
        kind, path, dim = missing[0]
        raise RewriteError(
            f"dimension {dim} of the {kind} '{path}' is an axis of which indices are kept in the graph "
            f"'{captured.entry.name}', but it is not among the decisions; decide with a program that has this graph"
        )
    if not narrowing.keep:
        return captured
    return dataclasses.replace(captured, graph=Resizer(narrowing).run())


def _choose(narrowing: Narrowing, axis: Axis, indices: Sequence[int]) -> None:
    chosen = check_indices(indices, axis.size, f"the axis '{axis.name}'")
    if np.array_equal(chosen, np.arange(axis.size)):
        return
    if axis.fixed:
        raise RewriteError(
            f"the indices of the axis '{axis.name}' must stay where they are: {'; '.join(axis.fixed)}; keep all of "
            "them, in their order"
        )
    atom = Atoms.find(axis.atom)
    leaf = None if atom.factors or atom.segments else narrowing.leaf(atom.number, axis.parameters)
    if leaf is None or leaf.size != axis.size:
        raise RewriteError(
            f"the axis '{axis.name}' of size {axis.size} is not found in a parameter or in the state of the graph "
            f"'{narrowing.captured.entry.name}'; give axes of that graph, those that are made of no other axes"
        )
    narrowing.choose(leaf, chosen, f"the axis '{axis.name}'")


def take_indices(x: Any, dims: Mapping[int, np.ndarray], path: str) -> Any:
    """A parameter with some indices of some dimensions.

    Raises:
        RewriteError: it is encoded, and its encoding cannot do so.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = tuple(len(dims[i]) if i in dims else size for i, size in enumerate(x.shape))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
    if isinstance(x, Encoded):
        for dim, indices in dims.items():
            x = _take_encoded(x, dim, indices, path)
        return x
    if _in_host_memory(x):
        result = np.asarray(x)
        for dim, indices in dims.items():
            result = np.take(result, indices, dim)
        return jax.device_put(result, x.sharding)
    for dim, indices in dims.items():
        x = jnp.take(x, indices, dim)
    return x


def _in_host_memory(x: Any) -> bool:
    """Whether NumPy can index an array: nothing has to be compiled for its shape then."""
    if _jax.is_tracer(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu"


def _take_encoded(x: Encoded, dim: int, indices: np.ndarray, path: str) -> Encoded:
    """By slices in a row: what a format can do, it can do so."""
    borders = np.flatnonzero(np.diff(indices) != 1) + 1
    parts: list[Encoded] = []
    for run in np.split(indices, borders):
        slices = [(0, size, 1) for size in x.shape]
        slices[dim] = (int(run[0]), int(run[-1]) + 1, 1)
        part = x.slice(tuple(slices))
        if part is None:
            break
        parts.append(part)
    else:
        result = parts[0] if len(parts) == 1 else parts[0].concatenate(parts[1:], dim)
        if isinstance(result, Encoded):
            return result
    raise RewriteError(
        f"the parameter '{path}' is stored as {x.format}, which cannot keep some indices of dimension {dim} without "
        "being unpacked; do this before the pass that encodes it, or decode it (`program.decode`)"
    )
