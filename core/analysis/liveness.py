"""Liveness: what is in memory while a computation runs, and which values make the peak.

Predicted from the graph: values that become buffers (`buffers`), in the order in which JAX wrote the computation, each
from the operation that makes it to the last that reads it. A result takes the place of an operand that nothing reads
afterwards where the operation may work in place. A loop adds the most that one of its turns needs.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from compax.analysis.buffers import BACKENDS, Buffers, Step
from compax.analysis.library import fusible
from compax.analysis.tracing import Place, Traced
from compax.ir import Value

_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter-mul", "while", "scan"})


@dataclasses.dataclass(frozen=True)
class Alive:
    """A buffer that is in memory at the peak.

    Attributes:
        nbytes: its bytes; of a loop's turn all that the turn needs.
        shape: its shape; none for a loop's turn.
        dtype: its dtype; none for a loop's turn.
        place: where it was computed.
        operation: the operation that made it.
    """

    nbytes: int
    shape: tuple[int, ...] | None
    dtype: str | None
    place: Place | None
    operation: str


@dataclasses.dataclass(frozen=True)
class Liveness:
    """What a computation needs of memory. Predicted.

    Attributes:
        arguments: bytes of the inputs, by kind.
        outputs: bytes of the results.
        donated: bytes of results that take the place of donated inputs.
        temporaries: the most that is alive between inputs and results.
        peak: the most that is alive of everything.
        alive: what makes the peak, inputs and reserved results left out, largest first.
        timeline: bytes in memory after each step, for a plot.
    """

    arguments: Mapping[str, int]
    outputs: int
    donated: int
    temporaries: int
    peak: int
    alive: tuple[Alive, ...]
    timeline: tuple[int, ...]


def liveness(traced: Traced, platform: str, *, donated: Collection[str] = ()) -> Liveness:
    """Predicts what a computation needs of memory.

    Args:
        traced: the computation.
        platform: "cpu", "gpu" or "tpu".
        donated: kinds of inputs that are donated: results of the same shape and dtype take their place.
    """
    buffers = Buffers(traced.graph, BACKENDS[platform])
    arguments: dict[str, int] = {}
    for role, x in zip(traced.inputs, traced.graph.inputs, strict=True):
        arguments[role.kind] = arguments.get(role.kind, 0) + buffers.nbytes(x)
    free = [
        (x.shape, str(x.dtype))
        for role, x in zip(traced.inputs, traced.graph.inputs, strict=True)
        if role.kind in donated
    ]
    returned = dict.fromkeys(x for x in buffers.outputs if x is not None and x not in buffers.inputs)
    aliased: set[Value] = set()
    for x in returned:
        if (x.shape, str(x.dtype)) in free:
            free.remove((x.shape, str(x.dtype)))
            aliased.add(x)
    outputs = sum(buffers.nbytes(Value(x.aval)) for x in traced.graph.outputs if isinstance(x, Value))
    run = _run(buffers, returned.keys(), {})
    fixed = sum(arguments.values()) + sum(buffers.nbytes(x) for x in returned if x not in aliased)
    return Liveness(
        arguments=arguments,
        outputs=outputs,
        donated=sum(map(buffers.nbytes, aliased)),
        temporaries=run.peak,
        peak=fixed + run.peak,
        alive=tuple(_alive(traced, run)),
        timeline=tuple(fixed + n for n in run.timeline),
    )


@dataclasses.dataclass
class _Run:
    """What a simulation found.

    Attributes:
        peak: the most bytes.
        alive: the buffers then, with the step that made each.
        turn: bytes of a loop's turn then, with the loop.
        timeline: bytes after each step.
    """

    peak: int
    alive: list[tuple[Value, int, Step]]
    turn: tuple[int, Step] | None
    timeline: list[int]


def _run(buffers: Buffers, apart: Collection[Value], turns: dict[int, int]) -> _Run:
    """Follows the steps.

    Args:
        buffers: what they read and write.
        apart: results that are counted elsewhere.
        turns: for bodies that were followed before, what a turn needs.
    """
    last: dict[Value, int] = {}
    for number, step in enumerate(buffers.steps):
        last.update(dict.fromkeys(step.reads, number))
    kept = {x for x in buffers.outputs if x is not None}
    held: dict[Value, tuple[int, Step]] = {}
    found = _Run(0, [], None, [])
    now = 0
    for number, step in enumerate(buffers.steps):
        dying = [x for x in step.reads if x in held and last[x] == number and x not in kept]
        for y in step.outputs:
            if y in apart:
                continue
            size = buffers.nbytes(y)
            taken = (
                next((x for x in dying if held[x][0] == size and x not in step.rearranged), None)
                if _in_place(step)
                else None
            )
            if taken is not None:
                dying.remove(taken)
                now -= held.pop(taken)[0]
            held[y] = (size, step)
            now += size
        turn = _turn(step, buffers, turns)
        found.timeline.append(now + turn)
        if now + turn > found.peak:
            found.peak = now + turn
            found.alive = [(x, size, made) for x, (size, made) in held.items()]
            found.turn = (turn, step) if turn else None
        for x in [x for x in held if last.get(x, -1) <= number and x not in kept]:
            now -= held.pop(x)[0]
    return found


def _in_place(step: Step) -> bool:
    name = step.op.name
    return name in _IN_PLACE or fusible(step.op)


def _turn(step: Step, buffers: Buffers, turns: dict[int, int]) -> int:
    """The most that a turn of a loop, or a branch, needs beside what goes in and comes out of it."""
    if step.op.name not in ("scan", "while", "cond"):
        return 0
    bodies = step.op.bodies if step.op.name == "cond" else step.op.bodies[-1:]
    for body in bodies:
        if id(body) not in turns:
            turns[id(body)] = _run(buffers.body(body), (), turns).peak
    return max(turns[id(body)] for body in bodies)


def _alive(traced: Traced, run: _Run) -> Sequence[Alive]:
    found = [
        Alive(size, x.shape, str(x.dtype), traced.places.get(step.path), step.op.name) for x, size, step in run.alive
    ]
    if run.turn is not None:
        size, step = run.turn
        found.append(Alive(size, None, None, traced.places.get(step.path), f"a turn of {step.op.name}"))
    return sorted(found, key=lambda alive: -alive.nbytes)
