"""A decoder-only language model in Flax NNX: the Llama family, and what is a few options away from it.

Tokens are embedded, pass through a stack of pre-normalized blocks (attention, then a feed-forward network, each added
to the residual stream), are normalized once more and projected onto the vocabulary. Nothing here knows about compax: to
it, this is one more model.

Letters in shapes:
    B batch    T positions of queries    S positions of keys    L layers    V vocabulary
    D model    F hidden    H query heads    G key-value heads (each serves H/G query heads)    K head size

Papers:
    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762
    Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", 2023, arXiv:2307.09288 (the shape of a block)
    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023, arXiv:2305.13245
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467
    Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from compax.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder and how it computes. Everything in it is plain data, so it survives a trip through JSON.

    Attributes:
        vocab_size: Number of token ids (V).
        context_length: Positions the model is meant for. RoPE has no table, so nothing breaks beyond it but quality.
        model_dim: Width of the residual stream (D).
        hidden_dim: Width inside the feed-forward network (F).
        num_layers: Number of blocks (L).
        num_heads: Query heads (H).
        num_kv_heads: Key-value heads (G); divides `num_heads`. Equal to it: multi-head; 1: multi-query attention.
        head_dim: Size of a head (K), even.
        activation: Name of the feed-forward non-linearity, a key of `ACTIVATIONS`.
        gated: `down(activation(gate(x)) * up(x))` if true (SwiGLU and kin), `down(activation(up(x)))` otherwise.
        norm: `rmsnorm`, or `layernorm` (with a bias).
        norm_epsilon: Added to the mean square, or to the variance.
        rope_theta: Base of the rotary frequencies.
        tied: Project onto the vocabulary with the embedding itself instead of a matrix of its own.
        qkv_bias: Biases on the query, key and value projections.
        out_bias: Bias on the attention's output projection.
        mlp_bias: Biases in the feed-forward network.
        dropout: Share of values dropped after the embedding, the attention and the feed-forward network in training.
        scan: Keep the layers stacked (`blocks.*` with L in front) and scan over them: one compiled block for all.
            Otherwise `blocks.0`, `blocks.1`, ... The same seed gives the same numbers either way.
        remat: Recompute a block's inside in the backward pass instead of saving it.
        param_dtype: How parameters are stored.
        dtype: How the network computes. Norms' statistics, rotations and the softmax are float32 whatever it says.
    """

    vocab_size: int
    context_length: int
    model_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "silu"
    gated: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ConfigError(f"DecoderConfig.{field.name} is {value}; it counts something and must be at least 1")
            if field.name in ("norm_epsilon", "rope_theta") and not value > 0.0:
                raise ConfigError(f"DecoderConfig.{field.name} is {value}; it must be above 0")
            if field.name in ("param_dtype", "dtype") and value not in DTYPES:
                raise ConfigError(f"DecoderConfig.{field.name} is {value!r}; known are {', '.join(DTYPES)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"DecoderConfig.num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads}); "
                "each key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"DecoderConfig.head_dim is {self.head_dim}; rotary embedding turns pairs, make it even")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"DecoderConfig.activation is {self.activation!r}; known are {', '.join(ACTIVATIONS)}")
        if self.norm not in ("rmsnorm", "layernorm"):
            raise ConfigError(f"DecoderConfig.norm is {self.norm!r}; known are rmsnorm, layernorm")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"DecoderConfig.dropout is {self.dropout}; it is a share, at least 0 and below 1")


_LLAMA2_7B = DecoderConfig(
    vocab_size=32_000,
    context_length=4_096,
    model_dim=4_096,
    hidden_dim=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    tied=False,
)

SIZES: dict[str, DecoderConfig] = {
    # For tests: every shape differs from every other, so that a mixed-up dimension cannot go unnoticed.
    "tiny": DecoderConfig(
        vocab_size=96,
        context_length=64,
        model_dim=32,
        hidden_dim=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
    ),
    # 4.0M parameters: learns something on two CPU cores in minutes.
    "small": DecoderConfig(
        vocab_size=4_096,
        context_length=256,
        model_dim=256,
        hidden_dim=704,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
    ),
    # 27.8M parameters.
    "medium": DecoderConfig(
        vocab_size=8_192,
        context_length=512,
        model_dim=512,
        hidden_dim=1_408,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    ),
    "stories260k": DecoderConfig(
        vocab_size=512,
        context_length=512,
        model_dim=64,
        hidden_dim=172,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        context_length=8_192,
        model_dim=576,
        hidden_dim=1_536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
    ),
    "llama2-7b": _LLAMA2_7B,
    "llama2-70b": dataclasses.replace(
        _LLAMA2_7B, model_dim=8_192, hidden_dim=28_672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
}


def rotation(positions: Int[Array, " T"], head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle by which each pair of features turns at each position: float32 `[T, 1, K/2]`."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T H K"], cos: jax.Array, sin: jax.Array) -> Float[Array, "B T H K"]:
    """Turn feature i together with feature i + K/2 (the half-split layout of Hugging Face)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T H K"]:
    """Softmax attention: query head h reads key-value head h // (H/G); `mask` is true where a query may look."""
    batch, queries, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, queries, groups, heads // groups, head_dim)
    scores = jnp.einsum("btgrk,bsgk->bgrts", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(batch, queries, heads, head_dim)


class LayerCache(nnx.Pytree):
    """Keys (rotated already) and values of a layer, `[B, S, G, K]`, or of `layers` stacked ones, `[L, B, S, G, K]`."""

    def __init__(self, config: DecoderConfig, batch: int, length: int, *, layers: int | None = None):
        shape = (batch, length, config.num_kv_heads, config.head_dim)
        shape = shape if layers is None else (layers, *shape)
        self.key = nnx.Cache(jnp.zeros(shape, config.dtype))
        self.value = nnx.Cache(jnp.zeros(shape, config.dtype))


class KVCache(nnx.Pytree):
    """What attention needs to remember of the tokens so far. `Decoder.__call__` appends to it in place.

    Attributes:
        layers: One `LayerCache` for each block, or a stacked one where the blocks are stacked.
        position: Number of tokens that it holds, int32 scalar: the same for each sequence of the batch.
        length: Number of tokens that it has room for. Going beyond is the caller's mistake and would overwrite the last
            entries: the position is known only on the device, so no check can be made for it here.
    """

    def __init__(self, config: DecoderConfig, batch: int, length: int):
        self.layers: Any
        if config.scan:
            self.layers = LayerCache(config, batch, length, layers=config.num_layers)
        else:
            self.layers = nnx.List([LayerCache(config, batch, length) for _ in range(config.num_layers)])
        self.position = nnx.Cache(jnp.zeros((), jnp.int32))
        self.length = length


def _linear(
    config: DecoderConfig, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs, gain: float = 1.0
) -> nnx.Linear:
    """A projection whose outputs have variance `gain` times that of its inputs, at first."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.variance_scaling(gain, "fan_in", "normal"),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    return kind(
        config.model_dim,
        epsilon=config.norm_epsilon,
        use_fast_variance=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _dropout(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Dropout:
    # Without dropout there is no random state either: the model is then a function of its parameters alone.
    return nnx.Dropout(config.dropout, rngs=rngs if config.dropout else None)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = _linear(config, config.model_dim, heads, config.qkv_bias, rngs)
        self.key = _linear(config, config.model_dim, kv_heads, config.qkv_bias, rngs)
        self.value = _linear(config, config.model_dim, kv_heads, config.qkv_bias, rngs)
        self.out = _linear(config, heads, config.model_dim, config.out_bias, rngs, gain=0.5 / config.num_layers)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: tuple[jax.Array, jax.Array],
        mask: Bool[Array, "T S"],
        position: Int[Array, ""],
        cache: LayerCache | None,
    ) -> Float[Array, "B T D"]:
        batch, tokens, _ = x.shape
        query, key, value = (
            project(x).reshape(batch, tokens, -1, self.head_dim) for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, *turn), rotate(key, *turn)
        if cache is not None:
            start = (0, position, 0, 0)
            cache.key[...] = jax.lax.dynamic_update_slice(cache.key[...], key.astype(cache.key.dtype), start)
            cache.value[...] = jax.lax.dynamic_update_slice(cache.value[...], value.astype(cache.value.dtype), start)
            key, value = cache.key[...], cache.value[...]
        return self.out(attend(query, key, value, mask).reshape(batch, tokens, -1))


class FeedForward(nnx.Module):
    """Position-wise network: gated (three projections) or plain (two)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        if config.gated:
            self.gate = _linear(config, config.model_dim, config.hidden_dim, config.mlp_bias, rngs)
        self.up = _linear(config, config.model_dim, config.hidden_dim, config.mlp_bias, rngs)
        self.down = _linear(
            config, config.hidden_dim, config.model_dim, config.mlp_bias, rngs, gain=0.5 / config.num_layers
        )
        self.gated = config.gated

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.activation]
        hidden = activation(self.gate(x)) * self.up(x) if self.gated else activation(self.up(x))
        return self.down(hidden)


class Block(nnx.Module):
    """One layer: attention and then the feed-forward network each add their findings to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = FeedForward(config, rngs=rngs)
        self.dropout = _dropout(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: tuple[jax.Array, jax.Array],
        mask: Bool[Array, "T S"],
        position: Int[Array, ""],
        cache: LayerCache | None,
    ) -> Float[Array, "B T D"]:
        x = x + self.dropout(self.attn(self.attn_norm(x), turn, mask, position, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nnx.Module):
    """The language model: token ids in, one vector of logits for each position out.

    Parameters are named `embed.embedding`, `blocks.0.attn.query.kernel`, `blocks.0.mlp.up.kernel`, ..., `norm.scale`
    and, where the head is not tied, `head.kernel`; scanned, `blocks.attn.query.kernel` with L in front. Kernels are
    `[inputs, outputs]`.

    For shapes alone, without memory: `nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.model_dim,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        # A key for each layer, whether stacked or not: the same seed then gives the same numbers.
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks: Any
        if config.scan:
            self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        else:
            self.blocks = nnx.List([Block(config, rngs=nnx.Rngs(key)) for key in keys])
        self.norm = _norm(config, rngs)
        if not config.tied:
            self.head = _linear(config, config.model_dim, config.vocab_size, False, rngs)
        self.dropout = _dropout(config, rngs)

    def __call__(self, tokens: Int[Array, "B T"], cache: KVCache | None = None) -> Float[Array, "B T V"]:
        """Logits of the token after each position, in the compute dtype.

        Args:
            tokens: Ids, `[B, T]`.
            cache: What came before. The tokens are then taken to follow it, and are appended to it in place.

        Raises:
            ValueError: The cache has less room than there are tokens.
        """
        config = self.config
        position = jnp.zeros((), jnp.int32) if cache is None else cache.position[...]
        positions = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if cache is None:
            mask = positions[:, None] >= positions[None, :]
        elif tokens.shape[1] > cache.length:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit a cache of length {cache.length}: make it longer")
        else:
            mask = positions[:, None] >= jnp.arange(cache.length, dtype=jnp.int32)[None, :]
        turn = rotation(positions, config.head_dim, config.rope_theta)

        x = self.dropout(self.embed(tokens))
        if config.scan:
            layers = [(self.blocks, None if cache is None else cache.layers)]
        else:
            layers = zip(self.blocks, [None] * config.num_layers if cache is None else cache.layers, strict=True)
        for layer in layers:
            x = self._run(layer, x, turn, mask, position)
        if cache is not None:
            cache.position[...] = position + tokens.shape[1]
        x = self.norm(x)
        return self.embed.attend(x) if config.tied else self.head(x)

    def _run(
        self,
        layer: tuple[Block, LayerCache | None],
        x: Float[Array, "B T D"],
        turn: tuple[jax.Array, jax.Array],
        mask: Bool[Array, "T S"],
        position: Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        """Apply one (block, cache) pair, or scan over a stacked one, recomputed in the backward pass if so configured.

        JAX transformations want functions of arrays, so the layer goes in as its variables and what it changed
        (cache, random state, never parameters) comes out. `nnx.scan` and `nnx.remat` would return all parameters too:
        one more copy of a stacked model.
        """
        if not (self.config.scan or self.config.remat):
            block, cache = layer
            return block(x, turn, mask, position, cache)

        graph, params, state = nnx.split(layer, nnx.Param, ...)

        def step(x: jax.Array, variables: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            block, cache = nnx.merge(graph, *variables, copy=True)
            x = block(x, turn, mask, position, cache)
            return x, nnx.state((block, cache), nnx.Not(nnx.Param))

        if self.config.remat:
            # Inside a scan nothing can be merged with the forward pass, so the barriers against it are not needed.
            step = jax.checkpoint(step, prevent_cse=not self.config.scan)
        x, state = jax.lax.scan(step, x, (params, state)) if self.config.scan else step(x, (params, state))
        nnx.update(layer, state)
        return x

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens of each of `batch` sequences, in the compute dtype."""
        return KVCache(self.config, batch, length)


def example_inputs(config: DecoderConfig, batch: int = 2, sequence: int | None = None) -> tuple[jax.Array]:
    """Arguments to call or capture a decoder with: random tokens, `[B, T]` int32, the same ones each time.

    Args:
        config: The decoder's.
        batch: Number of sequences (B).
        sequence: Number of tokens in each (T); the context length if not given.
    """
    shape = (batch, config.context_length if sequence is None else sequence)
    return (jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, shape), jnp.int32),)


def loss(
    model: Callable[[jax.Array], jax.Array], batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of the next token.

    Args:
        model: A decoder, or anything that maps tokens `[B, T]` to logits `[B, T, V]`.
        batch: Either `tokens` `[B, T+1]`, or `inputs` and `targets` `[B, T]`; and optionally `mask` `[B, T]` with the
            weight of each prediction (0 or 1).

    Returns:
        Nats per token, a float32 scalar, and metrics: `loss` (the same) and `tokens` (the total weight of predictions).
    """
    inputs, targets = (
        (batch["tokens"][:, :-1], batch["tokens"][:, 1:]) if "tokens" in batch else (batch["inputs"], batch["targets"])
    )
    log_probabilities = jax.nn.log_softmax(model(inputs).astype(jnp.float32))
    losses = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    weights = batch["mask"].astype(jnp.float32) if "mask" in batch else jnp.ones_like(losses)
    num_tokens = weights.sum()
    mean = (losses * weights).sum() / jnp.maximum(num_tokens, 1.0)
    return mean, {"loss": mean, "tokens": num_tokens}
