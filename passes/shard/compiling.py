"""The train step of a program that is laid over a mesh, compiled for the slice."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from compax import compilers
from compax.analysis.training import Optimizer, keeping, train_step
from compax.compilers import StepFigures
from compax.errors import CompaxError, NoCompilerError
from compax.passes.shard.candidates import Candidate
from compax.passes.shard.layout import Layout
from compax.placement import leaf_specs
from compax.program import Program
from compax.transform import Context

if TYPE_CHECKING:
    from compax.passes.shard.choosing import Problem


def compiled_step(problem: "Problem", candidate: Candidate) -> StepFigures:
    """What the compiler makes of a train step.

    Raises:
        NoCompilerError: nothing here compiles for the target.
        CompileError: the compiler fails.
    """
    program, _ = followed(problem.apply(candidate), problem.context)
    layout = problem.lay(candidate).layouts[problem.key]
    captured = program.graph(problem.key[0])
    placement = program.placement
    rule = keeping(problem.optimizer)

    def update(gradients: Any, moments: Any, params: Any) -> tuple[Any, Any]:
        gradients = placement.constrained(gradients, {**placement.specs, **placement.gradients})
        params, moments = rule.update(gradients, moments, params)
        kept = {**placement.specs, **placement.optimizer}
        return placement.constrained(params, placement.specs), [placement.constrained(m, kept) for m in moments]

    step = train_step(program, captured, Optimizer(rule.init, update))
    function, shapes, donated = step.plain(captured)
    shardings = _shardings(program, tuple(step.arguments), shapes, layout)
    return compilers.step_figures(function, shapes, donated, problem.target, shardings)


def followed(program: Program, context: Context) -> tuple[Program, tuple[str, ...]]:
    """A program with the passes that follow, by their predictions; and which of them could not be looked at."""
    notes = list[str]()
    alone = dataclasses.replace(context, following=(), donate=False, compiled_peak=_no_compiler)
    for pass_ in context.following:
        try:
            program = pass_.run(program, alone).program
        except CompaxError as error:
            notes.append(f"predicted without {pass_.name}: {error}")
    return program, tuple(notes)


def _no_compiler(*_: Any) -> int:
    raise NoCompilerError("figures are predicted while a mesh is chosen")


def _shardings(program: Program, names: tuple[str, ...], shapes: tuple[Any, ...], layout: Layout) -> tuple[Any, ...]:
    """The shardings of a step's arguments."""
    placement, mesh = program.placement, program.placement.mesh
    assert mesh is not None

    def stored(params: Any, specs: Any) -> Any:
        found = {path: leaf_specs(value, specs(path)) for path, value in params.items()}
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=_is_spec)

    entries = {
        x.input.path: layout.entries(layout.dims(x))
        for x in layout.meaning.view.normal.inputs
        if x.input is not None and x.input.kind == "argument"
    }
    found = []
    for name, shape in zip(names, shapes, strict=True):
        if name in ("parameter", "frozen"):
            found.append(stored(shape, placement.spec))
        elif name == "optimizer":
            found.append([stored(moment, placement.optimizer_spec) for moment in shape])
        elif name == "argument":
            specs = {path: PartitionSpec(*(names or None for names in entries.get(path, ()))) for path in shape}
            found.append({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
        else:
            found.append(jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shape))
    return tuple(found)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
