"""The main job of the README: a small decoder learns CPython's source, and is then compressed.

Command: `compax train --config=quickstart`. Everything it needs comes with Python and with compax: no download.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compax.experiments import config as base

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.default()
    config.name = "quickstart"
    config.steps = 300
    config.compress = "quantize(weights=int8)"
    config.model.size = "small"
    config.data.max_bytes = 4_000_000
    config.data.sequence_length = 128
    config.data.batch_size = 8
    config.tokenizer.vocabulary = 4096
    config.optimizer.learning_rate = 2e-3
    config.schedule.warmup_steps = 30
    config.evaluation.every = 100
    config.checkpoint.every = 100
    config.generation.prompts = ("def __init__(self, ", "import ")
    config.generation.tokens = 48
    return config
