"""Provenance: which parameter a value derives from through layout operations, dimension by dimension.

A layout operation only rearranges: casts, transposes, reshapes, slices, barriers. An operation that computes ends the
derivation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from compax.ir import Op

Dims = tuple[frozenset[int], ...]
"""For each dimension of a value the dimensions of the parameter that it is made of."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter in a derivation.

    Attributes:
        parameter: its path.
        dims: for each dimension of the value the parameter's dimensions in it.
    """

    parameter: str
    dims: Dims


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a value is a rearrangement of: one parameter, or several in a row."""

    parts: tuple[Part, ...]

    def map(self, function: Any) -> "Origin":
        """The origin with each part's dimensions changed."""
        return Origin(tuple(dataclasses.replace(part, dims=tuple(function(part.dims))) for part in self.parts))


def parameter_origin(path: str, ndim: int) -> Origin:
    """The origin of a parameter itself."""
    return Origin((Part(path, tuple(frozenset((dim,)) for dim in range(ndim))),))


def sliced(origin: Origin | None) -> Origin | None:
    """The origin of one slice of a scanned value: the leading dimension is gone."""
    return None if origin is None else origin.map(lambda dims: dims[1:])


def layout(op: Op, operands: Sequence[Origin | None]) -> Origin | None:
    """The origin of a layout operation's output; `None` if it computes or its operand has none."""
    if not operands:
        return None
    if op.name == "concatenate":
        return _concatenate(operands)
    if op.name == "stack":
        axis = op.attributes["axis"]
        unsqueezed = [o and o.map(lambda dims: (*dims[:axis], frozenset(), *dims[axis:])) for o in operands]
        return _concatenate(unsqueezed)
    first = operands[0]
    if first is None:
        return None
    attributes = op.attributes
    if op.name in _SAME:
        return first
    if op.name == "unstack":
        axis = op.attributes["axis"]
        return first.map(lambda dims: (*dims[:axis], *dims[axis + 1 :]))
    if op.name == "transpose":
        return first.map(lambda dims: [dims[i] for i in attributes["permutation"]])
    if op.name == "squeeze":
        gone = {d % len(op.inputs[0].shape) for d in attributes["dimensions"]}
        return first.map(lambda dims: [d for i, d in enumerate(dims) if i not in gone])
    if op.name == "reshape":
        if attributes.get("dimensions") is not None:
            return None
        return first.map(lambda dims: reshape_dims(dims, op.inputs[0].shape, op.outputs[0].shape))
    if op.name == "broadcast_in_dim":
        return _broadcast(op, first)
    return None


_SAME = frozenset(
    {
        "convert_element_type",
        "slice",
        "dynamic_slice",
        "copy",
        "copy_p",
        "sharding_constraint",
        "constrain",
        "name",
        "compress",
        "reshard",
        "optimization_barrier",
        "stop_gradient",
        "pvary",
        "pcast",
        "all_gather",
        "all_gather_invariant",
        "reduce_precision",
        "rev",
        "split",
    }
)


def _concatenate(operands: Sequence[Origin | None]) -> Origin | None:
    parts: list[Part] = []
    for origin in operands:
        if origin is None:
            return None
        parts.extend(part for part in origin.parts if part not in parts)
    return Origin(tuple(parts))


def _broadcast(op: Op, origin: Origin) -> Origin | None:
    shape, placed = op.outputs[0].shape, op.attributes["broadcast_dimensions"]
    source = dict(zip(placed, range(len(placed)), strict=True))
    if any(op.inputs[0].shape[source[i]] != size for i, size in enumerate(shape) if i in source):
        return None
    if any(size != 1 for i, size in enumerate(shape) if i not in source):
        return None
    return origin.map(lambda dims: [dims[source[i]] if i in source else frozenset() for i in range(len(shape))])


def reshape_dims(dims: Dims, before: Sequence[int], after: Sequence[int]) -> list[frozenset[int]]:
    """Dimensions after a reshape: within each smallest group of equal products, all of the group's."""
    result: list[frozenset[int]] = []
    for sources, count in reshape_groups(before, after):
        merged = frozenset().union(*(dims[i] for i in sources))
        result.extend([merged] * len(count))
    return result


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits a reshape into the smallest runs of dimensions of equal product: (positions before, positions after)."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        products = [1, 1]
        while True:
            if (products[0] <= products[1] and i < len(before)) or j >= len(after):
                products[0] *= before[i]
                left.append(i)
                i += 1
            else:
                products[1] *= after[j]
                right.append(j)
                j += 1
            if products[0] == products[1] and ((left and right) or (i >= len(before) and j >= len(after))):
                break
            if i >= len(before) and j >= len(after):
                break
        groups.append((left, right))
    return groups
