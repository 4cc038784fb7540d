"""The print of a program: composites with their sites, gathered layers, totals, what passes did, and its width."""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
import zoo
from compax.experiments.benchmarks.bodies import BODIES
from compax.program_text import program_text
from small import abstract_decoder, program_of, run, unindented

D = 8


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


@functools.cache
def smollm2() -> compax.Program:
    return abstract_decoder("smollm2-135m")


def test_a_small_program() -> None:
    assert program_text(program_of()) == unindented(
        """
        program model(tokens: i32[2,4]) -> f32[2,4,12]                                256 parameters, 1.0 kB
          embed     embedding             @embed.embedding  f32[vocabulary 12, 8]
          blocks.0  linear         28.6%  @blocks.0.kernel  f32[8,8]
          blocks.1  linear         28.6%  @blocks.1.kernel  f32[8,8]
          norm      normalization         layer, weight+bias
          embed#2   linear         42.9%  @embed.embedding  f32[vocabulary 12, 8]
          and 2 parameters outside of composites and sites, 64 B
          1 composite: 1 normalization
          4 sites: 1 embedding, 3 linear; 3.6 kFLOPs a call (predicted)
        """
    )


def test_what_passes_did() -> None:
    program = run("quantize(at=blocks.*, activations=int8) | freeze(at=norm.*)", program_of())
    text = [line for line in str(program).splitlines() if "compared" not in line]
    assert text == unindented(
        """
        program model(tokens: i32[2,4]) -> f32[2,4,12]                                 256 parameters, 704 B
          embed     embedding             @embed.embedding  f32[vocabulary 12, 8]
          blocks.0  linear         28.6%  @blocks.0.kernel  int8[8,8]              activations int8
          blocks.1  linear         28.6%  @blocks.1.kernel  int8[8,8]              activations int8
          norm      normalization         layer, weight+bias
          embed#2   linear         42.9%  @embed.embedding  f32[vocabulary 12, 8]
          and 2 parameters outside of composites and sites, 64 B
          1 composite: 1 normalization
          4 sites: 1 embedding, 3 linear; 3.6 kFLOPs a call (predicted)
          2 of 7 parameters frozen
          1. quantize(at=blocks.*, activations=int8); 2 rewritten; 1.0 kB -> 704 B
          2. freeze(at=norm.*); 2 rewritten
        """
    ).split("\n")


def test_reasons_are_gathered() -> None:
    program = run('quantize(at="**:linear")', program_of())
    assert "     skipped embed#2: shared with embed, which is not selected" in str(program).splitlines()


def test_many_reasons_are_shortened() -> None:
    program = run("quantize(at=blocks.0.**) | quantize()", smollm2())
    (line,) = [line for line in str(program).splitlines() if "already" in line]
    assert line.startswith("     skipped blocks.0.attn.query, blocks.0.attn.key")
    assert line.endswith("more: already int8")
    assert 80 < len(line) <= 100


def test_equal_layers_are_gathered() -> None:
    """Composites once with their sites below, axes beside the sizes, names from the composite on where it is narrow."""
    assert program_text(smollm2()) == unindented(
        """
        program decoder(tokens: i32[2,16]) -> f32[2,16,49152]                    134.5M parameters, 538.1 MB
          embed                     embedding             @.embedding  f32[vocabulary 49152, model 576]
          blocks.{0..29}.attn_norm  normalization         rms, weight
          blocks.{0..29}.attn       attention      20.1%  causal, 9 on 3 heads of 64, rope half 64
            .query                  linear          7.4%  @.kernel     f32[model 576, heads*head_size 576]
            .key                    linear          2.5%  @.kernel     f32[model 576, groups*head_size 192]
            .value                  linear          2.5%  @.kernel     f32[model 576, groups*value_size 192]
            .matmul                 matmul          0.2%
            .matmul#2               matmul          0.2%
            .out                    linear          7.4%  @.kernel     f32[heads*value_size 576, model 576]
          blocks.{0..29}.mlp_norm   normalization         rms, weight
          blocks.{0..29}.mlp        feed_forward   59.0%  gated, silu, hidden 1536
            .gate                   linear         19.7%  @.kernel     f32[model 576, hidden 1536]
            .up                     linear         19.7%  @.kernel     f32[model 576, hidden 1536]
            .down                   linear         19.7%  @.kernel     f32[hidden 1536, model 576]
          norm                      normalization         rms, weight
          embed#2                   linear         21.0%  @.embedding  f32[vocabulary 49152, model 576]
          121 composites: 61 normalization, 30 attention, 30 feed_forward
          272 sites: 1 embedding, 211 linear, 60 matmul; 8.6 GFLOPs a call (predicted)
        """
    )


def test_wide_text_has_full_names() -> None:
    lines = program_text(smollm2(), width=140).splitlines()
    assert any(
        line.startswith("    blocks.{0..29}.mlp.down ") and "@blocks.{0..29}.mlp.down.kernel " in line for line in lines
    )


def test_a_declaration_that_fits_no_longer_is_said() -> None:
    program = smollm2().declare(at="blocks.0.attn", mask="causal")
    moved = program.replace(declared=(dataclasses.replace(program.declared[0], at="layers.0.attn"),))
    text = program_text(moved)
    assert "composites are not shown, because a declaration does not fit this entry" in text
    assert "blocks.{0..29}.attn.query" in text


def test_layers_that_differ_are_not_gathered() -> None:
    program = compax.Pipeline.parse('quantize(at="**, !blocks.3.**, !blocks.7.mlp.up")')(
        abstract_decoder("smollm2-135m")
    )
    text = str(program)
    assert re.search(r"blocks\.\{0\.\.2,4\.\.6,8\.\.29\}\.mlp\.up +linear .* int8\[", text)
    assert re.search(r"blocks\.\{3,7\}\.mlp\.up +linear .* f32\[", text)
    assert re.search(r"blocks\.3\.mlp\.down +linear .* f32\[", text)


def test_two_numbers_in_a_name() -> None:
    params = {"stages": [{"blocks": [{"w": ones(D, D)} for _ in range(3)]} for _ in range(10)]}

    def function(p: Any, x: jax.Array) -> jax.Array:
        for stage in p["stages"]:
            for block in stage["blocks"]:
                x = x @ block["w"]
        return x

    text = str(compax.capture(function, params, ones(4, D)))
    assert "  stages.{0..9}.blocks.{0..2}  linear   100%  @stages.{0..9}.blocks.{0..2}.w  f32[8,8]" in text


def test_numbered_names_of_linen() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(30):
                x = nn.Dense(D)(x)
            return x

    x = ones(2, D)
    text = str(compax.capture(Model(), x, variables=Model().init(jax.random.key(0), x)))
    assert "  Dense_{0..29}  linear   100%  @Dense_{0..29}.kernel  f32[8,8]" in text


def test_long_names_are_written_from_the_site_on() -> None:
    params = {"a_very_long_name_of_a_module" * 2: {"kernel_of_the_module": ones(D, D), "bias": ones(D)}}
    name = next(iter(params))

    def function(p: Any, x: jax.Array) -> jax.Array:
        return x @ p[name]["kernel_of_the_module"] + p[name]["bias"]

    text = str(compax.capture(function, params, ones(4, D)))
    assert f"  {name}  linear   100%  @.kernel_of_the_module  f32[8,8]" in text


def test_several_parameters_of_one_site() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([p["attn"]["q"], p["attn"]["k"]], 1)

    text = str(compax.capture(function, {"attn": {name: ones(D, D) for name in "qk"}}, ones(4, D)))
    lines = [line.split() for line in text.splitlines()[1:3]]
    assert lines == [["attn", "linear", "100%", "@attn.q", "f32[8,8]"], ["@attn.k", "f32[8,8]"]]


def test_loops_and_what_cannot_be_rewritten() -> None:
    bodies = {body.name: body for body in BODIES}

    def text_of(name: str) -> str:
        return str(compax.capture(bodies[name].make(), *bodies[name].inputs()))

    assert text_of("nested scans").splitlines()[1].endswith("x2 x3")
    assert text_of("while_loop").splitlines()[1].endswith("in a loop of unknown length")
    assert text_of("custom_vjp").splitlines()[2].startswith("    left as it is: inside custom_vjp_call")


def test_entries_state_and_trees() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx.BatchNorm(D, rngs=nnx.Rngs(0))

        def __call__(self, batch: dict[str, jax.Array]) -> Any:
            return {"y": self.norm(batch["x"]), "n": batch["y"]}

    batch = {"x": ones(4, D), "y": ones(3)}
    program = compax.capture(Model(), batch, mode="train").with_entry("eval", batch, mode="eval")
    first = str(program).splitlines()[0]
    assert first.startswith("program model.call(batch.x: f32[4,8], batch.y: f32[3]) -> (f32[3], f32[4,8])")
    assert program_text(program, "eval").startswith("program model.eval(")
    assert "  state: 2 arrays, 64 B" in str(program)
    assert "  entries: call, eval" in str(program)
    assert "  no sites" in str(program)


def test_many_arrays_are_counted() -> None:
    cache = {str(i): ones(2) for i in range(9)}
    program = compax.capture(lambda p, x, cache: (x @ p, cache), ones(D, D), ones(4, D), cache)
    assert str(program).startswith("program program(x: f32[4,8], cache: 9 arrays) -> 10 arrays")


def test_lines_keep_within_the_width() -> None:
    program = run("quantize(activations=int8)", smollm2())
    for width in (60, 80, 100, 160):
        lines = program_text(program, width=width).splitlines()
        assert len(lines[0]) <= width
        assert width < 100 or max(map(len, lines)) <= width


@zoo.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_models_of_others(name: str) -> None:
    model = zoo.load(name)
    options = {} if model.variables is None else {"variables": model.variables}
    program = compax.capture(model.module, *model.inputs, **options, **model.kwargs)
    for text in (program_text(program), program_text(program, ops=True)):
        assert "0x" not in text
        assert " object at " not in text
