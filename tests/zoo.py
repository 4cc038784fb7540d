"""Tiny models that nobody here wrote, built from their authors' own code and configurations.

NNX from google-tunix, Linen from transformers. Widths are a few dozen, so that a forward pass takes milliseconds; every
structural choice (grouped queries, tied head, experts, sliding window, cross attention) is the author's. A test takes
names from `ENTRIES` and calls `load(name)`, which skips with the reason where the package is missing.
"""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax.experiments.benchmarks import third_party

BATCH = 2
LENGTH = 16
VOCABULARY = 96
TRANSFORMERS_VERSION = "4.57.6"

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""Marks a test that calls these models: their authors' deprecations are not our errors."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with all that `compax.capture(module, *inputs, variables=variables, **kwargs)` takes.

    Attributes:
        module: An NNX module, or a Linen module together with `variables`.
        variables: The Linen collections, None for NNX.
        inputs: Positional arguments: arrays, or None where the model takes None.
        kwargs: Keyword arguments: switches, which are static.
        output: Picks an array out of what the model returns.
    """

    module: Any
    variables: dict[str, Any] | None
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Callable[[Any], jax.Array]


def load(name: str) -> Model:
    """Builds an entry, or skips the running test with the reason."""
    try:
        with warnings.catch_warnings(), third_party.lazy_sharding():
            warnings.simplefilter("ignore")  # deprecations inside the packages are their authors' business
            return ENTRIES[name]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def tokens(*, batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> jax.Array:
    """Equally distributed token numbers, the same at every call: int32[batch, length]."""
    return jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (batch, length)), jnp.int32)


def _tunix(family: str, class_name: str, **fields: Any) -> Model:
    source = third_party.tunix_model(family)
    if "attention_types" in fields:
        fields["attention_types"] = tuple(source.AttentionType[kind] for kind in fields["attention_types"])
    model = getattr(source, class_name)(source.ModelConfig(**fields), rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))
    return Model(model, None, (tokens(), positions, None, mask), {}, lambda output: output[0])


_LLAMA_SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "embed_dim": 32,
    "hidden_dim": 64,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}
_GEMMA_SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_embed": VOCABULARY,
    "embed_dim": 32,
    "hidden_dim": 64,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 1,
}


def tunix_llama3() -> Model:
    """RMSNorm, rotary positions, grouped queries, gated feed-forward, own head."""
    return _tunix("llama3", "Llama3", **_LLAMA_SHAPE)


def tunix_qwen2() -> Model:
    """As llama3 with biases on queries, keys and values, and a tied head."""
    return _tunix("qwen2", "Qwen2", **_LLAMA_SHAPE, use_tied_embedding=True)


def tunix_qwen3() -> Model:
    """As llama3 with a norm on queries and keys, and a tied head."""
    return _tunix("qwen3", "Qwen3", **_LLAMA_SHAPE, use_tied_embedding=True)


def tunix_qwen3_experts() -> Model:
    """As qwen3 with a router over four experts, two a token, dispatched by one-hot products."""
    return _tunix("qwen3", "Qwen3", **_LLAMA_SHAPE, num_experts=4, num_experts_per_tok=2)


def tunix_gemma() -> Model:
    """One key-value head, scaled embeddings, soft-capped scores and logits, local and global layers."""
    return _tunix(
        "gemma",
        "Gemma",
        **_GEMMA_SHAPE,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=("LOCAL_SLIDING", "GLOBAL"),
        sliding_window_size=8,
    )


def tunix_gemma3() -> Model:
    """Six layers, since the sixth is the first global one; norms on queries and keys, windows of 8."""
    return _tunix(
        "gemma3", "Gemma3", **_GEMMA_SHAPE | {"num_layers": 6}, sliding_window_size=8, param_dtype=jnp.float32
    )


def _transformers() -> Any:
    os.environ.setdefault("USE_TF", "0")  # its import fails where a TensorFlow of another NumPy is installed
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"transformers is not installed: pip install transformers=={TRANSFORMERS_VERSION}", name="transformers"
        ) from error
    if not transformers.__version__.startswith("4."):
        raise ModuleNotFoundError(
            f"transformers {transformers.__version__} has no Flax models: "
            f"pip install transformers=={TRANSFORMERS_VERSION}"
        )
    return transformers


def _linen(
    source: Any, kind: str, config: Any, *inputs: Any, shape: Any = (1, LENGTH), output: str = "logits"
) -> Model:
    model = getattr(source, kind)(config, input_shape=shape, _do_init=False)
    initialize = jax.jit(lambda key: model.init_weights(key, shape))  # traced: operation by operation it takes seconds
    variables = {"params": initialize(jax.random.PRNGKey(0))}
    return Model(
        model.module, variables, inputs, {"deterministic": True, "return_dict": True}, lambda result: result[output]
    )


def _positions() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))


def _mask() -> jax.Array:
    return jnp.ones((BATCH, LENGTH), jnp.int32)


def _pixels(size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, size, size, 3)), jnp.float32)


def flax_gpt2() -> Model:
    """LayerNorm, learned positions, fused query-key-value kernels stored transposed, tied head."""
    source = _transformers()
    config = source.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return _linen(source, "FlaxGPT2LMHeadModel", config, tokens(), _mask(), _positions())


def flax_bert() -> Model:
    """Post-norm encoder with a head mask, erf gelu and a masked-language head tied to the embedding."""
    source = _transformers()
    config = source.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    segments = jnp.zeros((BATCH, LENGTH), jnp.int32)
    return _linen(source, "FlaxBertForMaskedLM", config, tokens(), _mask(), segments, _positions(), None)


def flax_vit() -> Model:
    """Patches by convolution, pre-norm encoder, classification from the first token."""
    source = _transformers()
    config = source.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return _linen(source, "FlaxViTForImageClassification", config, _pixels(16), shape=(1, 16, 16, 3))


def flax_clip() -> Model:
    """A text and an image tower, joined by projections and a learned temperature."""
    source = _transformers()
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0}
    vision = {"image_size": 16, "patch_size": 4}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = source.CLIPConfig(text_config=text | shape, vision_config=vision | shape, projection_dim=24)
    inputs = (tokens(), _pixels(16), _mask(), _positions())
    return _linen(
        source, "FlaxCLIPModel", config, *inputs, shape=((1, LENGTH), (1, 16, 16, 3)), output="logits_per_image"
    )


def flax_whisper() -> Model:
    """Audio encoder with 1-D convolutions, decoder with cross attention, tied head."""
    source = _transformers()
    config = source.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    frames = 2 * LENGTH  # the second convolution has stride 2
    features = jnp.asarray(np.random.default_rng(2).normal(size=(BATCH, 16, frames)), jnp.float32)
    inputs = (features, tokens(), _mask(), _positions())
    return _linen(source, "FlaxWhisperForConditionalGeneration", config, *inputs, shape=(1, 16, frames))


def flax_llama() -> Model:
    """RMSNorm, rotary positions, gated feed-forward, causal mask as a large constant."""
    source = _transformers()
    config = source.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return _linen(source, "FlaxLlamaForCausalLM", config, tokens(), _mask(), _positions())


ENTRIES: dict[str, Callable[[], Model]] = {
    builder.__name__: builder
    for builder in (
        tunix_llama3,
        tunix_qwen2,
        tunix_qwen3,
        tunix_qwen3_experts,
        tunix_gemma,
        tunix_gemma3,
        flax_gpt2,
        flax_bert,
        flax_vit,
        flax_clip,
        flax_whisper,
        flax_llama,
    )
}
