"""What joins a large array in elementwise operations, of which one axis matters: here, logits and the vocabulary.

Told by where it comes from and by evaluation: a number, one value for each index of the axis, one for each other index
(for each token), or a one-hot: something that tells whether the index is the token's label.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import ir, lowering
from compax.ir import Graph, Literal, Op, Operand, Value

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls that can be inlined."""

CONSTRAINTS = frozenset({"constrain", "sharding_constraint"})
"""Operations that say how their operand lies on a mesh."""

COPIES = CONSTRAINTS | {"copy", "copy_p", "name", "compress", "optimization_barrier", "reduce_precision"}
"""Operations that hand their operand on."""

_LARGEST = 1 << 22


class Inline(Exception):
    """A call has to be inlined first.

    Attributes:
        op: the call.
    """

    def __init__(self, op: Op):
        super().__init__(op.name)
        self.op = op


@dataclasses.dataclass(frozen=True, eq=False)
class Scalar:
    """One number: an operand of size one."""

    operand: Operand


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """One value for each index of the axis: an operand of the axis's size, and dimensions of size one."""

    operand: Value


@dataclasses.dataclass(frozen=True, eq=False)
class Narrow:
    """One value for each token.

    Attributes:
        operand: the value.
        dims: for each of its dimensions which one it is in the large array.
        shape: the shape of the large array.
        dim: the axis, over which it is constant.
    """

    operand: Operand
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    dim: int

    def on_tokens(self, array: jax.Array) -> jax.Array:
        """The operand's array in the shape of the large array without the axis."""
        if array.ndim == 0:
            return jnp.broadcast_to(array, self.shape[: self.dim] + self.shape[self.dim + 1 :])
        kept = [d for d in range(array.ndim) if self.dims[d] != self.dim]
        array = jnp.reshape(array, [array.shape[d] for d in kept])
        places = [self.dims[d] - (self.dims[d] > self.dim) for d in kept]
        sizes = list(self.shape[: self.dim] + self.shape[self.dim + 1 :])
        return jax.lax.broadcast_in_dim(array, sizes, places)


@dataclasses.dataclass(frozen=True, eq=False)
class OneHot:
    """`on` where the index is the token's label, `off` elsewhere, times something for each token.

    Attributes:
        labels: the labels.
        on: the value at the label.
        off: the value elsewhere.
        factors: what it is multiplied by, token by token.
    """

    labels: Narrow
    on: float = 1.0
    off: float = 0.0
    factors: tuple[Narrow, ...] = ()


Side = Scalar | Spread | Narrow | OneHot


class Sides:
    """Tells what operands of a graph are.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.producers = graph.producers()
        self.constants = dict(graph.constants)
        self._known: dict[Value, np.ndarray | None] = {}

    def side(self, x: Operand, shape: Sequence[int], dim: int) -> Side | None:
        """What an operand is to an array of a shape with an axis at `dim`; none if it is nothing of these.

        Raises:
            Inline: that depends on what is in a call.
        """
        shape = tuple(shape)
        if isinstance(x, Literal) or math.prod(x.shape) == 1:
            return Scalar(x)
        if len(x.shape) != len(shape):
            return None
        sized = [d for d, size in enumerate(x.shape) if size != 1]
        if sized == [dim]:
            return Spread(x)
        if dim not in sized:
            return Narrow(x, tuple(range(len(shape))), shape, dim)
        op = self.producers.get(x)
        if op is None:
            return None
        if op.name in CALLS:
            raise Inline(op)
        if op.name == "broadcast_in_dim":
            return self._broadcast(op, shape, dim)
        if op.name in COPIES or op.name in ("convert_element_type", "stop_gradient"):
            found = self.side(op.inputs[0], shape, dim)
            # What a conversion or a stopped gradient does to other sides would be lost.
            return found if isinstance(found, OneHot) or op.name in CONSTRAINTS else None
        if op.name == "eq":
            return self._comparison(op, shape, dim)
        return self._scaled(op, shape, dim)

    def _broadcast(self, op: Op, shape: tuple[int, ...], dim: int) -> Side | None:
        y, dims = op.inputs[0], op.attributes["broadcast_dimensions"]
        if isinstance(y, Literal) or math.prod(y.shape) == 1:
            return Scalar(y)
        sized = [dims[d] for d, size in enumerate(y.shape) if size != 1]
        if sized == [dim]:
            return Spread(y)
        if dim not in sized:
            return Narrow(y, tuple(dims), shape, dim)
        return self.side(y, shape, dim)

    def _comparison(self, op: Op, shape: tuple[int, ...], dim: int) -> OneHot | None:
        """Whether an index is a label."""
        sides = [self.side(x, shape, dim) for x in op.inputs]
        for index, labels in (sides, sides[::-1]):
            if not isinstance(index, Spread) or not isinstance(labels, Narrow):
                continue
            if not jnp.issubdtype(labels.operand.dtype, jnp.integer):
                continue
            positions = self.known(index.operand)
            if positions is not None and np.array_equal(positions.ravel(), np.arange(shape[dim])):
                return OneHot(labels)
        return None

    def _scaled(self, op: Op, shape: tuple[int, ...], dim: int) -> OneHot | None:
        """A one-hot with other values, or times something for each token."""
        if op.name == "select_n":
            which, off, on = (self.side(x, shape, dim) for x in op.inputs)
            values = [self.number(x.operand) for x in (off, on) if isinstance(x, Scalar)]
            if not isinstance(which, OneHot) or (which.on, which.off) != (1, 0) or which.factors or len(values) < 2:
                return None
            return None if None in values else dataclasses.replace(which, off=values[0], on=values[1])
        if op.name == "neg":
            found = self.side(op.inputs[0], shape, dim)
            return dataclasses.replace(found, on=-found.on, off=-found.off) if isinstance(found, OneHot) else None
        if op.name not in ("add", "sub", "mul", "div"):
            return None
        sides = [self.side(x, shape, dim) for x in op.inputs]
        for i, (one, other) in enumerate((sides, sides[::-1])):
            if not isinstance(one, OneHot):
                continue
            if isinstance(other, Narrow) and op.name == "mul":
                return dataclasses.replace(one, factors=(*one.factors, other))
            number = self.number(other.operand) if isinstance(other, Scalar) else None
            if number is None or (op.name == "div" and i) or (one.factors and op.name in ("add", "sub")):
                return None
            on, off = (_arithmetic(op.name, value, number, swapped=bool(i)) for value in (one.on, one.off))
            return dataclasses.replace(one, on=on, off=off)
        return None

    def number(self, x: Operand) -> float | None:
        """The number that a value of size one is, if it is the same in every call."""
        array = np.asarray(x.value) if isinstance(x, Literal) else self.known(x)
        return None if array is None or array.size != 1 else float(array.reshape(()).astype(np.float32))

    def known(self, x: Operand) -> np.ndarray | None:
        """The array that a value is in every call; none if it depends on an input, or is large."""
        if isinstance(x, Literal):
            return np.asarray(x.value)
        if x not in self._known:
            self._known[x] = self._evaluated(x)
        return self._known[x]

    def _evaluated(self, x: Value) -> np.ndarray | None:
        needed: set[Op] = set()
        constants: dict[Value, Any] = {}
        waiting: list[Operand] = [x]
        while waiting:
            y = waiting.pop()
            if isinstance(y, Literal):
                continue
            op = self.producers.get(y)
            if y in self.constants:
                constants[y] = self.constants[y]
            elif op is None or math.prod(y.shape) > _LARGEST or op.name in ("random_bits", "threefry2x32"):
                return None
            elif op not in needed:
                needed.add(op)
                waiting.extend(op.inputs)
        ops = tuple(op for op in self.graph.ops if op in needed)
        with jax.ensure_compile_time_eval():
            (array,) = lowering.evaluate(ir.Graph((), ops, (x,), tuple(constants.items())), [])
        return np.asarray(array)


def _arithmetic(name: str, value: float, number: float, *, swapped: bool) -> float:
    left, right = (number, value) if swapped else (value, number)
    return {"add": left + right, "sub": left - right, "mul": left * right}.get(name, left / right if right else 0.0)
