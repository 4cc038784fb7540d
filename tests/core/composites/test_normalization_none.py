"""What looks like a normalization and is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import compax
from compax.composites.normalization import find_normalizations
from compax.composites.view import View

B, T, D = 3, 6, 20
"""Batch, positions, features."""

X = jax.random.normal(jax.random.key(0), (B, T, D))
PARAMS = {"w": jnp.ones(D), "dense": jnp.ones((D, D)) * 0.1, "moment": jnp.ones((D, D))}


def mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def mean_square(x: jax.Array) -> jax.Array:
    return mean(jnp.square(x))


def slow(x: jax.Array) -> jax.Array:
    return mean(jnp.square(x - mean(x)))


def adam(p: Any, x: jax.Array) -> jax.Array:
    gradient = jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(p["dense"])
    moment = 0.9 * p["moment"] + 0.1 * jnp.square(gradient)
    return p["dense"] - gradient / (jnp.sqrt(moment) + 1e-8)


def attention(p: Any, x: jax.Array) -> jax.Array:
    scores = jnp.einsum("btd,bsd->bts", x, x) * jax.lax.rsqrt(jnp.float32(D))
    return jax.nn.softmax(scores) @ x


def other_positions(p: Any, x: jax.Array) -> jax.Array:
    """Statistics of one position, used for another of as many."""
    square = jnp.mean(jnp.square(x), axis=-1)
    return x * jax.lax.rsqrt(square + 1e-5)[:, None, :]


def misplaced_mean(p: Any, x: jax.Array) -> jax.Array:
    middle = jnp.mean(x, axis=-1)
    return (x - middle[:, None, :]) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)


NONE: dict[str, tuple[Callable[[Any, jax.Array], jax.Array], jax.Array]] = {
    "length": (lambda p, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), X),
    "sum of squares": (lambda p, x: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-5), X),
    "another count": (lambda p, x: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / (D - 1) + 1e-5), X),
    "unbiased variance": (lambda p, x: (x - mean(x)) * jax.lax.rsqrt(x.var(-1, keepdims=True, ddof=1)), X),
    "another value": (lambda p, x: x * jax.lax.rsqrt(mean_square(x + 1) + 1e-5), X),
    "not centered": (lambda p, x: x * jax.lax.rsqrt(slow(x) + 1e-5) * p["w"], X),
    "another mean": (lambda p, x: (x - mean(x + 1)) * jax.lax.rsqrt(slow(x) + 1e-5), X),
    "means of other dimensions": (
        lambda p, x: (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5),
        X,
    ),
    "shifted the wrong way": (
        lambda p, x: x * jax.lax.rsqrt(slow(x) + 1e-5) + mean(x) * jax.lax.rsqrt(slow(x) + 1e-5),
        X,
    ),
    "the root, not its reciprocal": (lambda p, x: x * jnp.sqrt(mean_square(x) + 1e-5), X),
    "epsilon outside of the root": (lambda p, x: (x - mean(x)) / (jnp.std(x, -1, keepdims=True) + 1e-5), X),
    "a negative epsilon": (lambda p, x: x * jax.lax.rsqrt(mean_square(x) - 1e-5), X),
    "the mean of cubes": (lambda p, x: x * jax.lax.rsqrt(mean(x * x * x) + 1e-5), X),
    "of a parameter": (lambda p, x: x @ (p["dense"] * jax.lax.rsqrt(mean_square(p["dense"]) + 1e-5)), X),
    "root of a constant": (attention, X),
    "optimizer": (adam, X[:, 0]),
    "distance": (lambda p, x: jnp.sqrt(mean_square(x - mean(x))), X),
    "other positions": (other_positions, X[:, :, :T]),
    "misplaced mean": (misplaced_mean, X[:, :, :T]),
    "stored variance without a mean": (lambda p, x: x * jax.lax.rsqrt(p["w"] + 1e-5), X),
    "stored for each element": (
        lambda p, x: (x - p["dense"]) * jax.lax.rsqrt(p["moment"] + 1e-5),
        X[0, :1].repeat(D, 0),
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_none(name: str) -> None:
    function, x = NONE[name]
    assert find_normalizations(View(compax.capture(function, PARAMS, x).graph())) == []
