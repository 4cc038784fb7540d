"""Cross-entropies found, and what is known of what joins their logits. Tests of `tile_loss` have the forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax.composites.cross_entropy import CrossEntropy, NoCrossEntropy, find_cross_entropies
from compax.composites.sides import Inline, Narrow, OneHot, Scalar, Sides, Spread
from compax.models import decoder
from small import run, statuses
from tiled import LABELS, PARAMS, WEIGHTS, B, T, V, X, log_softmax_picked, program, softcapped


def test_what_is_found() -> None:
    (found,) = find_cross_entropies(program(lambda z, y, w: log_softmax_picked(z, y).mean(), softcapped).graph())
    assert isinstance(found, CrossEntropy)
    assert found.site.name == "head"
    assert found.dim == 2
    assert [op.name for op in found.chain] == ["add", "div", "tanh", "mul"]
    assert sorted(type(side).__name__ for side in found.sides.values()) == ["Scalar", "Scalar", "Spread"]
    assert sorted((use.kind, use.form.exponential) for use in found.uses) == [
        ("max", False),
        ("pick", False),
        ("sum", True),
    ]


def test_the_program_stays() -> None:
    given = program(lambda z, y, w: log_softmax_picked(z, y).mean())
    before = given.graph().graph
    find_cross_entropies(given.graph())
    assert given.graph().graph is before


def test_reasons_name_the_place() -> None:
    (found,) = find_cross_entropies(program(lambda z, y, w: log_softmax_picked(z, y) + (z * z)[..., 0]).graph())
    assert isinstance(found, NoCrossEntropy)
    assert "meet themselves in 'mul'" in found.reason
    assert "test_cross_entropy.py" in found.reason


def test_two_heads() -> None:
    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return log_softmax_picked(x @ p["head"], y).mean() + log_softmax_picked(x @ p["second"], y).mean()

    given = compax.capture(loss, {**PARAMS, "second": 2 * PARAMS["head"]}, X, LABELS)
    found = find_cross_entropies(given.graph())
    assert [each.site.name for each in found if isinstance(each, CrossEntropy)] == ["head", "second"]
    after = run("tile_loss(tokens=8)", given)
    assert statuses(after) == {"head": "rewritten", "second": "rewritten"}
    np.testing.assert_allclose(after(X, LABELS), given(X, LABELS), rtol=1e-6)
    assert statuses(run("tile_loss(at=second, tokens=8)", given)) == {"second": "rewritten"}


@pytest.mark.parametrize("options", [{}, {"tied": False}])
def test_none_without_a_loss(options: Any) -> None:
    import dataclasses

    from flax import nnx

    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    assert find_cross_entropies(compax.capture(model, *decoder.example_inputs(config, sequence=8)).graph()) == ()


def sides_of(function: Any) -> Any:
    """What the first result of a function of labels, weights and logits is to the logits."""
    z = jnp.zeros((B, T, V))
    graph = compax.capture(lambda p, z, y, w: function(z, y, w), {}, z, LABELS, WEIGHTS).graph().graph
    while True:
        try:
            return Sides(graph).side(graph.outputs[0], (B, T, V), 2)
        except Inline as call:
            from compax.rewrites.outline import inline_call

            graph = inline_call(graph, call.op)


def test_sides() -> None:
    full = lambda x: jnp.broadcast_to(x, (B, T, V))  # noqa: E731
    assert isinstance(sides_of(lambda z, y, w: full(w[0, 0])), Scalar)
    assert isinstance(sides_of(lambda z, y, w: full(jnp.arange(V) * w[0, 0])), Spread)
    narrow = sides_of(lambda z, y, w: full(w[..., None]))
    assert isinstance(narrow, Narrow)
    np.testing.assert_array_equal(narrow.on_tokens(WEIGHTS[..., None]), WEIGHTS)
    one_hot = sides_of(lambda z, y, w: 0.9 * jax.nn.one_hot(y, V) + 0.1 / V)
    assert isinstance(one_hot, OneHot)
    assert (one_hot.on, one_hot.off) == (pytest.approx(0.9 + 0.1 / V), pytest.approx(0.1 / V))
    assert isinstance(sides_of(lambda z, y, w: jax.nn.one_hot(y, V) * w[..., None]).factors[0], Narrow)


def test_no_sides() -> None:
    assert sides_of(lambda z, y, w: jnp.sin(z)) is None
    assert sides_of(lambda z, y, w: (y[..., None] == jnp.arange(V)[::-1]).astype(jnp.float32)) is None
    assert sides_of(lambda z, y, w: jax.nn.one_hot(y, V) * jnp.cos(jnp.arange(V))) is None
    assert sides_of(lambda z, y, w: 1 / (1 + jax.nn.one_hot(y, V))) is None
