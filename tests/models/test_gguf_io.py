"""GGUF files: small ones written by the package gguf, SmolLM2's tokenizer, and damage."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from compax.errors import WeightsError
from compax.models import (
    Decoder,
    DecoderConfig,
    build_decoder,
    load_decoder,
    open_weights,
)
from compax.models.gguf_io import gguf_tokenizer, open_gguf
from compax.models.llama_tensors import flat_parameters

# Widths are multiples of 32, the size of a block of quantized values.
CONFIG = DecoderConfig(
    vocab_size=96,
    context_length=64,
    model_dim=64,
    hidden_dim=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_epsilon=1e-6,
    rope_theta=50_000.0,
)
Kind = gguf.GGMLQuantizationType
Refused = Callable[..., str]
# Their name, our path, and the number of heads where rows are permuted.
TENSORS = {
    "attn_norm": ("attn_norm.scale", None),
    "attn_q": ("attn.query.kernel", 4),
    "attn_k": ("attn.key.kernel", 2),
    "attn_v": ("attn.value.kernel", None),
    "attn_output": ("attn.out.kernel", None),
    "ffn_norm": ("mlp_norm.scale", None),
    "ffn_gate": ("mlp.gate.kernel", None),
    "ffn_up": ("mlp.up.kernel", None),
    "ffn_down": ("mlp.down.kernel", None),
}


def build(config: DecoderConfig = CONFIG) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0))


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of query and key projections."""
    return matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def write(path: Path, model: Decoder, kinds: Mapping[str, Kind] | None = None, **fields: Any) -> Path:
    """Write a model by the package gguf; `kinds` says how tensors whose names end so are stored.

    Args:
        path: Where to.
        model: What.
        kinds: Float32 for the others.
        fields: Metadata to change, with `__` for a dot; None leaves a field out.
    """
    config, params = model.config, flat_parameters(model)
    metadata: dict[str, Any] = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.model_dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
    }
    metadata |= {name.replace("__", "."): value for name, value in fields.items()}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    for name, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)

    def add(name: str, value: np.ndarray) -> None:
        kind = next((kind for ending, kind in (kinds or {}).items() if name.endswith(ending)), Kind.F32)
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)

    add("token_embd.weight", np.asarray(params["embed.embedding"]))
    for layer in range(config.num_layers):
        for theirs, (ours, heads) in TENSORS.items():
            value = np.asarray(params[f"blocks.{layer}.{ours}"])
            value = value.T if ours.endswith(".kernel") else value
            add(f"blk.{layer}.{theirs}.weight", value if heads is None else interleaved(value, heads))
    add("output_norm.weight", np.asarray(params["norm.scale"]))
    if not config.tied:
        add("output.weight", np.asarray(params["head.kernel"]).T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build()


@pytest.fixture
def file(tmp_path: Path, model: Decoder) -> Path:
    return write(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize("changes", [{}, {"tied": False}], ids=["tied", "untied"])
def test_a_model_comes_out_as_it_went_in(changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(dataclasses.replace(CONFIG, **changes))
    loaded = load_decoder(write(tmp_path / "tiny.gguf", model))
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, flat_parameters(loaded), flat_parameters(model))


def test_stored_formats_are_decoded_by_the_package_gguf(tmp_path: Path, model: Decoder) -> None:
    kinds = {
        "token_embd.weight": Kind.F16,
        "attn_q.weight": Kind.Q8_0,
        "attn_v.weight": Kind.BF16,
        "ffn_gate.weight": Kind.Q4_1,
        "ffn_up.weight": Kind.Q4_0,
        "ffn_down.weight": Kind.Q5_1,
    }
    file = write(tmp_path / "mixed.gguf", model, kinds)
    weights = open_gguf(file)
    names = {
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, ours in names.items():
        tensor = theirs[name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        np.testing.assert_array_equal(weights[ours], expected)
        assert weights[ours].dtype == np.float32
    query = np.asarray(flat_parameters(build_decoder(weights))["blocks.0.attn.query.kernel"])
    original = np.asarray(flat_parameters(model)["blocks.0.attn.query.kernel"])
    np.testing.assert_allclose(query, original, atol=np.abs(original).max() / 127)


def test_fields_that_may_be_left_out_have_defaults(tmp_path: Path, model: Decoder) -> None:
    optional = {"llama__vocab_size": None, "tokenizer__ggml__tokens": ["x"] * 96, "llama__rope__freq_base": None}
    weights = open_gguf(write(tmp_path / "short.gguf", model, **optional))
    assert weights.config == dataclasses.replace(CONFIG, rope_theta=10_000.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general__architecture": "gemma"}, ["architecture 'gemma'"]),
        ({"llama__block_count": None}, ["'llama.block_count' is missing"]),
        ({"llama__block_count": "2"}, ["'llama.block_count' is '2', expected int"]),
        ({"llama__block_count": 3}, ["model.layers.2.", "incomplete"]),
        ({"llama__block_count": 1}, ["model.layers.1.", "compute something else"]),
        ({"llama__block_count": 4_000_000_000}, ["model.layers.3999999999.", "incomplete"]),
        ({"llama__attention__head_count": 0}, ["impossible decoder"]),
        ({"llama__attention__head_count_kv": 4}, ["k_proj", "(32, 64)", "(64, 64)"]),
        ({"llama__rope__scaling__type": "yarn"}, ["scaled rotary"]),
        ({"llama__expert_count": 8}, ["experts"]),
        ({"llama__rope__dimension_count": 8}, ["a part of each head"]),
        ({"general__alignment": 0}, ["general.alignment"]),
    ],
)
def test_a_model_of_another_kind_is_refused(
    fields: dict[str, Any], words: list[str], tmp_path: Path, model: Decoder, refused: Refused
) -> None:
    file = write(tmp_path / "other.gguf", model, **fields)
    refused(file, lambda: load_decoder(file), *words)


def test_an_unknown_tensor_is_refused(tmp_path: Path, file: Path, refused: Refused) -> None:
    damaged = tmp_path / "unknown.gguf"
    damaged.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    refused(damaged, lambda: load_decoder(damaged), "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("share", np.linspace(0.0, 0.999, 16))
def test_a_truncated_file_is_refused(share: float, file: Path, refused: Refused) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file, lambda: load_decoder(file), "get the file again")


def test_a_truncated_file_names_the_tensor(file: Path, refused: Refused) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 4 * CONFIG.model_dim])
    refused(file, lambda: open_gguf(file), "'output_norm.weight' ends at byte", "cut short")


def test_damage_in_the_head_never_ends_in_another_error(file: Path) -> None:
    content = file.read_bytes()
    head_bytes = min(tensor.data_offset for tensor in gguf.GGUFReader(file).tensors)
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(0, head_bytes, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            dict(open_gguf(file))
        except WeightsError as error:
            refusals += 1
            assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, some changes nothing that matters
    assert refusals > 100


@pytest.mark.parametrize(("content", "words"), [(b"", ["is empty"]), (b"GGML" * 9, ["not a GGUF file"])])
def test_another_file_is_refused(content: bytes, words: list[str], tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(content)
    refused(file, lambda: open_weights(file), *words)
    refused(tmp_path / "absent.gguf", lambda: open_gguf(tmp_path / "absent.gguf"), "No such file")


TOKENS = ["<|end|>", "<|user|>", "a", "b", "Ġ", "ab", "Ġab"]
TOKENIZER = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "smollm",
    "tokenizer__ggml__tokens": TOKENS,
    "tokenizer__ggml__token_type": [3, 4, 1, 1, 1, 1, 1],
    "tokenizer__ggml__merges": ["a b", "Ġ ab"],
}


def test_a_tokenizer_is_built_from_a_file(tmp_path: Path, model: Decoder) -> None:
    tokenizer = gguf_tokenizer(write(tmp_path / "tokens.gguf", model, **TOKENIZER))
    assert tokenizer.encode("ab abb<|end|><|user|>").ids == [5, 6, 3, 0, 1]
    assert tokenizer.decode([5, 6, 3, 0, 1], skip_special_tokens=True) == "ab abb<|user|>"
    assert tokenizer.get_vocab_size() == len(TOKENS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer__ggml__model": "llama"}, ["tokenizer 'llama'", "tokenizer.json instead"]),
        ({"tokenizer__ggml__pre": "qwen2"}, ["'qwen2'"]),
        ({"tokenizer__ggml__tokens": None}, ["'tokenizer.ggml.tokens' is missing"]),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, ["do not fit"]),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], "a"]}, ["do not fit"]),
        ({"tokenizer__ggml__merges": ["a"]}, ["do not fit"]),
        ({"tokenizer__ggml__merges": ["a c"]}, ["malformed"]),
        ({"tokenizer__ggml__merges": [1, 2]}, ["do not fit"]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    fields: dict[str, Any], words: list[str], tmp_path: Path, model: Decoder, refused: Refused
) -> None:
    file = write(tmp_path / "tokens.gguf", model, **(TOKENIZER | fields))
    refused(file, lambda: gguf_tokenizer(file), *words)
