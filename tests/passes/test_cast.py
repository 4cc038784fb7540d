"""Mixed precision: what computes in what, on models that did nothing for it."""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax import Program, capture, ir, verify
from compax.errors import PipelineError, SelectorError
from compax.experiments.benchmarks import bodies
from compax.lowering import evaluate
from compax.models import decoder
from compax.passes import Cast, Quantize
from compax.passes.cast import fits
from compax.pipeline import Pipeline
from compax.transform import Context
from oracle import assert_preserves

BFLOAT16 = jnp.dtype(jnp.bfloat16)
FLOAT32 = jnp.dtype(jnp.float32)


def cast(program: Program, **options: Any) -> Program:
    """The program after the pass, verified."""
    result = Cast(**options).run(program, Context())
    assert result.changed
    verify(result.program)
    return result.program


def cast_function(function, params, *inputs, **options) -> Program:
    return cast(capture(function, params, *inputs), **options)


def operations(program: Program) -> list[ir.Op]:
    (captured,) = program.graphs.values()
    return [op for _, op in ir.walk(captured.graph)]


def dtypes(program: Program, name: str) -> list[str]:
    """The dtypes of the floating operands of all operations of a name."""
    found = []
    for op in operations(program):
        if op.name == name:
            floats = {str(x.dtype) for x in op.inputs if jnp.issubdtype(x.dtype, jnp.floating)}
            found.append("+".join(sorted(floats)))
    return found


def relative(x: Any, y: Any) -> float:
    return float(jnp.linalg.norm(jnp.ravel(x - y)) / jnp.linalg.norm(jnp.ravel(x)))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W = normal(16, 16) / 4
X = normal(8, 16, seed=1)


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


# -- which operation computes in what ---------------------------------------------------------------------------------


def test_softmax_sums_and_loss_are_float32():
    def attention(params, x):
        query, key = x @ params["query"], x @ params["key"]
        weights = jax.nn.softmax(query @ key.T / 4.0)
        return jnp.log(jnp.mean(jnp.square(weights @ x)))

    program = cast_function(attention, {"query": W, "key": W.T}, X)
    assert set(dtypes(program, "dot_general")) == {"bfloat16"}
    for name in ("exp", "reduce_sum", "log", "div", "square", "sub"):
        assert set(dtypes(program, name)) == {"float32"}, name


def test_stablehlo_multiplies_bfloat16():
    program = cast_function(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"], {"w": W}, X)
    text = jax.jit(program.apply).lower(program.params, program.state, X).as_text()
    products = re.findall(r"dot_general .*: \((.*)\) ->", text)
    assert len(products) == 2
    assert all(types.count("bf16") == 2 for types in products)
    assert "tanh %" in text
    assert re.search(r"stablehlo.tanh .*bf16", text)


def test_mean_and_variance_are_those_of_the_rounded_activations():
    """Layer normalization: all of it in float32, from what only it reads to the one rounding at its end."""
    layer = nnx.LayerNorm(16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def function(params, x):
        y = x @ params["w"] + 100.0
        return nnx.merge(graph, state)(y) @ params["w"]

    program = capture(function, {"w": W}, X)
    y = (X.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)).astype(jnp.float32) + 100.0
    expected = layer(y).astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)
    np.testing.assert_allclose(cast(program)(X), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_positions_and_angles_stay_float32():
    """Position 4001 is not a bfloat16; a rotary angle from a rounded one would be off by radians."""

    def rotary(params, x):
        angles = jnp.einsum("t,k->tk", 4001.0 + jnp.arange(8.0), 0.5 ** jnp.arange(16.0))
        return (x @ params["w"]) * jnp.cos(angles)

    program = capture(rotary, {"w": W}, X)
    assert relative(program(X), cast(program)(X)) < 0.01


def test_mask_value_that_would_overflow():
    """The least float32 rounds to -inf: a row that is masked throughout would become NaN."""

    def attention(params, x):
        scores = (x @ params["w"])[:, :8]
        mask = jnp.tril(jnp.ones((8, 8), bool), -1)
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(scores) @ x @ params["w"]

    program = capture(attention, {"w": W}, X)
    for compute in ("bfloat16", "float16"):
        assert relative(program(X), cast(program, compute=compute)(X)) < 0.02


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (np.float32(np.finfo(np.float32).min), jnp.bfloat16, False),
        (np.float32(-1e9), jnp.bfloat16, True),
        (np.float32(-1e9), jnp.float16, False),
        (np.float32(1e-9), jnp.float16, False),
        (np.float32(0.0), jnp.float16, True),
        (np.float32(-np.inf), jnp.float16, True),
        (np.float32(np.nan), jnp.bfloat16, True),
        (np.int32(100_000), jnp.float16, True),
    ],
)
def test_constants_that_fit(value, dtype, expected):
    assert fits(value, dtype) is expected


def test_relu_in_bfloat16():
    """A custom derivative rule is bound as JAX recorded it, in float32, and counted."""
    program = capture(lambda params, x: jax.nn.relu(x @ params["w"]) @ params["w"], {"w": W}, X)
    result = Cast().run(program, Context())
    verify(result.program)
    assert result.notes == (
        "1 custom_jvp_call as recorded: its derivative rule belongs to the body as it was recorded",
    )
    assert set(dtypes(result.program, "dot_general")) == {"bfloat16"}
    gradient = jax.grad(lambda params: result.program.apply(params, {}, X)[0].sum())({"w": W})["w"]
    exact = jax.grad(lambda params: program.apply(params, {}, X)[0].sum())({"w": W})["w"]
    assert relative(exact, gradient) < 0.05


def test_operation_without_a_rule():
    def function(params, x):
        return jax.lax.reduce_precision(x @ params["w"], 8, 10) @ params["w"]

    program = capture(function, {"w": W}, X)
    result = Cast().run(program, Context())
    verify(result.program)
    assert result.notes == ("1 reduce_precision as recorded: there is no rule for it in another dtype",)
    assert relative(program(X), result.program(X)) < 0.02


def test_residual_stream_stays_narrow():
    """Normalized branches are float32 inside; what they are added to is not."""

    def normalized(x):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def function(params, tokens):
        x = params["embedding"][tokens]
        for _ in range(3):
            x = x + normalized(jnp.tanh(x @ params["w"]))
        return x @ params["w"]

    tokens = jnp.arange(8) % 5
    program = cast_function(function, {"embedding": normal(5, 16), "w": W}, tokens)
    sums = [op for op in operations(program) if op.name == "add" and op.outputs[0].shape == (8, 16)]
    assert [str(op.outputs[0].dtype) for op in sums] == ["bfloat16"] * 3


def test_gradient_of_an_embedding_adds_up_in_float32():
    """A thousand equal tokens: their gradients are lost if they are added in bfloat16."""
    tokens = jnp.zeros(1000, jnp.int32)
    program = cast_function(
        lambda params, t: (params["embedding"][t] * 0.1) @ params["w"], {"embedding": normal(2, 16), "w": W}, tokens
    )
    gradient = jax.grad(lambda params: program.apply(params, {}, tokens)[0].sum())(dict(program.params))
    expected = 1000 * 0.1 * W.sum(axis=1)
    assert relative(expected, gradient["embedding"][0]) < 0.02


def test_integers_and_booleans_are_untouched():
    def function(params, x, n):
        y = x @ params["w"]
        chosen = jnp.argmax(y, -1)
        return y, chosen + n, y > 0, (y * 100).astype(jnp.int32)

    program = capture(function, {"w": W}, X, jnp.int32(3))
    before, after = program(X, jnp.int32(3)), cast(program)(X, jnp.int32(3))
    assert [x.dtype for x in before] == [x.dtype for x in after]


# -- loops and branches -----------------------------------------------------------------------------------------------


def test_scan_whose_carry_arrives_narrow():
    def function(params, x):
        return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x @ params["w"][0], params["w"])[0]

    program = cast_function(function, {"w": jnp.stack([W, W.T])}, X)
    (scan,) = (op for op in operations(program) if op.name == "scan")
    assert scan.outputs[0].dtype == BFLOAT16
    assert set(dtypes(program, "dot_general")) == {"bfloat16"}


def test_accumulator_of_a_scan_stays_float32():
    """A thousand small terms: in bfloat16 the sum stops growing."""

    def function(params, x):
        def step(total, row):
            return total + 0.01 * jnp.tanh(row @ params["w"]), None

        return jax.lax.scan(step, jnp.zeros(16), x)[0]

    x = jnp.abs(normal(1000, 16))
    program = capture(function, {"w": jnp.abs(W)}, x)
    narrow = cast(program)
    assert set(dtypes(narrow, "dot_general")) == {"bfloat16"}
    assert relative(program(x), narrow(x)) < 0.005


def test_carry_that_becomes_a_statistic_is_widened():
    def function(params, x):
        def step(carry, _):
            return jnp.sum(jnp.tanh(carry[:, None] * params["w"]), 0), None

        return jax.lax.scan(step, (x @ params["w"])[0], None, length=3)[0]

    program = capture(function, {"w": W}, X)
    narrow = cast(program)
    (scan,) = (op for op in operations(narrow) if op.name == "scan")
    assert scan.outputs[0].dtype == FLOAT32
    assert relative(program(X), narrow(X)) < 0.02


def test_parameter_that_a_loop_hands_on():
    """`while` with the weight among its carried values: still a parameter to what is computed with it."""

    def function(params, x):
        def step(state):
            i, x, w, b = state
            return i + 1, jnp.tanh(x @ w + b), w, b

        return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x @ params["w"], params["w"], params["b"]))[1]

    program = capture(function, {"w": W, "b": normal(16)}, X)
    narrow = cast(program)
    assert set(dtypes(narrow, "dot_general")) == {"bfloat16"}
    assert set(dtypes(narrow, "tanh")) == {"bfloat16"}
    assert relative(program(X), narrow(X)) < 0.02


def test_branches_that_give_different_dtypes():
    def function(params, x, flag):
        y = x @ params["w"]
        return jax.lax.cond(flag, lambda y: y * 2, lambda y: jnp.exp(y), y) @ params["w"]

    program = capture(function, {"w": W}, X, jnp.asarray(True))
    narrow = cast(program)
    for flag in (True, False):
        assert relative(program(X, jnp.asarray(flag)), narrow(X, jnp.asarray(flag))) < 0.02


def test_equal_layers_stay_one_function():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def function(params, x):
        x = jnp.tanh(x @ params["in"])
        for name in "abc":
            x = layer(params[name], x)
        return x

    program = cast_function(function, dict.fromkeys(("in", "a", "b", "c"), W), X)
    calls = [op for op in operations(program) if op.name == "jit"]
    assert len({id(op.bodies[0]) for op in calls}) == 1


def test_vmap_and_grad_of_a_cast_program():
    program = cast_function(lambda params, x: jnp.tanh(x @ params["w"]), {"w": W}, X[0])
    rows = jax.vmap(lambda x: program.apply(program.params, {}, x)[0])(X)
    whole = jnp.stack([program(x) for x in X])
    np.testing.assert_allclose(rows, whole, rtol=0.02, atol=0.02)
    gradient = jax.jit(jax.grad(lambda x: program.apply(program.params, {}, x)[0].sum()))(X[0])
    assert gradient.dtype == FLOAT32


# -- options ----------------------------------------------------------------------------------------------------------


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]["w"] + params["first"]["b"]) @ params["second"]["w"]


TWO = {"first": {"w": W, "b": normal(16)}, "second": {"w": W}}


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
