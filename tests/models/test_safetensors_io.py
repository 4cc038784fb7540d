"""Hugging Face checkpoints: there and back, against safetensors and transformers' own Llama, and damaged."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import zoo
from compax.errors import CompaxError, ConfigError, WeightsError
from compax.models import SIZES, Decoder, build_decoder, load_decoder, open_weights, save_safetensors
from compax.models.llama_tensors import flat_parameters
from compax.models.safetensors_io import config_from_hugging_face, config_to_hugging_face, open_safetensors

TINY = SIZES["tiny"]
Refused = Callable[..., str]


def build(**changes: Any) -> Decoder:
    """A decoder in which no two numbers are alike, biases and scales included."""
    model = Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape), variable.dtype)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to read from; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("tiny")
    save_safetensors(build(), folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change a checkpoint's tensors, by the package safetensors."""
    file = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def reconfigure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_equal_parameters(found: nnx.Module, expected: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, flat_parameters(found), flat_parameters(expected))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "scan": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "tied": False, "rope_theta": 5e5, "norm_epsilon": 1e-6, "activation": "gelu_tanh"},
        {"param_dtype": "bfloat16"},
        {"num_layers": 1, "scan": True, "num_kv_heads": 1, "activation": "relu2"},
    ],
    ids=["tied", "untied scanned", "biases", "qwen2", "bfloat16", "one layer scanned"],
)
def test_what_is_saved_is_loaded(changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(**changes)
    save_safetensors(model, tmp_path / "model")
    free = {name: getattr(model.config, name) for name in ("scan", "param_dtype")}
    loaded = load_decoder(tmp_path / "model", **free)
    assert loaded.config == model.config
    assert_equal_parameters(loaded, model)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_layers_can_be_stacked_and_unstacked_on_the_way(tmp_path: Path) -> None:
    model = build()
    save_safetensors(model, tmp_path / "unrolled")
    scanned = load_decoder(tmp_path / "unrolled", scan=True)
    save_safetensors(scanned, tmp_path / "scanned")
    assert_equal_parameters(load_decoder(tmp_path / "scanned"), model)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "scanned" / file).read_bytes() == (tmp_path / "unrolled" / file).read_bytes()


def test_parameters_alone_can_be_saved(tmp_path: Path) -> None:
    model = build()
    save_safetensors(flat_parameters(model), tmp_path, model.config)
    assert_equal_parameters(load_decoder(tmp_path), model)


def test_the_package_safetensors_reads_what_is_written(checkpoint: Path) -> None:
    theirs = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    ours = open_weights(checkpoint)
    assert sorted(theirs) == sorted(ours) == sorted(dict(ours))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])
        assert ours.shapes[name] == value.shape
    up = flat_parameters(build())["blocks.1.mlp.up.kernel"]
    np.testing.assert_array_equal(theirs["model.layers.1.mlp.up_proj.weight"], up.T)


def test_transformers_reads_the_same_model_from_it(tmp_path: Path) -> None:
    foreign = zoo.load("flax_llama")
    flat = nnx.traversals.flatten_mapping(foreign.variables["params"])
    kinds = {"kernel": "weight", "embedding": "weight", "weight": "weight"}
    tensors = {".".join([*path[:-1], kinds[path[-1]]]): np.asarray(value) for path, value in flat.items()}
    tensors = {
        name: np.ascontiguousarray(v.T) if "_proj." in name or "head" in name else v for name, v in tensors.items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.module.config.to_dict()))

    tokens = foreign.inputs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside transformers
        expected = foreign.output(foreign.module.apply(foreign.variables, *foreign.inputs, **foreign.kwargs))
    np.testing.assert_allclose(load_decoder(tmp_path)(tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_sharded_checkpoint_is_one_model(copy: Path) -> None:
    tensors = safetensors.numpy.load_file(copy / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, its in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in its}, copy / file)
    (copy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, its in shards.items() for name in its}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal_parameters(load_decoder(copy), build())


def test_a_tied_head_may_be_written_out_and_frequencies_too(copy: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    rewrite(copy, add)
    assert_equal_parameters(load_decoder(copy), build())


def test_one_file_is_enough_with_a_config(copy: Path, refused: Refused) -> None:
    (copy / "config.json").unlink()
    file = copy / "model.safetensors"
    refused(copy / "config.json", lambda: open_weights(file), "is missing", "pass config=")
    assert_equal_parameters(build_decoder(open_safetensors(file, TINY)), build())


def test_how_it_computes_can_be_chosen_but_not_its_shape(checkpoint: Path) -> None:
    model = load_decoder(checkpoint, dtype="bfloat16", dropout=0.1, remat=True)
    assert model.config == dataclasses.replace(TINY, dtype="bfloat16", dropout=0.1, remat=True)
    drawn = nnx.state(Decoder(model.config, rngs=nnx.Rngs(0)), nnx.RngState)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.RngCount), nnx.filter_state(drawn, nnx.RngCount))
    assert jax.tree.structure(nnx.state(model, nnx.RngState)) == jax.tree.structure(drawn)
    with pytest.raises(ConfigError, match=r"'num_heads' is decided by .*; to choose are context_length, dropout"):
        load_decoder(checkpoint, num_heads=2)


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add_extra(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(10, np.float32)


def cut_row(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"][:-1]


def spoil(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"][3] = np.nan


def store_integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)


def untie(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["model.layers.1.mlp.up_proj.weight", "incomplete", "get both again"]),
        (add_extra, ["model.layers.0.self_attn.q_norm.weight", "compute something else"]),
        (cut_row, ["model.layers.0.self_attn.k_proj.weight", "(19, 32)", "(20, 32)", "do not belong together"]),
        (spoil, ["model.norm.weight", "NaN or infinity"]),
        (store_integers, ["model.norm.weight", "I8", "not quantized"]),
        (untie, ["lm_head.weight", "compute something else"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, np.ndarray]], None], words: list[str], copy: Path, refused: Refused
) -> None:
    rewrite(copy, change)
    refused(copy, lambda: load_decoder(copy), *words)


@pytest.mark.parametrize("share", np.linspace(0.0, 0.999, 12))
def test_a_truncated_file_is_refused(share: float, copy: Path, refused: Refused) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(file, lambda: open_weights(copy), "cut short", "get the file again")


def test_a_truncated_file_names_the_tensor(copy: Path, refused: Refused) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, lambda: open_weights(copy), "tensor 'model.norm.weight' ends at byte")


def test_damage_in_the_header_never_ends_in_another_error(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(0, 8 + header_bytes, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 34, 44, 45, 48, 57, 91, 93, 123, 125, 255])
        file.write_bytes(damaged)
        try:
            dict(open_weights(copy))
        except WeightsError as error:
            assert "\n" not in str(error)  # noqa: PT017 - most damage is refused, some changes nothing that matters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "32"}, ["'hidden_size' is '32'", "a positive integer"]),
        ({"num_attention_heads": 0}, ["'num_attention_heads' is 0"]),
        ({"num_hidden_layers": 10**9}, ["model.layers.999999999.", "incomplete"]),
        ({"num_key_value_heads": 3}, ["impossible decoder", "num_kv_heads (3)"]),
        ({"vocab_size": None}, ["'vocab_size' is None"]),
        ({"rms_norm_eps": True}, ["'rms_norm_eps' is True"]),
        ({"model_type": "mamba"}, ["'mamba'", "llama, mistral, qwen2"]),
        ({"hidden_act": "tanh"}, ["'tanh'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["scaled rotary", "llama3"]),
        ({"rope_scaling": "yes"}, ["scaled rotary"]),
        ({"model_type": "mistral", "sliding_window": 16}, ["sliding window"]),
        ({"vocab_size": 95}, ["model.embed_tokens.weight", "(96, 32)", "(95, 32)"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "incomplete"]),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: list[str], copy: Path, refused: Refused
) -> None:
    reconfigure(copy, **changes)
    refused(copy, lambda: load_decoder(copy), *words)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_refused(file: str, content: str, copy: Path, refused: Refused) -> None:
    (copy / file).write_text(content)
    if file != "config.json":
        (copy / "model.safetensors").unlink()
    refused(copy / file, lambda: open_weights(copy), "JSON")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, ["weight_map"]),
        ({"weight_map": {"a": 1}}, ["weight_map"]),
        ({"weight_map": {"a": "../model.safetensors"}}, ["not a file beside it"]),
        ({"weight_map": {"a": "absent.safetensors"}}, ["absent.safetensors", "cannot be read"]),
        ({"weight_map": {"nothing": "model-1.safetensors"}}, ["no tensor 'nothing'"]),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    index: dict[str, Any], words: list[str], copy: Path, refused: Refused
) -> None:
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, lambda: open_weights(copy), *words)


def test_newer_and_shorter_configs_are_understood() -> None:
    content = config_to_hugging_face(TINY) | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}
    assert config_from_hugging_face(content, "test") == dataclasses.replace(TINY, rope_theta=7e5)
    for name in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "hidden_act", "rope_theta"):
        content.pop(name)
    short = config_from_hugging_face(content | {"hidden_size": 40, "rope_parameters": None}, "test")
    assert short == dataclasses.replace(TINY, model_dim=40, num_kv_heads=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": False}, "gated=False"),
        ({"norm": "layernorm"}, "norm='layernorm'"),
        ({"out_bias": True}, "neither a Llama nor a Qwen2"),
    ],
)
def test_what_is_no_llama_is_not_written_as_one(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        save_safetensors(build(**changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parameters_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    params = flat_parameters(build())
    abstract = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in params.items()}
    for bad, message in (
        (params | {"adapter": jnp.ones(3)}, "'adapter' is not one of"),
        ({path: value for path, value in params.items() if path != "norm.scale"}, "'norm.scale' is missing"),
        (abstract, "ShapeDtypeStruct, not an array"),
        (params | {"norm.scale": jnp.ones(32, jnp.int8)}, "'model.norm.weight' is int8"),
    ):
        with pytest.raises(WeightsError, match=message):
            save_safetensors(bad, tmp_path, TINY)
    with pytest.raises(WeightsError, match="pass config="):
        save_safetensors(params, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_what_was_there(copy: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    model = build(tied=False)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        refused(copy, lambda: save_safetensors(model, copy), "No space left on device", "unchanged")
    model.norm.scale[...].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        save_safetensors(model, copy)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", lambda: save_safetensors(build(), tmp_path / "file"), "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_all_errors_are_caught_as_ours() -> None:
    assert issubclass(WeightsError, CompaxError)
