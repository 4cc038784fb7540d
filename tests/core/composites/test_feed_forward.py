"""Feed-forward networks in the ways people write them, and what looks like one and is none."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import compax
import zoo
from compax.composites.base import FeedForward
from compax.composites.feed_forward import find_feed_forwards
from compax.composites.view import View

B, T, D, F, E = 3, 6, 20, 28, 4
"""Batch, positions, model, hidden, experts."""

X = jax.random.normal(jax.random.key(0), (B, T, D))


def weight(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape) * 0.3


PARAMS = {
    "up": weight(D, F),
    "gate": weight(D, F),
    "down": weight(F, D),
    "fused": weight(D, 2 * F),
    "bu": weight(F),
    "bf": weight(2 * F),
    "bd": weight(D),
    "square": weight(D, D),
    "other": weight(D, D),
    "narrow": weight(D, F // 2),
}


def found(function: Callable[..., Any], *args: Any, **options: Any) -> list[FeedForward]:
    networks = find_feed_forwards(View(compax.capture(function, *args, **options).graph()))
    for network in networks:
        check_closed(network)
    return networks


def only(function: Callable[..., Any], *args: Any, **options: Any) -> FeedForward:
    (network,) = found(function, *args, **options)
    return network


def check_closed(network: FeedForward) -> None:
    """Its nodes need nothing but its inputs, and give its output."""
    inside = {y for node in network.nodes for y in node.outputs}
    for node in network.nodes:
        assert all(y in inside or y in network.inputs or y.static for y in node.inputs), node
    assert network.output in inside
    assert network.inputs[0] is network.x
    assert not inside & set(network.inputs)


def size(network: FeedForward) -> int:
    result = 1
    for atom in network.hidden:
        result *= atom.size
    return result


def paths(node: Any) -> list[str]:
    return [y.input.path for y in node.inputs if y.input is not None and y.input.kind == "parameter"]


# -- Plain ------------------------------------------------------------------------------------------------------------


def einsum(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("btf,fd->btd", jax.nn.silu(jnp.einsum("btd,df->btf", x, p["up"])), p["down"])


def weights_first(p: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.einsum("df,btd->fbt", p["up"], x)
    return jnp.einsum("fd,fbt->btd", p["down"], jax.nn.silu(hidden))


def flattened(p: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.silu(x.reshape(B * T, D) @ p["up"])
    return (hidden @ p["down"]).reshape(B, T, D)


def regrouped(p: Any, x: jax.Array) -> jax.Array:
    """The hidden dimension in two, as a kernel may want it."""
    hidden = jax.nn.silu((x @ p["up"]).reshape(B, T, 4, F // 4))
    return jnp.einsum("btgf,gfd->btd", hidden, p["down"].reshape(4, F // 4, D))


def transposed(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.silu(x @ p["up"]) @ p["back"].T


def mixer(p: Any, x: jax.Array) -> jax.Array:
    """Over positions."""
    hidden = jax.nn.silu(jnp.swapaxes(x, 1, 2) @ p["tokens"])
    return jnp.swapaxes(hidden @ p["back_to_tokens"], 1, 2)


PLAIN = {f.__name__: f for f in (einsum, weights_first, flattened, regrouped, transposed, mixer)}
MORE = PARAMS | {"back": weight(D, F), "tokens": weight(T, F), "back_to_tokens": weight(F, T)}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str) -> None:
    network = only(PLAIN[name], MORE, X)
    assert (network.activation, network.gated, network.gate, network.dropout) == ("silu", False, None, None)
    assert size(network) == F
    assert len(network.parameters) == 2


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", jax.nn.relu),
        ("relu2", lambda h: jnp.square(jax.nn.relu(h))),
        ("gelu", lambda h: jax.nn.gelu(h, approximate=False)),
        ("gelu_tanh", jax.nn.gelu),
        ("quick_gelu", lambda h: h * jax.nn.sigmoid(1.702 * h)),
        ("tanh", jnp.tanh),
        ("leaky_relu", lambda h: jax.nn.leaky_relu(h, 0.1)),
        ("hard_swish", jax.nn.hard_swish),
        ("mish", jax.nn.mish),
        ("square", jnp.square),
        ("custom", lambda h: 5 * jnp.tanh(h / 5)),
        ("custom", jnp.round),
        ("custom", lambda h: jnp.arctan2(h, 1.0 + h * h) + jnp.cbrt(h)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations(activation: str, function: Callable[[jax.Array], jax.Array], dtype: Any) -> None:
    params = jax.tree.map(lambda y: y.astype(dtype), PARAMS)
    network = only(lambda p, x: function(x @ p["up"] + p["bu"]) @ p["down"] + p["bd"], params, X.astype(dtype))
    assert network.activation == activation
    assert network.parameters == ("up", "down", "bu", "bd")


def test_bias_and_residual() -> None:
    network = only(lambda p, x: x + (jax.nn.relu(x @ p["up"] + p["bu"]) @ p["down"] + p["bd"]), PARAMS, X)
    assert network.output.node is not None
    assert [y.name for y in network.output.node.inputs].count("dot_general") == 1
    assert network.nodes[-1] is network.output.node
    assert sorted(network.parameters) == ["bd", "bu", "down", "up"]


def test_a_table_of_positions_is_no_bias() -> None:
    network = only(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"] + p["table"], PARAMS | {"table": weight(T, D)}, X)
    assert network.parameters == ("up", "down")
    assert network.output is network.down.outputs[0]


def test_hidden_of_the_models_size() -> None:
    network = only(lambda p, x: x + jax.nn.relu(x @ p["square"]) @ p["other"], PARAMS, X)
    assert size(network) == D
    assert (paths(network.up), paths(network.down)) == (["square"], ["other"])


def test_learned_slope_is_custom() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        hidden = x @ p["up"]
        return jnp.where(hidden > 0, hidden, p["bu"] * hidden) @ p["down"]

    network = only(function, PARAMS, X)
    assert network.activation == "custom"
    assert "bu" in network.parameters


def test_a_learned_factor_is_left_out() -> None:
    network = only(lambda p, x: jax.nn.silu(x @ p["up"] * p["bu"]) @ p["down"], PARAMS, X)
    assert network.activation == "silu"


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0))])
def test_inside_transformations(transform: Callable[..., Any]) -> None:
    network = only(transform(lambda p, x: jax.nn.silu(x @ p["up"] + p["bu"]) @ p["down"] + p["bd"]), PARAMS, X)
    assert (size(network), network.parameters) == (F, ("up", "down", "bu", "bd"))


def test_ensemble() -> None:
    params = jax.tree.map(lambda y: jnp.stack([y, y]), PARAMS)
    network = only(jax.vmap(lambda p, x: jax.nn.silu(x @ p["up"]) @ p["down"], (0, None)), params, X)
    assert size(network) == F


def test_inside_a_scan_over_layers() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, p: (x + jax.nn.relu(x @ p["up"] + p["bu"]) @ p["down"], None), x, p)[0]

    network = only(function, jax.tree.map(lambda y: jnp.stack([y] * 5), PARAMS), X)
    assert (network.loops, network.activation) == ((5,), "relu")


def test_layers_of_flax() -> None:
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)
            self.dropout = nnx.Dropout(0.25, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(self.dropout(nnx.gelu(self.up(x))))

    for mode, rate in (("train", 0.25), ("eval", None)):
        network = only(Network(nnx.Rngs(0)), X, mode=mode)
        assert (network.activation, network.dropout) == ("gelu_tanh", rate)
        assert sorted(network.parameters) == ["down.bias", "down.kernel", "up.bias", "up.kernel"]

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(D)(linen.relu(linen.DenseGeneral(F)(x)))

    network = only(Linen(), X, variables=Linen().init(jax.random.key(0), X))
    assert (network.activation, len(network.parameters)) == ("relu", 4)


# -- Dropout ----------------------------------------------------------------------------------------------------------


def select(key: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / jnp.asarray(0.9, h.dtype), 0)


def multiply(key: jax.Array, h: jax.Array) -> jax.Array:
    return h * (jax.random.bernoulli(key, 0.9, h.shape).astype(h.dtype) / 0.9)


def drop(key: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.1, h.shape), 0, h / 0.9)


def unscaled(key: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(jax.random.uniform(key, h.shape) < 0.9, h, 0)


def across_positions(key: jax.Array, h: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.9, (B, 1, F)), h / 0.9, 0)


@pytest.mark.parametrize("dropout", [select, multiply, drop, unscaled, across_positions])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout(dropout: Callable[..., jax.Array], dtype: Any) -> None:
    params = jax.tree.map(lambda y: y.astype(dtype), PARAMS)

    def function(p: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        x = select(key, x)
        return dropout(key, jax.nn.gelu(x @ p["up"])) @ p["down"]

    network = only(function, params, X.astype(dtype), jax.random.key(0))
    assert (network.activation, network.dropout) == ("gelu_tanh", pytest.approx(0.1, abs=1e-6))


def test_relu_after_dropout_is_no_mask() -> None:
    def function(p: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        hidden = select(key, x) @ p["up"]
        return jnp.where(hidden > 0, hidden, 0) @ p["down"]

    network = only(function, PARAMS, X, jax.random.key(0))
    assert (network.activation, network.dropout) == ("relu", None)


# -- Gated ------------------------------------------------------------------------------------------------------------


def split(p: Any, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ p["fused"] + p["bf"], 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"]


def sliced(p: Any, x: jax.Array) -> jax.Array:
    fused = x @ p["fused"]
    return (jax.nn.silu(fused[..., :F]) * fused[..., F:]) @ p["down"]


def interleaved(p: Any, x: jax.Array) -> jax.Array:
    fused = x @ p["fused"]
    return (jax.nn.silu(fused[..., ::2]) * fused[..., 1::2]) @ p["down"]


def indexed(p: Any, x: jax.Array) -> jax.Array:
    fused = (x @ p["fused"]).reshape(*x.shape[:-1], 2, F)
    return (jax.nn.silu(fused[..., 0, :]) * fused[..., 1, :]) @ p["down"]


def unstacked(p: Any, x: jax.Array) -> jax.Array:
    gate, up = jnp.unstack(jnp.einsum("btd,cdf->cbtf", x, p["both"]))
    return (jax.nn.silu(gate) * up) @ p["down"]


FUSED = {f.__name__: f for f in (split, sliced, interleaved, indexed, unstacked)}


def test_gated() -> None:
    network = only(lambda p, x: (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], PARAMS, X)
    assert network.gate is not None
    assert (network.activation, paths(network.gate), paths(network.up)) == ("silu", ["gate"], ["up"])
    assert (size(network), network.parameters) == (F, ("gate", "up", "down"))


def written_out(p: Any, x: jax.Array) -> jax.Array:
    gate, up = x @ p["gate"], x @ p["up"]
    return ((gate * up) * (1 / (1 + jnp.exp(-gate)))) @ p["down"]


def test_the_gate_is_told_by_evaluating() -> None:
    """Not by the order of operands, or of products."""
    for function in (
        lambda p, x: ((x @ p["up"]) * jax.nn.gelu(x @ p["gate"])) @ p["down"],
        written_out,
        lambda p, x: (jax.nn.relu((x @ p["gate"]) + p["bu"]) * ((x @ p["up"]) + p["bu"])) @ p["down"],
    ):
        network = only(function, PARAMS, X)
        assert network.gate is not None
        assert (paths(network.gate), paths(network.up)) == (["gate"], ["up"])


def test_gated_by_a_sigmoid() -> None:
    network = only(lambda p, x: (jax.nn.sigmoid(x @ p["gate"]) * (x @ p["up"])) @ p["down"], PARAMS, X)
    assert network.activation == "sigmoid"


@pytest.mark.parametrize("name", FUSED)
def test_gate_and_up_in_one_product(name: str) -> None:
    network = only(FUSED[name], PARAMS | {"both": weight(2, D, F)}, X)
    assert (network.activation, network.gated, size(network)) == ("silu", True, F)
    assert network.up is network.gate


@pytest.mark.parametrize("name", FUSED)
def test_gate_and_up_in_one_product_under_vmap(name: str) -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda y: FUSED[name](p, y[None])[0])(x)

    network = only(function, PARAMS | {"both": weight(2, D, F)}, X)
    assert (network.activation, network.gated) == ("silu", True)


# -- Experts ----------------------------------------------------------------------------------------------------------

EXPERTS = {"up": weight(E, D, F), "gate": weight(E, D, F), "down": weight(E, F, D), "groups": weight(E)}


def dense_experts(p: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.silu(jnp.einsum("btd,edf->betf", x, p["gate"])) * jnp.einsum("btd,edf->betf", x, p["up"])
    return jnp.einsum("betf,efd->betd", hidden, p["down"])


def dispatched_experts(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.broadcast_to(x[None], (E, B, T, D)) * jnp.arange(1.0, E + 1)[:, None, None, None]
    hidden = jax.nn.silu(jnp.einsum("ebtd,edf->ebtf", x, p["gate"])) * jnp.einsum("ebtd,edf->ebtf", x, p["up"])
    return jnp.einsum("ebtf,efd->ebtd", hidden, p["down"])


def sliced_experts(p: Any, x: jax.Array) -> jax.Array:
    return sum((jax.nn.silu(x @ p["gate"][i]) * (x @ p["up"][i])) @ p["down"][i] for i in range(E))


def grouped_experts(p: Any, x: jax.Array, groups: jax.Array) -> jax.Array:
    x = x.reshape(B * T, D)
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, p["gate"], groups)) * jax.lax.ragged_dot(x, p["up"], groups)
    return jax.lax.ragged_dot(hidden, p["down"], groups)


@pytest.mark.parametrize(
    ("function", "count"), [(dense_experts, 1), (dispatched_experts, 1), (sliced_experts, E), (grouped_experts, 1)]
)
def test_experts(function: Callable[..., jax.Array], count: int) -> None:
    groups = (jnp.asarray([5, 3, 6, 4], jnp.int32),) if function is grouped_experts else ()
    networks = found(function, EXPERTS, X, *groups)
    assert len(networks) == count
    assert all((n.activation, n.gated, size(n)) == ("silu", True, F) for n in networks)


def test_equal_activations_are_evaluated_once() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        for up, down in p:
            x = x + jax.nn.gelu(x @ up) @ down
        return x

    view = View(compax.capture(function, [(weight(D, F) + i, weight(F, D)) for i in range(12)], X).graph())
    assert len(find_feed_forwards(view)) == 12
    assert len([key for key in view.memo if isinstance(key, tuple) and key[0] == "feed_forward"]) == 1


def test_every_second_of_a_chain() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        for i in range(4):
            x = jax.nn.relu(x @ p[i])
        return x

    networks = found(function, {i: weight(D, D) + i for i in range(4)}, X)
    assert [(paths(n.up), paths(n.down)) for n in networks] == [(["0"], ["1"]), (["2"], ["3"])]


# -- Models of others -------------------------------------------------------------------------------------------------

COUNTS = {
    "tunix_llama3": {("silu", True): 2},
    "tunix_qwen2": {("silu", True): 2},
    "tunix_qwen3": {("silu", True): 2},
    "tunix_gemma": {("gelu_tanh", True): 2},
    "tunix_gemma3": {("gelu_tanh", True): 6},
    "flax_gpt2": {("gelu_tanh", False): 2},
    "flax_bert": {("gelu", False): 2},  # not the head: a norm stands between
    "flax_vit": {("gelu", False): 2},
    "flax_clip": {("quick_gelu", False): 4},  # two towers
    "flax_whisper": {("gelu", False): 4},  # encoder and decoder
    "flax_llama": {("silu", True): 2},
}


@zoo.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_models_of_others(name: str) -> None:
    model = zoo.load(name)
    options = {} if model.variables is None else {"variables": model.variables}
    networks = found(model.module, *model.inputs, **options, **model.kwargs)
    counts = collections.Counter((network.activation, network.gated) for network in networks)
    if name == "tunix_qwen3_experts":
        # Each expert of each layer computes every position once.
        assert set(counts) == {("silu", True)}
        assert len({network.down for network in networks}) == len(networks)
        return
    assert counts == COUNTS[name]
    assert {size(network) for network in networks} == {zoo.WIDTHS.hidden_dim}
