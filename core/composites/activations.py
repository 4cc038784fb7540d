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

GRID = np.linspace(-10.0, 10.0, 401, dtype=np.float32)
"""Where functions are evaluated."""

_FORMATS = (np.float64, jnp.bfloat16, np.float16)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * x) + 1.0)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0.0)


def _gelu_tanh(x: np.ndarray, r: Round) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(r(math.sqrt(2.0 / math.pi)) * (x + r(0.044715) * x**3)))


def _selu(x: np.ndarray, r: Round) -> np.ndarray:
    scale, alpha = r(1.0507009873554805), r(1.6732632423543772)
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _hard_sigmoid(x: np.ndarray, r: Round) -> np.ndarray:
    return np.clip(x + 3.0, 0.0, 6.0) * r(1.0 / 6.0)


ACTIVATIONS: dict[str, Callable[[np.ndarray, Round], np.ndarray]] = {
    "identity": lambda x, r: x,
    "relu": lambda x, r: np.maximum(x, 0.0),
    "relu2": lambda x, r: np.square(np.maximum(x, 0.0)),
    "relu6": lambda x, r: np.clip(x, 0.0, 6.0),
    "gelu": lambda x, r: 0.5 * x * (1.0 + _erf(x * r(math.sqrt(0.5)))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x, r: x * _sigmoid(r(1.702) * x),
    "silu": lambda x, r: x * _sigmoid(x),
    "tanh": lambda x, r: np.tanh(x),
    "sigmoid": lambda x, r: _sigmoid(x),
    "log_sigmoid": lambda x, r: -_softplus(-x),
    "softplus": lambda x, r: _softplus(x),
    "softsign": lambda x, r: x / (1.0 + np.abs(x)),
    "squareplus": lambda x, r: 0.5 * (x + np.sqrt(np.square(x) + 4.0)),
    "selu": _selu,
    "mish": lambda x, r: x * np.tanh(_softplus(x)),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x, r: x * _hard_sigmoid(x, r),
    "hard_tanh": lambda x, r: np.clip(x, -1.0, 1.0),
    "square": lambda x, r: np.square(x),
    "exp": lambda x, r: np.exp(x),
    "sin": lambda x, r: np.sin(x),
}
"""Activations of one number without a parameter, with how its constants are rounded."""


def name_activation(function: Callable[[np.ndarray], np.ndarray]) -> str:
    """The name of a function of one number, by its values; "custom" if it is none that is known.

    A slope below zero ("leaky_relu") and what an exponential is multiplied with ("elu", "celu") may be anything; with a
    factor of one the last two are the same, and called "elu".

    Args:
        function: takes float32[n] and returns the same; it is called once, on a grid from -10 to 10.
    """
    with np.errstate(all="ignore"):
        values = np.asarray(function(GRID), np.float64)
    if values.shape != GRID.shape or not np.isfinite(values).all():
        return "custom"
    close = np.abs(_table()[1] - values) <= 2e-5 + 2e-5 * np.abs(values)
    for row in np.flatnonzero(close.all(axis=1)):
        return _table()[0][row]
    return _with_parameter(values)


@functools.cache
def _table() -> tuple[list[str], np.ndarray]:
    """Names of functions, and their values on the grid, in all formats of their constants."""
    x = GRID.astype(np.float64)
    names: list[str] = []
    rows: list[np.ndarray] = []
    for dtype in _FORMATS:
        for name, known in ACTIVATIONS.items():
            names.append(name)
            rows.append(known(x, lambda constant, dtype=dtype: float(np.asarray(constant).astype(dtype))))
    return names, np.stack(rows)


def _with_parameter(values: np.ndarray) -> str:
    """The same for functions with a parameter, which is read off the lowest value."""
    grid, last = GRID.astype(np.float64), values[0]
    below, lowest = grid < 0, float(grid[0])
    if not np.allclose(values[~below], grid[~below], rtol=2e-5, atol=2e-5):
        return "custom"
    x = grid[below]
    slope = last / lowest
    alpha, celu_alpha = last / math.expm1(lowest), _celu_alpha(last)
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
    if not -high * math.expm1(float(GRID[0]) / high) > -last > low:
        return 0.0
    for _ in range(60):
        alpha = 0.5 * (low + high)
        low, high = (alpha, high) if alpha * math.expm1(float(GRID[0]) / alpha) > last else (low, alpha)
    return 0.5 * (low + high)
