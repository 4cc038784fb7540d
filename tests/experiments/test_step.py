"""The train step: arrays that live in host memory, on the device for the step alone."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax import Program
from compax.errors import ConfigError, PlacementError
from compax.experiments import config as configs
from compax.experiments.step import given_options, make_step, start
from compax.models import decoder
from compax.pipeline import Pipeline
from compax.placement import HOST, check_memory

TINY = decoder.SIZES["tiny"]


def training(pipeline: str) -> tuple[Any, Program]:
    config = configs.default()
    model = decoder.Decoder(TINY, rngs=nnx.Rngs(0))
    batch = {"tokens": decoder.example_inputs(TINY, sequence=9)[0]}
    program = compax.capture(model, batch, loss=decoder.loss, mode="train", entry="train")
    return config, Pipeline.parse(pipeline)(program) if pipeline else program


def kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    "pipeline",
    [
        "offload()",
        pytest.param("offload(parameters=true, at=blocks.**)", marks=pytest.mark.slow),
        pytest.param("offload(optimizer=false, parameters=true)", marks=pytest.mark.slow),
        pytest.param("freeze(at=embed.**) | offload(parameters=true)", marks=pytest.mark.slow),
        pytest.param("quantize(weights=int8, train=true) | offload(parameters=true)", marks=pytest.mark.slow),
    ],
)
def test_training_computes_the_same(pipeline: str) -> None:
    """The same numbers step by step, with arrays where they were put: at the start and after each step."""
    *before, last = pipeline.split(" | ")
    config, plain = training(" | ".join(before))
    _, moved = training(pipeline)
    assert last.startswith("offload")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (1, 2, 9)), jnp.int32)
    states = []
    for program in (plain, moved):
        state, frozen = start(config, program)
        step = make_step(config, program)
        for _ in range(3):
            assert kinds(state.optimizer) == {program.placement.optimizer_memory}
            for path, x in {**state.params, **frozen}.items():
                assert kinds(x) == {program.placement.memory_kind(path)}
            state, metrics = step(state, frozen, tokens)
        states.append((state, metrics))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_options_of_the_compiler() -> None:
    config, program = training("")
    config.compiler.options = ("xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_min_max=true")
    assert given_options(config) == {"xla_cpu_enable_fast_math": False, "xla_cpu_enable_fast_min_max": True}
    tokens = jnp.zeros((1, 2, 9), jnp.int32)
    assert make_step(config, program)(*start(config, program), tokens)[1]["skipped"] == 0
    config.compiler.options = ("xla_no_such_option=1",)
    with pytest.raises(ConfigError, match=r"compiler\.options: .*xla_no_such_option"):
        make_step(config, program)
    config.compiler.options = ("xla_cpu_enable_fast_math",)
    with pytest.raises(ConfigError, match=r"compiler\.options: 'xla_cpu_enable_fast_math' is no NAME=VALUE"):
        make_step(config, program)


def test_a_device_without_such_memory_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(addressable_memories=lambda: [memory], device_kind="small chip", platform="none")
    with pytest.raises(PlacementError, match=r"'pinned_host' is wanted, but small chip \(none\) reaches only: device"):
        check_memory(device, frozenset({HOST}))
    config, program = training("offload()")
    monkeypatch.setattr(jax, "local_devices", lambda *_: [device])
    with pytest.raises(PlacementError, match="leave the pass that asks for it out"):
        start(config, program)
