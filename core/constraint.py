"""Constraints: an operation that says how a value lies on a mesh, and how its gradient does.

JAX's own `with_sharding_constraint` gives the gradient the sharding of the value. A parameter that is stored in shards
and gathered for its use wants another: its gradient is to be scattered as it is summed, not summed whole on every
device and cut afterwards (Rajbhandari et al., "ZeRO", 2019, arXiv:1910.02054). So the operation carries both.

Meshes are abstract: axes and their sizes. Which devices they are is told by the arrays that a compiled function is
called with; on arrays of a single device the operation does nothing, as all of the mesh is that device.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from compax import _jax

__all__ = ["CONSTRAIN", "constrain"]

CONSTRAIN = "constrain"
"""The operation's name in graphs. Attributes: `sharding`, `gradient`."""


def constrain(
    x: jax.Array, mesh: AbstractMesh, spec: PartitionSpec, gradient: PartitionSpec | None = None
) -> jax.Array:
    """A value that lies on a mesh as told.

    Args:
        x: the value.
        mesh: axes and sizes.
        spec: how the value lies.
        gradient: how its gradient does; as the value if none.

    Returns:
        The value. Forward and reverse mode, `vmap`, `scan`, `remat` and `jit` work on it.
    """
    back = spec if gradient is None else gradient
    return _constrain.bind(x, sharding=NamedSharding(mesh, spec), gradient=NamedSharding(mesh, back))


def lies(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A value with a constraint under the devices it is on; within `jit`, or on an array.

    An array cannot lie in unequal parts: it stays where it is.
    """
    if _jax.is_tracer(x) or (isinstance(getattr(x, "sharding", None), NamedSharding) and _divides(x, sharding)):
        return jax.lax.with_sharding_constraint(x, sharding)
    return x


def entries_of(spec: PartitionSpec, dimensions: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension; none where that is left to the compiler."""
    free = (None, PartitionSpec.UNCONSTRAINED)
    found = [() if names in free else (names,) if isinstance(names, str) else tuple(names) for names in spec]
    return found + [()] * (dimensions - len(found))


def even_entries(spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension, without those of dimensions that do not divide.

    Args:
        spec: of a value.
        shape: of it.
        sizes: of the mesh: by axis.
    """
    return [
        names if size % math.prod(sizes[name] for name in names) == 0 else ()
        for names, size in zip(entries_of(spec, len(shape)), shape, strict=True)
    ]


def _divides(x: jax.Array, sharding: NamedSharding) -> bool:
    spec, sizes = sharding.spec, sharding.mesh.shape
    return even_entries(spec, x.shape, sizes) == entries_of(spec, x.ndim)


def _abstract(aval: Any, **_: Any) -> Any:
    return aval


def _lowered(x: jax.Array, *, sharding: NamedSharding, gradient: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, sharding)


def _transposed(cotangent: Any, x: Any, *, sharding: NamedSharding, gradient: NamedSharding) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(x.aval)]
    return [_constrain.bind(cotangent, sharding=gradient, gradient=sharding)]


def _tangent(tangent: Any, *, sharding: NamedSharding, gradient: NamedSharding) -> Any:
    return _constrain.bind(tangent, sharding=sharding, gradient=gradient)


def _batched(args: Any, dims: Any, *, sharding: NamedSharding, gradient: NamedSharding) -> tuple[Any, int]:
    (x,), (dim,) = args, dims

    def wider(of: NamedSharding) -> NamedSharding:
        entries = [*of.spec, *(None,) * (x.ndim - 1 - len(of.spec))]
        entries.insert(dim, PartitionSpec.UNCONSTRAINED)
        return NamedSharding(of.mesh, PartitionSpec(*entries))

    return _constrain.bind(x, sharding=wider(sharding), gradient=wider(gradient)), dim


_constrain = _jax.Primitive(CONSTRAIN)
_constrain.def_impl(lambda x, *, sharding, gradient: lies(x, sharding))
_constrain.def_abstract_eval(_abstract)
ad.deflinear2(_constrain, _transposed)
ad.primitive_jvps[_constrain] = lambda primals, tangents, **attributes: (
    _constrain.bind(*primals, **attributes),
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent(tangents[0], **attributes),
)
batching.primitive_batchers[_constrain] = _batched
mlir.register_lowering(_constrain, mlir.lower_fun(_lowered, multiple_results=False))
