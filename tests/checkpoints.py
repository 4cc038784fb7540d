"""What tests of checkpoints save: a small network with state; and how to compare programs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.program import Program

D = 16
QUANTIZE = "quantize(at=blocks.**)"


def rows(count: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, D)), jnp.float32)


def bits(x: Any) -> bytes:
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(data).tobytes()


def assert_same(actual: Program, expected: Program) -> None:
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(dict(actual.params)) == jax.tree.structure(dict(expected.params))
    assert actual.state.keys() == expected.state.keys()
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(left, jax.Array)
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert bits(left) == bits(right)
    assert actual.frozen == expected.frozen
    assert [record.pass_ for record in actual.history] == [record.pass_ for record in expected.history]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 32):
        self.up = nnx.Linear(D, width, rngs=rngs)
        self.down = nnx.Linear(width, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Network(nnx.Module):
    def __init__(self, seed: int = 0, depth: int = 2, width: int = 32, dtype: Any = jnp.float32):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([Block(rngs, width) for _ in range(depth)])
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(D, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x)) * self.scale
