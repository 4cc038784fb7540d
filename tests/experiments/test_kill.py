"""A training process that is killed and started again gives, to the bit, the losses of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "import sys; from compax.experiments.cli import main; sys.exit(main())", "train"]
# Without the devices and the compilation cache that the test process sets up for itself.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def begin(config: str, directory: Path) -> subprocess.Popen:
    arguments = [f"--config={config}", f"--config.directory={directory}"]
    return subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen, directory: Path, step: int) -> None:
    metrics = directory / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[0].decode())


@pytest.mark.slow
def test_killed_then_preempted_then_finished(experiment, tmp_path: Path):
    config = experiment(steps=160, checkpoint__every=7, evaluation__every=30, model__overrides__dropout=0.1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(begin(config, whole))

    process = begin(config, broken)
    wait_for_step(process, broken, random.randint(20, 60))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = begin(config, broken)
    wait_for_step(process, broken, random.randint(80, 120))
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in finish(process)

    assert "going on from the checkpoint of step" in finish(begin(config, broken))
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_ctrl_c_saves_and_says_so(experiment, tmp_path: Path):
    directory = tmp_path / "run"
    process = begin(experiment(steps=100_000), directory)
    wait_for_step(process, directory, 10)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 130, output
    assert "stopped by SIGINT after step" in output
    assert "Traceback" not in output
