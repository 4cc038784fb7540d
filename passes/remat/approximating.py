"""Values that are kept as int8: which may be, and how much less is kept with them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compax import _jax, ir
from compax.analysis.buffers import Buffers, size_bytes
from compax.analysis.flat import Flat
from compax.analysis.tracing import Scoped, argument_shapes, evaluated
from compax.capture import Captured
from compax.compression import encoded_shapes
from compax.ir import Op, Path, Value
from compax.program import Program
from compax.rewrites.checkpoint import Region, graph_at

BOUND = 0.05
"""The relative error of gradients that the contract allows."""

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_EXPONENTIALS = frozenset({"exp", "exp2", "expm1", "log", "log1p"})
_STATISTICS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"})
_READ_BACK = frozenset(
    {"exp", "exp2", "expm1", "tanh", "logistic", "sqrt", "rsqrt", "cbrt", "tan", "erf_inv", "max", "min", "cummax"}
    | {"cummin", "cumprod", "sort"}
)
"""Operations whose derivative is computed from their result."""
_WORTH = 0.75
"""The share of a value's bytes that its int8 form may take."""


def refusals(captured: Captured, regions: Sequence[Region]) -> dict[Path, str]:
    """The operations in layers whose results are not to be kept as int8, each with the reason."""
    found: dict[Path, str] = {}
    flats: dict[Path, tuple[Flat, frozenset[Value], frozenset[Value]]] = {}
    for region in regions:
        if region.holder not in flats:
            flat = Flat(graph_at(captured.graph, region.holder), prefix=region.holder)
            statistics = {y for node in flat.nodes if node.op.name in _STATISTICS for y in node.outputs}
            flats[region.holder] = flat, _before_exponentials(flat), frozenset(statistics)
    kernels: set[Path] = set()
    for path, op in ir.walk(captured.graph):
        if op.equation is None or any((*path[:i], (path[i][0], -1)) in kernels for i in range(len(path) - 1)):
            kernels.add(path)
        region = next((region for region in regions if region.holds(path)), None)
        if region is not None and (reason := _refusal(op, path, *flats[region.holder])) is not None:
            found[path] = reason
    reason = "a kernel's backward pass reads what it keeps exactly; use save"
    return {**found, **dict.fromkeys(kernels, reason)}


def _refusal(
    op: Op, path: Path, flat: Flat, before_exponentials: frozenset[Value], statistics: frozenset[Value]
) -> str | None:
    if path not in flat.results:
        return "it is in a loop within its layer"
    (value,) = flat.results[path] if len(op.outputs) == 1 else (None,)
    if value is None:
        return "it is a constant, or several results"
    y = op.outputs[0]
    if y.dtype not in _DTYPES or not y.shape:
        return f"it is {_jax.aval_text(y.aval)}: arrays of float32, bfloat16 and float16 are kept as int8"
    if op.name in _READ_BACK:
        return "its own derivative reads it exactly"
    if value in statistics:
        return "it is a statistic, by which others are scaled"
    if value in before_exponentials:
        return "an exponential is taken of it, in which a small error is a large one"
    if sum(size_bytes(Value(_jax.abstract(part))) for part in encoded_shapes(y)) > _WORTH * size_bytes(y):
        return f"it has rows of {y.shape[-1]}, with scales that need the room that is saved"
    return None


def _before_exponentials(flat: Flat) -> frozenset[Value]:
    """What exponentials are taken of, with what that is computed from element by element or by reductions.

    Scores of attention are among them, and masked they hold the largest numbers: the others would be rounded to zero.
    """
    found: set[Value] = set()
    for node in reversed(flat.nodes):
        passes = node.fusible or node.op.name in _STATISTICS
        if node.op.name in _EXPONENTIALS or (passes and any(y in found for y in node.outputs)):
            found.update(node.inputs)
    return frozenset(found)


def code_bytes(x: Value, held: Buffers) -> int:
    """Bytes of the int8 form of a value, as it lies in memory."""
    return sum(held.full_bytes(Value(_jax.abstract(part))) for part in encoded_shapes(x))


def residual_bytes(program: Program, captured: Captured) -> int:
    """Bytes of all that the forward pass of a graph leaves to its backward pass. Predicted."""
    trainable, frozen = program.partition()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (trainable, frozen, program.state))

    def residuals(trainable: Any, frozen: Any, state: Any, argument: Any) -> Any:
        def outputs(trainable: Any) -> list[jax.Array]:
            found = evaluated(Scoped(captured), {**frozen, **trainable}, state, argument)
            return [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]

        return jax.vjp(outputs, trainable)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, *shapes, argument_shapes(captured)))
    return sum(size_bytes(Value(_jax.abstract(leaf))) for leaf in leaves)
