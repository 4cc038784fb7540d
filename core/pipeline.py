"""Pipelines: passes in order, checked before anything runs, verified after every pass, and with a text form.

`route(at=blocks.*.mlp, experts=8) | quantize(weights=int8) | remat(budget=12GiB)`
"""

import dataclasses
import difflib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from compax import bisection, selectors, text
from compax.errors import CompaxError, PassError, PipelineError, SelectorError
from compax.instruments import Instrument, Numerics, Step, Verify
from compax.program import Program
from compax.transform import (
    PHASES,
    Context,
    Footprint,
    Inputs,
    Pass,
    PassRecord,
    PassResult,
    default,
    field_types,
    registered,
)

_logger = logging.getLogger("compax")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Passes in order. Equal if the passes are; `parse(str(pipeline)) == pipeline`.

    Attributes:
        passes: the passes.
        instruments: what watches them, besides the checks.
    """

    passes: tuple[Pass, ...] = ()
    instruments: tuple[Instrument, ...] = dataclasses.field(default=(), compare=False)

    def __init__(self, passes: Iterable[Pass] = (), instruments: Iterable[Instrument] = ()) -> None:
        given: tuple[Any, ...] = tuple(passes)
        for each in given:
            if not isinstance(each, Pass):
                raise PipelineError(f"a pipeline is made of passes, and {each!r} is none; Pipeline.parse reads text")
            if type(each).__dict__.get("name", "") == "":
                raise PipelineError(f"{type(each).__name__} has no name in text: decorate it with @register('...')")
        object.__setattr__(self, "passes", given)
        object.__setattr__(self, "instruments", tuple(instruments))

    @classmethod
    def parse(cls, text_form: str, instruments: Iterable[Instrument] = ()) -> "Pipeline":
        """Reads a pipeline's text; an empty one has no passes.

        Args:
            text_form: `name(option=value, ...) | name(...)`.
            instruments: what watches the passes, besides the checks.

        Raises:
            PipelineError: the text is malformed, or names a pass or an option that there is not, or a value that the
                pass refuses; the message points at the character.
        """
        return cls([_bind(text_form, call) for call in text.parse(text_form)], instruments)

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))

    def check(self, history: Sequence[Pass] = ()) -> None:
        """Checks the order of the passes, after those that a program went through already.

        Raises:
            PipelineError: passes conflict, one that another requires is missing, or the order is wrong; says how to fix
                it.
        """
        _check_order(tuple(history), self.passes)

    @property
    def undecided(self) -> bool:
        """Whether a pass chooses options by itself when it runs."""
        return any(pass_.undecided for pass_ in self.passes)

    def mesh_axes(self, target: Any = None) -> Mapping[str, int] | None:
        """The axes of the mesh that the passes lay programs over, with their sizes; none if they lay them over none.

        Args:
            target: what the programs are meant for; the devices of this process's JAX if none.

        Raises:
            ShardingError: the mesh does not fit them.
        """
        return next((axes for pass_ in self.passes if (axes := pass_.mesh_axes(target)) is not None), None)

    def __call__(
        self,
        program: Program,
        *sample_inputs: Any,
        entry: str | None = None,
        check: bool = True,
        instruments: Iterable[Instrument] = (),
        seed: int = 0,
        target: Any = None,
        donate: bool = False,
        **kwargs: Any,
    ) -> Program:
        """Runs the passes.

        Args:
            program: what to transform; it stays as it is.
            *sample_inputs: inputs of the program, for calibration and for comparing outputs before and after each
                pass.
            entry: which entry the inputs are for; the first one by default.
            check: whether to verify structure and numerics after each pass.
            instruments: more of them, for this call.
            seed: the one source of randomness.
            target: the chip and mesh that the program is meant for.
            donate: give the program's arrays away, so that each is deleted as soon as it is converted.
            **kwargs: inputs by name.

        Returns:
            The transformed program, with a record of each pass in its history; the very program that was given if no
            pass changed anything.

        Raises:
            PipelineError: the order is wrong; nothing has run then.
            SelectorError: a pass matched nothing.
            VerificationError: a pass left a malformed program.
            ContractError: a pass changed more than its contract allows.
            PassError: a pass failed in another way.
        """
        self.check([record.pass_ for record in program.history])
        context = Context(_inputs(sample_inputs, kwargs, entry), seed, target, donate)
        watching = [*((Verify(), Numerics()) if check else ()), *self.instruments, *instruments]
        for position, pass_ in enumerate(self.passes):
            with_rest = dataclasses.replace(context, following=self.passes[position + 1 :])
            program = run_pass(pass_, program, with_rest, watching)
        return program

    def bisect(
        self,
        program: Program,
        *sample_inputs: Any,
        entry: str | None = None,
        predicate: Callable[[Program], bool] | None = None,
        seed: int = 0,
        target: Any = None,
        **kwargs: Any,
    ) -> bisection.Finding | None:
        """Finds the first pass that fails, and the site in it.

        Args:
            program: what the pipeline is applied to.
            *sample_inputs: inputs of the program.
            entry: which entry they are for; the first one by default.
            predicate: what else must hold of the program after each pass, such as that it fits in memory.
            seed: the one source of randomness.
            target: the chip and mesh that the program is meant for.
            **kwargs: inputs by name.

        Returns:
            The first pass that raises, leaves a malformed program, breaks its contract, makes a NaN, or breaks the
            predicate, with the site; None if none does.

        Raises:
            PipelineError: the order is wrong, or the predicate does not hold before any pass.
        """
        self.check([record.pass_ for record in program.history])
        context = Context(_inputs(sample_inputs, kwargs, entry), seed, target)
        return bisection.bisect(self.passes, program, context, run_pass, predicate)


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: str | None) -> Inputs | None:
    return Inputs(args, kwargs, entry) if args or kwargs or entry is not None else None


# -- running one pass -------------------------------------------------------------------------------------------------


def run_pass(pass_: Pass, program: Program, context: Context, instruments: Sequence[Instrument]) -> Program:
    """Runs one pass under instruments and records what it did.

    Returns:
        The new program, or the given one if nothing changed.

    Raises:
        CompaxError: what failed, with the pass named; of the class that was raised, or `PassError` for any other.
    """
    try:
        for instrument in instruments:
            instrument.before(pass_, program, context)
        given = _contents(program)
        start = time.perf_counter()
        before = Footprint.of(program)
        result = _result(pass_.run(program, context))
        jax.block_until_ready(result.program.params)
        seconds = time.perf_counter() - start
        notes = _check_result(pass_, program, given, result)
        record = PassRecord(
            pass_=result.settled or pass_,
            sites=result.sites,
            decisions=result.decisions,
            notes=(*result.notes, *notes),
            before=before,
            after=Footprint.of(result.program),
            seconds=seconds,
            asked=None if result.settled is None else pass_,
        )
        left = result.program.replace(history=(*program.history, record)) if result.changed else program
        step = Step(pass_, program, left, result, context, seconds)
        measured = [instrument.after(step) for instrument in instruments]
    except Exception as error:
        raise _explained(error, pass_, program, context, instruments) from error
    record = dataclasses.replace(
        record,
        notes=(*record.notes, *(note for each in measured for note in each.notes)),
        metrics={name: value for each in measured for name, value in each.metrics.items()},
    )
    for instrument in instruments:
        instrument.recorded(record)
    if not result.changed:
        _logger.warning("%s", record)
        return program
    return left.replace(history=(*program.history, record))


def _contents(program: Program) -> tuple[dict[Any, Any], ...]:
    return dict(program.params), dict(program.state), dict(program.graphs)


def _result(result: Any) -> PassResult:
    if not isinstance(result, PassResult):
        raise PassError(f"it returned {type(result).__name__}; `run` returns a PassResult")
    return result


def _check_result(
    pass_: Pass, program: Program, given: tuple[dict[Any, Any], ...], result: PassResult
) -> tuple[str, ...]:
    """Holds a pass to what a result promises; notes on what it did not do."""
    for what, old, new in zip(("parameters", "state", "graphs"), given, _contents(program), strict=True):
        if old.keys() != new.keys() or any(old[key] is not new[key] for key in old):
            raise PassError(
                f"it changed the {what} of the program that it was given; build new ones: `program.replace`"
            )
    if result.changed and result.program is program:
        raise PassError("it reports rewritten sites, and returned the program that it was given")
    if not result.changed and result.program is not program:
        raise PassError("it returned another program, and reports no rewritten site; report what was changed")
    if not result.sites:
        message = _nothing(pass_, program)
        if pass_.strict:
            raise SelectorError(message)
        warnings.warn(f"{pass_}: {message}", stacklevel=4)
        return (message,)
    return () if result.changed else ("nothing was changed",)


def _nothing(pass_: Pass, program: Program) -> str:
    """Why a pass has no site to report."""
    sites = {site.name: site for entry in program.entries for site in program.sites(entry)}
    selector = selectors.Selector.parse(pass_.at)
    chosen = [site for site in sites.values() if selector.matches(site.name, site.kind)]
    if not chosen:
        return selectors.explain(selector, list(sites.values()), what="site")
    kinds = ", ".join(sorted({site.kind for site in chosen}))
    return f"it fits none of the {len(chosen)} sites that '{pass_.at}' selects ({kinds}), such as '{chosen[0].name}'"


def _explained(
    error: Exception, pass_: Pass, program: Program, context: Context, instruments: Sequence[Instrument]
) -> CompaxError:
    """An error with the pass named, of the same class if it is one of ours, and with what instruments say to it."""
    if isinstance(error, CompaxError):
        kind, message = type(error), f"{pass_}: {error}"
    else:
        kind, message = PassError, f"{pass_}: failed with {type(error).__name__}: {error}"
    named = kind(message)
    named.__cause__ = error
    said = [instrument.failed(pass_, program, context, named) for instrument in instruments]
    return kind("\n".join([message, *(sentence for sentence in said if sentence)]))


# -- text -------------------------------------------------------------------------------------------------------------


def _bind(text_form: str, call: text.Call) -> Pass:
    """The pass that a call in a pipeline's text means."""

    def fail(position: int, message: str) -> PipelineError:
        return PipelineError(text.point(text_form, position, message))

    known = registered()
    pass_type = known.get(call.name)
    if pass_type is None:
        raise fail(call.start, f"no pass '{call.name}'{_closest(call.name, known)}")
    types = field_types(pass_type)
    options: dict[str, Any] = {}
    for key, written in call.options.items():
        if key not in types:
            raise fail(call.keys[key], f"'{call.name}' has no option '{key}'{_closest(key, types)}")
        try:
            options[key] = text.read(written, types[key])
        except text.Mismatch as error:
            raise fail(written.start, f"the option '{key}' of '{call.name}' {error}") from None
    for field in dataclasses.fields(pass_type):
        if field.name not in options and default(field) is dataclasses.MISSING:
            raise fail(call.start, f"'{call.name}' needs the option '{field.name}'")
    try:
        return pass_type(**options)
    except ValueError as error:
        raise fail(call.start, str(error)) from error


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return (
        f", did you mean '{close[0]}'? There are: {', '.join(known)}" if close else f"; there are: {', '.join(known)}"
    )


# -- order ------------------------------------------------------------------------------------------------------------


def _check_order(history: tuple[Pass, ...], passes: tuple[Pass, ...]) -> None:
    everything = (*history, *passes)
    for position, pass_ in enumerate(everything):
        for other in everything[:position]:
            if pass_.name in other.conflicts or other.name in pass_.conflicts:
                where = "the program went through that already" if position >= len(history) > 0 else "leave one out"
                raise PipelineError(f"'{pass_}' cannot be combined with '{other}': {where}")
        if missing := [name for name in pass_.requires if all(other.name != name for other in everything)]:
            example = _example(missing[0])
            raise PipelineError(
                f"'{pass_}' requires '{missing[0]}' before it, which is missing"
                + (f"; {_remedy(history, passes, (example,))}" if example is not None else "")
            )
    for position, later in enumerate(everything):
        for earlier in everything[position + 1 :]:
            if why := _must_precede(earlier, later):
                raise PipelineError(f"'{earlier}' has to come before '{later}': {why}; {_remedy(history, passes)}")


def _must_precede(one: Pass, other: Pass) -> str | None:
    """Why `one` has to come before `other`, if it has to."""
    if one.name in other.requires:
        return f"'{other.name}' requires it"
    if one.name in other.after:
        return f"'{other.name}' comes after it where both are used"
    if "any" not in (one.phase, other.phase) and PHASES.index(one.phase) < PHASES.index(other.phase):
        return f"'{one.name}' is of the phase {one.phase}, '{other.name}' of the phase {other.phase}"
    return None


def _example(name: str) -> Pass | None:
    """A pass as its example uses it."""
    pass_type = registered().get(name)
    if pass_type is None:
        return None
    used = Pipeline.parse(pass_type.example).passes if pass_type.example else ()
    return next((pass_ for pass_ in used if pass_.name == name), None)


def _remedy(history: tuple[Pass, ...], passes: tuple[Pass, ...], more: tuple[Pass, ...] = ()) -> str:
    """The order that would be right."""
    remaining = [*history, *more, *passes]
    ordered: list[Pass] = []
    while remaining:
        free = [p for p in remaining if not any(_must_precede(q, p) for q in remaining if q is not p)]
        if not free:
            return f"no order satisfies {', '.join(p.name for p in remaining)}: leave one out"
        ordered.append(free[0])
        remaining = [p for p in remaining if p is not free[0]]
    if tuple(ordered[: len(history)]) == history:
        return f"write: {Pipeline(ordered[len(history) :])}"
    return (
        f"the program went through {Pipeline(history)} already: capture the model again and write: {Pipeline(ordered)}"
    )
