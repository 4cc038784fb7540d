"""What one operation costs: floating-point operations by a formula for each primitive.

The formulas are those of XLA's own cost analysis, found by compiling single operations (jax 0.10.2, CPU, 2026-11), so
that the figures can be held against a compiler's:

- a multiply-add counts two; an elementwise operation one for each element, whatever its dtype; a conversion or a
  comparison too
- transcendental functions (exp, log, tanh, sin, sqrt, pow, erf, ...) have a counter of their own and no floating-point
  operations; functions that JAX writes out as polynomials (erfc, asin, lgamma, ...) count as what is written out
- a reduction counts its operation once for each element that disappears; moving data counts nothing
- a convolution counts the products with elements that exist: not those with padding or with the holes of a dilation

Where XLA's figure is not what is computed, another formula stands here: `DEVIATIONS` lists them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax.encoding import leaf_nbytes
from compax.ir import Op


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one operation computes.

    Attributes:
        flops: floating-point operations; those on integers and booleans count too.
        transcendentals: transcendental functions.
        dtype: what it computes in, such as "float32": of a product the wider of its operands.
        product: whether a chip's matrix unit computes it.
        bytes: bytes that it says it moves, or none if they follow from its operands and results.
    """

    flops: int = 0
    transcendentals: int = 0
    dtype: str = ""
    product: bool = False
    bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Unknown:
    """Why an operation could not be counted."""

    reason: str


Formula = Callable[[Op], "Work | Unknown"]

DEVIATIONS: Mapping[str, str] = {
    "cumsum and its kin": "XLA counts the window that it is written as, n^2; here n - 1 for each row of n",
    "sort": "XLA takes the logarithm of all elements; here that of the sorted dimension",
    "top_k": "XLA counts nothing; here n log2(k)",
    "ragged_dot": "XLA on CPU multiplies every row by every group; here a row is multiplied by its own group alone",
    "fft": "XLA counts 8 n floor(log2 n); here 5 n log2 n, half of that for real input or output",
    "random bits": "XLA counts one turn of a loop of five; here all of them",
    "scan, while": "XLA counts one turn; here every turn, where their number is known",
    "linear algebra": "XLA counts nothing of what a library computes; here the leading term (Golub, Van Loan, 2013)",
    "conj": "XLA counts 4 an element, for taking a number apart and putting it together; here 1",
}
"""Where the figures are not XLA's, and why."""

_FORMULAS: dict[str, Formula] = {}


def formula(name: str) -> Callable[[Formula], Formula]:
    """Registers what an operation of ours costs, beside its lowering. Without one, its reference body is counted."""

    def register(function: Formula) -> Formula:
        assert name not in _FORMULAS, f"a formula for '{name}' exists"
        _FORMULAS[name] = function
        return function

    return register


def has_formula(op: Op) -> bool:
    """Whether an operation is counted as a whole, without a look at its bodies."""
    return op.name in _FORMULAS or (op.equation is not None and op.name in RULES)


def work(op: Op) -> Work | Unknown:
    """What an operation computes, once: loops and devices around it are the caller's business."""
    rule = _FORMULAS.get(op.name) or (RULES.get(op.name) if op.equation is not None else None)
    return rule(op) if rule is not None else Unknown(f"no formula for the operation '{op.name}'")


# -- Elementwise ------------------------------------------------------------------------------------------------------


def named(text: str) -> frozenset[str]:
    """Names that a text lists."""
    return frozenset(text.split())


_PLAIN = named(
    "add add_any sub mul div rem max min neg abs sign floor ceil round is_finite eq ne lt le gt ge eq_to lt_to le_to "
    "and or xor not shift_left shift_right_logical shift_right_arithmetic population_count clz select_n clamp square "
    "convert_element_type bitcast_convert_type reduce_precision real imag complex conj reciprocal mulhi"
)
TRANSCENDENTAL = named("exp log tanh sin cos tan sqrt rsqrt cbrt erf expm1 log1p pow atan2 atan")
"""Functions that XLA counts apart."""

WRITTEN_OUT: dict[str, tuple[int, int]] = {
    "logistic": (3, 1),
    "exp2": (1, 1),
    "asin": (5, 2),
    "acos": (3, 2),
    "sinh": (10, 3),
    "cosh": (3, 2),
    "asinh": (11, 3),
    "acosh": (7, 4),
    "atanh": (6, 2),
    "erfc": (62, 1),
    "erf_inv": (37, 2),
    "lgamma": (53, 4),
    "digamma": (73, 3),
    "bessel_i0e": (83, 1),
    "bessel_i1e": (83, 1),
    "zeta": (121, 11),
    "polygamma": (260, 19),
    "nextafter": (24, 0),
}
"""Operations and transcendental functions for each element of functions that JAX writes out."""
if jax.__version_info__ >= (0, 12):
    WRITTEN_OUT.update({"asin": (3, 2), "lgamma": (292, 0), "digamma": (75, 3), "polygamma": (262, 19)})


ELEMENTWISE = _PLAIN | TRANSCENDENTAL | WRITTEN_OUT.keys() | {"integer_pow"}
"""Operations that compute each element of their result from the elements at the same place."""


def _size(x: Any) -> int:
    return math.prod(x.shape)


def _name(x: Any) -> str:
    return _dtype_name(x.dtype)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    return str(dtype)


def _bits(x: Any) -> int:
    return _dtype_bits(x.dtype)


@functools.cache
def _dtype_bits(dtype: Any) -> int:
    return leaf_nbytes(jax.ShapeDtypeStruct((8,), dtype))


def _wider(op: Op) -> str:
    return _name(max(op.inputs[:2], key=_bits))


def _computed_in(op: Op) -> str:
    """The dtype of an elementwise operation: its operands', of the widest of them where they differ."""
    return _name(max((*op.inputs, op.outputs[-1]) if op.name == "select_n" else op.inputs, key=_bits))


def _elementwise(flops: int, transcendentals: int) -> Formula:
    def rule(op: Op) -> Work:
        size = _size(op.outputs[0])
        return Work(flops * size, transcendentals * size, _computed_in(op))

    return rule


def _convert(op: Op) -> Work:
    same = op.inputs[0].dtype == op.outputs[0].dtype
    return Work(0 if same else _size(op.outputs[0]), 0, _name(op.outputs[0]))


def _integer_power(op: Op) -> Work:
    """Powers by repeated squaring; a negative one divides once more."""
    power = abs(op.attributes["y"])
    products = power.bit_length() - 1 + power.bit_count() - 1 if power else 0
    return Work((products + (op.attributes["y"] < 0)) * _size(op.outputs[0]), 0, _name(op.outputs[0]))


# -- Products ---------------------------------------------------------------------------------------------------------


def _dot(op: Op) -> Work:
    contract = op.attributes["dimension_numbers"][0][0]
    depth = math.prod(op.inputs[0].shape[dim] for dim in contract)
    # Without a contraction it multiplies and adds nothing up.
    return Work((2 * depth if contract else 1) * _size(op.outputs[0]), 0, _wider(op), product=True)


def _scaled_product(op: Op) -> Work:
    """A product of scaled blocks, [B, M, K] and [B, N, K]; the scales are not counted."""
    return Work(2 * _size(op.outputs[0]) * op.inputs[0].shape[-1], 0, _wider(op), product=True)


def _library_attention(products: int) -> Formula:
    """Attention as a library computes it: so many products of queries with keys, the mask not taken into account."""

    def rule(op: Op) -> Work:
        query, key = op.inputs[0], op.inputs[1]
        sequence = key.shape[1 if op.attributes["layout"] == 0 else 2]
        return Work(2 * products * _size(query) * sequence, 0, _name(query), product=True)

    return rule


def _ragged_dot(op: Op) -> Work:
    numbers = op.attributes["ragged_dot_dimension_numbers"]
    (contract, _), _ = numbers.dot_dimension_numbers
    left, out = op.inputs[0].shape, _size(op.outputs[0])
    depth = math.prod(left[dim] for dim in contract)
    if set(contract) & set(numbers.lhs_ragged_dimensions):
        # The ragged dimension is contracted: each row goes into one group of the result.
        groups = op.outputs[0].shape[0]
        return Work(2 * out // max(groups, 1) * depth, 0, _wider(op), product=True)
    return Work(2 * out * depth, 0, _wider(op), product=True)


def _convolution(op: Op) -> Work:
    numbers, attributes = op.attributes["dimension_numbers"], op.attributes
    image, kernel, out = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    positions = 1
    for place, (low, _) in enumerate(attributes["padding"]):
        positions *= _products(
            image[numbers.lhs_spec[2 + place]],
            kernel[numbers.rhs_spec[2 + place]],
            out[numbers.out_spec[2 + place]],
            low,
            attributes["window_strides"][place],
            attributes["lhs_dilation"][place],
            attributes["rhs_dilation"][place],
        )
    batch = image[numbers.lhs_spec[0]] // attributes["batch_group_count"]
    features = kernel[numbers.rhs_spec[1]] * kernel[numbers.rhs_spec[0]]
    return Work(2 * batch * features * positions, 0, _wider(op), product=True)


def _products(image: int, kernel: int, out: int, low: int, stride: int, holes: int, spread: int) -> int:
    """How many (output position, kernel position) pairs of one dimension meet an element that exists."""
    place = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * spread
    return int(np.sum((place >= 0) & (place < (image - 1) * holes + 1) & (place % holes == 0)))


# -- Reductions, windows, scatters, sorts -----------------------------------------------------------------------------


def _reduce(flops: int) -> Formula:
    def rule(op: Op) -> Work:
        return Work(flops * (_size(op.inputs[0]) - _size(op.outputs[0])), 0, _name(op.inputs[0]))

    return rule


def _arg_reduce(op: Op) -> Work:
    # NaN is looked for in floating numbers.
    flops = 9 if jnp.issubdtype(op.inputs[0].dtype, jnp.inexact) else 7
    return Work(flops * (_size(op.inputs[0]) - _size(op.outputs[0])), 0, _name(op.inputs[0]))


def _body_work(op: Op) -> Work:
    """One application of the scalar function that a reduction or a scatter holds."""
    if not op.bodies:
        return Work()
    total = [work(inner) for inner in op.bodies[0].ops]
    known = [x for x in total if isinstance(x, Work)]
    return Work(sum(x.flops for x in known), sum(x.transcendentals for x in known))


def _scaled(part: Work, times: int, dtype: str) -> Work:
    return Work(part.flops * times, part.transcendentals * times, dtype)


def _general_reduce(op: Op) -> Work:
    return _scaled(_body_work(op), _size(op.inputs[0]) - _size(op.outputs[0]), _name(op.inputs[0]))


def _cumulative(flops: int, transcendentals: int = 0) -> Formula:
    def rule(op: Op) -> Work:
        size, axis = _size(op.outputs[0]), op.attributes["axis"]
        steps = size - size // max(op.outputs[0].shape[axis], 1)
        return Work(flops * steps, transcendentals * steps, _name(op.outputs[0]))

    return rule


def _window(op: Op) -> Work:
    steps = _size(op.outputs[0]) * (math.prod(op.attributes["window_dimensions"]) - 1)
    return _scaled(_body_work(op) if op.bodies else Work(1), steps, _name(op.inputs[0]))


def _select_and_scatter(op: Op) -> Work:
    """For each element of the source a window is searched, and one addition is made."""
    return Work(_size(op.inputs[0]) * math.prod(op.attributes["window_dimensions"]), 0, _name(op.inputs[0]))


def _select_and_gather(op: Op) -> Work:
    steps = _size(op.outputs[0]) * (math.prod(op.attributes["window_dimensions"]) - 1)
    return Work(2 * steps, 0, _name(op.inputs[0]))


def _scatter(op: Op) -> Work:
    combine = Work() if op.name == "scatter" else _body_work(op) if op.bodies else Work(1)
    return _scaled(combine, _size(op.inputs[2]), _name(op.inputs[0]))


def _sort(op: Op) -> Work:
    length = op.inputs[0].shape[op.attributes["dimension"]]
    return Work(_size(op.inputs[0]) * _log2(length), 0, _name(op.inputs[0]))


def _top_k(op: Op) -> Work:
    return Work(_size(op.inputs[0]) * max(_log2(op.outputs[0].shape[-1]), 1), 0, _name(op.inputs[0]))


def _log2(count: int) -> int:
    return max(count - 1, 0).bit_length()


def _fft(op: Op) -> Work:
    lengths = op.attributes["fft_lengths"]
    real = any(not jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (op.inputs[0], op.outputs[0]))
    size = max(_size(op.inputs[0]), _size(op.outputs[0]))
    return Work(round((2.5 if real else 5) * size * math.log2(max(math.prod(lengths), 1))), 0, _name(op.inputs[0]))


# -- Random numbers, linear algebra, collectives, kernels -------------------------------------------------------------

_THREEFRY = 60
"""Operations for 32 random bits: 20 rounds of 5, and 19 for keys, for two words (Salmon et al., 2011)."""


def _random_bits(op: Op) -> Work:
    words = _size(op.outputs[0]) * max(op.attributes.get("bit_width", 32), 32) // 32
    return Work(_THREEFRY * words, 0, "u32")


def _threefry(op: Op) -> Work:
    return Work(_THREEFRY * sum(map(_size, op.outputs)), 0, "u32")


def _matrix(count: Callable[[int, int], float]) -> Formula:
    """Linear algebra: a count for a matrix of m rows and n columns, for every matrix of a batch."""

    def rule(op: Op) -> Work:
        *batch, rows, columns = op.inputs[0].shape
        return Work(round(math.prod(batch) * count(rows, columns)), 0, _name(op.inputs[0]))

    return rule


def _triangular_solve(op: Op) -> Work:
    """Each right-hand side takes n^2 for a matrix of n rows."""
    return Work(op.inputs[0].shape[-1] * _size(op.inputs[1]), 0, _name(op.inputs[0]))


def _collective(op: Op) -> Work:
    """A sum over devices adds once for each element on each of them."""
    return Work(sum(map(_size, op.outputs)), 0, _name(op.outputs[0]))


def _nothing(op: Op) -> Work:
    return Work(0, 0, _name(op.outputs[0]) if op.outputs and op.outputs[0].dtype is not None else "")


def _pallas(op: Op) -> Work | Unknown:
    estimate = op.attributes.get("cost_estimate")
    if estimate is None:
        return Unknown("a Pallas kernel without a cost estimate: pass cost_estimate=pl.CostEstimate(...)")
    return Work(
        int(estimate.flops),
        int(estimate.transcendentals),
        _computed_in(op),
        product=True,
        bytes=int(estimate.bytes_accessed) or None,
    )


MOVES = named(
    "broadcast_in_dim reshape transpose squeeze expand_dims iota pad concatenate slice dynamic_slice gather rev "
    "copy copy_p split dynamic_update_slice stack unstack tile broadcast_to"
)
"""Operations that move data and compute nothing."""

NAMING = named(
    "name compress optimization_barrier sharding_constraint constrain reshard mesh_cast pvary pcast stop_gradient "
    "device_put random_wrap random_unwrap random_clone layout_constraint with_memory_space_constraint "
    "reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast_p core_pvary pin unpin from_edtype to_edtype multiple_of"
)
"""Operations that hand their operands on and neither compute nor move anything by themselves."""

_ASIDE = named(
    "axis_index platform_index create_token after_all random_seed empty empty2 iota_2x32_shape debug_callback "
    "debug_print inspect_sharding shape_assertion check unreachable dimension_size dim_as_value "
    "lu_pivots_to_permutation"
)

SCATTERS = named("scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max")
"""Operations that change parts of an array."""

_PLAIN_REDUCTIONS = named("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor")
REDUCTIONS = _PLAIN_REDUCTIONS | named("reduce argmax argmin")
"""Operations under which dimensions disappear."""

_MOVING_COLLECTIVES = named(
    "all_gather all_gather_invariant all_gather_reduced all_to_all ragged_all_to_all ppermute pbroadcast pgather"
)
_ADDING_COLLECTIVES = named("psum psum2 psum_invariant pmax pmin reduce_scatter unreduced_psum")

RULES: dict[str, Formula] = {
    **dict.fromkeys(_PLAIN, _elementwise(1, 0)),
    **dict.fromkeys(TRANSCENDENTAL, _elementwise(0, 1)),
    **{name: _elementwise(*counts) for name, counts in WRITTEN_OUT.items()},
    "convert_element_type": _convert,
    "integer_pow": _integer_power,
    **dict.fromkeys(MOVES | NAMING | _MOVING_COLLECTIVES, _nothing),
    **dict.fromkeys(_ASIDE, _nothing),
    **dict.fromkeys(_ADDING_COLLECTIVES, _collective),
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "scaled_dot": _dot,
    "scaled_matmul_wrapper": _scaled_product,
    "dot_product_attention_fwd_wrapper": _library_attention(2),
    "dot_product_attention_bwd_wrapper": _library_attention(5),
    "conv_general_dilated": _convolution,
    **dict.fromkeys(_PLAIN_REDUCTIONS, _reduce(1)),
    "reduce": _general_reduce,
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), _cumulative(1)),
    "cumlogsumexp": _cumulative(8, 2),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    "select_and_scatter_add": _select_and_scatter,
    "select_and_gather_add": _select_and_gather,
    **dict.fromkeys(SCATTERS, _scatter),
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _top_k,
    "fft": _fft,
    "random_bits": _random_bits,
    "random_split": _threefry,
    "random_fold_in": _threefry,
    "threefry2x32": _threefry,
    "rng_bit_generator": _threefry,
    "rng_uniform": _threefry,
    "cholesky": _matrix(lambda m, n: n**3 / 3),
    "lu": _matrix(lambda m, n: min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)),
    "geqrf": _matrix(lambda m, n: 2 * min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)),
    "qr": _matrix(lambda m, n: 4 * min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)),
    "householder_product": _matrix(lambda m, n: 2 * min(m, n) ** 2 * (max(m, n) - min(m, n) / 3)),
    "eigh": _matrix(lambda m, n: 9 * n**3),
    "svd": _matrix(lambda m, n: 4 * m * n * min(m, n) + 22 * min(m, n) ** 3),
    "triangular_solve": _triangular_solve,
    "pallas_call": _pallas,
}
"""A formula for each primitive. What is neither here nor has a body that defines it is reported, never left out."""
