"""Training in one process: files, resuming, accumulation, frozen parameters, and numbers that are not finite."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from compax.errors import CheckpointError, CompaxError, ConfigError
from compax.experiments import checkpoint, programs
from compax.experiments.console import Console
from compax.experiments.preemption import Preemption, Stopped
from compax.experiments.step import make_step, start
from compax.experiments.train import DivergenceError, Trained, train


def run(config: ConfigDict) -> Trained:
    with Preemption() as preemption:
        return train(config, Console(), preemption)


def lines(config: ConfigDict) -> list[dict]:
    return checkpoint.read_lines(Path(config.directory) / "metrics.jsonl")


def test_training_learns_and_leaves_its_files(make):
    config = make(steps=40, optimizer__learning_rate=0.02, log__tensorboard="true", log__plot="true")
    pytest.importorskip("tensorboardX")
    pytest.importorskip("matplotlib")
    trained = run(config)
    found = lines(config)
    assert found[0]["loss"] > found[-2]["loss"] + 0.5
    assert [line["step"] for line in found if "eval_loss" in line] == list(range(5, 41, 5))
    assert found[-1]["eval_loss"] == trained.evaluation.loss
    assert found[-1]["eval_perplexity"] == pytest.approx(np.exp(trained.evaluation.loss))
    assert trained.evaluator.of(trained.program) == trained.evaluation
    directory = Path(config.directory)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["35", "40"]
    assert {"config.json", "tokenizer.json", "timing.jsonl", "loss.png", "tensorboard"} <= {
        path.name for path in directory.iterdir()
    }
    assert json.loads((directory / "config.json").read_text())["steps"] == 40


def test_a_finished_run_is_not_trained_again(config: ConfigDict, capsys):
    first = run(config)
    before = (Path(config.directory) / "metrics.jsonl").read_bytes()
    again = run(config)
    assert "going on from the checkpoint of step 12" in capsys.readouterr().out
    assert again.evaluation == first.evaluation
    assert (Path(config.directory) / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": "cast(compute=bfloat16) | quantize(weights=int8, activations=int8, train=true)"},
        {"model__overrides__scan": "true", "model__overrides__dropout": 0.2, "optimizer__accumulation": 2},
    ],
    ids=["pipeline", "scan-dropout-accumulation"],
)
def test_a_stopped_run_goes_on_bit_for_bit(make, tmp_path, changes):
    whole = make(**changes)
    run(whole)
    stopped = make(directory=tmp_path / "stopped", **changes)
    with Preemption() as preemption:
        preemption.ready()
        # As if the signal came while the first step ran.
        preemption.received = signal.SIGTERM
        with pytest.raises(Stopped, match="after step 1;"):
            train(stopped, Console(), preemption)
    run(stopped)
    assert lines(stopped) == lines(whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(make):
    losses = []
    for parts in (1, 4):
        config = make(optimizer__accumulation=parts)
        program = programs.build_program(config, 260)
        state, frozen = start(config, program)
        tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, 260)
        after, values = make_step(config, program)(state, frozen, tokens.reshape(parts, 4 // parts, 17))
        losses.append((values["loss"], values["grad_norm"], after.params["embed.embedding"]))
    for whole, accumulated in zip(*losses, strict=True):
        np.testing.assert_allclose(whole, accumulated, rtol=2e-5, atol=1e-6)


def test_frozen_parameters_have_no_optimizer_state_and_do_not_move(make):
    config = make(pipeline="freeze(at=embed.**)")
    program = programs.build_program(config, 260)
    state, frozen = start(config, program)
    assert "embed.embedding" in frozen
    assert not any("embed" in name for name in checkpoint.named(state.optimizer))
    trained = run(config)
    assert np.array_equal(trained.program.params["embed.embedding"], program.params["embed.embedding"])
    moved = "blocks.0.mlp.up.kernel"
    assert not np.array_equal(trained.program.params[moved], program.params[moved])


def test_nothing_to_train(make):
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        run(make(pipeline="freeze(at=**)"))


def test_not_finite_stops_with_step_and_batch(make):
    config = make(optimizer__name="sgd", optimizer__learning_rate=1e30, optimizer__clip_norm=0)
    with pytest.raises(
        DivergenceError, match=r"step \d+: the .* is (nan|inf) on the batch of sequences .*file\d\d.txt"
    ):
        run(config)


def test_not_finite_updates_are_skipped_until_patience_ends(make, capsys):
    changes = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e30, "optimizer__clip_norm": 0}
    config = make(nan__policy="skip", nan__patience=3, **changes)
    with pytest.raises(DivergenceError, match="3 steps in a row"):
        run(config)
    assert capsys.readouterr().out.count("update skipped") == 2


def test_a_skipped_update_leaves_everything_as_it_was(make):
    config = make()
    program = programs.build_program(config, 260)
    state, frozen = start(config, program)
    poisoned = {**state.params, "norm.scale": state.params["norm.scale"].at[0].set(np.nan)}
    state = state.__class__(poisoned, state.state, state.optimizer, state.updates, state.skipped)
    before = jax.tree.map(np.array, state)
    after, values = make_step(config, program)(state, frozen, np.zeros((1, 4, 17), np.int32))
    assert np.isnan(values["loss"])
    assert int(after.skipped) == 1
    for name, leaf in checkpoint.named(after).items():
        if name != "skipped":
            np.testing.assert_array_equal(leaf, checkpoint.named(before)[name])


def test_a_run_of_another_config_is_refused_and_untouched(make):
    run(make())
    before = {path: path.read_bytes() for path in Path(make().directory).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"another config: seed is 0 there and 1 here"):
        run(make(seed=1))
    assert {path: path.read_bytes() for path in Path(make().directory).rglob("*") if path.is_file()} == before


def test_a_foreign_folder_is_refused_and_untouched(config: ConfigDict):
    directory = Path(config.directory)
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"is not a run of compax: it holds thesis\.txt"):
        run(config)
    assert [path.name for path in directory.iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_run(config: ConfigDict):
    with checkpoint.open_run(config), pytest.raises(CheckpointError, match="another process is training"):
        run(config)


def test_other_text_is_refused_on_resume(make, tmp_path: Path):
    run(make())
    (tmp_path / "corpus" / "file00.txt").write_text("changed " * 200)
    config = make()
    (tmp_path / "corpus" / "file00.txt").write_text("changed " * 200)
    with pytest.raises(CheckpointError, match="trained on another text"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__size": "tinny"}, "did you mean tiny"),
        ({"model__overrides__num_layer": 3}, "did you mean num_layers"),
        ({"model__overrides__num_layers": "many"}, "is of type int, got 'many'"),
        ({"pipeline": "quantise()"}, "no pass 'quantise'"),
        ({"compress": "quantize(weights=int3)"}, "int3"),
        ({"schedule__warmup_steps": 12}, "leaves nothing"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_made(make, changes, message):
    config = make(**changes)
    with pytest.raises(CompaxError, match=message):
        run(config)
    assert not Path(config.directory).exists()


@pytest.mark.parametrize("changes", [{"data__batch_size": 100_000}, {"pipeline": "shard(data=8)"}])
def test_a_start_that_fails_leaves_no_run_directory(make, changes):
    with pytest.raises(CompaxError):
        run(make(**changes))
    assert not Path(make().directory).exists()
