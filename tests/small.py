"""A small model of tokens, and what tests of a pass do with it: capture, run pipelines, look at what was done."""

import dataclasses
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import compax
from compax import Pipeline, Program
from compax.models import decoder

D = 8


def values(*shape: int, seed: int = 0) -> jax.Array:
    """Normally distributed, with another spread in each column: float32[shape]."""
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.normal(size=shape) * generator.uniform(0.2, 2, size=shape[-1]), jnp.float32)


class Model(nnx.Module):
    """Tokens through an embedding and two layers onto a tied head."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(12, D, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.embed.attend(self.norm(x))


TOKENS = jnp.asarray([[0, 3, 11, 5], [7, 7, 1, 2]])


def program_of(model: nnx.Module | None = None, *inputs: Any, **options: Any) -> Program:
    """A model captured; by default the small one."""
    return compax.capture(model or Model(), *(inputs or (TOKENS,)), **options)


def run(pipeline: str, program: Program) -> Program:
    """The program after a pipeline in text form."""
    return Pipeline.parse(pipeline)(program)


def statuses(program: Program) -> dict[str, str]:
    """What the last pass did, by site."""
    return {site.name: site.status for site in program.history[-1].sites}


def reasons(program: Program) -> dict[str, str]:
    """Why, by site, as far as the last pass gave a reason."""
    return {site.name: site.reason for site in program.history[-1].sites if site.reason}


def unindented(text: str) -> str:
    """A golden text, without the indentation of the test that holds it."""
    return textwrap.dedent(text).strip("\n")


def abstract_decoder(size: str, **options: Any) -> Program:
    """The program of a decoder of a named size, without arrays."""
    config = dataclasses.replace(decoder.SIZES[size], **options)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    return compax.capture(model, *decoder.example_inputs(config, sequence=16))
