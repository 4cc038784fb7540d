"""Derivatives of lowered programs: custom rules, what is kept for the backward pass, products of any layout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import compax
from compax.passes import Quantize
from compax.passes.quantize.encoding import quantize_array
from compax.transform import Context
from encoded import decodes, lower, stored, values

D = 16


@jax.custom_vjp
def halved(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product whose author halves its gradient."""
    return jnp.tanh(x @ w)


def _halved_forward(x: jax.Array, w: jax.Array) -> Any:
    y = jnp.tanh(x @ w)
    return y, (w, y)


halved.defvjp(_halved_forward, lambda saved, g: (0.5 * (g * (1 - saved[1] ** 2)) @ saved[0].T, None))


def test_a_custom_derivative_sees_what_its_author_wrote_it_for() -> None:
    """Unpacked at the boundary: the value under `grad` is the value without it, and the rule is the author's."""
    x, w = values(4, D), stored(D, D)
    lowered = lower(halved, x, w)
    np.testing.assert_array_equal(lowered(x, w), halved(x, w.decode()))
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(lowered(x, w)))(x)
    np.testing.assert_array_equal(value, jnp.sum(lowered(x, w)))
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: jnp.sum(halved(x, w.decode())))(x))
    (found,) = decodes(halved, x, w)
    assert found.operation.startswith("custom_vjp")


def quantized(function: Callable[..., Any], x: jax.Array, w: jax.Array, **options: Any) -> compax.Program:
    """The program of `function(x, w)` after quantization of `w`."""
    program = compax.capture(lambda params, x: function(x, params["w"]), {"w": w}, x)
    return Quantize(**options).run(program, Context()).program


OPTIONS: dict[str, dict[str, Any]] = {"weights": {}, "activations too": {"activations": "int8"}}


def residuals(function: Callable[..., Any], x: jax.Array) -> list[jax.Array]:
    """What the forward pass keeps for the backward pass."""
    return [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if isinstance(leaf, jax.Array)]


def policies() -> dict[str, Any]:
    names = jax.checkpoint_policies
    return {
        "dots": names.dots_saveable,
        "dots without batch": names.dots_with_no_batch_dims_saveable,
        "nothing": names.nothing_saveable,
        "everything": names.everything_saveable,
        "by name": names.save_only_these_names("other"),
        "none": None,
    }


@pytest.mark.parametrize("name", policies())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_rematerialization_keeps_the_dots_that_the_model_keeps(name: str, options: dict[str, Any]) -> None:
    """Never an int32 accumulator, and each dot once."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w)), policy=policies()[name])(x, w))

    x, dense = values(8, D), values(D, 2 * D)
    program = quantized(function, x, dense, **options)
    saved = residuals(lambda x: program.apply(program.params, program.state, x)[0], x)
    expected = residuals(lambda x: function(x, dense), x)
    assert not any(leaf.dtype == jnp.int32 for leaf in saved)
    if name != "everything":
        outputs = [[leaf.shape for leaf in leaves].count((8, 2 * D)) for leaves in (saved, expected)]
        assert outputs[0] == outputs[1]


def through_scan(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


def temporaries(function: Callable[..., Any], *operands: Any) -> int:
    compiled = jax.jit(jax.grad(function)).lower(*operands).compile()
    return compiled.memory_analysis().temp_size_in_bytes


LAYERS, WIDTH = 8, 256
STACK_BYTES = LAYERS * WIDTH * WIDTH * 4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_gradient_through_a_scan_keeps_no_dense_stack(options: dict[str, Any]) -> None:
    x = values(4, WIDTH)
    program = quantized(through_scan, x, values(LAYERS, WIDTH, WIDTH), **options)
    w = program.params["w"]
    ours = temporaries(lambda x, params: program.apply(params, {}, x)[0], x, program.params)
    naive = temporaries(lambda x, w: through_scan_decoding_each_layer(x, w.values, w.scale), x, w)
    assert naive > STACK_BYTES  # what this test looks for can be seen
    assert ours < STACK_BYTES / 2


def through_scan_decoding_each_layer(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    def layer(x: jax.Array, parts: Any) -> Any:
        return jnp.tanh(x @ (parts[0].astype(jnp.float32) * parts[1])), None

    return jnp.sum(jax.lax.scan(layer, x, (values, scale))[0])


def test_the_gradient_of_a_simulated_stack_keeps_no_second_copy() -> None:
    """The master is there already; its rounded copy is made again, layer by layer."""
    x, master = values(4, WIDTH), values(LAYERS, WIDTH, WIDTH)
    program = quantized(through_scan, x, master, train=True)
    dense = temporaries(lambda w, x: through_scan(x, w), master, x)
    ours = temporaries(lambda params, x: program.apply(params, {}, x)[0], program.params, x)
    assert ours < dense + STACK_BYTES / 2


def test_stored_weights_have_no_gradient_to_compute() -> None:
    """The derivative of integers is float0: only activations get one."""
    x, w = values(4, D), stored(D, D)
    lowered = lower(jnp.matmul, x, w)
    gradient = jax.grad(lambda w: jnp.sum(lowered(x, w)), allow_int=True)(w)
    assert gradient.values.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(gradient.scale, np.zeros_like(w.scale))


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape", "reduced"),
    [
        ("bd,df->bf", (4, 6), (6, 5), (0,)),
        ("df,bd->bf", (4, 6), (6, 5), (0,)),
        ("bd,fd->bf", (4, 6), (5, 6), (1,)),
        ("btd,dhk->bthk", (2, 3, 6), (6, 2, 5), (0,)),
        ("bthk,hkd->btd", (2, 3, 4, 5), (4, 5, 6), (0, 1)),
        ("bd,bdf->bf", (3, 6), (3, 6, 5), (1,)),
        ("ebd,edf->ebf", (2, 4, 6), (2, 6, 5), (1,)),
        ("becd,edf->becf", (2, 3, 4, 6), (3, 6, 5), (1,)),
        ("bd,df->bf", (4, 6), (6, 5), (1,)),
        ("bkh,hdk->bd", (4, 5, 3), (3, 6, 5), (0, 2)),
        ("bd,df->bf", (4, 6), (6, 5), (0, 1)),
        ("ebd,edf->ebf", (2, 4, 6), (2, 6, 5), (0, 1)),
    ],
)
def test_products_of_any_layout(
    equation: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], reduced: tuple[int, ...]
) -> None:
    """Batch dimensions, several contracted ones, the weight on the left, scales along contracted dimensions."""
    x, w = values(*x_shape), quantize_array(values(*w_shape, seed=1), reduced)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(equation, w, x) if equation.startswith("df") else jnp.einsum(equation, x, w)

    lowered = lower(function, x, w)
    dense = w.decode()
    assert decodes(function, x, w) == []
    np.testing.assert_allclose(lowered(x, w), function(x, dense), rtol=2e-5, atol=1e-5)
    weights = values(*lowered(x, w).shape, seed=2)
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.vdot(lowered(x, w), weights))(x),
        jax.grad(lambda x: jnp.vdot(function(x, dense), weights))(x),
        rtol=2e-5,
        atol=1e-5,
    )


def test_second_derivatives() -> None:
    """A rule with its own derivative must not close the door on others: reverse over reverse."""
    x, w = values(4, D), stored(D, D)
    lowered = lower(lambda x, w: jnp.sum(jnp.tanh(x @ w)), x, w)
    dense = w.decode()

    def second(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.grad(lambda x: jnp.vdot(jax.grad(function)(x), x))(x)

    ours = second(lambda x: lowered(x, w))
    theirs = second(lambda x: jnp.sum(jnp.tanh(x @ dense)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_vmap_and_jit_of_a_lowered_function() -> None:
    x, w = values(3, 4, D), stored(3, D, D)
    lowered = lower(jnp.matmul, values(4, D), stored(D, D))
    expected = jnp.matmul(x, w.decode())
    np.testing.assert_allclose(jax.vmap(lowered)(x, w), expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(lowered))(x, w), expected, rtol=2e-5, atol=1e-5)


def test_shard_map_around_a_lowered_function() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w = values(8, D), stored(D, D)
    lowered = lower(jnp.matmul, values(1, D), w)
    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x, w: lowered(x, w), mesh=mesh, in_specs=(spec, w.spec(PartitionSpec())), out_specs=spec
    )
    np.testing.assert_allclose(mapped(x, w), x @ w.decode(), rtol=2e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x, w))))(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.sum(jnp.sin(x @ w.decode())))(x), rtol=1e-4, atol=1e-5)
