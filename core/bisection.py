"""Bisection: which pass, and which site in it, first makes a program fail.

Delta debugging over the sites of one pass (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input",
IEEE TSE 28(2), 2002), halving only: the pass runs again with `at` narrowed to a part of its sites. Where no half fails
alone, because errors add up, it goes on with the half that changes outputs more.
"""

import dataclasses
from collections.abc import Callable, Sequence

from compax import selectors
from compax.contracts import Observation, relative_output_error
from compax.errors import CompaxError, PipelineError
from compax.instruments import Instrument, Measured, Step, Verify, comparable, observe, with_equal_draws
from compax.program import Program
from compax.transform import Context, Inputs, Pass

Run = Callable[[Pass, Program, Context, Sequence[Instrument]], Program]
Predicate = Callable[[Program], bool]


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """The first failure of a pipeline.

    Attributes:
        pass_: the pass.
        position: its place in the pipeline.
        sites: the fewest sites that show it: one, unless it takes several together or sites cannot be told apart.
        alone: whether these sites fail with nothing else rewritten; if not, they change outputs most.
        metric: relative output error that the pass made at these sites; infinite for NaN, and where nothing could be
            compared.
        reason: what failed.
    """

    pass_: Pass
    position: int
    sites: tuple[str, ...]
    alone: bool
    metric: float
    reason: str

    @property
    def site(self) -> str | None:
        """The site, if there is just one."""
        return self.sites[0] if len(self.sites) == 1 else None

    def __str__(self) -> str:
        where = ", ".join(self.sites) or "no site in particular"
        weight = "" if self.alone else " (largest share; it takes others to fail)"
        return f"pass {self.position + 1}, {self.pass_}, at {where}{weight}: {self.reason}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Verdict:
    """How a pass did: what failed (or nothing), how far outputs moved, and what it left."""

    reason: str | None
    metric: float
    kind: type[Exception] | None = None
    program: Program | None = None
    sites: tuple[str, ...] = ()


class _Sites(Instrument):
    """Remembers what sites a pass rewrote, also if it fails a check afterwards."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()

    def after(self, step: Step) -> Measured:
        rewritten = (site.name for site in step.result.sites if site.status == "rewritten")
        self.names = tuple(dict.fromkeys(rewritten))
        return Measured()


def bisect(
    passes: Sequence[Pass], program: Program, context: Context, run: Run, predicate: Predicate | None
) -> Finding | None:
    """The first pass that fails, with the site; None if none does.

    Args:
        passes: in order.
        program: what they are applied to.
        context: sample inputs and the rest; donation is off.
        run: the manager: runs one pass under instruments.
        predicate: what else must hold of the program after each pass.

    Raises:
        PipelineError: the predicate does not hold before any pass.
    """
    if predicate is not None and not predicate(program):
        raise PipelineError("the predicate does not hold of the program before any pass: there is nothing to bisect")
    context = dataclasses.replace(context, donate=False)
    for position, pass_ in enumerate(passes):
        judge = _Judge(program, context, run, predicate)
        verdict = judge(pass_)
        if verdict.reason is not None:
            sites, alone, metric = _narrow(pass_, judge, verdict)
            return Finding(pass_, position, sites, alone, metric, verdict.reason)
        assert verdict.program is not None
        program = verdict.program
    return None


class _Judge:
    """Runs passes on one program and says how each did."""

    def __init__(self, program: Program, context: Context, run: Run, predicate: Predicate | None) -> None:
        self.program = program
        self._context = context
        self._run = run
        self._predicate = predicate
        self._before: dict[tuple[str | None, bool], Observation] = {}

    def __call__(self, pass_: Pass) -> _Verdict:
        sites = _Sites()
        metric = float("inf")
        try:
            after = self._run(pass_, self.program, self._context, (sites, Verify()))
            inputs = comparable(pass_, self.program, self._context)
            if isinstance(inputs, Inputs) and after is not self.program:
                compiled = not pass_.promise().operation_by_operation
                one = self._observed(inputs, compiled)
                other = observe(with_equal_draws(pass_, self.program, after), inputs, compiled=compiled)
                metric = divergence(one, other)
                pass_.promise().check(one, other)
        except CompaxError as error:
            return _Verdict(str(error), metric, type(error), sites=sites.names)
        if self._predicate is not None and not self._predicate(after):
            return _Verdict("the predicate does not hold after it", metric, None, after, sites.names)
        return _Verdict(None, metric, None, after, sites.names)

    def _observed(self, inputs: Inputs, compiled: bool) -> Observation:
        key = inputs.entry, compiled
        if key not in self._before:
            self._before[key] = observe(self.program, inputs, compiled=compiled)
        return self._before[key]


def divergence(before: Observation, after: Observation) -> float:
    """The largest relative output error over all results; infinite where structures differ or a NaN appeared."""
    if before.leaves.keys() - after.leaves.keys() or (after.has_nan and not before.has_nan):
        return float("inf")
    pairs = [(leaf, after.leaves[name]) for name, leaf in before.leaves.items()]
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max((relative_output_error(one, other) for one, other in pairs), default=0.0)


def _narrow(pass_: Pass, judge: _Judge, verdict: _Verdict) -> tuple[tuple[str, ...], bool, float]:
    """The fewest sites with which the pass still fails in the same way: sites, whether they fail alone, metric."""
    sites, alone, metric = verdict.sites or _selected(pass_, judge.program), True, verdict.metric
    if len(sites) == 1 or not _fails(judge(_only(pass_, sites)), verdict):
        return sites, alone, metric
    while len(sites) > 1:
        halves = sites[: len(sites) // 2], sites[len(sites) // 2 :]
        found = [(half, judge(_only(pass_, half))) for half in halves]
        failing = [(half, each) for half, each in found if _fails(each, verdict)]
        if failing:
            sites, best = failing[0]
        else:
            measured = [(half, each) for half, each in found if each.reason is None and 0 < each.metric < float("inf")]
            if not measured:
                break
            sites, best = max(measured, key=lambda item: item[1].metric)
            alone = False
        metric = best.metric
    return sites, alone, metric


def _fails(verdict: _Verdict, like: _Verdict) -> bool:
    return verdict.reason is not None and verdict.kind is like.kind


def _only(pass_: Pass, sites: tuple[str, ...]) -> Pass:
    return dataclasses.replace(pass_, at=selectors.exactly(sites))


def _selected(pass_: Pass, program: Program) -> tuple[str, ...]:
    """What `at` selects, for a pass that failed before it could report its sites."""
    selector = selectors.Selector.parse(pass_.at)
    names = [
        site.name
        for entry in program.entries
        for site in program.sites(entry)
        if selector.matches(site.name, site.kind)
    ]
    return tuple(dict.fromkeys(names))
