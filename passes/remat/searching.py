"""Remat under a budget: the prediction, held to what the compiler says, in at most three compiles.

Where something fits, and keeping everything is predicted near the budget, the last of them is of that. Where all three
are over the budget, a fourth says whether keeping nothing fits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from compax.errors import BudgetError, NoCompilerError
from compax.meaning import Meaning
from compax.passes.remat.planning import Plan, Planner
from compax.printing import bytes_text, share_text

_COMPILES = 3
_ROOM = 0.05
"""The share of what there is to choose that may stay unused."""
_NEAR = 4 / 3
"""How far above the budget, by the prediction, keeping everything is still tried, once something fits.

XLA merges and recomputes by itself where nothing is marked: this prediction may be too high by more than others.
"""
_LISTED = 4

Meter = Callable[[Callable[..., Any], tuple[Any, ...], tuple[int, ...]], int]
"""Compiles a function, from its arguments as shapes and which of them are donated, and returns the bytes it needs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a search ended with.

    Attributes:
        plan: what to keep.
        compiled: for each compile, what was compiled and the bytes that it needs.
        missing: why nothing was compiled; none if something was.
    """

    plan: Plan
    compiled: tuple[tuple[Plan, int], ...]
    missing: str | None = None

    @property
    def peak(self) -> int | None:
        """What the compiler says that the plan needs."""
        return next((peak for plan, peak in self.compiled if plan is self.plan), None)


def search(planner: Planner, budget: int, meter: Meter, meaning: Meaning) -> Found:
    """A plan that the compiler finds within the budget.

    Args:
        planner: of the graph.
        budget: bytes.
        meter: what compiles. Where it has no compiler for the target, the prediction has to do.
        meaning: of the graph, for the message.

    Raises:
        BudgetError: even keeping nothing needs more.
    """
    compiled: list[tuple[Plan, int]] = []
    room = round(_ROOM * (planner.without.peak - planner.least.peak))
    near = planner.without.peak <= _NEAR * budget
    allowed, fitting = budget, None

    def fits(plan: Plan) -> bool:
        compiled.append((plan, meter(*planner.step.plain(planner.rewritten(plan)))))
        return compiled[-1][1] <= budget

    try:
        while len(compiled) < _COMPILES - (near and fitting is not None):
            chosen = planner.plan(allowed) if allowed + room < planner.without.peak else planner.keeping_everything()
            plan = chosen or planner.keeping_nothing()
            if any(plan.same(other) for other, _ in compiled):
                break
            if fits(plan):
                if fitting is None or plan.choice.seconds <= fitting.choice.seconds:
                    fitting = plan
                if plan.choice.seconds == 0 or (chosen is not None and budget - compiled[-1][1] < room):
                    break
            elif plan.choice.seconds >= planner.nothing.seconds:
                break
            allowed = _allowed(compiled, budget, room)
        last = None
        if fitting is None:
            last = planner.keeping_nothing()
        elif near and fitting.choice.seconds and len(compiled) < _COMPILES:
            last = planner.keeping_everything()
        if last is not None and not any(last.same(plan) for plan, _ in compiled) and fits(last):
            fitting = last
    except NoCompilerError as error:
        return _predicted(planner, budget, meaning, str(error))
    if fitting is None:
        raise BudgetError(_too_little(planner, budget, min(peak for _, peak in compiled), "compiled", meaning))
    return Found(fitting, tuple(compiled))


def _allowed(compiled: list[tuple[Plan, int]], budget: int, room: int) -> int:
    """What to ask for next by the prediction, which the compiler's figure corrects."""
    plan, peak = compiled[-1]
    off = peak - plan.predicted.peak
    allowed = budget - off - round(0.05 * abs(off))
    if peak <= budget:
        return max(allowed, plan.predicted.peak + round(0.95 * (budget - peak) / _growth(compiled)))
    if not plan.regions:
        # What is off where nothing is computed again tells less of what is off where something is.
        return allowed - round(0.1 * abs(off) + _ROOM * budget)
    return allowed - (round(0.1 * abs(off)) if len(compiled) == 1 else room)


def _growth(compiled: list[tuple[Plan, int]]) -> float:
    """By how much the compiler's figure grew with the prediction, last; no less than half, for it may grow faster."""
    if len(compiled) < 2:
        return 1.0
    (before, low), (after, high) = compiled[-2:]
    grown = after.predicted.peak - before.predicted.peak
    return min(1.0, max(0.5, (high - low) / grown)) if grown > 0 else 1.0


def _predicted(planner: Planner, budget: int, meaning: Meaning, missing: str) -> Found:
    plan = planner.plan(budget)
    if plan is None:
        raise BudgetError(_too_little(planner, budget, planner.least.peak, "predicted", meaning))
    return Found(plan, (), missing)


def told(found: Found, planner: Planner, budget: int) -> str:
    """What was found, in a line."""
    plan = found.plan
    again = plan.choice.seconds - plan.choice.coding_seconds
    share = again / planner.nothing.seconds if planner.nothing.seconds else 0.0
    text = (
        f"peak {bytes_text(planner.without.peak)} -> {bytes_text(plan.predicted.peak)} predicted, "
        f"{share_text(min(share, 1.0)) if plan.regions else 'nothing'} of the layers computed again"
    )
    if found.peak is None:
        return f"{text}; not compiled: {found.missing}"
    count = len(found.compiled)
    return f"{text}; {bytes_text(found.peak)} compiled ({count} compile{'s' * (count > 1)}) of {bytes_text(budget)}"


def _too_little(planner: Planner, budget: int, least: int, basis: str, meaning: Meaning) -> str:
    found = planner.least
    owners = meaning.owners()
    parts = [f"{kind} {bytes_text(n)}" for kind, n in found.arguments.items() if n]
    largest = []
    for alive in found.alive[:_LISTED]:
        owner = owners.get(alive.place.path) if alive.place is not None and alive.place.path is not None else None
        where = f" of {owner.name}" if owner is not None else ""
        largest.append(f"{alive.operation}{where} {bytes_text(alive.nbytes)}")
    return (
        f"remat: a budget of {bytes_text(budget)} cannot be met: with nothing kept the train step needs "
        f"{bytes_text(least)} ({basis}): {', '.join(parts)}; largest temporaries: {', '.join(largest)}. Take a smaller "
        "batch, more chips, fewer bytes a parameter, or a loss in tiles"
    )
