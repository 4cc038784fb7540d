"""Products with int8 weights on a CPU, block by block.

XLA's CPU compiler turns "cast, then multiply" with few rows into scalar code and writes the cast weights to memory. A
loop that casts a block that stays in cache and multiplies it in float32 reads each byte of the weights once.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block: 512 KiB as float32, within a core's second-level cache."""
SMALLEST_WEIGHT = 1 << 16
"""Elements below which one cast of everything is as fast."""
FEW_ROWS = 4
"""Rows of activations up to which the integer product gains as well."""
EXACT_DEPTH = 1024
"""Products of int8 that float32 sums without rounding: 1024 * 127**2 < 2**24."""


def block_size(rows: int, columns: int) -> int | None:
    """How many of `rows` make a block; `None` if blocks are of no use."""
    if rows * columns < SMALLEST_WEIGHT:
        return None
    fitting = [size for size in (512, 256, 128, 64, 32) if rows % size == 0 and size * columns <= BLOCK_ELEMENTS]
    smallest = [size for size in (32, 64) if rows % size == 0]
    return fitting[0] if fitting else smallest[0] if smallest else None


def matmul(x: jax.Array, values: jax.Array, block: int, *, transposed: bool) -> jax.Array:
    """Multiplies by int8 weights, casting `block` of their leading rows at a time.

    Args:
        x: floating [M, K], or int8 with K-blocks of at most `EXACT_DEPTH`: then the sums are exact.
        values: int8 [K, N], or [N, K] if `transposed`.
        block: rows of `values` in a block; divides their number.
        transposed: whether the contracted dimension of `values` is the second.

    Returns:
        [M, N]: float32, or int32 for integer `x`.
    """
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    out_dtype = jnp.int32 if integer else jnp.float32
    compute = jnp.float32 if integer else x.dtype
    x = x.astype(compute)
    columns = values.shape[0] if transposed else values.shape[1]

    def multiply(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
        numbers = (((1,), (contracted,)), ((), ()))
        out = jax.lax.dot_general(left, right.astype(compute), numbers, preferred_element_type=jnp.float32)
        return out.astype(out_dtype)

    def columns_turn(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(values, i * block, block, 0)
        return jax.lax.dynamic_update_slice_in_dim(out, multiply(x, part, 1), i * block, 1)

    def depth_turn(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(values, i * block, block, 0)
        return out + multiply(jax.lax.dynamic_slice_in_dim(x, i * block, block, 1), part, 0)

    start = jnp.zeros((x.shape[0], columns), out_dtype)
    return jax.lax.fori_loop(0, values.shape[0] // block, columns_turn if transposed else depth_turn, start)


def as_matrix(shape: Sequence[int], contract: Sequence[int]) -> tuple[int, int, bool] | None:
    """Reads a weight as a matrix without moving it: (leading size, trailing size, whether the trailing is contracted).

    `None` if its contracted dimensions, in order, are neither the first nor the last ones.
    """
    count, ndim = len(contract), len(shape)
    size = 1
    for dim in contract:
        size *= shape[dim]
    total = 1
    for dim in shape:
        total *= dim
    if not total:
        return None
    if tuple(contract) == tuple(range(count)):
        return size, total // size, False
    if tuple(contract) == tuple(range(ndim - count, ndim)):
        return total // size, size, True
    return None
