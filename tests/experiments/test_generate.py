"""Generation: the cached, compiled loop gives the tokens that the model gives one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax.errors import ConfigError
from compax.experiments import generate, programs
from compax.experiments import tokenizer as tokenizers
from compax.experiments.generate import Generator, Sampling

TEXT = "def f(self):\n    return self\n" * 4


@pytest.fixture
def words() -> tokenizers.Tokenizer:
    return tokenizers.train([TEXT], 262)


@pytest.fixture
def model(make, words):
    return programs.build_model(make(), words.vocabulary)


def captured(model, pipeline: str = "") -> compax.Program:
    return generate.captured(model, pipeline, "model", np.arange(16))


def greedy(model, ids: list[int], count: int, end: int | None) -> list[int]:
    """The reference: the whole text through the model for every token, padded behind where nothing looks."""
    forward = nnx.jit(lambda model, tokens: model(tokens))
    found: list[int] = []
    while len(found) < count and (not found or found[-1] != end):
        text = [*ids, *found]
        padded = np.zeros((1, len(ids) + count), np.int32)
        padded[0, : len(text)] = text
        found.append(int(jnp.argmax(forward(model, padded)[0, len(text) - 1])))
    return found


@pytest.mark.parametrize("prompt", ["def", "def f(self):\n    return self\n"])
@pytest.mark.parametrize("pipeline", ["", "quantize(weights=int8)"])
def test_greedy_continuation_is_the_models_own(make, model, words, prompt, pipeline):
    program = captured(model, pipeline)
    found = Generator(program, model.config, words, Sampling(tokens=9))(prompt)
    if not pipeline:
        assert list(found.tokens) == greedy(model, words.encode(prompt).tolist(), 9, words.end)
    assert len(found.tokens) == 9 or found.tokens[-1] == words.end
    assert found.seconds > 0


def test_training_program_generates_as_well(make, model, words):
    program = programs.capture(make(), model)
    found = Generator(program, model.config, words, Sampling(tokens=5))("def")
    assert list(found.tokens) == greedy(model, words.encode("def").tolist(), 5, words.end)


def test_sampling_is_decided_by_the_seed(model, words):
    program = captured(model)

    def sample(seed: int) -> tuple[int, ...]:
        return Generator(program, model.config, words, Sampling(tokens=12, temperature=2.0, seed=seed))("def").tokens

    assert sample(1) == sample(1) != sample(2)


def test_top_k_takes_none_but_the_most_likely():
    logits = jnp.asarray([0.0, 3.0, 2.0, 1.0, -1.0])
    sampling = Sampling(temperature=5.0, top_k=2)
    chosen = jax.vmap(lambda key: sampling.choose(logits, key))(jax.random.split(jax.random.key(0), 200))
    assert set(np.asarray(chosen).tolist()) == {1, 2}
    assert int(Sampling().choose(logits, jax.random.key(0))) == 1


def test_what_is_refused(model, words):
    with pytest.raises(ConfigError, match="temperature is -1"):
        Sampling(temperature=-1)
    with pytest.raises(ConfigError, match="prompt is empty"):
        Generator(captured(model), model.config, words, Sampling())("")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2, capsys):
    from compax.experiments.cli import main

    assert main(["generate", "--model=smollm2-135m", "--prompt=The capital of France is", "--tokens=8"]) == 0
    assert "Paris" in capsys.readouterr().out
