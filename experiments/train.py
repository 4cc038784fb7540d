"""Training from a config: `compax train`.

The run goes on by itself where a run of the same config was left: the losses are then, to the bit, those of a run that
was never interrupted.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import compax
from compax.errors import CheckpointError, CompaxError
from compax.experiments import checkpoint, data, metrics, optimizer, programs, shardings
from compax.experiments.config import Config, run_directory
from compax.experiments.console import Console, Progress, amount
from compax.experiments.evaluate import Evaluation, Evaluator
from compax.experiments.preemption import Preemption, Stopped
from compax.experiments.step import Step, make_step, start
from compax.placement import mesh_text
from compax.tpu.distributed import ALONE, Processes


class DivergenceError(CompaxError):
    """The loss or the gradient is not finite, and the config says to stop."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        config: What it was trained with.
        directory: Where its files are.
        program: With the trained parameters and state.
        corpus: The text.
        evaluator: Measures programs with other parameters on the evaluation text.
        evaluation: The loss at the end.
    """

    config: Config
    directory: pathlib.Path
    program: compax.Program
    corpus: data.Corpus
    evaluator: Evaluator
    evaluation: Evaluation


def train(config: Config, console: Console, preemption: Preemption, processes: Processes | None = None) -> Trained:
    """Trains, or goes on training, until `config.steps`.

    Args:
        config: A checked config.
        console: Takes what a person should see.
        preemption: Entered; its signals end training after a checkpoint.
        processes: That train together, over all their devices: all of them call this. The first one writes what is not
            an array; the others should have a quiet console.

    Raises:
        Stopped: A signal asked to stop; all is saved.
        DivergenceError: A loss or gradient was not finite.
        CompaxError: What else can be wrong with config, data, checkpoint or pipeline, in one readable line.
    """
    directory, together = run_directory(config), processes or ALONE
    preflight(config)
    with checkpoint.open_run(config, together) as opened:
        corpus = data.prepare(config, console.say)
        together.agree("text", corpus.identity)
        if together.first:
            corpus.tokenizer.save(directory / checkpoint.TOKENIZER)
        console.say(
            f"text: {amount(corpus.nbytes, 'B')} in {len(corpus.train.names)} files, {amount(len(corpus.train.ids))} "
            f"tokens for training, {amount(len(corpus.eval.ids))} for evaluation, "
            f"vocabulary {corpus.tokenizer.vocabulary}"
        )
        program = _built(config, directory, corpus.tokenizer.vocabulary, processes)
        describe(program, config, console)
        loop = _Loop(config, console, preemption, program, corpus, together)
        del program  # its arrays: the loop has its own
        loop.restore()
        opened.begun()
        evaluation = loop.run()
        if config.log.plot and together.first:
            metrics.plot(directory, console.say)
        trained = loop.program.replace(params=loop.params, state=loop.state.state)
        return Trained(config, directory, trained, corpus, loop.evaluator, evaluation)


def _built(config: Config, directory: pathlib.Path, vocabulary: int, processes: Processes | None) -> compax.Program:
    """The program of a run, with what its passes chose when it began, where its placement has it."""
    together = processes or ALONE
    if compax.Pipeline.parse(config.pipeline).undecided:
        chosen = _chosen(config, directory, vocabulary) if together.first else ""
        config = programs.with_pipeline(config, together.of_first("pipeline", chosen))
    if processes is not None:
        return programs.build_over_devices(config, vocabulary)
    program = programs.build_program(config, vocabulary)
    return program if program.placement.mesh is None else program.place()


def _chosen(config: Config, directory: pathlib.Path, vocabulary: int) -> str:
    """The pipeline with what its passes chose for these devices, now or when the run began."""
    devices = jax.device_count()
    chosen = checkpoint.read_choice(directory, devices)
    if not chosen:
        chosen = programs.pipeline_of(programs.build_program(config, vocabulary))
        checkpoint.write_choice(directory, devices, chosen)
    return chosen


def preflight(config: Config) -> None:
    """Finds what is wrong with the parts of a config that other modules read, before anything is made on disk.

    Raises:
        ConfigError: The model, the optimizer or the schedule is impossible.
        PipelineError: A pipeline is malformed, or its order is wrong.
    """
    programs.model_config(config, config.tokenizer.vocabulary)
    optimizer.optimizer(config)
    trained = compax.Pipeline.parse(config.pipeline)
    trained.check()
    compax.Pipeline.parse(config.compress).check(trained.passes)


def describe(program: compax.Program, config: Config, console: Console) -> None:
    """Prints what is about to be trained, and on what."""
    trainable, _ = program.partition()
    total, count = (sum(value.size for value in params.values()) for params in (program.params, trainable))
    tokens = config.data.batch_size * config.data.sequence_length
    devices, mesh = jax.devices(), program.placement.mesh
    one = "" if len(devices) == 1 else f" (1 of {len(devices)} devices)"
    if mesh is not None:
        one = f" ({mesh_text(mesh)}" + (f"; {jax.process_count()} processes)" if jax.process_count() > 1 else ")")
    console.say(
        f"model: {config.model.family} {config.model.size}, {amount(total)} parameters, {amount(count)} trainable; "
        f"{config.steps} steps of {tokens} tokens on {devices[0].device_kind}{one}"
    )
    for record in program.history:
        console.say(f"pass: {record}")


class _Loop:
    """The state of training, and what happens to it from step to step."""

    def __init__(
        self,
        config: Config,
        console: Console,
        preemption: Preemption,
        program: compax.Program,
        corpus: data.Corpus,
        processes: Processes,
    ):
        self.config, self.console, self.preemption, self.processes = config, console, preemption, processes
        self.directory = run_directory(config)
        self.text = corpus.identity
        self.sequences = data.Sequences(corpus.train, config.data.sequence_length)
        self.feed: shardings.Feed | None = None
        if program.placement.mesh is not None:
            shape = (config.optimizer.accumulation, programs.micro_batch(config), config.data.sequence_length + 1)
            self.feed = shardings.Feed.of(program.placement, shape)
        rows = self.feed and self.feed.batch_rows
        self.batches = data.Batches(self.sequences, config.data.batch_size, config.seed, rows)
        held = data.Sequences(corpus.eval, config.data.sequence_length)
        batches = data.evaluation_batches(held, programs.micro_batch(config), config.evaluation.batches)
        self.state, self.frozen = start(config, program)
        self.program = program.replace(params=checkpoint.shapes(program.params), state=checkpoint.shapes(program.state))
        self.evaluator = Evaluator(self.program, batches)
        self.step_function: Step = make_step(config, self.program)
        self.checkpoints = checkpoint.Checkpoints(self.directory, keep=config.checkpoint.keep)
        self.step = 0
        # The last step's metrics stay on the device until the next step is under way.
        self._pending: tuple[int, dict[str, jax.Array], np.ndarray] | None = None

    def restore(self) -> None:
        """Goes back to the last checkpoint, if there is one."""
        latest = self.checkpoints.latest
        self.processes.agree("last checkpoint", str(latest))
        if latest is None:
            return
        meta = self.checkpoints.meta(latest)
        if latest > self.config.steps:
            raise CheckpointError(
                f"{self.directory} was trained for {latest} steps, the config says {self.config.steps}"
            )
        if meta.get("text") != self.text:
            raise CheckpointError(
                f"{self.directory} was trained on another text than there is now (another Python, or changed files): "
                "choose another folder with --config.directory=FOLDER"
            )
        like = checkpoint.shapes(dataclasses.replace(self.state, params=self.params))
        frozen = set(self.frozen)
        del self.state, self.frozen  # what was drawn makes room for what is read
        found = self.checkpoints.restore(latest, like)
        trained = {path: value for path, value in found.params.items() if path not in frozen}
        self.state = dataclasses.replace(found, params=trained)
        self.frozen = {path: found.params[path] for path in frozen}
        try:
            self.batches.state = meta["data"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint {latest} in {self.directory} has no usable place in the data") from error
        self.step = latest
        self.console.say(f"going on from the checkpoint of step {latest} in {self.directory}")
        for name, now in checkpoint.versions().items():
            if (then := meta["versions"].get(name)) != now:
                self.console.say(f"note: the checkpoint was made with {name} {then}, this is {now}; bits may differ")

    def run(self) -> Evaluation:
        """Trains to the last step and returns the evaluation there."""
        config = self.config
        self.metrics = metrics.Metrics(
            self.directory,
            self.step,
            tensorboard=config.log.tensorboard,
            report=self.console.say,
            writes=self.processes.first,
        )
        fails_alone = False
        try:
            self.preemption.ready()
            evaluation = self._steps()
            self.preemption.done()
            return evaluation
        except BaseException as error:
            fails_alone = self.processes.count > 1 and not isinstance(error, (Stopped, DivergenceError))
            raise
        finally:
            self.metrics.close()
            if not fails_alone:  # then the others wait for this one, and not the other way round
                self.checkpoints.close()

    def _steps(self) -> Evaluation:
        config, evaluation = self.config, None
        with self.console.progress(config.steps, self.step) as progress:
            clock = _Clock(config, progress)
            for tokens, batch in self._batches():
                self.state, values = self.step_function(self.state, self.frozen, tokens)
                self.step += 1
                before, self._pending = self._pending, (self.step, values, batch["sequence"])
                self._settle(before, clock)
                clock.mark(self.step)
                last, stop = self.step == config.steps, self.preemption.stops()
                if _due(self.step, config.evaluation.every) or last:
                    self._flush(clock)
                    evaluation = self._evaluate()
                    clock.stop()
                if _due(self.step, config.checkpoint.every) or last or stop:
                    self._flush(clock)
                    self._save()
                    clock.stop()
                if stop:
                    self.checkpoints.wait()
                    raise Stopped(
                        stop,
                        f"stopped by {stop.name} after step {self.step}; the checkpoint is in {self.directory}, the "
                        "same command goes on from it",
                    )
        if evaluation is None:
            evaluation = self.evaluator(self.params, self.state.state)
            self._say(evaluation)
        return evaluation

    def _batches(self) -> Iterator[tuple[jax.Array | np.ndarray, dict[str, np.ndarray]]]:
        shape = (self.config.optimizer.accumulation, programs.micro_batch(self.config), -1)
        while self.step < self.config.steps:
            batch = next(self.batches)
            tokens = batch["tokens"]
            yield tokens.reshape(shape) if self.feed is None else self.feed.put(tokens), batch

    def _flush(self, clock: _Clock) -> None:
        """Settles the step that is still pending."""
        before, self._pending = self._pending, None
        self._settle(before, clock)

    def _settle(self, pending: tuple[int, dict[str, jax.Array], np.ndarray] | None, clock: _Clock) -> None:
        """Looks at the metrics of a step: writes them, and acts when they are not finite."""
        if pending is None:
            return
        step, values, indices = pending
        found = {name: value.item() for name, value in jax.device_get(values).items()}
        skipped = found.pop("skipped")
        if skipped:
            self._not_finite(step, found, skipped, indices)
        if _due(step, self.config.log.every) or step == self.config.steps:
            self.metrics.write(step, found)
            self.metrics.write(step, clock.read(found["loss"]), file=metrics.TIMING)

    def _not_finite(self, step: int, found: dict[str, float], skipped: int, indices: np.ndarray) -> None:
        what = "loss" if not math.isfinite(found["loss"]) else "gradient norm"
        value = found["loss"] if what == "loss" else found["grad_norm"]
        where = f"step {step}: the {what} is {value} on the batch of {self.sequences.describe(indices)}"
        if self.config.nan.policy == "stop":
            raise DivergenceError(
                f"{where}; training stopped, the last checkpoint is as it was; lower optimizer.learning_rate in a new "
                "run, or leave such updates out with --config.nan.policy=skip"
            )
        if skipped >= self.config.nan.patience:
            raise DivergenceError(f"{where}; that is {skipped} steps in a row (nan.patience), training stopped")
        self.console.say(f"{where}; update skipped")

    def _evaluate(self) -> Evaluation:
        evaluation = self.evaluator(self.params, self.state.state)
        self.metrics.write(self.step, {"eval_loss": evaluation.loss, "eval_perplexity": evaluation.perplexity})
        self._say(evaluation)
        return evaluation

    def _say(self, evaluation: Evaluation) -> None:
        self.console.say(
            f"step {self.step:>6}/{self.config.steps}  evaluation loss {evaluation.loss:.4f}  perplexity "
            f"{evaluation.perplexity:.2f} (measured on {evaluation.tokens} tokens)"
        )

    def _save(self) -> None:
        meta = {
            "data": self.batches.state,
            "config": self.config.to_dict(),
            "pipeline": self.config.pipeline,
            "text": self.text,
        }
        self.checkpoints.save(self.step, dataclasses.replace(self.state, params=self.params), meta)

    @property
    def params(self) -> dict[str, Any]:
        """All parameters, those that are not trained included."""
        return {**self.frozen, **self.state.params}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


class _Clock:
    """Measures the speed of training between two lines of the log, without evaluations and checkpoints."""

    def __init__(self, config: Config, progress: Progress):
        self._tokens, self._total = config.data.batch_size * config.data.sequence_length, config.steps
        self._progress = progress
        self._start: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def mark(self, step: int) -> None:
        """Notes that the loop is through with a step. The first one starts the clock: it may hold a compilation."""
        self._last = (step, time.perf_counter())
        self._start = self._start or self._last

    def stop(self) -> None:
        """Stops the clock until the next step is done."""
        self._start = self._last = None

    def read(self, loss: float) -> dict[str, float]:
        """Returns seconds per step and tokens per second since the last reading, and shows them."""
        if self._start is None or self._last is None or self._last[0] == self._start[0]:
            return {}
        (first, began), (step, now) = self._start, self._last
        self._start = self._last
        seconds = (now - began) / (step - first)
        self._progress.update(step, loss, self._tokens / seconds, seconds * (self._total - step))
        return {"seconds_per_step": seconds, "tokens_per_second": self._tokens / seconds}
