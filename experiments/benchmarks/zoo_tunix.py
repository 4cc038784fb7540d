"""Models of google-tunix, NNX: built from their authors' files, tiny, with what is known of each.

Their masks and positions are arguments, `bool[B, T, S]` and `int32[B, T]`, so nothing of a mask is in the model but
Gemma's windows. There is no dropout in any of them. A cache is a dictionary of arrays that goes in and comes out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.experiments.benchmarks import third_party, zoo_case
from compax.experiments.benchmarks.zoo_case import Attention, Case, Expected, FeedForward, Variant, Widths

NUM_EXPERTS = 7
NUM_EXPERTS_PER_TOKEN = 3

_W = Widths()
_NO_TRAINING = "the code has neither dropout nor a train mode"


def _cache(widths: Widths, num_layers: int, num_kv_heads: int, dtype: Any) -> dict[str, dict[str, jax.Array]]:
    """What the author's sampler keeps for each layer, with numbers in it: unused places must not be read."""
    random = np.random.default_rng(3)
    shape = (widths.batch, widths.cache, num_kv_heads, widths.head_dim)
    end = jnp.full((widths.batch,), widths.filled, jnp.int32)
    return {
        f"layer_{number}": {
            "k": zoo_case.fill(("k",), shape, dtype, random),
            "v": zoo_case.fill(("v",), shape, dtype, random),
            "end_index": end,
        }
        for number in range(num_layers)
    }


def _case(widths: Widths, variant: Variant, module: Any, num_layers: int, num_kv_heads: int) -> Case:
    batch, length = widths.batch, widths.length
    if not variant.decode:
        mask = jnp.tril(jnp.ones((length, length), bool)) & (
            zoo_case.present(batch, length, padding=variant.padding)[:, None, :] > 0
        )
        inputs = (zoo_case.tokens(batch, length, widths.vocabulary), zoo_case.positions(batch, length), None, mask)
        return Case(module, None, inputs, {}, lambda output: output[0])
    # Padding comes first, and positions count from the first token after it.
    there = zoo_case.present(batch, widths.cache, padding=variant.padding, left=True)
    position = jnp.sum(there[:, : widths.filled], axis=1, keepdims=True, dtype=jnp.int32)
    mask = (there > 0)[:, None, :] & (jnp.arange(widths.cache) <= widths.filled)
    cache = _cache(widths, num_layers, num_kv_heads, zoo_case.DTYPES[variant.dtype])
    inputs = (zoo_case.tokens(batch, 1, widths.vocabulary), position, cache, mask)
    return Case(module, None, inputs, {}, lambda output: output[0])


def _llama_shape(widths: Widths) -> dict[str, Any]:
    return {
        "num_layers": 2,
        "vocab_size": widths.vocabulary,
        "embed_dim": widths.model_dim,
        "hidden_dim": widths.hidden_dim,
        "num_heads": widths.num_heads,
        "head_dim": widths.head_dim,
        "num_kv_heads": widths.num_kv_heads,
        "rope_theta": 10_000,
        "norm_eps": 1e-6,
    }


def _llama_like(widths: Widths, variant: Variant, family: str, class_name: str, **fields: Any) -> Case:
    source = third_party.tunix_model(family)
    config = source.ModelConfig(**_llama_shape(widths), **fields)
    dtype = zoo_case.DTYPES[variant.dtype]
    # Llama3 has no option: it computes in the dtype in which its parameters were loaded.
    parameters = dtype if family == "llama3" else None
    module = zoo_case.filled_module(lambda: getattr(source, class_name)(config, rngs=nnx.Rngs(0)), parameters)
    return _case(widths, variant, module, config.num_layers, config.num_kv_heads)


def tunix_llama3(widths: Widths, variant: Variant) -> Case:
    """RMSNorm, rotary positions, grouped queries, gated feed-forward, own head."""
    return _llama_like(widths, variant, "llama3", "Llama3")


def tunix_qwen2(widths: Widths, variant: Variant) -> Case:
    """As llama3 with biases on queries, keys and values, and a tied head."""
    dtype = zoo_case.DTYPES[variant.dtype]
    return _llama_like(widths, variant, "qwen2", "Qwen2", use_tied_embedding=True, dtype=dtype)


def tunix_qwen3(widths: Widths, variant: Variant) -> Case:
    """As llama3 with a norm on queries and keys, and a tied head."""
    dtype = zoo_case.DTYPES[variant.dtype]
    return _llama_like(widths, variant, "qwen3", "Qwen3", use_tied_embedding=True, dtype=dtype)


def tunix_qwen3_experts(widths: Widths, variant: Variant) -> Case:
    """As qwen3 with a router over experts, each token through some of them, dispatched by one-hot products."""
    return _llama_like(
        widths,
        variant,
        "qwen3",
        "Qwen3",
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS_PER_TOKEN,
        dtype=zoo_case.DTYPES[variant.dtype],
    )


def _gemma_shape(widths: Widths) -> dict[str, Any]:
    return {
        "num_embed": widths.vocabulary,
        "embed_dim": widths.model_dim,
        "hidden_dim": widths.hidden_dim,
        "num_heads": widths.num_heads,
        "head_dim": widths.head_dim,
        "sliding_window_size": widths.window,
    }


def tunix_gemma(widths: Widths, variant: Variant) -> Case:
    """One key-value head, scaled embeddings, soft-capped scores and logits, local and global layers."""
    source = third_party.tunix_model("gemma")
    config = source.ModelConfig(
        **_gemma_shape(widths),
        num_layers=2,
        num_kv_heads=1,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(source.AttentionType.LOCAL_SLIDING, source.AttentionType.GLOBAL),
    )
    # No option for the dtype: it computes, norms and softmax included, in the dtype of its parameters.
    dtype = zoo_case.DTYPES[variant.dtype]
    module = zoo_case.filled_module(lambda: source.Gemma(config, rngs=nnx.Rngs(0)), dtype, neutral=0.0)
    return _case(widths, variant, module, config.num_layers, config.num_kv_heads)


def tunix_gemma3(widths: Widths, variant: Variant) -> Case:
    """Six layers, since the sixth is the first global one; norms on queries and keys, windows in the other five."""
    source = third_party.tunix_model("gemma3")
    config = source.ModelConfig(
        **_gemma_shape(widths),
        num_layers=6,
        num_kv_heads=widths.num_kv_heads,
        global_base_frequency=1_000_000,
        param_dtype=zoo_case.DTYPES[variant.dtype],
    )
    module = zoo_case.filled_module(lambda: source.Gemma3(config, rngs=nnx.Rngs(0)), neutral=0.0)
    return _case(widths, variant, module, config.num_layers, config.num_kv_heads)


def _attention(count: int, rope_base: float, **changes: Any) -> Attention:
    fields: dict[str, Any] = {
        "num_heads": _W.num_heads,
        "num_kv_heads": _W.num_kv_heads,
        "head_dim": _W.head_dim,
        "scale": _W.head_dim**-0.5,
        "position": "rope half",
        "rotary_dim": _W.head_dim,
        "padding": True,
    }
    return Attention(count, "argument", rope_base=rope_base, **fields | changes)


_SILU = FeedForward(2, "silu", gated=True)

ENTRIES = (
    # Llama3 and Qwen3 do not hand `rope_theta` on: their frequencies are those of a million, whatever the config says.
    zoo_case.entry(
        tunix_llama3,
        Expected((_attention(2, 1e6),), {"rms": 5}, (_SILU,), tied=False),
        mode=_NO_TRAINING,
    ),
    zoo_case.entry(
        tunix_qwen2,
        Expected((_attention(2, 1e4),), {"rms": 5}, (_SILU,), tied=True),
        mode=_NO_TRAINING,
    ),
    # Norms: two in a layer, two on its heads (over the head size, not the model's width), one at the end.
    zoo_case.entry(
        tunix_qwen3,
        Expected((_attention(2, 1e6),), {"rms": 9}, (_SILU,), tied=True),
        mode=_NO_TRAINING,
    ),
    # Each expert is a gated feed-forward with silu over all positions, with zeros where a token is not its own: seven
    # in a block, counted as one block of experts and not as feed-forwards. Without a TPU there is no ragged product.
    zoo_case.entry(
        tunix_qwen3_experts,
        Expected((_attention(2, 1e6),), {"rms": 9}, (), experts=2, tied=False),
        mode=_NO_TRAINING,
    ),
    # The window is computed from positions, to both sides; its later half is hidden by a causal argument. `nnx.gelu` is
    # the tanh form. One key-value head: queries are not regrouped, the einsum drops the dimension of size one.
    zoo_case.entry(
        tunix_gemma,
        Expected(
            (
                _attention(1, 1e4, num_kv_heads=1, softcap=50.0, window=_W.window),
                _attention(1, 1e4, num_kv_heads=1, softcap=50.0),
            ),
            {"rms": 9},
            (FeedForward(2, "gelu_tanh", gated=True),),
            tied=True,
            softcap=30.0,
        ),
        mode=_NO_TRAINING,
    ),
    # Six norms in a layer, two of them on heads. The window is a constant band here, but in a decode step it is laid
    # out from the last true place of the mask argument, of each sequence.
    zoo_case.entry(
        tunix_gemma3,
        Expected(
            (_attention(5, 1e4, window=_W.window), _attention(1, 1e6)),
            {"rms": 37},
            (FeedForward(6, "gelu_tanh", gated=True),),
            tied=True,
        ),
        mode=_NO_TRAINING,
    ),
)
