"""What is read from compiled HLO: small compiles on eight CPU devices, and snippets as other compilers write them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from compax.analysis import hlo
from compax.analysis.hlo_text import bits, parse_shape


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, *shapes, **options) -> hlo.Module:
    """Compiles a function for shapes in float32 and parses what came out."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function, **options).lower(*arguments).compile().as_text())


def module(*lines: str, head: str = "HloModule m, is_scheduled=true, num_partitions=8", before: str = "") -> hlo.Module:
    return hlo.parse("\n".join([head, "", before, "ENTRY %main (p: f32[8,128]) -> f32[8,128] {", *lines, "}", ""]))


PARAMETER = "  %p = f32[8,128]{1,0} parameter(0)"


# -- Matrix products --------------------------------------------------------------------------------------------------


def test_a_product_counts_two_for_a_multiply_add():
    assert hlo.matmul_flops(compiled(lambda x, y: x @ y, (32, 48), (48, 64))) == {"float32": 2 * 32 * 48 * 64}


def test_a_batched_product():
    found = hlo.matmul_flops(compiled(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (4, 32, 48), (4, 48, 64)))
    assert found == {"float32": 2 * 4 * 32 * 48 * 64}


def test_products_in_a_loop_count_as_often_as_it_runs():
    def scanned(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    parsed = compiled(scanned, (16, 32), (7, 32, 32))
    assert hlo.matmul_flops(parsed) == {"float32": 7 * 2 * 16 * 32 * 32}
    assert parsed.unknown_loops == ()


def test_loops_in_loops():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    parsed = compiled(lambda x, layers: jax.lax.scan(inner, x, layers)[0], (16, 32), (5, 32, 32))
    assert hlo.matmul_flops(parsed) == {"float32": 15 * 2 * 16 * 32 * 32}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x + 1.0, x)

    parsed = compiled(until, (32, 32))
    assert hlo.matmul_flops(parsed) == {"float32": 2 * 32**3}
    assert len(parsed.unknown_loops) == 1


def test_the_gradient_of_a_product_takes_twice_its_work():
    def loss(x, y):
        return (x @ y).sum() ** 2

    found = hlo.matmul_flops(compiled(jax.grad(loss, argnums=(0, 1)), (32, 48), (48, 64)))
    assert found == {"float32": 3 * 2 * 32 * 48 * 64}


CONVOLUTIONS = {
    "as a product": ("bf16[512,256]", "bf16[512,128]", "bf16[128,256]", "dim_labels=bf_io->bf", 2 * 512 * 128 * 256),
    "batched by padding": (
        "bf16[2,512,512,2]",
        "bf16[2,512,128,1]",
        "bf16[512,2,2,128]",
        "window={size=2x2 pad=0_0x1_1 lhs_dilate=2x1 rhs_reversal=0x1}, dim_labels=0bf1_o01i->0bf1",
        2 * 2 * 2 * 512 * 512 * 128,
    ),
    "of an image": (
        "f32[1,8,8,16]",
        "f32[1,8,8,3]",
        "f32[3,3,3,16]",
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        2 * 16 * 3 * (8 * 3 - 2) ** 2,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_what_meets_data(name):
    out, left, right, attributes, expected = CONVOLUTIONS[name]
    layout = "{" + ",".join(map(str, reversed(range(out.count(",") + 1)))) + "}"
    parsed = module(
        f"  %a = {left} parameter(0)",
        f"  %b = {right} parameter(1)",
        f"  ROOT %c = {out}{layout} convolution(%a, %b), {attributes}",
    )
    assert sum(hlo.matmul_flops(parsed).values()) == expected


# -- Collectives ------------------------------------------------------------------------------------------------------


def test_gradients_of_data_parallel_training_are_reduced_once(mesh):
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(("data", "model")))
    parsed = compiled(
        jax.grad(lambda w, x: (jnp.tanh(x @ w) ** 2).sum()),
        (32, 16),
        (64, 32),
        in_shardings=(whole, split),
        out_shardings=whole,
    )
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes, found.group_size, found.count) == ("all-reduce", 4 * 32 * 16, 8, 1)
    assert found.wire_bytes == 2 * 4 * 32 * 16 * 7 / 8
    assert "dot_general" in found.op_name


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    def scanned(x, layers):
        def body(x, w):
            return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec())), None

        return jax.lax.scan(body, x, layers)[0]

    split = NamedSharding(mesh, PartitionSpec(None, "model", None))
    whole = NamedSharding(mesh, PartitionSpec())
    parsed = compiled(scanned, (16, 32), (6, 32, 32), in_shardings=(whole, split), out_shardings=whole)
    total = hlo.by_kind(hlo.collectives(parsed))["all-reduce"]
    assert (total.count, total.bytes) == (6, 6 * 4 * 16 * 32)


def test_a_gather_counts_what_it_gives(mesh):
    split, whole = NamedSharding(mesh, PartitionSpec("model")), NamedSharding(mesh, PartitionSpec())
    parsed = compiled(lambda x: x * 2, (64, 8), in_shardings=split, out_shardings=whole)
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes, found.group_size) == ("all-gather", 4 * 64 * 8, 4)


def test_a_program_on_one_device_has_none():
    assert hlo.collectives(compiled(lambda x: x * 2, (64, 8))) == ()


WORK = "  %w = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
NO_WORK = '  %w = s32[] custom-call(), custom_call_target="PrepareAsyncCallStart"'


@pytest.mark.parametrize(("between", "hidden"), [(WORK, True), (NO_WORK, False)])
def test_started_and_awaited_apart_counts_once(between: str, hidden: bool):
    parsed = module(
        PARAMETER,
        "  %s = (f32[8,128], f32[64,128]) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
        between,
        "  ROOT %d = f32[64,128]{1,0} all-gather-done(%s)",
    )
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes, found.asynchronous) == ("all-gather", 64 * 128 * 4, hidden)


@pytest.mark.parametrize(
    "start",
    [
        "((f32[8,128]), f32[1,128], u32[]) async-start(%p), calls=%wrapped",
        '((f32[8,128]), f32[1,128]) call-start(%p), async_execution_thread="sparsecore", to_apply=%wrapped',
    ],
)
def test_a_wrapped_collective_is_asynchronous(start: str):
    wrapped = "\n".join(
        [
            "%wrapped (q: f32[8,128]) -> f32[1,128] {",
            "  %q = f32[8,128]{1,0} parameter(0)",
            "  ROOT %r = f32[1,128]{1,0} reduce-scatter(%q), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add",
            "}",
            "",
        ]
    )
    parsed = module(
        PARAMETER,
        f"  %s = {start}",
        WORK,
        f"  ROOT %d = f32[1,128]{{1,0}} {'call' if 'call-start' in start else 'async'}-done(%s)",
        before=wrapped,
    )
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes, found.asynchronous, found.count) == ("reduce-scatter", 8 * 128 * 4, True, 1)


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    fused = "\n".join(
        [
            "%scatter (q: f32[8,128], i: s32[]) -> f32[1,128] {",
            "  %q = f32[8,128]{1,0} parameter(0)",
            "  %i = s32[] parameter(1)",
            "  %r = f32[8,128]{1,0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
            "  ROOT %k = f32[1,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={1,128}",
            "}",
            "",
        ]
    )
    parsed = module(
        PARAMETER,
        "  %i = s32[] partition-id()",
        "  ROOT %f = f32[1,128]{1,0} fusion(%p, %i), kind=kCustom, calls=%scatter",
        before=fused,
    )
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes) == ("reduce-scatter", 8 * 128 * 4)


def test_what_goes_between_slices_is_a_collective_of_slices():
    target = '_xla_megascale_target="{1,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f"is_host_transfer=true, frontend_attributes={{{target}}}"
    parsed = module(
        PARAMETER,
        "  %token = token[] after-all()",
        f"  %s = (f32[8,128], u32[], token[]) send(%p, %token), {attributes}",
        "  ROOT %d = token[] send-done(%s), is_host_transfer=true",
    )
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.bytes, found.group_size, found.between_slices) == ("all-reduce", 4096, 3, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[8], dimensions={1}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", (1, 2)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_however_they_are_written(text, expected):
    assert hlo.group(text, 8) == expected


# -- Loops ------------------------------------------------------------------------------------------------------------


def loop(limit: str, step: str = "1", start: str = "0", direction: str = "LT") -> hlo.Module:
    """A loop with no count beside it, as the TPU's compiler leaves it, with a permute inside."""
    bodies = "\n".join(
        [
            "%condition (c: (s32[], f32[8,128])) -> pred[] {",
            "  %c = (s32[], f32[8,128]{1,0}) parameter(0)",
            f"  %limit = s32[] constant({limit})",
            "  %counter = s32[] get-tuple-element(%c), index=0",
            f"  ROOT %less = pred[] compare(%counter, %limit), direction={direction}",
            "}",
            "",
            "%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {",
            "  %b = (s32[], f32[8,128]{1,0}) parameter(0)",
            "  %at = s32[] get-tuple-element(%b), index=0",
            f"  %one = s32[] constant({step})",
            "  %next = s32[] add(%at, %one)",
            "  %x = f32[8,128]{1,0} get-tuple-element(%b), index=1",
            "  %y = f32[8,128]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%next, %y)",
            "}",
            "",
        ]
    )
    return module(
        PARAMETER,
        f"  %zero = s32[] constant({start})",
        "  %init = (s32[], f32[8,128]{1,0}) tuple(%zero, %p)",
        "  %w = (s32[], f32[8,128]{1,0}) while(%init), condition=%condition, body=%body",
        "  ROOT %r = f32[8,128]{1,0} get-tuple-element(%w), index=1",
        before=bodies,
    )


@pytest.mark.parametrize(
    ("arguments", "trips"),
    [
        ({"limit": "4"}, 4),
        ({"limit": "4", "direction": "LE"}, 5),
        ({"limit": "9", "start": "3", "step": "2"}, 3),
        ({"limit": "6", "direction": "NE"}, 6),
        ({"limit": "0"}, 0),
    ],
)
def test_trips_from_the_condition(arguments, trips):
    parsed = loop(**arguments)
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.count, found.group_size) == ("permute", trips, 2)
    assert parsed.unknown_loops == ()


def test_a_counter_that_does_not_rise_is_unknown():
    assert loop("4", step="0").unknown_loops == ("w",)


# -- Shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "memory"),
    [
        ("f32[4,512]{1,0}", 4 * 512 * 4, 0),
        ("f32[4,1]{1,0:T(8,128)}", 8 * 128 * 4, 0),
        ("bf16[3,100]{0,1:T(8,128)(2,1)S(1)}", 104 * 128 * 2, 1),
        ("s4[10]{0}", 5, 0),
        ("pred[7]{0}", 7, 0),
        ("f8e4m3fn[16]{0:S(5)}", 16, 5),
        ("f32[]", 4, 0),
    ],
)
def test_sizes_with_the_padding_of_tiles(text, size, memory):
    shape, end = parse_shape(text, 0)
    assert (shape.nbytes, shape.memory, end) == (size, memory, len(text))


def test_tuples_of_shapes():
    shape, _ = parse_shape("((f32[2]{0}), s32[], /*index=2*/bf16[2,2]{1,0}) tuple(", 0)
    assert [leaf.nbytes for leaf in shape.leaves] == [8, 4, 8]


def test_an_unknown_element_type_is_told():
    with pytest.raises(ValueError, match="element type 'x9'"):
        bits("x9")


def test_text_that_is_none_is_refused():
    with pytest.raises(ValueError, match="has to start with 'HloModule'"):
        hlo.parse("module @jit_f {}")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")


def test_metadata_over_several_lines_does_not_end_a_computation():
    text = "\n".join(
        [
            "HloModule kernel",
            "",
            "ENTRY %main (p: f32[8]) -> f32[8] {",
            "  %p = f32[8]{0} parameter(0)",
            '  %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={metadata={',
            '"block_q":"512"',
            '}}, metadata={op_name="kernel"}',
            "  ROOT %n = f32[8]{0} negate(%k)",
            "}",
        ]
    )
    assert hlo.parse(text).computations["main"].root.name == "n"
