"""Training over a mesh: the losses of one device, files, and a checkpoint that goes on over another mesh."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from compax.errors import ShardingError
from compax.experiments import checkpoint, programs
from compax.experiments.console import Console
from compax.experiments.preemption import Preemption, Stopped
from compax.experiments.train import Trained, train
from compax.passes.shard import choosing
from compax.target import Target


def run(config) -> Trained:
    with Preemption() as preemption:
        return train(config, Console(), preemption)


def losses(config) -> np.ndarray:
    found = checkpoint.read_lines(Path(config.directory) / "metrics.jsonl")
    return np.array([line["loss"] for line in found if "loss" in line])


@pytest.mark.parametrize(
    "pipeline", ["shard(fsdp=2, tensor=2)", pytest.param("shard(data=4, zero=1)", marks=pytest.mark.slow)]
)
def test_losses_are_those_of_one_device(make, monkeypatch, pipeline):
    alone = make(steps=12)
    run(alone)
    # The machine's other four devices stay out.
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    several = make(steps=12, pipeline=pipeline, directory=f"{alone.directory}-sharded")
    trained = run(several)
    np.testing.assert_allclose(losses(several), losses(alone), rtol=1e-4)
    mesh = trained.program.placement.mesh
    assert mesh is not None
    assert mesh.size == 4
    if "fsdp" in pipeline:
        kernel = trained.program.params["blocks.0.mlp.up.kernel"]
        assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")


@pytest.mark.slow
def test_a_checkpoint_goes_on_over_another_mesh(make):
    whole = make(steps=8, pipeline="shard(fsdp=-1)", data__batch_size=8)
    run(whole)
    moved = make(steps=8, pipeline="shard(fsdp=-1)", data__batch_size=8, directory=f"{whole.directory}-moved")
    with Preemption() as preemption:
        preemption.received = signal.SIGTERM
        with pytest.raises(Stopped, match="after step 1;"):
            train(moved, Console(), preemption)
    devices = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        patch.setattr(jax, "device_count", lambda *_: 2)
        trained = run(moved)
    mesh = trained.program.placement.mesh
    assert mesh is not None
    assert mesh.size == 2
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-4)


def test_a_batch_that_does_not_divide(make):
    config = make(steps=5, pipeline="shard(data=8)", data__batch_size=6)
    with pytest.raises(ShardingError, match=r"make data\.batch_size a multiple of 8"):
        run(config)


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_choose_its_mesh_again(make, monkeypatch):
    config = make(steps=4, pipeline="shard(auto, target=v5e:2x4, compiles=0)", data__batch_size=8)
    first = run(config)
    assert first.program.placement.mesh is not None
    assert "auto" not in first.program.history[-1].text

    def refuse(*_):
        raise AssertionError("chosen again")

    monkeypatch.setattr(choosing, "choose", refuse)
    again = run(config)
    assert again.program.history[-1].text == first.program.history[-1].text


def test_a_plan_writes_out_what_is_chosen(make):
    config = make(pipeline="shard(auto, compiles=0) | remat(keep=nothing)", data__batch_size=8)
    settled, told = programs.settled(config, Target.parse("v5e:2x4"))
    assert "auto" not in settled.pipeline
    assert settled.pipeline.endswith(" | remat()")
    assert "auto chose of" in told[0]
    assert programs.settled(settled, Target.parse("v5e:2x4")) == (settled, ())
