"""Training in several processes, real ones with CPU devices: as in one process, over any number of them, to the end."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from compax.experiments import checkpoint
from compax.experiments.console import Console
from compax.experiments.preemption import Preemption
from compax.experiments.train import train
from compax.tpu import distributed

WORKER = """
import functools, sys
from compax.experiments import cli
from compax.tpu import distributed
# Many processes on few cores are silent for seconds without being gone.
distributed.initialize = functools.partial(distributed.initialize, silence_seconds=15)
sys.exit(cli.main())
"""


@contextlib.contextmanager
def started(
    count: int, config: str, directory: Path | str, *overrides: str, devices: int = 2, folders: Sequence[Path] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that train together; each has CPU devices of its own, and its folder if there are any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(Path(config).with_name("jax"))}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [
        sys.executable,
        "-c",
        WORKER,
        "train",
        f"--config={config}",
        f"--config.directory={directory}",
        *overrides,
    ]
    command += ["--distributed", f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
    processes = [
        subprocess.Popen([*command, f"--process={index}"], env=environment, cwd=folders[index] if folders else None,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(count)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Their exit codes and outputs."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def finished(count: int, config: str, directory: Path, *overrides: str, devices: int = 2) -> list[str]:
    with started(count, config, directory, *overrides, devices=devices) as processes:
        found = ended(processes)
    assert [code for code, _ in found] == [0] * count, found
    return [output for _, output in found]


def wait_for_step(processes: list[subprocess.Popen[str]], directory: Path, step: int) -> None:
    metrics = directory / "metrics.jsonl"
    while processes[0].poll() is None:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(ended(processes))


def lines(directory: Path) -> list[dict]:
    return checkpoint.read_lines(directory / "metrics.jsonl")


def losses(directory: Path) -> np.ndarray:
    return np.array([line["loss"] for line in lines(directory) if "loss" in line])


@pytest.mark.slow
def test_two_processes_train_as_one(experiment, make, tmp_path: Path):
    changes = {"steps": 3, "evaluation__every": 0}
    config = experiment(**changes)
    with Preemption() as preemption:
        train(make(directory=tmp_path / "one", **changes), Console(quiet=True), preemption)
    first, second = finished(2, config, tmp_path / "two", devices=1)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    np.testing.assert_allclose(
        lines(tmp_path / "two")[-1]["eval_loss"], lines(tmp_path / "one")[-1]["eval_loss"], rtol=1e-5
    )
    assert "data=2; 2 processes" in first
    assert [line for line in second.splitlines() if line and "[Gloo]" not in line] == []


@pytest.mark.slow  # starts nine processes
@pytest.mark.parametrize(
    ("pipeline", "count", "devices", "overrides"),
    [
        ("shard(fsdp=-1)", 4, 2, ()),
        # Processes 0 and 1 have the same rows of the batch, 2 and 3 the others.
        ("shard(data=2, tensor=2)", 4, 1, ("--config.optimizer.accumulation=2",)),
        # The optimizer's state follows rules of the config, and the parameters are more than the model's.
        ("quantize(weights=int8, activations=int8, train=true)", 2, 2,
         ("--config.sharding.optimizer=('embed.embedding: -,data',)", "--config.compress=freeze(at=embed.**)",
          "--config.generation.prompts=def", "--config.generation.tokens=4")),
    ],
    ids=["fsdp", "rows-shared", "encoded-and-finish"],
)  # fmt: skip
def test_losses_are_those_of_one_process_and_of_one_device(
    experiment, tmp_path: Path, pipeline, count, devices, overrides
):
    config = experiment(steps=20, data__batch_size=8, pipeline=pipeline)
    first, *others = finished(count, config, tmp_path / "several", *overrides, devices=devices)
    finished(1, config, tmp_path / "mesh", *overrides, devices=count * devices)
    alone = "|".join(part for part in pipeline.split("|") if "shard" not in part)
    finished(1, config, tmp_path / "alone", f"--config.pipeline={alone}", *overrides, devices=1)
    for other in ("mesh", "alone"):
        np.testing.assert_allclose(losses(tmp_path / "several"), losses(tmp_path / other), rtol=1e-5)
    assert f"{count} processes" in first
    assert not any("loss" in output or "trained" in output for output in others)


@pytest.mark.slow  # starts ten processes
def test_a_run_goes_on_in_any_number_of_processes(experiment, tmp_path: Path):
    config = experiment(steps=12, data__batch_size=8, pipeline="shard(fsdp=-1)", checkpoint__every=6)
    whole, moved, other = (tmp_path / name for name in ("whole", "moved", "other"))
    finished(1, config, whole, devices=1)
    for stopped, count in ((1, 4), (2, 2)):
        (moved / "tokenizer.json").unlink(missing_ok=True)
        with started(count, config, moved) as processes:
            while processes[0].poll() is None and not (moved / "tokenizer.json").exists():
                time.sleep(0.01)
            # All have joined, and are about to compile.
            processes[-1].send_signal(signal.SIGTERM)
            found = ended(processes)
        assert [code for code, _ in found] == [0] * count, found
        assert f"stopped by SIGTERM after step {stopped}" in found[0][1], found
        if count == 4:
            shutil.copytree(moved, other)
    assert "going on from the checkpoint of step 1 " in finished(1, config, other)[0]
    shutil.rmtree(other / "checkpoints" / "12")
    assert "going on from the checkpoint of step 6 " in finished(2, config, other)[0]
    np.testing.assert_allclose(losses(moved), losses(whole)[:2], rtol=1e-5)
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)


@pytest.mark.slow  # waits for a process that is gone
@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_process_ends_all_and_a_restart_gives_the_same_bits(experiment, tmp_path: Path, index: int):
    config = experiment(steps=12, pipeline="shard(fsdp=-1)", checkpoint__every=4, model__overrides__dropout=0.1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(2, config, whole, devices=1)
    with started(2, config, broken, devices=1) as processes:
        wait_for_step(processes, broken, 6)
        processes[index].kill()
        began = time.monotonic()
        found = ended(processes)
    assert time.monotonic() - began < 120
    code, output = found[1 - index]
    assert code == distributed.LOST if index else code != 0, output
    assert f"process {index} ({socket.gethostname()})" in output
    assert "Traceback" not in output
    first, _ = finished(2, config, broken, devices=1)
    assert "going on from the checkpoint of step" in first
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.slow  # starts two processes
def test_ctrl_c_for_one_process_stops_all_with_a_checkpoint(experiment, tmp_path: Path):
    run = tmp_path / "run"
    with started(2, experiment(steps=100_000), run, devices=1) as processes:
        wait_for_step(processes, run, 3)
        processes[0].send_signal(signal.SIGINT)
        (code, output), (other, _) = ended(processes)
    assert (code, other) == (130, 0)
    assert "stopped by SIGINT after step" in output
    assert list((run / "checkpoints").iterdir())


@pytest.mark.slow  # starts two processes
def test_a_run_directory_that_one_host_does_not_see(experiment, tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with started(2, experiment(), "run", devices=1, folders=folders) as processes:
        found = ended(processes)
    assert all(code != 0 for code, _ in found)
    assert "does not see the run directory" in found[1][1]
    assert "choose a folder that all hosts share" in found[1][1]
    assert not (folders[1] / "run").exists()
