"""How each operation relates the dimensions of its operands and results: one table.

A rule reads the dimensions of a node's operands from the engine (`Engine.dims`), says which are one and the same, and
writes those of the results. An operation that is not in the table freezes whatever it touches.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compax.analysis.atoms import Factors, size_of
from compax.analysis.normal import Node, Val
from compax.analysis.provenance import reshape_groups

if TYPE_CHECKING:
    from compax.analysis.axes import Engine

Rule = Callable[["Engine", Node], None]

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igammac imag integer_pow is_finite
    le le_to lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not or population_count pow real rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
    complex conj erf_inv polygamma random_wrap random_unwrap bitcast_convert_type clz reduce_precision psum pmax pmin
    psum_invariant ppermute
"""


def elementwise(engine: "Engine", node: Node) -> None:
    """Operands and results share all dimensions; scalars, and dimensions of size one, meet anything."""
    for output in node.outputs:
        rank = len(output.shape)
        positions = [i for i, x in enumerate(node.inputs) if len(x.shape) == rank]
        if not positions:
            engine.opaque(node)
            return
        engine.set(output, engine.together(node, positions))
    engine.track_index(node)


def _broadcast(engine: "Engine", node: Node) -> None:
    (x, *_), (output,) = node.inputs, node.outputs
    source = {out: dim for dim, out in enumerate(node.attributes["broadcast_dimensions"])}
    dims: list[Factors] = []
    for out, size in enumerate(output.shape):
        dim = source.get(out)
        if dim is not None and x.shape[dim] == size:
            dims.append(engine.dims[x][dim])
        else:
            dims.append(engine.atoms.fresh(size, table=True))
    engine.set(output, dims)
    engine.pass_index(node)


def _transpose(engine: "Engine", node: Node) -> None:
    dims = engine.dims[node.inputs[0]]
    engine.set(node.outputs[0], [dims[i] for i in node.attributes["permutation"]])
    engine.pass_index(node)


def _squeeze(engine: "Engine", node: Node) -> None:
    (x,) = node.inputs
    gone = {dim % len(x.shape) for dim in node.attributes["dimensions"]}
    engine.set(node.outputs[0], [factors for i, factors in enumerate(engine.dims[x]) if i not in gone])
    engine.pass_index(node)


def _reshape(engine: "Engine", node: Node) -> None:
    x, output = node.inputs[0], node.outputs[0]
    if node.attributes.get("dimensions") is not None or 0 in x.shape:
        engine.opaque(node)
        return
    dims: list[Factors] = [()] * len(output.shape)
    for before, after in reshape_groups(x.shape, output.shape):
        factors = [atom for dim in before for atom in engine.dims[x][dim]]
        parts = engine.atoms.partition(factors, [output.shape[dim] for dim in after])
        for dim, part in zip(after, parts, strict=True):
            dims[dim] = part
    engine.set(output, dims)
    engine.pass_index(node)


def _concatenate(engine: "Engine", node: Node) -> None:
    axis, (output,) = node.attributes["dimension"], node.outputs
    dims = engine.together(node, range(len(node.inputs)), skip=(axis,))
    family = engine.end_members(node.inputs)
    whole = family is not None and all(x.shape[axis] == 1 for x in node.inputs)
    dims[axis] = (
        family if family is not None and whole else engine.atoms.join([engine.dims[x][axis] for x in node.inputs])
    )
    engine.set(output, dims)


def _split(engine: "Engine", node: Node) -> None:
    (x,), axis = node.inputs, node.attributes["axis"]
    start = 0
    for size, output in zip(node.attributes["sizes"], node.outputs, strict=True):
        dims = list(engine.dims[x])
        dims[axis] = engine.atoms.cut(dims[axis], start, start + size)
        engine.set(output, dims)
        start += size


def _slice(engine: "Engine", node: Node) -> None:
    (x,), (output,) = node.inputs, node.outputs
    strides = node.attributes["strides"] or (1,) * len(x.shape)
    limits = zip(node.attributes["start_indices"], node.attributes["limit_indices"], strides, strict=True)
    dims = list(engine.dims[x])
    for dim, (start, stop, stride) in enumerate(limits):
        size = x.shape[dim]
        if stop - start == 1 and size > 1:
            engine.take(dims[dim], start, output, alone=output.shape[:dim] + output.shape[dim + 1 :] == _rest(x, dim))
            dims[dim] = ()
        elif stride == 1:
            dims[dim] = engine.atoms.cut(dims[dim], start, stop)
        elif size % stride == 0 and start < stride and output.shape[dim] == size // stride:
            major, minor = engine.atoms.partition(dims[dim], (size // stride, stride))
            engine.atoms.cut(minor, start, start + 1)
            dims[dim] = major
        else:
            engine.atoms.freeze(dims[dim], f"{stride} apart in a slice")
            dims[dim] = engine.atoms.fresh(output.shape[dim])
    engine.set(output, dims)
    engine.pass_index(node)


def _rest(x: Val, dim: int) -> tuple[int, ...]:
    return x.shape[:dim] + x.shape[dim + 1 :]


def _pad(engine: "Engine", node: Node) -> None:
    x, output = node.inputs[0], node.outputs[0]
    dims = list(engine.dims[x])
    for dim, (low, high, interior) in enumerate(node.attributes["padding_config"]):
        if interior or low < 0 or high < 0:
            engine.atoms.freeze(dims[dim], "padded inside or cropped")
            dims[dim] = engine.atoms.fresh(output.shape[dim])
        elif low or high:
            around = [engine.atoms.fresh(size, table=True) if size else None for size in (low, high)]
            parts = [around[0], dims[dim], around[1]]
            dims[dim] = engine.atoms.join([part for part in parts if part is not None])
    engine.set(output, dims)


def _stack(engine: "Engine", node: Node) -> None:
    axis, count = node.attributes["axis"], len(node.inputs)
    dims = engine.together(node, range(count))
    family = engine.end_members(node.inputs)
    dims.insert(axis, engine.ordered(count, node) if family is None else family)
    engine.set(node.outputs[0], dims)


def _unstack(engine: "Engine", node: Node) -> None:
    (x,), axis = node.inputs, node.attributes["axis"]
    dims = list(engine.dims[x])
    family = dims.pop(axis)
    for index, output in enumerate(node.outputs):
        engine.set(output, dims)
        engine.take(family, index, output, alone=True)


def _tile(engine: "Engine", node: Node) -> None:
    (x,), (output,) = node.inputs, node.outputs
    repeats = [engine.atoms.fresh(count, table=True) for count in node.attributes["reps"]]
    engine.set(output, [(*repeat, *factors) for repeat, factors in zip(repeats, engine.dims[x], strict=True)])


def _reduce(engine: "Engine", node: Node) -> None:
    gone = node.attributes["axes"]
    for x, output in zip(node.inputs, node.outputs, strict=False):
        engine.set(output, [factors for i, factors in enumerate(engine.dims[x]) if i not in gone])


def _arg_reduce(engine: "Engine", node: Node) -> None:
    _reduce(engine, node)
    (axis,) = node.attributes["axes"]
    engine.indices[node.outputs[0]] = engine.dims[node.inputs[0]][axis]


def _cumulative(engine: "Engine", node: Node) -> None:
    dims = engine.dims[node.inputs[0]]
    engine.atoms.freeze(dims[node.attributes["axis"]], f"in the order of {node.name}")
    engine.set(node.outputs[0], dims)


def _reverse(engine: "Engine", node: Node) -> None:
    dims = engine.dims[node.inputs[0]]
    for dim in node.attributes["dimensions"]:
        engine.atoms.freeze(dims[dim], "reversed")
    engine.set(node.outputs[0], dims)


def _sort(engine: "Engine", node: Node) -> None:
    axis = node.attributes["dimension"]
    dims = engine.together(node, range(len(node.inputs)), skip=(axis,))
    sorted_ = engine.atoms.fresh(node.inputs[0].shape[axis])
    source = next((engine.dims[x][axis] for x in node.inputs if not x.static), engine.dims[node.inputs[0]][axis])
    for x, output in zip(node.inputs, node.outputs, strict=True):
        engine.set(output, [sorted_ if i == axis else factors for i, factors in enumerate(dims)])
        if x.static:
            engine.indices[output] = source
        elif x not in engine.indices:
            engine.atoms.unify(engine.dims[x][axis], source)
        else:
            engine.indices[output] = engine.indices[x]


def _top_k(engine: "Engine", node: Node) -> None:
    (x,) = node.inputs
    axis = node.attributes.get("axis", -1) % len(x.shape)
    dims = list(engine.dims[x])
    source = dims[axis]
    dims[axis] = engine.atoms.fresh(node.outputs[0].shape[axis])
    for output in node.outputs:
        engine.set(output, dims)
    engine.indices[node.outputs[1]] = source


def _dot(engine: "Engine", node: Node) -> None:
    (contract, batch) = node.attributes["dimension_numbers"]
    left, right = node.inputs
    dims = []
    for one, other in zip(batch[0], batch[1], strict=True):
        dims.append(engine.same(node, (0, one), (1, other)))
    for one, other in zip(contract[0], contract[1], strict=True):
        engine.same(node, (0, one), (1, other))
    for side, x in enumerate((left, right)):
        gone = {*contract[side], *batch[side]}
        dims += [factors for i, factors in enumerate(engine.dims[x]) if i not in gone]
    engine.set(node.outputs[0], dims)


def _ragged_dot(engine: "Engine", node: Node) -> None:
    numbers = node.attributes["ragged_dot_dimension_numbers"]
    (contract, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    dims = [engine.same(node, (0, one), (1, other)) for one, other in zip(*batch, strict=True)]
    for one, other in zip(*contract, strict=True):
        engine.same(node, (0, one), (1, other))
    if len(groups) == 1:
        engine.same(node, (1, groups[0]), (2, len(node.inputs[2].shape) - 1))
    else:
        engine.atoms.freeze(engine.dims[node.inputs[2]][-1], "groups of a contraction")
    for dim in numbers.lhs_ragged_dimensions:
        engine.atoms.freeze(engine.dims[node.inputs[0]][dim], "rows sorted by group")
    for dim in groups:
        engine.atoms.freeze(engine.dims[node.inputs[1]][dim], "rows are sorted by group")
    for side in (0, 1):
        gone = {*contract[side], *batch[side], *(groups if side else ())}
        dims += [factors for i, factors in enumerate(engine.dims[node.inputs[side]]) if i not in gone]
    output = node.outputs[0]
    if len(dims) != len(output.shape):  # ragged contraction: the groups come first
        dims.insert(0, engine.dims[node.inputs[2]][-1])
    engine.set(output, dims)


def _convolution(engine: "Engine", node: Node) -> None:
    numbers, groups = node.attributes["dimension_numbers"], node.attributes["feature_group_count"]
    x, kernel, output = node.inputs[0], node.inputs[1], node.outputs[0]
    if node.attributes["batch_group_count"] != 1:
        engine.opaque(node)
        return
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    dims: list[Factors] = [()] * len(output.shape)
    dims[out[0]] = engine.dims[x][lhs[0]]
    if groups == 1:
        engine.same(node, (0, lhs[1]), (1, rhs[1]))
        dims[out[1]] = engine.dims[kernel][rhs[0]]
    else:
        size = x.shape[lhs[1]] // groups
        major, minor = engine.atoms.partition(engine.dims[x][lhs[1]], (groups, size))
        outer, inner = engine.atoms.partition(engine.dims[kernel][rhs[0]], (groups, kernel.shape[rhs[0]] // groups))
        engine.atoms.unify(major, outer)
        engine.atoms.unify(minor, engine.dims[kernel][rhs[1]])
        dims[out[1]] = (*outer, *inner)
    for one, kernel_dim, other in zip(lhs[2:], rhs[2:], out[2:], strict=True):
        engine.atoms.freeze(engine.dims[kernel][kernel_dim], "a window of a convolution")
        pointwise = kernel.shape[kernel_dim] == 1 and x.shape[one] == output.shape[other]
        if not pointwise:
            engine.atoms.freeze(engine.dims[x][one], "space of a convolution")
        dims[other] = engine.dims[x][one] if pointwise else engine.ordered(output.shape[other], node)
    engine.set(output, dims)


def _window(engine: "Engine", node: Node) -> None:
    """Windows slide over some dimensions, whose order matters, and leave the others."""
    (x, *_), (output,) = node.inputs, node.outputs
    dims = list(engine.dims[x])
    for dim, size in enumerate(node.attributes["window_dimensions"]):
        if size != 1 or x.shape[dim] != output.shape[dim]:
            engine.atoms.freeze(dims[dim], "space of a window")
            dims[dim] = engine.ordered(output.shape[dim], node)
    engine.set(output, dims)


def _gather(engine: "Engine", node: Node) -> None:
    x, indices, output = node.inputs[0], node.inputs[1], node.outputs[0]
    numbers, sizes = node.attributes["dimension_numbers"], node.attributes["slice_sizes"]
    dims: list[Factors] = [()] * len(output.shape)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [dim for dim in range(len(x.shape)) if dim not in dropped]
    for out, dim in zip(numbers.offset_dims, kept, strict=True):
        if sizes[dim] == x.shape[dim]:
            dims[out] = engine.dims[x][dim]
        else:
            engine.indexed(x, dim, None, node)
            dims[out] = engine.atoms.fresh(sizes[dim])
    vector = list(range(len(indices.shape) - 1))
    rest = [out for out in range(len(output.shape)) if out not in numbers.offset_dims]
    for out, dim in zip(rest, vector, strict=True):
        dims[out] = engine.dims[indices][dim]
    for dim, index_dim in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        shared = engine.same(node, (0, dim), (1, index_dim))
        dims[rest[vector.index(index_dim)]] = shared
    for dim in numbers.collapsed_slice_dims:
        engine.indexed(x, dim, indices, node)
    engine.set(output, dims)


def _scatter(engine: "Engine", node: Node) -> None:
    x, indices, updates = node.inputs
    numbers = node.attributes["dimension_numbers"]
    inserted = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [dim for dim in range(len(x.shape)) if dim not in inserted]
    dims = list(engine.dims[x])
    for update_dim, dim in zip(numbers.update_window_dims, kept, strict=True):
        if updates.shape[update_dim] == x.shape[dim]:
            dims[dim] = engine.same(node, (0, dim), (2, update_dim))
        else:
            engine.indexed(x, dim, None, node)
    vector = range(len(indices.shape) - 1)
    rest = [dim for dim in range(len(updates.shape)) if dim not in numbers.update_window_dims]
    for update_dim, dim in zip(rest, vector, strict=True):
        engine.same(node, (1, dim), (2, update_dim))
    for dim, index_dim in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        dims[dim] = engine.same(node, (0, dim), (1, index_dim))
    for dim in numbers.inserted_window_dims:
        dims[dim] = engine.indexed(x, dim, indices, node)
    engine.set(node.outputs[0], dims)


def _dynamic_slice(engine: "Engine", node: Node) -> None:
    x, output = node.inputs[0], node.outputs[0]
    dims = list(engine.dims[x])
    for dim, size in enumerate(output.shape):
        if size != x.shape[dim]:
            engine.indexed(x, dim, node.inputs[1 + dim] if size == 1 else None, node)
            dims[dim] = engine.atoms.fresh(size)
    engine.set(output, dims)


def _dynamic_update_slice(engine: "Engine", node: Node) -> None:
    x, update = node.inputs[:2]
    dims = list(engine.dims[x])
    for dim, size in enumerate(update.shape):
        if size == x.shape[dim]:
            dims[dim] = engine.same(node, (0, dim), (1, dim))
        else:
            dims[dim] = engine.indexed(x, dim, node.inputs[2 + dim] if size == 1 else None, node)
    engine.set(node.outputs[0], dims)


def _iota(engine: "Engine", node: Node) -> None:
    dims = [engine.atoms.fresh(size, table=True) for size in node.outputs[0].shape]
    engine.set(node.outputs[0], dims)
    engine.count_up(dims[node.attributes["dimension"]])


def _draws(engine: "Engine", node: Node) -> None:
    """Random numbers and their keys: like a table, since which one goes where is a matter of the place alone."""
    for output in node.outputs:
        engine.set(output, [engine.atoms.fresh(size, table=True) for size in output.shape])


def _all_gather(engine: "Engine", node: Node) -> None:
    (x,), (output,) = node.inputs, node.outputs
    dims, axis = list(engine.dims[x]), node.attributes["all_gather_dimension"]
    devices = engine.ordered(node.attributes["axis_size"], node)
    if node.attributes["tiled"]:
        dims[axis] = (*devices, *dims[axis])
    else:
        dims.insert(axis, devices)
    engine.set(output, dims)


# -- Where control flow joins values ----------------------------------------------------------------------------------


def _scan_slice(engine: "Engine", node: Node) -> None:
    (x,) = node.inputs
    layers, *dims = engine.dims[x]
    engine.atoms.unify(layers, engine.turns(node, x.shape[0]))
    engine.set(node.outputs[0], dims)


def _scan_stack(engine: "Engine", node: Node) -> None:
    (x,) = node.inputs
    engine.set(node.outputs[0], [engine.turns(node, node.attributes["length"]), *engine.dims[x]])


def _carry(engine: "Engine", node: Node) -> None:
    """The next value comes later: see `Engine.run`."""
    x = node.inputs[0]
    dims = [engine.atoms.fresh(size) for size in x.shape]
    engine.set(node.outputs[0], dims)
    engine.into(node, 0, dims)


def _carried(engine: "Engine", node: Node) -> None:
    engine.set(node.outputs[0], engine.dims[node.inputs[1]])


def _join(engine: "Engine", node: Node) -> None:
    dims = [engine.atoms.fresh(size) for size in node.outputs[0].shape]
    engine.set(node.outputs[0], dims)
    for i in range(1, len(node.inputs)):
        engine.into(node, i, dims)


def _shard_slice(engine: "Engine", node: Node) -> None:
    (x,), (output,) = node.inputs, node.outputs
    dims: list[Factors] = []
    for factors, whole, part in zip(engine.dims[x], x.shape, output.shape, strict=True):
        devices, local = engine.atoms.partition(factors, (whole // part, part))
        engine.atoms.freeze(devices, "spread over devices")
        dims.append(local)
    engine.set(output, dims)


def _shard_join(engine: "Engine", node: Node) -> None:
    (x,), (output,) = node.inputs, node.outputs
    engine.set(
        output,
        [
            (*engine.ordered(whole // part, node), *factors)
            for factors, whole, part in zip(engine.dims[x], output.shape, x.shape, strict=True)
        ],
    )


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(("argmax", "argmin"), _arg_reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _cumulative),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"), _reduce
    ),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window", "select_and_gather_add"),
        _window,
    ),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"), _scatter),
    **dict.fromkeys(("random_bits", "rng_uniform", "rng_bit_generator", "threefry2x32"), _draws),
    **dict.fromkeys(("random_seed", "random_fold_in", "random_split", "random_gamma", "axis_index", "empty"), _draws),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _all_gather),
    "broadcast_in_dim": _broadcast,
    "carried": _carried,
    "carry": _carry,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "join": _join,
    "pad": _pad,
    "ragged_dot_general": _ragged_dot,
    "reshape": _reshape,
    "rev": _reverse,
    "scan_slice": _scan_slice,
    "scan_stack": _scan_stack,
    "shard_join": _shard_join,
    "shard_slice": _shard_slice,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}


def check_sizes(x: Val, dims: Sequence[Factors]) -> None:
    """Asserts that dimensions fit a shape: an error here is one of a rule."""
    found = tuple(map(size_of, dims))
    assert found == x.shape, f"{x} has dimensions of {found}"
