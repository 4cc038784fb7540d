"""What a graph means: its composites with their names, its axes with theirs, and what remains open.

Computed on demand from one captured graph, once; `Program.meaning` keeps it. What a person declares (`Declaration`)
corrects it where it cannot be known from the graph.
"""

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from compax.analysis.atoms import Atom, Factors
from compax.analysis.axes import Axis
from compax.analysis.normal import Node, Val
from compax.capture import Captured
from compax.composites.attention import find_attentions
from compax.composites.base import Attention, Composite, Experts, FeedForward, Mask
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

AXIS_KINDS = (
    "batch", "sequence", "model", "heads", "groups", "head_size", "hidden", "experts", "vocabulary", "layers"
)  # fmt: skip
"""Names of axes whose meaning is plain."""

_WORDS = frozenset(AXIS_KINDS) | {"repeats", "value_size", "fused", "rows"}


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
        self._labels = _Labels(self)
        self.axes: tuple[Axis, ...] = self._labels.axes(declarations)
        self._by_atom = {axis.atom: axis for axis in self.axes}
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
        return self._labels.text(factors)

    def parameter_words(self) -> dict[str, tuple[str, ...]]:
        """For each parameter a word for each dimension: the kind of its axis, a product of them, or nothing.

        Groups and their repeats are heads here.
        """
        dims = self.view.engine.dims
        tagged = [(x.input, dims[x]) for x in self.view.normal.inputs]
        return {
            tag.path: tuple(map(self._labels.words, factors))
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


# -- Names of axes ----------------------------------------------------------------------------------------------------


class _Labels:
    """Names of atoms, from the composites that they belong to."""

    def __init__(self, meaning: Meaning):
        self.meaning = meaning
        self.view = meaning.view
        self.engine = meaning.view.engine
        self.names: dict[Atom, str] = {}
        self.taken: collections.Counter[str] = collections.Counter()
        self.parameters = self._parameters()
        self._from_composites()
        self._from_tables()
        self._from_loops()
        self._from_places()

    def _parameters(self) -> dict[Atom, dict[str, list[int]]]:
        """For each leaf the parameters and their dimensions in which it occurs."""
        result: dict[Atom, dict[str, list[int]]] = {}
        for x in self.view.normal.inputs:
            assert x.input is not None
            if x.input.kind == "parameter":
                for dim, factors in enumerate(self.engine.dims[x]):
                    for atom in self.engine.atoms.leaves(factors):
                        result.setdefault(atom, {}).setdefault(x.input.path, []).append(dim)
        return result

    def _from_composites(self) -> None:
        model: list[tuple[Factors, str]] = []
        for composite in self.meaning.composites:
            if isinstance(composite, FeedForward):
                self.put(composite.hidden, f"{composite.name}.hidden")
                model.append((self.view.contracted(self.view.linears[composite.up]), composite.name))
            elif isinstance(composite, Experts):
                self.put(composite.experts, f"{composite.name}.experts")
                self.put(composite.hidden, f"{composite.name}.hidden")
                model.append((self.view.contracted(self.view.linears[composite.router]), composite.name))
            elif isinstance(composite, Attention):
                grouped = bool(composite.repeats)
                self.put(composite.groups, f"{composite.name}.{'groups' if grouped else 'heads'}")
                self.put(composite.repeats, f"{composite.name}.{'repeats' if composite.groups else 'heads'}")
                self.put(composite.head_size, f"{composite.name}.head_size")
                self.put(composite.value_size, f"{composite.name}.value_size")
                for x in (composite.query, composite.key):
                    model += [(self.view.contracted(linear), composite.name) for linear in self.view.sources(x)]
        self.shared([(factors, "model", name) for factors, name in model])
        attentions = self.meaning.of_kind(Attention)
        self.shared([(attention.batch, "batch", attention.name) for attention in attentions])
        positions = [(a.queries, "sequence", a.name) for a in attentions]
        self.shared(positions + [(a.keys, "sequence", a.name) for a in attentions])

    def _from_tables(self) -> None:
        """Tables whose rows are picked by an argument: vocabularies, learned positions."""
        tables: list[tuple[int, Factors, str]] = []
        for node in self.view.normal.nodes_named("gather"):
            table = node.inputs[0]
            paths = self.view.parameters(table) if not table.static else ()
            if len(table.shape) >= 2 and paths:
                dims = node.attributes["dimension_numbers"].collapsed_slice_dims
                tables += [(table.shape[dim], self.view.factors(table, dim), paths[0]) for dim in dims]
        tables.sort(key=lambda item: -item[0])
        for position, (_, factors, path) in enumerate(tables):
            self.put(factors, "vocabulary" if position == 0 else f"{path.rpartition('.')[0] or path}.rows")

    def _from_loops(self) -> None:
        turns = self.engine.loops
        for factors in turns:
            owners = sorted({path for atom in factors for path in self.parameters.get(atom, ())})
            prefix = common_prefix([path.rpartition(".")[0] for path in owners]) if len(turns) > 1 else ""
            self.put(factors, f"{prefix}.layers" if prefix else "layers")

    def _from_places(self) -> None:
        """What has no better name is called after the first parameter or argument that it occurs in."""
        for x in self.view.normal.inputs:
            assert x.input is not None
            for dim, factors in enumerate(self.engine.dims[x]):
                for atom in self.engine.atoms.expand(factors):
                    if atom not in self.names:
                        named = [self.names[part] for part in self.engine.atoms.leaves((atom,)) if part in self.names]
                        owner = common_prefix(named) if atom.segments else ""
                        self.put((atom,), f"{owner}.fused" if owner else f"{x.input.path}.{dim}")

    def shared(self, found: Sequence[tuple[Factors, str, str]]) -> None:
        """Names of axes that several composites share: plain if there is one, with a prefix if there are more."""
        owners: dict[Atom, list[str]] = {}
        words: dict[Atom, str] = {}
        for factors, word, owner in found:
            for atom in factors:
                if atom not in self.names:
                    owners.setdefault(atom, []).append(owner)
                    words[atom] = word
        kinds = collections.Counter(words.values())
        for atom, names in owners.items():
            prefix = common_prefix(names) if kinds[words[atom]] > 1 else ""
            self.put((atom,), f"{prefix}.{words[atom]}" if prefix else words[atom])

    def put(self, factors: Factors, name: str) -> None:
        """Names atoms; several factors of one dimension are numbered, so are parts of a sum."""
        factors = self.engine.atoms.expand(factors)
        for atom in factors:
            if atom in self.names or atom.table:
                continue
            self.taken[name] += 1
            own = name if self.taken[name] == 1 else f"{name}#{self.taken[name]}"
            self.names[atom] = own
            for segment in dict.fromkeys(atom.segments):
                for part in self.engine.atoms.expand(segment):
                    if part not in self.names and not part.table:
                        self.put((part,), f"{own}.part")

    def text(self, factors: Factors) -> str:
        parts = [self.names.get(atom, f"({atom.size})") for atom in self.engine.atoms.expand(factors)]
        return "*".join(parts) or "1"

    def words(self, factors: Factors) -> str:
        """One dimension by kinds of axes alone, parts of an axis as the axis; nothing where no factor has a kind."""
        found: dict[str, None] = {}
        for atom in self.engine.atoms.expand(factors):
            parts = [part for part in self.names.get(atom, "").partition("#")[0].split(".") if part != "part"]
            found[parts[-1] if parts and parts[-1] in _WORDS else str(atom.size)] = None
        return "" if all(map(str.isdigit, found)) else "*".join(found).replace("groups*repeats", "heads")

    def axes(self, declarations: Sequence[Declaration]) -> tuple[Axis, ...]:
        inputs: dict[Atom, None] = {}
        for x in self.view.normal.inputs:
            for factors in self.engine.dims[x]:
                inputs.update(dict.fromkeys(self.engine.atoms.leaves(factors)))
        for atom in inputs:
            if atom not in self.names:
                self.put((atom,), "axis")
        result = []
        for atom in inputs:
            parameters = {path: tuple(dims) for path, dims in self.parameters.get(atom, {}).items()}
            result.append(Axis(self.names[atom], atom.size, atom, parameters, tuple(atom.reasons)))
        return _declared_axes(result, declarations)


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
