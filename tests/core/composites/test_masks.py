"""Masks and score functions, told by evaluating them; and what must not be claimed of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import compax
from compax.composites.attention import find_attentions
from compax.composites.base import Attention
from compax.composites.view import View

B, T, D, H, K = 3, 12, 20, 4, 5
ROWS, COLUMNS = jnp.arange(T)[:, None], jnp.arange(T)
PARAMS = {name: jax.random.normal(jax.random.key(i), (D, H, K)) * 0.3 for i, name in enumerate("qkv")}
X = jax.random.normal(jax.random.key(9), (B, T, D))
NEGATIVE = float(jnp.finfo(jnp.float32).min)


def attend(params: Any, x: jax.Array, change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(change(jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5))
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def only(model: Callable[..., Any], *args: Any, **options: Any) -> Attention:
    (attention,) = find_attentions(View(compax.capture(model, PARAMS, *args, **options).graph()))
    return attention


def masked(seen: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda scores: jnp.where(seen, scores, NEGATIVE)


STATIC = {
    "full": (ROWS >= -1, "full"),
    "causal": (ROWS >= COLUMNS, "causal"),
    "window": ((ROWS >= COLUMNS) & (ROWS - COLUMNS < 4), "window 4"),
    "two-sided window": (abs(ROWS - COLUMNS) <= 2, "window -2..2"),
    "chunked": ((ROWS >= COLUMNS) & (ROWS // 4 == COLUMNS // 4), "chunked 4"),
    "prefix": ((ROWS >= COLUMNS) | (COLUMNS < 3), "other"),
    "anti-causal": (ROWS <= COLUMNS, "window 0.."),
    "strictly causal but for the first": ((ROWS > COLUMNS) | (ROWS + COLUMNS == 0), "other"),
    "every other key": ((ROWS - COLUMNS) % 2 == 0, "other"),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_masks(name: str) -> None:
    seen, text = STATIC[name]
    assert str(only(lambda params, x: attend(params, x, masked(seen)), X).mask) == text


def added(scores: jax.Array) -> jax.Array:
    return scores + jnp.where(ROWS >= COLUMNS, 0.0, -1e9)


def multiplied_and_added(scores: jax.Array) -> jax.Array:
    seen = jnp.tril(jnp.ones((T, T)))
    return scores * seen - 1e10 * (1 - seen)


def infinite(scores: jax.Array) -> jax.Array:
    return jnp.where(ROWS < COLUMNS, -jnp.inf, scores)


def from_a_table(scores: jax.Array) -> jax.Array:
    table = jnp.tril(jnp.ones((1, 1, 64, 64), bool))
    return jnp.where(jax.lax.dynamic_slice(table, (0, 0, 0, 0), (1, 1, T, T)), scores, -1e4)


@pytest.mark.parametrize("change", [added, multiplied_and_added, infinite, from_a_table], ids=lambda f: f.__name__)
def test_causal_masks_in_every_form(change: Callable[..., Any]) -> None:
    attention = only(lambda params, x: attend(params, x, change), X)
    assert attention.mask.kind == "causal"
    assert attention.scale == pytest.approx(K**-0.5, rel=1e-4)
    assert attention.bias == ()


def test_padding_apart_from_the_static_part() -> None:
    def model(params: Any, x: jax.Array, padding: jax.Array) -> jax.Array:
        seen = (ROWS >= COLUMNS) & (padding[:, None, None, :] > 0)
        return attend(params, x, masked(seen))

    mask = only(model, X, jnp.ones((B, T), jnp.int32)).mask
    assert (mask.kind, [x.input.path for x in mask.padding if x.input]) == ("causal", ["padding"])
    assert not mask.given


def test_a_mask_that_is_an_argument_says_nothing_until_it_is_constant() -> None:
    def model(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return attend(params, x, masked(mask[:, None]))

    seen = jnp.broadcast_to(ROWS >= COLUMNS, (B, T, T))
    mask = only(model, X, seen).mask
    assert (mask.kind, len(mask.given)) == ("full", 1)
    assert only(model, X, seen, constant=("mask",)).mask.kind == "causal"


def test_positions_as_an_argument() -> None:
    def model(params: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
        seen = positions[:, None, :, None] >= COLUMNS
        return attend(params, x, masked(seen))

    mask = only(model, X, jnp.broadcast_to(COLUMNS, (B, T))).mask
    assert mask.kind == "causal"
    assert mask.position is not None
    assert mask.position.input is not None
    assert mask.position.input.path == "positions"


# -- What must not be claimed -----------------------------------------------------------------------------------------


def test_segments_are_no_padding() -> None:
    def model(params: Any, x: jax.Array, segments: jax.Array) -> jax.Array:
        return attend(params, x, masked(segments[:, None, :, None] == segments[:, None, None, :]))

    mask = only(model, X, jnp.zeros((B, T), jnp.int32)).mask
    assert mask.kind == "unknown"
    assert "segments" in mask.unknown


def test_a_mask_that_differs_between_heads_is_not_named() -> None:
    reach = jnp.arange(1, H + 1)[:, None, None]
    mask = only(lambda params, x: attend(params, x, masked((reach > ROWS - COLUMNS) & (ROWS >= COLUMNS))), X).mask
    assert mask.kind == "unknown"
    assert "heads" in mask.unknown


def test_a_window_as_long_as_the_example_is_causal_for_that_length_and_a_window_for_others() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        rows, columns = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[1])
        return attend(params, x, masked((rows >= columns) & (rows - columns < T)))

    program = compax.capture(model, PARAMS, X)
    longer = program.specialize(jnp.zeros((B, 2 * T, D)))
    kinds = [str(find_attentions(View(captured))[0].mask) for captured in longer.graphs.values()]
    assert kinds == ["causal", f"window {T}"]


def test_a_mask_made_from_activations_is_not_known() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return attend(params, x, masked((x.sum(-1) > 0)[:, None, None, :]))

    mask = only(model, X).mask
    assert mask.kind == "unknown" or mask.given


def test_a_bias_is_no_mask_and_alibi_is_told() -> None:
    slopes = 2.0 ** -jnp.arange(1, H + 1)

    def alibi(params: Any, x: jax.Array) -> jax.Array:
        return attend(params, x, lambda scores: masked(ROWS >= COLUMNS)(scores + slopes[:, None, None] * COLUMNS))

    def learned(params: Any, x: jax.Array) -> jax.Array:
        return attend(params, x, lambda scores: scores + params["bias"])

    attention = only(alibi, X)
    assert attention.alibi
    assert attention.mask.kind == "causal"
    params = {**PARAMS, "bias": jax.random.normal(jax.random.key(0), (H, T, T))}
    (attention,) = find_attentions(View(compax.capture(learned, params, X).graph()))
    assert not attention.alibi
    assert len(attention.bias) == 1
    assert attention.mask.kind == "full"


def test_a_score_function_without_a_name_is_custom() -> None:
    attention = only(lambda params, x: attend(params, x, lambda scores: scores * jnp.abs(scores)), X)
    assert attention.score == "custom"


def test_large_static_masks_are_evaluated_in_time() -> None:
    length = 4096
    shape = jax.ShapeDtypeStruct((1, length, D), jnp.float32)

    def model(params: Any, x: jax.Array) -> jax.Array:
        rows = jnp.arange(length)
        return attend(params, x, masked(rows[:, None] >= rows))

    assert only(model, shape).mask.kind == "causal"
