"""Programs laid over a mesh, called with arrays whose types say how they lie: meshes with Explicit axes.

`shard` has the compiler decide how values lie between its constraints. So a call of such a program leaves the types at
its door: inside, all axes of the mesh are Auto, and results get types again, those of the constraints that they come
out of (`jax.sharding.auto_axes`). Gradients have the types of what they are of.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from compax import _jax
from compax.capture import Arguments, Captured
from compax.constraint import CONSTRAIN, even_entries
from compax.ir import Op, Operand
from compax.placement import Placement


def untyped(arguments: Arguments, placement: Placement) -> Arguments:
    """Arguments of a call with the signature that they have on Auto axes; as they are for a program on no mesh."""
    if placement.mesh is None:
        return arguments
    signature, mesh = arguments.signature, arguments.signature.mesh
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        mesh = _auto(mesh)
    avals = tuple((*aval[:-1], None) for aval in signature.avals)
    return dataclasses.replace(arguments, signature=dataclasses.replace(signature, avals=avals, mesh=mesh))


def tracing(mesh: AbstractMesh | None) -> AbstractContextManager[Any]:
    """The context in which a graph is captured for a signature that is `untyped`."""
    context = jax.sharding.get_abstract_mesh()
    if mesh is None and not context.empty and AxisType.Explicit in context.axis_types:
        mesh = _auto(context)
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)


def on_auto_axes(
    function: Callable[..., list[jax.Array]], captured: Captured, placement: Placement, *arguments: Any
) -> list[jax.Array]:
    """What a function returns that evaluates a graph. Where arguments are on Explicit axes, these are Auto inside.

    Args:
        function: of the captured graph and the arguments.
        captured: its graph; constraints that its outputs come out of say what types the results have.
        placement: of the program.
        arguments: arrays, in any trees.

    Raises:
        PlacementError: the arguments are on another mesh than the program's.
    """
    mesh = None if placement.mesh is None else _explicit_mesh(arguments)
    if mesh is None:
        return function(captured, *arguments)
    placement.check_mesh(mesh)
    makers = {x: op for op in captured.graph.ops for x in op.outputs}
    out = [NamedSharding(mesh, _spec(output, makers, mesh)) for output in captured.graph.outputs]
    inside: Any = jax.sharding.auto_axes(functools.partial(function, captured), out_sharding=out)
    with jax.sharding.use_abstract_mesh(mesh):
        return inside(*arguments)


def _explicit_mesh(trees: Any) -> AbstractMesh | None:
    """The mesh of the first array whose type says how it lies; none if no type does."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and _jax.is_explicit(leaf):
            return jax.typeof(leaf).sharding.mesh
    return None


def _spec(output: Operand, makers: dict[Any, Op], mesh: AbstractMesh) -> PartitionSpec:
    """How an output lies: whole where nothing says otherwise, and where it does not divide, which no type can say."""
    op = makers.get(output)
    if op is None or op.name != CONSTRAIN:
        return PartitionSpec()
    entries = even_entries(op.attributes["sharding"].spec, output.shape, mesh.shape)
    return PartitionSpec(*(names or None for names in entries))


def _auto(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
