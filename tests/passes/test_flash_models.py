"""Attention by kernels in models that nobody here wrote: outputs and gradients, and why some sites stay."""

from typing import Any

import numpy as np
import pytest

import compax
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.experiments.benchmarks import zoo
from compax.passes import flash
from oracle import gradients_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEFAULT = [
    ("tunix_qwen3", False),
    ("tunix_gemma3", False),
    ("flax_gpt2", True),
    ("flax_bert", True),
    ("flax_vit", False),
    ("flax_whisper", False),
    ("compax_decoder_scanned", False),
]
MORE = [
    *((name, True) for name in ("flax_llama", "flax_mistral", "flax_gpt_neo", "flax_gptj", "flax_opt", "flax_bloom")),
    *((name, True) for name in ("flax_gemma", "flax_roberta", "flax_bart", "flax_clip", "flax_wav2vec2")),
    *((name, False) for name in ("tunix_llama3", "tunix_qwen2", "tunix_qwen3_experts", "flax_gpt2", "flax_bert")),
]
CASES = [
    pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow, id=f"{case[0]}{'-padding' * case[1]}")
    for case in (*DEFAULT, *MORE)
]


def built(name: str, **options: Any) -> zoo.Case:
    try:
        return zoo.build(name, **options)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_outputs_and_gradients(name: str, padding: bool) -> None:
    case = built(name, padding=padding)
    before = case.capture()
    program = compax.Pipeline.parse("flash(block_q=8, block_k=16)")(before, *case.arguments(), **case.kwargs)
    sites = program.history[-1].sites
    assert {site.status for site in sites} == {"rewritten"}, {site.name: site.reason for site in sites}
    count = sum(attention.count for attention in zoo.expected(name).attentions)
    assert len(sites) == count or "scanned" in name
    compax.verify(program)
    tolerance = rounding_tolerance("float32")
    assert largest_relative_error(np.asarray(case.run(before)), np.asarray(case.run(program))) <= tolerance
    if any(x is None or not hasattr(x, "dtype") for x in case.inputs):
        return
    gradients = [gradients_of(p, case.arguments(), case.kwargs) for p in (before, program)]
    vectors = [np.concatenate([x[path].ravel() for path in sorted(x)]) for x in gradients]
    assert largest_relative_error(*vectors) <= tolerance


def test_layers_with_positions_given_stay() -> None:
    case = built("tunix_gemma")
    program = compax.Pipeline.parse("flash()")(case.capture(), *case.arguments(), **case.kwargs)
    reasons = {site.name: site.reason for site in program.history[-1].sites if site.status == "skipped"}
    assert list(reasons) == ["layers.0.attn"]
    assert "'positions' says where its queries stand" in reasons["layers.0.attn"]


@pytest.mark.parametrize("name", ["flax_gpt2", "flax_bert"])
def test_in_train_mode_weights_are_dropped_as_before(name: str) -> None:
    case = built(name, mode="train")
    result = flash.Flash().run(case.capture(), compax.transform.Context())
    assert not result.changed
    assert all("dropped at random" in site.reason for site in result.sites)


def test_a_step_from_a_cache_stays() -> None:
    case = built("flax_gpt2", decode=True)
    result = flash.Flash().run(case.capture(), compax.transform.Context())
    assert not result.changed
    assert {site.status for site in result.sites} == {"skipped"}
