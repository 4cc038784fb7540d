"""The loss in chunks: forms in which losses are written, and what is left alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compax
from compax.contracts import ContractError, Observation, largest_relative_error, rounding_tolerance
from compax.errors import PipelineError, SelectorError
from compax.passes import TileLoss
from compax.passes.tile_loss import Rounding, stretch
from compax.pipeline import Pipeline
from small import run, statuses
from tiled import (
    LABELS,
    WEIGHTS,
    B,
    D,
    Logits,
    T,
    V,
    X,
    assert_alike,
    assert_tiled,
    biased,
    flattened_first,
    log_softmax_picked,
    looked_at,
    operations,
    plain,
    program,
    softcapped,
    value_and_gradients,
    with_accuracy,
)

# -- forms ------------------------------------------------------------------------------------------------------------


def one_hot_product(z: jax.Array, y: jax.Array) -> jax.Array:
    return -(jax.nn.one_hot(y, V) * jax.nn.log_softmax(z)).sum(-1)


def by_hand(z: jax.Array, y: jax.Array) -> jax.Array:
    shifted = z - z.max(-1, keepdims=True)
    picked = jnp.take_along_axis(shifted, y[..., None], axis=-1).squeeze(-1)
    return jnp.log(jnp.exp(shifted).sum(-1)) - picked


def smoothed(z: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, V), 0.1))


def z_loss(z: jax.Array, y: jax.Array) -> jax.Array:
    normalizer = jax.nn.logsumexp(z, axis=-1)
    return normalizer - jnp.take_along_axis(z, y[..., None], -1)[..., 0] + 1e-2 * normalizer**2


def einsum(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.einsum("btv,btv->bt", jax.nn.one_hot(y, V), jax.nn.log_softmax(z))


def where_selected(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.where(jnp.arange(V) == y[..., None], jax.nn.log_softmax(z), 0).sum(-1)


def indexed(z: jax.Array, y: jax.Array) -> jax.Array:
    flat, labels = jax.nn.log_softmax(z.reshape(-1, V)), y.reshape(-1)
    return -flat[jnp.arange(flat.shape[0]), labels].reshape(y.shape)


def indexed_twice(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jax.nn.log_softmax(z)[jnp.arange(B)[:, None], jnp.arange(T)[None], y]


def mapped(z: jax.Array, y: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(lambda z, y: jax.nn.logsumexp(z) - z[y]))(z, y)


def vocabulary_first(z: jax.Array, y: jax.Array) -> jax.Array:
    z = jnp.moveaxis(z, -1, 1)
    return -(jax.nn.one_hot(y, V, axis=1) * jax.nn.log_softmax(z, axis=1)).sum(1)


def masked_one_hot(z: jax.Array, y: jax.Array) -> jax.Array:
    return -(jax.nn.one_hot(y, V) * (y % 3 > 0)[..., None] * jax.nn.log_softmax(z)).sum(-1)


def weighted_log_probabilities(z: jax.Array, y: jax.Array) -> jax.Array:
    return -(jax.nn.one_hot(y, V) * (0.5 * jax.nn.log_softmax(z) * (y % 3 > 0)[..., None])).sum(-1)


FORMS = {
    "optax with integer labels": optax.softmax_cross_entropy_with_integer_labels,
    "log_softmax and take_along_axis": log_softmax_picked,
    "one-hot times log_softmax": one_hot_product,
    "by hand": by_hand,
    "label smoothing": smoothed,
    "z-loss": z_loss,
    "einsum with a one-hot": einsum,
    "where on a comparison": where_selected,
    "flattened and indexed": indexed,
    "indexed by positions": indexed_twice,
    "vmap of a scalar index": mapped,
    "vocabulary first": vocabulary_first,
    "mask in the one-hot": masked_one_hot,
    "mask on the log-probabilities": weighted_log_probabilities,
}


@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=8)"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form: Callable[..., jax.Array], pipeline: str) -> None:
    assert_tiled(program(lambda z, y, w: (form(z, y) * w).sum() / w.sum()), pipeline)


def shifted(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z[:, :-1], y[:, 1:]).mean()


def shifted_and_flattened(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    z, y = z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def shifted_later(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return log_softmax_picked(z, y)[:, 2:].mean() - jax.nn.log_softmax(z)[:, :-1].max(-1).mean()


def per_token(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return log_softmax_picked(z, y)


def ignored(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    y = jnp.where(w > 0.5, y, -100)
    losses = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
    return jnp.where(y >= 0, losses, 0).sum() / (y >= 0).sum()


def summed_whole(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return -jnp.sum(jax.nn.one_hot(y, V) * jax.nn.log_softmax(z)) / y.size


def in_float32(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    return log_softmax_picked(z.astype(jnp.bfloat16).astype(jnp.float32), y).mean()


LOSSES = [shifted, shifted_and_flattened, shifted_later, per_token, ignored, summed_whole, with_accuracy]


@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=8)"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_what_surrounds_the_loss(loss: Callable[..., Any], pipeline: str) -> None:
    assert_tiled(program(loss), pipeline)


def scaled(p: Any, x: jax.Array) -> jax.Array:
    return plain(p, x) * p["bias"][0] * 0.3


def transposed(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,vd->btv", jnp.tanh(x @ p["u"]), p["head"].T)


def weight_first(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("dv,btd->vbt", p["head"], jnp.tanh(x @ p["u"])).transpose(1, 2, 0)


def padded_vocabulary(p: Any, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(V) < V - 3, plain(p, x), -1e9)


def filled(p: Any, x: jax.Array) -> jax.Array:
    z = plain(p, x)
    return jax.lax.select(jnp.broadcast_to(jnp.arange(V) < V - 3, z.shape), z, jnp.full_like(z, -1e9))


def half(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ p["u"]).astype(jnp.bfloat16)
    return (h @ p["head"].astype(jnp.bfloat16)).astype(jnp.float32)


def in_a_jit(p: Any, x: jax.Array) -> jax.Array:
    return jax.jit(biased)(p, x)


HEADS = [biased, softcapped, scaled, transposed, weight_first, padded_vocabulary, filled, flattened_first, in_a_jit]


@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=8)"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_heads(head: Logits, pipeline: str) -> None:
    assert_tiled(program(lambda z, y, w: log_softmax_picked(z, jnp.minimum(y, V - 4)).mean(), head), pipeline)


def test_sequences_that_were_flattened_stay_apart() -> None:
    after = assert_tiled(program(lambda z, y, w: log_softmax_picked(z, y).mean(), flattened_first))
    (op,) = operations(after)
    assert op.inputs[0].shape == (B * T, D)
    assert op.attributes["tiles"].tokens == (B, T)


@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=8)"])
def test_bfloat16(pipeline: str) -> None:
    before = program(lambda z, y, w: log_softmax_picked(z, y).mean(), half)
    after = run(pipeline, before)
    assert statuses(after) == {"head": "rewritten"}
    (value, gradients), (expected, exact) = value_and_gradients(after), value_and_gradients(before)
    assert_alike(expected, value)
    assert_alike(exact, gradients, rounding_tolerance("bfloat16"))


def test_gradients_of_the_head_add_up_in_float32() -> None:
    """Many small terms: added up in bfloat16 they would stop counting."""
    n = 512
    x = jnp.ones((1, n, D), jnp.bfloat16)
    w = jnp.zeros((D, V), jnp.bfloat16)
    loss = lambda p, x: log_softmax_picked((x @ p["w"]).astype(jnp.float32), jnp.zeros((1, n), jnp.int32)).sum()  # noqa: E731
    before = compax.capture(loss, {"w": w}, x)
    after = run("tile_loss(tokens=1)", before)
    gradient = jax.grad(lambda p: after.apply(p, {}, x)[0])({"w": w})["w"]
    exact = jax.grad(lambda p: before.apply(p, {}, x.astype(jnp.bfloat16))[0])({"w": w})["w"]
    assert largest_relative_error(np.asarray(exact, np.float32), np.asarray(gradient, np.float32)) < 0.01


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 10, 14, 23])
def test_any_size_of_chunk(tokens: int) -> None:
    before = program(lambda z, y, w: log_softmax_picked(z, y).mean(), x=X)
    after = run(f"tile_loss(tokens={tokens})", before)
    assert_alike(value_and_gradients(before), value_and_gradients(after))


@pytest.mark.parametrize("vocabulary", [1, 7, 10, 16, 29])
def test_any_size_of_vocabulary_chunk(vocabulary: int) -> None:
    before = program(with_accuracy, softcapped)
    after = run(f"tile_loss(vocabulary={vocabulary})", before)
    assert_alike(value_and_gradients(before), value_and_gradients(after))


def test_stretch() -> None:
    assert stretch((4, 1024), 1024) == 256
    assert stretch((4, 1023), 1024) == 256  # no even cut is near: the last chunk is shorter
    assert stretch((4, 12), 1) == 1
    assert stretch((4, 12), 1000) == 12
    assert stretch((7,), 3) == 3


def test_minus_infinity() -> None:
    """Entries that a mask takes out, even a whole chunk of them, and losses that are infinite."""
    head = lambda p, x: jnp.where(jnp.arange(V) >= 10, plain(p, x), -jnp.inf)  # noqa: E731
    before = program(lambda z, y, w: log_softmax_picked(z, jnp.maximum(y, 10)).mean(), head)
    for pipeline in ("tile_loss(tokens=8)", "tile_loss(vocabulary=5)"):
        assert_alike(value_and_gradients(before), value_and_gradients(run(pipeline, before)))


def test_labels_out_of_bounds_are_as_before() -> None:
    outside = lambda z, y, w: log_softmax_picked(z, jnp.where(y == y[0, 0], V + 2, y))  # noqa: E731
    clipped = lambda z, y, w: jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None] + 9, -1, mode="clip")  # noqa: E731
    for loss in (outside, clipped):
        before = program(loss)
        after = run("tile_loss(tokens=8)", before)
        one, other = (np.asarray(p(X, LABELS, WEIGHTS)) for p in (before, after))
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        np.testing.assert_allclose(one, other, rtol=1e-5)


# -- not fired --------------------------------------------------------------------------------------------------------


def test_logits_that_are_returned() -> None:
    report = looked_at(program(lambda z, y, w: (log_softmax_picked(z, y).mean(), z)))
    assert (report.name, report.kind, report.status) == ("head", "cross_entropy", "skipped")
    assert "the logits are among what the program returns" in report.reason


NOT_FIRED = {
    "probabilities": (lambda z, y, w: log_softmax_picked(z, y).mean() + jax.nn.softmax(z)[..., 0].mean(), "needed"),
    "entropy": (
        lambda z, y, w: log_softmax_picked(z, y) - (jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum(-1),
        "needed whole",
    ),
    "top k": (lambda z, y, w: (log_softmax_picked(z, y), jax.lax.top_k(z, 2)[0]), "top_k"),
    "no label": (lambda z, y, w: jax.nn.logsumexp(z, -1).mean(), "no label is picked"),
    "distributions as labels": (
        lambda z, y, w: -(jax.nn.softmax(jnp.cos(z.shape[-1] * w[..., None] * jnp.arange(V))) * jax.nn.log_softmax(z)),
        "own size",
    ),
    "two temperatures": (
        lambda z, y, w: jax.nn.logsumexp(z / 2, -1) - jnp.take_along_axis(z, y[..., None], -1)[..., 0],
        "before and after some operations",
    ),
    "part of the vocabulary": (lambda z, y, w: log_softmax_picked(z[..., : V - 2], y % (V - 2)), "a part of the"),
    "tokens reordered": (
        lambda z, y, w: log_softmax_picked(jnp.swapaxes(z, 0, 1), jnp.swapaxes(y, 0, 1)),
        "another order of tokens",
    ),
    "over the tokens": (lambda z, y, w: log_softmax_picked(z, y).mean() + z.sum(1).max(), "summed over tokens"),
}


@pytest.mark.parametrize(("loss", "reason"), NOT_FIRED.values(), ids=NOT_FIRED)
def test_not_fired(loss: Callable[..., Any], reason: str) -> None:
    report = looked_at(program(loss))
    assert report.status == "skipped"
    assert reason in report.reason


def test_labels_from_the_logits_are_refused() -> None:
    report = looked_at(program(lambda z, y, w: log_softmax_picked(z, z.argmax(-1)).mean()))
    assert report.status == "skipped"
    assert "computed from it" in report.reason


def test_logits_that_leave_a_loop() -> None:
    def logits(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, row: (c, row @ p["head"]), 0, x)[1]

    report = looked_at(program(lambda z, y, w: log_softmax_picked(z, y).mean(), logits))
    assert "leave the 'scan'" in report.reason


def test_one_chunk_is_left_as_it_is() -> None:
    before = program(lambda z, y, w: log_softmax_picked(z, y).mean())
    for options, reason in (({"tokens": 1024}, "24 tokens are one"), ({"vocabulary": 64}, "30 is one")):
        report = looked_at(before, **options)
        assert report.status == "matched"
        assert reason in report.reason


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(PipelineError, match="not both"):
        TileLoss(tokens=8, vocabulary=8)
    with pytest.raises(PipelineError, match="at least 1"):
        TileLoss(tokens=0)
    with pytest.raises(SelectorError):
        run("tile_loss(at=nothing, tokens=8)", program(lambda z, y, w: log_softmax_picked(z, y).mean()))


def test_the_contract_is_rounding() -> None:
    before = Observation.of({"output": jnp.ones(3)}, compiled=True)
    Rounding().check(before, Observation.of({"output": jnp.ones(3) + 1e-6}, compiled=True))
    with pytest.raises(ContractError, match="rounding allows"):
        Rounding().check(before, Observation.of({"output": jnp.ones(3) + 1e-3}, compiled=True))


def test_text() -> None:
    for text in ("tile_loss(tokens=8)", "tile_loss(vocabulary=8)", "tile_loss()"):
        assert str(Pipeline.parse(text)) == text
