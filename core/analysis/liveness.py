"""Liveness: what is in memory while a computation runs, and which values make the peak.

Predicted from the graph: values that become buffers (`buffers`), in the order in which JAX wrote the computation, each
from the operation that makes it to the last that reads it. A result takes the place of an operand that nothing reads
afterwards where the operation may work in place. A loop adds the most that one of its turns needs.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from compax.analysis.buffers import BACKENDS, Buffers, Step
from compax.analysis.scheduling import overwritten
from compax.analysis.tracing import Place, Traced
from compax.ir import Value


@dataclasses.dataclass(frozen=True)
class Alive:
    """A buffer that is in memory at the peak.

    Attributes:
        nbytes: its bytes; of a loop's turn all that the turn needs.
        shape: its shape; none for a loop's turn.
        dtype: its dtype; none for a loop's turn.
        place: where it was computed.
        operation: the operation that made it.
        inside: of a loop's turn, what makes its own peak.
    """

    nbytes: int
    shape: tuple[int, ...] | None
    dtype: str | None
    place: Place | None
    operation: str
    inside: "tuple[Alive, ...]" = ()


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
        places: where each of those steps comes from.
    """

    arguments: Mapping[str, int]
    outputs: int
    donated: int
    temporaries: int
    peak: int
    alive: tuple[Alive, ...]
    timeline: tuple[int, ...]
    places: tuple[Place | None, ...]


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
    free = [x for role, x in zip(traced.inputs, traced.graph.inputs, strict=True) if role.kind in donated]
    returned = dict.fromkeys(x for x in buffers.outputs if x is not None and x not in buffers.inputs)
    aliased: dict[Value, Value] = {}
    for y in returned:
        x = next((x for x in free if (x.shape, x.dtype) == (y.shape, y.dtype)), None)
        if x is not None:
            free.remove(x)
            aliased[y] = x
    own = [x for x in returned if x not in aliased]
    copied: list[Value] = []
    if buffers.backend.copies_donated:
        copied = overwritten(buffers.steps, aliased)
        buffers.copy_inputs(copied)
    outputs = sum(buffers.nbytes(Value(x.aval)) for x in traced.graph.outputs if isinstance(x, Value))
    run = _run(buffers, returned.keys(), {}, [*own, *(y for y, x in aliased.items() if x in copied)])
    fixed = sum(arguments.values()) + sum(map(buffers.nbytes, own))
    return Liveness(
        arguments=arguments,
        outputs=outputs,
        donated=sum(map(buffers.nbytes, aliased)),
        temporaries=run.peak,
        peak=fixed + run.peak,
        alive=tuple(_alive(traced, run)),
        timeline=tuple(fixed + n for n in run.timeline),
        places=tuple(traced.places.get(step.path) for step in buffers.steps),
    )


@dataclasses.dataclass
class _Run:
    """What a simulation found.

    Attributes:
        peak: the most bytes.
        alive: the buffers then, with the step that made each.
        turn: bytes of a loop's turn then, with the loop and what makes the turn's own peak.
        timeline: bytes after each step.
    """

    peak: int
    alive: list[tuple[Value, int, Step]]
    turn: tuple[int, Step, "_Run"] | None
    timeline: list[int]


@dataclasses.dataclass(eq=False)
class _Place:
    """Memory that a buffer takes, and those that take its place in turn.

    Attributes:
        size: bytes.
        until: the last step that reads it.
        held: the steps that wrote it, by number, with what they wrote.
    """

    size: int
    until: int
    held: list[tuple[int, Value, Step]]

    @property
    def since(self) -> int:
        return self.held[0][0]

    def at(self, number: int) -> tuple[Value, int, Step]:
        """What is in it after a step."""
        _, value, step = [held for held in self.held if held[0] <= number][-1]
        return value, self.size, step


def _run(buffers: Buffers, apart: Collection[Value], turns: dict[int, _Run], reserved: Sequence[Value] = ()) -> _Run:
    """Follows the steps.

    Args:
        buffers: what they read and write.
        apart: results that are counted elsewhere.
        turns: for bodies that were followed before, what a turn needs.
        reserved: of what is apart, results whose memory others take until they are written; among them those that take
            a copied input's place.
    """
    inner = [_turn(step, buffers, turns) for step in buffers.steps]
    places = _places(buffers, apart)
    lodged = _lodged(buffers, places, inner, reserved)
    found = _Run(0, [], None, [])
    starting: dict[int, list[_Place]] = {}
    for place in places:
        if place not in lodged:
            starting.setdefault(place.since, []).append(place)
    alive: list[_Place] = []
    now = 0
    for number, (step, turn) in enumerate(zip(buffers.steps, inner, strict=True)):
        alive += starting.get(number, [])
        now += sum(place.size for place in starting.get(number, ()))
        beside = turn.peak - lodged.get(number, 0) if turn is not None else 0
        found.timeline.append(now + beside)
        if now + beside > found.peak:
            found.peak = now + beside
            found.alive = [place.at(number) for place in alive]
            found.turn = (beside, step, turn) if beside and turn is not None else None
        now -= sum(place.size for place in alive if place.until <= number)
        alive = [place for place in alive if place.until > number]
    return found


def _places(buffers: Buffers, apart: Collection[Value]) -> list[_Place]:
    """The memory that buffers take, results of a step in place of what it reads last where it may."""
    last: dict[Value, int] = {}
    for number, step in enumerate(buffers.steps):
        last.update(dict.fromkeys(step.reads, number))
    last.update((x, len(buffers.steps)) for x in buffers.outputs if x is not None)
    found: list[_Place] = []
    of: dict[Value, _Place] = {}
    for number, step in enumerate(buffers.steps):
        dying = [x for x in step.replaces if x in of and last[x] == number]
        for y in step.outputs:
            if y in apart:
                continue
            size = buffers.nbytes(y)
            taken = next((x for x in dying if of[x].size == size), None)
            if taken is None:
                of[y] = _Place(size, number, [])
                found.append(of[y])
            else:
                dying.remove(taken)
                of[y] = of.pop(taken)
            of[y].held.append((number, y, step))
            of[y].until = last.get(y, number)
    return found


def _lodged(
    buffers: Buffers, places: Sequence[_Place], turns: Sequence[_Run | None], reserved: Sequence[Value]
) -> dict[_Place | int, int]:
    """What lies in the memory of results that are not written yet: buffers, and of loops' turns, by number, the bytes.

    XLA goes through buffers from the largest to the smallest and gives each memory that is there already, if nothing
    else is in it meanwhile (`BufferAssigner::AssignBuffersForComputations`). What a result overwrites may be there
    until then. Copies of donated inputs come first, so that the inputs' memory is free after them.
    """
    written = {y: number for number, step in enumerate(buffers.steps) for y in step.outputs}
    copies = sum(step.op.name == "copy" for step in buffers.steps)
    rooms = [(buffers.nbytes(y), y, [(-1, copies - 1), (written[y], len(written))]) for y in reserved if y in written]
    guests: list[tuple[int, int, int, _Place | int]] = [(p.size, p.since, p.until, p) for p in places]
    for number, turn in enumerate(turns if rooms else ()):
        guests += [(size, number, number, number) for _, size, _ in (turn.alive if turn is not None else ())]
    found: dict[_Place | int, int] = {}
    for size, since, until, who in sorted(guests, key=lambda guest: (-guest[0], guest[1])) if rooms else ():
        for room, y, taken in rooms:
            replaced = (
                isinstance(who, _Place)
                and (size, until) == (room, written[y])
                and who.held[-1][1] in buffers.steps[until].replaces
            )
            over = until - 1 if replaced else until
            if size <= room and all(over < start or end < since for start, end in taken):
                taken.append((since, until))
                found[who] = found.get(who, 0) + size
                break
    return found


def _turn(step: Step, buffers: Buffers, turns: dict[int, _Run]) -> _Run | None:
    """What a turn of a loop, or a branch, needs beside what goes in and comes out of it."""
    if step.op.name not in ("scan", "while", "cond"):
        return None
    bodies = step.op.bodies if step.op.name == "cond" else step.op.bodies[-1:]
    for body in bodies:
        if id(body) not in turns:
            turns[id(body)] = _run(buffers.body(body), (), turns)
    return max((turns[id(body)] for body in bodies), key=lambda run: run.peak)


def _alive(traced: Traced, run: _Run) -> Sequence[Alive]:
    found = [
        Alive(size, x.shape, str(x.dtype), traced.places.get(step.path), step.op.name) for x, size, step in run.alive
    ]
    if run.turn is not None:
        size, step, turn = run.turn
        inside = tuple(_alive(traced, turn))
        found.append(Alive(size, None, None, traced.places.get(step.path), f"a turn of {step.op.name}", inside))
    return sorted(found, key=lambda alive: -alive.nbytes)
