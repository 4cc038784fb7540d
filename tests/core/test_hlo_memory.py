"""Buffers and memory traffic of compiled HLO: small compiles on a CPU, and snippets as a TPU's compiler writes them."""

import jax
import jax.numpy as jnp

from compax.analysis import hlo, hlo_memory


def compiled(function, *shapes, **options) -> hlo.Module:
    """Compiles a function for shapes in float32 and parses what came out."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function, **options).lower(*arguments).compile().as_text())


def module(*lines: str, head: str = "HloModule m, is_scheduled=true, num_partitions=8", before: str = "") -> hlo.Module:
    return hlo.parse("\n".join([head, "", before, "ENTRY %main (p: f32[8,128]) -> f32[8,128] {", *lines, "}", ""]))


PARAMETER = "  %p = f32[8,128]{1,0} parameter(0)"


def test_the_largest_buffers_name_their_operation():
    def function(x, y):
        product = x @ y
        return jnp.sin(product).sum() + jnp.cos(x).sum(), product

    first = hlo_memory.largest_buffers(compiled(function, (256, 8), (8, 256)))[0]
    assert (first.bytes, first.shape) == (256 * 256 * 4, "f32[256,256]")
    assert first.op_name.startswith("jit(function)/")


def test_what_lies_in_other_memories_is_no_buffer_and_no_traffic():
    parsed = module(
        PARAMETER,
        "  %near = f32[8,128]{1,0:S(1)} copy(%p)",
        "  ROOT %far = f32[8,128]{1,0} negate(%near)",
    )
    assert [buffer.name for buffer in hlo_memory.largest_buffers(parsed)] == ["far"]
    assert hlo_memory.memory_traffic(parsed) == 2 * 8 * 128 * 4


def test_reading_a_layer_of_a_stack_moves_the_layer():
    def scanned(x, layers):
        return jax.lax.scan(lambda x, w: (x * w, None), x, layers)[0]

    moved = hlo_memory.memory_traffic(compiled(scanned, (1024,), (50, 1024)))
    once = 1024 * 4
    assert 3 * 50 * once <= moved < 8 * 50 * once


def test_a_slice_inside_of_a_fusion_in_a_fusion_reads_the_slice():
    inner = """%inner (q: f32[50,128], i: s32[]) -> f32[1,128] {
  %q = f32[50,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %r = f32[1,128]{1,0} dynamic-slice(%q, %i, %z), dynamic_slice_sizes={1,128}
}

%outer (s: f32[50,128], j: s32[]) -> f32[1,128] {
  %s = f32[50,128]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[1,128]{1,0} fusion(%s, %j), kind=kLoop, calls=%inner
  ROOT %n = f32[1,128]{1,0} negate(%f)
}
"""
    parsed = module(
        "  %a = f32[50,128]{1,0} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  ROOT %g = f32[1,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%outer",
        before=inner,
    )
    assert hlo_memory.memory_traffic(parsed) == 2 * 128 * 4 + 4


def test_an_update_in_place_writes_the_update():
    fused = """%update (s: f32[50,128], u: f32[1,128], j: s32[]) -> f32[50,128] {
  %s = f32[50,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %r = f32[50,128]{1,0} dynamic-update-slice(%s, %u, %j, %z)
}
"""
    parsed = module(
        "  %a = f32[50,128]{1,0} parameter(0)",
        "  %b = f32[1,128]{1,0} parameter(1)",
        "  %i = s32[] parameter(2)",
        "  ROOT %g = f32[50,128]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%update",
        before=fused,
    )
    assert hlo_memory.memory_traffic(parsed) == 2 * 128 * 4 + 4
