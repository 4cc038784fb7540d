"""Reproducers: a failure leaves one file, and one command replays it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax import reproducer
from compax.errors import CompaxError, PassError, PipelineError
from compax.instruments import Reproducer
from compax.pipeline import Pipeline

TESTS = Path(__file__).resolve().parents[1]
BROKEN = ["break_shape", "break_value(bad=blocks.2)", "break_nan", "drop_parameter", "drop_declared", "crash"]


@pytest.fixture(scope="module")
def samples() -> Any:
    import sample_passes

    return sample_passes


def fail(samples: Any, directory: Path, pipeline: str, model: Any) -> tuple[CompaxError, Path]:
    """The error of a pipeline, and the one file that it leaves."""
    before = set(directory.glob("*"))
    with pytest.raises(CompaxError) as caught:
        Pipeline.parse(pipeline, [Reproducer(directory, model)])(samples.make_program(), samples.example())
    (path,) = set(directory.glob("*")) - before
    return caught.value, path


def command(path: Path, *options: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "compax.reproducer", str(path), *options]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(run, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_pass_leaves_a_file_that_replays_it(samples: Any, tmp_path: Path, broken: str) -> None:
    error, path = fail(samples, tmp_path, f"copy(at=blocks.0) | {broken} | quantize", samples.make_program)
    assert str(error).endswith(f"\nreplay with: python -m compax.reproducer {path}")
    content = reproducer.read(path)
    assert any("sample_passes.py" in line for line in content["traceback"]) == (broken == "crash")
    assert content["pass"] == str(Pipeline.parse(broken))
    assert content["pipeline"] == str(Pipeline.parse(f"copy(at=blocks.0) | {broken}"))
    assert any("blocks.0" in line for line in content["program"])
    with pytest.raises(type(error)) as again:
        reproducer.replay(path)
    assert str(error).startswith(str(again.value))
    assert str(again.value).startswith(content["pass"])


def test_the_command_replays_in_a_new_process(samples: Any, tmp_path: Path) -> None:
    error, path = fail(samples, tmp_path, "copy | break_value", samples.make_program)
    process = command(path, cwd=tmp_path)  # finds sample_passes by the file that is recorded
    assert process.returncode == 1, process.stderr
    assert process.stdout.startswith(
        "pipeline: copy() | break_value()\nthe same failure: ContractError: break_value(): "
    )
    assert str(error).split("\n")[0] in process.stdout


def test_a_script_is_found_again(tmp_path: Path) -> None:
    script = tmp_path / "my_script.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import dataclasses
import sample_passes
from compax.instruments import Reproducer
from compax.pipeline import Pipeline
from compax.transform import register

@register("scripted")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(sample_passes.BreakValue):
    "Broken like its parent."

def build():
    return sample_passes.make_model()

if __name__ == "__main__":
    pipeline = Pipeline([Scripted()], [Reproducer("left", build)])
    pipeline(sample_passes.make_program(), sample_passes.example())
"""
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "ContractError: scripted(): 'output' differs" in process.stderr
    again = command(tmp_path / "left" / "scripted.json", cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    assert "the same failure: ContractError: scripted(): 'output' differs" in again.stdout


def test_a_model_is_captured_with_the_recorded_inputs(samples: Any, tmp_path: Path) -> None:
    error, path = fail(samples, tmp_path, "break_value", "sample_passes:make_model")
    with pytest.raises(type(error), match="'output' differs"):
        reproducer.replay(path)


def test_the_model_may_be_named_when_replaying(samples: Any, tmp_path: Path) -> None:
    _, path = fail(samples, tmp_path, "crash", None)
    with pytest.raises(PipelineError, match=r"does not say how to make the model: name a function, --model"):
        reproducer.replay(path)
    for model in (
        "sample_passes:make_program",
        samples.make_model,
        lambda: (samples.make_model(), samples.example()),
        lambda: (samples.make_program(), samples.example()),
    ):
        with pytest.raises(PassError, match="no scale at all"):
            reproducer.replay(path, model)


def test_a_failure_that_is_gone(samples: Any, tmp_path: Path, capsys: Any) -> None:
    _, path = fail(samples, tmp_path, "break_value", "sample_passes:make_program")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pipeline": "copy()", "versions": {"jax": "0.1"}}))
    assert isinstance(reproducer.replay(path), compax.Program)
    assert reproducer.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"recorded with jax 0.1 (now {jax.__version__})" in printed
    assert "it no longer fails; recorded: ContractError: break_value(): 'output' differs" in printed


def test_another_failure_is_told_apart(samples: Any, tmp_path: Path, capsys: Any) -> None:
    _, path = fail(samples, tmp_path, "break_value", "sample_passes:make_program")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pipeline": "crash()"}))
    assert reproducer.main([str(path)]) == 1
    assert "another failure than the recorded" in capsys.readouterr().out


def test_no_file_is_overwritten(samples: Any, tmp_path: Path) -> None:
    names = [fail(samples, tmp_path / "new", "crash", None)[1].name for _ in range(3)]
    assert names == ["crash.json", "crash-2.json", "crash-3.json"]


def test_a_directory_that_cannot_be_written_does_not_hide_the_failure(samples: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PassError, match=r"(?s)no scale at all\nno reproducer could be written: "):
        Pipeline.parse("crash", [Reproducer(tmp_path / "file" / "below")])(samples.make_program())


def test_a_program_with_a_history_is_replayed_from_its_beginning(samples: Any, tmp_path: Path) -> None:
    program = Pipeline.parse("copy(at=blocks.1)")(samples.make_program())
    with pytest.raises(PassError):
        Pipeline.parse("crash", [Reproducer(tmp_path, samples.make_program)])(program)
    assert reproducer.read(tmp_path / "crash.json")["pipeline"] == "copy(at=blocks.1) | crash()"
    with pytest.raises(PassError, match="no scale at all"):
        reproducer.replay(tmp_path / "crash.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read as a reproducer"),
        ("", "cannot be read as a reproducer"),
        ("{", "cannot be read as a reproducer"),
        ("[1]", "its format is not"),
        ('{"format": "something else"}', "its format is not"),
        ('{"format": "compax reproducer 1"}', "is damaged: it has no 'pipeline'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, capsys: Any, text: str | None, says: str) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PipelineError, match=says):
        reproducer.replay(path)
    assert reproducer.main([str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("sample_passes", "named as module:function"),
        ("no_such_module:f", "the module 'no_such_module' cannot be imported"),
        ("sample_passes:nothing", "has no function 'nothing'"),
    ],
)
def test_models_that_cannot_be_made(samples: Any, tmp_path: Path, model: str, says: str) -> None:
    _, path = fail(samples, tmp_path, "crash", None)
    with pytest.raises(PipelineError, match=says):
        reproducer.replay(path, model)


VALUES = [
    None,
    True,
    3,
    0.1,
    "text",
    (1, [2.5, {"a": None}]),
    jnp.arange(6, dtype=jnp.int8).reshape(2, 3),
    np.array([0.1, math.inf, -0.0], np.float32),
    jnp.array([1.5, 2.0], jnp.bfloat16),
    jnp.array([1 + 2j], jnp.complex64),
    jnp.array([True, False]),
    np.float32(0.3),
    jax.random.key(3),
    jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_inputs_survive_as_text(value: Any) -> None:
    again = reproducer._decode(json.loads(json.dumps(reproducer._encode(value))), seed=0)
    assert jax.tree.structure(again) == jax.tree.structure(value)
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(again), strict=True):
        if isinstance(one, jax.ShapeDtypeStruct) or not hasattr(one, "dtype"):
            assert one == other
        else:
            assert one.dtype == other.dtype
            data = [jax.random.key_data(x) if "key" in str(x.dtype) else x for x in (one, other)]
            np.testing.assert_array_equal(*data)


def test_large_inputs_keep_their_range() -> None:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, 90, (100, 100)), jnp.int32)
    images = jnp.asarray(rng.normal(3, 2, (100, 100)), jnp.float32)
    written = json.loads(json.dumps(reproducer._encode((tokens, images))))
    again = reproducer._decode(written, seed=0)
    assert len(json.dumps(written)) < 400
    assert again[0].dtype == tokens.dtype
    assert (int(again[0].min()), int(again[0].max())) == (5, 89)
    assert float(again[1].mean()) == pytest.approx(3, abs=0.1)
    assert float(again[1].std()) == pytest.approx(2, abs=0.1)


def test_an_input_that_no_text_holds() -> None:
    written = reproducer._encode({"cache": object()})
    with pytest.raises(PipelineError, match=r"an input is a builtins\.object, which no text holds"):
        reproducer._decode(written, seed=0)


def test_models_and_modules_that_fail(samples: Any, tmp_path: Path) -> None:
    _, path = fail(samples, tmp_path, "crash", None)

    def model() -> Any:
        raise KeyError("weights")

    with pytest.raises(PipelineError, match="the function that makes the model fails: KeyError: 'weights'"):
        reproducer.replay(path, model)
    script = tmp_path / "a_script_that_fails.py"
    script.write_text("import json\njson.nothing\n")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "modules": [{"module": "__main__", "file": str(script)}]}))
    with pytest.raises(PipelineError, match="fails when it is run: AttributeError"):
        reproducer.replay(path, model)
    assert "a_script_that_fails" not in sys.modules
