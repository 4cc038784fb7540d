"""A corpus of a few files, and a config that trains a tiny model on it within seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from compax.experiments import config as configs

WORDS = ["def", "return", "self", "value", "for", "in", "range", "if", "not", "None", "print", "name"]


def write_corpus(folder: Path, files: int = 12, lines: int = 60) -> None:
    """Writes files of random words; the same ones each time."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for number in range(files):
        text = "\n".join(" ".join(random.choice(WORDS, 6)) for _ in range(lines))
        (folder / f"file{number:02}.txt").write_text(f"{text}\n", encoding="utf-8")


def tiny(folder: Path, **changes: object) -> ConfigDict:
    """A config whose corpus, cache and run directory lie in `folder`."""
    write_corpus(folder / "corpus")
    config = configs.default()
    config.directory = str(folder / "run")
    config.steps = 12
    config.data.corpus = "files"
    config.data.files = (str(folder / "corpus" / "*.txt"),)
    config.data.eval_fraction = 0.2
    config.data.cache = str(folder / "cache")
    config.data.sequence_length = 16
    config.data.batch_size = 4
    config.tokenizer.vocabulary = 260
    config.model.overrides = ConfigDict({"num_layers": 1, "model_dim": 16, "hidden_dim": 24, "head_dim": 4})
    config.schedule.warmup_steps = 2
    config.evaluation.every = 5
    config.evaluation.batches = 2
    config.checkpoint.every = 5
    config.log.every = 1
    config.log.tensorboard = config.log.plot = False
    for name, value in changes.items():
        configs.override(config, name.replace("__", "."), str(value))
    return config


def write_config(folder: Path, **changes: object) -> Path:
    """Writes `tiny` as an experiment's file."""
    values = configs.flatten(tiny(folder, **changes))
    lines = ["from compax.experiments import config as base", "from ml_collections import ConfigDict"]
    lines += ["def get_config():", "    config = base.default()"]
    for name, value in values.items():
        section, _, key = name.partition("model.overrides.")
        target = f"config.model.overrides[{key!r}]" if key and not section else f"config.{name}"
        lines.append(f"    {target} = {value!r}")
    path = folder / "experiment.py"
    path.write_text("\n".join([*lines, "    return config", ""]), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ConfigDict]:
    """Makes a tiny config, with fields changed: `make(optimizer__name="sgd")`."""
    return lambda **changes: tiny(tmp_path, **changes)


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., str]:
    """Writes a tiny experiment's file and returns its path."""
    return lambda **changes: str(write_config(tmp_path, **changes))


@pytest.fixture
def config(make: Callable[..., ConfigDict]) -> ConfigDict:
    return make()
