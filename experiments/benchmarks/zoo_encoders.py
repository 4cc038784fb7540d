"""More Flax models of transformers: encoders, and encoders with a decoder, of text, images and sound.

They are built as those in `zoo_transformers` are. Only BART and Whisper decode, with a cache for what a decoder has
read; keys and values of its cross attention are computed again in every step.
"""

from typing import Any

import jax
import jax.numpy as jnp

from compax.experiments.benchmarks import zoo_case
from compax.experiments.benchmarks.zoo_case import Case, Expected, FeedForward, Variant, Widths
from compax.experiments.benchmarks.zoo_transformers import (
    attention,
    filled_cache,
    linen_case,
    model_of,
    one_step,
    rates,
    sequences,
    transformers,
)

PATCH = 4
LABELS = 10
PROJECTION = 18
MEL_BINS = 14
FRAMES = 26
SAMPLES = 160
DECODER_LENGTH = 19


def _bert_fields(widths: Widths, variant: Variant) -> dict[str, Any]:
    return {
        "vocab_size": widths.vocabulary,
        "hidden_size": widths.heads_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": widths.num_heads,
        "intermediate_size": widths.hidden_dim,
        "max_position_embeddings": widths.context,
        **rates(variant, "hidden_dropout_prob", "attention_probs_dropout_prob"),
    }


def _bert(kind: str, config: Any, widths: Widths, variant: Variant, offset: int = 0) -> Case:
    ids, mask, positions = sequences(widths, variant, offset=offset)
    model = model_of(kind, config, variant, (1, widths.length))
    return linen_case(model, variant, (ids, mask, jnp.zeros_like(ids), positions, None), masks=("attention_mask",))


def flax_bert(widths: Widths, variant: Variant) -> Case:
    """Post-norm encoder with erf gelu and a masked-language head tied to the embedding."""
    config = transformers().BertConfig(**_bert_fields(widths, variant))
    return _bert("FlaxBertForMaskedLM", config, widths, variant)


def flax_roberta(widths: Widths, variant: Variant) -> Case:
    """As BERT, with positions that start after the padding token's number."""
    config = transformers().RobertaConfig(**_bert_fields(widths, variant))
    return _bert("FlaxRobertaForMaskedLM", config, widths, variant, offset=config.pad_token_id + 1)


def _encoded(widths: Widths, variant: Variant, length: int) -> jax.Array:
    """What an encoder would have given: [B, S, D] in the compute dtype."""
    return zoo_case.signal(widths.batch, length, widths.heads_dim).astype(zoo_case.DTYPES[variant.dtype])


def bart_step(
    module: Any,
    decoder_input_ids: jax.Array,
    decoder_attention_mask: jax.Array,
    decoder_position_ids: jax.Array,
    encoder_hidden_states: jax.Array,
    encoder_attention_mask: jax.Array,
    **switches: Any,
) -> dict[str, jax.Array]:
    """The decoder and the head alone: what `FlaxBartForConditionalGeneration.decode` applies as a method."""
    states = module._get_decoder_module()(
        decoder_input_ids,
        decoder_attention_mask,
        decoder_position_ids,
        encoder_hidden_states,
        encoder_attention_mask,
        **switches,
    )[0]
    kernel = module.model.variables["params"]["shared"]["embedding"].T
    logits = module.lm_head.apply({"params": {"kernel": kernel}}, states)
    return {"logits": logits + module.final_logits_bias.astype(module.dtype)}


def flax_bart(widths: Widths, variant: Variant) -> Case:
    """Encoder and decoder with norms after each residual, cross attention, tied head with a constant bias."""
    config = transformers().BartConfig(
        vocab_size=widths.vocabulary,
        max_position_embeddings=widths.context,
        d_model=widths.heads_dim,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=widths.num_heads,
        decoder_attention_heads=widths.num_heads,
        encoder_ffn_dim=widths.hidden_dim,
        decoder_ffn_dim=widths.hidden_dim,
        **rates(variant, "dropout", "attention_dropout", "activation_dropout"),
    )
    batch = widths.batch
    model = model_of("FlaxBartForConditionalGeneration", config, variant, (1, widths.length))
    ids, mask, positions = sequences(widths, variant)
    if variant.decode:
        encoded = _encoded(widths, variant, widths.length)
        names = ("decoder_attention_mask", "encoder_attention_mask")
        step = (*one_step(widths, variant), encoded, mask)
        case = linen_case(model, variant, step, masks=names, method=bart_step, mutable=["cache"])
        assert case.variables is not None
        case.variables["cache"] = filled_cache(widths, lambda: model.init_cache(batch, widths.cache, (encoded,)))
        return case
    inputs = (
        ids,
        mask,
        zoo_case.tokens(batch, DECODER_LENGTH, widths.vocabulary),
        zoo_case.present(batch, DECODER_LENGTH, padding=variant.padding),
        positions,
        zoo_case.positions(batch, DECODER_LENGTH),
    )
    return linen_case(model, variant, inputs, masks=("attention_mask", "decoder_attention_mask"))


def flax_vit(widths: Widths, variant: Variant) -> Case:
    """Patches by convolution, pre-norm encoder, classification from the first token."""
    config = transformers().ViTConfig(
        hidden_size=widths.heads_dim,
        num_hidden_layers=2,
        num_attention_heads=widths.num_heads,
        intermediate_size=widths.hidden_dim,
        image_size=widths.image,
        patch_size=PATCH,
        num_labels=LABELS,
        **rates(variant, "hidden_dropout_prob", "attention_probs_dropout_prob"),
    )
    model = model_of("FlaxViTForImageClassification", config, variant, (1, widths.image, widths.image, 3))
    return linen_case(model, variant, (zoo_case.signal(widths.batch, widths.image, widths.image, 3),))


def flax_clip(widths: Widths, variant: Variant) -> Case:
    """A text and an image tower, joined by projections and a learned temperature."""
    shape = {
        "hidden_size": widths.heads_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": widths.num_heads,
        "intermediate_size": widths.hidden_dim,
        **rates(variant, "attention_dropout"),
    }
    text = {"vocab_size": widths.vocabulary, "max_position_embeddings": widths.context}
    text |= {"eos_token_id": 1, "bos_token_id": 0}
    vision = {"image_size": widths.image, "patch_size": PATCH}
    config = transformers().CLIPConfig(
        text_config=text | shape, vision_config=vision | shape, projection_dim=PROJECTION
    )
    model = model_of("FlaxCLIPModel", config, variant, ((1, widths.length), (1, widths.image, widths.image, 3)))
    ids, mask, positions = sequences(widths, variant)
    inputs = (ids, zoo_case.signal(widths.batch, widths.image, widths.image, 3), mask, positions)
    return linen_case(model, variant, inputs, masks=("attention_mask",), output="logits_per_image")


def flax_resnet(widths: Widths, variant: Variant) -> Case:
    """Convolutions with batch normalization in bottlenecks; train mode takes and updates the batch's statistics."""
    config = transformers().ResNetConfig(
        embedding_size=20, hidden_sizes=[24, 32], depths=[1, 2], layer_type="bottleneck", num_labels=LABELS
    )
    model = model_of("FlaxResNetForImageClassification", config, variant, (1, widths.image, widths.image, 3))
    case = linen_case(model, variant, (zoo_case.signal(widths.batch, widths.image, widths.image, 3),))
    assert case.variables is not None
    case.variables.update(case.variables["params"])  # here transformers hands out all collections
    case.kwargs.pop("rngs", None)
    if variant.mode == "train":
        case.options["mutable"] = ["batch_stats"]
    return case


def whisper_step(
    module: Any,
    decoder_input_ids: jax.Array,
    decoder_attention_mask: jax.Array,
    decoder_position_ids: jax.Array,
    encoder_hidden_states: jax.Array,
    **switches: Any,
) -> dict[str, jax.Array]:
    """The decoder and the head alone: what `FlaxWhisperForConditionalGeneration.decode` applies as a method."""
    states = module._get_decoder_module()(
        decoder_input_ids, decoder_attention_mask, decoder_position_ids, encoder_hidden_states, **switches
    )[0]
    kernel = module.model.decoder.embed_tokens.variables["params"]["embedding"].T
    return {"logits": module.lm_head.apply({"params": {"kernel": kernel}}, states)}


def flax_whisper(widths: Widths, variant: Variant) -> Case:
    """Audio encoder with 1-D convolutions, decoder with cross attention, tied head."""
    config = transformers().WhisperConfig(
        vocab_size=widths.vocabulary,
        num_mel_bins=MEL_BINS,
        d_model=widths.heads_dim,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=widths.num_heads,
        decoder_attention_heads=widths.num_heads,
        encoder_ffn_dim=widths.hidden_dim,
        decoder_ffn_dim=widths.hidden_dim,
        max_source_positions=FRAMES,
        max_target_positions=widths.context,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **rates(variant, "dropout", "attention_dropout", "activation_dropout"),
    )
    num_frames = 2 * FRAMES  # the second convolution has stride 2
    model = model_of("FlaxWhisperForConditionalGeneration", config, variant, (1, MEL_BINS, num_frames))
    masks = ("decoder_attention_mask",)
    if variant.decode:
        encoded = _encoded(widths, variant, FRAMES)
        step = (*one_step(widths, variant), encoded)
        case = linen_case(model, variant, step, masks=masks, method=whisper_step, mutable=["cache"])
        assert case.variables is not None
        cache = filled_cache(widths, lambda: model.init_cache(widths.batch, widths.cache, (encoded,)))
        case.variables["cache"] = cache
        return case
    return linen_case(
        model,
        variant,
        (zoo_case.signal(widths.batch, MEL_BINS, num_frames), *sequences(widths, variant)),
        masks=masks,
    )


def flax_wav2vec2(widths: Widths, variant: Variant) -> Case:
    """Raw audio through convolutions and norms, a grouped convolution for positions, pre-norm encoder, CTC head."""
    config = transformers().Wav2Vec2Config(
        vocab_size=widths.vocabulary,
        hidden_size=widths.heads_dim,
        num_hidden_layers=2,
        num_attention_heads=widths.num_heads,
        intermediate_size=widths.hidden_dim,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_dim=(44, 52),
        conv_kernel=(4, 3),
        conv_stride=(3, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        **rates(
            variant, "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"
        ),
    )
    model = model_of("FlaxWav2Vec2ForCTC", config, variant, (1, SAMPLES))
    batch = widths.batch
    mask = zoo_case.present(batch, SAMPLES, padding=True) if variant.padding else None
    if mask is not None:  # a position after the convolutions is six samples before them
        mask = mask * (jnp.arange(SAMPLES)[None, :] < SAMPLES - 12 * jnp.arange(batch)[:, None]).astype(jnp.int32)
    return linen_case(model, variant, (zoo_case.signal(batch, SAMPLES), mask))


_NO_CACHE = "an encoder has no cache"
_NO_MASK = "the code takes no mask"
_GELU = FeedForward(2, "gelu")

_BERT = Expected((attention(2, "full", position="learned"),), {"layer": 6}, (_GELU,), tied=True)
"""Norms: after the embedding, two in a layer, one in the head between two linear functions, which are therefore no
feed-forward. The masked-language models have no pooler."""

_BART_DECODER = (
    attention(2, "causal", position="learned", dropout=False),
    attention(2, "full", cross=True, dropout=False),
)
_WHISPER_DECODER = (
    attention(2, "causal", position="learned", dropout=False),
    attention(2, "full", cross=True, dropout=False, padding=False),
)

ENTRIES = (
    zoo_case.entry(flax_bert, _BERT, decode=_NO_CACHE),
    zoo_case.entry(flax_roberta, _BERT, decode=_NO_CACHE),
    # Norms: after either embedding, two in a layer of the encoder, three in one of the decoder. The layers do not hand
    # `deterministic` on to attention, so its weights are never dropped, whatever the rate.
    zoo_case.entry(
        flax_bart,
        Expected(
            (attention(2, "full", position="learned", dropout=False), *_BART_DECODER),
            {"layer": 12},
            (FeedForward(4, "gelu"),),
            tied=True,
        ),
        decoding=Expected(_BART_DECODER, {"layer": 7}, (_GELU,), tied=True),
    ),
    # The first token is a parameter in front of the patches; the last norm is of all tokens, the head reads the first.
    zoo_case.entry(
        flax_vit,
        Expected((attention(2, "full", position="learned", padding=False),), {"layer": 5}, (_GELU,)),
        padding=_NO_MASK,
        decode=_NO_CACHE,
    ),
    # Two towers. Norms: two in each layer, one behind the text, one before and one behind the image (of its first
    # token alone). Dividing an embedding by its length is close to a norm by root mean square, and not counted.
    zoo_case.entry(
        flax_clip,
        Expected(
            (
                attention(2, "causal", position="learned"),
                attention(2, "full", position="learned", padding=False),
            ),
            {"layer": 11},
            (FeedForward(4, "quick_gelu"),),
        ),
        decode="the code has no cache",
    ),
    # Norms: in the stem, three in each of three bottlenecks, and one in each of two shortcuts. Convolution, norm and
    # relu make no feed-forward.
    zoo_case.entry(flax_resnet, Expected((), {"batch": 12}), padding=_NO_MASK, decode=_NO_CACHE),
    # Norms: two in a layer of the encoder, three in one of the decoder, one at the end of each. Convolution, gelu,
    # convolution, gelu before the encoder is not counted as a feed-forward. Its table of sinusoids is a parameter that
    # gets no gradient. The encoder, and cross attention with it, has no mask.
    zoo_case.entry(
        flax_whisper,
        Expected(
            (attention(2, "full", position="sinusoidal", dropout=False, padding=False), *_WHISPER_DECODER),
            {"layer": 12},
            (FeedForward(4, "gelu"),),
            tied=True,
        ),
        decoding=Expected(_WHISPER_DECODER, {"layer": 7}, (_GELU,), tied=True),
    ),
    # Norms: one behind each of two convolutions, over channels (the form with a group norm is not implemented in Flax),
    # one before the projection, two in a layer, one at the end. The kernel of the convolution for positions is divided
    # by its length, which is no normalization of activations. The encoder does not hand `deterministic` on to layers.
    zoo_case.entry(
        flax_wav2vec2,
        Expected((attention(2, "full", position="convolution", dropout=False),), {"layer": 8}, (_GELU,), tied=False),
        decode=_NO_CACHE,
    ),
)
