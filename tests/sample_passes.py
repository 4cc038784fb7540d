"""Passes and a model for tests of the manager: passes that are right, and passes that are broken on purpose.

Import it inside a test or a fixture, never at the top of a test file: importing registers these passes, and tests that
are parametrized over the registry when they are collected must not meet them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import compax
from compax import ir
from compax.capture import Captured
from compax.contracts import Contract, Exact, Lossy, Tolerance
from compax.program import Program
from compax.text import Bytes
from compax.transform import Context, Pass, PassResult, SiteReport, register

D = 6
LAYERS = 5


class Chain(nnx.Module):
    """Linear layers in a row, with dropout between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(LAYERS)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = x + self.dropout(jnp.tanh(block(x)))
        return x


def make_model() -> Chain:
    return Chain(nnx.Rngs(0))


def example() -> jax.Array:
    return jnp.linspace(-1, 1, 3 * D).reshape(3, D)


def make_program() -> Program:
    return compax.capture(make_model(), example(), mode="eval")


def sites() -> list[str]:
    return [f"blocks.{index}" for index in range(LAYERS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels(Pass):
    """Applies a function to the kernel of every selected linear site."""

    phase: ClassVar[str] = "precision"

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> PassResult:
        chosen = self.select([site for site in program.sites() if site.kind == "linear"], what="linear")
        params = dict(program.params)
        for site in chosen:
            assert site.parameter is not None
            params[site.parameter] = self.change(site.name, params[site.parameter])
        same = all(params[path] is x for path, x in program.params.items())
        reports = tuple(SiteReport.of(site, "matched" if same else "rewritten") for site in chosen)
        return PassResult(program if same else program.replace(params=params), reports)


@register("copy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Kernels):
    """Replaces kernels by copies of them: a right pass that changes nothing that is computed."""

    contract: ClassVar[Contract] = Exact()
    phase: ClassVar[str] = "structure"

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        return jnp.copy(kernel)


@register("keep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Kernels):
    """Matches and leaves everything as it is."""

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        return kernel


@register("break_value")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakValue(Kernels):
    """Broken: copies all kernels but one, which it scales."""

    contract: ClassVar[Contract] = Tolerance(1e-3)
    bad: str = "blocks.3"
    factor: float = 1.5

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        return kernel * self.factor if site == self.bad else jnp.copy(kernel)


@register("break_nan")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakNan(Kernels):
    """Broken: puts a NaN into one kernel."""

    contract: ClassVar[Contract] = Lossy("relative output error", bound=1e9)
    bad: str = "blocks.1"

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        return kernel.at[0, 0].set(jnp.nan) if site == self.bad else jnp.copy(kernel)


@register("drift")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift(Kernels):
    """Broken only as a whole: each site stays within the contract, all of them together do not."""

    contract: ClassVar[Contract] = Lossy("relative output error", bound=0.01)
    worst: str = "blocks.2"

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        return kernel * (1.02 if site == self.worst else 1.01)


@register("break_shape")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakShape(Pass):
    """Broken: feeds products a bias in place of their kernel."""

    phase: ClassVar[str] = "structure"

    def run(self, program: Program, context: Context) -> PassResult:
        chosen = self.select(program.sites())
        decisions = {"sites": [site.name for site in chosen]}
        graphs = self.rewrite_graphs(program, decisions)
        return PassResult(
            program.replace(graphs=graphs), tuple(SiteReport.of(site, "rewritten") for site in chosen), decisions
        )

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        bias = captured.input_value("parameter", "blocks.0.bias")
        assert bias is not None
        ops = [
            dataclasses.replace(op, inputs=(op.inputs[0], bias)) if op.name == "dot_general" else op
            for op in captured.graph.ops
        ]
        return dataclasses.replace(captured, graph=dataclasses.replace(captured.graph, ops=tuple(ops), imported=False))


@register("break_graph")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakGraph(Pass):
    """Broken: computes another activation function, in graphs of every shape."""

    phase: ClassVar[str] = "structure"
    contract: ClassVar[Contract] = Tolerance(1e-3)

    def run(self, program: Program, context: Context) -> PassResult:
        graphs = self.rewrite_graphs(program, {})
        return PassResult(program.replace(graphs=graphs), (SiteReport("tanh", "activation", "rewritten"),))

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        def replace(op: ir.Op) -> list[ir.Op]:
            return ir.inline(ir.trace(jnp.sin, op.inputs[0].aval), op.inputs, op.outputs)

        paths = [path for path, op in ir.walk(captured.graph) if op.name == "tanh"]
        return dataclasses.replace(captured, graph=ir.rewrite(captured.graph, dict.fromkeys(paths, replace)))


@register("drop_parameter")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropParameter(Pass):
    """Broken: leaves a parameter out."""

    phase: ClassVar[str] = "structure"

    def run(self, program: Program, context: Context) -> PassResult:
        params = {path: x for path, x in program.params.items() if path != "blocks.4.bias"}
        return PassResult(program.replace(params=params), (SiteReport("blocks.4.bias", "parameter", "rewritten"),))


@register("drop_declared")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DropDeclared(DropParameter):
    """Broken: leaves a parameter out that the graph still reads, and declares that it changes parameters."""

    changes_parameters: ClassVar[bool] = True


@register("reshape_parameter")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReshapeParameter(Pass):
    """Broken: stores a parameter in another shape."""

    phase: ClassVar[str] = "structure"

    def run(self, program: Program, context: Context) -> PassResult:
        path = "blocks.0.kernel"
        params = {**program.params, path: program.params[path].reshape(-1)}
        return PassResult(program.replace(params=params), (SiteReport(path, "parameter", "rewritten"),))


@register("crash")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Crash(Kernels):
    """Broken: raises at one site."""

    bad: str = "blocks.2"

    def change(self, site: str, kernel: jax.Array) -> jax.Array:
        if site == self.bad:
            raise ZeroDivisionError("no scale at all")
        return jnp.copy(kernel)


Misbehaviour = Literal["mutate", "conceal", "pretend", "return_nothing", "match_nothing"]


@register("misbehave")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Misbehave(Pass):
    """Broken: does not keep to what a pass returns."""

    phase: ClassVar[str] = "structure"
    how: Misbehaviour

    def run(self, program: Program, context: Context) -> PassResult:
        report = SiteReport("blocks.0", "linear", "rewritten")
        if self.how == "mutate":
            program.params["blocks.0.kernel"] = jnp.zeros((D, D))
        if self.how == "pretend":
            return PassResult(program, (report,))
        if self.how == "return_nothing":
            return None  # type: ignore[return-value]
        if self.how == "match_nothing":
            return PassResult(program, ())
        return PassResult(program.replace(name="other"), (dataclasses.replace(report, status="matched"),))


@register("redraw")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Redraw(Pass):
    """Moves the random state, and declares that it changes draws."""

    phase: ClassVar[str] = "structure"
    changes_draws: ClassVar[bool] = True
    contract: ClassVar[Contract] = Tolerance(1e-6)

    def run(self, program: Program, context: Context) -> PassResult:
        state = {path: x + 1 if path.endswith("count") else x for path, x in program.state.items()}
        return PassResult(program.replace(state=state), (SiteReport("dropout", "random", "rewritten"),))


@register("redraw_silently")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RedrawSilently(Redraw):
    """Broken: does not declare it."""

    changes_draws: ClassVar[bool] = False


@register("first")
@dataclasses.dataclass(frozen=True, kw_only=True)
class First(Copy):
    """Comes first; for tests of the order."""

    example: ClassVar[str] = "first(at=blocks.0)"


@register("second")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Second(Copy):
    """Comes after `first`, and not with `rival`."""

    after: ClassVar[tuple[str, ...]] = ("first",)
    conflicts: ClassVar[tuple[str, ...]] = ("rival",)


@register("rival")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival(Copy):
    """Conflicts with `second`, which says so."""


@register("last")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Last(Copy):
    """Requires `first`."""

    phase: ClassVar[str] = "memory"
    requires: ClassVar[tuple[str, ...]] = ("first",)


@register("every_option")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOption(Keep):
    """Has an option of every type that has a text form."""

    flag: bool = False
    count: int = 3
    maybe: int | None = None
    share: float = 0.5
    either: int | float | str | None = 1
    budget: Bytes | None = None
    word: str = "int8"
    choice: Literal["sum", "mean", 2] = "sum"
    numbers: tuple[int, ...] = ()
    shape: tuple[int, str] = (1, "a")
    words: tuple[str, ...] = ("norm",)
    nested: tuple[tuple[float, ...], ...] = ()
