"""The command `compax`, in this process: help, errors of one line, and each command on a tiny run."""

import json
from pathlib import Path

import pytest

from compax.experiments.cli import main

COMMANDS = ("train", "eval", "generate", "inspect", "plan", "launch", "passes")


@pytest.fixture
def run(experiment, capsys) -> str:
    """A trained run with a compressed program; returns its directory."""
    path = experiment(compress="quantize(weights=int8)", generation__prompts="('def ',)", generation__tokens=5)
    assert main(["train", f"--config={path}"]) == 0
    return str(Path(path).parent / "run")


def fails(capsys, *arguments: str) -> str:
    """Runs a command that has to fail; returns its one line."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert told.startswith("compax: error: ")
    assert told.count("\n") == 1
    return told


def test_without_arguments_it_helps(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_help_of_train_lists_every_field(capsys):
    from compax.experiments.config import FIELDS

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--config.{name}=" in shown for name in FIELDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train"], "the following arguments are required: --config"),
        (["train", "--config=nowhere"], "no config file 'nowhere'"),
        (["train", "--config=quickstart", "--config.stepz=3"], "did you mean steps?"),
        (["train", "--config=quickstart", "--config.steps=many"], "expected a whole number"),
        (["train", "--config=quickstart", "--config.steps"], "lacks a value"),
        (["train", "--config=quickstart", "--verbose"], "unrecognized arguments: --verbose"),
        (["eval"], "give either --config=FILE or --run=FOLDER"),
        (["eval", "--run=nowhere"], "no run directory nowhere"),
        (["generate", "--model=smollm"], "no prompt"),
        (["generate", "--model=smollm", "--prompt=a"], "did you mean smollm2-135m?"),
        (["generate", "--model=smollm2-135m", "--run=x", "--prompt=a"], "give one of --model, --config and --run"),
        (["inspect", "--model=llama2-7"], "did you mean llama2-7b"),
        (["passes", "quantise"], "did you mean quantize?"),
        (
            ["inspect", "--model=tiny", "--pipeline=quantize(weihts=int8)"],
            "'quantize' has no option 'weihts', did you mean 'weights'?",
        ),
        (["inspect", "--model=tiny", "--pipeline=quantize(weihts=int8)"], "(character 10 of 'quantize(weihts=int8)')"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_train_reports_passes_and_generates(run, capsys):
    report = json.loads((Path(run) / "compress.json").read_text())
    (quantize,) = report["passes"]
    assert quantize["bytes"] < report["before"]["bytes"] / 2
    assert quantize["eval_loss"] == pytest.approx(report["before"]["eval_loss"], abs=0.05)
    assert {site["status"] for site in quantize["sites"]} == {"rewritten"}
    assert (Path(run) / "compressed" / "compax.json").is_file()


def test_eval_repeats_the_loss_of_training(run, capsys):
    (expected,) = (
        line["eval_loss"]
        for line in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
        if line["step"] == 12 and "eval_loss" in line
    )
    capsys.readouterr()
    assert main(["eval", f"--run={run}", "--pipeline=quantize(weights=int8)"]) == 0
    shown = capsys.readouterr().out
    assert f"at step 12: evaluation loss {expected:.4f}" in shown
    assert "quantize(weights=int8) rewritten" in shown
    assert main(["eval", f"--run={run}", "--compressed"]) == 0


def test_generate_from_a_run(run, capsys):
    capsys.readouterr()
    assert main(["generate", f"--run={run}", "--prompt=def ", "--prompt=return", "--tokens=3"]) == 0
    plain = capsys.readouterr().out
    assert plain.count(": 3 tokens, ") == 2
    assert main(["generate", f"--run={run}", "--compressed", "--tokens=3"]) == 0
    assert "def " in capsys.readouterr().out


def test_inspect_a_run_and_a_model(run, capsys):
    capsys.readouterr()
    assert main(["inspect", f"--run={run}", "--pipeline=quantize(weights=int8)"]) == 0
    shown = capsys.readouterr().out
    assert "  blocks.0.mlp  " in shown
    assert "int8[model 16, hidden 24]" in shown
    assert "coverage" in shown
    assert main(["inspect", "--model=llama2-7b", "--abstract"]) == 0
    assert "6.7B parameters" in capsys.readouterr().out


def test_inspect_shows_the_price_of_each_pass(experiment, capsys):
    path = experiment(pipeline="cast(compute=bfloat16) | remat(keep=nothing)")
    assert main(["inspect", f"--config={path}", "--cost=v5e:2x2", "--pipeline=freeze(at=embed.**)"]) == 0
    shown = capsys.readouterr().out
    tables = shown.split("price of ")[1:]
    assert [table.partition("(")[0] for table in tables] == ["cast", "remat", "freeze"]
    for table in tables:
        for row in ("parameters as stored", "work of a train step", "memory at the peak", "time of a train step"):
            (line,) = (line for line in table.splitlines() if line.strip().startswith(row))
            assert line.rstrip().endswith("predicted")
    assert "loss" in tables[0]
    assert "measured" in tables[0]
    assert "cost of" in shown
    assert "at least" in shown


def test_inspect_prices_shapes_alone_and_says_what_is_missing(capsys):
    arguments = ["inspect", "--model=tiny", "--abstract", "--pipeline=cast(compute=bfloat16)"]
    assert main([*arguments, "--cost"]) == 0
    shown = capsys.readouterr().out
    assert "no time of a call: no target was given" in shown
    assert "no fidelity: no sample inputs were given" in shown
    assert main(["inspect", "--model=tiny", "--abstract", "--cost=v5e:2x2"]) == 0
    assert "no pass was applied" in capsys.readouterr().out
    assert "no fidelity" not in shown.partition("cost of")[2]


def test_inspect_prices_passes_on_a_run(run, capsys):
    capsys.readouterr()
    assert main(["inspect", f"--run={run}", "--cost=cpu", "--pipeline=quantize(weights=int8)"]) == 0
    assert "price of quantize(" in capsys.readouterr().out


def test_inspect_on_an_unknown_target(capsys):
    assert "v9z" in fails(capsys, "inspect", "--model=tiny", "--cost=v9z:2x2")


def test_damaged_and_foreign_runs(run, capsys, tmp_path):
    assert "holds no config.json" in fails(capsys, "eval", f"--run={tmp_path}")
    (Path(run) / "config.json").write_text("{")
    assert "is not JSON" in fails(capsys, "generate", f"--run={run}", "--prompt=a")


def test_passes_lists_and_explains(capsys):
    assert main(["passes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("cast", "freeze", "quantize"))
    assert main(["passes", "quantize"]) == 0
    shown = capsys.readouterr().out
    assert "weights" in shown
    assert "arXiv" in shown
