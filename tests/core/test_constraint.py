"""`constrain`: shardings of values and of their gradients, under every transformation, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compax.constraint import constrain

ABSTRACT = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
X = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def loss(w: jax.Array, x: jax.Array, *, laid: bool = True) -> jax.Array:
    def turn(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        if laid:
            w = constrain(w, ABSTRACT, P(None, "tensor"), P("data", "tensor"))
        y = jnp.tanh(x @ w)
        return (constrain(y, ABSTRACT, P("data")) if laid else y), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(turn), x, w)[0] ** 2)


def plain(w: jax.Array, x: jax.Array) -> jax.Array:
    return loss(w, x, laid=False)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_values_and_gradients(placed: bool, jitted: bool) -> None:
    w, x = jnp.asarray(W), jnp.asarray(X)
    expected = jax.grad(plain)(w, x)
    if placed:
        w = jax.device_put(w, NamedSharding(mesh(), P(None, "data", "tensor")))
        x = jax.device_put(x, NamedSharding(mesh(), P("data")))
    found = (jax.jit(jax.grad(loss)) if jitted else jax.grad(loss))(w, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if placed:
        assert found.sharding.spec == P(None, "data", "tensor")


def test_forward_mode_vmap_and_second_derivatives() -> None:
    w, x = jnp.asarray(W), jnp.asarray(X)
    for ours, theirs in zip(
        jax.jvp(lambda w: loss(w, x), (w,), (w,)), jax.jvp(lambda w: plain(w, x), (w,), (w,)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    several = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(loss, (None, 0)))(w, several), jax.vmap(plain, (None, 0))(w, several), rtol=1e-5
    )
    second = jax.hessian(lambda scale: loss(w * scale, x))(1.0)
    np.testing.assert_allclose(second, jax.hessian(lambda scale: plain(w * scale, x))(1.0), rtol=1e-3)
