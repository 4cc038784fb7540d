"""Instruments: what watches passes from outside. The manager calls them around every pass; they know no pass.

`Verify` and `Numerics` check, and are on unless a pipeline is told otherwise; `Timing`, `PrintAfter` and
`Journal` report, as `compax.price.Price` does; `Reproducer` leaves a file that replays a failure.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.contracts import ApproximateGradients, Observation
from compax.errors import ContractError
from compax.program import Program
from compax.program_text import program_text
from compax.sources import join, unwrap
from compax.transform import Context, Inputs, Pass, PassRecord, PassResult
from compax.verify import verify


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One pass that ran.

    Attributes:
        pass_: the pass.
        before: the program that it was given.
        program: the program that it left, with the pass in its history, so that new shapes go through it too; the given
            one if nothing changed.
        result: what it returned.
        context: what else it was given.
        seconds: time that it took.
    """

    pass_: Pass
    before: Program
    program: Program
    result: PassResult
    context: Context
    seconds: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an instrument adds to the record of a pass.

    Attributes:
        metrics: figures by name; a pair is (before, after).
        notes: sentences.
    """

    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Instrument:
    """Base of all instruments; every method may be left as it is."""

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Called before a pass runs."""

    def after(self, step: Step) -> Measured:
        """Called after a pass ran; raises if something does not hold."""
        return Measured()

    def recorded(self, record: PassRecord) -> None:
        """Called when all instruments have measured: also for a pass that changed nothing, which history leaves out."""

    def failed(self, pass_: Pass, program: Program, context: Context, error: Exception) -> str | None:
        """Called when a pass, or an instrument after it, failed; returns a sentence for the error's message."""


class Timing(Instrument):
    """Collects how long each pass took; `str` of it is a table.

    Attributes:
        seconds: text and seconds of each pass, in order.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def recorded(self, record: PassRecord) -> None:
        self.seconds.append((record.text, record.seconds))

    def __str__(self) -> str:
        rows = [*self.seconds, ("total", sum(seconds for _, seconds in self.seconds))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {seconds:9.3f} s" for name, seconds in rows)


class Journal(Instrument):
    """Keeps the record of every pass, those that changed nothing included.

    Attributes:
        records: in order.
    """

    def __init__(self) -> None:
        self.records: list[PassRecord] = []

    def recorded(self, record: PassRecord) -> None:
        self.records.append(record)

    def __str__(self) -> str:
        return "\n".join(map(str, self.records))


class PrintAfter(Instrument):
    """Prints the program after passes that changed it.

    Args:
        *names: of the passes; all, if none are given.
        file: where to; standard output by default.
    """

    def __init__(self, *names: str, file: TextIO | None = None) -> None:
        self._names = names
        self._file = file

    def after(self, step: Step) -> Measured:
        if step.result.changed and (not self._names or step.pass_.name in self._names):
            (self._file or sys.stdout).write(f"after {step.pass_}:\n{program_text(step.program)}\n")
        return Measured()


class Verify(Instrument):
    """Checks the structure of what a pass returns, and that it neither adds nor drops parameters without saying so."""

    def after(self, step: Step) -> Measured:
        if step.result.changed:
            if not step.pass_.changes_parameters:
                _check_store("parameter", step.before.params, step.program.params)
                _check_store("state", step.before.state, step.program.state)
            verify(step.program)
        return Measured()


def _check_store(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    remedy = "a pass that may do so declares `changes_parameters`"
    for verb, paths in (("drops", before.keys() - after.keys()), ("adds", after.keys() - before.keys())):
        if paths:
            raise ContractError(f"it {verb} the {what} '{min(paths)}' ({len(paths)} in all); {remedy}")
    for path, x in before.items():
        if tuple(x.shape) != tuple(after[path].shape):
            old, new = list(x.shape), list(after[path].shape)
            raise ContractError(f"it changes the shape of the {what} '{path}' from {old} to {new}; {remedy}")


class Numerics(Instrument):
    """Holds a pass to its contract: runs the program before and after on the sample inputs, with equal state.

    A scalar result is recorded as the loss. What cannot be compared is noted with the reason.
    """

    def __init__(self) -> None:
        self._seen: tuple[Program, Inputs, Observation] | None = None
        self._inputs: Inputs | str = ""

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        self._inputs = comparable(pass_, program, context)
        if isinstance(self._inputs, Inputs):
            # Now, because the pass may be allowed to delete what it converts.
            self._observe(pass_, program, self._inputs)

    def _observe(self, pass_: Pass, program: Program, inputs: Inputs) -> Observation:
        compiled = not pass_.promise().operation_by_operation
        if self._seen is not None:
            seen, with_inputs, observation = self._seen
            if computes_the_same(seen, program) and with_inputs is inputs and observation.compiled == compiled:
                return observation
        observation = observe(program, inputs, compiled=compiled)
        self._seen = program, inputs, observation
        return observation

    def after(self, step: Step) -> Measured:
        if not step.result.changed:
            return Measured()
        if isinstance(self._inputs, str):
            return Measured(notes=(f"outputs not compared: {self._inputs}",))
        assert self._seen is not None
        before = self._seen[2]
        program = with_equal_draws(step.pass_, step.before, step.program)
        after = self._observe(step.pass_, program, self._inputs)
        contract = step.pass_.promise()
        metrics: dict[str, Any] = dict(contract.check(before, after))
        if isinstance(contract, ApproximateGradients):
            gradients = [gradient_of(each, self._inputs) for each in (step.before, program)]
            metrics |= contract.check_gradients(*gradients)
        if before.loss is not None and after.loss is not None:
            metrics["loss"] = (before.loss, after.loss)
        return Measured(metrics)


def computes_the_same(one: Program, other: Program) -> bool:
    """Whether two programs are the same but for their history."""
    return one.params is other.params and one.state is other.state and one.graphs is other.graphs


def comparable(pass_: Pass, program: Program, context: Context) -> Inputs | str:
    """The inputs on which a program can be compared before and after a pass, or why it cannot."""
    inputs = context.inputs
    if inputs is None:
        return "no sample inputs were given"
    leaves = jax.tree.leaves((program.params, program.state, inputs.args, dict(inputs.kwargs)))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return "parameters or inputs are shapes without values"
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves):
        return "arrays are spread over other processes"
    if not pass_.changes_draws:
        return inputs
    chosen = program.entry(inputs.entry)
    if chosen.mode == "eval":
        return inputs
    for entry in program.entries.values():
        if entry.mode == "eval" and entry.source.arguments == chosen.source.arguments:
            return dataclasses.replace(inputs, entry=entry.name)
    return "the pass changes random draws, and the program has no entry in eval mode for these inputs"


def with_equal_draws(pass_: Pass, before: Program, after: Program) -> Program:
    """What is compared with the program before a pass: of one that may change draws, the result with the old state."""
    if pass_.changes_draws and before.state.keys() == after.state.keys():
        return after.replace(state=before.state)
    return after


def observe(program: Program, inputs: Inputs, *, compiled: bool) -> Observation:
    """What a program returns: output, state after the call, objects updated in place, and `aux`.

    Args:
        program: the program; its own parameters and state are used and stay as they are.
        inputs: arrays, objects (copied first) and static values.
        compiled: under `jax.jit`, or operation by operation.
    """
    call, given = _call(program, inputs)
    function = jax.jit(call) if compiled else call
    return Observation.of(function(program.params, program.state, *given), compiled=compiled)


def gradient_of(program: Program, inputs: Inputs) -> np.ndarray:
    """The gradient, for all that a program trains, as one vector: of its loss, or of a fixed sum of its outputs.

    Args:
        program: the program; its own parameters and state are used and stay as they are.
        inputs: as for `observe`.
    """
    call, given = _call(program, inputs)
    trainable, frozen = program.partition()

    def objective(trainable: Mapping[str, Any]) -> jax.Array:
        found = call({**frozen, **trainable}, program.state, *given)
        results = [x for name, x in found.items() if name.startswith("output") and _floating(x)]
        return sum((jnp.vdot(x.astype(jnp.float32), _direction(x.shape)) for x in results), jnp.zeros(()))

    leaves = [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.grad(objective))(trainable)) if _floating(x)]
    return np.concatenate([np.zeros(0), *(leaf.astype(np.float64).ravel() for leaf in leaves)])


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _direction(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) if shape else np.ones((), np.float32)


def _call(program: Program, inputs: Inputs) -> tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]:
    """A call of a program as a function of parameters, state and what else it is given, and the latter."""
    entry = program.entry(inputs.entry)
    names = entry.source.arguments
    fixed = {*entry.constant, *entry.static}
    flat, tree = jax.tree_util.tree_flatten_with_path((inputs.args, dict(inputs.kwargs)), is_leaf=_is_object)
    arrays: dict[int, Any] = {}
    objects: dict[int, Any] = {}
    for position, (path, leaf) in enumerate(flat):
        top = path[1].key if path[0].idx == 1 else dict(enumerate(names)).get(path[1].idx)
        if _is_object(leaf):
            objects[position] = leaf
        elif isinstance(leaf, jax.Array | np.ndarray) and top not in fixed:
            arrays[position] = leaf
    definition, variables = nnx.split(objects)

    def call(params: Any, state: Any, arrays: dict[int, Any], variables: Any) -> dict[str, Any]:
        copies = nnx.merge(definition, variables, copy=True)
        leaves = [{**arrays, **copies}.get(position, leaf) for position, (_, leaf) in enumerate(flat)]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        output, after, aux = program.apply(params, state, *args, entry=entry.name, **kwargs)
        held = {join(path): unwrap(variable) for path, variable in nnx.to_flat_state(nnx.state(copies))}
        return dict(_named(output=output, state=after, argument=held, aux=aux))

    return call, (arrays, variables)


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _named(**trees: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of pytrees by name, static values left out."""
    for prefix, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, jax.Array | np.ndarray):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                yield f"{prefix}.{name}" if name else prefix, leaf


class Reproducer(Instrument):
    """On failure writes one text file that `python -m compax.reproducer FILE` replays.

    Args:
        directory: where to; made if it is missing. No file is overwritten.
        model: how to make the model again: a function of a module, or its name as "module:function". It takes no
            arguments and returns the captured program; or the model, which is then captured with the recorded inputs;
            or a tuple of either and the inputs. Without it the one who replays has to name it.
    """

    def __init__(self, directory: str | os.PathLike[str], model: str | Callable[[], Any] | None = None) -> None:
        self._directory = Path(directory)
        self._model = model

    def failed(self, pass_: Pass, program: Program, context: Context, error: Exception) -> str | None:
        # Imported here, so that `python -m compax.reproducer` is the first to import that module.
        from compax import reproducer

        try:
            path = reproducer.write(self._directory, self._model, pass_, program, context, error)
        except OSError as problem:
            return f"no reproducer could be written: {problem}"
        return f"replay with: python -m compax.reproducer {path}"
