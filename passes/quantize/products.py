"""Convolutions and grouped products with int8 weights, as one differentiable function.

The forward pass reads the integers; the backward pass goes through the floating-point form of the same product, from
the integers again, so that no decoded copy is saved.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compax import _jax
from compax.integers import absmax_scale, to_integers


class Product(NamedTuple):
    """The static side of a product with a weight; hashable.

    Attributes:
        convolution: a `conv_general_dilated`; otherwise a `ragged_dot_general`.
        options: the primitive's parameters but its accumulator.
        shared: dimensions of the activations that share a scale.
        dtype: of the output.
        integer: whether activations are rounded to int8 and the product computed in integers.
    """

    convolution: bool
    options: tuple[tuple[str, Any], ...]
    shared: tuple[int, ...]
    dtype: Any
    integer: bool


def _bind(x: jax.Array, values: jax.Array, sizes: jax.Array | None, product: Product, accumulator: Any) -> jax.Array:
    options = dict(product.options)
    if product.convolution:
        return _jax.convolve(x, values, preferred_element_type=accumulator, **options)
    assert sizes is not None
    numbers = options["ragged_dot_dimension_numbers"]
    return jax.lax.ragged_dot_general(
        x, values, sizes, numbers, precision=options["precision"], preferred_element_type=accumulator
    )


def _output_scale(scale: jax.Array, sizes: jax.Array | None, rows: int, product: Product) -> jax.Array:
    """The weight's scale, laid out to multiply the product: by output channel, or by the group that a row is in."""
    options = dict(product.options)
    if product.convolution:
        numbers = options["dimension_numbers"]
        shape = [1] * len(numbers.out_spec)
        shape[numbers.out_spec[1]] = -1
        return jnp.reshape(scale, shape)
    assert sizes is not None
    (contract, _) = options["ragged_dot_dimension_numbers"].dot_dimension_numbers
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return jnp.squeeze(scale, contract[1])[jnp.minimum(group, sizes.shape[0] - 1)]


def _floating(x: jax.Array, values: jax.Array, scale: jax.Array, sizes: Any, product: Product) -> jax.Array:
    out = _bind(x, values.astype(x.dtype), sizes, product, jnp.float32)
    return (out * _output_scale(scale, sizes, x.shape[0], product)).astype(product.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def scaled_product(x: jax.Array, values: jax.Array, scale: jax.Array, sizes: Any, product: Product) -> jax.Array:
    """The product of activations with int8 weights.

    Args:
        x: activations, floating; a convolution's input, or [M, K] rows in groups.
        values: int8 weights.
        scale: float32, constant along the contracted dimensions.
        sizes: int32 [G], rows in each group; `None` for a convolution.
        product: the static side.
    """
    if not product.integer:
        return _floating(x, values, scale, sizes, product)
    x_scale = absmax_scale(x, product.shared)
    if product.convolution:
        numbers = dict(product.options)["dimension_numbers"]
        shape = [1] * x.ndim
        shape[numbers.out_spec[0]] = -1
        row_scale = jnp.reshape(x_scale, shape)
    else:
        row_scale = x_scale
    out = _bind(to_integers(x, x_scale), values, sizes, product, jnp.int32).astype(jnp.float32)
    return (out * row_scale * _output_scale(scale, sizes, x.shape[0], product)).astype(product.dtype)


def _forward(x: jax.Array, values: jax.Array, scale: jax.Array, sizes: Any, product: Product) -> tuple[jax.Array, Any]:
    return scaled_product(x, values, scale, sizes, product), (x, values, scale, sizes)


def _backward(product: Product, saved: Any, gradient: jax.Array) -> tuple[jax.Array, None, None, None]:
    x, values, scale, sizes = saved
    # The product is linear in x: only the shape of what was saved is read.
    _, transposed = jax.vjp(lambda x: _floating(x, values, scale, sizes, product), x)
    return transposed(gradient)[0], None, None, None


scaled_product.defvjp(_forward, _backward)
