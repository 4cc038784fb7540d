"""Provenance: from which dimensions of a parameter each dimension of a value is made, and where a derivation ends."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from compax import ir
from compax.analysis.provenance import Origin, layout, parameter_origin, reshape_dims, reshape_groups, sliced


def derive(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Origin | None:
    """The origin of what a function of parameters `p0`, `p1`, ... returns; nested bodies are not entered."""
    graph = ir.trace(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    env = {value: parameter_origin(f"p{i}", len(value.shape)) for i, value in enumerate(graph.inputs)}
    for op in graph.ops:
        operands = [env.get(x) if isinstance(x, ir.Value) else None for x in op.inputs]
        for value in op.outputs:
            if (origin := layout(op, operands)) is not None:
                env[value] = origin
    (output,) = graph.outputs
    return env.get(output) if isinstance(output, ir.Value) else None


def dims(function: Callable[..., Any], *shape: int) -> list[set[int]] | None:
    """The parameter's dimensions in each dimension of the result; one of size 1 may be named for a neighbour."""
    origin = derive(function, shape)
    if origin is None:
        return None
    (part,) = origin.parts
    sizes = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return [set(d) if size > 1 else set() for d, size in zip(part.dims, sizes, strict=True)]


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda w: w, (4, 6), [{0}, {1}]),
        (lambda w: w.T, (4, 6), [{1}, {0}]),
        (lambda w: jnp.transpose(w, (2, 0, 1)), (2, 3, 4), [{2}, {0}, {1}]),
        (lambda w: w.astype(jnp.bfloat16), (4, 6), [{0}, {1}]),
        (lambda w: w[1:3, ::2], (4, 6), [{0}, {1}]),
        (lambda w: w[2], (4, 6, 8), [{1}, {2}]),
        (lambda w: w[..., 0], (4, 6, 8), [{0}, {1}]),
        (lambda w: jax.lax.squeeze(jax.lax.dynamic_slice(w, (1, 0, 0), (1, 6, 8)), (0,)), (4, 6, 8), [{1}, {2}]),
        (lambda w: w.reshape(24, 8), (4, 6, 8), [{0, 1}, {2}]),
        (lambda w: w.reshape(4, 48), (4, 6, 8), [{0}, {1, 2}]),
        (lambda w: w.reshape(2, 2, 6, 8), (4, 6, 8), [{0}, {0}, {1}, {2}]),
        (lambda w: w.reshape(8, 6), (4, 12), [{0, 1}, {0, 1}]),
        (lambda w: w.reshape(4, 1, 6), (4, 6), [{0}, set(), {1}]),
        (lambda w: w[:, None], (4, 6), [{0}, set(), {1}]),
        (lambda w: jnp.broadcast_to(w[None], (1, 4, 6)), (4, 6), [set(), {0}, {1}]),
        (lambda w: jax.lax.rev(w, (0,)), (4, 6), [{0}, {1}]),
        (jax.lax.stop_gradient, (4, 6), [{0}, {1}]),
        (jnp.copy, (4, 6), [{0}, {1}]),
        (lambda w: jax.lax.reduce_precision(w, 8, 7), (4, 6), [{0}, {1}]),
        (lambda w: w.T.reshape(2, 3, 4)[1].astype(jnp.bfloat16).T, (4, 6), [{0}, {1}]),
    ],
)
def test_layout_operations_keep_dimensions(function: Any, shape: tuple[int, ...], expected: list[set[int]]) -> None:
    assert dims(function, *shape) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w * 2,
        lambda w: -w,
        lambda w: w + w,
        jnp.tanh,
        lambda w: jnp.sum(w, 0, keepdims=True),
        lambda w: jnp.broadcast_to(w[None], (3, 4, 6)),
        lambda w: jnp.broadcast_to(w[:1], (4, 6)),
        lambda w: w @ w.T,
        lambda w: jnp.concatenate([w, jnp.ones((1, 6))]),
        lambda w: jnp.pad(w, 1),
        lambda w: jax.lax.argmax(w, 0, jnp.int32),
        lambda w: jax.lax.cumsum(w, 0),
        lambda w: jax.lax.sort(w, dimension=0),
    ],
)
def test_operations_that_compute_end_a_derivation(function: Any) -> None:
    assert dims(function, 4, 6) is None


def test_a_concatenation_has_several_parts() -> None:
    origin = derive(lambda q, k: jnp.concatenate([q, k.T], 1), (4, 6), (2, 4))
    assert origin is not None
    assert [part.parameter for part in origin.parts] == ["p0", "p1"]
    assert [part.dims for part in origin.parts] == [
        (frozenset({0}), frozenset({1})),
        (frozenset({1}), frozenset({0})),
    ]


def test_a_concatenation_of_one_parameter_has_one_part() -> None:
    origin = derive(lambda w: jnp.concatenate([w, w], 0), (4, 6))
    assert origin is not None
    assert len(origin.parts) == 1


def test_a_concatenation_with_something_else_has_no_origin() -> None:
    assert derive(lambda q, k: jnp.concatenate([q, jnp.tanh(k)]), (4, 6), (4, 6)) is None


def test_a_scanned_slice_loses_the_leading_dimension() -> None:
    origin = sliced(parameter_origin("w", 3))
    assert origin is not None
    assert origin.parts[0].dims == (frozenset({1}), frozenset({2}))
    assert sliced(None) is None


def test_an_operation_without_operands_has_no_origin() -> None:
    (op,) = ir.trace(lambda: jax.lax.iota(jnp.float32, 4)).ops
    assert layout(op, []) is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), []),
        ((6,), (6,), [([0], [0])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((2, 3), (6,), [([0, 1], [0])]),
        ((4, 6, 8), (4, 48), [([0], [0]), ([1, 2], [1])]),
        ((2, 6), (4, 3), [([0, 1], [0, 1])]),
    ],
)
def test_groups_of_a_reshape(before: tuple[int, ...], after: tuple[int, ...], expected: Any) -> None:
    assert reshape_groups(before, after) == expected


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    primes = draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=7))

    def grouped() -> tuple[int, ...]:
        shape, current = [], 1
        for prime in primes:
            current *= prime
            if draw(st.booleans()):
                shape.append(current)
                current = 1
        return (*shape, current) if current > 1 or draw(st.booleans()) else tuple(shape)

    return grouped(), grouped()


@hypothesis.given(reshapes())
def test_groups_cover_a_reshape(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Every dimension is in one group, in order, and the products of a group are equal."""
    before, after = pair
    groups = reshape_groups(before, after)
    assert [i for left, _ in groups for i in left] == list(range(len(before)))
    assert [j for _, right in groups for j in right] == list(range(len(after)))
    for left, right in groups:
        assert math.prod(before[i] for i in left) == math.prod(after[j] for j in right)


@hypothesis.given(reshapes())
@hypothesis.settings(max_examples=50)
def test_a_reshape_names_every_dimension_that_an_index_depends_on(
    pair: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Checked on the indices themselves: moving along a new dimension changes only those that are named for it."""
    before, after = pair
    named = reshape_dims(tuple(frozenset((i,)) for i in range(len(before))), before, after)
    coordinates = np.indices(before).reshape(len(before), *after)
    for dim in range(len(after)):
        for source in range(len(before)):
            if (np.diff(coordinates[source], axis=dim) != 0).any():
                assert source in named[dim]
