"""Checkpoints: what comes back is what was saved, and what is damaged is told in one line."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax.errors import CheckpointError
from compax.experiments.checkpoint import Checkpoints, digests, named, read_lines


@pytest.fixture
def tree() -> dict:
    return {
        "params": {"a.kernel": jax.random.normal(jax.random.key(0), (64, 33)), "b": jnp.ones(3, jnp.bfloat16)},
        "state": {"key": jax.random.key(3), "count": jnp.uint32(7), "small": jnp.arange(-3, 3, dtype=jnp.int4)},
    }


def saved(directory: Path, tree: dict) -> Path:
    checkpoints = Checkpoints(directory)
    checkpoints.save(5, tree, {"data": {"next_index": 3}})
    checkpoints.close()
    return directory / "checkpoints" / "5"


def test_round_trip_in_every_dtype(tmp_path: Path, tree):
    saved(tmp_path, tree)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.latest == 5
    assert checkpoints.meta(5)["data"] == {"next_index": 3}
    found = checkpoints.restore(5, jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for name, leaf in named(found).items():
        assert leaf.dtype == named(tree)[name].dtype
        np.testing.assert_array_equal(leaf, named(tree)[name])
    part = checkpoints.restore(5, {"params": {"b": tree["params"]["b"]}})
    np.testing.assert_array_equal(part["params"]["b"], tree["params"]["b"])


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path: Path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(1_000_000)
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in range(5):
        checkpoints.save(step, {"x": x}, {})
        x = add(x)
    checkpoints.wait()
    for step in range(5):
        np.testing.assert_array_equal(checkpoints.restore(step, {"x": x})["x"], np.full(1_000_000, step))
    checkpoints.close()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"other": jnp.zeros(2)}, "does not hold other"),
        (
            {"params": {"b": jnp.zeros(4, jnp.bfloat16)}},
            r"holds params/b as bfloat16\[3\], the model has bfloat16\[4\]",
        ),
        ({"params": {"b": jnp.zeros(3)}}, r"the model has float32\[3\]"),
    ],
)
def test_other_arrays_are_named(tmp_path: Path, tree, like, message):
    saved(tmp_path, tree)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, read_only=True).restore(5, like)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bits(folder: Path) -> None:
    path = largest(folder / "arrays")
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 8] = bytes(8)
    path.write_bytes(contents)


def cut(folder: Path) -> None:
    path = largest(folder / "arrays")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


DAMAGE = {
    "flipped bits": flip_bits,
    "cut short": cut,
    "no arrays": lambda folder: largest(folder / "arrays").unlink(),
    "no meta": lambda folder: (folder / "meta" / "metadata").unlink(),
    "bad meta": lambda folder: (folder / "meta" / "metadata").write_text("{"),
    "no metadata": lambda folder: (folder / "arrays" / "_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_line_that_names_the_folder(tmp_path: Path, tree, damage):
    folder = saved(tmp_path, tree)
    damage(folder)
    with pytest.raises(CheckpointError, match=r"delete the folder .*5 to go on") as caught:
        Checkpoints(tmp_path, read_only=True).restore(5, tree)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoints(tmp_path)


def test_digests_tell_bits_and_places():
    array = jnp.arange(8.0)
    swapped, negative_zero = array[::-1], array.at[0].set(-0.0)
    found = [digests({"x": x})["x"] for x in (array, swapped, negative_zero)]
    assert len({tuple(digest) for digest in found}) == 3


def test_lines_end_at_the_first_broken_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert read_lines(tmp_path / "none") == []
