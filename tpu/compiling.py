"""Compiling for a slice with no chip attached: the side that asks; `compax.tpu.worker` is the side that compiles.

The figures of `Compiled` are the compiler's own, or counted in what it made; all are of one device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from compax import errors
from compax.analysis.hlo import Collective
from compax.analysis.hlo_memory import Buffer
from compax.errors import CompileError, NoCompilerError
from compax.placement import mesh_text
from compax.target import Target


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile, for what.

    Attributes:
        target: the slice.
        axes: of the mesh over it: sizes by name.
        builder: "module:function"; called in the child process as `function(mesh, arguments)`, it returns a
            `compax.tpu.worker.Built`.
        arguments: for the builder; survives JSON.
        hlo: where to keep the compiled text; nowhere if None.
        quick: with the least of the compiler's effort, else with as much as JAX is set to
            (`jax_optimization_level`). Compiling takes half to a tenth of the time; products are the same, memory
            about so, and what full effort sends in parts while products run is sent whole, and sometimes more of it.
        options: of the compiler, over those of `compax.tpu.options`.
    """

    target: Target
    axes: Mapping[str, int]
    builder: str
    arguments: Mapping[str, Any]
    hlo: str | None = None
    quick: bool = False
    options: Mapping[str, str | bool] = dataclasses.field(default_factory=dict[str, str | bool])


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes, as the compiler says.

    Attributes:
        arguments: what the program is called with.
        outputs: results that reuse no argument's memory.
        temporaries: what lives in between.
        code: the program itself.
        peak: the most at any time, as the compiler counts it: all memories of the device together.
        host: what it keeps in the host's memory.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int
    host: int

    @property
    def allocated(self) -> int:
        """Arguments, outputs, temporaries and code: what is set aside for the program."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A program that the compiler refused because it does not fit into the memory of a device.

    Attributes:
        message: what the compiler said.
        needed: bytes that it needs, arguments included; None if the compiler did not say.
        limit: bytes that there are; None if the compiler did not say.
    """

    message: str
    needed: int | None
    limit: int | None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a request.

    Attributes:
        facts: the builder's.
        seconds: measured, by phase.
        host_bytes: measured: the most memory that the child process had.
        processor_seconds: measured: what the child process had of this machine's cores, all together.
        memory: of one device; None if the program does not fit.
        flops: of matrix products and convolutions, by dtype, of one device in a call.
        traffic: bytes between one device and its memory in a call.
        collectives: those of a call.
        buffers: the largest.
        unknown_loops: loops whose length the compiled text does not tell; what is in them was counted once.
        shortage: why the program does not fit; None if it does.
    """

    facts: Mapping[str, Any]
    seconds: Mapping[str, float]
    host_bytes: int
    processor_seconds: float
    memory: Memory | None = None
    flops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    traffic: int = 0
    collectives: tuple[Collective, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    unknown_loops: tuple[str, ...] = ()
    shortage: Shortage | None = None


Tell = Callable[[str, float], None]
"""Called with the name of a phase as it begins, and the seconds since the start."""


def compile_for(request: Request, tell: Tell = lambda phase, seconds: None) -> Compiled:
    """Compiles a program for a slice that need not be there, in a process of its own.

    Args:
        request: what, and for what.
        tell: called as phases begin: those of `compax.tpu.worker.PHASES`.

    Returns:
        The figures; where the program does not fit, its `shortage`.

    Raises:
        NoCompilerError: there is no compiler for the target.
        CompileError: it fails, or the child was killed.
        CompaxError: what the builder raised.
    """
    check_compiler(request.target)
    started = time.monotonic()

    def since(phase: str) -> None:
        tell(phase, time.monotonic() - started)

    result = _run(request, since)
    failure = result.pop("failure", None)
    if failure is not None and failure["kind"] != "memory":
        raise _error(failure, request.target)
    shortage = (
        Shortage(**{field.name: failure[field.name] for field in dataclasses.fields(Shortage)}) if failure else None
    )
    memory = result.pop("memory", None)
    lists: dict[str, Any] = {
        "collectives": tuple(Collective(**found) for found in result.pop("collectives", ())),
        "buffers": tuple(Buffer(**found) for found in result.pop("buffers", ())),
        "unknown_loops": tuple(result.pop("unknown_loops", ())),
    }
    return Compiled(**result, **lists, memory=Memory(**memory) if memory else None, shortage=shortage)


def check_compiler(target: Target) -> None:
    """Raises `NoCompilerError` if nothing here compiles for a target; the message says what to install."""
    if target.chip.platform == "cpu":
        return
    if target.chip.platform != "tpu":
        raise NoCompilerError(
            f"{target} cannot be compiled for without one: only slices of TPUs have a compiler that needs no device"
        )
    if importlib.util.find_spec("libtpu") is None:
        wanted = libtpu_version()
        version = f" (libtpu {wanted} goes with jax {importlib.metadata.version('jax')})" if wanted else ""
        raise NoCompilerError(
            f"the compiler of TPUs is missing: pip install -e '.[tpu]', or pip install 'jax[tpu]'{version}; no TPU is "
            "needed to compile for one"
        )


def libtpu_version() -> str | None:
    """The version of libtpu that the installed jax asks for in its extra `tpu`, or None if it does not say."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*([^;]+?)\s*;", requirement):
            return found[1].strip("() ")
    return None


def _error(failure: Mapping[str, Any], target: Target) -> errors.CompaxError:
    if failure["kind"] == "compax":
        return getattr(errors, failure["type"])(failure["message"])
    first = next((line for line in failure["message"].splitlines() if line.strip()), "no message")
    return CompileError(f"compiling for {target} failed: {failure['type']}: {first}")


def _run(request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs the child process to its end and returns what it wrote."""
    content = {
        "target": str(request.target),
        "axes": dict(request.axes),
        "builder": request.builder,
        "arguments": request.arguments,
        "options": dict(request.options),
        "hlo": request.hlo and os.path.abspath(request.hlo),
    }
    with tempfile.TemporaryDirectory(prefix="compax-plan-") as folder:
        asked, answer, noise = (pathlib.Path(folder) / name for name in ("request", "result", "noise"))
        asked.write_text(json.dumps(content), encoding="utf-8")
        with noise.open("wb") as stderr, _child(asked, answer, stderr, request.quick) as child:
            assert child.stdout is not None
            phase = "start"
            for line in child.stdout:
                phase = json.loads(line)["phase"]
                tell(phase)
            code = child.wait()
        if code or not answer.is_file():
            raise CompileError(_death(code, phase, request, noise.read_text("utf-8", errors="replace")))
        return json.loads(answer.read_text("utf-8"))


@contextlib.contextmanager
def _child(asked: pathlib.Path, answer: pathlib.Path, stderr: Any, quick: bool) -> Generator[subprocess.Popen[str]]:
    import jax

    # Set before JAX is imported: no accelerator is opened, and no metadata server of a cloud is asked.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # Several processes may have the compiler at once, as none of them has a chip.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # A cache of compiled programs would be filled with ones that no device here can run.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    name = "jax_optimization_level"
    environment[name.upper()] = "O0" if quick else getattr(jax.config, name)
    run = "import sys; from compax.tpu.worker import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, str(asked), str(answer)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)
    try:
        yield child
    finally:
        # Whatever ended the wait, an interrupt too: the child does not outlive it.
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _death(code: int, phase: str, request: Request, noise: str) -> str:
    """Says how a child process ended that left no result."""
    what = f"compiling for {request.target} with {mesh_text(request.axes)}"
    if code < 0:
        name = signal.Signals(-code).name
        why = ", most likely because the machine ran out of memory" if -code == signal.SIGKILL else ""
        return (
            f"{what}: the compiler's process was ended by {name} in the phase '{phase}'{why}; nothing was written. "
            "Scanned layers (model.overrides.scan=true) and a smaller mesh need less memory of this machine"
        )
    last = next((line.strip() for line in reversed(noise.splitlines()) if line.strip()), "it left no message")
    return f"{what}: the compiler's process ended with code {code} in the phase '{phase}': {last}"
