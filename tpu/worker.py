"""The child process that compiles: `main([REQUEST, RESULT])`, run by `compax.tpu.compiling`.

The compiler of TPUs serves one process of a machine at a time, writes to standard error as it likes, and takes the
process with it when memory ends. So it runs in a process of its own. It reads a request (JSON), tells on standard
output which phase began (one JSON object a line), and at its end writes the result (JSON) beside its place and renames
it, so that a result is whole or not there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


PHASES = ("start", "build", "lower", "compile", "read")
"""Phases in order: JAX and the slice's description; the program; StableHLO; XLA; the compiled text."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What a builder returns.

    Attributes:
        traced: the jitted function, traced with abstract arguments that carry their shardings.
        facts: what the caller wants to know of the program beside; survives JSON.
    """

    traced: jax.stages.Traced
    facts: Mapping[str, Any]


def main(arguments: list[str]) -> int:
    """Compiles what a request says; returns the exit code."""
    request_path, result_path = map(pathlib.Path, arguments)
    # What libraries print goes where their warnings go.
    tell_stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(request_path.read_text("utf-8"))
    result = work(request, lambda phase: print(json.dumps({"phase": phase}), file=tell_stream, flush=True))
    _write(result_path, json.dumps(result))
    return 0


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def work(request: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Builds, lowers, compiles and reads a program.

    Args:
        request: `target` and `axes` (texts), `builder` ("module:function", called with the mesh and `arguments`),
            `arguments`, `hlo` (where to keep the compiled text, or null).
        tell: called with each phase as it begins.

    Returns:
        `seconds` by phase, `facts`, `host_bytes`, `processor_seconds`, and either what the compiler made (`memory`,
        `flops`, `traffic`, `collectives`, `buffers`, `unknown_loops`) or `failure`.
    """
    clock = _Clock(tell)
    result: dict[str, Any] = {"seconds": clock.seconds, "facts": {}}
    try:
        clock.begin("start")
        result |= _compiled(request, clock, result)
    except Exception as error:  # noqa: BLE001 - the parent raises it again, by kind
        result["failure"] = _failure(error)
    clock.end()
    result |= {"host_bytes": _most_memory(), "processor_seconds": round(time.process_time(), 3)}
    return result


def _most_memory() -> int:
    """The most memory that this process had so far, in bytes."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class _Clock:
    def __init__(self, tell: Callable[[str], None]):
        self.tell, self.seconds = tell, dict[str, float]()
        self.phase, self.since = "", time.monotonic()

    def begin(self, phase: str) -> None:
        self.end()
        self.phase = phase
        self.tell(phase)

    def end(self) -> None:
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] = round(now - self.since, 3)
        self.phase, self.since = "", now


def _compiled(request: Mapping[str, Any], clock: _Clock, result: dict[str, Any]) -> dict[str, Any]:
    import jax

    from compax.target import Target
    from compax.tpu.options import compiler_options
    from compax.tpu.topology import make_mesh

    target, axes = Target.parse(request["target"]), dict(request["axes"])
    if target.chip.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(axes.values()))
    mesh = make_mesh(target, axes)
    clock.begin("build")
    module, _, function = request["builder"].partition(":")
    built: Built = getattr(importlib.import_module(module), function)(mesh, request["arguments"])
    result["facts"] = built.facts
    clock.begin("lower")
    lowered = built.traced.lower(lowering_platforms=(target.chip.platform,))
    clock.begin("compile")
    options = compiler_options(target.chip.platform, mesh.devices.flat[0].device_kind)
    compiled = lowered.compile(compiler_options={**options, **request["options"]})
    clock.begin("read")
    text = compiled.as_text() or ""
    if request["hlo"]:
        _write(pathlib.Path(request["hlo"]), text)
    return read(text, compiled.memory_analysis())


def read(text: str, memory: Any) -> dict[str, Any]:
    """Reads what was compiled, as JSON."""
    from compax.analysis import hlo, hlo_memory

    module = hlo.parse(text)
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
            "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        },
        "flops": hlo.matmul_flops(module),
        "traffic": hlo_memory.memory_traffic(module),
        "collectives": [dataclasses.asdict(found) for found in hlo.collectives(module)],
        "buffers": [dataclasses.asdict(buffer) for buffer in hlo_memory.largest_buffers(module)],
        "unknown_loops": list(module.unknown_loops),
    }


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NEEDED = (
    re.compile(r"memory required for .*?\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


def exhausted(message: str) -> tuple[int, int] | None:
    """What a program needs and what there is, in bytes, from the compiler's complaint that memory does not suffice.

    It speaks of temporaries and means all of it: a step that takes 14.8 GB of arguments and 8.8 GB of temporaries on a
    larger chip is said to need 21.6 GB of them on a smaller one (compiled with libtpu 0.0.42.1).
    """
    for pattern in _NEEDED:
        if found := pattern.search(message):
            needed, unit, limit, limit_unit = found.groups()
            return round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[limit_unit])
    return None


def _failure(error: Exception) -> dict[str, Any]:
    """What went wrong, by kind: memory, compax (an error of ours, raised again by its type), compiler."""
    from compax import errors

    message = str(error)
    failure = {"message": message, "type": type(error).__name__}
    if "RESOURCE_EXHAUSTED" in message:
        needed, limit = exhausted(message) or (None, None)
        return {**failure, "kind": "memory", "needed": needed, "limit": limit}
    if isinstance(error, errors.CompaxError):
        return {**failure, "kind": "compax"}
    return {**failure, "kind": "compiler"}
