"""From a config to a program: the model, its loss captured for training and evaluation, and the pipeline applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

import compax
from compax.errors import CompaxError, ConfigError
from compax.experiments import config as configs
from compax.experiments import shardings
from compax.experiments.config import Config, closest
from compax.instruments import Instrument
from compax.models import decoder
from compax.placement import DEVICE
from compax.target import Target

TRAIN = "train"
EVAL = "eval"


def model_config(config: Config, vocabulary: int) -> decoder.DecoderConfig:
    """Returns the shape of the network: a named size, the tokenizer's vocabulary, and the overrides.

    Raises:
        ConfigError: There is no such size, or an override is unknown or of the wrong type.
    """
    size = config.model.size
    if size not in decoder.SIZES:
        near = closest(size, decoder.SIZES)
        raise ConfigError(f"field 'model.size' is '{size}', which {config.model.family} does not have{near}")
    chosen = dataclasses.replace(decoder.SIZES[size], vocab_size=vocabulary, context_length=config.data.sequence_length)
    known = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    changes: dict[str, Any] = {}
    for name, value in config.model.overrides.items():
        if name not in known:
            raise ConfigError(f"unknown config field 'model.overrides.{name}'{closest(name, known)}")
        if name == "vocab_size":
            raise ConfigError("model.overrides.vocab_size follows the tokenizer: set tokenizer.vocabulary instead")
        kind = type(known[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(
                f"field 'model.overrides.{name}' is of type {kind.__name__}, got {value!r} ({type(value).__name__})"
            )
        changes[name] = value
    return dataclasses.replace(chosen, **changes)


def build_model(config: Config, vocabulary: int, *, abstract: bool = False) -> decoder.Decoder:
    """Builds the model of a config, with parameters drawn from its seed, or (`abstract`) with their shapes alone."""
    shape = model_config(config, vocabulary)

    def make() -> decoder.Decoder:
        return decoder.Decoder(shape, rngs=nnx.Rngs(config.seed))

    return nnx.eval_shape(make) if abstract else make()


def micro_batch(config: Config) -> int:
    """Returns how many sequences the model reads at a time."""
    return config.data.batch_size // config.optimizer.accumulation


def capture(config: Config, model: decoder.Decoder) -> compax.Program:
    """Captures the loss of a model on micro-batches `{"tokens": int32[batch, sequence_length + 1]}`.

    Returns:
        A program with the entries `train` (the default) and `eval`; no pass was applied yet.
    """
    batch = example_batch(config)
    program = compax.capture(model, batch, loss=decoder.loss, mode="train", entry=TRAIN, name=config.name)
    return program.with_entry(EVAL, batch, loss=decoder.loss, mode="eval")


def example_batch(config: Config) -> dict[str, jax.Array]:
    """Returns a batch with the shapes of training, for capturing and for trying passes on."""
    shape = (micro_batch(config), config.data.sequence_length + 1)
    return {"tokens": jax.random.randint(jax.random.key(config.seed), shape, 0, 256, jnp.int32)}


def build_over_devices(config: Config, vocabulary: int) -> compax.Program:
    """Returns the program that a config trains, over the devices of all processes, which call this together.

    1. Where the pipeline runs on shapes and leaves all parameters as the model has them, these are drawn right where
       they lie: no process holds more than its part. What the passes make is then not compared on a sample.
    2. Otherwise each process makes the whole program, and keeps its part.

    Raises:
        CompaxError: The model, the pipeline or the shardings are not valid.
    """
    dense = capture(config, build_model(config, vocabulary, abstract=True))
    try:
        program = compax.Pipeline.parse(config.pipeline)(dense)
    except CompaxError:  # a pass may ask for values; whatever else is wrong is found again below
        program = None
    if program is None or not _untouched(dense, program):
        program = build_program(config, vocabulary)
        return program.replace(placement=shardings.over_all_devices(config, program)).place()
    placement = shardings.over_all_devices(config, program)

    def draw() -> tuple[dict[str, Any], dict[str, Any]]:
        model = build_model(config, vocabulary)
        drawn = compax.capture(model, example_batch(config), loss=decoder.loss, mode="train")
        return dict(drawn.params), dict(drawn.state)

    whole = placement.place(PartitionSpec(), DEVICE)
    out = placement.shardings(program.params), dict.fromkeys(program.state, whole)
    params, state = jax.jit(draw, out_shardings=out)()
    return program.replace(params=params, state=state, placement=placement)


def _untouched(before: compax.Program, after: compax.Program) -> bool:
    """Whether passes left all parameters and state as they were: a pass that changes values makes other objects."""
    return all(
        old.keys() == new.keys() and all(new[path] is old[path] for path in old)
        for old, new in ((before.params, after.params), (before.state, after.state))
    )


def build_program(
    config: Config,
    vocabulary: int,
    *,
    abstract: bool = False,
    target: Target | None = None,
    instruments: Sequence[Instrument] = (),
) -> compax.Program:
    """Returns the program that a config trains: the model's loss, with the config's pipeline applied.

    Args:
        config: the config.
        vocabulary: of the tokenizer.
        abstract: shapes alone, no parameters.
        target: what the passes prepare it for; by default the devices of this process.
        instruments: what watches the passes, besides the checks.

    Raises:
        CompaxError: The model or the pipeline is not valid.
    """
    program = capture(config, build_model(config, vocabulary, abstract=abstract))
    samples = () if abstract else (example_batch(config),)
    return compax.Pipeline.parse(config.pipeline, instruments)(program, *samples, target=target)


def settled(config: Config, target: Target) -> tuple[Config, tuple[str, ...]]:
    """A config with what its pipeline chooses by itself written out, and what was said of the choice.

    Args:
        config: the config; it stays as it is.
        target: what the passes choose for.

    Raises:
        CompaxError: the model or the pipeline is not valid, or nothing can be chosen.
    """
    pipeline = compax.Pipeline.parse(config.pipeline)
    if not pipeline.undecided:
        return config, ()
    program = build_program(config, config.tokenizer.vocabulary, abstract=True, target=target)
    chosen = [note for record in program.history if record.asked is not None for note in record.notes]
    return with_pipeline(config, pipeline_of(program)), tuple(chosen)


def pipeline_of(program: compax.Program) -> str:
    """The text of the passes that changed a program, with what they chose."""
    return " | ".join(record.text for record in program.history)


def with_pipeline(config: Config, text: str) -> Config:
    """A config with another pipeline."""
    changed = configs.from_json(configs.to_json(config), where="the config")
    changed.pipeline = text
    return changed
