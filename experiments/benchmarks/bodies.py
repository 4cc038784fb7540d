"""Twenty-eight ordinary ways to write a layer, which a compiler pass has to get right.

Each body is a small `flax.nnx.Module` as its author would write it, with no thought of being transformed. The first
seventeen are single layers; the others put a weight into loops, custom derivatives or shards, or use it more than once.
`tests/bodies.py` holds, by name, what each has to compute when its weights and activations are int8, and
`qwix_bodies.py` runs them through Qwix as well.

Shapes: B tokens, D features in and out, L layers, G groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.lax import dot_general
from jax.sharding import AxisType, PartitionSpec

B, D, L, G = 16, 64, 3, 4
NUM_HEADS = 4
VOCABULARY = 80


@dataclasses.dataclass(frozen=True)
class Body:
    """One way to write a layer.

    Attributes:
        name: Its name in tables and tests.
        make: Builds the module; equal weights at every call.
        inputs: Makes the arguments of the module's call; equal at every call.
        site_names: The sites that consume a weight, named after that weight: by the module that holds it when that
            module has no other weight, else by the parameter; `#2` marks a second use.
        notes: What is worth knowing about it.
    """

    name: str
    make: Callable[[], nnx.Module]
    inputs: Callable[[], tuple[Any, ...]]
    site_names: tuple[str, ...]
    notes: str = ""


def rows(*shape: int, seed: int = 7) -> jax.Array:
    """Normally distributed activations, one of them ten times as large: float32[shape]."""
    values = np.random.default_rng(seed).normal(size=shape or (B, D)).astype(np.float32)
    values.reshape(-1)[5] *= 10.0
    return jnp.asarray(values)


def weight(*shape: int, seed: int = 0) -> nnx.Param[jax.Array]:
    """A weight whose columns differ in scale, so that one scale for all of them would show: float32[shape]."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape) * generator.uniform(0.2, 2.0, size=shape[-1]) / np.sqrt(D)
    return nnx.Param(jnp.asarray(values, jnp.float32))


def linear(seed: int = 0) -> nnx.Linear:
    """A linear layer with a bias that is not zero."""
    return nnx.Linear(D, D, bias_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(seed))


def device_mesh(axis_name: str) -> jax.sharding.Mesh:
    """All devices in one row, for GSPMD to propagate along."""
    return jax.make_mesh((jax.device_count(),), (axis_name,), axis_types=(AxisType.Auto,))


class WithLinear(nnx.Module):
    """`nnx.Linear` as it is."""

    def __init__(self) -> None:
        self.linear = linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class WithWeight(nnx.Module):
    """A bare weight and a function of (x, weight)."""

    def __init__(self, function: Callable[[jax.Array, jax.Array], jax.Array], *shape: int) -> None:
        self.w = weight(*(shape or (D, D)))
        self.function = function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x, self.w[...])


class ThreeOperandEinsum(nnx.Module):
    """Two products in one `einsum`."""

    def __init__(self) -> None:
        self.w1 = weight(D, D)
        self.w2 = weight(D, D, seed=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bd,df,fe->be", x, self.w1[...], self.w2[...])


class Rematerialized(nnx.Module):
    """A block under `nnx.remat`."""

    def __init__(self) -> None:
        self.linear = linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.linear, x)


class ScannedModules(nnx.Module):
    """`nnx.scan` over layers whose parameters are stacked."""

    def __init__(self) -> None:
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key: jax.Array) -> nnx.Linear:
            return nnx.Linear(D, D, bias_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(key))

        self.layers = stack(jax.random.split(jax.random.key(0), L))

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer: nnx.Linear, x: jax.Array) -> jax.Array:
            return jnp.tanh(layer(x))

        return forward(self.layers, x)


class Ragged(nnx.Module):
    """`lax.ragged_dot`: consecutive rows go to different weights."""

    def __init__(self) -> None:
        self.w = weight(G, D, D)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, self.w[...], group_sizes)


class InnerJit(nnx.Module):
    """A layer called through `nnx.jit`."""

    def __init__(self) -> None:
        self.linear = linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.jit(lambda layer, x: layer(x))(self.linear, x)


class Conditional(nnx.Module):
    """`nnx.cond` between two layers."""

    def __init__(self) -> None:
        self.first = linear(0)
        self.second = linear(1)

    def __call__(self, x: jax.Array, flag: jax.Array) -> jax.Array:
        return nnx.cond(flag, lambda model, x: model.first(x), lambda model, x: model.second(x), self, x)


class TiedEmbedding(nnx.Module):
    """One table for looking tokens up and for scoring them."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(VOCABULARY, D, rngs=nnx.Rngs(0))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


class Attention(nnx.Module):
    """Self-attention; its two inner products have no weights."""

    def __init__(self) -> None:
        self.attention = nnx.MultiHeadAttention(
            NUM_HEADS, D, decode=False, bias_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x)


class Convolution(nnx.Module):
    """A 3 x 3 convolution with padding and a bias."""

    def __init__(self) -> None:
        self.conv = nnx.Conv(16, 32, (3, 3), bias_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class LowRankAdapter(nnx.Module):
    """A linear layer with an adapter whose second matrix is not zero."""

    def __init__(self) -> None:
        self.linear = nnx.LoRALinear(
            D, D, lora_rank=8, b_initializer=nnx.initializers.normal(0.1), use_bias=False, rngs=nnx.Rngs(0)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class SharedWeight(nnx.Module):
    """Two layers that hold one and the same `nnx.Param`."""

    def __init__(self) -> None:
        self.first = linear(0)
        self.second = linear(1)
        self.second.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


class Block(nnx.Module):
    """A layer and its non-linearity."""

    def __init__(self, seed: int) -> None:
        self.linear = linear(seed)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x))


class JittedBlocks(nnx.Module):
    """Three layers of one compiled block class: the first one's trace serves them all."""

    def __init__(self) -> None:
        self.blocks = nnx.List([Block(seed) for seed in range(L)])

    def __call__(self, x: jax.Array) -> jax.Array:
        call = nnx.jit(Block.__call__)
        for block in self.blocks:
            x = call(block, x)
        return x


def sharded_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """Rows of x spread over the devices, the weight whole on each."""
    spec = PartitionSpec("data")
    return jax.shard_map(
        lambda x, w: jnp.tanh(x @ w), mesh=device_mesh("data"), in_specs=(spec, PartitionSpec()), out_specs=spec
    )(x, w)


def sharded_contraction(x: jax.Array, w: jax.Array) -> jax.Array:
    """The contracted dimension spread over the devices, partial products added up."""
    specs = (PartitionSpec(None, "model"), PartitionSpec("model", None))
    return jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "model"), mesh=device_mesh("model"), in_specs=specs, out_specs=PartitionSpec()
    )(x, w)


def scanned_weights(x: jax.Array, w: jax.Array) -> jax.Array:
    """`lax.scan` over the leading dimension of a weight."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested_scans(x: jax.Array, w: jax.Array) -> jax.Array:
    """Two leading dimensions, a scan in a scan."""
    return jax.lax.scan(lambda x, w: (scanned_weights(x, w), None), x, w)[0]


def while_loop(x: jax.Array, w: jax.Array) -> jax.Array:
    """One weight, applied L times under a condition."""

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 1, jnp.tanh(carry[1] @ w)

    return jax.lax.while_loop(lambda carry: carry[0] < L, step, (jnp.int32(0), x))[1]


def indexed_loop(x: jax.Array, w: jax.Array) -> jax.Array:
    """A weight for each iteration, taken by its number."""
    return jax.lax.fori_loop(0, w.shape[0], lambda i, x: jnp.tanh(x @ w[i]), x)


@jax.custom_vjp
def damped(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product whose author halves the gradient of x."""
    return jnp.tanh(x @ w)


def _damped_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    y = jnp.tanh(x @ w)
    return y, (x, w, y)


def _damped_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, y = residuals
    gradient = gradient * (1 - y * y)
    return 0.5 * gradient @ w.T, x.T @ gradient


damped.defvjp(_damped_forward, _damped_backward)


def _plain(
    name: str,
    function: Callable[[jax.Array, jax.Array], jax.Array],
    *shape: int,
    sites: tuple[str, ...] = ("w",),
    notes: str = "",
    seed: int = 7,
) -> Body:
    return Body(name, lambda: WithWeight(function, *shape), lambda: (rows(seed=seed),), sites, notes)


def _layer(
    name: str, module: type[nnx.Module], *sites: str, inputs: Callable[[], tuple[Any, ...]] | None = None
) -> Body:
    return Body(name, module, inputs or (lambda: (rows(),)), sites, (module.__doc__ or "").strip())


def _group_sizes() -> jax.Array:
    return jnp.asarray([5, 0, 8, 3], jnp.int32)


def _tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).integers(0, VOCABULARY, B), jnp.int32)


ORDINARY: tuple[Body, ...] = (
    _layer("nnx.Linear", WithLinear, "linear"),
    _plain("x @ w", lambda x, w: x @ w),
    _plain("jnp.dot", lambda x, w: jnp.dot(x, w)),
    _plain("jnp.tensordot", lambda x, w: jnp.tensordot(x, w, axes=1)),
    _plain("x @ w.T", lambda x, w: x @ w.T),
    _plain("bfloat16 cast", lambda x, w: x @ w.astype(jnp.bfloat16), notes="the product is float32: x is"),
    _layer("3-operand einsum", ThreeOperandEinsum, "w1", "w2"),
    _layer("nnx.remat", Rematerialized, "linear"),
    _layer("nnx.scan", ScannedModules, "layers"),
    _plain("lax.scan", scanned_weights, L, D, D),
    _plain("vmap of a matvec", lambda x, w: jax.vmap(lambda row: w @ row)(x), notes="the weight is on the left"),
    _plain("shard_map", sharded_rows),
    _layer("lax.ragged_dot", Ragged, "w", inputs=lambda: (rows(), _group_sizes())),
    _layer("inner nnx.jit", InnerJit, "linear"),
    _layer("nnx.cond", Conditional, "second", "first", inputs=lambda: (rows(), jnp.asarray(True))),
    _plain("imported dot_general", lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ())))),
    _layer("tied nnx.Embed", TiedEmbedding, "embed", "embed#2", inputs=lambda: (_tokens(),)),
)
"""Single layers, in the order in which `qwix_bodies.py` prints them."""

FURTHER: tuple[Body, ...] = (
    _layer(
        "nnx.MultiHeadAttention",
        Attention,
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.out",
        inputs=lambda: (rows(2, 8, D),),
    ),
    _layer("nnx.Conv", Convolution, "conv", inputs=lambda: (rows(2, 8, 8, 16),)),
    _layer("nnx.LoRALinear", LowRankAdapter, "linear", "linear.lora.lora_a", "linear.lora.lora_b"),
    _plain("while_loop", while_loop, notes="JAX has no reverse-mode derivative of it"),
    _plain("fori_loop with w[i]", indexed_loop, L, D, D),
    _plain(
        "custom_vjp", damped, notes="a rewrite inside would make the value under grad differ from the value without"
    ),
    # With most seeds one of its many activations lies so near the middle of two codes that either is right.
    _plain("nested scans", nested_scans, 2, L, D, D, seed=16),
    _plain(
        "sharded contraction",
        sharded_contraction,
        notes="scales over a sharded dimension need the maximum of all shards",
    ),
    _plain("weight used twice", lambda x, w: jnp.tanh(x @ w) @ w, sites=("w", "w#2")),
    _layer("shared weight", SharedWeight, "first", "first#2"),
    _layer("one jitted block class", JittedBlocks, "blocks.0.linear", "blocks.1.linear", "blocks.2.linear"),
)
"""Weights in loops, in custom derivatives, in shards, and weights that are used more than once."""

BODIES: tuple[Body, ...] = ORDINARY + FURTHER
