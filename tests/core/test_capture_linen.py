"""Capture of Linen modules with their variables, and of plain functions."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax.errors import CaptureError
from compax.program import capture

D = 8
KEY = jax.random.key(7)


def rows(count: int = 4, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def assert_same(left: Any, right: Any) -> None:
    """Equal structures, dtypes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# -- Linen ------------------------------------------------------------------------------------------------------------


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(D, name="dense")(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dropout(0.5, deterministic=not train)(x)

    def double(self, x: jax.Array) -> jax.Array:
        return 2 * self(x)


@pytest.fixture(scope="module")
def linen_variables() -> dict[str, Any]:
    variables = LinenNetwork().init(jax.random.key(0), rows())
    return {"params": variables["params"], "batch_stats": variables["batch_stats"]}


def test_linen_variables_are_parameters_and_state(linen_variables: dict[str, Any]) -> None:
    program = capture(LinenNetwork(), rows(), variables=linen_variables)
    assert set(program.params) == {"dense.kernel", "dense.bias", "norm.scale", "norm.bias"}
    assert set(program.state) == {"batch_stats.norm.mean", "batch_stats.norm.var"}
    expected = jax.jit(LinenNetwork().apply)(linen_variables, rows())
    assert_same(program(rows()), expected)


def test_linen_random_numbers_and_mutable_collections(linen_variables: dict[str, Any]) -> None:
    options: dict[str, Any] = {"train": True, "rngs": {"dropout": KEY}}
    program = capture(LinenNetwork(), rows(), variables=linen_variables, mutable=["batch_stats"], **options)
    output, state, aux = jax.jit(functools.partial(program.apply, train=True))(
        program.params, program.state, rows(), rngs={"dropout": KEY}
    )
    apply = functools.partial(LinenNetwork().apply, train=True, mutable=["batch_stats"])
    expected, changed = jax.jit(apply)(linen_variables, rows(), rngs={"dropout": KEY})
    assert_same(output, expected)
    assert_same(state["batch_stats.norm.mean"], changed["batch_stats"]["norm"]["mean"])
    assert aux == {}
    other = program(rows(), train=True, rngs={"dropout": jax.random.key(8)})
    assert not np.array_equal(other, output), "keys are inputs, not constants"


def test_linen_sown_values_are_aux(linen_variables: dict[str, Any]) -> None:
    program = capture(LinenNetwork(), rows(), variables=linen_variables, mutable=["intermediates"])
    output, _, aux = program.apply(program.params, program.state, rows())
    assert set(aux) == {"intermediates.hidden"}
    assert_same(aux["intermediates.hidden"], (output,))


def test_linen_methods_by_name_and_as_functions(linen_variables: dict[str, Any]) -> None:
    for method in ("double", LinenNetwork.double):
        program = capture(LinenNetwork(), rows(), variables=linen_variables, method=method)
        np.testing.assert_allclose(program(rows()), 2 * LinenNetwork().apply(linen_variables, rows()), rtol=1e-6)


def test_linen_loss(linen_variables: dict[str, Any]) -> None:
    def loss(module: LinenNetwork, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((module(x) - y) ** 2)

    program = capture(LinenNetwork(), rows(), rows(seed=1), variables=linen_variables, loss=loss)
    expected = jnp.mean((LinenNetwork().apply(linen_variables, rows()) - rows(seed=1)) ** 2)
    np.testing.assert_allclose(program(rows(), rows(seed=1)), expected, rtol=1e-6)


def test_linen_partitioned_parameters_are_unboxed() -> None:
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(D, kernel_init=init)(x)

    variables = Partitioned().init(jax.random.key(0), rows())
    program = capture(Partitioned(), rows(), variables=variables)
    np.testing.assert_allclose(program(rows()), Partitioned().apply(variables, rows()), rtol=1e-6)


def test_linen_needs_its_variables() -> None:
    with pytest.raises(CaptureError, match="a Linen module comes with its variables"):
        capture(LinenNetwork(), rows())
    with pytest.raises(CaptureError, match="a Linen module comes with its variables"):
        capture(LinenNetwork(), rows(), variables={"batch_stats": {}})


def test_abstract_linen_variables() -> None:
    variables = jax.eval_shape(LinenNetwork().init, jax.random.key(0), rows())
    program = capture(LinenNetwork(), rows(), variables=variables)
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in program.params.values())


# -- plain functions --------------------------------------------------------------------------------------------------


def test_a_function_of_nested_parameters() -> None:
    def network(params: dict[str, Any], x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x * scale * params["gain"]

    layer = {"w": jnp.eye(D), "b": jnp.ones(D)}
    params = {"layers": [layer, layer], "gain": jnp.asarray(3.0)}
    program = capture(network, params, rows())
    assert set(program.params) == {"gain", "layers.0.b", "layers.0.w", "layers.1.b", "layers.1.w"}
    assert_same(program(rows()), jax.jit(network)(params, rows()))


def test_a_function_of_one_array() -> None:
    program = capture(lambda w, x: x @ w, jnp.eye(D), rows())
    assert set(program.params) == {"params"}
    assert_same(program(rows()), rows() @ jnp.eye(D))


def test_parameters_that_are_no_jax_arrays_become_some() -> None:
    params = {"w": np.ones(D, np.float32), "index": np.arange(D), "scale": 2.0}
    program = capture(lambda params, x: x[:, params["index"]] * params["w"] * params["scale"], params, rows())
    assert all(isinstance(p, jax.Array) for p in program.params.values())
    assert {path: str(p.dtype) for path, p in program.params.items()} == {
        "index": "int32",
        "scale": "float32",
        "w": "float32",
    }
    program.check()
    assert set(program.partition()[0]) == {"w", "scale"}
    np.testing.assert_allclose(program(rows()), 2 * rows(), rtol=1e-6)
    half = rows().astype(jnp.bfloat16)
    scaled = capture(lambda params, x: x * params["scale"], {"scale": 2.0}, half)
    assert scaled(half).dtype == jnp.bfloat16, "a Python number stays weak"


def test_a_captured_gradient() -> None:
    def gradient(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.tanh(x @ w).sum())(w)

    program = capture(gradient, jnp.eye(D), rows())
    assert_same(program(rows()), jax.jit(gradient)(jnp.eye(D), rows()))


def test_a_function_without_parameters_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"captured as fn\(params, \*inputs\)"):
        capture(lambda params: params)


def test_a_large_closed_over_array_becomes_a_parameter() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(256, D)), jnp.float32)
    small = jnp.arange(D, dtype=jnp.float32)
    program = capture(lambda w, tokens: table[tokens] * w + small, jnp.ones(D), jnp.arange(4))
    assert set(program.params) == {"params", "constants.0"}
    assert program.params["constants.0"].shape == table.shape
    assert_same(program(jnp.arange(4)), table[:4] + small)
    text = jax.jit(program.apply).lower(program.params, program.state, jnp.arange(4)).as_text()
    assert len(text) < 20_000, "the table is an argument, not text"
