"""Which operations compute in any floating dtype, and what of them changes with it: one table.

An operation that is not in it, or whose rule declines, is evaluated in the dtypes that JAX recorded.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compax import _jax
from compax.ir import Graph, Op, Operand, import_jaxpr


@dataclasses.dataclass(frozen=True)
class Change:
    """What changes in an operation when its floating operands take another dtype.

    Attributes:
        parameters: parameters of the equation with new values, those with computations included.
        output: dtype of its floating outputs.
        bodies: its nested graphs.
    """

    parameters: Mapping[str, Any]
    output: Any
    bodies: tuple[Graph, ...] = ()


Rule = Callable[[Op, Any], Change | None]
"""From an operation and a dtype to what changes; `None` where this operation only works as it was recorded."""


@functools.cache
def retypable(dtype: Any) -> bool:
    """Whether values of a dtype may change it: floating numbers of 16 bits and more.

    Narrower ones are storage formats, which a model asks for on purpose.
    """
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2


def widest(*dtypes: Any) -> Any:
    """The narrowest floating dtype that holds all of some, whatever promotion JAX is set to allow."""
    sizes = {jnp.dtype(dtype) for dtype in dtypes}
    if sizes == {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}:
        return jnp.dtype(jnp.float32)
    return max(sizes, key=lambda dtype: dtype.itemsize)


def floating(operands: tuple[Operand, ...]) -> list[int]:
    """Positions of the operands whose dtype may change."""
    return [index for index, x in enumerate(operands) if retypable(x.dtype)]


def _same(op: Op, dtype: Any) -> Change | None:
    return Change({}, dtype)


def _multiply(op: Op, dtype: Any) -> Change | None:
    return Change({}, dtype) if op.attributes.get("out_dtype") is None else None


def _product(op: Op, dtype: Any) -> Change | None:
    """A product accumulates in what its operands promote to, or in more if the model asked for more."""
    precision = op.attributes["precision"]
    if isinstance(precision, (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset)):
        return None
    recorded = op.attributes["preferred_element_type"]
    operands = widest(*(op.inputs[index].dtype for index in floating(op.inputs)))
    if recorded is None or recorded == operands:
        return Change({"preferred_element_type": None if recorded is None else jnp.dtype(dtype)}, dtype)
    accumulator = widest(recorded, dtype)
    return Change({"preferred_element_type": accumulator}, accumulator)


def _scatter(op: Op, dtype: Any) -> Change | None:
    """A scatter that combines values holds the combination as a nested computation of two scalars."""
    assert op.equation is not None
    recorded = op.equation.params["update_jaxpr"]
    if recorded is None:
        return Change({}, dtype)
    if op.equation.params["update_consts"]:
        return None
    body, _ = _jax.open_jaxpr(_jax.close(recorded))
    if len(body.eqns) != 1:
        return None
    scalars = [_jax.with_dtype(v.aval, dtype) for v in body.invars]
    combined, _ = _jax.open_jaxpr(_jax.trace(lambda *xs: _jax.bind(body.eqns[0], xs), *scalars))
    return Change({"update_jaxpr": combined}, dtype, (import_jaxpr(_jax.close(combined)),))


_ELEMENTWISE = """
    abs add add_any acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp cos cosh digamma div eq
    eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac integer_pow is_finite le le_to lgamma log log1p
    logistic lt lt_to max min ne neg nextafter pow rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub
    tan tanh
"""
_LAYOUT = """
    all_gather all_gather_invariant all_to_all broadcast_in_dim concatenate compress constrain copy copy_p dynamic_slice
    dynamic_update_slice gather mesh_cast name pad pbroadcast pcast ppermute pvary reshape reshard rev
    sharding_constraint slice split squeeze stack tile transpose unstack
"""
_REDUCTIONS = """
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum pmax pmin reduce_max reduce_min reduce_prod reduce_scatter
    reduce_sum reduce_window_max reduce_window_min reduce_window_sum top_k
"""

POLYMORPHIC: Mapping[str, Rule] = {
    **dict.fromkeys((_ELEMENTWISE + _LAYOUT + _REDUCTIONS).split(), _same),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
    **dict.fromkeys(("dot_general", "ragged_dot_general", "conv_general_dilated"), _product),
    "mul": _multiply,
}
"""Operations whose floating operands share one dtype, which their floating outputs take."""

OPERANDWISE = frozenset({"optimization_barrier", "psum", "psum_invariant", "sort"})
"""Operations with an output for each operand, of that operand's dtype, whatever the others have."""


def why_not(op: Op) -> str:
    """Why an operation is evaluated in the dtypes that JAX recorded."""
    if op.name in _jax.CUSTOM_DERIVATIVES:
        return "its derivative rule belongs to the body as it was recorded"
    if op.name in POLYMORPHIC:
        return "it asks for this dtype by an option"
    return "there is no rule for it in another dtype"
