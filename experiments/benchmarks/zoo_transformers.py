"""Causal Flax models of transformers, Linen: from their authors' classes and configurations, tiny, and what is known.

In all of them attention is `flax.linen.dot_product_attention_weights`: the query is divided by the square root of the
head size, the mask is an added bias of zero and the dtype's lowest number, dropout multiplies the weights.
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from compax.experiments.benchmarks import zoo_case
from compax.experiments.benchmarks.zoo_case import Attention, Case, Expected, FeedForward, Variant, Widths

VERSION = "4.57.6"

_W = Widths()


def transformers() -> Any:
    """The package.

    Raises:
        ModuleNotFoundError: It is not installed, or without Flax models.
    """
    os.environ.setdefault("USE_TF", "0")  # its import fails where a TensorFlow of another NumPy is installed
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"transformers is not installed: pip install transformers=={VERSION}", name="transformers"
        ) from error
    if not transformers.__version__.startswith("4."):
        raise ModuleNotFoundError(
            f"transformers {transformers.__version__} has no Flax models: pip install transformers=={VERSION}"
        )
    return transformers


def rates(variant: Variant, *names: str) -> dict[str, float]:
    """Fields of a configuration that are rates of dropout; the authors' own where nothing is dropped."""
    return dict.fromkeys(names, zoo_case.DROPOUT) if variant.mode == "train" else {}


def _filled(shapes: Any) -> Any:
    random = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], x: Any) -> jax.Array:
        return zoo_case.fill((jax.tree_util.keystr(path[-1:], simple=True),), x.shape, x.dtype, random)

    return unfreeze(jax.tree_util.tree_map_with_path(leaf, shapes))


def filled_cache(widths: Widths, make: Callable[[], Any]) -> Any:
    """A cache with numbers in every place and `widths.filled` of them taken: unused places must not be read."""
    index = jnp.asarray(widths.filled, jnp.int32)
    cache = traverse_util.flatten_dict(_filled(jax.eval_shape(make)))
    return traverse_util.unflatten_dict({p: index if p[-1] == "cache_index" else x for p, x in cache.items()})


def model_of(kind: str, config: Any, variant: Variant, shape: Any) -> Any:
    """A model of transformers around its module: it traces its initialization for the shapes and runs nothing.

    Args:
        kind: The class.
        config: Its configuration.
        variant: Gives the dtype.
        shape: What the class takes as shape of its example inputs.
    """
    dtype = zoo_case.DTYPES[variant.dtype]
    return getattr(transformers(), kind)(config, input_shape=shape, dtype=dtype, _do_init=False)


def linen_case(
    model: Any,
    variant: Variant,
    inputs: tuple[Any, ...],
    *,
    masks: tuple[str, ...] = (),
    output: str = "logits",
    **options: Any,
) -> Case:
    """A case of a module whose only collection is `params`.

    Args:
        model: The model of transformers around the module.
        variant: Which.
        inputs: Arguments.
        masks: Names of arguments that are masks: constants of ones, unless there is padding.
        output: The field of the result.
        **options: For `capture`.
    """
    kwargs: dict[str, Any] = {"deterministic": variant.mode == "eval", "return_dict": True}
    if variant.mode == "train":
        kwargs["rngs"] = {"dropout": jax.random.key(5)}
    if masks and not variant.padding:
        options["constant"] = masks
    variables = {"params": _filled(model.params_shape_tree)}
    return Case(model.module, variables, inputs, kwargs, lambda result: result[output], options)


def sequences(widths: Widths, variant: Variant, *, offset: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, mask and positions, of whole sequences with padding behind."""
    batch, length = widths.batch, widths.length
    return (
        zoo_case.tokens(batch, length, widths.vocabulary),
        zoo_case.present(batch, length, padding=variant.padding),
        zoo_case.positions(batch, length, offset),
    )


def one_step(widths: Widths, variant: Variant) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token, mask over the cache and position of one decode step, with padding before the tokens."""
    mask = zoo_case.present(widths.batch, widths.cache, padding=variant.padding, left=True)
    position = jnp.sum(mask[:, : widths.filled], axis=1, keepdims=True, dtype=jnp.int32)
    return zoo_case.tokens(widths.batch, 1, widths.vocabulary), mask, position


def _decoder(kind: str, config: Any, widths: Widths, variant: Variant, *, takes_positions: bool = True) -> Case:
    """A causal language model, of whole sequences or in one decode step."""
    model = model_of(kind, config, variant, (1, widths.length))
    inputs = (one_step if variant.decode else sequences)(widths, variant)
    case = linen_case(model, variant, inputs if takes_positions else inputs[:2], masks=("attention_mask",))
    if not variant.decode:
        return case
    assert case.variables is not None
    case.variables["cache"] = filled_cache(widths, lambda: model.init_cache(widths.batch, widths.cache))
    case.options["mutable"] = ["cache"]
    return case


def flax_gpt2(widths: Widths, variant: Variant) -> Case:
    """LayerNorm, learned positions, fused query-key-value kernels stored transposed, tied head."""
    config = transformers().GPT2Config(
        vocab_size=widths.vocabulary,
        n_positions=widths.context,
        n_embd=widths.heads_dim,
        n_layer=2,
        n_head=widths.num_heads,
        n_inner=widths.hidden_dim,
        **rates(variant, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return _decoder("FlaxGPT2LMHeadModel", config, widths, variant)


def _llama_fields(widths: Widths, variant: Variant) -> dict[str, Any]:
    return {
        "vocab_size": widths.vocabulary,
        "hidden_size": widths.heads_dim,
        "intermediate_size": widths.hidden_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": widths.num_heads,
        "num_key_value_heads": widths.num_kv_heads,
        "max_position_embeddings": widths.context,
    }


def flax_llama(widths: Widths, variant: Variant) -> Case:
    """RMSNorm, rotary positions, gated feed-forward, keys and values repeated for each query head."""
    fields = _llama_fields(widths, variant) | rates(variant, "attention_dropout")
    return _decoder("FlaxLlamaForCausalLM", transformers().LlamaConfig(**fields), widths, variant)


def flax_gemma(widths: Widths, variant: Variant) -> Case:
    """As Llama with a head size of its own, scaled embeddings, norms by one plus the weight, and a tied head."""
    fields = _llama_fields(widths, variant) | rates(variant, "attention_dropout")
    fields |= {"hidden_size": widths.model_dim, "head_dim": widths.head_dim, "hidden_activation": "gelu_pytorch_tanh"}
    return _decoder("FlaxGemmaForCausalLM", transformers().GemmaConfig(**fields), widths, variant)


def flax_mistral(widths: Widths, variant: Variant) -> Case:
    """As Llama with a sliding window that is cut out of the constant mask."""
    fields = _llama_fields(widths, variant) | {"sliding_window": widths.window}
    return _decoder("FlaxMistralForCausalLM", transformers().MistralConfig(**fields), widths, variant)


def flax_gpt_neo(widths: Widths, variant: Variant) -> Case:
    """A global and a local layer, learned positions, scores that are not scaled, tied head."""
    config = transformers().GPTNeoConfig(
        vocab_size=widths.vocabulary,
        max_position_embeddings=widths.context,
        hidden_size=widths.heads_dim,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=widths.num_heads,
        intermediate_size=widths.hidden_dim,
        window_size=widths.window,
        **rates(variant, "resid_dropout", "embed_dropout", "attention_dropout"),
    )
    return _decoder("FlaxGPTNeoForCausalLM", config, widths, variant)


def flax_gptj(widths: Widths, variant: Variant) -> Case:
    """One norm for attention and feed-forward side by side, rotary positions in pairs on half of a head, own head."""
    config = transformers().GPTJConfig(
        vocab_size=widths.vocabulary,
        n_positions=widths.context,
        n_embd=widths.heads_dim,
        n_layer=2,
        n_head=widths.num_heads,
        n_inner=widths.hidden_dim,
        rotary_dim=widths.head_dim // 2,
        **rates(variant, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return _decoder("FlaxGPTJForCausalLM", config, widths, variant)


def flax_opt(widths: Widths, variant: Variant) -> Case:
    """Learned positions with an offset, relu feed-forward on flattened tokens, tied head."""
    config = transformers().OPTConfig(
        vocab_size=widths.vocabulary,
        hidden_size=widths.heads_dim,
        num_hidden_layers=2,
        ffn_dim=widths.hidden_dim,
        max_position_embeddings=widths.context,
        num_attention_heads=widths.num_heads,
        **rates(variant, "dropout", "attention_dropout"),
    )
    return _decoder("FlaxOPTForCausalLM", config, widths, variant)


def flax_bloom(widths: Widths, variant: Variant) -> Case:
    """Linear biases in place of positions, fused query-key-value kernels by head, a norm after the embedding."""
    config = transformers().BloomConfig(
        vocab_size=widths.vocabulary,
        hidden_size=widths.heads_dim,
        n_layer=2,
        n_head=widths.num_heads,
        **rates(variant, "hidden_dropout", "attention_dropout"),
    )
    return _decoder("FlaxBloomForCausalLM", config, widths, variant, takes_positions=False)


def attention(count: int, mask: Literal["causal", "full"], **changes: Any) -> Attention:
    """Attentions as most models here have them, with what is different in these."""
    fields: dict[str, Any] = {
        "num_heads": _W.num_heads,
        "num_kv_heads": _W.num_heads,
        "head_dim": _W.head_dim,
        "scale": _W.head_dim**-0.5,
        "padding": True,
        "dropout": True,
    }
    return Attention(count, mask, **fields | changes)


_ROPE = {"position": "rope half", "rotary_dim": _W.head_dim, "rope_base": 1e4}
_GROUPED = {**_ROPE, "num_kv_heads": _W.num_kv_heads}
_GELU_TANH = FeedForward(2, "gelu_tanh")
_SILU = FeedForward(2, "silu", gated=True)

ENTRIES = (
    zoo_case.entry(
        flax_gpt2,
        Expected((attention(2, "causal", position="learned"),), {"layer": 5}, (_GELU_TANH,), tied=True),
    ),
    # Frequencies have base 10,000 whatever the configuration says, here and in Gemma and Mistral. Norms divide by a
    # square root in float32 and are cast before the weight multiplies, which is float32: in bfloat16 that promotes.
    zoo_case.entry(
        flax_llama,
        Expected((attention(2, "causal", **_GROUPED),), {"rms": 5}, (_SILU,), tied=False),
    ),
    zoo_case.entry(
        flax_gemma,
        Expected(
            (attention(2, "causal", **_GROUPED),), {"rms": 5}, (FeedForward(2, "gelu_tanh", gated=True),), tied=True
        ),
    ),
    # The band is `triu(-window)` of the causal mask: a query sees itself and `window` keys before it. Without a window
    # the same line leaves the diagonal alone.
    zoo_case.entry(
        flax_mistral,
        Expected(
            (attention(2, "causal", **_GROUPED, window=_W.window + 1, dropout=False),), {"rms": 5}, (_SILU,), tied=False
        ),
        mode="dropout of attention has no key there, and there is no other",
    ),
    # The query is multiplied by the square root that the shared function divides by. A local layer sees `window` keys.
    # The last norm stands in the source, and in the trace, twice; nothing reads the first, and it is counted once.
    zoo_case.entry(
        flax_gpt_neo,
        Expected(
            (
                attention(1, "causal", position="learned", scale=1.0),
                attention(1, "causal", position="learned", scale=1.0, window=_W.window),
            ),
            {"layer": 5},
            (_GELU_TANH,),
            tied=True,
        ),
    ),
    # One norm in a layer, and one at the end. The head has a bias.
    zoo_case.entry(
        flax_gptj,
        Expected(
            (attention(2, "causal", position="rope interleaved", rotary_dim=_W.head_dim // 2, rope_base=1e4),),
            {"layer": 3},
            (_GELU_TANH,),
            tied=False,
        ),
    ),
    zoo_case.entry(
        flax_opt,
        Expected((attention(2, "causal", position="learned"),), {"layer": 5}, (FeedForward(2, "relu"),), tied=True),
    ),
    # Norms: after the embedding, two in a layer, one at the end. Its gelu is written out, inside it is four times as
    # wide as the model. The biases are slope times the number of tokens so far: they come from the mask, not from
    # positions, and do not depend on the query.
    zoo_case.entry(
        flax_bloom,
        Expected((attention(2, "causal", position="alibi"),), {"layer": 6}, (_GELU_TANH,), tied=True),
    ),
)
