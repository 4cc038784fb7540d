"""Attention by the splash kernel of JAX for TPU.

Blocks of which nothing is seen are left out, masks are computed inside of the kernel, heads of queries share keys
without repeating them. Forward and backward are Pallas kernels; the output and its statistics carry `OUT_NAME`.

JAX, `jax.experimental.pallas.ops.tpu.splash_attention`, as of jax 0.10.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax.passes.flash.spec import OUT_NAME, Pattern, Spec

LANES = 128
"""Sizes of blocks are multiples of the width of the vector registers."""
BLOCK = 512
"""Queries and keys of a block by default, if that divides the length."""
MOST_WASTE = 1.25
"""By how much padding to whole lanes may increase the number of pairs."""
_FLOATS = ("float32", "bfloat16")


def why_not(spec: Spec) -> str:
    """Why the kernel cannot compute an attention, or an empty string."""
    (num_queries, num_keys), (size, value_size) = spec.lengths, spec.sizes
    if spec.bias:
        return "its scores get a bias, which the kernel does not add"
    if spec.given:
        return "its mask is an argument for each pair of query and key; declare it, or capture it as a constant"
    if any(spread.shape[1:3] != (1, 1) for spread in spec.padding):
        return "its padding differs between heads or queries"
    pattern = spec.pattern
    if pattern.leaves_some_blind(*spec.lengths):
        return "some of its queries see no key"
    if pattern.kind == "band" and pattern.leaves_some_blind(_whole(num_queries), _whole(num_keys)):
        return "in whole blocks some of its queries would see no key"
    if size != value_size:
        return f"its heads are of size {size}, its values of size {value_size}"
    if size % 8:
        return f"heads of size {size}, which is no multiple of 8"
    if spec.query_dtype != spec.value_dtype or spec.query_dtype not in _FLOATS:
        return f"it computes in {spec.query_dtype} and {spec.value_dtype}; the kernel takes one of {', '.join(_FLOATS)}"
    waste = _whole(num_queries) * _whole(num_keys) / (num_queries * num_keys)
    if waste > MOST_WASTE:
        return (
            f"{num_queries} queries and {num_keys} keys fill whole blocks of {LANES} badly: {waste:.2f} times the pairs"
        )
    for name, block, length in (("block_q", spec.block_q, num_queries), ("block_k", spec.block_k, num_keys)):
        if block is not None and (block % LANES or _whole(length) % block):
            return f"{name}={block} is no multiple of {LANES} that divides {_whole(length)}"
    return ""


def attention(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None) -> jax.Array:
    """Softmax attention by the kernel.

    Args:
        spec: what is known of it.
        q: queries, [B, T, H, K].
        k: keys, [B, S, G, K].
        v: values, [B, S, G, V].
        present: which keys are there, bool[B, S], or none.

    Returns:
        [B, T, H, V]; of a query that sees nothing anything finite.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    num_queries, num_keys = q.shape[1], k.shape[1]
    all_queries, all_keys = _whole(num_queries), _whole(num_keys)
    q = (q * jnp.asarray(spec.scale, q.dtype)).transpose(0, 2, 1, 3)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, all_queries - num_queries), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, all_keys - num_keys), (0, 0))) for x in (k, v))
    segments = None
    if present is not None or all_keys > num_keys:
        there = jnp.ones((q.shape[0], num_keys), jnp.int32) if present is None else present.astype(jnp.int32)
        there = jnp.pad(there, ((0, 0), (0, all_keys - num_keys)))
        segments = kernels.SegmentIds(jnp.ones((q.shape[0], all_queries), jnp.int32), there)
    kernel = _kernel(
        spec.pattern,
        (num_queries, num_keys),
        q.shape[1],
        (spec.block_q or _block(all_queries), spec.block_k or _block(all_keys)),
        spec.softcap,
        spec.interpret,
    )
    out = jax.vmap(kernel)(q, k, v, segments)
    return out[:, :, :num_queries].transpose(0, 2, 1, 3)


def _whole(length: int) -> int:
    return -(-length // LANES) * LANES


def _block(length: int) -> int:
    """The largest block up to `BLOCK` that divides a length of whole lanes."""
    return next(block for block in range(BLOCK, 0, -LANES) if length % block == 0)


@functools.lru_cache(maxsize=64)
def _kernel(
    pattern: Pattern,
    lengths: tuple[int, int],
    num_heads: int,
    blocks: tuple[int, int],
    softcap: float | None,
    interpret: bool,
) -> Any:
    """The kernel for a mask, for these lengths in whole lanes: which blocks are computed is laid out once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block_q, block_k = blocks
    own, lengths = lengths, (_whole(lengths[0]), _whole(lengths[1]))
    mask: Any
    if pattern.kind == "full":
        mask = masks.FullMask(lengths)
    elif pattern.kind == "band":
        before, after = (None if reach < 0 else reach for reach in (pattern.before, pattern.after))
        window = (before, after)
        causal = window == (None, 0)
        mask = masks.CausalMask(lengths, pattern.offset) if causal else masks.LocalMask(lengths, window, pattern.offset)
    else:
        mask = _looked_up(pattern, own, lengths)
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * num_heads),
            block_sizes=kernels.BlockSizes(
                block_q=block_q,
                block_kv=block_k,
                block_kv_compute=block_k,
                block_q_dkv=block_q,
                block_kv_dkv=block_k,
                block_kv_dkv_compute=block_k,
                block_q_dq=block_q,
                block_kv_dq=block_k,
            ),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=OUT_NAME,
            interpret=interpret,
        )


def _looked_up(pattern: Pattern, own: tuple[int, int], lengths: tuple[int, int]) -> Any:
    """A mask whose blocks the kernel reads; it keeps those that are equal once.

    A rule for chunks would divide inside of the kernel, which jax 0.10.2 compiles for no chip that is not there.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    matrix = pattern.matrix(*own) if pattern.kind == "other" else None

    class LookedUp(masks.Mask):
        @property
        def shape(self) -> tuple[int, int]:
            return lengths

        def __getitem__(self, index: Any) -> np.ndarray:
            rows, columns = (np.arange(n)[part] for n, part in zip(lengths, index, strict=True))
            # Queries that only fill a block see what the last one sees: a kernel divides by what they sum.
            rows = np.minimum(rows, own[0] - 1)[:, None]
            inside = columns < own[1]
            if matrix is not None:
                return matrix[rows, np.minimum(columns, own[1] - 1)] & inside
            return np.asarray(pattern.seen(rows, columns[None])) & inside

        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return hash((pattern, own, lengths))

    return LookedUp()
