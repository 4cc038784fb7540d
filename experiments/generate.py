"""Continuing texts: `compax generate`, from a trained run or from the weights of a known model.

The prompt is read at once, padded to a power of two so that few lengths are compiled; then tokens follow one by one
from a key-value cache, all in one compiled function.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import compax
from compax.errors import ConfigError, WeightsError
from compax.experiments import runs
from compax.experiments.config import Config, closest
from compax.experiments.console import Console
from compax.experiments.tokenizer import Tokenizer
from compax.instruments import Instrument
from compax.models import load_decoder, load_tokenizer, smollm2_path
from compax.models.decoder import DecoderConfig, KVCache
from compax.placement import DEVICE

GENERATE = "generate"
KNOWN_WEIGHTS = {"smollm2-135m": smollm2_path}
_SHORTEST = 8
# What passes are tried on: ordinary prose, since a model's errors on anything else say little about it.
SAMPLE = (
    "The river rises in the mountains, crosses three countries and reaches the sea after more than a thousand miles. "
    "Most of the towns along it were founded by merchants, who carried salt and timber down the valley every spring."
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        tokens: How many to generate at most; a text also ends at the tokenizer's end token.
        temperature: Of the softmax; 0 takes the most likely token.
        top_k: Choose among the k most likely tokens; 0: among all.
        seed: Of the random draws.
    """

    tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"generation: {name} is {value}, it must be at least {least}")

    @classmethod
    def of_config(cls, config: Config) -> Sampling:
        """Returns what the config's section `generation` says."""
        section = config.generation
        return cls(section.tokens, section.temperature, section.top_k, config.seed)

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Returns a token, int32[], for logits float[vocabulary]."""
        if not self.temperature:
            return jnp.argmax(logits).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k and self.top_k < logits.shape[0]:
            least = jax.lax.top_k(logits, self.top_k)[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A generated text.

    Attributes:
        prompt: What it continues.
        text: The continuation, without the prompt.
        tokens: Its tokens.
        seconds: Measured time to read the prompt and generate, without compilation.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    seconds: float

    def show(self, console: Console, name: str) -> None:
        """Prints the text, below a line that says who wrote it and how fast."""
        speed = len(self.tokens) / self.seconds
        console.say(f"--- {name}: {len(self.tokens)} tokens, {speed:,.1f} tokens/s (measured)", style="bold")
        console.say(self.prompt + self.text)


class Generator:
    """Continues texts with a program of a decoder.

    Args:
        program: Any program of a decoder, transformed or not; an entry is added that takes `(tokens, cache)`.
        shape: The decoder's config: it says how large a cache is.
        tokenizer: The model's.
        sampling: How to choose tokens.
    """

    def __init__(self, program: compax.Program, shape: DecoderConfig, tokenizer: Tokenizer, sampling: Sampling):
        self._shape, self._tokenizer, self._sampling = shape, tokenizer, sampling
        example = jnp.zeros((1, 1), jnp.int32)
        self._program = program.with_entry(GENERATE, example, KVCache(shape, 1, _SHORTEST), mode="eval")
        self._compiled: dict[int, Any] = {}

    def __call__(self, prompt: str) -> Continuation:
        """Continues a text.

        Raises:
            ConfigError: The prompt is empty.
        """
        ids = self._tokenizer.encode(prompt)
        if not len(ids):
            raise ConfigError("the prompt is empty: give some text to continue, --prompt=TEXT")
        padded = np.zeros((1, _padded(len(ids))), np.int32)
        padded[0, : len(ids)] = ids
        arguments = (self._program.params, self._program.state, padded, np.int32(len(ids)))
        key = jax.random.key(self._sampling.seed)
        length = padded.shape[1]
        if length not in self._compiled:
            placement = self._program.placement
            # Each process reads all of the text.
            whole = placement.place(PartitionSpec(), DEVICE) if isinstance(placement.mesh, Mesh) else None
            self._compiled[length] = jax.jit(self._generate, out_shardings=whole).lower(*arguments, key).compile()
        start = time.perf_counter()
        found, count = jax.device_get(self._compiled[length](*arguments, key))
        seconds = time.perf_counter() - start
        tokens = tuple(int(token) for token in found[:count])
        shown = tokens[:-1] if tokens[-1] == self._tokenizer.end else tokens
        # Bytes of one character may be split between prompt and continuation: only both together decode rightly.
        whole, before = self._tokenizer.decode([*ids, *shown]), self._tokenizer.decode(ids)
        return Continuation(prompt, whole[len(before) :], tokens, seconds)

    def _generate(
        self, params: Any, state: Any, tokens: jax.Array, length: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns generated tokens, int32[most], and how many of them count: up to the end token, that one included."""
        most, end = self._sampling.tokens, -1 if self._tokenizer.end is None else self._tokenizer.end
        cache = KVCache(self._shape, 1, tokens.shape[1] + most)
        logits = self._program.apply(params, state, tokens, cache, entry=GENERATE)[0][0]
        # What the padding left in the cache lies beyond the position: it is masked until it is overwritten.
        cache.position[...] = length
        graph, variables = nnx.split(cache)
        keys = jax.random.split(key, most)
        first = self._sampling.choose(jax.lax.dynamic_index_in_dim(logits, length - 1, keepdims=False), keys[0])

        def unfinished(carry: Any) -> jax.Array:
            count, last, *_ = carry
            return (count < most) & (last != end)

        def step(carry: Any) -> Any:
            count, last, found, variables = carry
            cache = nnx.merge(graph, variables)
            logits = self._program.apply(params, state, last.reshape(1, 1), cache, entry=GENERATE)[0][0, 0]
            token = self._sampling.choose(logits, keys[count])
            return count + 1, token, found.at[count].set(token), nnx.split(cache)[1]

        found = jnp.zeros(most, jnp.int32).at[0].set(first)
        count, _, found, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(1), first, found, variables))
        return found, count


def _padded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def from_run(
    config: Config,
    pipeline: str,
    prompts: Sequence[str],
    sampling: Sampling,
    console: Console,
    *,
    compressed: bool = False,
) -> None:
    """Continues prompts (by default those of the config) with the last checkpoint of a run.

    Raises:
        CompaxError: There is no usable checkpoint, or the pipeline fails.
    """
    run = runs.restore(config, compressed=compressed)
    program = runs.transformed(run, pipeline)
    prompts = prompts or config.generation.prompts
    if not prompts:
        raise ConfigError("no prompt: give one with --prompt=TEXT")
    generator = Generator(program, run.shape, run.tokenizer, sampling)
    for prompt in prompts:
        generator(prompt).show(console, f"{run.directory} at step {run.step}")


def from_model(model: str, pipeline: str, prompts: Sequence[str], sampling: Sampling, console: Console) -> None:
    """Continues prompts with published weights: those of a known model, or a weight file with its tokenizer.

    Raises:
        WeightsError: The weights or the tokenizer cannot be loaded.
        ConfigError: The model is unknown, or there is no prompt.
    """
    if not prompts:
        raise ConfigError("no prompt: give one with --prompt=TEXT")
    path = weights_path(model)
    inner = load_decoder(path)
    tokenizer = Tokenizer(load_tokenizer(path))
    program = captured(inner, pipeline, model, tokenizer.encode(SAMPLE))
    generator = Generator(program, inner.config, tokenizer, sampling)
    for prompt in prompts:
        generator(prompt).show(console, model)


def captured(
    inner: Any, pipeline: str, name: str, ids: np.ndarray, instruments: Sequence[Instrument] = ()
) -> compax.Program:
    """Captures a decoder on tokens, int32[tokens], and applies a pipeline, which is checked on them."""
    tokens = jnp.asarray(ids, jnp.int32)[None]
    program = compax.capture(inner, tokens, mode="eval", name=pathlib.Path(name).stem.split("-")[0])
    return compax.Pipeline.parse(pipeline, instruments)(program, tokens)


def weights_path(model: str) -> pathlib.Path:
    """Returns the weight file of a known model, or the path itself if it is one.

    Raises:
        WeightsError: It is neither.
    """
    if model in KNOWN_WEIGHTS:
        return KNOWN_WEIGHTS[model]()
    if pathlib.Path(model).exists():
        return pathlib.Path(model)
    near = closest(model, KNOWN_WEIGHTS)
    raise WeightsError(f"no weights for '{model}'{near}; a .gguf file or a folder with safetensors will do as well")
