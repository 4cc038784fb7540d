"""The command `compax`.

Whatever is wrong with a config, data, a checkpoint or a pipeline ends in one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from compax.errors import CompaxError, ConfigError
from compax.experiments import config as configs
from compax.experiments.config import Config
from compax.experiments.launch_cli import LAUNCH_HELP, add_launch

if TYPE_CHECKING:
    from compax.experiments.console import Console

_OVERRIDE = "--config."


class _Parser(argparse.ArgumentParser):
    """Complains by raising `ConfigError`, so that every complaint looks the same."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help says more")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0; 2 for an error that was told; 130 after Ctrl-C.
    """
    # Libraries log what only their authors can act on.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except CompaxError as error:
        print(f"compax: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compax: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _one_line(message: str) -> str:
    """Puts a message on one line; a caret below a text becomes the number of the character that it points at."""
    pointed = re.sub(r"\n  (.*)\n  (\s*)\^", lambda found: f" (character {len(found[2]) + 1} of '{found[1]}')", message)
    return " ".join(pointed.split())


def _run(argv: list[str]) -> int:
    # What follows -- is another command's: nothing of it is read here.
    place = argv.index("--") if "--" in argv else len(argv)
    argv, after = argv[:place], argv[place + 1 :]
    argv, overrides = _take_overrides(argv)
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise ConfigError(f"unknown command '{argv[0]}'{configs.closest(argv[0], commands)}")
    args = parser.parse_args(argv)
    args.overrides, args.after = overrides, after
    if after and argv[0] != "launch":
        raise ConfigError(f"only compax launch takes a command after --: {' '.join(after)}")
    command: Callable[[argparse.Namespace, Console], int] = args.command

    from compax.experiments.console import Console

    return command(args, Console())


def _take_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.FIELD=VALUE` and `--config.FIELD VALUE` out of the arguments."""
    rest: list[str] = []
    found: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_OVERRIDE):
            rest.append(argument)
            continue
        name, equals, value = argument[len(_OVERRIDE) :].partition("=")
        if not equals:
            following = next(arguments, None)
            if following is None:
                raise ConfigError(f"{argument} lacks a value: write {argument}=VALUE")
            value = following
        found[name] = value
    return rest, found


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="compax",
        description="Compiler passes for JAX: capture a Flax model, transform it, verify and price every step.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Start with:  compax train --config=quickstart\nEach command has its own help:  compax train --help",
    )
    parser.add_argument("--version", action="version", version=f"compax {importlib.metadata.version('compax')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def command(name: str, run: Callable[[argparse.Namespace, Console], int], help: str, epilog: str = "") -> _Parser:
        made = subparsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=run)
        commands[name] = made
        return made

    train = command("train", _train, "train from a config, or go on where the run was left", epilog=_fields_help())
    train.add_argument("--config", metavar="FILE", required=True, help=_CONFIG_HELP)

    train.add_argument("--distributed", action="store_true", help="one process a host, found by the cluster's own word")
    train.add_argument(
        "--coordinator", metavar="ADDRESS:PORT", default="", help="where process 0 is, if no cluster says so"
    )
    train.add_argument("--processes", metavar="N", type=int, help="how many there are")
    train.add_argument("--process", metavar="I", type=int, help="which of them this is, from 0")

    evaluate = command("eval", _eval, "measure loss and perplexity of a run on its evaluation text")
    _add_run(evaluate)
    _add_pipeline(evaluate)
    _add_compressed(evaluate)

    generate = command("generate", _generate, "continue texts with a trained run or with a known model's weights")
    _add_run(generate)
    _add_model(generate)
    _add_pipeline(generate)
    _add_compressed(generate)
    generate.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; may be repeated")
    generate.add_argument("--tokens", metavar="N", type=int, help="tokens to generate (default 64)")
    generate.add_argument("--temperature", metavar="T", type=float, help="softmax temperature; 0 (the default): greedy")
    generate.add_argument("--top-k", metavar="K", type=int, help="sample from the K most likely tokens; 0: from all")
    generate.add_argument("--seed", metavar="N", type=int, help="seed of the sampling (default 0)")

    inspect = command("inspect", _inspect, "print a program: its sites, its coverage, and what each pass did")
    _add_run(inspect)
    _add_model(inspect)
    _add_pipeline(inspect)
    inspect.add_argument(
        "--abstract", action="store_true", help="shapes alone, no parameters: a 70B model takes no memory"
    )
    inspect.add_argument(
        "--composites", action="store_true", help="its attentions, norms, feed-forwards and experts, and what is open"
    )
    inspect.add_argument("--draw", metavar="FILE", help="write a picture of it: FILE.svg, or a page FILE.html")
    inspect.add_argument("--axes", action="store_true", help="its axes: which dimensions belong together")
    inspect.add_argument(
        "--cost", metavar="TARGET", nargs="?", const="", help="what it computes and moves, and its time: --cost=v5e:4x4"
    )

    plan = command("plan", _plan, "say what a train step takes on a slice of TPUs, with no chip attached", _PLAN_HELP)
    plan.add_argument("--config", metavar="FILE", required=True, help=_CONFIG_HELP)
    plan.add_argument("--topology", metavar="SLICE", default="", help="such as v5e:4x4, v5p:4x4x8, v6e:16x16*2")
    plan.add_argument("--mesh", metavar="AXES", default="", help="such as data=4,model=4; -1 for what is left")
    plan.add_argument("--sequence", metavar="N", help="tokens in a sequence: data.sequence_length")
    plan.add_argument("--batch", metavar="N", help="sequences in a step, all devices together: data.batch_size")
    plan.add_argument("--tokens", metavar="N", type=float, help="tokens to train on (default 20 for each parameter)")
    plan.add_argument("--forward", action="store_true", help="the loss alone: no gradients, no update")
    plan.add_argument("--json", metavar="FILE", help="write all figures")
    plan.add_argument("--html", metavar="FILE", help="write a page with pictures")
    plan.add_argument("--hlo", metavar="FILE", help="write the compiled text")
    plan.add_argument(
        "--quick",
        action="store_true",
        help="compile with the least effort: half to a tenth of the time, memory about so",
    )
    plan.add_argument("--sweep", metavar="NAME=VALUES", nargs="+", help="plan every combination, and compare")

    launch = command("launch", _launch, "run a command on slices of Cloud TPU, or print what that takes", LAUNCH_HELP)
    add_launch(launch, _CONFIG_HELP)

    passes = command("passes", _passes, "list the registered passes, or explain one")
    passes.add_argument("name", metavar="NAME", nargs="?", help="a pass, such as quantize")
    return parser, commands


_PLAN_HELP = """\
The step is compiled by the compiler of TPUs (pip install -e '.[tpu]'), which needs none. Parameters are split as
sharding.params of the config says, the batch over the axes of sharding.batch.

A sweep takes batch, sequence, remat, topology, mesh and any field of the config, with commas between the values, or
bars where values hold commas:

  compax plan --config=plan_1b --topology=v6e:4x4 --sweep batch=16,32 'mesh=data=16|data=4,model=4' remat=true,false"""

_CONFIG_HELP = "a Python file with get_config(), or an experiment that comes with compax, such as quickstart"


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=_CONFIG_HELP)
    parser.add_argument("--run", metavar="FOLDER", help="a run directory, such as runs/quickstart")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="a size of the decoder, such as smollm2-135m or llama2-7b")


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline", metavar="PASSES", default="", help="passes to apply first: 'quantize(weights=int8)'"
    )


def _add_compressed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compressed", action="store_true", help="take what the config's `compress` made of the run")


def _fields_help() -> str:
    lines = ["Every field of the config can be overridden, as in --config.optimizer.learning_rate=3e-4:", ""]
    for name, field in configs.FIELDS.items():
        choices = f" One of {', '.join(field.choices)}." if field.choices else ""
        lines += [f"  --config.{name}={field.default!r}", f"      {field.doc}{choices}"]
    return "\n".join(lines)


def _config_of(args: argparse.Namespace) -> Config:
    """Returns the config that `--config` or `--run` stands for, with the overrides applied."""
    import pathlib

    from compax.experiments.checkpoint import read_config

    if bool(args.config) == bool(args.run):
        raise ConfigError("give either --config=FILE or --run=FOLDER")
    if args.config:
        return configs.load(args.config, args.overrides)
    config = read_config(pathlib.Path(args.run))
    for name, text in args.overrides.items():
        configs.override(config, name, text)
    configs.check(config)
    return config


def _no_overrides(args: argparse.Namespace) -> None:
    if args.overrides:
        raise ConfigError(f"--config.{next(iter(args.overrides))} needs --config=FILE or --run=FOLDER beside it")


def _only_model(args: argparse.Namespace) -> None:
    _no_overrides(args)
    if args.config or args.run:
        raise ConfigError("give one of --model, --config and --run")


def _train(args: argparse.Namespace, console: Console) -> int:
    config = configs.load(args.config, args.overrides)
    where = (args.coordinator, args.processes, args.process)
    if not args.distributed:
        if where != ("", None, None):
            raise ConfigError("--coordinator, --processes and --process go with --distributed")
        from compax.experiments.experiment import run

        return run(config, console)
    from compax.tpu.distributed import digest, initialize

    joined = initialize(*where, compare={"config": digest(configs.to_json(config))}, say=console.say)
    from compax.experiments.console import Console
    from compax.experiments.experiment import run

    with joined:
        return run(config, console if joined.first else Console(quiet=True), joined)


def _eval(args: argparse.Namespace, console: Console) -> int:
    config = _config_of(args)
    from compax.experiments import runs

    runs.evaluate(config, args.pipeline, console, compressed=args.compressed)
    return 0


def _generate(args: argparse.Namespace, console: Console) -> int:
    from compax.experiments import generate

    given = {name: getattr(args, name) for name in ("tokens", "temperature", "top_k", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    prompts = args.prompt or []
    if args.model:
        _only_model(args)
        generate.from_model(args.model, args.pipeline, prompts, generate.Sampling(**given), console)
    else:
        config = _config_of(args)
        sampling = dataclasses.replace(generate.Sampling.of_config(config), **given)
        generate.from_run(config, args.pipeline, prompts, sampling, console, compressed=args.compressed)
    return 0


def _inspect(args: argparse.Namespace, console: Console) -> int:
    from compax.experiments import inspection

    views = inspection.Views(axes=args.axes, composites=args.composites, draw=args.draw, cost=args.cost)
    if args.model:
        _only_model(args)
        inspection.inspect_model(args.model, args.pipeline, console, views, abstract=args.abstract)
    elif args.run:
        inspection.inspect_run(_config_of(args), args.pipeline, console, views)
    else:
        inspection.inspect_config(_config_of(args), args.pipeline, console, views, abstract=args.abstract)
    return 0


def _plan(args: argparse.Namespace, console: Console) -> int:
    from compax.experiments import plan, sweep

    given = {"data.sequence_length": args.sequence, "data.batch_size": args.batch}
    overrides = {**args.overrides, **{name: text for name, text in given.items() if text is not None}}
    config = configs.load(args.config, overrides)
    fields = (field.name for field in dataclasses.fields(plan.Options))
    options = plan.Options(**{name: getattr(args, name) for name in fields})
    if args.sweep:
        sweep.sweep(config, options, args.sweep, console)
    else:
        plan.plan(config, options, console)
    return 0


def _launch(args: argparse.Namespace, console: Console) -> int:
    from compax.experiments import launch_cli

    return launch_cli.launch(args, console)


def _passes(args: argparse.Namespace, console: Console) -> int:
    from compax.experiments import catalogue

    _no_overrides(args)
    catalogue.explain(args.name, console) if args.name else catalogue.show(console)
    return 0
