"""Experiment configs: every field with its default, its type and what it means.

A config is an `ml_collections.ConfigDict`. `default()` makes one with every field of `FIELDS`; an experiment is a
Python file with a `get_config()` that takes the default and changes what it wants:

    from compax.experiments import config as base

    def get_config():
        config = base.default()
        config.model.size = "tiny"
        config.pipeline = "cast(compute=bfloat16)"
        return config

The type of a field is the type of its default. `load` checks what the file returned and applies the command line's
overrides; whatever does not fit is a `ConfigError` of one line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from compax.errors import ConfigError


class Config(Protocol):
    """What of an `ml_collections.ConfigDict` is used here: its fields as attributes, with the types of `FIELDS`."""

    def __getattr__(self, name: str, /) -> Any: ...

    def __setattr__(self, name: str, value: Any, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
        default: The value it has unless a file or the command line changes it; its type is the field's type.
        doc: What it means, with units.
        choices: The values it may take, if they are few.
        minimum: The least number it may be.
        resumable: Whether a run may go on with another value. The others decide the numbers that training computes, so
            a run directory made with one value refuses another.
    """

    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    resumable: bool = False


FIELDS: Mapping[str, Field] = {
    "name": Field("run", "Name of the experiment; the run directory is runs/NAME unless `directory` says otherwise."),
    "directory": Field("", "Run directory: config, checkpoints, metrics, plots. Empty: runs/NAME.", resumable=True),
    "seed": Field(0, "Seed of the parameters, of dropout and of the order of the data.", minimum=0),
    "steps": Field(1000, "Optimizer steps.", minimum=1),
    "pipeline": Field("", "Passes applied before training, such as 'cast(compute=bfloat16)'. Empty: none."),
    "compress": Field("", "Passes applied after training, with a report of each. Empty: none.", resumable=True),
    "model.family": Field("decoder", "Which network of `compax.models`.", choices=("decoder",)),
    "model.size": Field("tiny", "Named size of that family, such as tiny or llama2-7b."),
    "model.overrides": Field(
        {}, "Fields of the model's config to change, such as num_layers. `vocab_size` follows the tokenizer."
    ),
    "data.corpus": Field(
        "cpython",
        "Text to train on: the library source of the running CPython (no download), or `data.files`.",
        choices=("cpython", "files"),
    ),
    "data.files": Field((), "Globs of UTF-8 text files, for data.corpus=files. `**` goes into folders."),
    "data.eval_fraction": Field(
        0.05, "Share of the text kept for evaluation, by whole files (by the tail of a single file).", minimum=0
    ),
    "data.max_bytes": Field(0, "Use about this much of the corpus, by whole files spread over it. 0: all.", minimum=0),
    "data.sequence_length": Field(256, "Tokens that the model reads at a time.", minimum=1),
    "data.batch_size": Field(16, "Sequences in one optimizer step.", minimum=1),
    "data.cache": Field(
        "", "Where trained tokenizers and tokens are kept. Empty: compax under the user's cache folder.", resumable=True
    ),
    "tokenizer.file": Field("", "A tokenizer.json to load. Empty: a byte-level BPE is trained on the training text."),
    "tokenizer.vocabulary": Field(4096, "Tokens in the vocabulary of a trained tokenizer.", minimum=257),
    "optimizer.name": Field(
        "adamw", "Optimizer, from optax.", choices=("adamw", "adam", "sgd", "lion", "adafactor", "muon")
    ),
    "optimizer.learning_rate": Field(1e-3, "Peak learning rate.", minimum=0),
    "optimizer.b1": Field(0.9, "Decay of the first moment (momentum, for sgd and muon).", minimum=0),
    "optimizer.b2": Field(0.95, "Decay of the second moment.", minimum=0),
    "optimizer.eps": Field(1e-8, "Added to the denominator of adam, adamw and muon.", minimum=0),
    "optimizer.weight_decay": Field(
        0.1, "Decoupled weight decay; vectors, biases and norm scales are spared.", minimum=0
    ),
    "optimizer.clip_norm": Field(1.0, "Gradients are scaled down to this global norm. 0: never.", minimum=0),
    "optimizer.accumulation": Field(1, "Micro-batches in one step; data.batch_size is divided by it.", minimum=1),
    "schedule.name": Field(
        "cosine",
        "Learning rate after warm-up. wsd: constant, then down over the last schedule.decay_fraction of the steps.",
        choices=("constant", "cosine", "linear", "wsd"),
    ),
    "schedule.warmup_steps": Field(50, "Steps over which the rate rises linearly from 0.", minimum=0),
    "schedule.final_fraction": Field(0.1, "The rate at the end, as a fraction of the peak.", minimum=0),
    "schedule.decay_fraction": Field(0.2, "For wsd: the share of the steps that decays.", minimum=0),
    "evaluation.every": Field(
        200, "Steps between evaluations; one more at the end. 0: at the end only.", minimum=0, resumable=True
    ),
    "evaluation.batches": Field(
        8, "Batches in an evaluation. 0: the whole evaluation text.", minimum=0, resumable=True
    ),
    "checkpoint.every": Field(
        200, "Steps between checkpoints; one more at the end. 0: at the end only.", minimum=0, resumable=True
    ),
    "checkpoint.keep": Field(2, "How many of the last checkpoints are kept.", minimum=1, resumable=True),
    "nan.policy": Field(
        "stop",
        "What a loss or gradient that is not finite does. stop: end with an error. skip: leave out that update.",
        choices=("stop", "skip"),
        resumable=True,
    ),
    "nan.patience": Field(
        10, "With skip: how many steps in a row may be skipped before training stops.", minimum=1, resumable=True
    ),
    "log.every": Field(
        10, "Steps between lines of metrics.jsonl and of the progress display.", minimum=1, resumable=True
    ),
    "log.tensorboard": Field(True, "Write TensorBoard events (needs the extra `viz`).", resumable=True),
    "log.plot": Field(True, "Draw loss.png at the end (needs the extra `viz`).", resumable=True),
    "generation.prompts": Field((), "Texts to continue after training.", resumable=True),
    "generation.tokens": Field(64, "Tokens to generate for each prompt.", minimum=1, resumable=True),
    "generation.temperature": Field(
        0.0, "Softmax temperature of sampling. 0: the most likely token.", minimum=0, resumable=True
    ),
    "generation.top_k": Field(0, "Sample from the k most likely tokens. 0: from all.", minimum=0, resumable=True),
    "sharding.batch": Field(
        ("data",), "Mesh axes that the batch is split over, for `plan` and `train --distributed`.", resumable=True
    ),
    "sharding.params": Field(
        (),
        "How parameters are split over the mesh, for `plan` and `train --distributed`: 'GLOB: SPEC' with a mesh axis, "
        "axes joined by +, or - for each dimension, such as 'blocks.**.mlp.up.kernel: -,model'. A later one overrides; "
        "the rest is not split.",
        resumable=True,
    ),
    "sharding.optimizer": Field((), "As sharding.params, after it, for the optimizer's state alone.", resumable=True),
    "compiler.options": Field(
        (), "Options of XLA's compiler for the step, as NAME=VALUE, over those that compax sets.", resumable=True
    ),
    "plan.topology": Field("", "Slice that `plan` compiles for, such as v5e:4x4.", resumable=True),
    "plan.mesh": Field(
        "",
        "Mesh over that slice, and over all devices of `train --distributed`, unless the pass shard says one; such as "
        "data=4,model=4.",
        resumable=True,
    ),
}

_OPEN = "model.overrides"


def default() -> Config:
    """Returns a locked config with the default of every field of `FIELDS`."""
    from ml_collections import ConfigDict

    nested: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        section = nested
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = field.default
    config: Any = ConfigDict(nested)
    config.lock()
    config.model.overrides = _open_section({})
    return config


def _open_section(values: Mapping[str, Any]) -> Config:
    """Returns a section that takes fields of any name: those of the model's config, which the model checks."""
    from ml_collections import ConfigDict

    return ConfigDict(dict(values))


def _set_open(config: Config, key: str, value: Any) -> None:
    """Sets a field of the open section, of whatever type it was before."""
    config.model.overrides = _open_section({**config.model.overrides.to_dict(), key: value})


def load(source: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> Config:
    """Runs the `get_config()` of an experiment and applies overrides to what it returns.

    Args:
        source: A Python file, or the bare name of an experiment that comes with compax, such as `quickstart`.
        overrides: Field name to text, as the command line gives them (`{"optimizer.learning_rate": "3e-4"}`).

    Returns:
        A locked, checked config.

    Raises:
        ConfigError: There is no such file or experiment, it fails or returns something else, or a field is wrong.
    """
    config = _run_file(find(source), str(source))
    for name, text in (overrides or {}).items():
        override(config, name, text)
    check(config)
    return config


def find(source: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the Python file that a path or the bare name of a packaged experiment stands for."""
    path = pathlib.Path(source)
    if path.is_file():
        return path
    packaged = experiments()
    if str(source) in packaged:
        return packaged[str(source)]
    names = ", ".join(packaged)
    raise ConfigError(f"no config file '{source}': give a Python file with a get_config(), or one of: {names}")


def experiments() -> dict[str, pathlib.Path]:
    """Returns the experiments that come with compax: name to file."""
    folder = pathlib.Path(__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.py")) if "\ndef get_config(" in path.read_text("utf-8")}


def _run_file(path: pathlib.Path, source: str) -> Config:
    from ml_collections import ConfigDict

    specification = importlib.util.spec_from_file_location(f"compax_experiment_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"config '{source}' is not a Python file: its name has to end in .py")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        returned = module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        # The file is the user's own code: whatever it raises is a fault of the config, and is told in one line.
        raise ConfigError(f"config '{source}' failed{_line_in(error, path)}: {_first_line(error)}") from error
    if not isinstance(returned, ConfigDict):
        raise ConfigError(f"config '{source}': get_config() returned {type(returned).__name__}, not a ConfigDict")
    config = default()
    for name, value in flatten(returned).items():
        _assign(config, name, value, where=f"config '{source}'")
    return config


def _line_in(error: BaseException, path: pathlib.Path) -> str:
    """Names the last line of the file that an error went through."""
    line, trace = None, error.__traceback__
    if isinstance(error, SyntaxError):
        line = error.lineno
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" at line {line}"


def _first_line(error: BaseException) -> str:
    """Returns an error's type and first line; of a locked ConfigDict's complaint, the field and the closest ones."""
    text = str(error).strip()
    unknown = re.search(r'Key "(.+?)" does not exist', text)
    if isinstance(error, AttributeError) and unknown:
        return f"unknown config field '{unknown[1]}'{closest(unknown[1], FIELDS)}"
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def flatten(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config as a flat dict: dotted field name to value, the open section `model.overrides` included."""
    return dict(_walk(config, ""))


def _walk(section: Config | Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        name = prefix + str(key)
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            yield from _walk(value, name + ".")
        else:
            yield name, value


def override(config: Config, name: str, text: str) -> None:
    """Sets one field from text, as the command line does.

    Args:
        config: Changed in place.
        name: The dotted name of a field.
        text: A whole number, a number, true or false, text, or for lists `a,b` or `("a", "b")`.

    Raises:
        ConfigError: The field is unknown (the closest names are told) or the text is not of its type.
    """
    if name.startswith(_OPEN + "."):
        _set_open(config, name[len(_OPEN) + 1 :], _literal(text))
        return
    if name == _OPEN:
        value = _literal(text)
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(
                f"--config.{name}={text}: give a dict such as {{'num_layers': 4}}, or --config.{name}.num_layers=4"
            )
        config.model.overrides = _open_section(value)
        return
    _assign(config, name, _parse(name, _field(name, "--config."), text), where="command line")


def _field(name: str, prefix: str = "") -> Field:
    if name in FIELDS:
        return FIELDS[name]
    inside = [known for known in FIELDS if known.startswith(name + ".")]
    if inside:
        raise ConfigError(f"{prefix}{name} is a section: set one of its fields, " + ", ".join(inside))
    near = closest(name, FIELDS) or "; compax train --help lists them all"
    raise ConfigError(f"unknown config field '{name}'{near}")


def closest(name: str, known: Iterable[str]) -> str:
    """Returns a clause that names the entries of `known` most like `name`, to end an error message with."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = name.rsplit(".", 1)[-1]
    by_last = {entry.rsplit(".", 1)[-1]: entry for entry in known}
    found += [by_last[entry] for entry in difflib.get_close_matches(last, list(by_last), n=3, cutoff=0.7)]
    found = list(dict.fromkeys(found))[:3]
    if found:
        return "; did you mean " + " or ".join(found) + "?"
    return "; known are " + ", ".join(known) if len(known) <= 12 else ""


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _parse(name: str, field: Field, text: str) -> Any:
    """Reads text as the type of a field's default."""
    kind = type(field.default)
    try:
        if kind is bool:
            return _TRUTH[text.strip().lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is tuple:
            return _parse_list(text)
    except (KeyError, ValueError):
        raise ConfigError(f"--config.{name}={text}: expected {_kind_name(kind)}") from None
    return text


def _parse_list(text: str) -> tuple[Any, ...]:
    if text.strip().startswith(("(", "[")):
        value = _literal(text)
        if not isinstance(value, list | tuple):
            raise ValueError(text)
        return tuple(value)
    return tuple(part for part in (part.strip() for part in text.split(",")) if part)


def _literal(text: str) -> Any:
    """Reads a Python literal; what is none, such as a bare word, is text."""
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of texts",
    dict: "a dict",
}


def _kind_name(kind: type) -> str:
    return _KINDS.get(kind, kind.__name__)


def _assign(config: Config, name: str, value: Any, *, where: str) -> None:
    if name.startswith(_OPEN + "."):
        _set_open(config, name[len(_OPEN) + 1 :], value)
        return
    field = _field(name)
    kind = type(field.default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: field '{name}' is {_kind_name(kind)}, got {value!r} ({type(value).__name__})")
    if isinstance(value, tuple) and not all(isinstance(part, str) for part in value):
        raise ConfigError(f"{where}: field '{name}' is a list of texts, got {value!r}")
    *sections, last = name.split(".")
    section: Any = config
    for key in sections:
        section = section[key]
    section[last] = value


def check(config: Config) -> None:
    """Checks ranges, choices and the fields that depend on each other.

    Raises:
        ConfigError: A value is impossible; the message says which field and what it may be.
    """
    values = flatten(config)
    for name, field in FIELDS.items():
        if name == _OPEN:
            continue
        value = values[name]
        if field.choices and value not in field.choices:
            raise ConfigError(f"field '{name}' is '{value}': choose from {', '.join(field.choices)}")
        if field.minimum is not None and not value >= field.minimum:
            raise ConfigError(f"field '{name}' is {value}: it must be at least {field.minimum:g}")
    batch, parts = config.data.batch_size, config.optimizer.accumulation
    if batch % parts:
        raise ConfigError(
            f"data.batch_size={batch} does not divide into optimizer.accumulation={parts} equal micro-batches"
        )
    if not 0 < config.data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {config.data.eval_fraction}: it must lie between 0 and 1")
    if config.data.corpus == "files" and not config.data.files:
        raise ConfigError(
            "data.corpus is 'files' and data.files is empty: give a glob, --config.data.files='texts/**/*.txt'"
        )
    if config.data.files and config.data.corpus != "files":
        raise ConfigError(
            f"data.files is set and data.corpus is '{config.data.corpus}': add --config.data.corpus=files"
        )


def run_directory(config: Config) -> pathlib.Path:
    """Returns where a run keeps its files."""
    return pathlib.Path(config.directory or pathlib.Path("runs") / config.name)


def to_json(config: Config) -> str:
    """Returns a config as readable JSON; `from_json` reads it back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, *, where: str) -> Config:
    """Reads the config that `to_json` wrote.

    Args:
        text: JSON.
        where: The file it came from, for messages.

    Raises:
        ConfigError: It is no JSON object, or a field is unknown, missing or of the wrong type.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} does not hold a config")
    config = default()
    flat = flatten(values)
    missing = [name for name in FIELDS if name != _OPEN and name not in flat]
    if missing:
        raise ConfigError(f"{where} lacks the field '{missing[0]}': it was written by another version")
    for name, value in flat.items():
        _assign(config, name, value, where=where)
    check(config)
    return config


def differences(old: Config, new: Config) -> list[str]:
    """Returns a line for each field in which two configs differ and that decides what training computes."""
    before, after = flatten(old), flatten(new)
    lines = []
    for name in dict.fromkeys([*before, *after]):
        if name in FIELDS and FIELDS[name].resumable:
            continue
        if before.get(name) != after.get(name):
            lines.append(f"{name} is {before.get(name)!r} there and {after.get(name)!r} here")
    return lines
