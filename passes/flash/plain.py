"""Attention in blocks, in operations that every platform has.

The matrix of queries and keys never exists as a whole: a loop goes over the blocks of it in which something is seen,
with the running maximum and sum of each query's exponentials. The backward pass computes every block again from the
output and the logarithm of that sum, which are all that is kept.

Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, arXiv:2205.14135; Dao,
"FlashAttention-2", 2023, arXiv:2307.08691; Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021,
arXiv:2112.05682. Here the loop runs over a list of blocks instead of a grid: what a mask leaves out costs nothing.

Letters in shapes:
    B batch    T positions of queries    S positions of keys    G key-value heads    R query heads of each
    K head size    V size of values    N rows of a block: its queries times R    M keys of a block
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from compax import _jax
from compax.passes.flash.blocks import block_pairs, even_block, needs_mask
from compax.passes.flash.spec import LSE_NAME, MASKED, OUT_NAME, Pattern

BLOCK = 128
LONG_BLOCK = 256
LONG = 1024
"""Queries and keys of a block by default, the larger one beyond this length: about what is fastest on two CPU cores
(`experiments/benchmarks/attention.py`)."""


class Extras(NamedTuple):
    """What is given for pairs of queries and keys; each [B or 1, G or 1, R or 1, T or 1, S or 1], or none.

    Attributes:
        seen: whether a pair is seen: bool.
        bias: what is added to scores: float32.
    """

    seen: jax.Array | None
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static side of an attention in blocks.

    Attributes:
        pattern: which keys queries see.
        scale: what scores are multiplied with.
        softcap: `cap * tanh(scores / cap)`, or none.
        lengths: number of queries and keys.
        blocks: queries and keys of a block.
        axes: mesh axes that all operands vary over, inside of `shard_map`.
    """

    pattern: Pattern
    scale: float
    softcap: float | None
    lengths: tuple[int, int]
    blocks: tuple[int, int]
    axes: tuple[str, ...] = ()

    @property
    def padded(self) -> tuple[int, int]:
        """Lengths in whole blocks."""
        (num_queries, num_keys), (block_q, block_k) = self.lengths, self.blocks
        return -(-num_queries // block_q) * block_q, -(-num_keys // block_k) * block_k

    def pairs(self) -> np.ndarray:
        """The blocks that are computed."""
        return block_pairs(self.pattern, self.lengths, self.blocks)

    def zeros(self, shape: tuple[int, ...], fill: float = 0.0) -> jax.Array:
        """A float32 array, varying over the mesh axes that the operands vary over."""
        return _jax.vary(jnp.full(shape, fill, jnp.float32), frozenset(self.axes))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    *,
    scale: float,
    softcap: float | None = None,
    seen: jax.Array | None = None,
    bias: jax.Array | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention without a matrix of queries and keys, differentiable in reverse.

    Args:
        query: [B, T, G * R, K].
        key: [B, S, G, K].
        value: [B, S, G, V].
        pattern: which keys queries see.
        scale: what scores are multiplied with.
        softcap: scores become `cap * tanh(scores / cap)`, or none.
        seen: which pairs are seen besides, bool, broadcast to [B, G * R, T, S].
        bias: what is added to scores, broadcast to the same.
        block_q: how many queries are computed together.
        block_k: how many keys.

    Returns:
        The output, [B, T, G * R, V], zero where a query sees nothing; and the logarithm of the sum of exponentials,
        float32[B, T, G * R], infinite there. The second has no gradient.
    """
    batch, num_queries, heads, size = query.shape
    num_keys, groups = key.shape[1:3]
    default = BLOCK if max(num_queries, num_keys) <= LONG else LONG_BLOCK
    axes = sorted(frozenset[str]().union(*(_jax.varying_axes(x) for x in (query, key, value, seen, bias) if _is(x))))
    plan = Plan(
        pattern,
        scale,
        softcap,
        (num_queries, num_keys),
        (even_block(num_queries, block_q or default), even_block(num_keys, block_k or default)),
        tuple(axes),
    )
    union = frozenset(axes)
    q = _jax.vary(query, union).reshape(batch, num_queries, groups, heads // groups, size).transpose(0, 2, 1, 3, 4)
    k, v = (_jax.vary(x, union).transpose(0, 2, 1, 3) for x in (key, value))
    extras = Extras(*(None if x is None else _jax.vary(_in_groups(x, groups), union) for x in (seen, bias)))
    q, k, v, extras = _padded(plan, q, k, v, extras)
    out, lse = _compiled(q, k, v, extras, plan)
    out = out[:, :, :num_queries].transpose(0, 2, 1, 3, 4).reshape(batch, num_queries, heads, value.shape[3])
    return out, lse[:, :, :num_queries].transpose(0, 2, 1, 3).reshape(batch, num_queries, heads)


def _is(x: jax.Array | None) -> bool:
    return x is not None


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    """[B or 1, H or 1, T or 1, S or 1] with heads in groups."""
    split = (groups, x.shape[1] // groups) if x.shape[1] > 1 else (1, 1)
    return x.reshape(x.shape[0], *split, *x.shape[2:])


def _padded(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array, jax.Array, Extras]:
    (num_queries, num_keys), (all_queries, all_keys) = plan.lengths, plan.padded
    more_queries, more_keys = all_queries - num_queries, all_keys - num_keys
    if not more_queries and not more_keys:
        return q, k, v, extras

    def pad(x: jax.Array, **dims: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        for dim, more in dims.items():
            widths[int(dim[1:])] = (0, more)
        return jnp.pad(x, widths)

    def pair(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return pad(x, d3=more_queries if x.shape[3] > 1 else 0, d4=more_keys if x.shape[4] > 1 else 0)

    extras = Extras(pair(extras.seen), pair(extras.bias))
    return pad(q, d2=more_queries), pad(k, d2=more_keys), pad(v, d2=more_keys), extras


# -- one block --------------------------------------------------------------------------------------------------------


def _rows(x: jax.Array, start: Any, block: int) -> jax.Array:
    """Queries of a block, all heads of a group below each other: [B, G, N, ...]."""
    part = jax.lax.dynamic_slice_in_dim(x, start * block, block, axis=2)
    return part.reshape(*part.shape[:2], block * part.shape[3], *part.shape[4:])


def _columns(x: jax.Array, start: Any, block: int) -> jax.Array:
    """Keys of a block: [B, G, M, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start * block, block, axis=2)


def _pair_part(x: jax.Array, i: Any, j: Any, plan: Plan) -> jax.Array:
    """What is given for the pairs of a block: [B or 1, G or 1, block_q or 1, R or 1, M or 1]."""
    block_q, block_k = plan.blocks
    if x.shape[3] > 1:
        x = jax.lax.dynamic_slice_in_dim(x, i * block_q, block_q, axis=3)
    if x.shape[4] > 1:
        x = jax.lax.dynamic_slice_in_dim(x, j * block_k, block_k, axis=4)
    return x.swapaxes(2, 3)


def _scores(
    q: jax.Array, k: jax.Array, extras: Extras, whole: jax.Array | None, i: Any, j: Any, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a block, float32[B, G, block_q, R, M], masked; and the derivative of the cap, if there is one."""
    (block_q, block_k), num_keys = plan.blocks, plan.lengths[1]
    raw = jnp.einsum("bgnk,bgmk->bgnm", q, k, preferred_element_type=jnp.float32) * plan.scale
    scores = raw.reshape(*raw.shape[:2], block_q, -1, block_k)
    slope = None
    if plan.softcap is not None:
        bent = jnp.tanh(scores / plan.softcap)
        scores, slope = plan.softcap * bent, 1.0 - bent * bent
    if extras.bias is not None:
        scores = jnp.maximum(scores + _pair_part(extras.bias, i, j, plan), MASKED)
    seen: Any = None
    if needs_mask(plan.pattern, plan.lengths, plan.blocks):
        rows = i * block_q + jax.lax.broadcasted_iota(jnp.int32, (block_q, 1), 0)
        columns = j * block_k + jax.lax.broadcasted_iota(jnp.int32, (1, block_k), 1)
        if whole is not None:
            seen = jax.lax.dynamic_slice(whole, (i * block_q, j * block_k), (block_q, block_k))
        else:
            seen = jnp.asarray(plan.pattern.seen(rows, columns))
        if num_keys % block_k:
            seen = seen & (columns < num_keys)
        seen = seen[None, None, :, None, :]
    if extras.seen is not None:
        given = _pair_part(extras.seen, i, j, plan)
        seen = given if seen is None else seen & given
    return (scores if seen is None else jnp.where(seen, scores, MASKED)), slope


def _whole(plan: Plan) -> jax.Array | None:
    """The matrix of what is seen, where it has no rule."""
    if plan.pattern.kind != "other":
        return None
    matrix = np.zeros(plan.padded, bool)
    matrix[: plan.lengths[0], : plan.lengths[1]] = plan.pattern.matrix(*plan.lengths)
    return jnp.asarray(matrix)


def _over_pairs(plan: Plan, turn: Any, carry: Any) -> Any:
    """Runs `turn(carry, i, j, first)` over all blocks; `first` says that a new block of queries begins."""
    pairs = plan.pairs()
    if len(pairs) == 1:
        return turn(carry, int(pairs[0, 0]), int(pairs[0, 1]), True)
    first = np.diff(pairs[:, 0], prepend=-1) != 0
    table = jnp.asarray(np.concatenate([pairs, first[:, None]], axis=1, dtype=np.int32))
    return jax.lax.scan(lambda carry, x: (turn(carry, x[0], x[1], x[2] != 0), None), carry, table)[0]


def _put(whole: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start * part.shape[2], axis=2)


# -- forward and backward ---------------------------------------------------------------------------------------------


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The output, [B, G, T, R, V], and the logarithm of the sum of exponentials, float32[B, G, T, R]."""
    (batch, groups, num_queries, repeats, _), size = q.shape, v.shape[3]
    block_q, block_k = plan.blocks
    rows, whole = block_q * repeats, _whole(plan)

    def turn(carry: Any, i: Any, j: Any, first: Any) -> Any:
        out, lse, state = carry
        peak, total, sums = state
        scores, _ = _scores(_rows(q, i, block_q), _columns(k, j, block_k), extras, whole, i, j, plan)
        scores = scores.reshape(batch, groups, rows, block_k)
        if first is not True:
            peak = jnp.where(first, MASKED, peak)
            total, sums = jnp.where(first, 0.0, total), jnp.where(first, 0.0, sums)
        higher = jnp.maximum(peak, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(peak - higher)
        total = total * kept + weights.sum(axis=-1)
        products = jnp.einsum(
            "bgnm,bgmv->bgnv", weights.astype(v.dtype), _columns(v, j, block_k), preferred_element_type=jnp.float32
        )
        sums = sums * kept[..., None] + products
        nothing = higher <= MASKED / 2
        block = jnp.where(nothing[..., None], 0.0, sums / total[..., None])
        logs = jnp.where(nothing, jnp.inf, higher + jnp.log(total))
        out = _put(out, block.reshape(batch, groups, block_q, repeats, size), i)
        lse = _put(lse, logs.reshape(batch, groups, block_q, repeats), i)
        return out, lse, (higher, total, sums)

    state = (
        plan.zeros((batch, groups, rows), MASKED),
        plan.zeros((batch, groups, rows)),
        plan.zeros((batch, groups, rows, size)),
    )
    out = plan.zeros((batch, groups, num_queries, repeats, size)).astype(v.dtype)
    lse = plan.zeros((batch, groups, num_queries, repeats), np.inf)
    out, lse, _ = _over_pairs(plan, turn, (out, lse, state))
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, plan: Plan) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, extras, plan)


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, plan: Plan) -> Any:
    out, lse = _forward(q, k, v, extras, plan)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (q, k, v, extras, out, lse)


def _attention_backward(plan: Plan, saved: Any, gradients: Any) -> Any:
    q, k, v, extras, out, lse = saved
    gradient = gradients[0]
    batch, groups, _, repeats, _ = q.shape
    block_q, block_k = plan.blocks
    rows, whole = block_q * repeats, _whole(plan)
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def turn(carry: Any, i: Any, j: Any, first: Any) -> Any:
        dq, dk, dv, dbias = carry
        q_rows, k_columns, v_columns = _rows(q, i, block_q), _columns(k, j, block_k), _columns(v, j, block_k)
        g_rows = _rows(gradient, i, block_q)
        scores, slope = _scores(q_rows, k_columns, extras, whole, i, j, plan)
        logs, sums = _rows(lse, i, block_q), _rows(inner, i, block_q)
        weights = jnp.exp(scores.reshape(batch, groups, rows, block_k) - logs[..., None])
        dv_part = jnp.einsum(
            "bgnm,bgnv->bgmv", weights.astype(v.dtype), g_rows.astype(v.dtype), preferred_element_type=jnp.float32
        )
        back = jnp.einsum("bgnv,bgmv->bgnm", g_rows.astype(v.dtype), v_columns, preferred_element_type=jnp.float32)
        ds = weights * (back - sums[..., None])
        if dbias is not None:
            dbias = _add_pairs(dbias, ds.reshape(scores.shape), i, j, plan)
        if slope is not None:
            ds = ds * slope.reshape(ds.shape)
        ds = (ds * plan.scale).astype(q.dtype)
        dq_part = jnp.einsum("bgnm,bgmk->bgnk", ds, k_columns, preferred_element_type=jnp.float32)
        dk_part = jnp.einsum("bgnm,bgnk->bgmk", ds, q_rows, preferred_element_type=jnp.float32)
        dq_part = dq_part.reshape(batch, groups, block_q, repeats, -1)
        dq = _put(dq, jax.lax.dynamic_slice_in_dim(dq, i * block_q, block_q, axis=2) + dq_part, i)
        dk, dv = (_put(x, _columns(x, j, block_k) + part, j) for x, part in ((dk, dk_part), (dv, dv_part)))
        return dq, dk, dv, dbias

    dbias = None if extras.bias is None else plan.zeros(extras.bias.shape)
    carry = (plan.zeros(q.shape), plan.zeros(k.shape), plan.zeros(v.shape), dbias)
    dq, dk, dv, dbias = _over_pairs(plan, turn, carry)
    if extras.bias is not None:
        dbias = dbias.astype(extras.bias.dtype)
    seen: Any = None if extras.seen is None else np.zeros(extras.seen.shape, jax.dtypes.float0)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), Extras(seen, dbias)


def _add_pairs(dbias: jax.Array, ds: jax.Array, i: Any, j: Any, plan: Plan) -> jax.Array:
    """Adds the gradient of the scores of a block, [B, G, block_q, R, M], to that of what was added to them."""
    part = ds.swapaxes(2, 3)
    gone = tuple(dim for dim, size in enumerate(dbias.shape) if size == 1 and part.shape[dim] > 1)
    part = part.sum(axis=gone, keepdims=True)
    start = [0, 0, 0, i * plan.blocks[0] if dbias.shape[3] > 1 else 0, j * plan.blocks[1] if dbias.shape[4] > 1 else 0]
    before = jax.lax.dynamic_slice(dbias, start, part.shape)
    return jax.lax.dynamic_update_slice(dbias, before + part, start)


_attention.defvjp(_attention_forward, _attention_backward)
# Traced once for each shape, not once for each layer.
_compiled = jax.jit(_attention, static_argnums=4)
