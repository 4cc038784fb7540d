"""Targets: their texts, what chips there are, and times that can be worked out by hand."""

import copy
import dataclasses
import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

import compax.cpu
from compax.chips import CHIPS, GIB, Chip, Shapes
from compax.errors import TargetError
from compax.target import KINDS, Target, measured_cpu


@pytest.mark.parametrize(
    ("text", "num_chips", "num_devices"),
    [
        ("v5e", 1, 1),
        ("v5e:4x4", 16, 16),
        ("v5e:4x4*2", 32, 32),
        ("v5p:4x4x8", 128, 128),
        ("v5p:16x20x28", 8960, 8960),
        ("v4:2x2x1", 4, 4),
        ("tpu7x:2x2x1", 4, 8),
        ("tpu7x:16x16x36", 9216, 18432),
        ("h100:8", 8, 8),
        ("h100:8*4", 32, 32),
        ("cpu", 1, 1),
    ],
)
def test_texts_of_targets_round_trip(text: str, num_chips: int, num_devices: int) -> None:
    target = Target.parse(text)
    assert str(target) == text
    assert Target.parse(str(target)) == target
    assert hash(Target.parse(text)) == hash(target)
    assert (target.num_chips, target.num_devices) == (num_chips, num_devices)


def test_case_spaces_and_sizes_of_one_do_not_matter() -> None:
    assert Target.parse(" V5E:4x4 ") == Target.parse("v5e:4x4")
    assert Target.parse("v5e:1x1") == Target.parse("v5e")
    assert str(Target.parse("v5e:1x1*1")) == "v5e"


@hypothesis.given(st.text(alphabet="v5eph10x:*, 248", max_size=12))
def test_any_text_is_a_target_or_a_target_error(text: str) -> None:
    try:
        target = Target.parse(text)
    except TargetError:
        return
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5x", "unknown chip 'v5x'; did you mean v5"),
        ("hopper", "Known: v4, v5e"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimension.* not 3"),
        ("v5p:4x4", "a slice of v5p has 3 dimension.* not 2"),
        ("v5e:3x3", "v5e has no such slice; those that exist: 1x1, 2x2, 2x4"),
        ("v6e:16x32", "v6e has no such slice"),
        ("v5p:4x4x6", "multiples of 4 up to 16x20x28"),
        ("v5p:32x4x4", "v5p has no such slice"),
        ("h100:16", "write several nodes as h100:8[*]2"),
        ("v5e:0x4", "at least 1"),
        ("v5e:4x4*0", "at least 1"),
        ("cpu:8", "cpu has no such slice"),
        ("cpu*2", "there is one slice"),
        ("", "is no target"),
        ("v5e:4,4", "write a chip, a shape after ':'"),
        ("v5e:4x4**2", "is no target"),
    ],
)
def test_errors_say_what_exists(text: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Target.parse(text)


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_of_a_chip_names_its_source(name: str) -> None:
    chip = CHIPS[name]
    unneeded = {"name", "platform", "sources"}
    figures = {field.name for field in dataclasses.fields(chip) if getattr(chip, field.name) not in (None, 0.0)}
    assert figures - unneeded <= set(chip.sources)
    assert set(chip.sources) <= figures
    assert all(text for text in chip.sources.values())


@pytest.mark.parametrize("name", CHIPS)
def test_figures_of_a_chip_are_plausible(name: str) -> None:
    chip = CHIPS[name]
    assert chip.name == name
    assert 1e14 < chip.flops["bfloat16"] < 1e16
    assert 16 * GIB <= chip.memory_bytes <= 192 * GIB
    assert chip.link.bytes_per_second * chip.link.per_chip < chip.memory_bandwidth
    assert chip.network_bandwidth is not None
    assert chip.network_bandwidth < chip.link.bytes_per_second * chip.link.per_chip
    assert chip.vector_flops is None or chip.vector_flops < chip.flops["bfloat16"]
    assert copy.deepcopy(chip) == chip  # by way of what pickle does


def test_a_chip_of_ones_own_is_a_target() -> None:
    chip = dataclasses.replace(CHIPS["h100"], name="mine", memory_bytes=24 * GIB)
    target = Target(chip, (2,))
    assert str(target) == "mine:2"
    assert target.device_memory_bytes == 24 * GIB


def test_a_torus_closes_where_the_hardware_says() -> None:
    flat, deep = CHIPS["v5e"].shapes, CHIPS["v5p"].shapes
    assert flat.wraps((8, 16)) == (False, True)
    assert flat.wraps((4, 4)) == (False, False)
    assert deep.wraps((4, 4, 8)) == (True, True, True)
    assert deep.wraps((2, 4, 4)) == (False, False, False)  # less than a cube
    assert not Shapes(dims=1, listed=((8,),)).contain((4, 2))


@pytest.mark.parametrize(
    ("text", "dtype", "unit", "flops"),
    [
        ("v5e", "bfloat16", "bfloat16", 197e12),
        ("v5e", "int8", "int8", 393e12),
        ("v5e", "uint8", "int8", 393e12),
        ("v5e", "int4", "int4", 788e12),
        ("v5e", "float32", "bfloat16", 197e12),
        ("v5e", "float8_e4m3fn", "bfloat16", 197e12),
        ("v4", "int4", "int8", 275e12),
        ("tpu7x", "bfloat16", "bfloat16", 2307e12 / 2),  # of a device, and a chip is two
        ("tpu7x", "float8_e5m2", "float8_e4m3fn", 4614e12 / 2),
        ("tpu7x", "int8", "bfloat16", 2307e12 / 2),
        ("h100", jnp.float32, "tensorfloat32", 494.5e12),
        ("h100", jnp.float8_e4m3fn, "float8_e4m3fn", 1979e12),
        ("h100", jnp.int4, "int8", 1979e12),
        ("a100", jnp.float8_e4m3fn, "bfloat16", 312e12),
        ("b200", "float4_e2m1fn", "float4_e2m1fn", 9000e12),
        ("h100", "float64", "float64", 67e12),
    ],
)
def test_a_dtype_is_computed_by_the_nearest_unit(text: str, dtype: object, unit: str, flops: float) -> None:
    rate = Target.parse(text).rate(dtype)
    assert rate.unit == unit
    assert rate.flops_per_second == pytest.approx(flops)
    assert bool(rate.note) == (unit != (dtype if isinstance(dtype, str) else jnp.dtype(dtype).name))


def test_float32_costs_passes_of_bfloat16_or_its_own_unit() -> None:
    tpu, gpu = Target.parse("v5p"), Target.parse("h100")
    assert tpu.rate("float32", "high").flops_per_second == pytest.approx(153e12)
    assert tpu.rate("float32", "highest").flops_per_second == pytest.approx(76.5e12)
    assert "6 pass" in tpu.rate("float32", "highest").note
    assert gpu.rate("float32", "highest").flops_per_second == pytest.approx(67e12)


@pytest.mark.parametrize(("text", "dtype"), [("v5e", "float64"), ("h100", "complex64"), ("v5e", "int32")])
def test_a_dtype_that_no_unit_computes_is_an_error(text: str, dtype: str) -> None:
    with pytest.raises(TargetError, match=f"no unit for products of {dtype}; it has some for .*bfloat16"):
        Target.parse(text).rate(dtype)


def test_products_that_no_unit_computes_are_operations_on_vectors() -> None:
    target, cpu = Target.parse("v5e"), Target.parse("cpu")
    assert target.chip.vector_flops is not None
    assert target.product_rate("int32") == target.chip.vector_flops
    assert target.product_rate("bfloat16") == 197e12
    assert target.roofline({"int32": target.chip.vector_flops}, 0.0).seconds == pytest.approx(1.0)
    assert (
        dataclasses.replace(cpu, chip=dataclasses.replace(cpu.chip, vector_flops=None)).product_rate("int32")
        == math.inf
    )
    with pytest.raises(TargetError, match="is no dtype"):
        target.product_rate(object())


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(TargetError, match="unknown precision 'exact'; known: default, high, highest"):
        Target.parse("v5e").rate("float32", "exact")


def test_what_is_no_dtype_is_an_error() -> None:
    with pytest.raises(TargetError, match="is no dtype"):
        Target.parse("v5e").rate(object())


def test_a_roofline_is_the_larger_of_compute_and_memory() -> None:
    target = Target.parse("v5e")
    assert target.roofline_seconds({"bfloat16": 197e12}, 0.0) == pytest.approx(1.0)
    assert target.roofline_seconds({}, 819e9) == pytest.approx(1.0)
    assert target.roofline_seconds({"bfloat16": 197e12, "int8": 393e12}, 819e9) == pytest.approx(2.0)
    roofline = target.roofline({"bfloat16": 197e9}, 819e9)
    assert roofline.bound == "memory"
    assert str(roofline) == "1 s predicted, bound by memory (compute 0.001 s, memory 1 s)"
    assert target.roofline({"bfloat16": 197e12}, 819e9 / 2).bound == "compute"


@pytest.mark.parametrize(
    ("text", "gib"),
    [("v4:2x2x1", 30.75), ("v5e:2x2", 15.75), ("v5p:2x2x1", 95.74), ("v6e:2x2", 31.25), ("tpu7x:2x2x1", 94.75)],
)
def test_memory_of_a_device_is_what_the_compiler_says_is_available(text: str, gib: float) -> None:
    assert Target.parse(text).device_memory_bytes / GIB == pytest.approx(gib)


def test_bandwidth_of_a_device_is_its_share_of_the_chip() -> None:
    assert Target.parse("tpu7x").device_memory_bandwidth == pytest.approx(3690e9)
    assert Target.parse("v5p").device_memory_bandwidth == pytest.approx(2765e9)


HOP, ICI = 1e-6, 50e9  # of v5e


@pytest.mark.parametrize(
    ("kind", "shape", "size", "hops", "transfer"),
    [
        ("all-gather", "16x16", 16, 8, 15 / 16 / (2 * ICI)),  # a ring of 16, both ways
        ("reduce-scatter", "16x16", 16, 8, 15 / 16 / (2 * ICI)),
        ("all-reduce", "16x16", 16, 16, 2 * 15 / 16 / (2 * ICI)),
        ("all-gather", "4x4", 4, 3, 3 / 4 / ICI),  # an open line: its end takes all in by one link
        ("all-gather", "4x8", 8, 7, 7 / 8 / ICI),  # the dimension of size 8
        ("all-gather", "16x16", 256, 16, 255 / 256 / (4 * ICI)),  # both dimensions
        ("all-to-all", "16x16", 16, 8, 16 / 8 / ICI),  # V n / (8 w)
        ("all-to-all", "4x4", 4, 3, 1 / ICI),  # V n / (4 w)
        ("permute", "16x16", 16, 1, 1 / ICI),
        ("all-gather", "4x4", 8, 7, 7 / 8 / ICI),  # lies along no dimensions
    ],
)
def test_collectives_over_a_torus(kind: str, shape: str, size: int, hops: int, transfer: float) -> None:
    collective = Target.parse(f"v5e:{shape}").collective(kind, 1e9, size)
    assert collective.latency_seconds == pytest.approx(hops * HOP)
    assert collective.transfer_seconds == pytest.approx(transfer * 1e9)
    assert Target.parse(f"v5e:{shape}").collective_seconds(kind, 1e9, size) == pytest.approx(collective.seconds)


def test_a_line_has_the_bisection_that_brute_force_counts() -> None:
    for size in (2, 3, 4, 5, 8):
        loads = [0.0] * (size - 1)
        for origin in range(size):
            for to in range(origin + 1, size):  # one direction is enough: the other is its mirror image
                for link in range(origin, to):
                    loads[link] += 1 / size
        collective = Target.parse("v5e:16x16").collective("all-to-all", 1.0, size)
        assert collective.transfer_seconds == pytest.approx(max(loads) / ICI)


def test_a_ring_has_the_load_that_brute_force_counts() -> None:
    size, load = 16, 0.0
    for distance in range(1, size):  # bytes times links that one member's share takes, over its two directions
        load += min(distance, size - distance) / size / 2
    assert Target.parse("v5e:16x16").collective("all-to-all", 1.0, size).transfer_seconds == pytest.approx(load / ICI)


@pytest.mark.parametrize(
    ("kind", "steps", "transfer"),
    [
        ("all-gather", 7, 7 / 8),
        ("reduce-scatter", 7, 7 / 8),
        ("all-reduce", 14, 14 / 8),
        ("all-to-all", 7, 7 / 8),
        ("permute", 1, 1.0),
    ],
)
def test_collectives_over_a_switch_and_over_the_network(kind: str, steps: int, transfer: float) -> None:
    target = Target.parse("h100:8*8")
    inside, between = target.collective(kind, 1e9, 8), target.collective(kind, 1e9, 8, "dcn")
    assert inside.transfer_seconds == pytest.approx(transfer * 1e9 / 450e9)
    assert inside.latency_seconds == pytest.approx(steps * 2e-6)
    assert between.transfer_seconds == pytest.approx(transfer * 1e9 / 50e9)
    assert between.latency_seconds == pytest.approx(steps * 5e-6)


def test_devices_of_one_chip_share_its_links() -> None:
    target = Target.parse("tpu7x:4x4x4")
    inside, apart, together = (target.collective("all-gather", 1e9, size) for size in (2, 4, 8))
    assert inside.transfer_seconds == pytest.approx(1 / 2 * 1e9 / 600e9)
    assert apart.transfer_seconds == pytest.approx(3 / 4 * 1e9 / 100e9)  # 2 * 100e9, halved
    assert together.transfer_seconds == pytest.approx(7 / 8 * 1e9 / 200e9)
    assert "2 devices share" in apart.assumption
    assert "share" not in together.assumption


def test_a_group_of_one_costs_nothing() -> None:
    for kind in KINDS:
        assert Target.parse("v5e").collective_seconds(kind, 1e9, 1) == 0.0
        assert Target.parse("cpu").collective_seconds(kind, 1e9, 1, "dcn") == 0.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("all-gather", 1.0, 32), "v5e:4x4[*]2 has 16 device"),
        (("all-gather", 1.0, 3, "dcn"), "has 2 slice"),
        (("all-gather", 1.0, 0), "a group of 0"),
        (("all-gather", 1.0, 2, "pcie"), "unknown network 'pcie'"),
        (("broadcast", 1.0, 2), "unknown collective 'broadcast'; known: all-gather"),
    ],
)
def test_collectives_that_cannot_be(arguments: tuple, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Target.parse("v5e:4x4*2").collective(*arguments)


def test_parsing_a_cpu_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def measured() -> Chip:
        reads.append("read")
        return dataclasses.replace(CHIPS["h100"], name="cpu", platform="cpu", flops={"float32": 1e11})

    monkeypatch.setattr(compax.cpu, "measured_cpu", measured)
    target = Target.parse("cpu")
    text = f"{target} {target.chip!r} {target.num_devices} {target.chip.platform} {target.chip.sources['flops']}"
    assert target == Target.parse("cpu")
    assert target != Target.parse("v5e")
    assert "measured" in text
    assert not reads
    assert target.rate("float32").flops_per_second == 1e11
    assert reads == ["read"]
    with pytest.raises(AttributeError):
        target.chip.nothing  # noqa: B018


def test_the_cpu_is_measured_once() -> None:
    chip = measured_cpu()
    assert chip is measured_cpu()
    assert {"float32", "bfloat16", "float16", "int8"} == set(chip.flops)
    assert all(1e8 < rate < 1e14 for rate in chip.flops.values())
    assert 1e8 < chip.memory_bandwidth < 1e12
    assert 2**28 < chip.memory_bytes < 2**45
    assert Target.parse("cpu").rate("int4").unit == "int8"
    assert Target.parse("cpu").chip.flops == chip.flops
    assert copy.deepcopy(Target.parse("cpu")).chip.flops == chip.flops


def test_the_cpu_is_measured_while_a_function_is_traced() -> None:
    measured_cpu.cache_clear()
    traced = jax.jit(lambda x: x * measured_cpu().flops["float32"])
    assert traced(jnp.float32(1.0)) > 1e8


def test_chips_and_targets_import_no_jax_of_their_own() -> None:
    code = (
        "import sys, types, pathlib\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "package = types.ModuleType('compax'); package.__path__ = [str(root)]; sys.modules['compax'] = package\n"
        "import compax.target as target\n"
        "assert str(target.Target.parse('cpu')) == 'cpu'\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, compax.cpu.__file__.rsplit("/", 1)[0]], check=True)
