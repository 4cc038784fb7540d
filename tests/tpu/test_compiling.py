"""Compiles in a child process: for CPUs everywhere, for slices of TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from compax.errors import CompileError, ShardingError
from compax.target import Target
from compax.tpu import Request, compile_for, compiling, parse_mesh
from compax.tpu.options import compiler_options
from compax.tpu.worker import exhausted

KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
"""What JAX calls chips from v4 to tpu7x."""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler of TPUs: pip install -e '.[tpu]'"
)


@pytest.fixture(autouse=True)
def builders(monkeypatch):
    """Lets child processes import `builders`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.fixture
def set_level():
    """Sets JAX's effort of compiling for one test."""
    name = "jax_optimization_level"
    yield lambda level: jax.config.update(name, level)
    jax.config.update(name, "UNKNOWN")


def request(builder: str, target: str = "cpu", mesh: str = "data=4", hlo: str | None = None, **arguments) -> Request:
    parsed = Target.parse(target)
    return Request(parsed, parse_mesh(mesh, parsed), f"builders:{builder}", arguments, hlo)


def test_figures_come_back(tmp_path):
    phases = []
    kept = tmp_path / "text.hlo"
    compiled = compile_for(request("product", rows=64, hlo=str(kept)), lambda phase, seconds: phases.append(phase))
    assert phases == ["start", "build", "lower", "compile", "read"] == list(compiled.seconds)
    assert compiled.facts == {"rows": 64, "level": "UNKNOWN"}
    assert compiled.flops == {"float32": 2 * 16 * 128 * 256}
    (reduced,) = compiled.collectives
    assert (reduced.kind, reduced.bytes, reduced.group_size) == ("all-reduce", 4, 4)
    assert compiled.memory is not None
    assert compiled.memory.arguments == (16 * 128 + 128 * 256) * 4
    assert compiled.shortage is None
    assert compiled.host_bytes > 50e6
    assert compiled.buffers
    assert kept.read_text().startswith("HloModule")


def test_the_compiler_tries_as_hard_as_is_asked(set_level):
    quick = dataclasses.replace(request("product", rows=64), quick=True)
    assert compile_for(quick).facts["level"] == "O0"
    set_level("O1")
    assert compile_for(request("product", rows=64)).facts["level"] == "O1"


def test_options_reach_the_compiler():
    wrong = dataclasses.replace(request("product", rows=64), options={"xla_no_such_option": "true"})
    with pytest.raises(CompileError, match="xla_no_such_option"):
        compile_for(wrong)


def test_how_chips_send_while_they_compute():
    every = compiler_options("tpu")
    by_kind = {kind: compiler_options("tpu", kind) for kind in KINDS}
    assert [kind for kind, found in by_kind.items() if any("sparse_core" in name for name in found)] == [
        "TPU v5",
        "TPU v6 lite",
        "TPU7x",
    ]
    # Inside of kernels on v5e alone: elsewhere new compilers refuse it.
    fused = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"
    assert [kind for kind, found in by_kind.items() if found[fused] == "true"] == ["TPU v5 lite"]
    assert by_kind["TPU v4"] == every
    assert compiler_options("cpu", "cpu") == {}


def test_our_errors_come_back_as_they_are():
    with pytest.raises(ShardingError, match=r"^a batch of 3 does not divide$"):
        compile_for(request("refused"))


def test_errors_of_others_are_told_in_one_line():
    with pytest.raises(CompileError) as told:
        compile_for(request("broken"))
    assert str(told.value) == "compiling for cpu failed: KeyError: 'nothing there'"


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("killed", "ended by SIGKILL in the phase 'build', most likely"),
        ("left", "ended with code 3 in the phase 'build'"),
    ],
)
def test_a_child_that_dies(builder, words, tmp_path):
    with pytest.raises(CompileError) as told:
        compile_for(request(builder, hlo=str(tmp_path / "text.hlo")))
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.39G) exceeds "
    "available HBM (15.75G).": (61.39, 15.75),
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by "
    "4.75G.": (20.5, 15.75),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_program_that_does_not_fit(message):
    needed, limit = MESSAGES[message]
    assert exhausted(message) == (round(needed * 2**30), round(limit * 2**30))
    shortage = compile_for(request("exhausted", message=message)).shortage
    assert shortage is not None
    assert (shortage.needed, shortage.limit) == (round(needed * 2**30), round(limit * 2**30))


def test_a_shortage_without_figures():
    assert exhausted("RESOURCE_EXHAUSTED: out of something") is None


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"pip install -e '\.\[tpu\]'.*libtpu .* goes with jax"):
        compile_for(request("product", "v5e:2x2", rows=64))


def test_which_compiler_goes_with_this_jax():
    version = compiling.libtpu_version()
    assert version is not None
    assert version.startswith("==0.")


def test_a_gpu_has_no_compiler_here():
    with pytest.raises(CompileError, match="only slices of TPUs"):
        compile_for(request("product", "h100:4", rows=64))


def test_an_interrupt_ends_the_child(monkeypatch):
    started: list[subprocess.Popen] = []
    original = subprocess.Popen

    def start(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(compiling.subprocess, "Popen", start)

    def interrupt(phase, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_for(request("product", rows=64), interrupt)
    assert started[0].poll() is not None


def test_importing_opens_no_device():
    # New JAX imports libtpu itself, where it is installed.
    code = "import sys, jax; before = 'libtpu' in sys.modules; import compax.tpu"
    code += "; sys.exit(('libtpu' in sys.modules) != before)"
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0


@needs_libtpu
def test_a_slice_that_is_not_there():
    compiled = compile_for(request("product", "v5e:2x2", "data=4", rows=64))
    assert sum(compiled.flops.values()) == 2 * 16 * 128 * 256
    assert compiled.memory is not None
    assert compiled.memory.arguments == (16 * 128 + 128 * 256) * 4
    assert [found.kind for found in compiled.collectives] == ["all-reduce"]


@needs_libtpu
def test_a_slice_that_is_too_small():
    shortage = compile_for(request("product", "v5e:1x1", "data=1", rows=2**26)).shortage
    assert shortage is not None
    assert shortage.needed is not None
    assert shortage.limit is not None
    assert shortage.needed > shortage.limit > 15 * 2**30


@needs_libtpu
@pytest.mark.parametrize(
    ("target", "mesh", "groups"),
    [
        ("v4:2x2x1", "data=4", [(4, False)]),
        ("v5p:2x2x1", "data=4", [(4, False)]),
        ("v6e:2x2", "data=4", [(4, False)]),
        ("tpu7x:2x2x1", "data=8", [(8, False)]),
        ("v5e:4x4", "data=2,model=8", [(2, False)]),
        ("v5e:2x2*2", "data=8", [(4, False), (2, True)]),
    ],
)
def test_slices_and_meshes(target, mesh, groups):
    compiled = compile_for(request("product", target, mesh, rows=64))
    assert {found.kind for found in compiled.collectives} == {"all-reduce"}
    assert [(found.group_size, found.between_slices) for found in compiled.collectives] == groups


@needs_libtpu
def test_a_mesh_that_cannot_be_laid_over_slices():
    with pytest.raises(ShardingError, match="which 2 slices do not divide"):
        compile_for(request("product", "v5e:2x2*2", "data=1,model=8", rows=64))
