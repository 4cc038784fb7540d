"""`compax plan` on eight CPU devices that a child process fakes: figures, files, errors; the text, the page."""

import dataclasses
import json
from pathlib import Path

import pytest

from compax.errors import CompileError, ConfigError, MemoryLimitError
from compax.experiments import plan, plan_text
from compax.experiments.cli import main
from compax.experiments.config import load
from compax.experiments.console import Console
from compax.experiments.plan_advice import advised, shortage_text
from compax.experiments.plan_memory import predicted_peak
from compax.experiments.plan_page import page
from compax.experiments.plan_report import collective_seconds
from compax.target import Target
from compax.tpu import Shortage
from plans import COMPILED, FACTS, GB, report, short


@pytest.fixture
def planned(experiment, tmp_path, capsys) -> tuple[dict, str, str]:
    """A plan on eight CPU devices: its JSON, its page, and what was printed."""
    path = experiment(
        data__batch_size=8, model__overrides__scan=True, model__overrides__num_layers=3, model__overrides__tied=False
    )
    figures, site = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = ["plan", f"--config={path}", "--topology=cpu", "--mesh=data=8", f"--json={figures}", f"--html={site}"]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "plan" in path.name) == ["plan.html", "plan.json"]
    return json.loads(figures.read_text()), site.read_text(), capsys.readouterr().out


def test_a_plan_of_a_train_step(planned):
    figures, site, printed = planned
    assert figures["fits"] is True
    assert figures["mesh"] == {"data": 8}
    # Products of parameters and of attention, forward and twice backward.
    layer = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 24
    tokens, heads = 8 * 16, 4 * 4
    forward = 2 * tokens * (3 * layer + 16 * 260) + 3 * 2 * 2 * tokens * 16 * heads
    assert figures["flops"]["predicted"]["model"] == 3 * forward
    assert sum(figures["flops"]["compiled"]["device"].values()) * 8 == pytest.approx(3 * forward, rel=0.02)
    graph = figures["graph"]["predicted"]
    assert sum(graph["product_flops"].values()) * 8 == 3 * forward
    assert graph["peak"] == max(graph["timeline"])
    assert graph["missing"] == ""
    predicted, compiled = figures["memory"]["predicted"], figures["memory"]["compiled"]
    assert predicted["parameters"] == 4 * figures["parameters"]
    assert predicted["optimizer"] == pytest.approx(2 * predicted["parameters"], rel=0.01)
    assert compiled["arguments"] == pytest.approx(predicted["arguments"], rel=0.01)
    reduced = figures["collectives"]["compiled"]["all-reduce"]
    assert reduced["bytes"] == pytest.approx(figures["collectives"]["predicted"]["bytes"]["all-reduce"], rel=0.15)
    assert set(figures["compiling"]["measured"]["seconds"]) >= {"build", "compile"}
    assert "fits: yes" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "http" not in site.replace("http://www.w3.org", "")
    assert "<svg" in site


def test_the_state_comes_back_as_it_went_in(planned):
    # Donated buffers are reused: nothing but the metrics needs memory of its own.
    assert planned[0]["memory"]["compiled"]["outputs"] < 1024


@pytest.mark.slow
def test_an_optimizers_own_products_are_predicted_as_they_are_compiled(experiment, tmp_path, capsys):
    path, figures = experiment(data__batch_size=8, optimizer__name="muon"), tmp_path / "plan.json"
    assert main(["plan", f"--config={path}", "--topology=cpu", "--mesh=data=8", f"--json={figures}"]) == 0
    found = json.loads(figures.read_text())
    predicted = found["graph"]["predicted"]
    assert predicted["update_flops"] == predicted["product_flops"]["update"] > 0
    done = sum(found["flops"]["compiled"]["device"].values())
    assert done == pytest.approx(sum(predicted["product_flops"].values()), rel=0.02)
    printed = capsys.readouterr().out
    assert "the optimizer's update has" in printed
    assert "times its share" not in printed


@pytest.mark.slow
def test_parameters_that_are_split(experiment, tmp_path):
    rules = "('blocks.**.up.kernel: data,model', 'embed.**: model,data')"
    path = experiment(data__batch_size=8, sharding__params=rules)
    figures = tmp_path / "plan.json"
    assert main(["plan", f"--config={path}", "--topology=cpu", "--mesh=data=2,model=2", f"--json={figures}"]) == 0
    found = json.loads(figures.read_text())
    specs = {each["path"]: each["spec"] for each in found["largest_parameters"]}
    assert specs["embed.embedding"] == "model,data"
    assert found["memory"]["predicted"]["parameters"] < 4 * found["parameters"]
    assert "all-gather" in found["collectives"]["predicted"]["bytes"]


@pytest.mark.slow
def test_an_optimizer_that_is_split_over_the_batch(experiment, tmp_path):
    path = experiment(data__batch_size=8, sharding__optimizer="('embed.embedding: data,-', 'blocks.**.kernel: data')")
    figures = tmp_path / "plan.json"
    assert main(["plan", f"--config={path}", "--topology=cpu", "--mesh=data=4", f"--json={figures}"]) == 0
    memory = json.loads(figures.read_text())["memory"]
    assert memory["predicted"]["optimizer"] < 0.6 * memory["predicted"]["parameters"]
    assert memory["compiled"]["arguments"] == pytest.approx(memory["predicted"]["arguments"], rel=0.01)
    assert memory["compiled"]["outputs"] < 1024


@pytest.mark.slow
def test_the_peak_of_a_step_that_a_pass_lays_is_predicted(experiment, tmp_path, capsys):
    path = experiment(data__batch_size=8, model__overrides__num_layers=3, pipeline="shard(fsdp=4)")
    figures = tmp_path / "plan.json"
    assert main(["plan", f"--config={path}", "--topology=cpu", f"--json={figures}"]) == 0
    found = json.loads(figures.read_text())
    memory, peak = found["memory"]["compiled"], found["graph"]["predicted"]["peak"]
    assert peak == pytest.approx(memory["arguments"] + memory["temporaries"], rel=0.5)
    assert found["graph"]["predicted"]["timeline"] == []
    assert "peak" in capsys.readouterr().out


def test_the_loss_alone(experiment, tmp_path):
    path, figures = experiment(data__batch_size=8), tmp_path / "plan.json"
    arguments = ["--topology=cpu", "--mesh=data=8", "--forward", f"--json={figures}", "--sequence=32"]
    assert main(["plan", f"--config={path}", *arguments]) == 0
    found = json.loads(figures.read_text())
    assert (found["entry"], found["sequence_length"]) == ("eval", 32)
    assert found["memory"]["predicted"]["optimizer"] == 0


def written(folder: Path) -> set[Path]:
    """All files but those that Python keeps for a module that it has imported."""
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no slice to plan for: give --topology=v5e:4x4"),
        (["--topology=v5f:4x4"], "did you mean v5p or v5e"),
        (["--topology=v5e:3x4"], "v5e has no such slice"),
        (["--topology=v5e:4x4", "--mesh=data=8"], "is of 8 devices, v5e:4x4 has 16"),
        (["--topology=cpu", "--mesh=data=8", "--batch=6"], "a micro-batch of 6 sequence(s) does not divide"),
        (["--topology=cpu", "--mesh=x=8", "--batch=8"], "sharding.batch names the mesh axis 'data', the mesh has x"),
        (["--topology=h100:8", "--mesh=data=8"], "only slices of TPUs have a compiler"),
        (["--topology=cpu", "--mesh=data=4", "--json=nowhere/plan.json"], "there is no folder"),
        (["--topology=cpu", "--mesh=data=4", "--batch=many"], "expected a whole number"),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, message, experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = experiment()
    before = written(tmp_path)
    more = [] if any("--json" in argument for argument in arguments) else ["--json=plan.json"]
    assert main(["plan", f"--config={path}", *arguments, *more]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert written(tmp_path) == before


def test_a_child_that_dies_leaves_no_report(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setattr(plan, "BUILDER", "builders:killed")
    options = plan.Options(topology="cpu", mesh="data=2", json=str(tmp_path / "a"), html=str(tmp_path / "b"))
    with pytest.raises(CompileError, match="SIGKILL"):
        plan.plan(config, options, Console())
    assert not list(tmp_path.glob("[ab]"))


# -- What follows from the figures ------------------------------------------------------------------------------------


def test_the_time_of_a_step():
    found, target = report(), Target.parse("v5e:4x4")
    times = found.times
    assert times is not None
    assert times.compute == pytest.approx(13e12 / target.rate("bfloat16").flops_per_second)
    assert times.memory == pytest.approx(60e9 / target.device_memory_bandwidth)
    assert times.waits == pytest.approx(target.collective_seconds("all-reduce", 4 * GB, 16))
    assert times.hidden == pytest.approx(2 * target.collective_seconds("all-gather", GB, 4))
    assert times.step == max(times.compute, times.memory, times.hidden) + times.waits


def test_what_training_costs():
    found, chip = report(), Target.parse("v5e").chip
    economy, times = found.economy(), found.times
    assert economy is not None
    assert times is not None
    seconds = 20e9 / (16 * 2048) * times.step
    assert economy.tokens_per_second == pytest.approx(16 * 2048 / times.step)
    assert economy.days == pytest.approx(seconds / 86400)
    assert economy.money == pytest.approx(seconds / 3600 * 16 * chip.price_per_hour)
    assert 0 < economy.mfu < 1


def test_what_goes_between_slices_takes_the_network():
    target = Target.parse("v5e:4x4*2")
    inside = COMPILED.collectives[0]
    between = dataclasses.replace(inside, group_size=2, between_slices=True)
    assert collective_seconds(target, inside) == target.collective_seconds("all-reduce", 4 * GB, 16)
    assert collective_seconds(target, between) == target.collective_seconds("all-reduce", 4 * GB, 2, over="dcn")


def test_links_that_nobody_knows():
    assert collective_seconds(Target.parse("cpu"), COMPILED.collectives[0]) is None


# -- What does not fit ------------------------------------------------------------------------------------------------


def peak_of(config, target) -> int:
    """Bytes of a step that is half parameters and optimizer, which `shard` splits, and half activations."""
    held = 10 * GB // (target.num_devices if "shard" in config.pipeline else 1)
    tokens = config.data.batch_size / config.optimizer.accumulation / 64 * 16 / target.num_devices
    return held + round(tokens * 10 * GB * (0.5 if "remat" in config.pipeline else 1))


@pytest.fixture
def large(config):
    config.data.batch_size = 64
    return config


def test_what_does_not_fit_says_by_how_much_and_what_would_help(large):
    told = shortage_text(short(40.0), large, peak_of)
    assert "needs 40.0 GB of 17.0 GB on a chip, 23.0 GB too much (compiled); what would help: " in told
    # What is compiled is twice what is predicted, and corrects it.
    assert "shard(fsdp=-1) | remat() | tile_loss(): 11.2 GB predicted;" in told
    assert told.endswith("--topology=v5e:4x8 with shard(fsdp=-1): 10.6 GB predicted")
    assert "not enough" not in told
    assert "\n" not in told


def test_the_largest_batch_that_fits_is_proposed(large):
    told = shortage_text(short(20.0), large, peak_of)
    assert "; --batch=32: 15.0 GB predicted; --config.optimizer.accumulation=2: 15.0 GB predicted;" in told
    assert "--batch=16" not in told


def test_where_nothing_fits_what_comes_closest_is_named(large):
    told = shortage_text(short(400.0), large, peak_of)
    assert "what would help: --topology=v5e:4x8 with shard(fsdp=-1): 106.2 GB predicted, not enough alone" in told


def test_changes_that_cannot_be_predicted_are_left_out(large):
    def unknown(config, target):
        raise ConfigError("not predicted")

    assert shortage_text(short(40.0), large, unknown).endswith("23.0 GB too much (compiled)")


def test_proposed_memory_is_that_of_the_changed_step(experiment):
    found = load(experiment(data__batch_size=8, model__overrides__scan=True, model__overrides__num_layers=3))
    target = Target.parse("v5e:2x2")
    lines = dict(line.split(": ") for line in advised(found, target, 10**9, 1, predicted_peak))
    assert set(lines) >= {"remat()", "shard(fsdp=-1)", "shard(fsdp=-1) | remat() | tile_loss()"}
    sizes = [float(text.split(" MB")[0]) for text in lines.values()]
    assert sizes == sorted(sizes)


def test_micro_batches_keep_their_sum_of_gradients_where_these_lie(experiment):
    found = load(experiment(data__batch_size=4, pipeline="shard(data=-1, zero=2)"))
    target = Target.parse("v5e:2x2")
    alone = predicted_peak(found, target)
    found.data.batch_size, found.optimizer.accumulation = 8, 2
    vocabulary, dim, hidden, keys = 260, 16, 24, 8
    split = vocabulary * dim + 2 * dim * dim + 2 * dim * keys + 3 * dim * hidden
    assert predicted_peak(found, target) - alone == pytest.approx(4 * split / 4, rel=0.1)


def test_a_plan_that_does_not_fit_is_written_and_ends_in_an_error(config, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "make_report", lambda config, options, tell: short(30.0))
    figures, site = tmp_path / "plan.json", tmp_path / "plan.html"
    with pytest.raises(MemoryLimitError, match=r"it needs 30\.0 GB"):
        plan.plan(config, plan.Options(json=str(figures), html=str(site)), Console())
    found = json.loads(figures.read_text())
    assert (found["fits"], found["time"], found["training"]) == (False, None, None)
    assert found["shortage"]["needed"] == 30 * GB
    assert "fits: no" in site.read_text()


def test_a_shortage_without_figures_says_what_the_compiler_said(config):
    found = report(memory=None, shortage=Shortage("RESOURCE_EXHAUSTED: too much\nmore", None, None))
    assert shortage_text(found, config).endswith("does not fit: RESOURCE_EXHAUSTED: too much")
    assert "fits: no (compiled)" in "\n".join(plan_text.head(found))


def test_work_that_is_not_split_is_noted(capsys):
    found = report(flops={"bfloat16": 90 * 10**12})
    (note,) = plan_text.notes(found)
    assert "computes 7.3 times its share" in note
    plan_text.show(found, Console())
    assert f"note: {note}" in capsys.readouterr().out
    assert plan_text.notes(report()) == []
    (note,) = plan_text.notes(dataclasses.replace(report(), quick=True))
    assert "least of the compiler's effort" in note


def test_traffic_beyond_what_shardings_ask_for_is_noted():
    much = dataclasses.replace(COMPILED.collectives[0], count=4)
    (note,) = plan_text.notes(report(collectives=(much,)))
    assert "all-reduce moves 4.0 times what the shardings ask for" in note
    facts = dataclasses.replace(FACTS, exchanged={"all-gather": 90 * GB, "all-reduce": GB})
    assert plan_text.notes(dataclasses.replace(report(collectives=(much,)), facts=facts)) == []


# -- Text and page ----------------------------------------------------------------------------------------------------


def test_the_text_fits_in_100_columns(capsys):
    plan_text.show(report(), Console())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for word in ("predicted", "compiled", "measured", "all-reduce", "MFU", "US dollars", "kWh"):
        assert word in printed


def test_every_figure_says_how_it_was_come_by():
    text = page([report()])
    for heading in ("one step (compiled)", "Where the time goes (predicted)", "Training (predicted)"):
        assert heading in text
    assert text.count("<svg") == 4
    assert "<script" not in text


def test_files_are_whole_or_not_there(tmp_path):
    plan.write(str(tmp_path / "a.txt"), "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(ConfigError, match="cannot be written"):
        plan.check_writable(str(tmp_path))
