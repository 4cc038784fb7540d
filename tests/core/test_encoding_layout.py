"""Layout operations on encodings: decoding afterwards gives the same bits as the operation on the decoded array.

An operation is written as the JAX function that a model would hold, and evaluated by lowering on the encoding, and by
JAX on the decoded array.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from compax import ir, lowering
from compax.encoding import Encoded
from compax.passes.quantize.encoding import quantize_array
from encoded import MAKERS, SHAPE, Maker, assert_same_bits, decoded, dense, every_encoding, mesh


def scanned(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, w: (carry + 1, w.T), 0, x)[1]


def indexed(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, i: (carry, x[i].T), 0, jnp.arange(x.shape[0]))[1]


def constrained(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec("a", None, ("b", "c"))))


def mapped(x: jax.Array) -> jax.Array:
    specs = PartitionSpec(None, "a", "b")
    moved = PartitionSpec("b", None, "a")
    return jax.shard_map(lambda w: jnp.transpose(w, (2, 0, 1)), mesh=mesh(), in_specs=specs, out_specs=moved)(x)


def barrier(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((x, jnp.zeros(3)))[0]


LAYOUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "transpose": lambda x: jnp.transpose(x, (2, 0, 1)),
    "swap the last two": lambda x: jnp.swapaxes(x, 1, 2),
    "merge the first two": lambda x: x.reshape(24, 8),
    "merge the last two": lambda x: x.reshape(4, 48),
    "split the first": lambda x: x.reshape(2, 2, 6, 8),
    "split the middle": lambda x: x.reshape(4, 2, 3, 8),
    "split the last": lambda x: x.reshape(4, 6, 2, 4),
    "merge all": lambda x: x.reshape(-1),
    "merge and split": lambda x: x.reshape(4, 12, 4),
    "add dimensions": lambda x: x[:, None, :, None],
    "squeeze": lambda x: jnp.squeeze(x[1:2, :, 3:4], (0, 2)),
    "squeeze from the end": lambda x: jax.lax.squeeze(x[:, :1], (-2,)),
    "slice": lambda x: x[1:3, 2:, :5],
    "strided slice": lambda x: x[::2, 1::3],
    "one layer": lambda x: x[2],
    "dynamic slice": lambda x: jax.lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(2), jnp.int32(7)), (2, 3, 4)),
    "dynamic layer": lambda x: jax.lax.dynamic_index_in_dim(x, jnp.int32(3), 0, keepdims=False),
    "concatenate the first": lambda x: jnp.concatenate([x, x[:1]], 0),
    "concatenate the middle": lambda x: jnp.concatenate([x[:, :2], x], 1),
    "concatenate the last": lambda x: jnp.concatenate([x, x], 2),
    "concatenate with dense": lambda x: jnp.concatenate([jnp.ones_like(x), x], 2),
    "concatenate dense after it": lambda x: jnp.concatenate([x, jnp.ones_like(x)], 0),
    "cast": lambda x: x.astype(jnp.bfloat16),
    "copy": lambda x: jnp.copy(x),
    "barrier": barrier,
    "scan over the stack": scanned,
    "scan with a counter": indexed,
    "vmap over the stack": jax.vmap(lambda w: w.T[1:]),
    "vmap of a dynamic slice": lambda x: jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(x, i, 0, False))(
        jnp.array([3, 0])
    ),
    "sharding constraint": constrained,
    "shard_map": mapped,
    "nested jit": lambda x: jax.jit(lambda x: x.T)(x),
    "remat": lambda x: jax.checkpoint(lambda x: x.T)(x),
    "cond": lambda x: jax.lax.cond(jnp.bool_(True), lambda x: x[0], lambda x: x[1], x),
    "while": lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (jnp.int32(0), x))[1],
}

INDICES = jnp.array([[3, 0], [1, 3]])
LOOKUPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rows": lambda x: x[INDICES],
    "rows out of bounds, filled": lambda x: jnp.take(x, INDICES + 2, axis=0, mode="fill"),
    "rows out of bounds, filled with 7": lambda x: jnp.take(x, INDICES + 2, axis=0, mode="fill", fill_value=7.0),
    "rows out of bounds, clipped": lambda x: jnp.take(x, INDICES + 2, axis=0, mode="clip"),
    "columns": lambda x: jnp.take(x, jnp.array([7, 2, 2]), axis=2, mode="clip"),
    "elements": lambda x: x[jnp.array([0, 3]), jnp.array([5, 1]), jnp.array([7, 0])],
    "batched": lambda x: jax.vmap(lambda w, i: w[i])(x, jnp.array([5, 0, 1, 1])),
}


def evaluate(function: Callable[..., Any], *operands: Any) -> tuple[Any, lowering.Evaluator]:
    """What lowering makes of a JAX function on encodings, and the evaluator that did it."""
    graph = ir.trace(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands))
    evaluator = lowering.Evaluator()
    (output,) = evaluator.run(graph, operands)
    return output, evaluator


# -- Decoding commutes with layout ------------------------------------------------------------------------------------

UNPACKS = {"concatenate with dense", "concatenate dense after it", "while"}
"""Operations whose result cannot be an encoding; they are right all the same."""


@every_encoding
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(make: Maker, name: str) -> None:
    x, function = make(), LAYOUTS[name]
    result, evaluator = evaluate(function, x)
    assert_same_bits(decoded(result), function(x.decode()))
    inside_bodies = {"scan over the stack", "scan with a counter", "cond", "shard_map"}
    if name not in UNPACKS | inside_bodies | {"vmap of a dynamic slice"}:
        assert isinstance(result, Encoded)
        assert not evaluator.decodes


@every_encoding
@pytest.mark.parametrize("name", LOOKUPS)
def test_gather(make: Maker, name: str) -> None:
    x, function = make(), LOOKUPS[name]
    result, _ = evaluate(function, x)
    assert_same_bits(decoded(result), function(x.decode()))


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_of_a_table_are_looked_up_in_the_encoding(kind: str) -> None:
    """One scale for each row: no dense table is made, also where rows out of bounds become NaN."""
    table = MAKERS[kind](dense(10, 6), (1,))
    for mode in ("clip", "fill"):
        _, evaluator = evaluate(lambda x, mode=mode: jnp.take(x, jnp.array([9, 0, 12]), axis=0, mode=mode), table)
        assert not evaluator.decodes


@pytest.mark.parametrize("kind", MAKERS)
def test_parts_with_different_scales_in_a_row(kind: str) -> None:
    """One part has a scale for each column, the next for each row."""
    parts = [MAKERS[kind](dense(4, 6, seed=1), (0,)), MAKERS[kind](dense(4, 6, seed=2), (1,))]
    for dimension in (0, 1):
        result, evaluator = evaluate(lambda *x, dimension=dimension: jnp.concatenate(x, dimension), *parts)
        assert isinstance(result, Encoded)
        assert not evaluator.decodes
        assert_same_bits(result.decode(), jnp.concatenate([part.decode() for part in parts], dimension))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cast_back_to_a_wider_type_keeps_the_rounding(kind: str) -> None:
    """What went through bfloat16 is rounded to bfloat16."""
    x = MAKERS[kind](dense(*SHAPE), (1,))
    result, _ = evaluate(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x)
    assert_same_bits(decoded(result), x.decode().astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_bfloat16_parameter_computes_as_bfloat16(kind: str) -> None:
    x = MAKERS[kind](dense(*SHAPE, dtype=jnp.bfloat16), (1,))
    assert x.dtype == jnp.bfloat16
    assert x.decode().dtype == jnp.bfloat16
    result, _ = evaluate(lambda x: x.astype(jnp.float32), x)
    assert_same_bits(decoded(result), x.decode().astype(jnp.float32))


def test_a_cast_to_integers_unpacks() -> None:
    x = quantize_array(dense(4, 4) * 10, (0,))
    result, evaluator = evaluate(lambda x: x.astype(jnp.int32), x)
    assert_same_bits(result, x.decode().astype(jnp.int32))
    assert [d.operation for d in evaluator.decodes] == ["convert_element_type"]


def test_an_empty_slice() -> None:
    x = quantize_array(dense(*SHAPE), (1,))
    result, _ = evaluate(lambda x: x[:0].reshape(0, 8), x)
    assert decoded(result).shape == (0, 8)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[Any]]:
    """A shape, dimensions that share scales, and a chain of layout operations on it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple))
    reduced = tuple(sorted(draw(st.sets(st.integers(0, len(shape) - 1)))))
    steps: list[Any] = []
    current = shape
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["transpose", "reshape", "slice", "concatenate", "squeeze"]))
        if kind == "transpose":
            steps.append((kind, tuple(draw(st.permutations(range(len(current)))))))
            current = tuple(current[i] for i in steps[-1][1])
        elif kind == "reshape":
            current = _refactored(draw, math.prod(current))
            steps.append((kind, current))
        elif kind == "slice":
            bounds = [sorted((draw(st.integers(0, n - 1)), draw(st.integers(1, n)))) for n in current]
            cut = tuple(slice(a, max(a + 1, b), draw(st.integers(1, 2))) for a, b in bounds)
            steps.append((kind, cut))
            current = tuple(len(range(n)[c]) for n, c in zip(current, cut, strict=True))
        elif kind == "concatenate":
            dim = draw(st.integers(0, len(current) - 1))
            if math.prod(current) <= 200:
                steps.append((kind, dim))
                current = (*current[:dim], 2 * current[dim], *current[dim + 1 :])
        elif 1 in current and len(current) > 1:
            steps.append((kind, current.index(1)))
            current = (*current[: current.index(1)], *current[current.index(1) + 1 :])
    return shape, reduced, steps


def _refactored(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    shape: list[int] = []
    while size > 1:
        factor = draw(st.sampled_from([n for n in range(2, size + 1) if size % n == 0]))
        shape.append(factor)
        size //= factor
        if draw(st.booleans()):
            shape.append(1)
    return tuple(shape) or (1,)


def apply(steps: Sequence[Any], x: Any, library: Any) -> Any:
    """The chain in JAX or in NumPy."""
    for kind, argument in steps:
        if kind == "slice":
            x = x[argument]
        elif kind == "concatenate":
            x = library.concatenate([x, x], argument)
        else:
            x = getattr(library, kind)(x, argument)
    return x


@hypothesis.given(layouts(), st.sampled_from(sorted(MAKERS)))
@hypothesis.settings(max_examples=12)  # each new shape is compiled
def test_chains_of_layout_operations(chain: Any, kind: str) -> None:
    shape, reduced, steps = chain
    x = MAKERS[kind](dense(*shape), reduced)
    result, evaluator = evaluate(lambda x: apply(steps, x, jnp), x)
    assert_same_bits(decoded(result), apply(steps, np.asarray(x.decode()), np))
    assert not evaluator.decodes


def test_the_base_declines_every_layout() -> None:
    """An encoding without layout methods is unpacked, and right."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Plain(Encoded):
        array: Any

        @property
        def shape(self) -> tuple[int, ...]:
            return self.array.shape

        @property
        def dtype(self) -> Any:
            return self.array.dtype

        def decode(self) -> jax.Array:
            return self.array

        def spec(self, spec: PartitionSpec) -> Encoded:
            return Plain(spec)

        def manual(self, spec: PartitionSpec) -> Encoded:
            return self

        def stacked(self, length: int) -> Encoded:
            return self

    x = Plain(dense(*SHAPE))
    for name in ("transpose", "one layer", "dynamic layer", "concatenate the last", "cast", "while"):
        result, _ = evaluate(LAYOUTS[name], x)
        assert_same_bits(decoded(result), LAYOUTS[name](x.decode()))
    _, evaluator = evaluate(LAYOUTS["transpose"], x)
    assert [d.operation for d in evaluator.decodes] == ["transpose"]
