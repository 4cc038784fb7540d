"""What looks like a feed-forward network and is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import compax
from compax.composites.base import FeedForward
from compax.composites.feed_forward import find_feed_forwards
from compax.composites.view import View

B, T, D, F = 3, 6, 20, 28
"""Batch, positions, model, hidden."""


def weight(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape) * 0.3


X = weight(B, T, D)
PARAMS = {
    "up": weight(D, F),
    "gate": weight(D, F),
    "down": weight(F, D),
    "fused": weight(D, 2 * F),
    "thirds": weight(D, 3 * F),
    "bu": weight(F),
    "bd": weight(D),
    "square": weight(D, D),
    "other": weight(D, D),
    "narrow": weight(D, F // 2),
}


def found(function: Callable[..., Any], *args: Any) -> list[FeedForward]:
    return find_feed_forwards(View(compax.capture(function, *args).graph()))


def normalize(h: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def attention(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = x @ p["square"], x @ p["other"], x @ p["square"]
    return jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v @ p["other"]


def over_half(p: Any, x: jax.Array) -> jax.Array:
    hidden = x @ p["up"]
    return jnp.concatenate([jax.nn.relu(hidden[..., : F // 2]), hidden[..., F // 2 :]], -1) @ p["down"]


def over_half_by_mask(p: Any, x: jax.Array) -> jax.Array:
    hidden = x @ p["up"]
    return jnp.where(jnp.arange(F) < F // 2, jax.nn.relu(hidden), hidden) @ p["down"]


def first_token(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu((x @ p["up"])[:, : T // 2]) @ p["down"]


def mixed_up(p: Any, x: jax.Array) -> jax.Array:
    """Positions and hidden features are as many, and change places on one way."""
    hidden = x @ p["up"][:, :T]
    return (jax.nn.relu(hidden) * jnp.swapaxes(hidden, 1, 2)) @ p["down"][:T]


def mixed_gate(p: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.relu(x @ p["gate"][:, :T]) * jnp.swapaxes(x @ p["up"][:, :T], 1, 2)) @ p["down"][:T]


def overlapping(p: Any, x: jax.Array) -> jax.Array:
    fused = x @ p["fused"]
    return (jax.nn.silu(fused[..., :F]) * fused[..., 1 : F + 1]) @ p["down"]


def twice_one_half(p: Any, x: jax.Array) -> jax.Array:
    fused = x @ p["fused"]
    return (jax.nn.silu(fused[..., :F]) * fused[..., :F]) @ p["down"]


def one_half(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.silu((x @ p["fused"])[..., :F]) @ p["down"]


def three_parts(p: Any, x: jax.Array) -> jax.Array:
    a, b, c = jnp.split(x @ p["thirds"], 3, axis=-1)
    return (jax.nn.silu(a) * b * c) @ p["down"]


def tied(p: Any, x: jax.Array) -> jax.Array:
    """One matrix twice: its hidden dimension is the model's own."""
    return jax.nn.relu(x @ p["square"]) @ p["square"]


def convolutions(p: Any, x: jax.Array) -> jax.Array:
    dims = ("NWC", "WIO", "NWC")
    hidden = jax.lax.conv_general_dilated(x, p["up"][None], (1,), "SAME", dimension_numbers=dims)
    return jax.lax.conv_general_dilated(jax.nn.relu(hidden), p["down"][None], (1,), "SAME", dimension_numbers=dims)


NONE: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "identity": lambda p, x: (x @ p["up"]) @ p["down"],
    "biases alone": lambda p, x: (x @ p["up"] + p["bu"]) @ p["down"] + p["bd"],
    "a factor alone": lambda p, x: (0.5 * (x @ p["up"])) @ p["down"],
    "a learned factor alone": lambda p, x: (p["bu"] * (x @ p["up"])) @ p["down"],
    "low rank adapter": lambda p, x: x @ p["square"] + 2.0 * ((x @ p["narrow"]) @ p["narrow"].T),
    "two products without activation": lambda p, x: ((x @ p["up"]) * (x @ p["gate"])) @ p["down"],
    "products of two sources": lambda p, x: (jax.nn.silu(x @ p["gate"]) * ((x + 1) @ p["up"])) @ p["down"],
    "a sum of two products": lambda p, x: jax.nn.silu(x @ p["gate"] + x @ p["up"]) @ p["down"],
    "two activations": lambda p, x: (jax.nn.silu(x @ p["gate"]) * jnp.tanh(x @ p["up"])) @ p["down"],
    "three products": lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) * (x @ p["up"][::-1])) @ p["down"],
    "a norm between": lambda p, x: normalize(jax.nn.gelu(x @ p["up"])) @ p["down"],
    "a softmax between": lambda p, x: jax.nn.softmax(x @ p["up"]) @ p["down"],
    "attention": attention,
    "a residual between": lambda p, x: (x + jax.nn.relu(x @ p["square"])) @ p["other"],
    "only an activation": lambda p, x: jax.nn.relu(x) @ p["square"],
    "gated by the source": lambda p, x: (x * jax.nn.sigmoid(x @ p["square"])) @ p["other"],
    "running sums": lambda p, x: jnp.cumsum(jax.nn.relu(x @ p["up"]), axis=-1) @ p["down"],
    "running sums of positions": lambda p, x: jnp.cumsum(jax.nn.relu(x @ p["up"]), axis=1) @ p["down"],
    "rolled": lambda p, x: jnp.roll(jax.nn.relu(x @ p["up"]), 1, axis=-1) @ p["down"],
    "reversed": lambda p, x: jax.nn.relu(x @ p["up"])[..., ::-1] @ p["down"],
    "over half": over_half,
    "over half by a mask": over_half_by_mask,
    "some positions": first_token,
    "positions and features mixed up": mixed_up,
    "gate and up mixed up": mixed_gate,
    "contracts positions": lambda p, x: jnp.einsum("btf,td->bfd", jax.nn.relu(x @ p["up"]), p["square"][:T]),
    "heads kept": lambda p, x: jax.nn.relu((x @ p["up"]).reshape(B, T, 4, F // 4)) @ p["square"][: F // 4],
    "overlapping halves": overlapping,
    "twice one half": twice_one_half,
    "one half alone": one_half,
    "three parts": three_parts,
    "tied": tied,
    "convolutions": convolutions,
}


@pytest.mark.parametrize("name", NONE)
def test_none(name: str) -> None:
    assert found(NONE[name], PARAMS, X) == []


def test_masked_by_an_argument_is_none() -> None:
    def function(p: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[..., None], jax.nn.relu(x @ p["up"]), 0) @ p["down"]

    assert found(function, PARAMS, X, jnp.ones((B, T), bool)) == []


def test_noise_is_none() -> None:
    def function(p: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        hidden = x @ p["up"]
        return jax.nn.relu(hidden + jax.random.normal(key, hidden.shape)) @ p["down"]

    assert found(function, PARAMS, X, jax.random.key(0)) == []
