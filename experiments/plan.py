"""`compax plan`: what a step of a config takes on a slice, by compiling it with no chip attached.

The report as JSON (`--json=FILE`); bytes, FLOPs and seconds are of one device, and of one step unless said otherwise:

    name, target, chips, mesh {axis: size}, pipeline, entry ("train" or "eval"), batch_size, sequence_length,
    parameters, trainable (counts)
    fits             bool
    shortage         null, or {message, needed, limit}: the compiler's complaint
    graph            predicted: what the graph says before it is compiled, or null for the loss alone:
                     {share, product_flops {phase: FLOPs}, update_flops, traffic, seconds, peak, temporaries,
                     activations, timeline [bytes], phases [of each point],
                     held [{site, phase, what, count, bytes}], missing};
                     these bytes are null where they are not predicted, and missing says why
    memory           limit: bytes that a program can have, or null
                     predicted: {parameters, optimizer, state, batch, arguments}
                     compiled: {arguments, outputs, temporaries, code, peak, host, needed}, empty if it does not fit
    chosen           [text]: what passes chose by themselves, and among what; `pipeline` has it written out
    passes           predicted: [{pass, figures {name: [before, after]}, notes}]: what each pass changed, all devices
                     together but for collectives and seconds; null is unknown, and a note says why
    largest_parameters   [{path, format, shape, spec, bytes}]
    buffers          [{bytes, shape, name, op_name, count}]: the largest, compiled
    flops            predicted: {model}, all devices together; compiled: {device: {dtype: FLOPs}, unknown_loops}
    traffic          compiled: bytes between a device and its memory
    collectives      predicted: {bytes: {kind: bytes}}, what the shardings ask for at least
                     compiled: {kind: {count, bytes, wire_bytes, hidden_bytes, predicted_seconds}}
                     each: [{kind, bytes, group_size, between_slices, count, asynchronous, name, op_name,
                     predicted_seconds}]
    time             predicted: {compute, memory, hidden, waits, step, bound}, or null
    training         tokens, predicted: {tokens_per_second, mfu, days, money (US dollars), kwh}, or null
    compiling        quick: whether with the least effort; measured: {seconds {phase: seconds}, processor_seconds,
                     host_bytes}

A sweep is `{"points": [{"settings": {...}, "report": a report or null, "error": text or null}]}`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator, Mapping
from typing import Any

import compax
from compax.errors import ConfigError, MemoryLimitError, ShardingError
from compax.experiments import config as configs
from compax.experiments import plan_text, programs
from compax.experiments.config import Config
from compax.experiments.console import Console
from compax.experiments.plan_advice import shortage_text
from compax.experiments.plan_build import BUILDER, Facts
from compax.experiments.plan_report import TOKENS_PER_PARAMETER, Report
from compax.experiments.step import given_options
from compax.placement import mesh_text
from compax.target import Target
from compax.tpu import Request, compile_for, parse_mesh


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan, and where to write it.

    Attributes:
        topology: the slice; `plan.topology` of the config if empty.
        mesh: over it; `plan.mesh` if empty, and if that is empty too one axis, `data`.
        forward: the loss alone, without gradients and update.
        tokens: to train on; 20 for each parameter if None.
        json: file for the figures.
        html: file for a page.
        hlo: file for the compiled text.
        quick: compile with the least of the compiler's effort.
    """

    topology: str = ""
    mesh: str = ""
    forward: bool = False
    tokens: float | None = None
    json: str | None = None
    html: str | None = None
    hlo: str | None = None
    quick: bool = False


Tell = Callable[[str, float], None]


def plan(config: Config, options: Options, console: Console) -> Report:
    """Compiles the step of a config for a slice, prints what it takes, and writes the files that were asked for.

    Raises:
        MemoryLimitError: it does not fit; the report was printed and written all the same.
        CompaxError: the config, slice, mesh, shardings or compiler are not as they must be; nothing was written.
    """
    check_writable(options.json, options.html, options.hlo)
    with progress(console) as tell:
        report = make_report(config, options, tell)
    plan_text.show(report, console)
    if options.json is not None:
        write(options.json, json.dumps(report.to_json(), indent=1) + "\n")
    if options.html is not None:
        from compax.experiments.plan_page import page

        write(options.html, page([report]))
    for kind, path in (("figures", options.json), ("page", options.html), ("compiled text", options.hlo)):
        if path is not None:
            console.say(f"{kind}: {path}")
    if not report.fits:
        with searching(console):
            told = shortage_text(report, programs.with_pipeline(config, report.pipeline))
        raise MemoryLimitError(told)
    return report


def make_report(config: Config, options: Options, tell: Tell) -> Report:
    """Compiles the step of a config for a slice.

    Raises:
        CompaxError: the config, slice, mesh, shardings or compiler are not as they must be.
    """
    topology = options.topology or config.plan.topology
    if not topology:
        raise ConfigError("no slice to plan for: give --topology=v5e:4x4, or plan.topology in the config")
    target = Target.parse(topology)
    config, chosen = programs.settled(config, target)
    axes = mesh_axes(config, options.mesh, target)
    arguments = {"config": configs.to_json(config), "forward": options.forward, "target": str(target)}
    request = Request(target, axes, BUILDER, arguments, options.hlo, options.quick, given_options(config))
    compiled = compile_for(request, tell)
    facts = Facts.from_json(compiled.facts)
    tokens = options.tokens or float(TOKENS_PER_PARAMETER * facts.parameters)
    return Report(
        name=config.name,
        target=target,
        axes=axes,
        pipeline=config.pipeline,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        facts=facts,
        compiled=compiled,
        tokens=tokens,
        chosen=chosen,
        quick=options.quick,
    )


def mesh_axes(config: Config, mesh: str, target: Target) -> Mapping[str, int]:
    """The mesh to plan for: that of the pipeline, or else what is asked for, or the config's.

    Raises:
        ShardingError: it does not fit the target, or the pipeline lays the program over another one than is asked for.
    """
    given = mesh or config.plan.mesh
    laid = compax.Pipeline.parse(config.pipeline).mesh_axes(target)
    if laid is None:
        return parse_mesh(given or "data=-1", target)
    if mesh and dict(parse_mesh(mesh, target)) != dict(laid):
        raise ShardingError(f"--mesh={mesh}, but the pipeline lays the program over {mesh_text(laid)}: leave one out")
    return laid


PHASES = {
    "start": "starting the compiler",
    "build": "capturing and tracing the step",
    "lower": "lowering to StableHLO",
    "compile": "compiling",
    "read": "reading what was compiled",
}


@contextlib.contextmanager
def progress(console: Console, what: str = "") -> Generator[Tell]:
    """Shows phases as they begin: a spinner on a terminal, lines elsewhere."""
    before = f"{what}: " if what else ""
    if not console.rich.is_terminal:
        yield lambda phase, seconds: console.say(f"{before}{PHASES[phase]} (after {seconds:.1f} s, measured)")
        return
    with console.rich.status(f"{before}{PHASES['start']}") as status:
        yield lambda phase, seconds: status.update(f"{before}{PHASES[phase]} (after {seconds:.1f} s, measured)")


def searching(console: Console) -> contextlib.AbstractContextManager[Any]:
    """Shows that changes are being predicted."""
    if console.rich.is_terminal:
        return console.rich.status("predicting what would make it fit")
    return contextlib.nullcontext()


def check_writable(*paths: str | None) -> None:
    """Raises `ConfigError` if a file cannot be written where it is asked for."""
    for path in paths:
        if path is None:
            continue
        folder = pathlib.Path(path).absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"{path}: there is no folder {folder}")
        if pathlib.Path(path).is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(f"{path} cannot be written")


def write(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    place = pathlib.Path(path).absolute()
    with tempfile.NamedTemporaryFile(
        "w", dir=place.parent, prefix=f".{place.name}.", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    try:
        os.chmod(file.name, 0o644)
        os.replace(file.name, place)
    except OSError as error:
        pathlib.Path(file.name).unlink()
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
