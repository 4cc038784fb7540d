"""Sweeps: combinations, points that are not valid or do not fit, the table, the page."""

import dataclasses
import json

import pytest

from compax.errors import ConfigError
from compax.experiments import plan, sweep
from compax.experiments.cli import main
from compax.experiments.console import Console
from compax.experiments.plan_page import page
from compax.tpu import Memory
from plans import GB, report, short


def test_all_combinations_the_last_fastest():
    assert sweep.parse(["batch=16,32", "mesh=data=16|data=4,model=4"]) == [
        {"batch": "16", "mesh": "data=16"},
        {"batch": "16", "mesh": "data=4,model=4"},
        {"batch": "32", "mesh": "data=16"},
        {"batch": "32", "mesh": "data=4,model=4"},
    ]
    assert sweep.parse(["mesh=data=4,model=4"]) == [{"mesh": "data=4,model=4"}]
    assert sweep.parse(["model.overrides.scan=true,false"])[1] == {"model.overrides.scan": "false"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["batch"], "write NAME=VALUE,VALUE"),
        (["batch="], "write NAME=VALUE,VALUE"),
        (["batch=1", "batch=2"], "is there twice"),
        (["bacth=1,2"], "there is no setting 'bacth'; did you mean batch"),
    ],
)
def test_what_is_wrong_with_a_sweep(texts, message):
    with pytest.raises(ConfigError, match=message):
        sweep.parse(texts)


def points() -> list[sweep.Point]:
    """A fast and a slow one that take more and less memory, one that is beaten, and ones that are no plans."""
    slow = report(traffic=100 * GB, memory=Memory(12 * GB, 0, GB, 0, 13 * GB, 0))
    beaten = report(traffic=100 * GB)
    return [
        sweep.Point({"batch": "16"}, report()),
        sweep.Point({"batch": "32"}, slow),
        sweep.Point({"batch": "64"}, beaten),
        sweep.Point({"batch": "128"}, short(30.0)),
        sweep.Point({"batch": "7"}, error="7 does not divide"),
    ]


def test_the_best_are_those_that_no_other_beats():
    assert sweep.best(points()) == (0, 1)
    assert sweep.best(points()[3:]) == ()


def test_the_table_marks_what_does_not_fit(capsys):
    sweep.show(points(), Console())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "* 16" in printed
    assert "no, 30.0 GB of 17.0 GB a device" in printed
    assert "not valid (1)" in printed
    assert "(1) batch=7: 7 does not divide" in printed


def test_the_page_draws_what_fits():
    found = points()
    text = page([point.report for point in found if point.report is not None], found)
    assert text.count("<circle") == 3
    assert "does not divide" in text
    assert "None of them fits" in page([], found[3:])


@pytest.mark.slow
def test_a_sweep_on_cpus(experiment, tmp_path, capsys):
    path, figures, site = experiment(), tmp_path / "sweep.json", tmp_path / "sweep.html"
    arguments = ["plan", f"--config={path}", "--topology=cpu", "--mesh=data=2", f"--json={figures}", f"--html={site}"]
    assert main([*arguments, "--sweep", "batch=2,3"]) == 0
    found = json.loads(figures.read_text())["points"]
    assert [point["settings"] for point in found] == [{"batch": "2"}, {"batch": "3"}]
    assert found[0]["report"]["batch_size"] == 2
    assert "does not divide" in found[1]["error"]
    assert "<circle" in site.read_text()
    assert "1 of 2, batch=2" in capsys.readouterr().out


def test_one_text_is_of_one_plan(config):
    with pytest.raises(ConfigError, match="--hlo keeps the compiled text of one plan"):
        sweep.sweep(config, dataclasses.replace(plan.Options(), hlo="x"), ["batch=1"], Console())
