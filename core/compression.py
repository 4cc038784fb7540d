"""Values that `jax.checkpoint` keeps as int8: an operation that says so of a value.

The forward pass goes on with the value itself, so that what a program computes stays the same bits. Kept for the
backward pass are int8 and scales; what reads the value there reads what they decode to, and what it was computed from
is not computed again for it. So gradients are approximated, and nothing else (Chakrabarti & Moseley, "Backprop with
Approximate Activations for Memory-efficient Network Training", 2019, arXiv:1901.07988; Chen et al., "ActNN", 2021,
arXiv:2104.14129, where rounding is random; here it is to nearest).

Scales are those of the last dimension: one for each 128 values, or for all where 128 does not divide them. So they lie
on a mesh as the value does. Without `jax.checkpoint` around it the operation does nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from compax import _jax
from compax.errors import LoweringError
from compax.integers import absmax_scale, from_integers, to_integers

__all__ = ["COMPRESS", "compressed", "encoded_shapes", "is_compress"]

COMPRESS = "compress"
"""The operation's name in graphs. Attribute: `encoded`, true for the scales of what is kept."""

_GROUP = 128


def compressed(x: jax.Array) -> jax.Array:
    """A value of which checkpoints keep int8 and scales.

    Args:
        x: floating, with one dimension or more.

    Returns:
        The value. Reverse mode once, `vmap`, `scan`, `shard_map` and `jit` work on it.
    """
    return _compress.bind(x, encoded=False)


def is_compress(primitive: Any) -> bool:
    """Whether a primitive, as policies of `jax.checkpoint` get them, is this operation."""
    return primitive is _compress


def encoded_shapes(x: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What is kept of a value: the integers and their scales."""
    groups = x.shape[-1] // _group(x.shape)
    return (
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct((*x.shape[:-1], groups), jnp.float32),
    )


def _group(shape: tuple[int, ...]) -> int:
    """How many values share a scale."""
    return _GROUP if shape[-1] % _GROUP == 0 else max(1, shape[-1])


@jax.jit
def _encode(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = jnp.reshape(x, (*x.shape[:-1], -1, _group(x.shape)))
    scale = absmax_scale(rows, (-1,))
    integers = jnp.reshape(to_integers(rows, scale), x.shape)
    return x, integers, _compress.bind(jnp.squeeze(scale, -1), encoded=True)


@jax.jit(static_argnums=(0, 1))
def _decode(shape: tuple[int, ...], dtype: Any, integers: jax.Array, scale: jax.Array) -> jax.Array:
    rows = jnp.reshape(integers, (*shape[:-1], -1, _group(shape)))
    return jnp.reshape(from_integers(rows, scale[..., None], dtype), shape)


def _tangent(primals: Any, tangents: Any, *, encoded: bool) -> tuple[jax.Array, Any]:
    if encoded and not isinstance(tangents[0], ad.Zero):
        raise LoweringError(
            "a gradient through values that are kept as int8 cannot be differentiated again: rounding has no "
            "derivative; leave `compress` and `lossy` out of remat for second derivatives"
        )
    return _compress.bind(*primals, encoded=encoded), tangents[0]


def _batched(args: Any, dims: Any, *, encoded: bool) -> tuple[jax.Array, int]:
    # Scales are along the last dimension, which is not to be the batch.
    return _compress.bind(jnp.moveaxis(args[0], dims[0], 0), encoded=encoded), 0


_compress = _jax.Primitive(COMPRESS)
_compress.def_impl(lambda x, *, encoded: x)
_compress.def_abstract_eval(lambda x, *, encoded: x)
ad.primitive_jvps[_compress] = _tangent
batching.primitive_batchers[_compress] = _batched
mlir.register_lowering(_compress, lambda context, x, *, encoded: [x])
_jax.keep_encoded(_compress, _encode, _decode)
