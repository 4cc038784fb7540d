"""Names of functions by their values, in the words of `jax.nn` and in those of others."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax.composites.activations import ACTIVATIONS, GRID, name_activation

Function = Callable[[jax.Array], jax.Array]


def named(function: Function) -> str:
    return name_activation(lambda x: np.asarray(function(jnp.asarray(x))))


def erfc_gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * jax.scipy.special.erfc(-x * np.float32(np.sqrt(0.5)))


def tanh_gelu(x: jax.Array) -> jax.Array:
    return x * 0.5 * (1.0 + jnp.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def half_gelu(x: jax.Array) -> jax.Array:
    """As it is written in bfloat16, computed in float32."""
    return 0.5 * x * (1.0 + jnp.tanh(0.796875 * (x + 0.044677734375 * x**3)))


KNOWN: list[tuple[str, Function]] = [
    ("identity", lambda x: x),
    ("relu", jax.nn.relu),
    ("relu", lambda x: jnp.where(x > 0, x, 0.0)),
    ("relu", lambda x: 0.5 * (x + jnp.abs(x))),
    ("relu2", lambda x: jnp.square(jax.nn.relu(x))),
    ("relu6", jax.nn.relu6),
    ("gelu", lambda x: jax.nn.gelu(x, approximate=False)),
    ("gelu", erfc_gelu),
    ("gelu_tanh", jax.nn.gelu),
    ("gelu_tanh", tanh_gelu),
    ("gelu_tanh", half_gelu),
    ("quick_gelu", lambda x: x * jax.nn.sigmoid(1.702 * x)),
    ("quick_gelu", lambda x: x * jax.nn.sigmoid(1.703125 * x)),
    ("silu", jax.nn.silu),
    ("silu", lambda x: x / (1 + jnp.exp(-x))),
    ("tanh", jnp.tanh),
    ("tanh", lambda x: 2 * jax.nn.sigmoid(2 * x) - 1),
    ("sigmoid", jax.nn.sigmoid),
    ("sigmoid", lambda x: 1 / (1 + jnp.exp(-x))),
    ("log_sigmoid", jax.nn.log_sigmoid),
    ("softplus", jax.nn.softplus),
    ("softplus", lambda x: jnp.log(1 + jnp.exp(x))),
    ("softsign", jax.nn.soft_sign),
    ("squareplus", jax.nn.squareplus),
    ("elu", jax.nn.elu),
    ("elu", lambda x: jax.nn.elu(x, 0.3)),
    ("elu", jax.nn.celu),
    ("celu", lambda x: jax.nn.celu(x, 0.5)),
    ("celu", lambda x: jax.nn.celu(x, 2.0)),
    ("selu", jax.nn.selu),
    ("leaky_relu", jax.nn.leaky_relu),
    ("leaky_relu", lambda x: jax.nn.leaky_relu(x, 0.2)),
    ("mish", jax.nn.mish),
    ("hard_sigmoid", jax.nn.hard_sigmoid),
    ("hard_swish", jax.nn.hard_swish),
    ("hard_tanh", jax.nn.hard_tanh),
    ("square", jnp.square),
    ("exp", jnp.exp),
    ("sin", jnp.sin),
]

CUSTOM: dict[str, Function] = {
    "another slope of the sigmoid": lambda x: x * jax.nn.sigmoid(1.6 * x),
    "twice": lambda x: 2 * x,
    "shifted": lambda x: jax.nn.relu(x) + 0.1,
    "shifted before": lambda x: jax.nn.gelu(x + 0.1),
    "half a gelu": lambda x: 0.5 * jax.nn.gelu(x),
    "cube of relu": lambda x: jax.nn.relu(x) ** 3,
    "soft cap": lambda x: 5 * jnp.tanh(x / 5),
    "sigmoid of Keras": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),
    "relu up to eight": lambda x: jnp.clip(x, 0, 8),
    "threshold": lambda x: jnp.where(x > 1, x, 0),
    "absolute value": jnp.abs,
    "slope above one": lambda x: jnp.where(x > 0, x, 1.5 * x),
    "mirrored": lambda x: jax.nn.silu(-x),
    "step": lambda x: (x > 0).astype(jnp.float32),
    "constant": jnp.zeros_like,
    "logarithm": jnp.log,
    "infinite": lambda x: 1 / x,
}


@pytest.mark.parametrize(("name", "function"), KNOWN)
def test_known(name: str, function: Function) -> None:
    assert named(function) == name


@pytest.mark.parametrize("name", CUSTOM)
def test_custom(name: str) -> None:
    assert named(CUSTOM[name]) == "custom"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_itself(name: str) -> None:
    assert name_activation(lambda x: ACTIVATIONS[name](x, float)) == name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_itself_with_rounded_constants(name: str, dtype: type) -> None:
    assert name_activation(lambda x: ACTIVATIONS[name](x, lambda c: float(np.asarray(c).astype(dtype)))) == name


def test_far_enough_apart() -> None:
    """What tells two functions apart is many times what is allowed for rounding."""
    values = np.stack([known(GRID.astype(np.float64), float) for known in ACTIVATIONS.values()])
    apart = np.abs(values[:, None] - values[None]).max(-1) + np.eye(len(values))
    assert apart.min() > 10 * 4e-5


def test_another_shape_is_custom() -> None:
    assert name_activation(lambda x: x[:1]) == "custom"
