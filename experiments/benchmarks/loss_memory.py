"""Peak memory of a gradient with the loss in chunks, against the plain loss and against recomputing it.

Claim: `tile_loss` takes the logits out of a train step's memory, forward and backward, in models that did nothing for
it, and computes the same gradients; recomputing the loss (`jax.checkpoint`) does not, because the gradient of the
logits is still made whole.

Command: `python -m compax.experiments.benchmarks.loss_memory`. About a minute on two cores; `--time` adds a
measurement of the head and its loss alone, some minutes more on a CPU. GPT-2 needs `transformers==4.57.6`.

Memory is XLA's own account of temporaries, beside parameters, inputs and gradients, of
`jax.jit(jax.value_and_grad(loss))` for the platform that it runs on. Nothing is run and no parameter exists. The
losses: optax's on the logits; the same recomputed in the backward pass (`jax.checkpoint` around the loss, in the third
table around head and loss); and the first one after the pass.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import compax
from compax.experiments.benchmarks import reporting
from compax.models import decoder

TILED = ("tile_loss(tokens=1024)", "tile_loss(vocabulary=8192)")
COLUMNS = ("loss", "temporaries", "against plain", "against checkpoint")
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Optax's loss, the mean over tokens, in float32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(losses)


LOSSES: dict[str, Loss] = {"optax": cross_entropy, "optax under jax.checkpoint": jax.checkpoint(cross_entropy)}


def temporaries(program: compax.Program, *inputs: Any) -> int:
    """Bytes of temporaries of a compiled gradient."""
    trainable, rest = program.partition()

    def loss(trainable: Any, rest: Any, *inputs: Any) -> jax.Array:
        return program.apply({**rest, **trainable}, program.state, *inputs)[0]

    compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, rest, *inputs).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA gives no account of memory on this platform"
    return analysis.temp_size_in_bytes


def print_account(title: str, capture: Callable[[Loss], compax.Program], inputs: tuple[Any, ...]) -> None:
    """Prints a table: every loss on its own, and the plain one after the pass."""
    programs = {name: capture(loss) for name, loss in LOSSES.items()}
    programs |= {text: compax.Pipeline.parse(text)(programs["optax"]) for text in TILED}
    print_programs(title, programs, inputs)


def print_programs(title: str, programs: Mapping[str, compax.Program], inputs: tuple[Any, ...]) -> None:
    """Prints a table of programs; the first one and the second are what others are compared with."""
    figures = {name: temporaries(program, *inputs) for name, program in programs.items()}
    plain, recomputed, *_ = figures.values()
    rows = [
        (name, reporting.mebibytes(found), f"{found / plain:.3f}", f"{found / recomputed:.3f}")
        for name, found in figures.items()
    ]
    reporting.print_table(f"MiB, {title}", COLUMNS, rows, basis="compiled")


def print_decoder(batch: int, tokens: int, layers: int) -> None:
    """SmolLM2's shape: tied head, vocabulary 49,152, scanned layers that are recomputed, bfloat16 over float32."""
    config = decoder.SIZES["smollm2-135m"]
    config = dataclasses.replace(config, num_layers=layers, scan=True, remat=True, dtype="bfloat16")
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    inputs = (jax.ShapeDtypeStruct((batch, tokens), jnp.int32),) * 2

    def capture(loss: Loss) -> compax.Program:
        return compax.capture(model, *inputs, loss=lambda model, x, y: loss(model(x), y))

    what = f"SmolLM2's shape with {layers} layers, vocabulary {config.vocab_size}"
    print_account(f"gradient of {what}, {batch} x {tokens} tokens", capture, inputs)


def print_gpt2(batch: int, tokens: int, layers: int) -> None:
    """Flax GPT-2 of transformers, as it is: tied head, vocabulary 50,257, float32."""
    from compax.experiments.benchmarks.zoo_transformers import transformers

    config = transformers().GPT2Config(n_layer=layers, n_positions=tokens, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers().FlaxGPT2LMHeadModel(config, _do_init=False)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    module = model.module
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *(jnp.zeros((1, 4), jnp.int32),) * 3))
    inputs = (ids, ids)

    def capture(loss: Loss) -> compax.Program:
        def of_logits(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
            return loss(model(x, jnp.ones_like(x), positions).logits, y)

        return compax.capture(module, *inputs, variables=variables, loss=of_logits)

    what = f"Flax GPT-2's with {layers} layers, vocabulary {config.vocab_size}"
    print_account(f"gradient of {what}, {batch} x {tokens} tokens", capture, inputs)


def head_programs(model_dim: int, vocabulary: int, inputs: tuple[Any, ...]) -> dict[str, compax.Program]:
    """The head and its loss alone."""
    params = {"head": jax.ShapeDtypeStruct((model_dim, vocabulary), jnp.float32)}

    def plain(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(x @ p["head"], y)

    whole = compax.capture(plain, params, *inputs)
    programs = {
        "optax": whole,
        "head and optax under jax.checkpoint": compax.capture(jax.checkpoint(plain), params, *inputs),
    }
    return programs | {text: compax.Pipeline.parse(text)(whole) for text in TILED}


def head_inputs(model_dim: int, batch: int, tokens: int) -> tuple[Any, ...]:
    """Shapes of hidden states and labels."""
    hidden = jax.ShapeDtypeStruct((batch, tokens, model_dim), jnp.float32)
    return hidden, jax.ShapeDtypeStruct((batch, tokens), jnp.int32)


def print_head(model_dim: int, vocabulary: int, batch: int, tokens: int) -> None:
    """The head and its loss alone, in float32."""
    inputs = head_inputs(model_dim, batch, tokens)
    title = f"gradient of a head {model_dim} x {vocabulary} and its loss, {batch} x {tokens} tokens, float32"
    print_programs(title, head_programs(model_dim, vocabulary, inputs), inputs)


def print_seconds(model_dim: int, vocabulary: int, batch: int, tokens: int, repetitions: int) -> None:
    """Seconds of the head and its loss alone, forward and backward."""
    inputs = head_inputs(model_dim, batch, tokens)
    hidden = jax.random.normal(jax.random.key(0), inputs[0].shape)
    labels = jax.random.randint(jax.random.key(1), inputs[1].shape, 0, vocabulary)
    params = {"head": 0.02 * jax.random.normal(jax.random.key(2), (model_dim, vocabulary))}
    rows: list[tuple[str, ...]] = []
    plain = 0.0
    for name, program in head_programs(model_dim, vocabulary, inputs).items():
        loss = lambda p, x, y, program=program: program.apply(p, {}, x, y)[0]  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        jax.block_until_ready(step(params, hidden, labels))
        samples: list[float] = []
        for _ in range(repetitions):
            start = time.perf_counter()
            jax.block_until_ready(step(params, hidden, labels))
            samples.append(time.perf_counter() - start)
        plain = plain or min(samples)
        rows.append((name, reporting.seconds(samples), f"{min(samples) / plain:.2f}"))
    reporting.print_table(
        f"Seconds, gradient of a head {model_dim} x {vocabulary} and its loss, {batch} x {tokens} tokens, float32",
        ("loss", "median (range)", "fastest against plain"),
        rows,
        basis="measured",
    )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=["decoder", "gpt2", "head"], default=["decoder", "gpt2", "head"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="in each sequence")
    parser.add_argument("--layers", type=int, default=30, help="of the decoder; GPT-2 has at most 2, unrolled")
    parser.add_argument("--time", action="store_true", help="also measure the head and its loss alone")
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.tokens)
    if "decoder" in arguments.tables:
        print_decoder(*shape, arguments.layers)
    if "gpt2" in arguments.tables:
        print_gpt2(*shape, min(2, arguments.layers))
    if "head" in arguments.tables:
        print_head(576, 49_152, *shape)
    if arguments.time:
        print_seconds(576, 49_152, 4, 1024, repetitions=3)


if __name__ == "__main__":
    main()
