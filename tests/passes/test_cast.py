"""The cast pass: models that did nothing for it, its options, and other passes around it."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax import Program, capture, verify
from compax.errors import PipelineError, SelectorError
from compax.experiments.benchmarks import bodies
from compax.lowering import evaluate
from compax.models import decoder
from compax.passes import Cast, Quantize
from compax.pipeline import Pipeline
from compax.transform import Context
from oracle import assert_preserves
from precision import (
    BFLOAT16,
    FLOAT32,
    TWO,
    W,
    X,
    cast,
    dtypes,
    normal,
    operations,
    relative,
    two_layers,
)

# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", bodies.BODIES, ids=lambda body: body.name)
def test_bodies(body):
    program = capture(body.make(), *body.inputs())
    result = Cast().run(program, Context())
    verify(result.program)
    opaque = {"custom_vjp"}
    assert {site.status for site in result.sites} == {"skipped" if body.name in opaque else "rewritten"}
    before, after = program(*body.inputs()), result.program(*body.inputs())
    assert after.dtype == before.dtype
    assert relative(before, after) < 0.01


TINY = decoder.SIZES["tiny"]
DECODERS = {
    "unrolled": {},
    "scanned": {"scan": True},
    "remat": {"remat": True},
    "scanned with remat": {"scan": True, "remat": True},
    "layernorm and relu": {"norm": "layernorm", "gated": False, "activation": "relu", "tied": False, "mlp_bias": True},
}


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_decoder_is_as_close_as_flax_own_bfloat16(options):
    config = dataclasses.replace(TINY, **options)
    tokens = decoder.example_inputs(config, sequence=16)
    program = capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *tokens)
    narrow = decoder.Decoder(dataclasses.replace(config, dtype="bfloat16"), rngs=nnx.Rngs(0))
    after = cast(program)
    exact = program(*tokens)
    assert after(*tokens).dtype == FLOAT32
    assert relative(exact, after(*tokens)) < 1.5 * relative(exact, narrow(*tokens).astype(jnp.float32))
    assert set(dtypes(after, "dot_general")) <= {"bfloat16", "float32"}  # the angles' outer product is no product


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": True}], ids=["unrolled", "scanned with remat"])
def test_decoder_trains_in_bfloat16(options):
    config = dataclasses.replace(TINY, **options)
    batch = {"tokens": decoder.example_inputs(config, sequence=17)[0]}
    program = capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), batch, loss=decoder.loss, mode="train")
    narrow = cast(program)

    def loss(program: Program, params: Mapping[str, Any]) -> jax.Array:
        return program.apply(params, program.state, batch)[0][0]

    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, narrow)))(program.params)
    exact, exact_gradient = jax.jit(jax.value_and_grad(functools.partial(loss, program)))(program.params)
    assert value.dtype == FLOAT32
    assert abs(value - exact) < 1e-3 * exact
    for path, leaf in gradient.items():
        assert leaf.dtype == program.params[path].dtype == FLOAT32
        assert relative(exact_gradient[path], leaf) < 0.2


@pytest.mark.slow
def test_oracle_on_the_decoder():
    model = decoder.Decoder(TINY, rngs=nnx.Rngs(0))
    assert_preserves(Cast(), model, *decoder.example_inputs(TINY, sequence=8))


def test_cache_keeps_its_dtype():
    model = decoder.Decoder(TINY, rngs=nnx.Rngs(0))
    (tokens,) = decoder.example_inputs(TINY, sequence=4)
    program = capture(model, tokens, model.init_cache(2, 8))
    narrow = cast(program)
    exact_cache, cache = model.init_cache(2, 8), model.init_cache(2, 8)
    exact, output = program(tokens, exact_cache), narrow(tokens, cache)
    assert relative(exact, output) < 0.03
    assert cache.layers[0].key[...].dtype == FLOAT32
    assert int(cache.position[...]) == 4
    assert relative(exact_cache.layers[1].value[...], cache.layers[1].value[...]) < 0.03


class BatchNormalized(nn.Module):
    """A small residual network in Linen, with running statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(4)(x.mean(axis=(1, 2)))


def test_running_statistics_stay_float32():
    images = normal(4, 6, 6, 3)
    module = BatchNormalized()
    variables = module.init(jax.random.key(0), images, train=False)
    program = capture(module, images, variables=variables, mutable=["batch_stats"], train=True)
    narrow = cast(program)
    assert set(dtypes(narrow, "conv_general_dilated")) == {"bfloat16"}
    exact, exact_state, _ = program.apply(program.params, program.state, images, train=True)
    output, state, _ = narrow.apply(program.params, program.state, images, train=True)
    assert relative(exact, output) < 0.03
    for path, leaf in state.items():
        assert leaf.dtype == FLOAT32
        assert relative(exact_state[path], leaf) < 0.03


def test_dropout_draws_are_untouched():
    config = dataclasses.replace(TINY, dropout=0.5)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    (tokens,) = decoder.example_inputs(config, sequence=8)
    program = capture(model, tokens, mode="train")
    narrow = cast(program)
    exact, exact_state, _ = program.apply(program.params, program.state, tokens)
    output, state, _ = narrow.apply(program.params, program.state, tokens)
    assert relative(exact, output) < 0.05
    for path, leaf in state.items():
        assert leaf.dtype == exact_state[path].dtype
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            assert jnp.array_equal(*map(_bits, (leaf, exact_state[path])))


def _bits(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


# -- options ----------------------------------------------------------------------------------------------------------


def test_keep_a_site():
    result = Cast(keep="second").run(capture(two_layers, TWO, X), Context())
    verify(result.program)
    assert dtypes(result.program, "dot_general") == ["bfloat16", "float32"]
    assert [(site.name, site.status, site.reason) for site in result.sites] == [
        ("first", "rewritten", ""),
        ("second", "skipped", "kept in float32"),
    ]


def test_keep_a_parameter():
    program = cast(capture(two_layers, TWO, X), keep="first.b")
    assert dtypes(program, "dot_general") == ["bfloat16", "bfloat16"]
    assert dtypes(program, "tanh") == ["float32"]


def test_keep_in_one_of_several_calls_of_a_body():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    params = {"a": {"w": W}, "b": {"w": W}, "c": {"w": W}}

    def function(params, x):
        for name in "abc":
            x = layer(params[name]["w"], x)
        return x

    program = cast(capture(function, params, X), keep="b")
    assert dtypes(program, "dot_general") == ["bfloat16", "float32", "bfloat16"]


def test_at_selects_sites():
    """Only the second product is narrow, and what is around it stays float32."""
    program = cast(capture(two_layers, TWO, X), at="second")
    assert dtypes(program, "dot_general") == ["float32", "bfloat16"]
    assert dtypes(program, "tanh") == ["float32"]


def test_nothing_matches():
    program = capture(two_layers, TWO, X)
    with pytest.raises(SelectorError, match="'second'"):
        Cast(at="secnd").run(program, Context())
    with pytest.raises(SelectorError, match="no site or parameter"):
        Cast(keep="third").run(program, Context())
    with pytest.raises(PipelineError, match="compute"):
        Cast(compute="int8")


def test_again_changes_nothing():
    program = cast(capture(two_layers, TWO, X))
    result = Cast().run(program, Context())
    assert not result.changed
    assert result.program is program
    assert {(site.status, site.reason) for site in result.sites} == {("matched", "computes in bfloat16 already")}


def test_product_that_no_parameter_reaches():
    """A filter bank over the input is not the network's: it stays, and the report says why."""
    filters = np.asarray(W)

    def function(params, x):
        return (x @ filters) @ params["w"]

    result = Cast().run(capture(function, {"w": W}, X), Context())
    verify(result.program)
    assert dtypes(result.program, "dot_general") == ["float32", "bfloat16"]
    assert [(site.status, site.reason[:27]) for site in result.sites] == [
        ("skipped", "computes only with inputs a"),
        ("rewritten", ""),
    ]


def test_float32_program_cast_to_float32():
    program = capture(two_layers, TWO, X)
    assert Cast(compute="float32").run(program, Context()).program is program


def test_back_up_to_float32():
    """A model that computes in bfloat16, computed in float32 over the same parameters."""
    config = dataclasses.replace(TINY, dtype="bfloat16")
    (tokens,) = decoder.example_inputs(config, sequence=8)
    program = capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), tokens)
    wide = cast(program, compute="float32")
    exact = capture(decoder.Decoder(TINY, rngs=nnx.Rngs(0)), tokens)(tokens)
    assert wide(tokens).dtype == BFLOAT16
    assert relative(exact, wide(tokens).astype(jnp.float32)) < 0.004  # the rounding of the logits alone
    assert relative(exact, program(tokens).astype(jnp.float32)) > 0.004


def test_float16():
    program = capture(two_layers, TWO, X)
    assert relative(program(X), cast(program, compute="float16")(X)) < relative(program(X), cast(program)(X))


# -- with other passes, and with new shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cast() | quantize()", "quantize() | cast()"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_with_quantize(order, activations):
    (tokens,) = decoder.example_inputs(TINY, sequence=8)
    model = decoder.Decoder(TINY, rngs=nnx.Rngs(0))
    program = capture(model, tokens)
    text = order.replace("quantize()", f"quantize(weights=int8, activations={activations})")
    narrow = Pipeline.parse(text)(program, tokens)
    verify(narrow)
    int8 = Quantize(activations=None if activations == "none" else "int8").run(program, Context()).program
    assert relative(int8(tokens), narrow(tokens)) < 0.05
    assert all(op.outputs[0].dtype == BFLOAT16 for op in operations(narrow) if op.name == "quantized_contraction")


def test_new_shapes_and_entries_are_cast_too():
    program = Pipeline([Cast(keep="second")])(capture(two_layers, TWO, X), X)
    wider = program.specialize(normal(3, 16))
    verify(wider)
    for captured in wider.graphs.values():
        products = [op for op in captured.graph.ops if op.name == "dot_general"]
        assert [str(op.inputs[0].dtype) for op in products] == ["bfloat16", "float32"]


def test_abstract_parameters():
    model = nnx.eval_shape(lambda: decoder.Decoder(TINY, rngs=nnx.Rngs(0)))
    program = capture(model, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    kinds = collections.Counter(dtypes(cast(program), "dot_general"))
    assert kinds["bfloat16"] == 19


def test_sharded_contraction_adds_up_on_devices():
    """`psum` of bfloat16 products under `shard_map`, forward and backward."""
    body = next(body for body in bodies.BODIES if body.name == "sharded contraction")
    program = capture(body.make(), *body.inputs())
    narrow = cast(program)

    def loss(program: Program, params: Mapping[str, Any]) -> jax.Array:
        return jnp.sum(jnp.square(program.apply(params, {}, *body.inputs())[0]))

    exact = jax.grad(functools.partial(loss, program))(dict(program.params))["w"]
    gradient = jax.grad(functools.partial(loss, narrow))(dict(program.params))["w"]
    assert relative(exact, gradient) < 0.02


def test_operation_by_operation_equals_compiled():
    program = cast(capture(two_layers, TWO, X))
    (captured,) = program.graphs.values()
    inputs = [program.params.get(tag.path, X) for tag in captured.inputs]
    (eager,) = evaluate(captured.graph, inputs)
    np.testing.assert_allclose(eager, program(X), rtol=0.02, atol=0.02)
