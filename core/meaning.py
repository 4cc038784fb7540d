"""What a graph means: its composites with their names, its axes with theirs, and what remains open.

Computed on demand from one captured graph, once; `Program.meaning` keeps it. What a person declares (`Declaration`)
corrects it where it cannot be known from the graph.
"""

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from compax.analysis.atoms import Factors
from compax.analysis.axes import Axis
from compax.analysis.normal import Node, Val
from compax.axis_names import AXIS_KINDS, AxisNames
from compax.capture import Captured
from compax.composites.attention import find_attentions
from compax.composites.base import Attention, Composite, Mask
from compax.composites.experts import find_experts
from compax.composites.feed_forward import find_feed_forwards
from compax.composites.normalization import find_normalizations
from compax.composites.streams import Residual, find_streams
from compax.composites.view import View
from compax.errors import DeclarationError
from compax.ir import Path
from compax.raising import common_prefix
from compax.selectors import Selector

AnyComposite = TypeVar("AnyComposite", bound=Composite)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a person says of a program, against or beyond what the analyses find.

    Attributes:
        at: a selector of composites; or none.
        axis: the name of an axis; or none.
        kind: for composites "none" (it is not what it was taken for); for an axis one of `AXIS_KINDS`, "fixed" (its
            indices stay where they are) or "free" (they may move, whatever an operation without a rule does with it).
        mask: for attentions: "full", "causal", "window N".
    """

    at: str | None = None
    axis: str | None = None
    kind: str | None = None
    mask: str | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """Something that the graph does not tell.

    Attributes:
        where: the composite, axis or operation in question.
        what: what is not known.
        remedy: what to do about it.
    """

    where: str
    what: str
    remedy: str


class Meaning:
    """What a graph means.

    Attributes:
        view: the graph in normal form, with its axes.
        composites: all composites in order of evaluation.
        streams: the residual streams.
        axes: the axes that parameters, state or arguments have.
        questions: what remains open.
    """

    def __init__(self, captured: Captured, declarations: Sequence[Declaration] = ()):
        self.view = View(captured)
        feed_forwards = find_feed_forwards(self.view)
        experts = find_experts(self.view, feed_forwards)
        inside = {node for found in experts for node in found.nodes}
        normalizations = find_normalizations(self.view)
        found: list[Composite] = [
            *find_attentions(self.view),
            *normalizations,
            *(ff for ff in feed_forwards if ff.down not in inside),
            *experts,
        ]
        found.sort(key=lambda composite: composite.output.number)
        inside |= {node for composite in found for node in composite.nodes}
        self.streams: list[tuple[Residual, ...]] = find_streams(self.view, normalizations, inside)
        self.composites: tuple[Composite, ...] = _declared(_named(self.view, found), declarations)
        self._annotations = captured.entry.source.annotations()
        self._names = AxisNames(self.view, self.composites, self._annotations)
        self.axes: tuple[Axis, ...] = _declared_axes(self._names.axes(), declarations)
        self.questions: tuple[Question, ...] = tuple(self._open())

    def of_kind(self, kind: type[AnyComposite]) -> list[AnyComposite]:
        """All composites of a class."""
        return [composite for composite in self.composites if isinstance(composite, kind)]

    def axis(self, name: str) -> Axis:
        """An axis by its name.

        Raises:
            DeclarationError: there is none of that name.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis
        close = difflib.get_close_matches(name, [axis.name for axis in self.axes], n=5, cutoff=0.0)
        raise DeclarationError(f"no axis '{name}'; closest of {len(self.axes)}: {', '.join(close) or 'none'}")

    def dims(self, x: Val) -> tuple[str, ...]:
        """The dimensions of a value by the names of their axes, such as `("batch", "sequence", "groups*repeats")`."""
        return tuple(map(self.dim_text, self.view.engine.dims[x]))

    def dim_text(self, factors: Factors) -> str:
        """One dimension by the names of its axes: products with `*`, sums with `+`."""
        return self._names.text(factors)

    def parameter_words(self) -> dict[str, tuple[str, ...]]:
        """For each parameter a word for each dimension: the kind of its axis, a product of them, or nothing.

        Groups and their repeats are heads here.
        """
        dims = self.view.engine.dims
        tagged = [(x.input, dims[x]) for x in self.view.normal.inputs]
        return {
            tag.path: tuple(map(self._names.words, factors))
            for tag, factors in tagged
            if tag is not None and tag.kind == "parameter"
        }

    def owners(self) -> dict[Path, Composite]:
        """For operations, by where they stand, the composite that they are part of, or a projection of."""
        found: dict[Path, Composite] = {}
        for composite in self.composites:
            found |= {node.path: composite for node in composite.nodes}
        for attention in self.of_kind(Attention):
            operands = (attention.query, attention.key, attention.value)
            for linear in self.view.projections(operands, attention.output):
                found.setdefault(linear.node.path, attention)
        return found

    def _open(self) -> Iterable[Question]:
        for attention in self.of_kind(Attention):
            mask = attention.mask
            for x in mask.given:
                if x.input is not None and x.input.kind == "argument":
                    name = x.input.path.partition(".")[0]
                    yield Question(
                        attention.name,
                        f"its mask is the argument '{x.input.path}', which says nothing before it is given",
                        f"capture(..., constant=('{name}',)) if it is always the same, or "
                        f"program.declare(at='{attention.name}', mask='causal')",
                    )
            if mask.unknown:
                yield Question(
                    attention.name,
                    f"its mask is not known: {mask.unknown}",
                    f"program.declare(at='{attention.name}', mask='causal') if that is what it is",
                )
            if attention.score == "custom":
                yield Question(
                    attention.name, "its scores are changed in a way that has no name", "it stays as it is written"
                )
        for conflict in self.view.engine.conflicts:
            yield Question(
                conflict.where or conflict.operation,
                f"{conflict.operation} takes dimensions apart in two ways: {conflict.reason}",
                "its axes stay fixed",
            )
        for x in self.view.normal.inputs:
            names = self._annotations.get(x.input.path, ()) if x.input and x.input.kind == "parameter" else ()
            if names and len(names) != len(x.shape):
                yield Question(
                    x.input.path if x.input else "",
                    f"its partitioning metadata names {len(names)} dimensions, and it has {len(x.shape)}",
                    "correct the metadata in the model; the graph decides here",
                )
        for axis in self.axes:
            if len(axis.annotated) > 1:
                places = self._names.annotated[axis.atom]
                listed = ", ".join(f"'{name}' at {place}" for name, place in places.items())
                yield Question(
                    axis.name,
                    f"its graph makes one axis of what partitioning metadata calls {listed}",
                    "correct the metadata if these are logical names; the graph decides here",
                )
        for name, count in self.view.engine.frozen.items():
            yield Question(
                name,
                f"no rule says how {count} operation{'s' if count > 1 else ''} '{name}' relate dimensions",
                "their axes stay fixed; program.declare(axis=..., kind='free') where you know better",
            )


# -- Names of composites ----------------------------------------------------------------------------------------------


def _named(view: View, found: Sequence[Composite]) -> tuple[Composite, ...]:
    """Composites with names from their parameters, an occurrence number where several have the same."""
    absorbed = {node: composite for composite in found for node in composite.nodes}
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for composite in found:
        parameters = composite.parameters or _consumed(view, composite, absorbed)
        modules = [path.rpartition(".")[0] or path for path in parameters]
        name = common_prefix(modules) if modules else ""
        if not name:
            near = [path.rpartition(".")[0] for path in view.near(composite.inputs[0])]
            prefix = common_prefix(near)
            name = f"{prefix}.{composite.kind}" if prefix else composite.kind
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        result.append(dataclasses.replace(composite, name=name, parameters=tuple(parameters)))
    return tuple(result)


def _consumed(view: View, composite: Composite, absorbed: Mapping[Node, Composite]) -> list[str]:
    """The parameters of the linear layers that an attention takes its operands from and gives its result to."""
    found: dict[str, None] = {}
    if isinstance(composite, Attention):
        for x in (composite.query, composite.key, composite.value):
            for linear in view.sources(x):
                if absorbed.get(linear.node) is None:
                    found.update(dict.fromkeys(view.parameters(linear.weight)))
        for linear in view.consumers(composite.output):
            found.update(dict.fromkeys(view.parameters(linear.weight)))
        return list(found)
    for x in composite.inputs[1:]:
        found.update(dict.fromkeys(view.parameters(x)))
    return list(found)


def _declared(composites: Sequence[Composite], declarations: Sequence[Declaration]) -> tuple[Composite, ...]:
    result = list(composites)
    for declaration in declarations:
        if declaration.at is None:
            continue
        selector = Selector.parse(declaration.at)
        chosen = [i for i, x in enumerate(result) if selector.matches(x.name, x.kind)]
        if not chosen:
            raise DeclarationError(
                f"declare(at='{declaration.at}') selects no composite; there are: "
                f"{', '.join(x.name for x in result[:8]) or 'none'}"
            )
        for i in reversed(chosen):
            composite = result[i]
            if declaration.kind == "none":
                del result[i]
            elif declaration.mask is not None:
                if not isinstance(composite, Attention):
                    raise DeclarationError(f"'{composite.name}' is a {composite.kind}, which has no mask")
                result[i] = dataclasses.replace(composite, mask=_parsed(declaration.mask, composite.mask))
    return tuple(result)


def _parsed(text: str, before: Mask) -> Mask:
    word, _, number = text.partition(" ")
    declared = None
    if word == "full" and not number:
        declared = Mask("full")
    elif word == "causal" and not number:
        declared = Mask("causal", window=(-1, 0))
    elif word == "window" and number.isdecimal() and int(number) > 0:
        declared = Mask("window", window=(int(number) - 1, 0))
    if declared is not None:
        return dataclasses.replace(
            declared, padding=before.padding, offset=before.offset, position=before.position, by_keys=before.by_keys
        )
    raise DeclarationError(f"mask='{text}': write 'full', 'causal' or 'window N' with the number of keys that are seen")


def _declared_axes(axes: Sequence[Axis], declarations: Sequence[Declaration]) -> tuple[Axis, ...]:
    result = list(axes)
    for declaration in declarations:
        if declaration.axis is None:
            continue
        chosen = [i for i, axis in enumerate(result) if axis.name == declaration.axis]
        if not chosen:
            raise DeclarationError(
                f"declare(axis='{declaration.axis}'): there is no such axis; there are: "
                f"{', '.join(axis.name for axis in result[:12])}"
            )
        (i,) = chosen
        axis = result[i]
        if declaration.kind == "fixed":
            result[i] = dataclasses.replace(axis, fixed=(*axis.fixed, "declared fixed"))
        elif declaration.kind == "free":
            result[i] = dataclasses.replace(axis, fixed=())
        elif declaration.kind in AXIS_KINDS:
            result[i] = dataclasses.replace(axis, name=declaration.kind)
        else:
            raise DeclarationError(
                f"declare(axis='{declaration.axis}', kind='{declaration.kind}'): a kind is one of "
                f"{', '.join(AXIS_KINDS)}, fixed, free"
            )
    return tuple(result)
