"""Attention on NVIDIA GPUs: by cuDNN, or by a Pallas kernel through Triton.

What they take is what jax 0.10.2 checks (`jax.nn.dot_product_attention`, `jax.experimental.pallas.ops.gpu.attention`),
checked here first, so that a site is skipped with the reason.
"""

import warnings

import jax
import jax.numpy as jnp

from compax.errors import LoweringError
from compax.passes.flash.spec import MASKED, Spec

_HALF = ("float16", "bfloat16")
LARGEST_HEAD = 128
"""The largest head that cuDNN takes on every architecture; from Hopper on 256."""


def why_not_cudnn(spec: Spec) -> str:
    """Why cuDNN cannot compute an attention, or an empty string."""
    (num_queries, num_keys), (size, value_size), pattern = spec.lengths, spec.sizes, spec.pattern
    if spec.query_dtype != spec.value_dtype or spec.value_dtype not in _HALF:
        return f"it computes in {spec.query_dtype} and {spec.value_dtype}, and cuDNN in 16 bits; put cast before flash"
    if spec.softcap is not None:
        return "its scores are capped"
    if spec.given:
        return "its mask is an argument for each pair of query and key; declare it, or capture it as a constant"
    if size != value_size:
        return f"its heads are of size {size}, its values of size {value_size}"
    if size % 8 or size > LARGEST_HEAD:
        return f"heads of size {size}: it has to be a multiple of 8 and at most {LARGEST_HEAD}"
    if pattern.kind not in ("full", "band"):
        return f"its mask is {pattern.kind}"
    if pattern.kind == "band" and (pattern.after != 0 or pattern.offset or num_queries != num_keys):
        return "its window reaches ahead, or its queries do not start where its keys do"
    if (spec.bias or spec.padding) and (num_queries % 2 or num_keys % 2):
        return f"a bias or padding needs even lengths; there are {num_queries} queries and {num_keys} keys"
    if spec.block_q or spec.block_k:
        return "cuDNN chooses its blocks itself"
    if spec.interpret:
        return "only Pallas kernels are interpreted"
    return ""


def cudnn_attention(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None, bias: jax.Array | None
) -> jax.Array:
    """Softmax attention by cuDNN.

    Which keys are there goes in as a bias: lengths would assume that padding comes last, which a mask need not obey.

    Args:
        spec: what is known of it.
        q: queries, [B, T, H, K].
        k: keys, [B, S, G, K].
        v: values, [B, S, G, V].
        present: which keys are there, bool[B, S], or none.
        bias: what is added to scores, broadcast to [B, H, T, S], or none.

    Raises:
        LoweringError: this installation of JAX has no cuDNN, which it asks already when it traces.
    """
    num_queries, num_keys = spec.lengths
    if present is not None:
        masked = jnp.where(present, 0.0, -1e9 if spec.value_dtype == "bfloat16" else -3e4)[:, None, None, :]
        bias = masked if bias is None else bias + masked
    if bias is not None:
        bias = jnp.maximum(bias, MASKED if spec.value_dtype == "bfloat16" else -6e4)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], num_queries, num_keys)).astype(q.dtype)
    causal = spec.pattern.kind == "band"
    window = (spec.pattern.before, 0) if causal and spec.pattern.before >= 0 else None
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            scale=spec.scale,
            is_causal=causal,
            local_window_size=window,
            implementation="cudnn",
        )
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise LoweringError(
            f"attention was to be computed by cuDNN, and JAX says: {error}; install jax[cuda13], or take "
            "flash(implementation=pallas) or flash(implementation=plain)"
        ) from error


def why_not_pallas(spec: Spec) -> str:
    """Why the Triton kernel cannot compute an attention, or an empty string."""
    (num_queries, num_keys), (heads, groups), (size, value_size) = spec.lengths, spec.heads, spec.sizes
    if spec.softcap is not None:
        return "its scores are capped"
    if spec.bias or spec.given or spec.padding:
        return "the kernel takes neither a bias nor a mask that is an argument"
    if not (spec.pattern.kind == "full" or spec.pattern.is_causal):
        return "its mask is neither full nor causal"
    if size != value_size:
        return f"its heads are of size {size}, its values of size {value_size}"
    if num_queries != num_keys:
        return f"{num_queries} queries and {num_keys} keys; the kernel's backward pass takes as many of both"
    if heads != groups:
        return f"{heads} heads on {groups}: the kernel would have keys repeated"
    if spec.query_dtype != spec.value_dtype:
        return f"it computes in {spec.query_dtype} and {spec.value_dtype}"
    for name, block, length in zip(("block_q", "block_k"), blocks(spec), spec.lengths, strict=True):
        if length % block or block < 32 or block & (block - 1):
            return f"{name}={block} is no power of two from 32 on that divides {length}"
    return ""


def blocks(spec: Spec) -> tuple[int, int]:
    """Queries and keys of a block."""
    block_q, block_k = (
        block or next((b for b in (128, 64, 32) if length % b == 0), 128)
        for block, length in zip((spec.block_q, spec.block_k), spec.lengths, strict=True)
    )
    return block_q, block_k


def pallas_attention(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention by the Triton kernel.

    Args:
        spec: what is known of it.
        q: queries, [B, T, H, K].
        k: keys, [B, T, H, K].
        v: values, [B, T, H, K].
    """
    with warnings.catch_warnings():
        # From jax 0.12 on it is deprecated for one outside of JAX: nothing that whoever applies the pass could change.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention

    block_q, block_k = blocks(spec)
    sizes = attention.BlockSizes(
        block_q=block_q,
        block_k=block_k,
        block_q_dkv=32,
        block_kv_dkv=32,
        block_q_dq=32,
        block_kv_dq=32,
    )
    causal = spec.pattern.kind == "band"
    return attention.mha(q, k, v, None, sm_scale=spec.scale, causal=causal, block_sizes=sizes, interpret=spec.interpret)
