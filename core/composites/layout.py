"""Attention operands in one layout, whatever layout a model has them in.

    query  [batch, queries, groups * repeats, head size]
    key    [batch, keys, groups, head size]
    value  [batch, keys, groups, value size]

which is what `jax.nn.dot_product_attention` and attention kernels take. The way there is read off the axes.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compax.analysis.atoms import Atom, Factors
from compax.analysis.normal import Val
from compax.composites.base import Attention
from compax.composites.masks import in_band
from compax.composites.view import View


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How one array is brought into a layout.

    Attributes:
        shape: the array's own shape.
        factors: sizes of the factors that its dimensions are split into.
        dropped: factors along which it only repeats.
        order: the remaining factors in the order of the layout, with factors of size one for what it lacks.
        grouped: shape in the layout.
    """

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    dropped: tuple[int, ...]
    order: tuple[int, ...]
    grouped: tuple[int, ...]

    def standard(self, x: jax.Array) -> jax.Array:
        """The array in the layout."""
        x = x.reshape(self.factors)
        index = tuple(0 if i in self.dropped else slice(None) for i in range(len(self.factors)))
        return x[index].transpose(self.order).reshape(self.grouped)

    def own(self, x: jax.Array) -> jax.Array:
        """An array in the layout as the model has it; only where nothing is dropped."""
        assert not self.dropped
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return x.reshape([self.factors[i] for i in self.order]).transpose(inverse).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Arrangements of an attention's operands and its result."""

    query: Arrangement
    key: Arrangement
    value: Arrangement
    output: Arrangement


def arrange(view: View, attention: Attention) -> Layout | None:
    """How an attention's operands come into the layout; none if its axes do not tell."""
    batch, groups, repeats = attention.batch, attention.groups, attention.repeats
    wanted = {
        "query": (attention.query, (batch, attention.queries, (*groups, *repeats), attention.head_size)),
        "key": (attention.key, (batch, attention.keys, groups, attention.head_size)),
        "value": (attention.value, (batch, attention.keys, groups, attention.value_size)),
        "output": (attention.output, (batch, attention.queries, (*groups, *repeats), attention.value_size)),
    }
    found = {name: _arrangement(view, x, parts) for name, (x, parts) in wanted.items()}
    if any(arrangement is None for arrangement in found.values()):
        return None
    return Layout(**{name: arrangement for name, arrangement in found.items() if arrangement is not None})


def _arrangement(view: View, x: Val, parts: Sequence[Factors]) -> Arrangement | None:
    atoms = [atom for dim in range(len(x.shape)) for atom in view.factors(x, dim)]
    parts = [view.engine.atoms.expand(part) for part in parts]
    wanted = [atom for part in parts for atom in part]
    rest: list[Atom | None] = list(atoms)
    positions: list[int] = []
    for atom in wanted:
        if atom not in rest:
            return None
        position = rest.index(atom)
        rest[position] = None
        positions.append(position)
    dropped = tuple(i for i, atom in enumerate(rest) if atom is not None)
    if any(not atoms[i].table for i in dropped):
        return None
    kept = [i for i in range(len(atoms)) if i not in dropped]
    return Arrangement(
        shape=x.shape,
        factors=tuple(atom.size for atom in atoms),
        dropped=dropped,
        order=tuple(kept.index(i) for i in positions),
        grouped=tuple(math.prod(atom.size for atom in part) for part in parts),
    )


def attend(
    attention: Attention,
    layout: Layout,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """An attention by `jax.nn.dot_product_attention`, from what was found out about it.

    Args:
        attention: what was found.
        layout: how its operands are arranged.
        query: the attention's own operands, in the model's layout.
        key: likewise.
        value: likewise.
        mask: what the arguments add to the static mask: bool, broadcast to [batch, heads, queries, keys].
        bias: what is added to scores, broadcast to the same.

    Returns:
        The attention's result in the model's layout.
    """
    dtype = jnp.result_type(query, key, value)  # some models keep rotated queries and keys in float32
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    q, k, v = layout.query.standard(query), layout.key.standard(key), layout.value.standard(value)
    static = static_mask(attention, q.shape[1], k.shape[1])
    if static is not None:
        mask = static if mask is None else mask & static
    if attention.softcap is not None:
        return layout.output.own(_capped(attention, q, k, v, mask, bias))
    result = jax.nn.dot_product_attention(q, k, v, mask=mask, bias=bias, scale=attention.scale)
    return layout.output.own(result)


def static_mask(attention: Attention, num_queries: int, num_keys: int) -> jax.Array | None:
    """The static part of a mask as bool[1, 1, queries, keys]; none if all is seen."""
    mask = attention.mask
    if mask.kind == "full" or mask.position is not None:
        return None
    if mask.allowed is not None:
        return jnp.asarray(mask.allowed)[None, None]
    rows, columns = jnp.arange(num_queries)[:, None] + mask.offset, jnp.arange(num_keys)
    seen = in_band(rows - columns, mask.window)
    if mask.kind == "chunked":
        seen &= rows // mask.chunk == columns // mask.chunk
    return seen[None, None]


def _capped(
    attention: Attention,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Scores under `cap * tanh(score / cap)` before masks and biases."""
    assert attention.softcap is not None
    batch, queries, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, queries, groups, heads // groups, size)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * attention.scale
    scores = (attention.softcap * jnp.tanh(scores / attention.softcap)).reshape(batch, heads, queries, -1)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, groups, heads // groups, queries, -1)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(batch, queries, heads, -1)
