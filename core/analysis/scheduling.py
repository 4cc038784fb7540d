"""The order in which a compiler runs what it did not fuse."""

import collections
from collections.abc import Sequence
from typing import Protocol, TypeVar

from compax.ir import Value


class Written(Protocol):
    """Something that reads and writes values."""

    outputs: list[Value]
    reads: list[Value]


T = TypeVar("T", bound=Written)


def breadth_first(steps: Sequence[T]) -> list[T]:
    """Steps in the order in which all that they read is there, first come first served.

    XLA's compiler for CPUs schedules so, for the most concurrency (`BFScheduler` in
    `xla/service/hlo_memory_scheduler.cc`): what the backward pass reads and the forward pass can compute is computed in
    the forward pass.
    """
    writer = {y: step for step in steps for y in step.outputs}
    missing = {step: {writer[x] for x in step.reads if x in writer} for step in steps}
    users: dict[T, list[T]] = {step: [] for step in steps}
    for step in steps:
        for source in dict.fromkeys(writer[x] for x in step.reads if x in writer):
            users[source].append(step)
    ready = collections.deque(step for step in steps if not missing[step])
    found: list[T] = []
    while ready:
        step = ready.popleft()
        found.append(step)
        for user in users[step]:
            missing[user].discard(step)
            if not missing[user]:
                ready.append(user)
    assert len(found) == len(steps)
    return found
