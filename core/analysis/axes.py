"""Axes: which dimensions of all values belong together.

Every dimension of every value in the normal form is a list of atoms (`compax.analysis.atoms`); one pass over the nodes
unifies them by the rules of `compax.analysis.axes_rules`. What comes out serves attention matching (batch, queries,
keys, heads and head size told apart by identity, whatever the layout), sharding (an axis on a mesh axis everywhere) and
pruning (an axis loses indices everywhere).

Three things are kept beside the dimensions. *Uses*: where a table (constants, repetitions, random draws) meets an axis,
its own dimensions stay apart, and the use says what they stand for there. *Index spaces*: integers that `top_k` and kin
make are indices of an axis, so that a one-hot comparison or a gather by them is understood. *Members*: slices of one
index each, `w[0]`, `w[1]`, ..., that go through equal computations and are stacked or added up are a family that covers
the axis.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from compax import _jax
from compax.analysis.atoms import Atom, Atoms, Factors, Tangle, size_of
from compax.analysis.axes_rules import RULES, check_sizes
from compax.analysis.normal import Node, Normal, Val, rearranged

Member = tuple[Factors, int]
Dims = tuple[Factors, ...]


@dataclasses.dataclass(frozen=True)
class Conflict:
    """An operation that takes dimensions apart in a way that does not fit what was found before.

    Attributes:
        operation: its name.
        where: where the model's code asked for it.
        reason: what does not fit.
    """

    operation: str
    where: str
    reason: str


class Engine:
    """Walks the nodes of a normal form; see the module.

    Attributes:
        normal: the normal form.
        atoms: what dimensions are made of.
        dims: the dimensions of each value.
        uses: what a table's dimensions stand for, by (number of the node, position of the operand).
        positional: those uses in which a table counts indices, and so does not follow them when they move.
        indices: values that are indices, with the dimension that they point into.
        members: values that belong to one index of a family.
        conflicts: what did not fit.
        frozen: operations without a rule, and how many there are.
    """

    def __init__(self, normal: Normal):
        self.normal = normal
        self.atoms = Atoms()
        self.dims: dict[Val, Dims] = {}
        self.uses: dict[tuple[int, int], Dims] = {}
        self.positional: set[tuple[int, int]] = set()
        self.indices: dict[Val, Factors] = {}
        self.members: dict[Val, Member] = {}
        self.conflicts: list[Conflict] = []
        self.frozen: dict[str, int] = {}
        self._iotas: set[Atom] = set()
        self._turns: dict[Any, Factors] = {}
        self._taken: list[tuple[Factors, int]] = []
        self._mixed: list[tuple[Factors, str]] = []
        self._shapes: dict[Val, int] = {}
        self._partial: dict[Val, tuple[Factors, frozenset[int], int]] = {}

    def run(self) -> None:
        """Finds the dimensions of all values."""
        for x in self.normal.inputs:
            self.dims[x] = tuple(map(self.atoms.fresh, x.shape))
        for node in self.normal.nodes:
            for x in node.inputs:
                if x.node is None or node.name != "carry":
                    self._known(x)
            self._visit(node)
        for node in self.normal.nodes_named("carry"):
            self._guarded(node, lambda node=node: self.into(node, 1, list(self.dims[node.outputs[0]])))
        for x in self.normal.outputs:
            self._known(x)
        for x, state in zip(self.normal.outputs, self.normal.updated, strict=True):
            if state is not None:
                self._update(x, state)
        for problem in self.atoms.close():
            self.conflicts.append(Conflict("concatenate", "", problem))
        self._close_families()
        for x in self.normal.inputs:
            if x.input is not None and x.input.kind == "argument":
                for factors in self.dims[x]:
                    self.atoms.freeze(factors, "an input")
        for x, state in zip(self.normal.outputs, self.normal.updated, strict=True):
            for factors in self.dims[x] if state is None else ():
                self.atoms.freeze(factors, "an output")

    def _update(self, x: Val, state: Val) -> None:
        """State after the call has the dimensions of state before it."""
        try:
            for after, before in zip(self.dims[x], self.dims[state], strict=True):
                self.atoms.unify(before, after)
        except Tangle as tangle:
            self.conflicts.append(Conflict("state", "", str(tangle)))
            for factors in (*self.dims[x], *self.dims[state]):
                self.atoms.freeze(factors, "state that is written in another form")

    def _visit(self, node: Node) -> None:
        rule = RULES.get(node.name)
        if rule is None:
            self.opaque(node)
            return
        self._guarded(node, lambda: rule(self, node))
        if node.name not in ("slice", "unstack", "stack"):
            self._mix(node)

    def _guarded(self, node: Node, step: Any) -> None:
        try:
            step()
        except Tangle as tangle:
            where = node.op.equation
            self.conflicts.append(Conflict(node.name, "" if where is None else _jax.source_text(where), str(tangle)))
            self._freeze_all(node, f"{node.name} regroups it")

    def _known(self, x: Val) -> Dims:
        """The dimensions of a value; those of a constant that is met for the first time are a table's."""
        if x not in self.dims:
            self.dims[x] = tuple(self.atoms.fresh(size, table=True) for size in x.shape)
        return self.dims[x]

    # -- what rules call ----------------------------------------------------------------------------------------------

    def set(self, x: Val, dims: Sequence[Factors]) -> None:
        """Writes the dimensions of a result."""
        check_sizes(x, dims)
        self.dims[x] = tuple(dims)

    def together(self, node: Node, positions: Iterable[int], skip: Sequence[int] = ()) -> list[Factors]:
        """The dimensions that some operands share, all made one but those in `skip`."""
        positions = list(positions)
        chosen = list(self.dims[node.inputs[positions[0]]])
        for i in positions[1:]:
            for dim, factors in enumerate(self.dims[node.inputs[i]]):
                if not chosen[dim]:
                    chosen[dim] = factors
                elif factors and dim not in skip and factors is not chosen[dim]:
                    chosen[dim] = self._prefer(chosen[dim], factors)
        for i in positions:
            self._use(node, i, chosen, skip)
        return chosen

    def same(self, node: Node, one: tuple[int, int], other: tuple[int, int]) -> Factors:
        """Two dimensions (operand, dimension) are one; returns it."""
        pairs = [(i, dim, self.dims[node.inputs[i]][dim]) for i, dim in (one, other)]
        chosen = self._prefer(pairs[0][2], pairs[1][2])
        for i, dim, _ in pairs:
            dims = list(self.uses.get((node.number, i), self.dims[node.inputs[i]]))
            dims[dim] = chosen
            self._use(node, i, dims)
        return chosen

    def into(self, node: Node, position: int, dims: Sequence[Factors]) -> None:
        """An operand has given dimensions."""
        for mine, theirs in zip(self._known(node.inputs[position]), dims, strict=True):
            self.atoms.unify(mine, theirs)
        self._use(node, position, dims)

    def _prefer(self, one: Factors, other: Factors) -> Factors:
        """The dimension that two are, with real atoms in place of those of tables."""
        self.atoms.unify(one, other)
        a, b = self.atoms.expand(one), self.atoms.expand(other)
        if not any(x.table for x in a):
            return a
        assert [x.size for x in a] == [x.size for x in b]
        return tuple(y if x.table else x for x, y in zip(a, b, strict=True))

    def _use(self, node: Node, position: int, dims: Sequence[Factors], skip: Sequence[int] = ()) -> None:
        own = self.dims[node.inputs[position]]
        for dim, (mine, theirs) in enumerate(zip(own, dims, strict=True)):
            if mine is not theirs and dim not in skip and any(x.table for x in mine):
                wanted = [m if d in skip or not m else t for d, (m, t) in enumerate(zip(own, dims, strict=True))]
                if any(not x.table for x in wanted[dim]):
                    self.uses[node.number, position] = tuple(wanted)
                    return

    def ordered(self, size: int, node: Node) -> Factors:
        """A new dimension whose order matters."""
        factors = self.atoms.fresh(size)
        self.atoms.freeze(factors, f"made by {node.name}")
        return factors

    def opaque(self, node: Node) -> None:
        """Nothing is known of an operation: whatever it touches stays as it is."""
        self.frozen[node.name] = self.frozen.get(node.name, 0) + 1
        self._freeze_all(node, f"no rule for {node.name}")

    def _freeze_all(self, node: Node, reason: str) -> None:
        for x in node.outputs:
            if x not in self.dims:
                self.dims[x] = tuple(self.atoms.fresh(size) for size in x.shape)
        for x in (*node.inputs, *node.outputs):
            for factors in self.dims.get(x, ()):
                self.atoms.freeze(factors, reason)

    def turns(self, node: Node, length: int) -> Factors:
        """The turns of the loop that a node belongs to."""
        if node.path not in self._turns:
            self._turns[node.path] = self.atoms.fresh(length)
            self.atoms.freeze(self._turns[node.path], "turns of a loop")
        return self._turns[node.path]

    @property
    def loops(self) -> list[Factors]:
        """The turns of all loops."""
        return list(self._turns.values())

    # -- index spaces -------------------------------------------------------------------------------------------------

    def count_up(self, factors: Factors) -> None:
        """A dimension of a table that counts."""
        self._iotas.update(factors)

    def indexed(self, x: Val, dim: int, index: Val | None, node: Node) -> Factors:
        """A dimension of `x` is addressed by `index`: its order matters, unless the indices follow it."""
        factors = self.dims[x][dim]
        space = None if index is None else self.indices.get(index)
        if space is not None and size_of(space) == size_of(factors):
            self.atoms.unify(space, factors)
            return self._prefer(factors, space)
        if size_of(factors) > 1:
            by = f"in {node.name}" if index is None else f"by {_origin(index)}"
            self.atoms.freeze(factors, f"addressed {by}")
        return factors

    def pass_index(self, node: Node) -> None:
        """A rearrangement of indices is indices."""
        if node.inputs[0] in self.indices:
            self.indices[node.outputs[0]] = self.indices[node.inputs[0]]

    def track_index(self, node: Node) -> None:
        """Indices through elementwise operations: casts keep them, comparisons with a count or a number pick out."""
        tagged = [i for i, x in enumerate(node.inputs) if x in self.indices]
        if not tagged:
            return
        if node.name == "convert_element_type":
            self.indices[node.outputs[0]] = self.indices[node.inputs[0]]
            return
        space = self.indices[node.inputs[tagged[0]]]
        if node.name in ("eq", "ne") and len(tagged) == 1:
            other = node.inputs[1 - tagged[0]]
            if other.constant is not None and np.ndim(other.constant) == 0:
                self.take(space, int(other.constant), node.outputs[0], alone=True)
                return
            dims = list(self.dims[node.outputs[0]])
            for dim, factors in enumerate(self.dims.get(other, ())):
                if factors and set(factors) <= self._iotas and size_of(factors) == size_of(space):
                    dims[dim] = self.atoms.expand(space)
                    self.dims[node.outputs[0]] = tuple(dims)
                    for position in (0, 1):
                        self.uses[node.number, position] = tuple(dims)
                        self.positional.add((node.number, position))
                    return
        if node.name == "lt" or (node.name in ("min", "max", "clamp") and len(tagged) == 1):
            return
        self.atoms.freeze(space, f"its indices go through {node.name}")

    # -- members of families ------------------------------------------------------------------------------------------

    def take(self, factors: Factors, index: int, output: Val, *, alone: bool) -> None:
        """One index of a dimension is taken; `alone`: and nothing else is cut."""
        factors = self.atoms.expand(factors)
        if not factors:
            return
        if factors[0].table:
            return
        if alone:
            self.members[output] = (factors, index)
            self._taken.append((factors, index))
        else:
            self._mixed.append((factors, "one index is taken"))

    def end_members(self, inputs: Sequence[Val]) -> Factors | None:
        """The dimension that values put together are the members of, in order; none if they are not."""
        found = [self.members[x] for x in inputs if x in self.members]
        if not found:
            return None
        family = found[0][0]
        whole = [index for _, index in found] == list(range(size_of(family))) and len(found) == len(inputs)
        if whole and len({self._shape(x) for x in inputs}) == 1 and self._one_family(found):
            return self.atoms.expand(family)
        self._apart(found)
        return None

    def _one_family(self, found: Sequence[Member]) -> bool:
        """Makes the families of members one, where they can be."""
        first = found[0][0]
        if any(size_of(family) != size_of(first) for family, _ in found):
            return False
        try:
            for family, _ in found[1:]:
                self.atoms.unify(first, family)
        except Tangle:
            return False
        return True

    def _apart(self, found: Iterable[Member]) -> None:
        self._mixed.extend((family, "its indices are treated differently") for family, _ in found)

    def _mix(self, node: Node) -> None:
        """A value computed from a member is one too; different members may only be added up, all of them."""
        found = [self.members[x] for x in node.inputs if x in self.members]
        partial = [x for x in node.inputs if x in self._partial]
        if not (found or partial) or not node.outputs or node.outputs[0] in self.members:
            return
        if not partial and all(index == found[0][1] for _, index in found) and self._one_family(found):
            self.members.update(dict.fromkeys(node.outputs, found[0]))
        elif node.name not in ("add", "add_any") or not self._added(node):
            self._apart(found)
            self._apart((self._partial[x][0], 0) for x in partial)

    def _added(self, node: Node) -> bool:
        """Adds members up; a sum of all of them is a member no more."""
        terms = [self._term(x) for x in node.inputs]
        if len(terms) != 2 or None in terms:
            return False
        (one, indices, shape), (other, more, other_shape) = (term for term in terms if term is not None)
        if shape != other_shape or indices & more or not self._one_family([(one, 0), (other, 0)]):
            return False
        if len(indices | more) < size_of(one):
            self._partial[node.outputs[0]] = (one, indices | more, shape)
        return True

    def _term(self, x: Val) -> tuple[Factors, frozenset[int], int] | None:
        if x in self.members:
            family, index = self.members[x]
            return family, frozenset((index,)), self._shape(x)
        return self._partial.get(x)

    def _shape(self, x: Val) -> int:
        """What was computed to get a member, the same for all members of a family."""
        if x not in self._shapes:
            node = x.node
            if node is None or x not in self.members:
                self._shapes[x] = id(x)
            else:
                attributes = {k: v for k, v in node.attributes.items() if k not in ("start_indices", "limit_indices")}
                inputs = [self._shape(y) for y in node.inputs]
                if node.name == "eq" and node.inputs[1].constant is not None:
                    inputs = inputs[:1]
                self._shapes[x] = hash((node.name, x.index if node.name != "unstack" else 0, repr(attributes), *inputs))
        return self._shapes[x]

    def _close_families(self) -> None:
        taken: dict[Factors, set[int]] = {}
        for factors, index in self._taken:
            taken.setdefault(self.atoms.expand(factors), set()).add(index)
        for factors, indices in taken.items():
            if len(indices) < size_of(factors):
                self.atoms.freeze(factors, "single indices are taken")
        for x in self.normal.outputs:
            if (term := self._term(x)) is not None:
                self._apart([(term[0], 0)])
        for factors, reason in self._mixed:
            self.atoms.freeze(factors, reason)


def _origin(index: Val) -> str:
    """What indices come from, for a reason."""
    index = rearranged(index)
    return "constants" if index.static else f"an {index.input.kind}" if index.input is not None else "computed indices"


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """An axis: one atom, wherever it occurs.

    Attributes:
        name: such as `model` or `blocks.0.mlp.hidden`; unique among the axes of a graph.
        size: number of indices.
        atom: what it is in the graph's `Engine`.
        parameters: for each parameter that has it, the dimensions in which it is.
        fixed: why its indices must stay where they are; empty if they may move or go.
        annotated: what the model's author calls it in partitioning metadata of Flax, in order of first use.
    """

    name: str
    size: int
    atom: Atom
    parameters: dict[str, tuple[int, ...]]
    fixed: tuple[str, ...]
    annotated: tuple[str, ...] = ()
