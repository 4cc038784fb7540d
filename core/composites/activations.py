"""Activation functions, named by evaluating them.

A constant of a function is rounded where a model is written in half precision, which moves values further than gelu is
from its approximation: each function is known with its constants in every format.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

Round = Callable[[float], float]

_GRID = np.linspace(-10.0, 10.0, 401)
_FORMATS = (np.float64, jnp.bfloat16, np.float16)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * x) + 1.0)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0.0)


Round = Callable[[float], float]
"""How a model that computes in a narrow dtype holds a constant."""
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS: dict[str, Callable[[np.ndarray, Round], np.ndarray]] = {
    "identity": lambda x, c: x,
    "relu": lambda x, c: np.maximum(x, 0.0),
    "relu2": lambda x, c: np.square(np.maximum(x, 0.0)),
    "relu6": lambda x, c: np.clip(x, 0.0, 6.0),
    "gelu": lambda x, c: 0.5 * x * (1.0 + _erf(x * c(math.sqrt(0.5)))),
    "gelu_tanh": lambda x, c: 0.5 * x * (1.0 + np.tanh(c(math.sqrt(2.0 / math.pi)) * (x + c(0.044715) * x**3))),
    "quick_gelu": lambda x, c: x * _sigmoid(c(1.702) * x),
    "silu": lambda x, c: x * _sigmoid(x),
    "tanh": lambda x, c: np.tanh(x),
    "sigmoid": lambda x, c: _sigmoid(x),
    "softplus": lambda x, c: _softplus(x),
    "softsign": lambda x, c: x / (1.0 + np.abs(x)),
    "elu": lambda x, c: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "selu": lambda x, c: c(_SELU_SCALE) * np.where(x > 0, x, c(_SELU_ALPHA) * np.expm1(np.minimum(x, 0.0))),
    "leaky_relu": lambda x, c: np.where(x > 0, x, c(0.01) * x),
    "mish": lambda x, c: x * np.tanh(_softplus(x)),
    "hard_sigmoid": lambda x, c: np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hard_swish": lambda x, c: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "hard_tanh": lambda x, c: np.clip(x, -1.0, 1.0),
    "square": lambda x, c: np.square(x),
    "exp": lambda x, c: np.exp(x),
}
"""Activations of one number that have a name, and how they hold their constants."""

_ROUNDINGS: tuple[Round, ...] = (
    float,
    lambda number: float(jnp.asarray(number, jnp.bfloat16)),
    lambda number: float(np.float16(number)),
)


@functools.cache
def _known(name: str, rounding: int) -> np.ndarray:
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        return ACTIVATIONS[name](_GRID.astype(np.float64), _ROUNDINGS[rounding])


def name_activation(function: Callable[[np.ndarray], np.ndarray]) -> str:
    """The name of a function of one number, by its values; "custom" if it is none that is known.

    A slope below zero ("leaky_relu") and what an exponential is multiplied with ("elu", "celu") may be anything; with a
    factor of one the last two are the same, and called "elu".

    Args:
        function: takes float32[n] and returns the same; it is called once, on a grid from -10 to 10.
    """
    with np.errstate(all="ignore"):
        values = np.asarray(function(_GRID.astype(np.float32)), np.float64)
    if values.shape != _GRID.shape or not np.isfinite(values).all():
        return "custom"
    close = np.abs(_table()[1] - values) <= 2e-5 + 2e-5 * np.abs(values)
    for row in np.flatnonzero(close.all(axis=1)):
        return _table()[0][row]
    return _with_parameter(values)


@functools.cache
def _table() -> tuple[list[str], np.ndarray]:
    """Names of functions, and their values on the grid, in all formats of their constants."""
    names: list[str] = []
    rows: list[np.ndarray] = []
    for dtype in _FORMATS:
        for name, known in ACTIVATIONS.items():
            names.append(name)
            rows.append(known(_GRID, lambda constant, dtype=dtype: float(np.asarray(constant).astype(dtype))))
    return names, np.stack(rows)


def _with_parameter(values: np.ndarray) -> str:
    """The same for functions with a parameter, which is read off the lowest value."""
    below, last = _GRID < 0, values[0]
    if not np.allclose(values[~below], _GRID[~below], rtol=2e-5, atol=2e-5):
        return "custom"
    x = _GRID[below]
    slope = last / _GRID[0]
    alpha, celu_alpha = last / math.expm1(_GRID[0]), _celu_alpha(last)
    for name, known in (
        ("leaky_relu", slope * x if 0 < slope < 1 else None),
        ("elu", alpha * np.expm1(x) if alpha > 0 else None),
        ("celu", celu_alpha * np.expm1(x / celu_alpha) if celu_alpha > 0 else None),
    ):
        if known is not None and np.allclose(values[below], known, rtol=1e-4, atol=2e-5):
            return name
    return "custom"


def _celu_alpha(last: float) -> float:
    """The factor with which celu has a value at the lower end of the grid; zero if there is none."""
    low, high = 1e-3, 1e3
    if not -high * math.expm1(_GRID[0] / high) > -last > low:
        return 0.0
    for _ in range(60):
        alpha = 0.5 * (low + high)
        low, high = (alpha, high) if alpha * math.expm1(_GRID[0] / alpha) > last else (low, alpha)
    return 0.5 * (low + high)
