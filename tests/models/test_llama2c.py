"""llama2.c's formats: stories260K tells its story, at the published loss, and damaged files are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax.models import SIZES, Decoder, Llama2cTokenizer, load_decoder, loss, open_llama2c_tokenizer, open_weights
from compax.models.llama_tensors import flat_parameters

CONFIG = SIZES["stories260k"]
Refused = Callable[..., str]
# The beginning of what llama2.c itself prints at temperature 0.
BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data/weights/stories260K"


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return load_decoder(folder / "stories260K.bin")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Llama2cTokenizer:
    return open_llama2c_tokenizer(folder / "tok512.bin", CONFIG.vocab_size)


@pytest.fixture(scope="module")
def stories(shared: Path, tokenizer: Llama2cTokenizer) -> list[np.ndarray]:
    """Five stories, int32 `[tokens]` each, with the token that begins a text."""
    text = (shared / "data/text/tinystories-sample/tinystories_sample.txt").read_text()
    texts = [story.strip() for story in text.split("<|endoftext|>")]
    return [np.concatenate([[tokenizer.begin], tokenizer.encode(story)]).astype(np.int32) for story in texts if story]


def test_the_model_has_the_named_size(model: Decoder) -> None:
    assert model.config == CONFIG


def test_loss_on_stories_is_the_published_one(model: Decoder, stories: list[np.ndarray]) -> None:
    """Padded to one length, so that it is one batch."""
    longest = max(map(len, stories))
    batch = np.stack([np.pad(story, (0, longest - len(story))) for story in stories])
    mask = np.stack([np.arange(1, longest) < len(story) for story in stories])
    inputs = {"inputs": jnp.asarray(batch[:, :-1]), "targets": jnp.asarray(batch[:, 1:]), "mask": jnp.asarray(mask)}
    value, metrics = nnx.jit(loss)(model, inputs)
    assert metrics["tokens"] == 1804
    assert value == pytest.approx(1.266, abs=5e-4)


def test_logits_are_those_of_the_reference(
    model: Decoder, stories: list[np.ndarray], reference_logits: Callable[..., Any]
) -> None:
    story = min(stories, key=len)
    expected = reference_logits(CONFIG, flat_parameters(model), story)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(model, jnp.asarray(story[None]))[0], expected, atol=1e-4)


def test_it_goes_on_with_a_story(model: Decoder, tokenizer: Llama2cTokenizer) -> None:
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache)[:, -1].argmax(-1))
    told = [tokenizer.begin, *tokenizer.encode("Once upon a time")]
    tokens, cache = jnp.asarray([told], jnp.int32), model.init_cache(1, 256)
    for _ in range(200):
        tokens = step(model, tokens, cache)[:, None]
        if tokens[0, 0] == tokenizer.end:
            break
        told.append(int(tokens[0, 0]))
    text = tokenizer.decode(told)
    assert text.startswith(BEGINNING)


def test_text_is_encoded_and_decoded(tokenizer: Llama2cTokenizer) -> None:
    assert tokenizer.encode("Once upon a time").tolist() == [403, 407, 261, 378]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("").dtype == np.int32
    for text in ("Once upon a time", "naïve 東京 🙂", " two  spaces\nand a line", "a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.begin, 403]) == "Once"
    assert tokenizer.vocabulary == 512


@pytest.mark.parametrize("share", np.linspace(0.0, 0.9999, 12))
def test_a_truncated_model_is_refused(share: float, folder: Path, tmp_path: Path, refused: Refused) -> None:
    content = (folder / "stories260K.bin").read_bytes()
    file = tmp_path / "cut.bin"
    file.write_bytes(content[: int(share * len(content))])
    refused(file, lambda: open_weights(file), "cut short", "get the file again")


def test_a_truncated_model_names_the_tensor(folder: Path, tmp_path: Path, refused: Refused) -> None:
    content = (folder / "stories260K.bin").read_bytes()
    file = tmp_path / "cut.bin"
    file.write_bytes(content[:520_000])
    refused(file, lambda: open_weights(file), "in 'model.layers.3.mlp.gate_proj.weight'")
    file.write_bytes(content + b"more")
    refused(file, lambda: open_weights(file), "goes on after its last tensor")


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("value", [-(2**31), -1, 0, 3, 2**31 - 1])
def test_a_damaged_header_is_refused(at: int, value: int, folder: Path, tmp_path: Path, refused: Refused) -> None:
    content = np.fromfile(folder / "stories260K.bin", "<i4")
    content[at] = value
    file = tmp_path / "damaged.bin"
    content.tofile(file)
    refused(file, lambda: open_weights(file), "damaged")


@pytest.mark.parametrize("length", [0, 3, 11, 4000])
def test_a_truncated_vocabulary_is_refused(length: int, folder: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "cut.bin"
    file.write_bytes((folder / "tok512.bin").read_bytes()[:length])
    refused(file, lambda: open_llama2c_tokenizer(file, 512), "cut short")


def test_a_vocabulary_of_another_model_is_refused(folder: Path, refused: Refused) -> None:
    file = folder / "tok512.bin"
    refused(file, lambda: open_llama2c_tokenizer(file, 511), "goes on after 511 ids")
    refused(file, lambda: open_llama2c_tokenizer(file, 513), "ends at id 512 of 513")
    refused(folder / "absent", lambda: open_llama2c_tokenizer(folder / "absent", 512), "No such file")
