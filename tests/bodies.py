"""What each of the benchmark's bodies has to compute, written down by hand.

A reference takes an `Arithmetic`, the parameters by path, and the body's inputs, and states the body's mathematics with
every product of a weight going through that arithmetic. Four arithmetics turn one statement into four expectations:

1. `FLOAT`: the module itself; shows that the statement is right.
2. `WEIGHTS_INT8`: weights decoded from int8, activations untouched.
3. `INT8`: weights and activations int8, products accumulated in int32, then rescaled.
4. `STRAIGHT`: what training sees: both rounded to the int8 grid in float, gradients straight through the rounding
   (Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation, 2013,
   arXiv:1308.3432).

The grid is symmetric, `scale = max |values| / 127`, codes in [-127, 127], rounded half to even. A weight has one scale
for each output channel: the maximum runs over the contracted dimensions, so that layers or experts stacked in front
keep their own. An activation has one scale for each row that is left after the contraction (a token); for a
convolution, where windows overlap, one for each example.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.experiments.benchmarks import bodies
from compax.experiments.benchmarks.bodies import NUM_HEADS, Body, D

LIMIT = 127
Dims = tuple[int, ...]
Coded = tuple[Any, Any]
"""Codes and scale, with `codes * scale` close to the values."""


def exact(values: Any, dims: Dims) -> Coded:
    """Values that are not quantized."""
    return values, np.float32(1)


def integer(values: Any, dims: Dims) -> Coded:
    """Codes as int32, so that products of them add up without overflow; computed by NumPy."""
    values = np.asarray(values, np.float32)
    scale = np.abs(values).max(axis=dims, keepdims=True) / np.float32(LIMIT)
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return np.clip(np.round(values / scale), -LIMIT, LIMIT).astype(np.int32), scale


def straight(values: Any, dims: Dims) -> Coded:
    """Values on the int8 grid, whose gradient is that of the values."""
    return _straight(dims, jnp.asarray(values)), np.float32(1)


def _straight(dims: Dims, values: jax.Array) -> jax.Array:
    @jax.custom_vjp
    def rounded(values: jax.Array) -> jax.Array:
        scale = jnp.max(jnp.abs(values), axis=dims, keepdims=True) / LIMIT
        scale = jnp.where(scale == 0, 1, scale)
        return jnp.clip(jnp.round(values / scale), -LIMIT, LIMIT) * scale

    rounded.defvjp(lambda values: (rounded(values), None), lambda _, gradient: (gradient,))
    return rounded(values)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How weights and activations enter a product.

    Attributes:
        name: For test names.
        weight: Codes and scale of a weight, with the maximum over the given dimensions.
        activation: The same for an activation.
    """

    name: str
    weight: Callable[[Any, Dims], Coded]
    activation: Callable[[Any, Dims], Coded]

    def decode(self, w: Any, dims: Dims) -> jax.Array:
        """The weight as a product that knows nothing of codes sees it."""
        codes, scale = self.weight(w, dims)
        return jnp.asarray(codes * scale)

    def matmul(self, x: Any, w: Any) -> jax.Array:
        """`x[..., K] @ w[K, N]`."""
        rows, row_scale = self.activation(x, (-1,))
        columns, column_scale = self.weight(w, (0,))
        return jnp.asarray(rows @ columns * row_scale * column_scale, jnp.float32)

    def convolve(self, x: Any, w: Any) -> jax.Array:
        """Same-padded convolution of `x[B, H, W, K]` with `w[h, w, K, N]`, as a sum of shifted products."""
        image, image_scale = self.activation(x, (1, 2, 3))
        kernel, kernel_scale = self.weight(w, (0, 1, 2))
        height, width = kernel.shape[:2]
        pad = ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0))
        image = (np if isinstance(image, np.ndarray) else jnp).pad(image, pad)
        rows, columns = x.shape[1:3]
        total = sum(image[:, i : i + rows, j : j + columns] @ kernel[i, j] for i in range(height) for j in range(width))
        return jnp.asarray(total * image_scale * kernel_scale.reshape(-1), jnp.float32)


FLOAT = Arithmetic("float", exact, exact)
WEIGHTS_INT8 = Arithmetic("weights", integer, exact)
INT8 = Arithmetic("int8", integer, integer)
STRAIGHT = Arithmetic("straight", straight, straight)

Parameters = Mapping[str, jax.Array]
Reference = Callable[..., jax.Array]


def _linear(a: Arithmetic, p: Parameters, x: Any, name: str = "linear", kernel: str | None = None) -> jax.Array:
    return a.matmul(x, p[kernel or f"{name}.kernel"]) + p[f"{name}.bias"]


def _product(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return a.matmul(x, p["w"])


def _transposed(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return a.matmul(x, p["w"].T)


def _tanh_product(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return jnp.tanh(a.matmul(x, p["w"]))


def _einsum(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return a.matmul(a.matmul(x, p["w1"]), p["w2"])


def _tanh_linear(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return jnp.tanh(_linear(a, p, x))


def _stacked_modules(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    for kernel, bias in zip(p["layers.kernel"], p["layers.bias"], strict=True):
        x = jnp.tanh(a.matmul(x, kernel) + bias)
    return x


def _stacked_weights(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    for w in p["w"].reshape(-1, D, D):
        x = jnp.tanh(a.matmul(x, w))
    return x


def _repeated(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    for _ in range(bodies.L):
        x = jnp.tanh(a.matmul(x, p["w"]))
    return x


def _ragged(a: Arithmetic, p: Parameters, x: Any, group_sizes: Any) -> jax.Array:
    ends = np.cumsum(np.asarray(group_sizes))
    starts = ends - np.asarray(group_sizes)
    parts = [a.matmul(x[i:j], w) for i, j, w in zip(starts, ends, p["w"], strict=True) if j > i]
    return jnp.concatenate(parts)


def _conditional(a: Arithmetic, p: Parameters, x: Any, flag: Any) -> jax.Array:
    return _linear(a, p, x, "first" if flag else "second")


def _tied(a: Arithmetic, p: Parameters, tokens: Any) -> jax.Array:
    table = p["embed.embedding"]
    return a.matmul(jnp.tanh(a.decode(table, (1,))[tokens]), table.T)


def _attention(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    batch, length, _ = x.shape

    def heads(name: str) -> jax.Array:
        kernel, bias = p[f"attention.{name}.kernel"], p[f"attention.{name}.bias"]
        projected = a.matmul(x, kernel.reshape(D, D)) + bias.reshape(D)
        return projected.reshape(batch, length, NUM_HEADS, D // NUM_HEADS).swapaxes(1, 2)

    query, key, value = heads("query"), heads("key"), heads("value")
    scores = query / np.sqrt(D // NUM_HEADS).astype(np.float32) @ key.swapaxes(2, 3)
    mixed = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(batch, length, D)
    return a.matmul(mixed, p["attention.out.kernel"].reshape(D, D)) + p["attention.out.bias"]


def _convolution(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return a.convolve(x, p["conv.kernel"]) + p["conv.bias"]


def _adapter(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    low = a.matmul(a.matmul(x, p["linear.lora.lora_a"]), p["linear.lora.lora_b"])
    return a.matmul(x, p["linear.kernel"]) + low


def _custom_derivative(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return bodies.damped(x, a.decode(p["w"], (0,)))


def _twice(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return a.matmul(_tanh_product(a, p, x), p["w"])


def _shared(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    return _linear(a, p, jnp.tanh(_linear(a, p, x, "first")), "second", kernel="first.kernel")


def _blocks(a: Arithmetic, p: Parameters, x: Any) -> jax.Array:
    for layer in range(bodies.L):
        x = jnp.tanh(_linear(a, p, x, f"blocks.{layer}.linear"))
    return x


REFERENCES: dict[str, Reference] = {
    "nnx.Linear": _linear,
    "x @ w": _product,
    "jnp.dot": _product,
    "jnp.tensordot": _product,
    "x @ w.T": _transposed,
    "bfloat16 cast": _product,
    "3-operand einsum": _einsum,
    "nnx.remat": _tanh_linear,
    "nnx.scan": _stacked_modules,
    "lax.scan": _stacked_weights,
    "vmap of a matvec": _transposed,
    "shard_map": _tanh_product,
    "lax.ragged_dot": _ragged,
    "inner nnx.jit": _linear,
    "nnx.cond": _conditional,
    "imported dot_general": _product,
    "tied nnx.Embed": _tied,
    "nnx.MultiHeadAttention": _attention,
    "nnx.Conv": _convolution,
    "nnx.LoRALinear": _adapter,
    "while_loop": _repeated,
    "fori_loop with w[i]": _stacked_weights,
    "custom_vjp": _custom_derivative,
    "nested scans": _stacked_weights,
    "sharded contraction": _product,
    "weight used twice": _twice,
    "shared weight": _shared,
    "one jitted block class": _blocks,
}

FLOAT_ACTIVATIONS: dict[str, str] = {
    "custom_vjp": "its derivative rule is its author's: the weight is decoded at the boundary",
}
"""Bodies in which quantization of activations must be declined, with the reason."""

NO_GRADIENT: dict[str, str] = {
    "while_loop": "reverse-mode differentiation of lax.while_loop is not defined in JAX",
}

TOLERANCES: dict[str, float] = {"bfloat16 cast": 4e-3}
"""Relative to the norm. Half a unit in the last place of bfloat16 is 0.002, of the weight and again of its gradient."""
TOLERANCE = 2e-5
"""Relative to the norm, float32: products of 64 terms, a few layers deep. Rounding to int8 is off by about 9e-3."""


def tolerance(body: Body) -> float:
    """How far a result may be from its reference, relative to the reference's norm."""
    return TOLERANCES.get(body.name, TOLERANCE)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """A module's parameters by path."""
    return {
        ".".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


@functools.cache
def reference(body: Body, arithmetic: Arithmetic) -> jax.Array:
    """What the body returns on its inputs under an arithmetic."""
    return REFERENCES[body.name](arithmetic, parameters(body.make()), *body.inputs())


def direction(output: jax.Array) -> jax.Array:
    """A fixed random direction in the space of outputs: gradients are taken of the product with it."""
    return jnp.asarray(np.random.default_rng(11).normal(size=output.shape), output.dtype)


def reference_gradients(body: Body, arithmetic: Arithmetic) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Gradients for every parameter, and for the first input where it is float."""
    inputs = body.inputs()
    function = REFERENCES[body.name]

    def objective(parameters: Parameters, x: Any) -> jax.Array:
        output = function(arithmetic, parameters, x, *inputs[1:])
        return jnp.vdot(output, direction(output))

    weights = parameters(body.make())
    if jnp.issubdtype(inputs[0].dtype, jnp.floating):
        return jax.grad(objective, argnums=(0, 1))(weights, inputs[0])
    return jax.grad(objective)(weights, inputs[0]), None


def relative_error(actual: Any, expected: Any, *, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what was expected, or over `floor` where that is larger."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    difference = float(np.linalg.norm(actual - expected))
    return difference / max(float(np.linalg.norm(expected)), floor) if difference else 0.0


def gradient_errors(actual: Parameters, expected: Parameters) -> dict[str, float]:
    """Relative error of each gradient.

    One that vanishes (softmax does not see the bias of keys) is held against all of them together.
    """
    assert set(actual) == set(expected), f"{sorted(actual)} is not {sorted(expected)}"
    total = float(np.sqrt(sum(np.linalg.norm(gradient) ** 2 for gradient in expected.values())))
    return {path: relative_error(actual[path], expected[path], floor=1e-2 * total) for path in expected}
