"""A graph as recognition sees it: its normal form, its axes, and which contractions are linear layers."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from compax.analysis.atoms import Atom, Factors
from compax.analysis.axes import Engine
from compax.analysis.normal import Depends, Node, Normal, Val, rearranged
from compax.capture import Captured

LAYOUT = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "split", "concatenate", "rev", "pad", "scan_slice"}
    | {"convert_element_type", "dynamic_slice", "stack", "unstack", "tile"}
)
"""Operations that only rearrange."""


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A contraction with parameters.

    Attributes:
        node: the product.
        x: what is multiplied.
        weight: the operand that parameters alone determine.
        position: which operand that is.
    """

    node: Node
    x: Val
    weight: Val
    position: int

    @property
    def output(self) -> Val:
        """The product's result."""
        return self.node.outputs[0]


class View:
    """A captured graph with everything that recognition asks of it.

    Attributes:
        normal: the normal form.
        engine: dimensions of all values.
        linears: linear layers by their node.
    """

    def __init__(self, captured: Captured):
        self.normal = Normal(captured)
        self.engine = Engine(self.normal)
        self.engine.run()
        self.linears: dict[Node, Linear] = {}
        for node in self.normal.nodes_named("dot_general", "ragged_dot_general", "conv_general_dilated"):
            sides = [i for i in (0, 1) if parameter_only(node.inputs[i])]
            if len(sides) == 1:
                (side,) = sides
                self.linears[node] = Linear(node, node.inputs[1 - side], node.inputs[side], side)
        self._dynamic = self._products()
        self._parameters: dict[Val, tuple[str, ...]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._keys: dict[Val, int] = {}
        self.memo: dict[Hashable, Any] = {}

    def key(self, x: Val, cut: Mapping[Val, Hashable] | None = None) -> int:
        """A number that is the same for values that are computed in the same way from the same values.

        Args:
            x: the value.
            cut: values at which to stop, with what stands for them.
        """
        known = self._keys if not cut else {y: self._number(("cut", name)) for y, name in cut.items()}
        waiting = [x]
        while waiting:
            y = waiting[-1]
            node = y.node
            if y in known:
                waiting.pop()
                continue
            if node is None or node.name == "carry":
                known[y] = self._number((id(y),) if np.size(y.constant) != 1 else ("constant", scalar(y), str(y.dtype)))
                continue
            missing = [z for z in node.inputs if z not in known]
            if missing:
                waiting.extend(missing)
                continue
            attributes = tuple(sorted((name, _hashable(value)) for name, value in node.attributes.items()))
            known[y] = self._number((node.name, y.index, y.shape, attributes, *(known[z] for z in node.inputs)))
        return known[x]

    def _number(self, description: Hashable) -> int:
        return self._numbers.setdefault(description, len(self._numbers))

    def _products(self) -> set[Val]:
        """The values that come out of a product, or are computed from one."""
        found: set[Val] = set()
        for node in self.normal.nodes:
            if node.name in ("dot_general", "conv_general_dilated", "ragged_dot_general", "carry") or any(
                x in found for x in node.inputs
            ):
                found.update(node.outputs)
        return found

    def follows_product(self, x: Val) -> bool:
        """Whether a value is, or is computed from, the result of a product."""
        return x in self._dynamic

    def linear(self, x: Val) -> Linear | None:
        """The linear layer whose product a value is."""
        return None if x.node is None else self.linears.get(x.node)

    # -- dimensions ---------------------------------------------------------------------------------------------------

    def factors(self, x: Val, dim: int) -> Factors:
        """A dimension of a value in its finest factors."""
        return self.engine.atoms.expand(self.engine.dims[x][dim])

    def leaves(self, x: Val) -> set[Atom]:
        """All atoms that the dimensions of a value come down to."""
        return {atom for factors in self.engine.dims[x] for atom in self.engine.atoms.leaves(factors)}

    # -- walking ------------------------------------------------------------------------------------------------------

    def upstream(self, x: Val, through: Callable[[Node], bool], limit: int = 4096) -> Iterator[Val]:
        """A value and what it comes from, nearest first, through the nodes that a test admits.

        A value that a loop carries comes from its initial value.
        """
        waiting, seen = [x], {x}
        for value in waiting:
            yield value
            if value.node is not None and through(value.node) and len(waiting) < limit:
                inputs = value.node.inputs[:1] if value.node.name == "carry" else value.node.inputs
                fresh = [y for y in inputs if y not in seen]
                seen.update(fresh)
                waiting.extend(fresh)

    def parameters(self, x: Val) -> tuple[str, ...]:
        """The paths of the parameters that a value which parameters determine derives from."""
        if x not in self._parameters:
            found = self.upstream(x, lambda node: True)
            self._parameters[x] = tuple(
                dict.fromkeys(y.input.path for y in found if y.input is not None and y.input.kind == "parameter")
            )
        return self._parameters[x]

    def near(self, x: Val) -> tuple[str, ...]:
        """The parameters nearest upstream: those of the first linear layers that one meets, and what lies between."""
        found: dict[str, None] = {}
        for y in self.upstream(x, lambda node: node not in self.linears, limit=256):
            linear = self.linear(y)
            if linear is not None:
                found.update(dict.fromkeys(self.parameters(linear.weight)))
            elif y.input is not None and y.input.kind == "parameter":
                found[y.input.path] = None
        return tuple(found)

    def sources(self, x: Val, limit: int = 256) -> list[Linear]:
        """The linear layers nearest upstream, through anything that is no linear layer and no other product."""
        through = lambda node: node.name not in ("dot_general", "conv_general_dilated", "ragged_dot_general")  # noqa: E731
        found = (self.linear(y) for y in self.upstream(x, through, limit))
        return [linear for linear in found if linear is not None]

    def projections(self, operands: Iterable[Val], result: Val) -> list[Linear]:
        """The linear layers that some values come from, and those that take another."""
        return [*(linear for x in operands for linear in self.sources(x)), *self.consumers(result)]

    def contracted(self, linear: Linear) -> Factors:
        """What a linear layer sums over; nothing for convolutions and grouped products."""
        if linear.node.name != "dot_general":
            return ()
        contract = linear.node.attributes["dimension_numbers"][0][linear.position]
        return tuple(atom for dim in contract for atom in self.factors(linear.weight, dim))

    def consumers(self, x: Val, limit: int = 64) -> Iterator[Linear]:
        """The linear layers that take a value, rearranged or not."""
        waiting, seen = [x], {x}
        for value in waiting:
            for node in self.normal.readers(value):
                linear = self.linears.get(node)
                if linear is not None and linear.x is value:
                    yield linear
                elif node.name in LAYOUT and len(waiting) < limit and node.outputs[0] not in seen:
                    seen.add(node.outputs[0])
                    waiting.append(node.outputs[0])


def parameter_only(x: Val) -> bool:
    """Whether parameters alone determine a value, and it is not the same for all of them."""
    return bool(x.depends & Depends.PARAMETER) and not x.depends & ~(Depends.PARAMETER | Depends.TURN)


def scalar(x: Val) -> float | None:
    """The number that a value is everywhere, if it is a constant."""
    x = unbroadcast(x)
    if x.constant is None or np.size(x.constant) != 1:
        return None
    return float(np.asarray(x.constant).reshape(()).astype(np.float32))


def unbroadcast(x: Val) -> Val:
    """What a value repeats or rearranges without picking from it."""
    return rearranged(x, ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type"))


def _hashable(value: Any) -> str:
    """What tells two static parameters of operations apart."""
    return f"{id(value)}" if callable(value) else str(value)
