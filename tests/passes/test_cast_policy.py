"""Mixed precision: which operation computes in which dtype, and what a loop carries."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax import capture, verify
from compax.passes import Cast
from compax.passes.cast import fits
from compax.transform import Context
from precision import BFLOAT16, FLOAT32, W, X, cast, cast_function, dtypes, normal, operations, relative

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
