"""The decoder against a reference in NumPy, and against itself: stacked, recomputed, step by step from a cache."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax.errors import ConfigError
from compax.models import SIZES, Decoder, DecoderConfig, example_inputs, loss

TINY = SIZES["tiny"]
PLAIN = {"gated": False, "activation": "gelu", "norm": "layernorm"}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tied": False, "rope_theta": 500.0},
    "multi_head": {"num_kv_heads": 4},
    "multi_query": {"num_kv_heads": 1},
    "biases": BIASES,
    "plain": PLAIN | BIASES,
    "relu2": {"gated": False, "activation": "relu2"},
    "gelu_tanh": {"activation": "gelu_tanh"},
}


def build(**changes: Any) -> Decoder:
    return Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))


# Compiled as a whole: operation by operation, a test would compile a hundred small programs.
forward = nnx.jit(lambda model, tokens: model(tokens))
evaluate = nnx.jit(loss)
differentiate = nnx.jit(nnx.grad(lambda model, batch: loss(model, batch)[0]))


def randomized(model: Decoder) -> Decoder:
    """The model with every parameter drawn anew: at first, biases are all zero and scales all one."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = jnp.asarray(rng.normal(1.0 if variable.ndim == 1 else 0.0, 0.2, variable.shape), variable.dtype)
    return model


def tokens(batch: int = 2, sequence: int = 12) -> jax.Array:
    return example_inputs(TINY, batch, sequence)[0]


def gradients(model: Decoder) -> dict[str, jax.Array]:
    found = differentiate(model, {"tokens": tokens()})
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(found)}


def stacked(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters of an unrolled model in the form of a scanned one."""
    result: dict[str, Any] = {}
    for path, value in params.items():
        if path.startswith("blocks."):
            _, _, rest = path.split(".", 2)
            result.setdefault(f"blocks.{rest}", []).append(value)
        else:
            result[path] = value
    return {path: jnp.stack(value) if isinstance(value, list) else value for path, value in result.items()}


def flat(model: Decoder) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str, scan: bool, reference_logits: Callable[..., Any]) -> None:
    model = randomized(build(scan=scan, **VARIANTS[variant]))
    expected = np.stack([reference_logits(model.config, flat(model), one) for one in np.asarray(tokens())])
    np.testing.assert_allclose(forward(model, tokens()), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["llama", "plain"])
def test_the_same_seed_gives_the_same_numbers_scanned(variant: str) -> None:
    unrolled, scanned = build(**VARIANTS[variant]), build(scan=True, **VARIANTS[variant])
    jax.tree.map(np.testing.assert_array_equal, stacked(flat(unrolled)), flat(scanned))
    np.testing.assert_allclose(forward(unrolled, tokens()), forward(scanned, tokens()), rtol=1e-5, atol=1e-6)
    expected, found = stacked(gradients(unrolled)), gradients(scanned)
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_no_gradient(scan: bool) -> None:
    plain, remat = gradients(build(scan=scan, dropout=0.1)), gradients(build(scan=scan, dropout=0.1, remat=True))
    assert plain.keys() == remat.keys()
    for path, value in plain.items():
        np.testing.assert_allclose(remat[path], value, rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_remat_saves_less_for_the_backward_pass(scan: bool) -> None:
    def saved_bytes(remat: bool) -> int:
        config = dataclasses.replace(TINY, scan=scan, remat=remat)
        graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        pull_back = jax.eval_shape(lambda params: jax.vjp(lambda p: nnx.merge(graph, p)(tokens(8)), params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))

    parameters = 4 * count_parameters(TINY)
    assert saved_bytes(remat=True) - parameters < 0.2 * (saved_bytes(remat=False) - parameters)


def test_a_scan_does_not_return_parameters() -> None:
    graph, params = nnx.split(build(scan=True, remat=True))
    jaxpr = jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens())
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [tuple(out.aval.shape) for out in scan.outvars] == [(2, 12, TINY.model_dim)]


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_decoding_from_a_cache_is_the_full_forward_pass(scan: bool, remat: bool) -> None:
    model = randomized(build(scan=scan, remat=remat))
    cache = model.init_cache(2, 16)
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    pieces = [step(model, tokens()[:, begin:end], cache) for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12))]
    assert int(cache.position[...]) == 12
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), forward(model, tokens()), rtol=1e-5, atol=1e-5)


def test_the_cache_is_in_the_compute_dtype_and_only_variables() -> None:
    cache = build(dtype="bfloat16", scan=True).init_cache(3, 16)
    shapes = {".".join(map(str, p)): (v.shape, v.dtype.name) for p, v in nnx.to_flat_state(nnx.state(cache))}
    stack = (TINY.num_layers, 3, 16, TINY.num_kv_heads, TINY.head_dim)
    assert shapes == {
        "layers.key": (stack, "bfloat16"),
        "layers.value": (stack, "bfloat16"),
        "position": ((), "int32"),
    }


def test_more_tokens_than_the_cache_holds_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="12 tokens do not fit a cache of length 8"):
        model(tokens(), model.init_cache(2, 8))


def test_no_position_sees_a_later_token() -> None:
    model = randomized(build())
    changed = tokens().at[:, 7].set((tokens()[:, 7] + 1) % TINY.vocab_size)
    before, after = forward(model, tokens()), forward(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.any(np.all(before[:, 7:] == after[:, 7:], axis=-1))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_dropout_draws_anew_in_training_and_rests_in_evaluation(scan: bool) -> None:
    model = build(dropout=0.3, scan=scan)
    model.train()
    first, second = forward(model, tokens()), forward(model, tokens())
    assert not np.allclose(first, second)
    model.eval()
    evaluated = forward(model, tokens())
    np.testing.assert_array_equal(evaluated, forward(model, tokens()))
    np.testing.assert_allclose(evaluated, forward(build(scan=scan), tokens()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first, unrolled_training(), rtol=1e-5, atol=1e-6)


def unrolled_training() -> jax.Array:
    model = build(dropout=0.3)
    model.train()
    return forward(model, tokens())


def test_without_dropout_there_is_no_random_state() -> None:
    assert jax.tree.leaves(nnx.state(build(), nnx.Not(nnx.Param))) == []


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_parameters_and_computation_have_their_dtypes(scan: bool) -> None:
    model = build(dtype="bfloat16", scan=scan, remat=True)
    assert {value.dtype.name for value in flat(model).values()} == {"float32"}
    assert forward(model, tokens()).dtype == jnp.bfloat16
    assert evaluate(model, {"tokens": tokens()})[0].dtype == jnp.float32
    assert {value.dtype.name for value in flat(build(param_dtype="bfloat16")).values()} == {"bfloat16"}
    np.testing.assert_allclose(forward(model, tokens()).astype(jnp.float32), forward(build(), tokens()), atol=0.01)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("tiny", 0.026272), ("small", 4.0), ("stories260k", 0.260032), ("smollm2-135m", 134.515008)],
)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_sizes_have_their_published_parameters(size: str, millions: float, scan: bool) -> None:
    assert count_parameters(dataclasses.replace(SIZES[size], scan=scan)) == pytest.approx(1e6 * millions, rel=1e-3)


@pytest.mark.parametrize(("size", "parameters"), [("llama2-7b", 6_738_415_616), ("llama2-70b", 68_976_648_192)])
def test_large_shapes_take_no_memory(size: str, parameters: int) -> None:
    assert count_parameters(dataclasses.replace(SIZES[size], scan=True)) == parameters


def count_parameters(config: DecoderConfig) -> int:
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


def test_parameters_are_named() -> None:
    assert set(flat(build(num_layers=1, tied=False, **BIASES, norm="layernorm"))) == {
        "embed.embedding",
        "blocks.0.attn_norm.scale",
        "blocks.0.attn_norm.bias",
        *(f"blocks.0.attn.{name}.{kind}" for name in ("query", "key", "value", "out") for kind in ("kernel", "bias")),
        "blocks.0.mlp_norm.scale",
        "blocks.0.mlp_norm.bias",
        *(f"blocks.0.mlp.{name}.{kind}" for name in ("gate", "up", "down") for kind in ("kernel", "bias")),
        "norm.scale",
        "norm.bias",
        "head.kernel",
    }


def test_a_new_model_is_about_as_good_as_guessing() -> None:
    value, _ = evaluate(build(), {"tokens": tokens(8, 33)})
    assert value == pytest.approx(math.log(TINY.vocab_size), rel=0.02)


def test_loss_is_the_mean_negative_log_probability() -> None:
    bigrams = np.random.default_rng(2).normal(size=(TINY.vocab_size, TINY.vocab_size))
    model, batch = jnp.asarray(bigrams, jnp.float32).__getitem__, tokens()
    log_probabilities = bigrams - np.log(np.exp(bigrams).sum(-1, keepdims=True))
    each = -log_probabilities[np.asarray(batch)[:, :-1], np.asarray(batch)[:, 1:]]

    value, metrics = loss(model, {"tokens": batch})
    assert value == pytest.approx(each.mean(), rel=1e-5)
    assert metrics["loss"] == value
    assert metrics["tokens"] == 22
    pair = {"inputs": batch[:, :-1], "targets": batch[:, 1:]}
    assert loss(model, pair)[0] == value

    mask = np.arange(22).reshape(2, 11) % 3 == 0
    value, metrics = loss(model, pair | {"mask": jnp.asarray(mask)})
    assert value == pytest.approx(each[mask].mean(), rel=1e-5)
    assert metrics["tokens"] == mask.sum()
    assert loss(model, pair | {"mask": jnp.zeros((2, 11))})[0] == 0.0


def test_example_inputs_are_the_same_each_time() -> None:
    (first,), (second,) = example_inputs(TINY), example_inputs(TINY)
    assert first.shape == (2, TINY.context_length)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, second)


def test_configs_survive_json() -> None:
    for config in SIZES.values():
        assert DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) is no multiple of num_kv_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"activation": "swish"}, "'swish'; known are silu"),
        ({"norm": "batchnorm"}, "'batchnorm'; known are rmsnorm"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"dtype": "int8"}, "dtype is 'int8'; known are float32"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)
