"""The operation that attentions become, and how it is computed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compax.lowering import Call, operation
from compax.passes.flash import gpu, plain, splash
from compax.passes.flash.spec import Spec, combined, mean_where_nothing, rows_with_nothing

OPERATION = "flash_attention"
"""An operation of ours: an attention that a fused kernel computes; its body is the model's own."""


@operation(OPERATION)
def _flash_attention(call: Call) -> list[Any]:
    spec: Spec = call.op.attributes["spec"]
    count = 3 + len(spec.padding) + len(spec.given) + len(spec.bias)
    operands = [call.evaluator.dense(x, OPERATION) for x in call.operands[:count]]
    return [attend(spec, operands).astype(call.op.outputs[0].dtype)]


def attend(spec: Spec, operands: Sequence[jax.Array]) -> jax.Array:
    """An attention by its kernel.

    Args:
        spec: what is known of it.
        operands: query, key and value, then what says which keys are there, which pairs are seen, and biases; all as
            the model has them.

    Returns:
        The result as the model has it, in the dtype of the product with the values.
    """
    layout = spec.layout
    query, key = (x.astype(spec.query_dtype) for x in operands[:2])
    q, k = layout.query.standard(query), layout.key.standard(key)
    v = layout.value.standard(operands[2].astype(spec.value_dtype))
    rest = iter(operands[3:])
    padding = combined([spread(next(rest) != 0) for spread in spec.padding])
    given = combined([spread(next(rest) != 0) for spread in spec.given])
    bias = [spread.sign * spread(next(rest)).astype(jnp.float32) for spread in spec.bias]
    added = None if not bias else sum(bias[1:], bias[0])
    if spec.kernel == "plain":
        return layout.output.own(_plain(spec, q, k, v, combined([x for x in (padding, given) if x is not None]), added))
    present = None if padding is None else jnp.broadcast_to(padding[:, 0, 0], (k.shape[0], k.shape[1]))
    if spec.kernel == "cudnn":
        out = gpu.cudnn_attention(spec, q, k, v, present, added)
    else:
        out = _pallas(spec, q, k, v, present)
    if present is not None:
        out = mean_where_nothing(out, v, rows_with_nothing(spec.pattern, q.shape[1], present)[..., None])
    return layout.output.own(out)


def _plain(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, bias: jax.Array | None
) -> jax.Array:
    out, lse = plain.attention(
        q,
        k,
        v,
        spec.pattern,
        scale=spec.scale,
        softcap=spec.softcap,
        seen=seen,
        bias=bias,
        block_q=spec.block_q,
        block_k=spec.block_k,
    )
    return mean_where_nothing(out, v, jnp.isinf(lse)) if spec.may_see_nothing else out


def _pallas(spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None) -> jax.Array:
    """A Pallas kernel, on each device of a mesh for its own sequences and heads."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, present: jax.Array | None) -> jax.Array:
        if spec.kernel == "splash":
            return splash.attention(spec, q, k, v, present)
        return gpu.pallas_attention(spec, q, k, v)

    if spec.spread is None:
        return local(q, k, v, present)
    heads, keys = spec.spread.specs()
    # The kernels do not say over which axes their results vary.
    mapped = jax.shard_map(
        local,
        mesh=spec.spread.mesh,
        in_specs=(heads, heads, heads, None if present is None else keys),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(q, k, v, present)
