"""What the zoo's builders share: a model with its inputs, its variants, what is known of it, and random numbers.

Letters in shapes:
    B batch    T positions of queries    S positions of keys
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import compax
from compax.errors import ConfigError
from compax.experiments.benchmarks import third_party

Dtype = Literal["float32", "bfloat16"]
Mode = Literal["eval", "train"]
Maker = Callable[["Widths", "Variant"], "Case"]

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""The classes and not their names: some of transformers' modules compare with `jnp.float32` by identity."""
SPREAD = 0.15
"""Standard deviation of random weights: attention is neither uniform nor one-hot in any model of the zoo."""
DROPOUT = 0.1
"""The rate in train mode, the authors' own default wherever it is not zero."""


class VariantError(ConfigError):
    """A model has no such variant; the message says why and which it has."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to build and call a model.

    Attributes:
        dtype: What it computes in. Parameters have the dtype that the author's code gives them.
        mode: Whether dropout is active and batch statistics are taken from the batch.
        padding: Whether a mask with padding in it is an array among the inputs.
        decode: Whether one token is computed from a cache.
    """

    dtype: Dtype = "float32"
    mode: Mode = "eval"
    padding: bool = False
    decode: bool = False

    def __str__(self) -> str:
        parts = (self.dtype, self.mode, "padding" if self.padding else "", "decode" if self.decode else "")
        return "-".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Widths:
    """The sizes of a model. At their defaults all of them differ, so that no dimension passes for another.

    Attributes:
        batch: Sequences.
        length: Tokens in each.
        vocabulary: Token ids.
        model_dim: Width of the residual stream, where the author's code does not derive it from the heads.
        hidden_dim: Width inside a feed-forward network.
        num_heads: Query heads; a power of two, since BLOOM fails on this JAX with others.
        num_kv_heads: Key-value heads, where the author's code knows them.
        head_dim: Size of a head.
        window: What the author's configuration calls the size of a local attention's window.
        context: Positions that tables and masks are made for.
        cache: Positions that a cache has room for.
        filled: Positions of it that are taken.
        image: Height and width of an image.
    """

    batch: int = 5
    length: int = 22
    vocabulary: int = 120
    model_dim: int = 40
    hidden_dim: int = 104
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 12
    window: int = 9
    context: int = 64
    cache: int = 36
    filled: int = 11
    image: int = 28

    @property
    def heads_dim(self) -> int:
        """All query heads together: the width of the residual stream where the author's code derives it from them."""
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Attention:
    """Equal attentions of a model, as its author wrote them.

    Attributes:
        count: How many.
        mask: `causal`, `full`, or `argument` where all of it but the window is an argument of the call.
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
        head_dim: Size of a head.
        scale: What the product of query and key is multiplied by in all, wherever that happens.
        position: `rope half`, `rope interleaved`, `learned`, `alibi`, `sinusoidal`, `convolution`, or `none`.
        rotary_dim: Features of a head that are rotated, 0 without RoPE.
        rope_base: Base of the rotary frequencies, 0 without RoPE.
        window: Keys that a query sees at most, itself among them; None without a window.
        softcap: Bound of the scores, None without.
        padding: Whether the padding of the inputs, in a variant that has it, masks keys here.
        cross: Whether keys and values come from another sequence than the queries.
        dropout: Whether weights are dropped in train mode.
    """

    count: int
    mask: Literal["causal", "full", "argument"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    position: str = "none"
    rotary_dim: int = 0
    rope_base: float = 0.0
    window: int | None = None
    softcap: float | None = None
    padding: bool = False
    cross: bool = False
    dropout: bool = False


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Equal feed-forward networks: linear, elementwise, linear.

    Attributes:
        count: How many.
        activation: `relu`, `gelu` (with erf), `gelu_tanh`, `quick_gelu` (`x * sigmoid(1.702 * x)`), `silu`.
        gated: Whether a second linear function of the same input multiplies the activation.
    """

    count: int
    activation: str
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a model consists of, counted by hand in its author's source, at the default widths.

    Attributes:
        attentions: All attentions, equal ones together.
        norms: Number of normalizations of each kind: `layer`, `rms`, `batch`, `group`.
        feed_forwards: All feed-forward networks outside of experts.
        experts: Number of blocks of experts.
        tied: Whether the head is the transposed embedding; None without a head onto a vocabulary.
        softcap: Bound of the logits, None without.
    """

    attentions: tuple[Attention, ...] = ()
    norms: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    feed_forwards: tuple[FeedForward, ...] = ()
    experts: int = 0
    tied: bool | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with all that `compax.capture(module, *inputs, variables=variables, **options, **kwargs)` takes.

    Attributes:
        module: An NNX module, or a Linen module together with `variables`.
        variables: The Linen collections, None for NNX.
        inputs: Positional arguments: arrays, trees of them, an NNX cache, or None where the model takes None.
        kwargs: Keyword arguments: switches, which are static, and keys for dropout.
        output: Picks an array out of what the model returns.
        options: Options of `capture`: `mode`, `mutable`, `method`, `constant`.
        description: What is particular about the model.
    """

    module: Any
    variables: dict[str, Any] | None
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Callable[[Any], jax.Array]
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    description: str = ""

    def arguments(self) -> tuple[Any, ...]:
        """The inputs, with copies of NNX objects: a call updates a cache in place."""
        return tuple(nnx.clone(x) if isinstance(x, nnx.Pytree) else x for x in self.inputs)

    def capture(self) -> compax.Program:
        """The program of this case."""
        variables = {} if self.variables is None else {"variables": self.variables}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the packages are their authors' business
            return compax.capture(self.module, *self.arguments(), **variables, **self.options, **self.kwargs)

    def run(self, program: compax.Program) -> jax.Array:
        """The output of a program of this case for its inputs."""
        return self.output(program(*self.arguments(), **self.kwargs))

    def reference(self) -> jax.Array:
        """The model's own output for the inputs, compiled by `jax.jit` without compax."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.output(self._call_nnx() if self.variables is None else self._call_linen(self.variables))

    def _call_nnx(self) -> Any:
        module = nnx.clone(self.module)
        if mode := self.options.get("mode"):
            module.train() if mode == "train" else module.eval()
        return nnx.jit(lambda module, *inputs: module(*inputs, **self.kwargs))(module, *self.arguments())

    def _call_linen(self, variables: dict[str, Any]) -> Any:
        switches = {name: value for name, value in self.kwargs.items() if name != "rngs"}
        settings = {name: self.options[name] for name in ("method", "mutable") if name in self.options}
        call = jax.jit(
            lambda variables, inputs, rngs: self.module.apply(variables, *inputs, rngs=rngs, **settings, **switches)
        )
        result = call(variables, self.inputs, self.kwargs.get("rngs"))
        return result[0] if "mutable" in settings else result


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo before it is built.

    Attributes:
        name: Its name here.
        make: Builds it.
        expected: What it consists of.
        variants: The variants that exist.
        lacks: Why others do not, by the field of `Variant`.
        decoding: What a decode step consists of, where that is not what the whole model does.
    """

    name: str
    make: Maker
    expected: Expected
    variants: tuple[Variant, ...]
    lacks: dict[str, str]
    decoding: Expected | None = None

    @property
    def description(self) -> str:
        """The first line of the builder's documentation."""
        return (self.make.__doc__ or "").strip().splitlines()[0]

    def build(self, variant: Variant, widths: Widths) -> Case:
        """The model with its inputs.

        Raises:
            ModuleNotFoundError: The author's package is not installed.
            VariantError: The model has no such variant.
        """
        if variant not in self.variants:
            reasons = [reason for field, reason in self.lacks.items() if getattr(variant, field) not in ("eval", False)]
            reason = "; ".join(reasons) or "no author's code decodes in train mode"
            names = ", ".join(map(str, self.variants))
            raise VariantError(f"{self.name} has no variant {variant}: {reason}; it has {names}")
        with warnings.catch_warnings(), third_party.lazy_sharding():
            warnings.simplefilter("ignore")
            return dataclasses.replace(self.make(widths, variant), description=self.description)


def entry(make: Maker, expected: Expected, *, decoding: Expected | None = None, **lacks: str) -> Entry:
    """A model of the zoo, named after its builder.

    Args:
        make: Builds a variant.
        expected: What the model consists of.
        decoding: What a decode step consists of, where that is less.
        **lacks: `mode`, `padding` or `decode`, each with the reason why there is no such variant.
    """
    variants = tuple(
        Variant(dtype, mode, padding, decode)
        for decode, padding, mode, dtype in itertools.product(
            (False, True), (False, True), ("eval", "train"), ("float32", "bfloat16")
        )
        if not (decode and (mode == "train" or "decode" in lacks))
        if not (mode == "train" and "mode" in lacks)
        if not (padding and "padding" in lacks)
    )
    name = getattr(make, "__name__", "")
    return Entry(name, make, expected, variants, lacks, decoding)


# -- Inputs -----------------------------------------------------------------------------------------------------------


def tokens(batch: int, length: int, vocabulary: int) -> jax.Array:
    """Equally distributed token numbers, the same at every call: int32[B, T]."""
    return jnp.asarray(np.random.default_rng(0).integers(1, vocabulary, (batch, length)), jnp.int32)


def signal(*shape: int) -> jax.Array:
    """Normally distributed pixels or samples, the same at every call, in float32."""
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def positions(batch: int, length: int, start: int = 0) -> jax.Array:
    """Consecutive positions: int32[B, T]."""
    return jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32), (batch, length))


def present(batch: int, length: int, *, padding: bool, left: bool = False) -> jax.Array:
    """One for a token and zero for padding: int32[B, S].

    Args:
        batch: Sequences.
        length: Positions.
        padding: Whether there is any: none in the first sequence, one position more in each further one.
        left: Whether it comes before the tokens, as it does where generation goes on at the end.
    """
    if not padding:
        return jnp.ones((batch, length), jnp.int32)
    place = np.arange(length) if left else length - 1 - np.arange(length)
    return jnp.asarray(place[None, :] >= np.arange(batch)[:, None], jnp.int32)


# -- Numbers ----------------------------------------------------------------------------------------------------------


def fill(
    path: Sequence[Any], shape: Sequence[int], dtype: Any, random: np.random.Generator, neutral: float = 1.0
) -> jax.Array:
    """Random numbers for a parameter, a statistic or a cache.

    Authors initialize biases, and some of them whole matrices, to zero. A program that lost such a parameter would
    compute the same, so here nothing is zero.

    Args:
        path: Names, the last of which says what it is.
        shape: Of the array.
        dtype: Of the array.
        random: Where numbers come from.
        neutral: What scales of norms are near: zero where the author multiplies by one plus the scale.
    """
    name = str(path[-1])
    values = random.normal(0.0, SPREAD, tuple(shape))
    if (name in ("scale", "weight", "w") and len(shape) == 1) or name in ("weight_g", "logit_scale"):
        values += neutral
    if name == "var":
        values = 1.0 + np.abs(values)
    return jnp.asarray(values, dtype)


def filled_module(make: Callable[[], nnx.Module], dtype: Any = None, neutral: float = 1.0) -> Any:
    """An NNX module with random numbers, whose own initialization is traced and never run.

    Args:
        make: Makes the module.
        dtype: In place of the dtype that the author gives to floating parameters.
        neutral: What scales of norms are near.
    """
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = [
        (path, variable.replace(fill(path, variable.shape, dtype or variable.dtype, random, neutral)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
