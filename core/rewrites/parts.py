"""Arrays in parts: what a fused parameter is while a graph is traced anew.

`Parts` stands for several arrays in a row and goes through layout, elementwise operations and products part by part;
`Part` is one of several parts of an array that exists as a whole.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from compax import ir, lowering
from compax.analysis.provenance import reshape_groups
from compax.encoding import Encoded, Slices
from compax.errors import EncodingError

_ELEMENTWISE = (
    "add", "add_any", "sub", "mul", "div", "neg", "exp", "tanh", "logistic", "max", "min", "abs", "sqrt", "rsqrt",
    "square", "integer_pow", "erf", "log", "log1p", "expm1", "sign", "pow",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one parameter is taken apart.

    Attributes:
        path: the parameter.
        dim: its dimension, counted from the end.
        outer: how many times the parts alternate: 1 if each is whole, the number of heads if heads are cut inside.
        sizes: sizes of the parts each time.
    """

    path: str
    dim: int
    outer: int
    sizes: tuple[int, ...]

    def paths(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(f"{self.path}.{i}" for i in range(len(self.sizes)))

    def apart(self, x: Any) -> list[Any]:
        """The parts of an array, or of a shape."""
        axis = len(x.shape) + self.dim
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        if isinstance(x, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct((*before, self.outer * n, *after), x.dtype) for n in self.sizes]
        spread = x.reshape(*before, self.outer, sum(self.sizes), *after)
        parts = jnp.split(spread, np.cumsum(self.sizes)[:-1].tolist(), axis + 1)
        return [part.reshape(*before, -1, *after) for part in parts]


class _Virtual(Encoded):
    """An array that exists while a graph is traced only."""

    def spec(self, spec: PartitionSpec) -> Encoded:
        raise EncodingError("parts of a fused parameter do not go through shard_map; sink or fuse without it")

    def manual(self, spec: PartitionSpec) -> Encoded:
        raise EncodingError("parts of a fused parameter do not go through shard_map; sink or fuse without it")

    def stacked(self, length: int) -> Encoded:
        return self

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self)[0].dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts(_Virtual):
    """Arrays in a row along a dimension, several times over if `outer` is more than one."""

    parts: tuple[Any, ...]
    axis: int = dataclasses.field(metadata={"static": True})
    outer: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        position = len(first) + self.axis
        return (*first[:position], sum(self.sizes), *first[position + 1 :])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the parts along their dimension."""
        return tuple(part.shape[self.axis] for part in self.parts)

    def decode(self) -> jax.Array:
        position = self.ndim + self.axis
        before, after = self.shape[:position], self.shape[position + 1 :]
        spread = [part.reshape(*before, self.outer, -1, *after) for part in self.parts]
        return jnp.concatenate(spread, position + 1).reshape(self.shape)

    def each(self, function: Any) -> "Parts":
        """The same function of every part."""
        return Parts(tuple(map(function, self.parts)), self.axis, self.outer)

    def astype(self, dtype: Any) -> "Parts":
        return self.each(lambda part: jax.lax.convert_element_type(part, dtype))

    def transpose(self, permutation: Sequence[int]) -> "Parts":
        axis = list(permutation).index(self.ndim + self.axis) - self.ndim
        return Parts(tuple(part.transpose(permutation) for part in self.parts), axis, self.outer)

    def squeeze(self, dimensions: Sequence[int]) -> "Parts | None":
        gone = {d % self.ndim for d in dimensions}
        position = self.ndim + self.axis
        if position in gone:
            return None
        left = [d for d in range(self.ndim) if d not in gone]
        return Parts(tuple(p.squeeze(tuple(gone)) for p in self.parts), left.index(position) - len(left), self.outer)

    def slice(self, slices: Slices) -> Any:
        position = self.ndim + self.axis
        start, stop, stride = slices[position]
        rest = [slice(*each) for each in slices]
        edges = np.cumsum([0, *self.sizes]).tolist()
        if self.outer != 1 or stride != 1 or start not in edges or stop not in edges:
            return None
        rest[position] = slice(None)
        chosen = [part[tuple(rest)] for part in self.parts[edges.index(start) : edges.index(stop)]]
        return chosen[0] if len(chosen) == 1 else Parts(tuple(chosen), self.axis, self.outer)

    def reshape(self, shape: Sequence[int]) -> "Parts | None":
        position = self.ndim + self.axis
        for before, after in reshape_groups(self.shape, shape):
            if position not in before:
                continue
            wide = [d for d in before if self.shape[d] != 1]
            targets = [d for d in after if shape[d] != 1]
            if wide != [position]:
                return None
            outer = self.outer
            if len(targets) > 1 and outer == shape[targets[0]]:
                targets, outer = targets[1:], 1
            inner = math.prod(shape[d] for d in targets[1:])
            if any(size // self.outer * outer % (outer * inner) for size in self.sizes):
                return None
            axis = targets[0]
            parts = []
            for part, size in zip(self.parts, self.sizes, strict=True):
                new = list(shape)
                new[axis] = size // (self.outer // outer) // inner
                parts.append(part.reshape(new))
            return Parts(tuple(parts), axis - len(shape), outer)
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part(_Virtual):
    """One part of a fused array."""

    fused: Any
    axis: int = dataclasses.field(metadata={"static": True})
    outer: int = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    index: int = dataclasses.field(metadata={"static": True})
    key: int = dataclasses.field(default=-1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        position = self.fused.ndim + self.axis
        whole = self.fused.shape
        return (*whole[:position], self.outer * self.sizes[self.index], *whole[position + 1 :])

    def of(self, array: jax.Array, axis: int) -> jax.Array:
        """This part of an array whose dimension `axis` is fused in the same way."""
        position = axis % array.ndim
        before, after = array.shape[:position], array.shape[position + 1 :]
        start = sum(self.sizes[: self.index])
        if self.outer == 1:
            return jax.lax.slice_in_dim(array, start, start + self.sizes[self.index], axis=position)
        spread = array.reshape(*before, self.outer, sum(self.sizes), *after)
        part = jax.lax.slice_in_dim(spread, start, start + self.sizes[self.index], axis=position + 1)
        return part.reshape(*before, -1, *after)

    def decode(self) -> jax.Array:
        return self.of(self.fused, self.axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sibling(_Virtual):
    """A part of an array that another operand of the same operation, a `Part` with the same key, brings into a body."""

    like: jax.ShapeDtypeStruct = dataclasses.field(metadata={"static": True})
    index: int = dataclasses.field(metadata={"static": True})
    key: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.like.shape

    @property
    def dtype(self) -> Any:
        return self.like.dtype

    def decode(self) -> jax.Array:
        raise EncodingError("a part that is on its way into a body has no array of its own")


def together(operands: Sequence[Any]) -> list[Any]:
    """Operands of an operation with a body, with every fused array among them once."""
    holders: dict[tuple[int, int], int] = {}
    result = list(operands)
    for i, x in enumerate(operands):
        if isinstance(x, Part):
            key = holders.setdefault((id(x.fused), x.axis), i)
            apart = Sibling(jax.ShapeDtypeStruct(x.shape, x.dtype), x.index, key)
            result[i] = dataclasses.replace(x, key=key) if key == i else apart
    return result


def reunited(inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a body that `together` gave the operands of: all parts again."""
    holders = {x.key: x for x in inputs if isinstance(x, Part)}
    return [dataclasses.replace(holders[x.key], index=x.index) if isinstance(x, Sibling) else x for x in inputs]


def _apart(like: Parts, x: Any) -> list[Any]:
    """An operand for each part: its own part, or all of what is the same for all."""
    if isinstance(x, Parts):
        if (x.axis, x.outer, x.sizes) != (like.axis, like.outer, like.sizes):
            raise EncodingError("two fused values that are cut in different places meet")
        return list(x.parts)
    if np.ndim(x) == 0 or x.shape[like.axis] == 1:
        return [x] * len(like.parts)
    sizes = tuple(size // like.outer for size in like.sizes)
    return Cut("", like.axis, like.outer, sizes).apart(jnp.asarray(x))


def _each(call: lowering.Call) -> list[Any]:
    """An elementwise operation, part by part."""
    like = call.encoded
    operands = [_apart(like, x) for x in call.operands]
    results = [call.again(call.op, each)[0] for each in zip(*operands, strict=True)]
    return [Parts(tuple(results), like.axis, like.outer)]


for _name in _ELEMENTWISE:
    lowering.rule(_name, Parts)(_each)


@lowering.rule("dot_general", Parts)
def _product(call: lowering.Call) -> list[Any] | None:
    """A product with parts, unless the parts lie along what it contracts."""
    like, side = call.encoded, call.index
    if any(isinstance(x, Parts) for i, x in enumerate(call.operands) if i != side):
        return None
    axis = result_axis(call.op, side, like.ndim + like.axis)
    if axis is None:
        return None
    results = []
    for part in like.parts:
        operands = list(call.operands)
        operands[side] = part
        results.append(call.again(call.op, operands)[0])
    return [Parts(tuple(results), axis - len(call.op.outputs[0].shape), like.outer)]


def result_axis(op: ir.Op, side: int, position: int) -> int | None:
    """Where a free dimension of an operand is in a product's result; none if it is contracted or a batch dimension."""
    (contract, batch) = op.attributes["dimension_numbers"]
    if position in contract[side] or position in batch[side]:
        return None
    free = [d for d in range(len(op.inputs[side].shape)) if d not in contract[side] and d not in batch[side]]
    first = len(batch[0])
    if side == 1:
        first += len(op.inputs[0].shape) - len(contract[0]) - len(batch[0])
    return first + free.index(position)
