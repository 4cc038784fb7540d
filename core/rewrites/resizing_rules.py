"""What changes in an operation whose parameters carry sizes, when indices of its dimensions are kept: one table.

A rule gets the operands as the operation reads them and what is wanted of the results, and appends the operation. What
it returns may have more, or in another order, than is wanted: the frame takes what is wanted from it. An operation that
is not in the table computes whatever shapes it gets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compax.errors import RewriteError
from compax.ir import Literal, Op, Operand, Value
from compax.rewrites.narrowing import Dims, Kept, new_shape, spelled
from compax.rewrites.resizing import Frame, Held

Rule = Callable[[Frame, Op, Sequence[Held], Sequence[Dims]], list[Held]]


def _inputs(frame: Frame, op: Op, operands: Sequence[Held]) -> list[Operand]:
    return [frame.there(op, x) for x in operands]


def _shape_of(key: str) -> Rule:
    """A parameter is the shape of the result."""

    def rule(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
        shape = new_shape(op.outputs[0].shape, wanted[0])
        return frame.emit(op, _inputs(frame, op, operands), wanted, {key: shape})

    return rule


def _broadcast(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    (output,), x = op.outputs, op.inputs[0]
    target = op.attributes["broadcast_dimensions"]
    taken = {out for dim, out in enumerate(target) if x.shape[dim] == output.shape[out] != 1}
    dims = list(wanted[0])
    for dim, out in enumerate(target):
        if out in taken:
            dims[out] = operands[0].dims[dim]
    inputs = _inputs(frame, op, operands)
    parameters = {"shape": new_shape(output.shape, tuple(dims))}
    (held,) = frame.emit(op, inputs, [tuple(dims)], parameters)
    made = frame.ops[-1]
    repeated = frozenset(range(len(output.shape))) - taken
    held.repeat = (lambda shape: frame.again(made, inputs, output, shape)), repeated
    return [held]


def _slice(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    (x,), (old,), (output,) = operands, op.inputs, op.outputs
    starts = op.attributes["start_indices"]
    strides = op.attributes["strides"] or (1,) * len(starts)
    positions = [
        spelled(kept, size) * stride + start
        for kept, size, start, stride in zip(wanted[0], output.shape, starts, strides, strict=True)
    ]
    return [_cut(frame, op, x, old, positions, wanted[0], output)]


def _cut(frame: Frame, op: Op, x: Held, old: Operand, indices: Sequence[np.ndarray], dims: Dims, output: Value) -> Held:
    """A slice of what an operand has; a gather, where its indices are not evenly apart."""
    places = [
        frame.positions(spelled(kept, size), chosen, size)
        for kept, size, chosen in zip(x.dims, old.shape, indices, strict=True)
    ]
    steps = [_step(place) for place in places]
    operand = frame.there(op, x)
    if op.name != "slice" or any(step is None for step in steps):
        (value,) = frame.trace(lambda y: _at(y, places), operand)
        return Held(dims, value)
    starts = tuple(int(place[0]) for place in places)
    stops = tuple(int(place[-1]) + 1 for place in places)
    strides = tuple(step or 1 for step in steps)
    recorded = zip(op.attributes["start_indices"], op.attributes["limit_indices"], strict=True)
    given = op.attributes["strides"] or (1,) * len(starts)
    same = all(
        len(place) == len(range(start, stop, step)) and np.array_equal(place, range(start, stop, step))
        for place, (start, stop), step in zip(places, recorded, given, strict=True)
    )
    parameters = {
        "start_indices": starts,
        "limit_indices": stops,
        "strides": None if all(step == 1 for step in strides) else strides,
    }
    (held,) = frame.emit(op, [operand], [dims], {} if same else parameters, values=[output])
    return held


def _step(place: np.ndarray) -> int | None:
    steps = set(np.diff(place).tolist())
    if len(steps) > 1 or (steps and min(steps) < 1):
        return None
    return steps.pop() if steps else 1


def _at(x: Any, places: Sequence[np.ndarray]) -> Any:
    from compax.rewrites.resizing import take

    return take(x, {i: p for i, p in enumerate(places) if not np.array_equal(p, np.arange(x.shape[i]))})


def _split(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    (x,), (old,), axis = operands, op.inputs, op.attributes["axis"]
    start, indices = 0, []
    for size, dims in zip(op.attributes["sizes"], wanted, strict=True):
        indices.append(spelled(dims[axis], size) + start)
        start += size
    together = np.concatenate(indices)
    if np.array_equal(together, spelled(x.dims[axis], old.shape[axis])):
        return frame.emit(op, _inputs(frame, op, operands), wanted, {"sizes": tuple(map(len, indices))})
    results: list[Held] = []
    for chosen, dims, output in zip(indices, wanted, op.outputs, strict=True):
        each = [spelled(kept, size) for kept, size in zip(x.dims, old.shape, strict=True)]
        each[axis] = chosen
        results.append(_cut(frame, op, x, old, each, dims, output))
    return results


def _concatenate(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    axis, (output,) = op.attributes["dimension"], op.outputs
    start, parts, chosen = 0, [], []
    for x, old in zip(operands, op.inputs, strict=True):
        size = old.shape[axis]
        if not x.dropped:
            parts.append(spelled(x.dims[axis], size) + start)
            chosen.append(x)
        start += size
    return _in_order(frame, op, chosen, parts, wanted[0], axis, output)


def _in_order(
    frame: Frame, op: Op, operands: list[Held], parts: list[np.ndarray], wanted: Dims, axis: int, output: Value
) -> list[Held]:
    """Parts put together, single indices in the order that is wanted."""
    if not operands:
        raise RewriteError(f"{frame.place(op)} puts together nothing but indices that are not kept; keep some")
    if all(len(part) == 1 for part in parts):
        rank = {int(index): place for place, index in enumerate(spelled(wanted[axis], output.shape[axis]))}
        order = sorted(range(len(parts)), key=lambda i: rank.get(int(parts[i][0]), len(rank)))
        operands, parts = [operands[i] for i in order], [parts[i] for i in order]
    natural = np.concatenate(parts)
    kept: Kept = None if np.array_equal(natural, np.arange(output.shape[axis])) else natural
    asked = wanted[axis]
    if kept is not None and asked is not None and np.array_equal(kept, asked):
        kept = asked
    dims = tuple(kept if i == axis else each for i, each in enumerate(wanted))
    return frame.emit(op, _inputs(frame, op, operands), [dims])


def _stack(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    chosen = [(x, np.asarray([i])) for i, x in enumerate(operands) if not x.dropped]
    parts = [part for _, part in chosen]
    return _in_order(frame, op, [x for x, _ in chosen], parts, wanted[0], op.attributes["axis"], op.outputs[0])


def _unstack(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    (x,), axis = operands, op.attributes["axis"]
    order = spelled(x.dims[axis], op.inputs[0].shape[axis])
    values = [op.outputs[i] for i in order]
    made = frame.emit(op, _inputs(frame, op, operands), [wanted[i] for i in order], values=values)
    by_index = dict(zip(map(int, order), made, strict=True))
    gone = [Held(dims, dropped=True) for dims in wanted]
    return [by_index.get(i, gone[i]) for i in range(len(op.outputs))]


def _pad(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    x, old, (output,) = operands[0], op.inputs[0], op.outputs
    dims: list[Kept] = []
    for kept, size, (low, high, _), whole in zip(
        x.dims, old.shape, op.attributes["padding_config"], output.shape, strict=True
    ):
        if kept is None:
            dims.append(None)
            continue
        dims.append(np.concatenate([np.arange(low), kept + low, np.arange(low + size, low + size + high)]))
        assert low + size + high == whole
    return frame.emit(op, _inputs(frame, op, operands), [tuple(dims)])


def _gather(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    old, new = op.inputs[0].shape, new_shape(op.inputs[0].shape, operands[0].dims)
    sizes = tuple(
        after if size == before else size
        for size, before, after in zip(op.attributes["slice_sizes"], old, new, strict=True)
    )
    return frame.emit(op, _inputs(frame, op, operands), wanted, {"slice_sizes": sizes})


def _convolution(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    groups = op.attributes["feature_group_count"]
    if groups > 1:
        numbers = op.attributes["dimension_numbers"]
        shapes = [new_shape(old.shape, x.dims) for x, old in zip(operands, op.inputs, strict=True)]
        groups = shapes[0][numbers.lhs_spec[1]] // shapes[1][numbers.rhs_spec[1]]
    return frame.emit(op, _inputs(frame, op, operands), wanted, {"feature_group_count": groups})


def _top_k(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    axis = op.attributes.get("axis", -1) % len(op.inputs[0].shape)
    kept, k = operands[0].dims[axis], op.attributes["k"]
    if kept is not None and len(kept) < k:
        raise RewriteError(f"{frame.place(op)} takes the best {k}, but only {len(kept)} are kept; keep at least {k}")
    return frame.emit(op, _inputs(frame, op, operands), wanted)


def _sort(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    axis = op.attributes["dimension"]
    sizes = {len(spelled(x.dims[axis], old.shape[axis])) for x, old in zip(operands, op.inputs, strict=True)}
    if sizes != {op.inputs[0].shape[axis]}:
        raise RewriteError(f"{frame.place(op)} sorts what fewer indices are kept of; keep all of them")
    return frame.emit(op, _inputs(frame, op, operands), wanted)


def _compare(frame: Frame, op: Op, operands: Sequence[Held], wanted: Sequence[Dims]) -> list[Held]:
    """A comparison of indices with one of them."""
    inputs = _inputs(frame, op, operands)
    member = frame.narrowing.engine.members.get(frame.vals[op.outputs[0]])
    kept = None if member is None else frame.narrowing.kept(member[0])
    if kept is not None and member is not None:
        for i, x in enumerate(op.inputs):
            other, val = frame.val(op.inputs[1 - i]), frame.val(x)
            number = x.value if isinstance(x, Literal) else None if val is None else val.constant
            pointing = other in frame.narrowing.engine.indices
            if pointing and number is not None and np.ndim(number) == 0 and number == member[1]:
                place = int(np.flatnonzero(kept == member[1])[0])
                inputs[i] = Literal(np.asarray(place, jnp.dtype(x.dtype)), x.aval)
    return frame.emit(op, inputs, wanted)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("eq", "ne"), _compare),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dynamic_slice": _shape_of("slice_sizes"),
    "gather": _gather,
    "pad": _pad,
    "reshape": _shape_of("new_sizes"),
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "stack": _stack,
    "top_k": _top_k,
    "unstack": _unstack,
}
