"""How `shard(auto)` chooses: by predictions, of which the best are compiled and corrected."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from compax.analysis.times import Times
from compax.analysis.training import Optimizer, returns_loss, train_step
from compax.compilers import StepFigures
from compax.composites.base import Experts
from compax.errors import BudgetError, CompaxError, CompileError, NoCompilerError, PipelineError, ShardingError
from compax.meaning import Meaning
from compax.mesh_links import MeshLinks
from compax.passes.shard.activations import positions_of
from compax.passes.shard.candidates import Candidate, candidates, variants
from compax.passes.shard.compiling import compiled_step, followed
from compax.passes.shard.layout import Laying, batches_of
from compax.passes.shard.predicting import Model, Predicted
from compax.printing import bytes_text, seconds_text
from compax.program import GraphKey, Program
from compax.target import Target
from compax.transform import Context

_RESERVE = 0.1
"""The share of a device's memory that predictions leave free."""
_LISTED = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What to choose for.

    Attributes:
        program: the program.
        key: of its graph with the loss.
        meaning: of that graph.
        context: what else is known.
        target: the slice.
        optimizer: float32 arrays that the optimizer keeps for each parameter.
        budget: bytes of one device; none for all it has.
        given: the sizes of the mesh, if they are given.
        lay: how the program would lie.
        apply: the program laid so.
    """

    program: Program
    key: GraphKey
    meaning: Meaning
    context: Context
    target: Target
    optimizer: int
    budget: int | None
    given: Mapping[str, int] | None
    lay: Callable[[Candidate], Laying]
    apply: Callable[[Candidate], Program]

    @property
    def devices(self) -> int:
        """How many there are."""
        return jax.device_count() if self.target.chip.platform == "cpu" else self.target.num_devices


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A candidate with its figures.

    Attributes:
        candidate: the mesh.
        predicted: figures of the step.
        compiled: what the compiler says, if it was asked.
        times: from what was compiled.
    """

    candidate: Candidate
    predicted: Predicted
    compiled: StepFigures | None = None
    times: Times | None = None

    def __str__(self) -> str:
        predicted = self.predicted
        text = f"{self.candidate}: {_told(predicted.times)}, peak {bytes_text(predicted.peak)}, "
        text += f"{bytes_text(round(predicted.wire_bytes))} sent, predicted"
        if self.compiled is None or self.times is None:
            return text
        return f"{text}; {_told(self.times)}, peak {bytes_text(self.compiled.peak)}, compiled"


def _told(times: Times) -> str:
    waits = f"{seconds_text(times.waits or 0.0)} waiting"
    return (
        f"{seconds_text(times.step)} a step ({times.bound}: {seconds_text(times.step - (times.waits or 0))}, {waits})"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What was chosen.

    Attributes:
        best: the choice.
        rows: what else there was, the best first.
        problem: what it was for.
        notes: what a person should know.
    """

    best: Row
    rows: tuple[Row, ...]
    problem: Problem
    notes: tuple[str, ...]

    def told(self) -> tuple[str, ...]:
        """The choice and the alternatives, one in each line."""
        listed = [str(row) for row in self.rows[:_LISTED] if row is not self.best]
        return (
            f"auto chose of {len(self.rows)} meshes of {self.problem.target} {self.best}",
            *self.notes,
            *(f"or {line}" for line in listed),
        )


def loss_of(program: Program) -> GraphKey:
    """Which graph of a program returns its loss.

    Raises:
        ShardingError: none does.
    """
    found = next((key for key, graph in program.graphs.items() if returns_loss(graph)), None)
    if found is None:
        raise ShardingError(
            f"auto chooses by the time of a train step, and no entry of '{program.name}' returns a loss: capture the "
            "model with it, compax.capture(model, batch, loss=function), or give sizes, as in shard(fsdp=-1)"
        )
    return found


def target_of(text: str | None, context: Context) -> Target:
    """The slice that is chosen for.

    Raises:
        PipelineError: it is not known.
    """
    if text is not None:
        return Target.parse(text)
    if context.target is not None:
        return context.target
    if jax.default_backend() == "cpu":
        return Target.parse("cpu")
    raise PipelineError(
        "shard: say which slice auto chooses for, as in shard(auto, target=v5p:4x4x8): JAX names the devices here "
        f"'{jax.devices()[0].device_kind}', and figures are looked up by the name of the chip"
    )


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of a mesh that is given, such as `fsdp=32,tensor=4`.

    Raises:
        PipelineError: it is malformed.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdigit() or int(size) < 1 or name in sizes:
            raise PipelineError(f'shard: mesh "{text}": write axes with their sizes, as in mesh="fsdp=32,tensor=4"')
        if name not in ("dcn_data", "data", "fsdp", "expert", "tensor"):
            raise PipelineError(f"shard: mesh \"{text}\": there is no axis '{name}'")
        sizes[name] = int(size)
    return sizes


# -- The search -------------------------------------------------------------------------------------------------------


def choose(problem: Problem, compiles: int) -> Found:
    """The fastest way that fits.

    Args:
        problem: what to choose for.
        compiles: how many of the best to compile.

    Raises:
        BudgetError: nothing fits.
        ShardingError: nothing divides.
    """
    rows, notes = predicted_rows(problem)
    limit = problem.budget or round((1 - _RESERVE) * problem.target.device_memory_bytes)
    if compiles:
        try:
            return _compiled(problem, rows, compiles, notes)
        except NoCompilerError as error:
            notes = (*notes, f"predicted, not compiled: {error}")
    fitting = [row for row in rows if row.predicted.peak <= limit]
    if not fitting:
        raise BudgetError(_too_little(problem, rows, limit, min(row.predicted.peak for row in rows), "predicted"))
    return Found(fitting[0], tuple(rows), problem, notes)


def model_of(problem: Problem, optimizer: Optimizer | int) -> tuple[Model, tuple[str, ...]]:
    """What predicts a step, with the passes that follow; and notes on those that could not be looked at."""
    after, notes = followed(problem.program, problem.context)
    graph = after.graph(problem.key[0])
    step = train_step(after, graph, optimizer)
    return Model(problem.program, problem.key, problem.meaning, step, after, graph, problem.target), notes


def predicted_rows(problem: Problem, *, prune: bool = True) -> tuple[list[Row], tuple[str, ...]]:
    """All candidates that divide, with their predictions, the fastest first; and notes.

    Args:
        problem: what to choose for.
        prune: leave out those whose bound from below is over the time of one that fits.

    Raises:
        ShardingError: none divides.
    """
    model, notes = model_of(problem, problem.optimizer)
    target, budget = problem.target, problem.budget or problem.target.device_memory_bytes
    experts = [composite for composite in model.meaning.composites if isinstance(composite, Experts)]
    num_experts = math.gcd(*(math.prod(atom.size for atom in found.experts) for found in experts)) or 1
    batch = math.gcd(*(math.prod(atom.size for atom in factors) for factors in batches_of(model.meaning)))
    every = (
        candidates(problem.devices, target.slices, num_experts) if problem.given is None else variants(problem.given)
    )
    rows, declined = list[Row](), dict[str, None]()
    best = math.inf
    for candidate in every:
        if batch % candidate.batch_shards:
            declined[f"{candidate}: a batch of {batch} does not divide over {candidate.batch_shards}"] = None
            continue
        if prune and model.least_seconds(candidate, problem.devices) > best:
            continue
        try:
            laid = problem.lay(candidate)
        except CompaxError as error:
            declined[f"{candidate}: {error}"] = None
            continue
        positions = positions_of(laid.layouts[problem.key])
        if candidate.sequence and all(atom.size % candidate.size("tensor") for atom in positions):
            declined[f"{candidate}: positions do not divide"] = None
            continue
        row = Row(candidate, model.predict(candidate, laid))
        rows.append(row)
        if row.predicted.peak <= (1 - _RESERVE) * budget:
            best = min(best, row.predicted.times.step)
    if not rows:
        raise ShardingError(
            f"no mesh of {problem.devices} devices divides the program: {'; '.join(list(declined)[:3])}"
        )
    if unknown := model.cost.unknown:
        notes = (*notes, f"predicted without {len(unknown)} operations of which nothing is known, such as {unknown[0]}")
    return sorted(rows, key=_rank), notes


def _rank(row: Row) -> tuple[Any, ...]:
    """By time; of equals what has fewer axes, and then what needs less memory."""
    return round(row.predicted.times.step, 9), len(row.candidate.options()), row.predicted.peak


def _compiled(problem: Problem, rows: list[Row], compiles: int, notes: tuple[str, ...]) -> Found:
    """The fastest of those that are compiled, which correct what is predicted of the others."""
    limit = problem.budget or problem.target.device_memory_bytes
    done, more = list[Row](), list[str]()
    larger = 1.0
    left = list(rows)
    while left and len(done) + len(more) < compiles:
        left.sort(key=_rank)
        index = next((i for i, row in enumerate(left) if row.predicted.peak * larger <= limit), None)
        if index is None:
            # By predictions nothing fits: the compiler has the last word on what needs least.
            index = min(range(len(left)), key=lambda i: left[i].predicted.peak)
        row = left.pop(index)
        try:
            row = compiled_row(problem, row)
        except NoCompilerError:
            raise
        except CompileError as error:
            more.append(f"{row.candidate} was not compiled: {error}")
            continue
        done.append(row)
        figures = row.compiled
        assert figures is not None
        larger = figures.peak / row.predicted.peak
        if figures.fits and row.predicted.times.memory:
            ratio = figures.traffic / problem.target.device_memory_bandwidth / row.predicted.times.memory
            left = [_corrected(other, ratio) for other in left]
    fitting = [row for row in done if row.compiled is not None and row.compiled.fits and row.compiled.peak <= limit]
    every = (*sorted(done, key=_compiled_rank), *left)
    if not fitting:
        least = min((row.compiled.peak for row in done if row.compiled), default=rows[0].predicted.peak)
        raise BudgetError(_too_little(problem, rows, limit, least, "compiled"))
    return Found(min(fitting, key=_compiled_rank), every, problem, (*notes, *more))


def compiled_row(problem: Problem, row: Row) -> Row:
    """A candidate with what the compiler makes of it.

    Raises:
        NoCompilerError: nothing here compiles for the target.
        CompileError: the compiler fails.
    """
    figures = compiled_step(problem, row.candidate)
    return dataclasses.replace(row, compiled=figures, times=_times(problem, row.candidate, figures))


def _compiled_rank(row: Row) -> float:
    return math.inf if row.times is None else row.times.step


def _corrected(row: Row, ratio: float) -> Row:
    times = dataclasses.replace(row.predicted.times, memory=row.predicted.times.memory * ratio)
    return dataclasses.replace(row, predicted=dataclasses.replace(row.predicted, times=times))


def _times(problem: Problem, candidate: Candidate, figures: StepFigures) -> Times | None:
    """Where the time of a compiled step goes."""
    if not figures.fits:
        return None
    target = problem.target
    mesh = problem.lay(candidate).placement.mesh
    assert mesh is not None
    links = MeshLinks(target, dict(mesh.shape))
    hidden = waits = 0.0
    for found in figures.collectives:
        kind: Any = found.kind
        seconds = found.count * links.group_seconds(
            kind, found.bytes, found.group_size, between_slices=found.between_slices
        )
        hidden, waits = hidden + seconds * found.asynchronous, waits + seconds * (not found.asynchronous)
    compute = sum(flops / target.product_rate(dtype) for dtype, flops in figures.flops.items())
    return Times(compute, figures.traffic / target.device_memory_bandwidth, hidden, waits)


def _too_little(problem: Problem, rows: Sequence[Row], limit: int, least: int, basis: str) -> str:
    row = min(rows, key=lambda row: row.predicted.peak)
    predicted = row.predicted
    return (
        f"no mesh of {problem.target} fits {bytes_text(limit)} a device: {row.candidate} needs least, "
        f"{bytes_text(least)} ({basis}), of which parameters, optimizer and gradients are {bytes_text(predicted.held)} "
        "(predicted). A smaller batch, remat(keep=nothing), tile_loss, flash, offload(optimizer=true), or more chips "
        "would help"
    )
