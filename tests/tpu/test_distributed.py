"""Processes that join, differ, fail and die: real ones, of two CPU devices each."""

import os
import socket
import subprocess
import sys
import time

import pytest

from compax.errors import DistributedError
from compax.tpu import distributed

WORKER = """
import os, sys, time
from compax import tpu
import compax.tpu.distributed as distributed
from compax.errors import DistributedError
index, count, port, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if mode == "differ" and index == 1:
    facts = distributed._facts
    distributed._facts = lambda compare: {**facts(compare), "jax": "0.9.9"}
try:
    joined = tpu.initialize("127.0.0.1:" + port, count, index, start_seconds=60, silence_seconds=6)
    assert tpu.initialize("127.0.0.1:" + port, count, index) is joined
except DistributedError as error:
    print("error:", error)
    sys.exit(2)
import numpy as np
from jax.experimental import multihost_utils
with joined:
    for step in range(60):
        if step == 20 and mode == f"kill{index}":
            os.kill(os.getpid(), 9)
        if step == 20 and mode == f"fail{index}":
            raise ValueError("a bad thing")
        assert multihost_utils.process_allgather(np.asarray(index)).tolist() == list(range(count))
        time.sleep(0.01)
print("end")
"""


def start(mode: str, count: int = 2) -> list[tuple[int, str]]:
    """Runs processes; returns their exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(index), str(count), str(port), mode], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_processes_work_together_and_end():
    assert [code for code, _ in start("fine")] == [0, 0]


def test_a_host_with_another_version_is_named():
    for code, output in start("differ"):
        assert code == 2
        assert f"process 1 ({socket.gethostname()}) has jax 0.9.9, process 0" in output


def test_a_killed_process_ends_the_others_by_its_name():
    began = time.monotonic()
    (code, output), (killed, _) = start("kill1")
    assert killed == -9
    assert code == distributed.LOST
    assert f"process 1 ({socket.gethostname()}) has given no sign of life" in output
    assert time.monotonic() - began < 60


def test_a_killed_coordinator_ends_the_others_by_its_name():
    (killed, _), (code, output) = start("kill0")
    assert killed == -9
    assert code != 0
    assert f"process 0 ({socket.gethostname()}), the coordinator" in output


@pytest.mark.parametrize("index", [0, 1])
def test_an_error_of_one_process_ends_the_others_with_it(index):
    found = start(f"fail{index}")
    assert found[index][0] == distributed.FAILED
    code, output = found[1 - index]
    assert code == distributed.LOST
    assert f"process {index} ({socket.gethostname()}) ended with an error: ValueError: a bad thing" in output


def test_a_coordinator_that_is_not_there():
    with pytest.raises(
        DistributedError, match=r"process 1 on .* cannot reach the coordinator 127\.0\.0\.1:9 within 1 s"
    ):
        distributed.initialize("127.0.0.1:9", 2, 1, start_seconds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:1", None, 0), "give all three"),
        (("10.0.0.1", 2, 0), "write ADDRESS:PORT"),
        (("10.0.0.1:1", 2, 2), "count from 0"),
    ],
)
def test_malformed_addresses(arguments, message):
    with pytest.raises(DistributedError, match=message):
        distributed.initialize(*arguments)


def test_clocks():
    def host(name: str, seconds: float) -> dict:
        return {"host": name, "seconds": seconds, "facts": {"jax": "1"}}

    assert distributed.compared([host("a", 0), host("b", 1)]) == ("", "")
    error, warning = distributed.compared([host("a", 0), host("b", 1), host("c", -9)])
    assert not error
    assert "clock of process 2 (c) is 9.0 s behind" in warning
    error, _ = distributed.compared([host("a", 0), host("b", 100)])
    assert "clock of process 1 (b) is 100.0 s ahead of that of process 0 (a)" in error
