"""Freezing: parameters that training leaves as they are."""

import dataclasses
from typing import Any, ClassVar

from compax.contracts import Exact
from compax.errors import SelectorError
from compax.program import Program
from compax.transform import Context, Pass, PassResult, SiteReport, register

__all__ = ["Freeze"]


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter in the place of a site, so that selectors apply to it."""

    name: str
    kind: str = "parameter"


@register("freeze")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Freeze(Pass):
    """Freezes parameters: no gradient is computed for them, and an optimizer keeps no state.

    `Program.partition` leaves them out of the trainable ones, gradients stop at them, and `Program.to_module` holds
    them as variables that are no `nnx.Param`. `at` selects by parameter path (`embed.**`), unlike passes that select
    sites. Transfer learning's usual first step (Yosinski et al., "How transferable are features in deep neural
    networks?", 2014, arXiv 1411.1792).

    Raises:
        SelectorError: `at` matches no parameter.
    """

    phase: ClassVar[str] = "any"
    contract: ClassVar[Any] = Exact()
    paper: ClassVar[str] = "Yosinski et al. 2014, arXiv 1411.1792"
    example: ClassVar[str] = "freeze(at=embed.**)"

    def run(self, program: Program, context: Context) -> PassResult:
        if not program.params:
            raise SelectorError(f"the program '{program.name}' has no parameters to freeze")
        chosen = [p.name for p in self.select([_Parameter(path) for path in program.params])]
        reports = tuple(
            SiteReport(
                name=path,
                kind="parameter",
                status="skipped" if path in program.frozen else "rewritten",
                reason="already frozen" if path in program.frozen else "",
                parameter=path,
            )
            for path in chosen
        )
        if program.frozen.issuperset(chosen):
            return PassResult(program=program, sites=reports)
        return PassResult(program=program.replace(frozen=program.frozen.union(chosen)), sites=reports)
