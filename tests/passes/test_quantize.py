"""Quantization on small models: numbers against NumPy, what is selected, skipped and refused, other passes beside it.

Every ordinary way to write a layer is in `test_quantize_bodies.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compax
from bodies import relative_error
from compax import Program, integers
from compax.passes.quantize import arithmetic
from compax.passes.quantize.encoding import QuantizedArray, SimulatedArray
from small import TOKENS, D, Model, program_of, run, statuses, values

WEIGHTS = "quantize(weights=int8)"
BOTH = "quantize(weights=int8, activations=int8)"
TRAIN = "quantize(train=true)"
TRAIN_BOTH = "quantize(weights=int8, activations=int8, train=true)"
ROUNDING = 2e-5
"""Relative to the norm: what float32 sums in another order may differ by."""


# -- Arithmetic -------------------------------------------------------------------------------------------------------


def reference(x: np.ndarray, dims: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Jacob et al. 2017 without zero points: codes and scales, in float64 as far as rounding allows."""
    scale = np.abs(np.float32(x)).max(axis=dims, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(np.float32(x) / scale), -127, 127).astype(np.int64), scale


def test_codes_and_scales() -> None:
    x = np.array(values(6, 5, 4))
    x[:, 2, 1] = 0
    for dims in ((0,), (1, 2), (0, 1, 2), (2,)):
        codes, scale = reference(x, dims)
        ours = integers.absmax_scale(jnp.asarray(x), dims)
        np.testing.assert_allclose(ours, scale, rtol=1e-7)
        np.testing.assert_array_equal(integers.to_integers(jnp.asarray(x), ours), codes)
        decoded = integers.from_integers(integers.to_integers(jnp.asarray(x), ours), ours, jnp.float32)
        assert np.all(np.abs(decoded - x) <= scale / 2 * (1 + 1e-6))


def test_rounding_is_to_even_and_within_the_symmetric_range() -> None:
    x = jnp.asarray([-127.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 127.0, 500.0, -500.0])
    codes = integers.to_integers(x, jnp.ones(1))
    np.testing.assert_array_equal(codes, [-127, -2, -2, 0, 0, 2, 2, 127, 127, -127])


def test_the_largest_value_survives() -> None:
    x = values(5, 7)
    decoded = arithmetic.fake_quantize(x, integers.absmax_scale(x, (0,)))
    largest = np.argmax(np.abs(x), axis=0)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(decoded), largest[None], 0), np.take_along_axis(np.asarray(x), largest[None], 0)
    )


def test_rounding_twice_is_rounding_once() -> None:
    x = values(5, 7)
    scale = integers.absmax_scale(x, (0,))
    once = arithmetic.fake_quantize(x, scale)
    np.testing.assert_array_equal(arithmetic.fake_quantize(once, scale), once)


def test_the_gradient_passes_straight_through() -> None:
    x, weights = values(5, 7), values(5, 7, seed=1)

    def function(x: jax.Array) -> jax.Array:
        return jnp.vdot(arithmetic.fake_quantize(x, integers.absmax_scale(x, (0,))), weights)

    np.testing.assert_array_equal(jax.grad(function)(x), weights)
    value, tangent = jax.jvp(lambda x: arithmetic.fake_quantize(x, jnp.ones(1)), (x,), (weights,))
    np.testing.assert_array_equal(tangent, weights)
    np.testing.assert_array_equal(value, jnp.round(x))


def test_what_is_not_a_number_stays_so() -> None:
    """A NaN among activations must reach the output: a policy on NaN looks there."""
    for bad in (jnp.nan, jnp.inf):
        x = values(4, D).at[1, 2].set(bad)
        for pipeline in (BOTH, TRAIN_BOTH):
            program = run(pipeline, compax.capture(lambda p, x: x @ p["w"], {"w": values(D, D)}, values(4, D)))
            output = np.asarray(program(x))
            assert not np.isfinite(output[1]).any()
            assert np.isfinite(output[[0, 2, 3]]).all()


def test_a_weight_that_is_not_a_number_stays_so() -> None:
    program = run(
        WEIGHTS, compax.capture(lambda p, x: x @ p["w"], {"w": values(D, D).at[1, 2].set(jnp.nan)}, values(4, D))
    )
    assert np.isnan(np.asarray(program(values(4, D)))[:, 2]).all()


# -- Weights ----------------------------------------------------------------------------------------------------------


def test_weights_have_a_scale_for_each_output_channel() -> None:
    program = run(WEIGHTS, program_of())
    kernel, table = program.params["blocks.0.kernel"], program.params["embed.embedding"]
    assert isinstance(kernel, QuantizedArray)
    assert (kernel.values.dtype, kernel.scale.shape) == (jnp.int8, (1, D))
    assert table.scale.shape == (12, 1)
    codes, scale = reference(np.asarray(Model().blocks[0].kernel[...]), (0,))
    np.testing.assert_array_equal(kernel.values, codes)
    np.testing.assert_allclose(kernel.scale, scale, rtol=1e-7)
    for name in ("blocks.0.bias", "norm.scale", "norm.bias"):
        assert program.params[name] is not None
        assert not isinstance(program.params[name], compax.Encoded)


def test_output_is_that_of_the_decoded_weights() -> None:
    program = run(WEIGHTS, program_of())
    dense = program.decode()
    assert all(isinstance(x, jax.Array) for x in dense.params.values())
    assert relative_error(program(TOKENS), dense(TOKENS)) < ROUNDING
    assert 1e-4 < relative_error(program(TOKENS), program_of()(TOKENS)) < 0.05


def test_a_row_of_an_embedding_is_its_codes_times_its_scale() -> None:
    program = run(WEIGHTS, compax.capture(lambda p, i: p["table"][i], {"table": values(12, D)}, TOKENS))
    codes, scale = reference(np.asarray(values(12, D)), (1,))
    np.testing.assert_array_equal(program(TOKENS), np.float32(codes * scale)[np.asarray(TOKENS)])
    assert program.coverage().unpacked == ()


def test_a_tied_head_reads_the_table_that_is_looked_up() -> None:
    program = run(BOTH, program_of())
    assert statuses(program) == dict.fromkeys(("embed", "blocks.0", "blocks.1", "embed#2"), "rewritten")
    assert [path for path, x in program.params.items() if isinstance(x, compax.Encoded)] == [
        "blocks.0.kernel",
        "blocks.1.kernel",
        "embed.embedding",
    ]
    assert program.coverage().unpacked == ()


def test_a_weight_used_in_two_directions_has_one_scale() -> None:
    """`w` contracts rows in one product and columns in the other: no scale may vary along either."""
    params = {"w": values(D, D)}
    program = run(WEIGHTS, compax.capture(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, params, values(4, D)))
    assert program.params["w"].scale.shape == (1, 1)
    assert program.coverage().unpacked == ()
    assert relative_error(program(values(4, D)), program.decode()(values(4, D))) < ROUNDING


def test_stacked_layers_and_experts_keep_their_own_scales() -> None:
    params = {"layers": values(3, D, D), "experts": values(2, D, D)}

    def function(p: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
        return jnp.einsum("bd,edf->ebf", x, p["experts"])

    program = run(WEIGHTS, compax.capture(function, params, values(4, D)))
    assert program.params["layers"].scale.shape == (3, 1, D)
    assert program.params["experts"].scale.shape == (2, 1, D)
    codes, _ = reference(np.asarray(params["layers"]), (1,))
    np.testing.assert_array_equal(program.params["layers"].values, codes)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, (3, 3, 4, 6)),
        ({"strides": 2}, (3, 3, 4, 6)),
        ({"feature_group_count": 4}, (3, 3, 1, 8)),
        ({"kernel_dilation": 2}, (3, 3, 4, 6)),
    ],
    ids=["plain", "strided", "depthwise", "dilated"],
)
@pytest.mark.parametrize("pipeline", [WEIGHTS, BOTH, TRAIN_BOTH])
def test_convolution(options: dict[str, Any], kernel: tuple[int, ...], pipeline: str) -> None:
    module = nnx.Conv(4, kernel[-1], (3, 3), rngs=nnx.Rngs(0), **options)
    image = values(2, 8, 8, 4)
    program = run(pipeline, compax.capture(module, image))
    x = program.params["kernel"]
    assert x.shape == kernel
    if pipeline == WEIGHTS:
        assert x.scale.shape == (1, 1, 1, kernel[-1])
        assert relative_error(program(image), program.decode()(image)) < ROUNDING
    else:
        module.kernel[...] = jnp.asarray(x.decode())
        codes, scale = reference(np.asarray(image), (1, 2, 3))
        assert relative_error(program(image), module(jnp.asarray(codes * scale, jnp.float32))) < ROUNDING


@pytest.mark.parametrize("pipeline", [WEIGHTS, BOTH, TRAIN_BOTH])
def test_convolution_whose_batch_is_split_into_groups(pipeline: str) -> None:
    """An output pixel comes from one of several examples, whose scales differ."""

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
        )

    x = values(4, 10, D) * jnp.asarray([1.0, 10.0, 100.0, 1000.0])[:, None, None]
    program = run(pipeline, compax.capture(function, {"w": values(3, D, 6)}, x))
    given = x
    if pipeline != WEIGHTS:
        codes, scale = reference(np.asarray(x), (1, 2))
        given = jnp.asarray(codes * scale, jnp.float32)
    dense = {path: w.decode() for path, w in program.params.items()}
    assert relative_error(program(x), function(dense, given)) < ROUNDING


@pytest.mark.parametrize("pipeline", [WEIGHTS, BOTH, TRAIN_BOTH])
def test_complex_activations(pipeline: str) -> None:
    """They have two parts; int8 has one: the weight is stored, and the product is the model's own."""
    x, w = values(4, D) * (1 + 2j), values(D, D)
    program = run(pipeline, compax.capture(lambda p, x: x @ p["w"], {"w": w}, x))
    dense = program.params["w"].decode()
    difference = program(x) - x @ dense
    assert np.linalg.norm(difference) < ROUNDING * np.linalg.norm(x @ dense)


@pytest.mark.parametrize("pipeline", [WEIGHTS, BOTH, TRAIN_BOTH])
def test_explicit_meshes(pipeline: str) -> None:
    """Shardings in types: the output has the one that the model asked for, the gradient that of the input."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def function(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ p["columns"])
        return jnp.einsum("bd,df->bf", x, p["rows"], out_sharding=PartitionSpec("data", None))

    with jax.set_mesh(mesh):
        params = {
            "columns": jax.device_put(values(D, D), NamedSharding(mesh, PartitionSpec(None, "model"))),
            "rows": jax.device_put(values(D, D, seed=1), NamedSharding(mesh, PartitionSpec("model", None))),
        }
        x = jax.device_put(values(8, D, seed=2), NamedSharding(mesh, PartitionSpec("data", None)))
        program = run(pipeline, compax.capture(function, params, x))
        output = program(x)
        assert output.sharding.spec == PartitionSpec("data", None)
        assert relative_error(output, function(params, x)) < 0.05
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(program.apply(program.params, {}, x)[0])))(x)
        assert relative_error(gradient, jax.grad(lambda x: jnp.sum(function(params, x)))(x)) < 0.1


def test_bfloat16_weights() -> None:
    """The scale is float32 and the result is what the model's dtype says."""
    params = {"w": values(D, D).astype(jnp.bfloat16)}
    x = values(4, D).astype(jnp.bfloat16)
    for pipeline in (WEIGHTS, BOTH, TRAIN, TRAIN_BOTH):
        program = run(pipeline, compax.capture(lambda p, x: x @ p["w"], params, x))
        assert program.params["w"].dtype == jnp.bfloat16
        assert program(x).dtype == jnp.bfloat16
        assert relative_error(program(x), program_with(params, x)(x)) < 0.03


def program_with(params: Any, x: jax.Array) -> Program:
    return compax.capture(lambda p, x: x @ p["w"], params, x)


def input_gradient(program: Program, x: jax.Array) -> jax.Array:
    direction = values(*program(x).shape, seed=1)
    return jax.grad(lambda x: jnp.vdot(program.apply(program.params, {}, x)[0], direction))(x)


@pytest.mark.slow
def test_a_large_weight_is_read_block_by_block() -> None:
    """Sizes at which the CPU rule takes over, on both sides, transposed, and with few rows."""
    w = values(512, 256)
    cases: dict[str, tuple[Callable[[Any, jax.Array], jax.Array], jax.Array]] = {
        "right": (lambda p, x: x @ p["w"], values(3, 512)),
        "left": (lambda p, x: p["w"] @ x, values(256, 3)),
        "transposed": (lambda p, x: x @ p["w"].T, values(3, 256)),
        "one row": (lambda p, x: x @ p["w"], values(512)),
        "many rows": (lambda p, x: x @ p["w"], values(2, 70, 512)),
        "heads": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(512, 4, 64)), values(3, 512)),
    }
    for name, (function, x) in cases.items():
        for pipeline in (WEIGHTS, BOTH):
            program = run(pipeline, compax.capture(function, {"w": w}, x))
            dense = compax.capture(function, {"w": program.params["w"].decode()}, x)
            given = x
            if pipeline == BOTH:
                dims = (0,) if name == "left" else (x.ndim - 1,)
                codes, scale = reference(np.asarray(x), dims)
                given = jnp.asarray(codes * scale, jnp.float32)
            assert relative_error(program(x), dense(given)) < ROUNDING, (name, pipeline)
            assert relative_error(input_gradient(program, x), input_gradient(dense, x)) < ROUNDING, (name, pipeline)


# -- Activations ------------------------------------------------------------------------------------------------------


def test_activations_have_a_scale_for_each_row() -> None:
    """A large token does not cost the others their precision."""
    params, x = {"w": values(D, D)}, values(4, D)
    large = x.at[0].mul(1000)
    program = run(BOTH, compax.capture(lambda p, x: x @ p["w"], params, x))
    np.testing.assert_array_equal(program(large)[1:], program(x)[1:])


def test_the_product_is_that_of_the_integers() -> None:
    x, w = np.asarray(values(5, D)), np.asarray(values(D, 6, seed=1))
    program = run(BOTH, compax.capture(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, jnp.asarray(x)))
    (rows, row_scale), (columns, column_scale) = reference(x, (1,)), reference(w, (0,))
    expected = np.float64(rows @ columns) * row_scale * column_scale
    np.testing.assert_allclose(program(jnp.asarray(x)), expected, rtol=1e-6)


def test_training_and_running_compute_the_same() -> None:
    """What is trained is what runs: simulated and stored agree, for weights and for both."""
    for train, stored in ((TRAIN, WEIGHTS), (TRAIN_BOTH, BOTH)):
        simulated = run(train, program_of())
        assert relative_error(simulated(TOKENS), run(stored, program_of())(TOKENS)) < ROUNDING
        afterwards = run(stored, simulated)
        assert all(not isinstance(x, SimulatedArray) for x in afterwards.params.values())
        assert relative_error(afterwards(TOKENS), simulated(TOKENS)) < ROUNDING
        for path, x in afterwards.params.items():
            if isinstance(x, QuantizedArray):
                np.testing.assert_array_equal(x.decode(), simulated.params[path].decode())


def test_storing_weights_keeps_simulated_activations() -> None:
    simulated = run(TRAIN_BOTH, program_of())
    assert relative_error(run(WEIGHTS, simulated)(TOKENS), simulated(TOKENS)) < ROUNDING


# -- Training ---------------------------------------------------------------------------------------------------------


def test_straight_through_gradients_by_hand() -> None:
    """y = q(x) @ q(w): the gradient of w is q(x).T @ g, that of x is g @ q(w).T."""
    x, w, g = values(5, D), values(D, 6, seed=1), values(5, 6, seed=2)
    program = run(TRAIN_BOTH, compax.capture(lambda p, x: x @ p["w"], {"w": w}, x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.vdot(program.apply(params, {}, x)[0], g)

    by_weight, by_input = jax.grad(loss, argnums=(0, 1))(program.params, x)
    (rows, row_scale), (columns, column_scale) = reference(np.asarray(x), (1,)), reference(np.asarray(w), (0,))
    np.testing.assert_allclose(by_weight["w"].master, (rows * row_scale).T @ g, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_input, g @ (columns * column_scale).T, rtol=1e-5, atol=1e-6)


def test_only_masters_train() -> None:
    simulated, stored = run(TRAIN, program_of()), run(WEIGHTS, program_of())
    assert simulated.partition()[0].keys() == simulated.params.keys()
    assert not stored.partition()[0].keys() & {"blocks.0.kernel", "blocks.1.kernel", "embed.embedding"}


def test_training_reduces_the_loss_of_the_quantized_model() -> None:
    target = jax.nn.one_hot((TOKENS + 1) % 12, 12)
    program = run(TRAIN_BOTH, program_of())

    @jax.jit
    def step(params: Any) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = program.apply(params, program.state, TOKENS)[0]
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * target, -1))

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda x, g: x - 0.3 * g, params, gradient), value

    params, losses = program.params, []
    for _ in range(60):
        params, value = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]
    stored = run(BOTH, program.replace(params=params))
    assert relative_error(stored(TOKENS), program.apply(params, program.state, TOKENS)[0]) < ROUNDING
