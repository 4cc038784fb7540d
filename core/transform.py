"""The pass contract: what a pass is, what it gets, what it returns, and the registry that pipelines look names up in.

A pass is a frozen dataclass whose fields are its options. It never changes the program that it gets. What it did is in
its result: for every site whether it was rewritten, left as it was, or skipped, and why.
"""

import dataclasses
import functools
import importlib
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import jax

from compax import selectors, text
from compax.capture import Captured
from compax.contracts import Contract, Exact
from compax.encoding import nbytes
from compax.errors import PipelineError
from compax.printing import bytes_text, figure_text
from compax.program import Program
from compax.selectors import AnyNamed, Named, Selector

PHASES = ("structure", "precision", "adapters", "placement", "memory")
"""What comes before what in a pipeline."""

Status = Literal["rewritten", "matched", "skipped"]


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What a pass did with one site.

    Attributes:
        name: the site's name, which `at` selects.
        kind: its kind, which `at` may name as well.
        status: "rewritten"; "matched" (fits, and needed no change); or "skipped" (fits the selector, and was declined).
        reason: why it was skipped, or anything else worth knowing.
        parameter: path of the parameter that the site consumes, if any.
    """

    name: str
    kind: str
    status: Status
    reason: str = ""
    parameter: str | None = None

    @classmethod
    def of(cls, site: Named, status: Status, reason: str = "") -> "SiteReport":
        """A report on a site of `Program.sites`."""
        return cls(site.name, site.kind, status, reason, getattr(site, "parameter", None))


@dataclasses.dataclass(frozen=True, eq=False)
class PassResult:
    """What a pass returns.

    Attributes:
        program: the new program, or the very one it was given if no site was rewritten.
        sites: what was done, site by site.
        decisions: what `Pass.rewrite` needs to do the same to another graph of the program, by site name and parameter
            path, never by position.
        notes: anything else that a person should know.
        settled: of a pass that chose its options by itself, the same with what it chose: this is what history keeps, so
            that nothing is chosen anew where a pipeline is replayed.
    """

    program: Program
    sites: tuple[SiteReport, ...]
    decisions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settled: "Pass | None" = None

    @property
    def changed(self) -> bool:
        """Whether the pass says that it rewrote anything."""
        return any(site.status == "rewritten" for site in self.sites)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """How large a program's parameters are.

    Attributes:
        parameters: number of elements, as dense arrays.
        nbytes: bytes that they occupy as they are stored.
    """

    parameters: int
    nbytes: int

    @classmethod
    def of(cls, program: Program) -> "Footprint":
        """The footprint of a program's parameters."""
        store = program.params.values()
        return cls(sum(math.prod(x.shape) for x in store), sum(map(nbytes, store)))


@dataclasses.dataclass(frozen=True, eq=False)
class PassRecord:
    """What a pass did to a program, kept in its history.

    Attributes:
        pass_: the pass with its options.
        sites: what it did, site by site.
        decisions: what replays its graph half.
        notes: what it, and the pipeline, had to say.
        before: size of the parameters that it was given.
        after: size of the parameters that it left.
        seconds: time that it took.
        metrics: what instruments found, by name; bytes, FLOPs and seconds say so at its end. A pair is (before, after).
        asked: the pass as it was given, if it chose options by itself.
    """

    pass_: "Pass"
    sites: tuple[SiteReport, ...]
    decisions: Mapping[str, Any]
    notes: tuple[str, ...]
    before: Footprint
    after: Footprint
    seconds: float
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    asked: "Pass | None" = None

    @property
    def text(self) -> str:
        """The pass in text form."""
        return str(self.pass_)

    def count(self, status: Status) -> int:
        """How many sites have a status."""
        return sum(site.status == status for site in self.sites)

    def __str__(self) -> str:
        """The pass, what it did with how many sites and why not with others, and what it changed, in one line."""
        reasons = dict.fromkeys(site.reason for site in self.sites if site.status == "skipped")
        parts = [f"{self.count(status)} {status}" for status in typing.get_args(Status) if self.count(status)]
        if reasons:
            parts[-1] += f" ({'; '.join(reasons)})"
        for what, before, after in (
            ("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}"),
            ("", bytes_text(self.before.nbytes), bytes_text(self.after.nbytes)),
        ):
            parts.append(f"{before if before == after else f'{before} -> {after}'} {what}".strip())
        parts += [f"{name} {figure_text(name, value)}" for name, value in self.metrics.items()]
        return f"{self.text}: {', '.join([*parts, f'{self.seconds:.2f} s', *self.notes])}"


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Sample inputs of a program.

    Attributes:
        args: positional inputs.
        kwargs: inputs by name.
        entry: which entry they are for; the first one by default.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    entry: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a pass may use besides the program.

    Attributes:
        inputs: sample inputs, if any were given: for calibration.
        seed: the one source of randomness.
        target: the chip and mesh that the program is meant for, if known.
        following: the passes that come after this one.
        donate: whether the caller gives its arrays away: a pass may delete each as soon as it is converted.
        compiled_peak: compiles a function for the target and returns the bytes that one device needs at the peak, from
            the function, its arguments as shapes, and which of them are donated. Without it passes compile on the
            machine's own backend, if that is the target's.
    """

    inputs: Inputs | None = None
    seed: int = 0
    target: Any = None
    donate: bool = False
    following: "tuple[Pass, ...]" = ()
    compiled_peak: Callable[[Callable[..., Any], tuple[Any, ...], tuple[int, ...]], int] | None = None

    def release(self, old: Any, new: Any) -> None:
        """Deletes the arrays of a parameter that was converted, if the caller gave them away.

        Args:
            old: the parameter as it was.
            new: what stands for it from now on; its own arrays are kept.
        """
        if not self.donate:
            return
        kept = {id(leaf) for leaf in jax.tree.leaves(jax.block_until_ready(new))}
        for leaf in jax.tree.leaves(old):
            if isinstance(leaf, jax.Array) and id(leaf) not in kept and not leaf.is_deleted():
                leaf.delete()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes. A subclass is a frozen, keyword-only dataclass with a docstring, decorated with `@register`.

    Options are checked against the types of the fields when a pass is made, so that every pass has a text form.

    Attributes:
        at: a selector of the sites to work on.
        strict: whether it is an error if `at` selects nothing; otherwise a warning.
    """

    at: str = "**"
    strict: bool = True

    name: ClassVar[str] = ""
    """The name in text, given by `@register`."""
    phase: ClassVar[str] = ""
    """One of `PHASES`; or "any", if it may stand anywhere in a pipeline."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Passes that must have run before."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Passes that it cannot be combined with."""
    after: ClassVar[tuple[str, ...]] = ()
    """Passes that, if present, come before it."""
    contract: ClassVar[Contract] = Exact()
    """By how much it may change what the program computes."""
    changes_parameters: ClassVar[bool] = False
    """Whether it may add, drop or reshape parameters or state."""
    changes_draws: ClassVar[bool] = False
    """Whether it may change random draws: it is then checked in eval mode."""
    paper: ClassVar[str] = ""
    """Where the method comes from: authors, title, year, arXiv number; or "no paper"."""
    example: ClassVar[str] = ""
    """One use, as text."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = text.coerce(getattr(self, field.name), field_types(type(self))[field.name])
            except text.Mismatch as error:
                raise PipelineError(f"{self.name or type(self).__name__}: the option '{field.name}' {error}") from None
            object.__setattr__(self, field.name, value)
        Selector.parse(self.at)

    def run(self, program: Program, context: Context) -> PassResult:
        """Transforms a program, which stays as it is.

        Args:
            program: what to transform.
            context: what else may be used.

        Returns:
            The new program and what was done, site by site.
        """
        raise NotImplementedError

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        """Does to one graph what `run` decided: the half that is replayed when a program meets new shapes.

        Args:
            captured: a graph as it was when this pass ran.
            decisions: those of the result.

        Returns:
            The new graph, or the one given if there is nothing to do in it.
        """
        return captured

    @property
    def undecided(self) -> bool:
        """Whether it chooses options by itself when it runs: `PassResult.settled` has them then."""
        return False

    def promise(self) -> Contract:
        """The contract under these options; by default that of the class."""
        return self.contract

    def mesh_axes(self, target: Any) -> Mapping[str, int] | None:
        """The axes of the mesh that it lays programs over, with their sizes; none if it lays them over none.

        Args:
            target: what the program is meant for; the devices of this process's JAX if none.

        Raises:
            ShardingError: the mesh does not fit them.
        """
        return None

    def select(self, sites: Iterable[AnyNamed], what: str = "site") -> list[AnyNamed]:
        """Those of `sites` that `at` selects; none, if there are none and the pass is not strict.

        Args:
            sites: what there is to select from.
            what: what they are, for the message.

        Raises:
            SelectorError: `at` selects nothing; the message names the closest sites.
        """
        if self.strict:
            return selectors.select(self.at, sites, what=what)
        selector = Selector.parse(self.at)
        return [site for site in sites if selector.matches(site.name, site.kind)]

    def rewrite_graphs(self, program: Program, decisions: Mapping[str, Any]) -> Mapping[Any, Captured]:
        """All graphs of a program after `rewrite`; the program's own mapping if none changed."""
        graphs = {key: self.rewrite(captured, decisions) for key, captured in program.graphs.items()}
        same = all(graphs[key] is captured for key, captured in program.graphs.items())
        return program.graphs if same else graphs

    def __str__(self) -> str:
        """The text form: options that have their default value are left out."""
        types = field_types(type(self))
        written = [
            f"{field.name}={text.write(getattr(self, field.name), types[field.name])}"
            for field in sorted(dataclasses.fields(self), key=lambda field: field.name == "strict")
            if getattr(self, field.name) != default(field)
        ]
        return f"{self.name or type(self).__name__}({', '.join(written)})"


def default(field: "dataclasses.Field[Any]") -> Any:
    """The default of a field; `MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def field_types(pass_type: type[Pass]) -> Mapping[str, Any]:
    """The types of a pass's options."""
    hints = typing.get_type_hints(pass_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(pass_type)}


AnyPass = TypeVar("AnyPass", bound=type[Pass])

_REGISTRY: dict[str, type[Pass]] = {}


def register(name: str) -> Callable[[AnyPass], AnyPass]:
    """Gives a pass its name in text. Stands above `@dataclasses.dataclass(frozen=True, kw_only=True)`.

    Args:
        name: what the pass is called in a pipeline's text.

    Raises:
        TypeError: the class is no pass that can have a text form; says what is missing.
    """

    def decorate(pass_type: AnyPass) -> AnyPass:
        if problem := _problem(name, pass_type):
            raise TypeError(f"@register('{name}') on {pass_type.__name__}: {problem}")
        pass_type.name = name
        _REGISTRY[name] = pass_type
        return pass_type

    return decorate


def _problem(name: str, pass_type: type[Pass]) -> str | None:
    parameters = pass_type.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen or not all(f.kw_only for f in dataclasses.fields(pass_type)):
        return "put it above @dataclasses.dataclass(frozen=True, kw_only=True)"
    if not name.isidentifier():
        return "a name is letters, digits and underscores"
    if pass_type.phase not in (*PHASES, "any"):
        return f"'phase' is one of {', '.join(PHASES)}, any"
    for key, annotation in field_types(pass_type).items():
        if not text.supported(annotation):
            return f"the type of the option '{key}' has no text form"
    other = _REGISTRY.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (pass_type.__module__, pass_type.__qualname__):
        return f"the name belongs to {other.__module__}.{other.__qualname__}"
    return None


def registered() -> Mapping[str, type[Pass]]:
    """All passes by name: those of compax, and those of modules that were imported."""
    importlib.import_module("compax.passes")
    return dict(sorted(_REGISTRY.items()))
