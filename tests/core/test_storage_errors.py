"""Checkpoints that cannot be saved or loaded: one readable line, and nothing that was there is lost."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from checkpoints import QUANTIZE, D, Network, assert_same, rows
from compax import manifest, storage
from compax.errors import CaptureError, CheckpointError
from compax.pipeline import Pipeline
from compax.program import Program, capture
from compax.storage import load, save
from sample_encodings import Packed


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Network(), rows(), mode="train")


@pytest.fixture(scope="module")
def quantized(program: Program) -> Program:
    return Pipeline.parse(QUANTIZE)(program)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, quantized: Program) -> Path:
    """A checkpoint that tests copy before they touch it."""
    directory = tmp_path_factory.mktemp("storage") / "saved"
    save(quantized, directory, config={"depth": 2})
    return directory


# -- saving fails -----------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_overwritten_unasked(saved: Path, quantized: Program, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(saved, target)
    before = (target / "compax.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists; choose another folder, or say overwrite=True"):
        save(quantized, target)
    assert (target / "compax.json").read_bytes() == before
    save(quantized, target, config="new", overwrite=True)
    assert manifest.read_manifest(target).config == "new"
    assert_same(load(target, Network(), rows(), mode="train"), quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_foreign_folder_is_never_overwritten(quantized: Program, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    with pytest.raises(CheckpointError, match="is no checkpoint of compax, so it is not overwritten"):
        save(quantized, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_leaves_nothing(
    saved: Path, quantized: Program, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target = tmp_path / "target"
    if overwrite:
        shutil.copytree(saved, target)

    def fill_the_disk(directory: Path, arrays: Any) -> None:
        directory.mkdir()
        (directory / "half").write_bytes(b"0" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    left = "the older checkpoint is unchanged" if overwrite else "nothing was left there"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write", fill_the_disk)
        with pytest.raises(CheckpointError, match=f"cannot save to .*target: No space left on device; {left}"):
            save(program, target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if overwrite else [])
    if overwrite:
        assert_same(load(target, Network(), rows(), mode="train"), quantized)


def test_what_a_killed_process_left_is_cleared(quantized: Program, tmp_path: Path) -> None:
    (tmp_path / ".target.partial" / "arrays").mkdir(parents=True)
    (tmp_path / ".target.partial" / "arrays" / "half").write_text("0")
    save(quantized, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert_same(load(tmp_path / "target", Network(), rows(), mode="train"), quantized)


def test_a_process_that_is_killed_between_two_names_loses_nothing(
    saved: Path, quantized: Program, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / ".target.replaced")
    fails(
        tmp_path / "target",
        r"no checkpoint at .*target: a process was killed .* the one before is .*\.target\.replaced",
    )
    assert_same(load(tmp_path / ".target.replaced", quantized), quantized)
    save(quantized, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_name_that_cannot_be_taken_stays_with_the_older_checkpoint(
    saved: Path, quantized: Program, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "target")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == ".target.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match="Input/output error; the older checkpoint is unchanged"):
            save(program, tmp_path / "target", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert_same(load(tmp_path / "target", quantized), quantized)


def test_inputs_are_not_given_with_a_program(saved: Path, quantized: Program) -> None:
    with pytest.raises(CaptureError, match="go with a model"):
        load(saved, quantized, rows())


def test_what_cannot_be_saved_is_said_before_anything_is_written(program: Program, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config cannot be saved as JSON"):
        save(program, tmp_path / "target", config={"dtype": jnp.float32})
    abstract = capture(nnx.eval_shape(Network), rows(), mode="train")
    with pytest.raises(CheckpointError, match=r"is a shape without values: initialize the program"):
        save(abstract, tmp_path / "target")
    params = {path: jnp.array(x, copy=True) for path, x in program.params.items()}
    params["scale"].delete()
    with pytest.raises(CheckpointError, match="'scale' was donated to a computation"):
        save(program.replace(params=params), tmp_path / "target")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("0")
    with pytest.raises(CheckpointError, match=r"cannot save to .*: Not a directory"):
        save(program, tmp_path / "file" / "target")


# -- loading fails ----------------------------------------------------------------------------------------------------


def fails(directory: Path, match: str, model: Any = None) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(directory, Network() if model is None else model, rows(), mode="train")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_no_checkpoint(tmp_path: Path) -> None:
    fails(tmp_path / "absent", "no checkpoint at .*absent: no such folder")
    (tmp_path / "file").write_text("0")
    fails(tmp_path / "file", "no checkpoint at .*file: it is a file")
    (tmp_path / "folder").mkdir()
    fails(tmp_path / "folder", r"folder is no checkpoint of compax: it holds no compax\.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b'{"format": 1}', b"\xff\xfe", b'{"format": "x"}']
)
def test_a_damaged_description(saved: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "compax.json").write_bytes(content)
    fails(tmp_path / "copy", r"the checkpoint is damaged: .*compax\.json cannot be read")


def test_a_newer_format(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    content = json.loads((saved / "compax.json").read_text()) | {"format": 2, "parameters": "otherwise"}
    content["versions"]["compax"] = "9.9"
    (tmp_path / "copy" / "compax.json").write_text(json.dumps(content))
    fails(
        tmp_path / "copy", r"has format 2, written by compax 9\.9, and this one reads format 1: install a newer compax"
    )


def test_a_pass_that_this_compax_does_not_have(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    content = json.loads((saved / "compax.json").read_text()) | {"pipeline": "conjure(at=blocks.**)"}
    (tmp_path / "copy" / "compax.json").write_text(json.dumps(content))
    fails(tmp_path / "copy", "the pipeline of .* cannot be read: .*")


def largest(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_truncated_and_missing_files(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    file = largest(tmp_path / "copy" / "arrays")
    file.write_bytes(file.read_bytes()[:-10])
    fails(tmp_path / "copy", r"the checkpoint is damaged: .* has [\d,]+ of [\d,]+ bytes; copy it again")
    file.unlink()
    fails(tmp_path / "copy", "the checkpoint is damaged: .* is missing; copy it again")


def test_changed_bits_are_noticed_in_every_file(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    files = [path for path in (tmp_path / "copy" / "arrays").rglob("*") if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 16
        file.write_bytes(bytes(changed))
        fails(tmp_path / "copy", f"the checkpoint is damaged: .*{file.name} was changed; copy it again")
        file.write_bytes(content)


def test_another_model_is_told_apart(saved: Path) -> None:
    fails(saved, r"lacks the parameter 'blocks\.2\.down\.bias'.* another depth \(its config is in", Network(depth=3))
    fails(saved, r"has the parameter 'blocks\.1\..*', which the model does not have", Network(depth=1))
    fails(
        saved,
        r"'blocks\.0\.up\.kernel:values' is int8\[16, 32\] there, and int8\[16, 48\] in the model.* another size",
        Network(width=48),
    )
    fails(saved, r"'scale' is float32\[16\] there, and bfloat16\[16\] in the model", Network(dtype=jnp.bfloat16))


def test_a_model_on_which_the_passes_find_nothing(saved: Path) -> None:
    class Plain(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.ones(D))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.scale

    fails(saved, r"went through 'quantize\(at=blocks\.\*\*\)', which does not fit the model: quantize", Plain())


def test_another_encoding_is_told_apart(tmp_path: Path, program: Program) -> None:
    path = "blocks.0.up.kernel"
    encoded = program.replace(params={**program.params, path: Packed.random((D, 32), group=8)})
    save(encoded, tmp_path / "packed")
    other = program.replace(params={**program.params, path: Packed.random((D, 32), group=4)})
    with pytest.raises(
        CheckpointError, match=r"is Packed\(group=8\) there, and Packed\(group=4\) in the model; its passes"
    ):
        load(tmp_path / "packed", other)
    with pytest.raises(CheckpointError, match=r"is Packed\(group=8\) there, and dense in the model"):
        load(tmp_path / "packed", program)
