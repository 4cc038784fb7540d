"""stories260K tells the same story before and after capture, on disk and back, and at other shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
from compax.models import SIZES, Decoder, load_decoder, open_llama2c_tokenizer

TOKENS = 200
LENGTH = 256
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "data/weights/stories260K"


@pytest.fixture(scope="module")
def prompt(folder: Path) -> list[int]:
    tokenizer = open_llama2c_tokenizer(folder / "tok512.bin", SIZES["stories260k"].vocab_size)
    return [tokenizer.begin, *map(int, tokenizer.encode(PROMPT))]


def greedy(step: Callable[[jax.Array, Any], jax.Array], model: Decoder, prompt: list[int]) -> list[int]:
    """The tokens that follow, one at a time, with a cache that each step updates in place."""
    tokens, cache, told = jnp.asarray([prompt], jnp.int32), model.init_cache(1, LENGTH), []
    for _ in range(TOKENS):
        tokens = step(tokens, cache)[:, -1:].argmax(-1).astype(jnp.int32)
        told.append(int(tokens[0, 0]))
    return told


def test_the_story_stays_the_same(folder: Path, prompt: list[int], tmp_path: Path) -> None:
    model = load_decoder(folder / "stories260K.bin")
    jitted = nnx.jit(lambda model, tokens, cache: model(tokens, cache))
    expected = greedy(lambda tokens, cache: jitted(model, tokens, cache), model, prompt)
    assert len(set(expected)) > 20

    program = compax.capture(model, jnp.asarray([prompt], jnp.int32), model.init_cache(1, LENGTH))
    one_token = (jnp.asarray([prompt[:1]], jnp.int32), model.init_cache(1, LENGTH))
    assert greedy(program, model, prompt) == expected  # the second signature is captured on the way
    specialized = program.specialize(*one_token)
    assert len(specialized.graphs) == 2
    assert greedy(specialized, model, prompt) == expected

    compax.save(program, tmp_path / "story")
    abstract = nnx.eval_shape(lambda: Decoder(model.config, rngs=nnx.Rngs(0)))
    restored = compax.load(tmp_path / "story", abstract, *one_token)
    assert greedy(restored, model, prompt) == expected
