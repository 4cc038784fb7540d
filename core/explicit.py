"""Programs laid over a mesh, called with arrays whose types say how they lie: meshes with Explicit axes.

`shard` has the compiler decide how values lie between its constraints. So a call of such a program leaves the types at
its door: inside, all axes of the mesh are Auto, and results get types again, those of the constraints that they come
out of (`jax.sharding.auto_axes`). Gradients have the types of what they are of.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from compax import _jax
from compax.capture import Arguments
from compax.constraint import CONSTRAIN
from compax.ir import Graph, Op, Operand

_UNCONSTRAINED = PartitionSpec.UNCONSTRAINED


def explicit_mesh(*trees: Any) -> AbstractMesh | None:
    """The mesh of the first array whose type says how it lies; none if no type does."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and _jax.is_explicit(leaf):
            return jax.typeof(leaf).sharding.mesh
    return None


def untyped(arguments: Arguments) -> Arguments:
    """Arguments of a call on Explicit axes, with the signature that they have on Auto ones."""
    signature = arguments.signature
    mesh = signature.mesh
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        mesh = _auto(mesh)
    avals = tuple((*aval[:-1], None) for aval in signature.avals)
    return dataclasses.replace(arguments, signature=dataclasses.replace(signature, avals=avals, mesh=mesh))


def shapes(tree: Any) -> Any:
    """Arrays as shapes and dtypes."""

    def shape(leaf: Any) -> Any:
        aval = _jax.abstract(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))

    return jax.tree.map(shape, tree)


def tracing(mesh: AbstractMesh | None) -> AbstractContextManager[Any]:
    """The context in which a graph is captured for a signature that is `untyped`."""
    context = jax.sharding.get_abstract_mesh()
    if mesh is None and not context.empty and AxisType.Explicit in context.axis_types:
        mesh = _auto(context)
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)


def on_auto_axes(
    function: Callable[..., list[jax.Array]], graph: Graph, mesh: AbstractMesh, *arguments: Any
) -> list[jax.Array]:
    """What a function returns that evaluates a graph, with the axes of a mesh Auto inside of it.

    Args:
        function: of the arguments.
        graph: its graph; constraints that its outputs come out of say what types the results have.
        mesh: with Explicit axes.
        arguments: arrays, in any trees.
    """
    makers = {x: op for op in graph.ops for x in op.outputs}
    out = [NamedSharding(mesh, _spec(output, makers, mesh)) for output in graph.outputs]
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(*arguments)


def _spec(output: Operand, makers: dict[Any, Op], mesh: AbstractMesh) -> PartitionSpec:
    """How an output lies; whole where nothing says otherwise."""
    op = makers.get(output)
    if op is None or op.name != CONSTRAIN:
        return PartitionSpec()
    return PartitionSpec(*_entries(op.attributes["sharding"].spec, mesh))


def _entries(spec: PartitionSpec, mesh: AbstractMesh) -> Iterator[Any]:
    for entry in spec:
        names = () if entry is None or entry is _UNCONSTRAINED else (entry,) if isinstance(entry, str) else entry
        yield tuple(name for name in names if name in mesh.shape) or None


def _auto(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
