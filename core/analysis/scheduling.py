"""The order in which a compiler runs what it did not fuse."""

import collections
from collections.abc import Mapping, Sequence
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


def overwritten(steps: Sequence[Written], aliased: Mapping[Value, Value]) -> list[Value]:
    """Donated inputs that something may read after the result that takes their place is written.

    XLA decides before it schedules (`AddCopiesForAliasedInputOutputs` in `xla/service/copy_insertion.cc`): unless the
    result depends on everything else that reads the input, it copies the input first.

    Args:
        steps: what reads and writes.
        aliased: results with the inputs whose place they take.
    """
    writer = {y: number for number, step in enumerate(steps) for y in step.outputs}
    before: dict[int, int] = {}
    for number, step in enumerate(steps):
        mask = 1 << number
        for x in step.reads:
            if x in writer:
                mask |= before[writer[x]]
        before[number] = mask
    readers: dict[Value, int] = {}
    for number, step in enumerate(steps):
        for x in step.reads:
            readers[x] = readers.get(x, 0) | 1 << number
    return [x for y, x in aliased.items() if y in writer and readers.get(x, 0) & ~before[writer[y]]]
