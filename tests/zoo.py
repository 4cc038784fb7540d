"""Tiny models that nobody here wrote, in their basic form; `experiments/benchmarks/zoo.py` builds them, and more.

A test takes names from `ENTRIES` and calls `load(name)`, which skips with the reason where the package is missing.
Masks and positions are arrays among the inputs.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import pytest

from compax.experiments.benchmarks import zoo, zoo_case

BATCH = 2
LENGTH = 16
VOCABULARY = 96

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
"""Marks a test that calls these models: their authors' deprecations are not our errors."""

Model = zoo.Case
"""A model with all that `compax.capture(module, *inputs, variables=variables, **kwargs)` takes."""

WIDTHS = zoo.Widths(
    batch=BATCH,
    length=LENGTH,
    vocabulary=VOCABULARY,
    model_dim=32,
    hidden_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    window=8,
    context=32,
    image=16,
)


def load(name: str) -> Model:
    """Builds an entry, or skips the running test with the reason."""
    try:
        return ENTRIES[name]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def tokens(*, batch: int = BATCH, length: int = LENGTH, vocabulary: int = VOCABULARY) -> jax.Array:
    """Equally distributed token numbers, the same at every call: int32[batch, length]."""
    return zoo_case.tokens(batch, length, vocabulary)


ENTRIES: dict[str, Callable[[], Model]] = {
    name: functools.partial(zoo.build, name, widths=dataclasses.replace(WIDTHS, **changes))
    for name, changes in {
        "tunix_llama3": {},
        "tunix_qwen2": {},
        "tunix_qwen3": {},
        "tunix_qwen3_experts": {},
        "tunix_gemma": {},
        "tunix_gemma3": {"num_kv_heads": 1},
        "flax_gpt2": {},
        "flax_bert": {},
        "flax_vit": {},
        "flax_clip": {},
        "flax_whisper": {},
        "flax_llama": {},
    }.items()
}
