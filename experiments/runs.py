"""Finished runs: read back for evaluation, generation and inspection."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax

import compax
from compax.errors import CheckpointError
from compax.experiments import checkpoint, compress, data, programs, tokenizer
from compax.experiments import config as configs
from compax.experiments.config import Config, run_directory
from compax.experiments.console import Console
from compax.experiments.evaluate import Evaluator
from compax.instruments import Instrument
from compax.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds, in memory.

    Attributes:
        config: What it was trained with.
        directory: Where it is.
        step: The checkpoint's step.
        program: With the trained parameters.
        shape: The decoder's.
        tokenizer: The run's.
    """

    config: Config
    directory: pathlib.Path
    step: int
    program: compax.Program
    shape: DecoderConfig
    tokenizer: tokenizer.Tokenizer


def restore(config: Config, *, compressed: bool = False) -> Run:
    """Reads the last checkpoint of a run.

    Args:
        config: The run's.
        compressed: Take the program that the config's `compress` made.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or the run was made by another config.
    """
    directory = run_directory(config)
    different = configs.differences(checkpoint.read_config(directory), config)
    if different:
        raise CheckpointError(f"{directory} holds a run with another config: {'; '.join(different)}")
    checkpoints = checkpoint.Checkpoints(directory, read_only=True)
    step = checkpoints.latest
    if step is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet: go on with compax train")
    words = tokenizer.load(directory / checkpoint.TOKENIZER)
    program = programs.build_program(config, words.vocabulary)
    shape = programs.model_config(config, words.vocabulary)
    if compressed:
        folder = directory / checkpoint.COMPRESSED
        if not folder.is_dir():
            raise CheckpointError(f"{directory} holds no compressed program: its config has no `compress`")
        return Run(config, directory, step, compax.load(folder, program), shape, words)
    found = checkpoints.restore(step, {"params": program.params, "state": program.state})
    return Run(config, directory, step, program.replace(**found), shape, words)


def transformed(run: Run, pipeline: str, instruments: Sequence[Instrument] = ()) -> compax.Program:
    """Returns the run's program after a pipeline."""
    batch: dict[str, jax.Array] = programs.example_batch(run.config)
    return compax.Pipeline.parse(pipeline, instruments)(run.program, batch, entry=programs.EVAL)


def evaluate(config: Config, pipeline: str, console: Console, *, compressed: bool = False) -> None:
    """Measures a run on its evaluation text, and again after each pass of a pipeline.

    Raises:
        CompaxError: There is no usable checkpoint or text, or the pipeline fails.
    """
    run = restore(config, compressed=compressed)
    config = configs.from_json(configs.to_json(config), where="the config")
    config.tokenizer.file = str(run.directory / checkpoint.TOKENIZER)
    corpus = data.prepare(config, console.say)
    held = data.Sequences(corpus.eval, config.data.sequence_length)
    batches = data.evaluation_batches(held, programs.micro_batch(config), config.evaluation.batches)
    evaluator = Evaluator(run.program, batches)
    found = evaluator.of(run.program)
    console.say(
        f"{run.directory} at step {run.step}: evaluation loss {found.loss:.4f}, perplexity {found.perplexity:.2f} "
        f"(measured on {found.tokens} tokens)"
    )
    if pipeline:
        batch = programs.example_batch(config)
        compress.compress(pipeline, run.program, evaluator, batch, seed=config.seed).show(console)
