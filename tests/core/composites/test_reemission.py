"""Attention written anew from what was found out about it computes what the model computes.

Every attention becomes one operation, lowered by `jax.nn.dot_product_attention` from kind of mask, scale, softcap,
grouping, biases and axes: the proof that what was recognized is what was there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax import lowering
from compax.analysis.normal import Val
from compax.composites import layout
from compax.composites.base import Attention
from compax.composites.view import View
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.experiments.benchmarks import zoo
from compax.meaning import Meaning
from compax.rewrites.outline import Region, outline

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPERATION = "test_reemitted_attention"
ERRORS: list[float] = []
"""Of each attention that ran: how far it is from the model's own, relative to the largest value."""


@dataclasses.dataclass(frozen=True)
class Emission:
    """What the lowering of an attention needs, beside its operands."""

    attention: Attention
    layout: layout.Layout
    order: tuple[str, ...]
    view: View

    def __call__(self, *operands: Any) -> Any:
        given: dict[str, Any] = dict(zip(self.order, operands, strict=False))
        q, k, v = (given[name] for name in ("query", "key", "value"))
        mask: Any = None
        for i, x in enumerate((*self.attention.mask.padding, *self.attention.mask.given)):
            seen = self.broadcast(x, given[f"mask {i}"] != 0)
            mask = seen if mask is None else mask & seen
        if self.attention.mask.position is not None:
            seen = self.by_position(given["position"])
            mask = seen if mask is None else mask & seen
        bias: Any = None
        for i, x in enumerate(self.attention.bias):
            added = self.broadcast(x, given[f"bias {i}"]).astype(jnp.float32)
            bias = added if bias is None else bias + added
        if bias is not None:
            bias = jnp.maximum(bias, -1e30)
        return layout.attend(self.attention, self.layout, q, k, v, mask=mask, bias=bias)

    def by_position(self, position: Any) -> Any:
        rows = jnp.arange(self.layout.query.grouped[1])[:, None] if position.ndim == 0 else position[..., None]
        rows = (rows + position if position.ndim == 0 else rows)[None] if rows.ndim == 2 else rows
        keys = position[:, None] if self.attention.mask.by_keys else jnp.arange(self.layout.key.grouped[1])
        distance = rows - keys
        before, after = self.attention.mask.window
        seen = jnp.ones(distance.shape, bool)
        seen = seen & (distance <= before) if before >= 0 else seen
        seen = seen & (distance >= -after) if after >= 0 else seen
        return seen[:, None]

    def broadcast(self, x: Val, array: Any) -> Any:
        """A mask or bias as [batch, heads, queries, keys], by its axes; the last of equal ones is the keys'."""
        attention, atoms = self.attention, self.view.engine.atoms
        heads = (*attention.groups, *attention.repeats)
        slots = [attention.batch, heads, attention.queries, attention.keys]
        taken: list[int] = []
        for dim in reversed(range(array.ndim)):
            factors = self.view.factors(x, dim)
            if not factors:
                taken.append(-1)
                continue
            fits = [i for i in (3, 2, 1, 0) if i not in taken and self.same(factors, atoms.expand(slots[i]))]
            assert fits, f"{x} has a dimension {factors} that is none of the attention's"
            taken.append(fits[0])
        taken.reverse()
        kept = [i for i, slot in enumerate(taken) if slot >= 0]
        array = array.reshape([array.shape[i] for i in kept])
        order = sorted(range(len(kept)), key=lambda i: taken[kept[i]])
        sizes = [1] * 4
        for i in kept:
            sizes[taken[i]] = x.shape[i]
        return array.transpose(order).reshape(sizes)

    @staticmethod
    def same(one: Any, other: Any) -> bool:
        sizes = [int(np.prod([a.size for a in factors])) for factors in (one, other)]
        known = [a for a in one if not a.table]
        return sizes[0] == sizes[1] and all(a in other for a in known)


@lowering.operation(OPERATION)
def _reemitted(call: lowering.Call) -> list[Any]:
    emission = call.op.attributes["emission"]
    result = emission(*call.operands[: len(emission.order)]).astype(call.op.outputs[0].dtype)
    (reference,) = call.evaluator.run(call.op.bodies[0], call.operands)
    error = jnp.abs(result - reference).max() / jnp.abs(reference).max()
    jax.debug.callback(lambda error: ERRORS.append(float(error)), error)
    return [result]


def emitted(program: compax.Program) -> tuple[compax.Program, int]:
    """The program with all its attentions written anew, and how many there are."""
    (key, captured), *_ = program.graphs.items()
    meaning = Meaning(captured)
    regions = []
    for attention in meaning.of_kind(Attention):
        arranged = layout.arrange(meaning.view, attention)
        assert arranged is not None, attention.name
        named = {"query": attention.query, "key": attention.key, "value": attention.value}
        named |= {f"mask {i}": x for i, x in enumerate((*attention.mask.padding, *attention.mask.given))}
        if attention.mask.position is not None:
            named["position"] = attention.mask.position
        named |= {f"bias {i}": x for i, x in enumerate(attention.bias)}
        emission = Emission(attention, arranged, tuple(named), meaning.view)
        operands, others = tuple(named.values())[:3], tuple(named.values())[3:]
        regions.append(Region(OPERATION, attention.output, operands, {"emission": emission}, others))
    changed = outline(captured, meaning.view.normal, regions)
    return program.replace(graphs={**program.graphs, key: changed}), len(regions)


CASES = [
    pytest.param(name, variant, marks=() if i == 0 else pytest.mark.slow, id=f"{name}-{variant}")
    for name in zoo.ENTRIES
    for i, variant in enumerate(v for v in zoo.variants(name) if v.mode == "eval")
    if name != "flax_resnet"
]


@foreign_warnings
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_model(name: str, variant: zoo.Variant) -> None:
    case = zoo.build(name, dtype=variant.dtype, mode=variant.mode, padding=variant.padding, decode=variant.decode)
    program = case.capture()
    changed, count = emitted(program)
    assert count == sum(a.count for a in zoo.expected(name, decode=variant.decode).attentions) or "scanned" in name
    compax.verify(changed)
    ERRORS.clear()
    actual = jax.block_until_ready(case.output(changed(*case.arguments(), **case.kwargs)))
    jax.effects_barrier()
    tolerance = rounding_tolerance(jnp.dtype(variant.dtype))
    assert len(ERRORS) >= count
    assert max(ERRORS) <= tolerance
    if variant.dtype == "float32":  # in bfloat16 what layers round differently adds up
        expected = case.output(program(*case.arguments(), **case.kwargs))
        assert largest_relative_error(np.asarray(expected), np.asarray(actual)) <= tolerance
