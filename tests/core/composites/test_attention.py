"""Attention in the ways people write it, and what looks like attention and is none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax.composites.attention import find_attentions
from compax.composites.base import Attention
from compax.composites.view import View

B, T, S, D, H, G, K = 2, 6, 7, 20, 4, 2, 10
"""Batch, queries, keys of another sequence, model, heads, key-value heads, head size: all different."""


def found(function: Callable[..., Any], *args: Any, **options: Any) -> list[Attention]:
    return find_attentions(View(compax.capture(function, *args, **options).graph()))


def only(function: Callable[..., Any], *args: Any, **options: Any) -> Attention:
    (attention,) = found(function, *args, **options)
    return attention


def sizes(attention: Attention) -> dict[str, tuple[int, ...]]:
    names = ("batch", "groups", "repeats", "queries", "keys", "head_size", "value_size")
    return {name: tuple(atom.size for atom in getattr(attention, name)) for name in names}


def weights(groups: int = H, fused: bool = False) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (D, H, K), "k": (D, groups, K), "v": (D, groups, K), "o": (H, K, D)}
    return {name: jax.random.normal(key, shape) * 0.3 for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def activations(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


X = activations(B, T, D)


def project(params: Any, x: jax.Array, source: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    source = x if source is None else source
    query = jnp.einsum("btd,dhk->bthk", x, params["q"])
    return query, *(jnp.einsum("bsd,dhk->bshk", source, params[name]) for name in ("k", "v"))


def plain(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(K), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def heads_first(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (y.transpose(0, 2, 1, 3) for y in project(params, x))
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * K**-0.5, axis=-1)
    return (weights @ v).transpose(0, 2, 1, 3)


def heads_first_of_all(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (y.transpose(2, 0, 1, 3) for y in project(params, x))
    scores = jnp.einsum("hbtk,hbsk->bsht", q * K**-0.5, k)
    return jnp.einsum("bsht,hbsk->tbhk", jax.nn.softmax(scores, axis=1), v)


def keys_on_the_left(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    scores = jnp.einsum("bshk,bthk->bhst", k, q) * K**-0.5
    return jnp.einsum("bhst,bshk->bthk", jax.nn.softmax(scores, axis=2), v)


def by_vmap(params: Any, x: jax.Array) -> jax.Array:
    def head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.softmax(q @ k.T * K**-0.5) @ v

    return jax.vmap(jax.vmap(head, in_axes=1, out_axes=1))(*project(params, x))


def without_maximum(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    raised = jnp.exp(jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5)
    return jnp.einsum("bhts,bshk->bthk", raised / raised.sum(-1, keepdims=True), v)


def divided_at_the_end(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    raised = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhts,bshk->bhtk", raised, v) / raised.sum(-1)[..., None]


def from_jax(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(*project(params, x))


def in_bfloat16(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = (y.astype(jnp.bfloat16) for y in project(params, x))
    scores = jnp.einsum("bthk,bshk->bhts", q, k).astype(jnp.float32) * K**-0.5
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores).astype(jnp.bfloat16), v)


def under_remat(params: Any, x: jax.Array) -> jax.Array:
    return jax.checkpoint(plain)(params, x)


FORMS = (plain, heads_first, heads_first_of_all, keys_on_the_left, by_vmap, without_maximum, divided_at_the_end)
FORMS = (*FORMS, from_jax, in_bfloat16, under_remat)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_layout(form: Callable[..., Any]) -> None:
    attention = only(form, weights(), X)
    assert sizes(attention) == {
        "batch": (B,),
        "groups": (H,),
        "repeats": (),
        "queries": (T,),
        "keys": (T,),
        "head_size": (K,),
        "value_size": (K,),
    }
    assert attention.mask.kind == "full"
    assert attention.scale * attention.query_scale == pytest.approx(K**-0.5, rel=1e-4)
    assert not attention.cross
    assert not attention.cached
    assert attention.score == "dot"


def repeated_keys(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    k, v = (jnp.repeat(y, H // G, axis=2) for y in (k, v))
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)


def broadcast_keys(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    k, v = (jnp.broadcast_to(y[:, :, :, None], (B, T, G, H // G, K)).reshape(B, T, H, K) for y in (k, v))
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)


def grouped_product(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = project(params, x)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q.reshape(B, T, G, H // G, K), k)
    return jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("form", [broadcast_keys, grouped_product, repeated_keys, from_jax], ids=lambda f: f.__name__)
def test_grouped_queries(form: Callable[..., Any]) -> None:
    attention = only(form, weights(G), X)
    assert (attention.num_groups, attention.num_heads) == (G, H)
    assert sizes(attention)["repeats"] == (H // G,)
    assert sizes(attention)["queries"] == (T,)


def test_one_key_head_for_all_queries() -> None:
    def multi_query(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.einsum("btd,dhk->bthk", x, params["q"]), x @ params["k"][:, 0], x @ params["v"][:, 0]
        return jnp.einsum("bhts,bsk->bthk", jax.nn.softmax(jnp.einsum("bthk,bsk->bhts", q, k)), v)

    attention = only(multi_query, weights(1), X)
    assert (attention.num_groups, attention.num_heads) == (1, H)


def test_cross_attention_has_two_sources() -> None:
    def cross(params: Any, x: jax.Array, source: jax.Array) -> jax.Array:
        q, k, v = project(params, x, source)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)

    attention = only(cross, weights(), X, activations(B, S, D))
    assert attention.cross
    assert (sizes(attention)["queries"], sizes(attention)["keys"]) == ((T,), (S,))


def test_layers_of_a_scan_are_one_attention() -> None:
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), weights())

    def model(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return x + jnp.einsum("bthk,hkd->btd", plain(layer, x), layer["o"]), None

        return jax.lax.scan(step, x, params)[0]

    attention = only(model, stacked, X)
    assert attention.loops == (3,)
    assert sizes(attention)["groups"] == (H,)


def test_softcap_and_dropout_and_bias() -> None:
    def model(params: Any, x: jax.Array, bias: jax.Array, key: jax.Array) -> jax.Array:
        q, k, v = project(params, x)
        scores = 30.0 * jnp.tanh(jnp.einsum("bthk,bshk->bhts", q, k) * 0.25 / 30.0) + bias
        weights = jax.nn.softmax(scores)
        weights = jnp.where(jax.random.bernoulli(key, 0.9, weights.shape), weights / 0.9, 0.0)
        return jnp.einsum("bhts,bshk->bthk", weights, v)

    attention = only(model, weights(), X, activations(1, H, T, T), jax.random.key(0))
    assert attention.softcap == pytest.approx(30.0, rel=1e-3)
    assert attention.scale == pytest.approx(0.25, rel=1e-3)
    assert attention.dropout == pytest.approx(0.1)
    assert len(attention.bias) == 1


def test_flax_layers() -> None:
    layer = nnx.MultiHeadAttention(num_heads=H, in_features=D, qkv_features=H * K, decode=False, rngs=nnx.Rngs(0))
    assert sizes(only(layer, X))["groups"] == (H,)


# -- What is no attention ---------------------------------------------------------------------------------------------


def router(params: Any, x: jax.Array) -> jax.Array:
    shares = jax.nn.softmax(x @ params["r"])
    return jnp.einsum("bte,edf,btd->btf", shares, params["e"], x)


def loss(params: Any, x: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(x @ params["r"])[..., 0])


def gate_over_features(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ params["square"]) * x


def pooling_with_a_learned_vector(params: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("bt,btd->bd", jax.nn.softmax(x @ params["vector"], axis=1), x)


def affinity_without_values(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ params["square"], x)).max(-1)


def weights_used_along_queries(params: Any, x: jax.Array) -> jax.Array:
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ params["square"], x), axis=-1)
    return jnp.einsum("bts,btd->bsd", scores, x)


def linear_attention(params: Any, x: jax.Array) -> jax.Array:
    q, k = jax.nn.softmax(x @ params["square"]), jax.nn.softmax(x @ params["square"], axis=1)
    return q @ jnp.einsum("btd,bte->bde", k, x)


OTHERS = (router, loss, gate_over_features, pooling_with_a_learned_vector, affinity_without_values)
OTHERS = (*OTHERS, weights_used_along_queries, linear_attention)


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: model.__name__)
def test_no_attention_is_claimed(model: Callable[..., Any]) -> None:
    key = jax.random.key(0)
    params = {"r": (D, 5), "e": (5, D, D), "square": (D, D), "vector": (D,)}
    arrays = {name: jax.random.normal(key, shape) for name, shape in params.items()}
    assert found(model, arrays, X) == []


def test_two_softmaxes_of_which_one_is_attention() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        y = plain(params, x)
        return y * jax.nn.softmax(jnp.einsum("bthk,hkd->btd", y, params["o"])).max(-1)[..., None, None]

    attention = only(model, weights(), X)
    assert sizes(attention)["keys"] == (T,)


def test_sizes_that_are_all_equal_are_told_apart() -> None:
    n = 4
    params = {name: jax.random.normal(jax.random.key(0), (n, n, n)) for name in "qkvo"}
    attention = only(heads_first, params, activations(n, n, n))
    view = attention.qk.inputs
    assert (
        len({id(atom) for name in ("batch", "groups", "queries", "head_size") for atom in getattr(attention, name)})
        == 4
    )
    assert all(x.shape == (n, n, n, n) for x in view)


# -- Rotary encodings -------------------------------------------------------------------------------------------------


def half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotated_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    cos, sin = (jnp.concatenate([y, y], axis=-1) for y in (cos, sin))
    a, b = x[..., : K // 2], x[..., K // 2 :]
    return x * cos + jnp.concatenate([-b, a], axis=-1) * sin


def interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def of_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = x.reshape(*x.shape[:-1], K // 2, 2).transpose(4, 0, 1, 2, 3)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def partly(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    turned, rest = x[..., :4], x[..., 4:]
    a, b = jnp.split(turned, 2, axis=-1)
    cos, sin = cos[..., :2], sin[..., :2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


ROTATIONS = {
    half: ("half", K, 500.0),
    rotated_half: ("half", K, 500.0),
    interleaved: ("interleaved", K, 500.0),
    of_pairs: ("interleaved", K, 500.0),
    partly: ("half", 4, None),
}


@pytest.mark.parametrize("rotate", ROTATIONS, ids=lambda rotate: rotate.__name__)
@pytest.mark.parametrize("positions", ["counted", "given"])
def test_rotary_encoding(rotate: Callable[..., Any], positions: str) -> None:
    def model(params: Any, x: jax.Array, given: jax.Array) -> jax.Array:
        where = given if positions == "given" else jnp.arange(T)[None]
        angles = where[..., None, None] * 500.0 ** (-jnp.arange(0, K, 2) / K)
        q, k, v = project(params, x)
        q, k = (rotate(y, jnp.cos(angles), jnp.sin(angles)) for y in (q, k))
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) * 0.3), v)

    attention = only(model, weights(), X, jnp.broadcast_to(jnp.arange(T), (B, T)))
    form, size, base = ROTATIONS[rotate]
    assert attention.rotation is not None
    assert (attention.rotation.form, attention.rotation.size) == (form, size)
    if base is not None:
        assert attention.rotation.base == pytest.approx(base, rel=0.01)


def test_a_swap_of_halves_is_no_rotation() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = project(params, x)
        q = jnp.concatenate([q[..., K // 2 :], q[..., : K // 2]], axis=-1)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)

    assert only(model, weights(), X).rotation is None


def test_finding_changes_nothing() -> None:
    program = compax.capture(plain, weights(), X)
    before = str(program), np.asarray(program(X))
    find_attentions(View(program.graph()))
    assert str(program) == before[0]
    assert (np.asarray(program(X)) == before[1]).all()
