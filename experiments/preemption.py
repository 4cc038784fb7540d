"""Signals that ask training to stop: SIGTERM (a preempted machine), and Ctrl-C.

Of several processes a signal reaches one, or some of them at different steps; JAX's preemption service makes them agree
on a step (`jax.experimental.multihost_utils.reached_preemption_sync_point`).
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Stopped(Exception):
    """Training ends early because a signal asked for it.

    Attributes:
        signal: Which one.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = signal.Signals(number)


class Preemption:
    """Notes SIGTERM and SIGINT while a block runs, so that the loop can finish its step and save.

    Before `ready()` there is nothing to save: the signal then raises `Stopped` at once. A second signal of any kind
    raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._ready = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type] - what signal.signal returned

    def ready(self) -> None:
        """From here on the loop looks at `received` after each step."""
        self._ready = True

    def stops(self) -> signal.Signals | None:
        """The signal that asked to stop after this step, if one did. To be called once for each step."""
        return self.received

    def done(self) -> None:
        """The loop is over and all is saved: a signal ends the process at once again."""
        self._ready = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not self._ready:
            raise Stopped(number, f"stopped by {self.received.name}; the same command starts again where it was")


class SharedPreemption(Preemption):
    """The same for several processes: a signal to any of them stops all after the same step.

    SIGTERM belongs to JAX's preemption service from `jax.distributed.initialize` on: one that comes before the first
    step counts after it. Ctrl-C is handed to that service while the loop runs. What comes otherwise ends this process,
    and with it the others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def __enter__(self) -> SharedPreemption:
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._receive)
        return self

    def stops(self) -> signal.Signals | None:
        from jax.experimental import multihost_utils

        # Counted from the start of the process: a signal that came before the first step means the number 1.
        self._steps += 1
        reached = multihost_utils.reached_preemption_sync_point(self._steps)
        return (self.received or signal.SIGTERM) if reached else None

    def done(self) -> None:
        super().done()
        self.received = None
        signal.signal(signal.SIGTERM, self._receive)
        self._before[signal.SIGTERM] = signal.SIG_DFL

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or not self._ready:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        signal.raise_signal(signal.SIGTERM)
