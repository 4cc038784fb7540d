"""Metrics on disk: lines, cutting back, and what is said when the extra `viz` is absent."""

import json
import sys
from pathlib import Path

import pytest

from compax.experiments import metrics
from compax.experiments.console import Console, amount, duration
from compax.experiments.metrics import Metrics


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    written = Metrics(tmp_path, 1, tensorboard=False, report=print)
    written.write(2, {"loss": 2.5, "grad_norm": float("inf")})
    written.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "grad_norm": None}]


def test_plot_without_numbers_is_none(tmp_path: Path):
    assert metrics.plot(tmp_path, print) is None


@pytest.mark.parametrize(("module", "wanted"), [("tensorboardX", "TensorBoard events"), ("matplotlib.figure", "plot")])
def test_a_missing_extra_is_told_once(tmp_path: Path, monkeypatch, module, wanted):
    monkeypatch.setitem(sys.modules, module, None)
    told: list[str] = []
    written = Metrics(tmp_path, 0, tensorboard=True, report=told.append)
    for step in (1, 2):
        written.write(step, {"loss": 2.0})
    written.close()
    metrics.plot(tmp_path, told.append)
    (line,) = told
    assert wanted in line
    assert "pip install 'compax[viz]'" in line


def test_numbers_are_readable():
    assert [amount(4_000_000), amount(16_000_000, "B"), amount(6.74e9), amount(12)] == ["4M", "16 MB", "6.74B", "12"]
    assert [duration(3.2), duration(65), duration(3700)] == ["0:03", "1:05", "1:01:40"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console()
    assert console.rich.is_terminal
    with console.progress(10, 0) as progress:
        progress.update(10, 1.5, 1000.0, 0.0)
    shown = capsys.readouterr().out
    assert "10/10" in shown
    assert "1.5000" in shown
    assert "(measured)" in shown
