"""Start-up of several hosts, one process each, on JAX's own runtime (`jax.distributed`), and their end.

1. `initialize` finds the other processes (Cloud TPU, GKE, Slurm and Open MPI say where they are; elsewhere addresses
   are given), in bounded time.
2. It compares what must be equal on all hosts (versions, and what the caller adds) and their clocks.
3. While the processes work, each gives a sign of life to the coordination service. One that gives none, or that ends
   with an error, ends all of them, by its name: a collective would wait for it for ever.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn

import jax

from compax import _jax
from compax.errors import DistributedError

FAILED, LOST = 2, 3
"""Exit codes of a process that failed, and of one that ends because another one is gone."""

START_SECONDS = 300.0
SILENCE_SECONDS = 100.0
CLOCK_WARNING_SECONDS = 5.0
CLOCK_ERROR_SECONDS = 60.0

_VERSIONS = ("compax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_KEYS = "compax"
# JAX's own heartbeats end a process with a stack trace and a number. It waits a little longer than we do.
_PATIENCE_SECONDS = 30
# More processes give fewer signs of life each: the coordinator reads them all.
_BEATS_PER_SECOND = 64
_FOR_EVER_MS = 7 * 24 * 3600 * 1000

_started: list[tuple[tuple[Any, ...], Processes]] = []


def initialize(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    *,
    compare: Mapping[str, str] | None = None,
    start_seconds: float = START_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> Processes:
    """Joins the processes of a job: one a host. To be called before any other use of JAX.

    On Cloud TPU, GKE, Slurm and Open MPI no argument is needed. A second call with the same arguments returns what the
    first one did.

    Args:
        coordinator: address and port of process 0, as in 10.0.0.1:1234.
        processes: how many there are.
        process: which of them this is, from 0.
        compare: what has to be equal on all hosts, by name, besides the versions.
        start_seconds: how long to wait for the others.
        silence_seconds: how long a process may give no sign of life.
        say: takes a line to print.

    Returns:
        The processes. As a context it watches over them, and tells the others when this one fails.

    Raises:
        DistributedError: no cluster is known here and addresses are missing or malformed; the coordinator cannot be
            reached; versions, `compare` or clocks of a host differ; or JAX was used before.
    """
    given = (coordinator, processes, process)
    if _started:
        before, found = _started[0]
        if before != given:
            raise DistributedError(f"initialize was called with {before} before and with {given} now: call it once")
        return found
    _check_arguments(coordinator, processes, process)
    if jax.distributed.is_initialized():
        raise DistributedError("jax.distributed.initialize was called before: call compax.tpu.initialize in its place")
    if coordinator and process:
        _reach(coordinator, process, start_seconds)
    _connect(coordinator, processes, process, start_seconds, silence_seconds)
    found = Processes(jax.process_index(), jax.process_count(), (), silence_seconds)
    found = dataclasses.replace(found, names=_agree(found, _facts(compare or {}), start_seconds, say))
    _started.append((given, found))
    return found


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job.

    Attributes:
        index: which of them this is.
        count: how many there are.
        names: of their hosts, by index.
        silence_seconds: how long one may give no sign of life.
    """

    index: int
    count: int
    names: tuple[str, ...]
    silence_seconds: float = SILENCE_SECONDS
    _watches: list[_Watch] = dataclasses.field(default_factory=list, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes for all."""
        return self.index == 0

    def name(self, index: int) -> str:
        """A process in words."""
        return f"process {index} ({self.names[index]})"

    def of_first(self, what: str, value: str = "") -> str:
        """What process 0 says of something, once a job; the others wait for it.

        Args:
            what: a name for it.
            value: what process 0 says; of the others it is not looked at.
        """
        if self.count == 1:
            return value
        client, key = _jax.coordination_client(), f"{_KEYS}/said/{what}"
        if self.first:
            client.key_value_set(key, value)
            return value
        # Process 0 may be at work for long. If it is gone, the watch ends this process.
        return client.blocking_key_value_get(key, _FOR_EVER_MS)

    def agree(self, what: str, value: str) -> None:
        """Compares something with process 0, once a job.

        Raises:
            DistributedError: it is another value there.
        """
        if (other := self.of_first(what, value)) != value:
            raise DistributedError(
                f"{self.name(self.index)} has another {what} ({value}) than {self.name(0)} ({other}): make them equal "
                "on all hosts"
            )

    def __enter__(self) -> Processes:
        if self.count > 1:
            self._watches.append(_Watch(self))
            self._watches[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._watches:
            return
        watch = self._watches.pop()
        if error is None:
            watch.finish()
            jax.distributed.shutdown()
            return
        # JAX would wait for the others when the interpreter ends. Registered later than its own, this runs before it.
        atexit.register(_leave)
        if _is_of_runtime(error):
            # Most likely a collective that another process did not come to. Who it is is known soon.
            watch.suspect(next(iter(str(error).splitlines()), ""))
        watch.fail(f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000])


ALONE = Processes(0, 1, ("",))
"""The only process of a job."""


class _Watch(threading.Thread):
    """Gives signs of life, and ends this process when another one gives none."""

    def __init__(self, processes: Processes):
        super().__init__(name="compax-watch", daemon=True)
        self._processes = processes
        self._client = _jax.coordination_client()
        self._over = threading.Event()
        self._witness = _witness(processes)
        self._period = max(0.5, processes.count / _BEATS_PER_SECOND)
        self._heard: dict[int, tuple[str, float]] = {index: ("", time.monotonic()) for index in range(processes.count)}

    def run(self) -> None:
        beat = 0
        while not self._over.wait(self._period):
            beat += 1
            try:
                self._set(f"beat/{self._processes.index}", str(beat))
                found = self._judged() if self._processes.first else self._get("end")
            except jax.errors.JaxRuntimeError:
                found = f"{self._processes.name(0)}, the coordinator, cannot be reached any more"
            if found and not self._over.is_set():
                _dismiss(self._witness)
                _end(self._processes, found)

    def finish(self) -> None:
        """This process is done; the others may still work."""
        self._over.set()
        self.join()
        _dismiss(self._witness)
        self._set(f"beat/{self._processes.index}", "done")

    def suspect(self, reason: str) -> None:
        """Waits for a word about who is gone. If there is none, it is this process that failed."""
        _tell(
            f"compax: {self._processes.name(self._processes.index)}: {reason[:300]}; is another process gone? Waiting "
            f"up to {self._processes.silence_seconds:g} s for a word"
        )
        # The first one waits as long to be sure, and then until all have heard of it.
        time.sleep(self._processes.silence_seconds + 10 * self._period)

    def fail(self, message: str) -> None:
        """Tells the others that this process ends with an error."""
        self._over.set()
        _dismiss(self._witness)
        processes = self._processes
        try:
            self._set(f"failed/{processes.index}", message)
            if processes.first:
                self._set("end", f"{processes.name(0)} ended with an error: {message}")
                time.sleep(4 * self._period)  # the others read it before the coordinator is gone
        except jax.errors.JaxRuntimeError:
            pass  # the coordinator is gone: there is nobody to tell

    def _judged(self) -> str:
        """On process 0: what is wrong with another process, if anything is; tells all."""
        processes, now = self._processes, time.monotonic()
        for key, message in self._all("failed/"):
            return self._verdict(f"{processes.name(key)} ended with an error: {message}")
        for key, beat in self._all("beat/"):
            if beat != self._heard[key][0] or beat == "done":
                self._heard[key] = (beat, now)
        for index, (_, heard) in self._heard.items():
            if now - heard > processes.silence_seconds:
                return self._verdict(
                    f"{processes.name(index)} has given no sign of life for {now - heard:.0f} s: it was killed, or its "
                    "host is gone or cut off"
                )
        return ""

    def _verdict(self, message: str) -> str:
        self._set("end", message)
        time.sleep(4 * self._period)
        return message

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_KEYS}/{key}", value, allow_overwrite=True)

    def _get(self, key: str) -> str:
        try:
            return self._client.key_value_try_get(f"{_KEYS}/{key}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return ""
            raise

    def _all(self, folder: str) -> list[tuple[int, str]]:
        found = self._client.key_value_dir_get(f"{_KEYS}/{folder}")
        return [(int(key.rpartition("/")[2]), value) for key, value in found]


def _is_of_runtime(error: BaseException) -> bool:
    """Whether an error may come of a process that is gone; that memory is exhausted is this one's own."""
    text = str(error)
    runtime = isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "UNKNOWN" in text)
    return runtime and "RESOURCE_EXHAUSTED" not in text


def _witness(processes: Processes) -> subprocess.Popen[str]:
    """A child that speaks when this process ends without a word.

    JAX's runtime ends a process at once when the coordinator is gone, with a stack trace that names nobody.
    """
    message = (
        f"compax: error: {processes.name(processes.index)} was ended by a signal or by JAX's runtime"
        + (
            ""
            if processes.first
            else f": if there are lines above about the coordination service, {processes.name(0)}, "
            "the coordinator, was killed, or its host is gone or cut off"
        )
        + ". The same command goes on from the last checkpoint"
    )
    # A signal that is meant for the process, such as Ctrl-C, does not reach it there.
    return subprocess.Popen(
        ["sh", "-c", 'read -r word || printf "%s\\n" "$0" >&2', message],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _dismiss(witness: subprocess.Popen[str]) -> None:
    if witness.poll() is None:
        witness.communicate("fine\n")


def _leave() -> None:
    """Ends this process without waiting for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def _tell(message: str) -> None:
    """Writes a line at once: the process may end with it, from a thread that is not the main one."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _end(processes: Processes, message: str) -> NoReturn:
    """Ends this process at once: its main thread may wait in a collective that will never be complete."""
    _tell(
        f"compax: error: {message}; {processes.name(processes.index)} ends with it. The same command goes on from the "
        "last checkpoint"
    )
    os._exit(LOST)


def _check_arguments(coordinator: str, processes: int | None, process: int | None) -> None:
    if not coordinator and processes is None and process is None:
        return
    if not coordinator or processes is None or process is None:
        raise DistributedError(
            f"coordinator={coordinator or None}, processes={processes}, process={process}: give all three, or none of "
            "them where Cloud TPU, GKE, Slurm or Open MPI say where the processes are"
        )
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise DistributedError(f"coordinator={coordinator!r}: write ADDRESS:PORT, as in 10.0.0.1:1234")
    if processes < 1 or not 0 <= process < processes:
        raise DistributedError(f"process={process} of processes={processes}: processes count from 0 to one less")


def _reach(coordinator: str, process: int, seconds: float) -> None:
    """Waits until the coordinator listens: JAX would end this process with a stack trace if it never does."""
    host, _, port = coordinator.rpartition(":")
    deadline, reason = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, seconds)).close()
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
        else:
            return
    raise DistributedError(
        f"process {process} on {socket.gethostname()} cannot reach the coordinator {coordinator} within {seconds:g} s: "
        f"{reason}. Is process 0 running there, is that its address, does a firewall let the port through?"
    )


def _connect(
    coordinator: str, processes: int | None, process: int | None, start_seconds: float, silence_seconds: float
) -> None:
    """Joins the others, or ends this process with a line that says that some did not come."""

    def late() -> None:
        _tell(
            f"compax: error: not all of the processes came to {coordinator or 'the coordinator'} within "
            f"{start_seconds:g} s; process {'?' if process is None else process} on {socket.gethostname()} ends. Look "
            "at the logs of those that did not"
        )
        os._exit(LOST)

    timer = threading.Timer(start_seconds, late)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process,
            initialization_timeout=int(start_seconds) + _PATIENCE_SECONDS,
            heartbeat_timeout_seconds=int(silence_seconds) + _PATIENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if not coordinator and isinstance(error, ValueError):
            raise DistributedError(
                f"no cluster is known here ({first}): run it on Cloud TPU, GKE, Slurm or Open MPI, or give "
                "coordinator, processes and process"
            ) from error
        raise DistributedError(f"the processes cannot be joined: {first}") from error
    finally:
        timer.cancel()


def _facts(compare: Mapping[str, str]) -> dict[str, str]:
    """What has to be equal on all hosts."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, **compare}


def _agree(
    processes: Processes, facts: Mapping[str, str], seconds: float, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Compares all processes on process 0, and returns the names of their hosts."""
    client, wait = _jax.coordination_client(), int(seconds * 1000)
    client.wait_at_barrier(f"{_KEYS}/clocks", wait)
    told = {"host": socket.gethostname(), "seconds": time.time(), "facts": dict(facts)}
    client.key_value_set(f"{_KEYS}/facts/{processes.index}", json.dumps(told))
    if processes.first:
        everyone = [
            json.loads(client.blocking_key_value_get(f"{_KEYS}/facts/{index}", wait))
            for index in range(processes.count)
        ]
        error, warning = compared(everyone)
        verdict = {"error": error, "warning": warning, "names": [one["host"] for one in everyone]}
        client.key_value_set(f"{_KEYS}/verdict", json.dumps(verdict))
    verdict = json.loads(client.blocking_key_value_get(f"{_KEYS}/verdict", wait))
    if verdict["error"]:
        # All have read it before the coordinator is gone, which would end them with a stack trace.
        client.wait_at_barrier(f"{_KEYS}/read", wait)
        jax.distributed.shutdown()
        raise DistributedError(verdict["error"])
    if verdict["warning"]:
        say(f"note: {verdict['warning']}")
    return tuple(verdict["names"])


def compared(everyone: list[dict[str, Any]]) -> tuple[str, str]:
    """What differs between hosts.

    Args:
        everyone: of each process its `host`, its `seconds` at a moment that was the same for all, and its `facts`.

    Returns:
        An error, and a warning; empty if there is none.
    """
    first = everyone[0]
    for index, one in enumerate(everyone):
        for name, value in first["facts"].items():
            other = one["facts"].get(name, "not told")
            if other != value:
                return (
                    f"process {index} ({one['host']}) has {name} {other}, process 0 ({first['host']}) has {value}: "
                    "make them equal on all hosts"
                ), ""
    apart = [one["seconds"] - first["seconds"] for one in everyone]
    index = max(range(len(apart)), key=lambda place: abs(apart[place]))
    text = (
        f"the clock of process {index} ({everyone[index]['host']}) is {abs(apart[index]):.1f} s "
        f"{'ahead of' if apart[index] > 0 else 'behind'} that of process 0 ({first['host']})"
    )
    if abs(apart[index]) > CLOCK_ERROR_SECONDS:
        return f"{text}: set it (certificates and files in buckets go by it); is its NTP service running?", ""
    return "", f"{text} (measured)" if abs(apart[index]) > CLOCK_WARNING_SECONDS else ""


def digest(text: str) -> str:
    """A short hash of a text, to compare it between hosts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
