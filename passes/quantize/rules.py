"""Lowering rules of int8 quantization: products that read the integers.

Stored weights enter a product as integers and their scales are applied to its output. With quantized activations the
product itself is int8 x int8 into int32. The rules save the encoded operands for the backward pass: a decoded copy of
every layer would otherwise live through a scan.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compax import _jax
from compax.encoding import Encoded
from compax.higher_order import name_dot
from compax.integers import absmax_scale, to_integers
from compax.ir import Op
from compax.lowering import Call, operation, rule
from compax.passes.quantize import blocks
from compax.passes.quantize.arithmetic import fake_quantize
from compax.passes.quantize.encoding import QuantizedArray, SeenArray
from compax.passes.quantize.products import Product, scaled_product

QUANTIZED = "quantized_contraction"
"""An operation of ours: a contraction whose activations are rounded to int8, dynamically, by row."""


class _Dot(NamedTuple):
    """The static side of a `dot_general` with a weight; hashable."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    weight: int
    precision: Any
    dtype: Any
    integer: bool
    axes: tuple[str, ...]
    blocked: bool

    @property
    def x_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Contracted and batch dimensions of the activations."""
        return self.contract[1 - self.weight], self.batch[1 - self.weight]

    @property
    def w_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Contracted and batch dimensions of the weight."""
        return self.contract[self.weight], self.batch[self.weight]


def _free(ndim: int, contract: Sequence[int], batch: Sequence[int]) -> list[int]:
    return [dim for dim in range(ndim) if dim not in contract and dim not in batch]


def _product(x: jax.Array, values: jax.Array, dot: _Dot) -> jax.Array:
    """The product with the integers themselves: int32 of integer activations, float32 of floating ones."""
    if dot.blocked and (out := _blocked_product(x, values, dot)) is not None:
        return out
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    values = values if integer else values.astype(x.dtype)
    pair = (values, x) if dot.weight == 0 else (x, values)
    accumulator = jnp.int32 if integer else jnp.float32
    precision = None if integer else dot.precision
    numbers = (dot.contract, dot.batch)
    return jax.lax.dot_general(*pair, numbers, precision=precision, preferred_element_type=accumulator)


def _blocked_product(x: jax.Array, values: jax.Array, dot: _Dot) -> jax.Array | None:
    """The product block by block, where the weight is a matrix as it lies in memory."""
    (x_contract, x_batch), (w_contract, _) = dot.x_dims, dot.w_dims
    matrix = blocks.as_matrix(values.shape, w_contract)
    if x_batch or matrix is None or _jax.varying_axes(x):
        return None
    rows, columns, transposed = matrix
    block = blocks.block_size(rows, columns)
    free = _free(x.ndim, x_contract, ())
    if block is None:
        return None
    if jnp.issubdtype(x.dtype, jnp.integer):
        # With more rows, XLA's own int8 product is faster.
        num_rows = math.prod(x.shape[dim] for dim in free)
        if (columns if transposed else block) > blocks.EXACT_DEPTH or num_rows > blocks.FEW_ROWS:
            return None
    flat = jnp.reshape(jnp.transpose(x, [*free, *x_contract]), (-1, columns if transposed else rows))
    out = blocks.matmul(flat, jnp.reshape(values, (rows, columns)), block, transposed=transposed)
    x_shape = [x.shape[dim] for dim in free]
    w_shape = [values.shape[dim] for dim in _free(values.ndim, w_contract, ())]
    return jnp.reshape(out.T, (*w_shape, *x_shape)) if dot.weight == 0 else jnp.reshape(out, (*x_shape, *w_shape))


def _in_output(scale: jax.Array, dims: tuple[Sequence[int], Sequence[int]], other_free: int, first: bool) -> jax.Array:
    """A scale of one operand, laid out to multiply the product: batch, then the left operand's free dimensions."""
    contract, batch = dims
    free = _free(scale.ndim, contract, batch)
    moved = jnp.transpose(scale, [*batch, *free, *contract])
    lead, tail = moved.shape[: len(batch)], moved.shape[len(batch) : len(batch) + len(free)]
    ones = (1,) * other_free
    return jnp.reshape(moved, (*lead, *tail, *ones) if first else (*lead, *ones, *tail))


def _forward(x: jax.Array, values: jax.Array, scale: jax.Array, dot: _Dot) -> jax.Array:
    x_free, w_free = x.ndim - len(sum(dot.x_dims, ())), values.ndim - len(sum(dot.w_dims, ()))
    w_scale = _in_output(scale, dot.w_dims, x_free, dot.weight == 0)
    if dot.integer:
        x_scale = absmax_scale(x, dot.x_dims[0], dot.axes)
        out = _product(to_integers(x, x_scale), values, dot).astype(jnp.float32)
        out = out * _in_output(x_scale, dot.x_dims, w_free, dot.weight == 1)
    else:
        out = _product(x, values, dot)
    return (out * w_scale).astype(dot.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_dot(x: jax.Array, values: jax.Array, scale: jax.Array, dot: _Dot) -> jax.Array:
    return _forward(x, values, scale, dot)


def _scaled_dot_forward(x: jax.Array, values: jax.Array, scale: jax.Array, dot: _Dot) -> tuple[jax.Array, Any]:
    return _forward(x, values, scale, dot), (values, scale, jnp.zeros((0,), x.dtype))


def _scaled_dot_backward(dot: _Dot, saved: Any, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    """The gradient of the activations: the output's, scaled, contracted with the integers' free dimensions."""
    values, scale, like = saved
    (x_contract, x_batch), (w_contract, w_batch) = dot.x_dims, dot.w_dims
    w_free = _free(values.ndim, w_contract, w_batch)
    num_x_free = gradient.ndim - len(w_batch) - len(w_free)
    scaled = gradient.astype(jnp.float32) * _in_output(scale, dot.w_dims, num_x_free, dot.weight == 0)
    start = len(w_batch) if dot.weight == 0 else len(w_batch) + num_x_free
    free_in_output = tuple(range(start, start + len(w_free)))
    contract, batch = (free_in_output, tuple(w_free)), (tuple(range(len(w_batch))), w_batch)
    back = dot._replace(contract=contract, batch=batch, weight=1, integer=False)
    out = _product(scaled.astype(like.dtype), values, back)
    # The product's dimensions are: batch, free of x, then the contracted ones in the weight's order.
    order = sorted(range(len(w_contract)), key=lambda i: w_contract[i])
    x_free = _free(num_x_free + len(x_batch) + len(x_contract), x_contract, x_batch)
    current = [*x_batch, *x_free, *(x_contract[i] for i in order)]
    return jnp.transpose(out, [current.index(dim) for dim in range(len(current))]).astype(like.dtype), None, None


_scaled_dot.defvjp(_scaled_dot_forward, _scaled_dot_backward)
# Traced once for each shape, not once for each layer.
_compiled_dot = jax.jit(_scaled_dot, static_argnums=3)


def _uniform(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays that vary over the same manual mesh axes, as a custom derivative inside `shard_map` needs them."""
    union = frozenset().union(*map(_jax.varying_axes, arrays))
    return [_jax.vary(x, union) for x in arrays]


def _as_it_lies(numbers: Any, w: QuantizedArray, weight: int) -> tuple[Any, QuantizedArray]:
    """A product with a transposed weight as one with the weight before its transposition, where that is the same."""
    if not w.order:
        return numbers, w
    contract, batch = numbers
    if batch[weight] or len(_free(w.ndim, contract[weight], ())) > 1:
        return numbers, w.settled()
    moved = tuple(w.order[dim] for dim in contract[weight])
    return ((moved, contract[1]) if weight == 0 else (contract[0], moved), batch), w.as_it_lies()


def _static(op: Op, numbers: Any, w: QuantizedArray, weight: int, *, integer: bool, blocked: bool) -> _Dot:
    contract, batch = numbers
    names = tuple(dict.fromkeys(name for dim in contract[weight] for name in w.axes_of(dim)))
    return _Dot(
        (tuple(contract[0]), tuple(contract[1])),
        (tuple(batch[0]), tuple(batch[1])),
        weight,
        op.attributes["precision"],
        jnp.dtype(op.outputs[0].dtype),
        integer,
        names,
        blocked,
    )


def _scale_is_free_of(w: QuantizedArray, dims: Sequence[int]) -> bool:
    return all(w.scale.shape[dim] == 1 for dim in dims)


def _dot(
    op: Op, x: Any, w: QuantizedArray, weight: int, *, integer: bool, blocked: bool = False
) -> list[jax.Array] | None:
    if _jax.is_explicit(x) or _jax.is_explicit(w.values):
        # Shardings in types would have to be carried through the scales; the product itself is right.
        return None
    numbers, w = _as_it_lies(op.attributes["dimension_numbers"], w, weight)
    dot = _static(op, numbers, w, weight, integer=integer, blocked=blocked)
    contract, batch = dot.w_dims
    x, values, scale = _uniform(x, w.values, w.scale)
    if not _scale_is_free_of(w, contract):
        if not _scale_is_free_of(w, _free(w.ndim, contract, batch)):
            return None
        # One scale for each contracted element: it belongs to the activations.
        x = x * _like_activations(scale, dot, x.ndim).astype(x.dtype)
        scale = jnp.ones((1,) * w.ndim, jnp.float32)
        scale = _uniform(x, values, scale)[2]
    return [name_dot(_compiled_dot(x, values, scale, dot), bool(batch))]


def _like_activations(scale: jax.Array, dot: _Dot, ndim: int) -> jax.Array:
    """A scale over contracted and batch dimensions of the weight, laid out like the activations."""
    (x_contract, x_batch), (w_contract, w_batch) = dot.x_dims, dot.w_dims
    free = _free(scale.ndim, w_contract, w_batch)
    moved = jnp.transpose(scale, [*w_batch, *w_contract, *free])
    moved = jnp.reshape(moved, moved.shape[: len(w_batch) + len(w_contract)])
    places = [*x_batch, *x_contract]
    moved = jnp.transpose(moved, sorted(range(len(places)), key=lambda i: places[i]))
    return jnp.expand_dims(moved, [dim for dim in range(ndim) if dim not in places])


@rule("dot_general", QuantizedArray)
def _weight_only_dot(call: Call) -> list[jax.Array] | None:
    return _weight_only(call, blocked=False)


@rule("dot_general", QuantizedArray, "cpu")
def _weight_only_dot_cpu(call: Call) -> list[jax.Array] | None:
    return _weight_only(call, blocked=True)


def _weight_only(call: Call, *, blocked: bool) -> list[jax.Array] | None:
    x = call.operands[1 - call.index]
    if isinstance(x, QuantizedArray) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return _dot(call.op, x, call.encoded, call.index, integer=False, blocked=blocked)


@rule("ragged_dot_general", QuantizedArray)
def _weight_only_ragged(call: Call) -> list[jax.Array] | None:
    return _other(call.op, call.operands, integer=False) if call.index == 1 else None


@rule("conv_general_dilated", QuantizedArray)
def _weight_only_convolution(call: Call) -> list[jax.Array] | None:
    return _other(call.op, call.operands, integer=False) if call.index == 1 else None


def _other(op: Op, operands: Sequence[Any], *, integer: bool) -> list[jax.Array] | None:
    """A convolution or a grouped product, where its weight's scales can be applied to the output."""
    x, w, sizes = operands[0], operands[1].settled(), operands[2] if len(operands) > 2 else None
    if isinstance(x, Encoded) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    convolution = op.name == "conv_general_dilated"
    if convolution:
        if integer and op.attributes["batch_group_count"] > 1:
            return None
        reduced = op.attributes["dimension_numbers"].rhs_spec[1:]
    else:
        numbers = op.attributes["ragged_dot_dimension_numbers"]
        (contract, batch) = numbers.dot_dimension_numbers
        reduced = contract[1]
        plain = not batch[0] and numbers.lhs_ragged_dimensions == (0,) and numbers.rhs_group_dimensions == (0,)
        if not plain or x.ndim != 2 or w.ndim != 3:
            return None
    if not _scale_is_free_of(w, reduced):
        return None
    options = tuple((k, v) for k, v in op.attributes.items() if k != "preferred_element_type")
    shared, _ = _activation_dims(op, 1)
    product = Product(convolution, options, shared, jnp.dtype(op.outputs[0].dtype), integer)
    x, values, scale = _uniform(x, w.values, w.scale)
    return [_compiled_product(x, values, scale, sizes, product)]


_compiled_product = jax.jit(scaled_product, static_argnums=4)


@rule("dot_general", SeenArray)
@rule("conv_general_dilated", SeenArray)
@rule("ragged_dot_general", SeenArray)
def _seen(call: Call) -> list[jax.Array]:
    """The product with the master as int8 would hold it; the backward pass rounds again rather than keep a copy."""

    def product(*operands: Any) -> list[jax.Array]:
        dense = [x.decode() if isinstance(x, SeenArray) else x for x in operands]
        return call.again(call.op, dense)

    outputs = jax.checkpoint(product)(*call.operands)
    if call.op.name != "dot_general":
        return outputs
    return [name_dot(outputs[0], bool(call.op.attributes["dimension_numbers"][1][0]))]


def _activation_dims(op: Op, weight: int) -> tuple[tuple[int, ...], int]:
    """Dimensions of the activations that share a scale, and which operand they are.

    A contraction has a scale for each row: all contracted dimensions share it. A convolution has one for each example,
    because a pixel enters many outputs.
    """
    if op.name == "dot_general":
        return tuple(op.attributes["dimension_numbers"][0][1 - weight]), 1 - weight
    if op.name == "ragged_dot_general":
        return tuple(op.attributes["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0]), 0
    batch = op.attributes["dimension_numbers"].lhs_spec[0]
    return tuple(dim for dim in range(len(op.inputs[0].shape)) if dim != batch), 0


def _rounded(op: Op, operands: Sequence[Any], weight: int) -> list[Any]:
    """Operands with the activations rounded to int8, in their own dtype, straight through for gradients."""
    dims, place = _activation_dims(op, weight)
    w, x = operands[weight], operands[place]
    names: tuple[str, ...] = ()
    if isinstance(w, (QuantizedArray, SeenArray)) and op.name == "dot_general":
        w = w.settled()
        names = tuple(dict.fromkeys(n for dim in op.attributes["dimension_numbers"][0][weight] for n in w.axes_of(dim)))
    rounded = list(operands)
    rounded[place] = fake_quantize(x, absmax_scale(jax.lax.stop_gradient(x), dims, names))
    return rounded


@operation(QUANTIZED)
def _quantized_contraction(call: Call) -> list[jax.Array]:
    """Any weight: the rounded activations in the original product, which computes what int8 would."""
    op = call.op.bodies[0].ops[0]
    return call.again(op, _rounded(op, call.operands, call.op.attributes["weight"]))


@rule(QUANTIZED, QuantizedArray)
def _integer(call: Call) -> list[jax.Array] | None:
    return _integer_contraction(call, blocked=False)


@rule(QUANTIZED, QuantizedArray, "cpu")
def _integer_cpu(call: Call) -> list[jax.Array] | None:
    return _integer_contraction(call, blocked=True)


def _integer_contraction(call: Call, *, blocked: bool) -> list[jax.Array] | None:
    """Stored int8 weights: the product in integers, where the scales allow it."""
    op = call.op.bodies[0].ops[0]
    weight = call.op.attributes["weight"]
    if call.index != weight or call.op.attributes["simulated"]:
        return None
    w = call.encoded
    if op.name == "dot_general":
        (contract, _) = op.attributes["dimension_numbers"]
        if _scale_is_free_of(w.settled(), contract[weight]):
            return _dot(op, call.operands[1 - weight], w, weight, integer=True, blocked=blocked)
        return None
    return _other(op, call.operands, integer=True)
