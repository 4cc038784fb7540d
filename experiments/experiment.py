"""A whole experiment: training, then the passes and the texts that the config asks for."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from compax.experiments import compress, generate, programs
from compax.experiments.config import Config, run_directory
from compax.experiments.preemption import Preemption, SharedPreemption, Stopped
from compax.experiments.train import Trained, train
from compax.tpu.distributed import Processes

if TYPE_CHECKING:
    from compax.experiments.console import Console


def run(config: Config, console: Console, processes: Processes | None = None) -> int:
    """Trains as the config says, or goes on; then compresses the trained program and continues the prompts with both.

    Args:
        config: A checked config.
        console: Takes what a person should see.
        processes: That do it together over all their devices; all of them call this.

    Returns:
        The exit code: 0, also after a SIGTERM, when all is saved; 130 after Ctrl-C.

    Raises:
        CompaxError: What is wrong, in one readable line.
    """
    with SharedPreemption() if processes and processes.count > 1 else Preemption() as preemption:
        try:
            trained = train(config, console, preemption, processes)
            finish(trained, console)
        except Stopped as stop:
            console.say(str(stop))
            return 0 if stop.signal == signal.SIGTERM else 128 + stop.signal
    console.say(f"the run is in {run_directory(config)}")
    return 0


def finish(trained: Trained, console: Console) -> None:
    """Applies `compress`, with its report, and generates from the trained and the compressed program."""
    config = trained.config
    variants = {"trained": trained.program}
    if config.compress:
        report = compress.compress(
            config.compress,
            trained.program,
            trained.evaluator,
            programs.example_batch(config),
            seed=config.seed,
        )
        report.show(console)
        report.save(trained.directory, config.to_dict())
        variants["compressed"] = report.program
    if not config.generation.prompts:
        return
    sampling = generate.Sampling.of_config(config)
    shape = programs.model_config(config, trained.corpus.tokenizer.vocabulary)
    for name, program in variants.items():
        generator = generate.Generator(program, shape, trained.corpus.tokenizer, sampling)
        for prompt in config.generation.prompts:
            generator(prompt).show(console, name)
