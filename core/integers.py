"""The arithmetic of symmetric int8, as plain array functions.

A value x is stored as the integer q = round(x / scale), with scale = max |x| / 127 over the dimensions that share it
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2017,
arXiv 1712.05877, in its symmetric form without zero points).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

INT8_MAX = 127


def absmax_scale(x: jax.Array, dims: Sequence[int], axes: Sequence[str] = ()) -> jax.Array:
    """The scale that maps the largest magnitude to 127.

    Args:
        x: any floating array.
        dims: dimensions that share a scale.
        axes: manual mesh axes that split those dimensions; the maximum is taken over them too.

    Returns:
        float32, with the rank of `x` and size 1 along `dims`. Where all is zero the scale is 1; where anything is no
        number, neither is the scale, nor what is decoded with it.
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(dims), keepdims=True)
    if axes:
        largest = jax.lax.pmax(largest, tuple(axes))
    return jnp.where(largest == 0, 1.0, largest / INT8_MAX)


def to_integers(x: jax.Array, scale: jax.Array) -> jax.Array:
    """int8: the nearest multiples of `scale`, halves to even, within -127 to 127."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -INT8_MAX, INT8_MAX).astype(jnp.int8)


def from_integers(values: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array that integers and scales stand for."""
    return (values.astype(jnp.float32) * scale).astype(dtype)
