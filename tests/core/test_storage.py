"""Checkpoints of programs: what comes back is what was saved, to the bit, or one readable error."""

import dataclasses
import errno
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from compax import manifest, storage
from compax.encoding import Encoded
from compax.errors import CheckpointError
from compax.passes.quantize import QuantizedArray
from compax.pipeline import Pipeline
from compax.program import Program, capture
from compax.storage import load, save

D = 16
QUANTIZE = "quantize(at=blocks.**)"


def rows(count: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, D)), jnp.float32)


def bits(x: Any) -> bytes:
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(data).tobytes()


def assert_same(actual: Program, expected: Program) -> None:
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(dict(actual.params)) == jax.tree.structure(dict(expected.params))
    assert actual.state.keys() == expected.state.keys()
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(left, jax.Array)
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        assert bits(left) == bits(right)
    assert actual.frozen == expected.frozen
    assert list(map(str, actual.history)) == list(map(str, actual.history))
    assert [record.pass_ for record in actual.history] == [record.pass_ for record in expected.history]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 32):
        self.up = nnx.Linear(D, width, rngs=rngs)
        self.down = nnx.Linear(width, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Network(nnx.Module):
    def __init__(self, seed: int = 0, depth: int = 2, width: int = 32, dtype: Any = jnp.float32):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([Block(rngs, width) for _ in range(depth)])
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(D, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x)) * self.scale


@pytest.fixture(scope="module")
def program() -> Program:
    captured = capture(Network(), rows(), mode="train")
    _, state, _ = captured.apply(captured.params, captured.state, rows())
    return captured.replace(state=state)


@pytest.fixture(scope="module")
def quantized(program: Program) -> Program:
    return Pipeline.parse(QUANTIZE)(program)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, quantized: Program) -> Path:
    """A checkpoint that tests copy before they touch it."""
    directory = tmp_path_factory.mktemp("storage") / "saved"
    save(quantized, directory, config={"depth": 2})
    return directory


# -- round trips ------------------------------------------------------------------------------------------------------


def test_a_dense_program_comes_back(tmp_path: Path, program: Program) -> None:
    save(program, tmp_path / "dense")
    loaded = load(tmp_path / "dense", Network(seed=1), rows(), mode="train")
    assert_same(loaded, program)
    np.testing.assert_array_equal(loaded(rows()), program(rows()))
    assert int(loaded.state["dropout.rngs.count"]) == 1


def test_a_quantized_program_comes_back(saved: Path, quantized: Program) -> None:
    loaded = load(saved, Network(seed=1), rows(), mode="train")
    assert isinstance(loaded.params["blocks.0.up.kernel"], QuantizedArray)
    assert_same(loaded, quantized)
    np.testing.assert_array_equal(loaded(rows()), quantized(rows()))
    assert loaded(rows(7)).shape == (7, D), "new shapes replay the passes"


def test_an_abstract_model_is_enough(saved: Path, quantized: Program) -> None:
    example = jax.ShapeDtypeStruct((4, D), jnp.float32)
    assert_same(load(saved, nnx.eval_shape(Network), example, mode="train"), quantized)


def test_a_program_with_several_entries_gets_the_passes_in_all_of_them(saved: Path, quantized: Program) -> None:
    target = capture(nnx.eval_shape(Network), rows(), mode="train").with_entry("eval", rows(2), mode="eval")
    loaded = load(saved, target)
    expected = quantized.with_entry("eval", rows(2), mode="eval")
    np.testing.assert_array_equal(loaded(rows(2), entry="eval"), expected(rows(2), entry="eval"))


def test_loading_into_a_program_that_went_through_the_same_passes(saved: Path, quantized: Program) -> None:
    other = Pipeline.parse(QUANTIZE)(capture(Network(seed=5), rows(), mode="train"))
    assert_same(load(saved, other), quantized)
    assert not jax.tree.leaves(other.params)[0].is_deleted()


def test_frozen_parameters_stay_frozen(tmp_path: Path, program: Program) -> None:
    by_pass = Pipeline.parse("freeze(at=blocks.0.**)")(program)
    save(by_pass, tmp_path / "pass")
    assert_same(load(tmp_path / "pass", Network(), rows(), mode="train"), by_pass)
    by_hand = program.replace(frozen=frozenset({"scale"}))
    save(by_hand, tmp_path / "hand")
    assert_same(load(tmp_path / "hand", Network(), rows(), mode="train"), by_hand)


def test_several_passes_are_replayed_in_order(tmp_path: Path, program: Program) -> None:
    pipeline = "freeze(at=scale) | quantize(at=blocks.0.**) | quantize(at=blocks.1.**, train=true)"
    transformed = Pipeline.parse(pipeline)(program)
    save(transformed, tmp_path / "several")
    assert manifest.read_manifest(tmp_path / "several").pipeline == pipeline
    assert_same(load(tmp_path / "several", Network(), rows(), mode="train"), transformed)


def test_linen_and_functions_come_back(tmp_path: Path) -> None:
    module = nn.BatchNorm(use_running_average=True)
    variables = module.init(jax.random.key(0), rows())
    linen = capture(module, rows(), variables=variables)
    save(linen, tmp_path / "linen")
    assert_same(load(tmp_path / "linen", module, rows(), variables=jax.eval_shape(lambda: variables)), linen)

    params = {"layers": [{"w": jnp.eye(D)}], "odd name/with: everything.é": jnp.ones(D)}
    function = capture(lambda p, x: x @ p["layers"][0]["w"], params, rows())
    save(function, tmp_path / "function")
    assert_same(load(tmp_path / "function", function), function)


DTYPES = [
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("float16", "bfloat16", "float32", "complex64", "float4_e2m1fn", "float8_e4m3", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


def test_every_dtype_comes_back_to_the_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    params: dict[str, Any] = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        if name in ("float16", "bfloat16", "float32", "complex64") or dtype.kind in "iu":
            x = np.frombuffer(generator.bytes(30 * dtype.itemsize), dtype)  # any bits: payloads of NaN, -0.0
        else:
            x = generator.normal(size=30) * 2
        params[name] = jnp.asarray(x.astype(dtype).reshape(6, 5))
    params |= {"scalar": jnp.asarray(1.5), "empty": jnp.zeros((0, 3), jnp.int8), "nan": jnp.asarray([np.nan, -0.0])}
    program = capture(lambda params, x: x, params, rows())
    save(program, tmp_path / "dtypes")
    assert_same(load(tmp_path / "dtypes", program), program)


def test_a_program_without_arrays_comes_back(tmp_path: Path) -> None:
    class Twice(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return 2 * x

    save(capture(Twice(), rows()), tmp_path / "none")
    np.testing.assert_array_equal(load(tmp_path / "none", Twice(), rows())(rows()), 2 * rows())


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back(tmp_path: Path, implementation: str) -> None:
    class Noisy(nnx.Module):
        def __init__(self, seed: int):
            self.key = nnx.Variable(jax.random.key(seed, impl=implementation))
            self.several = nnx.Variable(jax.random.split(jax.random.key(seed, impl=implementation), (2, 3)))
            self.old = nnx.Variable(jax.random.PRNGKey(seed))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + jax.random.normal(self.key[...], x.shape)

    program = capture(Noisy(3), rows())
    save(program, tmp_path / "keys")
    loaded = load(tmp_path / "keys", Noisy(4), rows())
    assert_same(loaded, program)
    assert jax.random.key_impl(loaded.state["key"]) == jax.random.key_impl(program.state["key"])
    np.testing.assert_array_equal(loaded(rows()), program(rows()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(Encoded):
    """Four bits, with scales in eight."""

    codes: Any
    scale: Any
    group: int = dataclasses.field(metadata={"static": True})
    format = "packed"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    def spec(self, spec: PartitionSpec) -> "Packed":
        return Packed(spec, PartitionSpec(spec[0]), self.group)

    def decode(self) -> jax.Array:
        return self.codes.astype(jnp.float32) * self.scale.astype(jnp.float32)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Encoded):
    """A sum of another encoding and a product of two factors."""

    base: Any
    factors: tuple[Any, Any]
    format = "adapted"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def decode(self) -> jax.Array:
        return self.base.decode() + self.factors[0] @ self.factors[1]


def packed(shape: tuple[int, int], group: int = 8) -> Packed:
    generator = np.random.default_rng(1)
    codes = jnp.asarray(generator.integers(-7, 8, shape)).astype(jnp.int4)
    return Packed(codes, jnp.asarray(generator.uniform(size=shape[0])).astype(jnp.float8_e4m3fn), group)


def test_nested_encodings_come_back(tmp_path: Path, program: Program) -> None:
    path = "blocks.0.up.kernel"
    value = Adapted(packed((D, 32)), (jnp.ones((D, 2), jnp.bfloat16), jnp.ones((2, 32), jnp.bfloat16)))
    encoded = program.replace(params={**program.params, path: value})
    save(encoded, tmp_path / "nested")
    stored = manifest.read_manifest(tmp_path / "nested").parameters[path]
    assert stored.encoding == "Adapted(base=Packed(group=8))"
    assert set(stored.arrays) == {"base.codes", "base.scale", "factors.0", "factors.1"}
    assert_same(load(tmp_path / "nested", encoded), encoded)


def test_what_a_checkpoint_says_about_itself(saved: Path) -> None:
    found = manifest.read_manifest(saved)
    assert (found.format, found.pipeline, found.config, found.program) == (1, QUANTIZE, {"depth": 2}, "network")
    assert {"compax", "jax", "flax", "orbax-checkpoint", "numpy", "python"} <= set(found.versions)
    kernel = found.parameters["blocks.1.down.kernel"]
    assert kernel.encoding is not None
    assert kernel.encoding.startswith("QuantizedArray(")
    assert "logical_dtype=float32" in kernel.encoding
    assert (kernel.arrays["values"].shape, kernel.arrays["values"].dtype) == ((32, D), "int8")
    assert (
        found.state["dropout.rngs.key"].arrays[""].key == "threefry2x32"
        or found.state["dropout.rngs.key"].arrays[""].key
    )
    assert json.loads((saved / "compax.json").read_text())["pipeline"] == QUANTIZE


def test_nothing_is_unpickled(saved: Path, quantized: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert_same(load(saved, Network(seed=1), rows(), mode="train"), quantized)


# -- shardings --------------------------------------------------------------------------------------------------------


def test_arrays_go_where_they_are_sent(tmp_path: Path, program: Program) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    encoded = program.replace(params={**program.params, "blocks.0.up.kernel": packed((D, 32))})
    save(encoded, tmp_path / "sent")
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    shardings = {
        "blocks.0.up.kernel": split,
        "blocks.0.down.kernel": split,
        "dropout.rngs.key": NamedSharding(mesh, PartitionSpec()),
    }
    loaded = load(tmp_path / "sent", encoded, shardings=shardings)
    assert_same(loaded, encoded)
    assert loaded.params["blocks.0.down.kernel"].sharding == split
    assert loaded.params["blocks.0.up.kernel"].codes.sharding == split
    assert loaded.params["blocks.0.up.kernel"].scale.sharding.spec == PartitionSpec("data")
    assert len(loaded.state["dropout.rngs.key"].sharding.device_set) == 8
    assert len(loaded.params["scale"].sharding.device_set) == 1
    save(loaded, tmp_path / "sharded")
    assert_same(load(tmp_path / "sharded", encoded), encoded)
    with pytest.raises(CheckpointError, match="given for 'scales', which is no parameter or state"):
        load(tmp_path / "sent", encoded, shardings={"scales": split})


def test_arrays_with_shardings_in_their_types(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w = jax.device_put(jnp.asarray(rows(8)), NamedSharding(mesh, PartitionSpec("data", "model")))
    with jax.set_mesh(mesh):
        program = capture(lambda w, x: x * w, w, 2.0)
        save(program, tmp_path / "explicit")
    assert_same(load(tmp_path / "explicit", lambda w, x: x * w, rows(8), 2.0), program)


def test_unsharded_arrays_are_not_bound_to_a_device(saved: Path) -> None:
    loaded = load(saved, Network(), rows(), mode="train")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(rows(8), NamedSharding(mesh, PartitionSpec("data")))
    assert len(loaded(x).sharding.device_set) == 8


# -- a pipeline at load -----------------------------------------------------------------------------------------------


def test_a_dense_checkpoint_loads_into_a_transformed_program(
    tmp_path: Path, program: Program, quantized: Program
) -> None:
    save(program, tmp_path / "dense")
    loaded = load(tmp_path / "dense", Network(seed=1), rows(), mode="train", pipeline=QUANTIZE)
    assert_same(loaded, quantized)


def test_passes_that_the_checkpoint_has_not_seen_follow(tmp_path: Path, program: Program) -> None:
    frozen = Pipeline.parse("freeze(at=scale)")(program)
    save(frozen, tmp_path / "frozen")
    whole = f"freeze(at=scale) | {QUANTIZE}"
    assert_same(
        load(tmp_path / "frozen", Network(), rows(), mode="train", pipeline=whole), Pipeline.parse(whole)(program)
    )


def test_other_passes_are_refused(saved: Path, program: Program, quantized: Program, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"went through 'quantize\(at=blocks\.\*\*\)', and 'freeze\(\)' does not begin"
    ):
        load(saved, Network(), rows(), mode="train", pipeline="freeze()")
    other = Pipeline.parse("quantize(at=blocks.0.**)")(program)
    with pytest.raises(
        CheckpointError, match=r"but the program that it is loaded into through 'quantize\(at=blocks\.0\.\*\*\)'"
    ):
        load(saved, other)
    save(program, tmp_path / "dense")
    with pytest.raises(
        CheckpointError, match="went through no pass, but the program that it is loaded into through 'quantize"
    ):
        load(tmp_path / "dense", quantized)


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

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write", fill_the_disk)
        with pytest.raises(
            CheckpointError, match=r"cannot save to .*target: No space left on device; nothing was left"
        ):
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


def attempt(directory: Path, model: Any) -> tuple[Program | None, str]:
    try:
        return load(directory, model), ""
    except CheckpointError as error:
        return None, str(error)


def test_changed_bits_are_noticed(saved: Path, quantized: Program, tmp_path: Path) -> None:
    """In arrays, where nothing but the fingerprint tells, and in every other file of the checkpoint."""
    files = [path.relative_to(saved) for path in (saved / "arrays").rglob("*") if path.is_file()]
    noticed = 0
    for file in files:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        content = bytearray((copy / file).read_bytes())
        content[len(content) // 2] ^= 16
        (copy / file).write_bytes(bytes(content))
        loaded, error = attempt(copy, quantized)
        if loaded is not None:
            assert_same(loaded, quantized)  # a file that Orbax does not need
        else:
            assert "is damaged" in error
            assert "\n" not in error
            noticed += 1
    assert noticed >= 2


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
    encoded = program.replace(params={**program.params, path: packed((D, 32), group=8)})
    save(encoded, tmp_path / "packed")
    other = program.replace(params={**program.params, path: packed((D, 32), group=4)})
    with pytest.raises(
        CheckpointError, match=r"is Packed\(group=8\) there, and Packed\(group=4\) in the model; its passes"
    ):
        load(tmp_path / "packed", other)
    with pytest.raises(CheckpointError, match=r"is Packed\(group=8\) there, and dense in the model"):
        load(tmp_path / "packed", program)


# -- memory and bits --------------------------------------------------------------------------------------------------


def test_arrays_are_read_in_groups_no_larger_than_the_largest() -> None:
    def wanted(size: int) -> Any:
        return storage._Wanted(jax.ShapeDtypeStruct((size,), jnp.int8), None, None)  # type: ignore[arg-type]

    sizes = [3, 3, 10, 1, 9, 1, 4, 4, 4]
    groups = list(storage._groups({str(index): wanted(size) for index, size in enumerate(sizes)}))
    assert [[sizes[int(name)] for name in group] for group in groups] == [[3, 3], [10], [1, 9], [1, 4, 4], [4]]


@pytest.mark.parametrize("dtype", ["bool", "int4", "int8", "bfloat16", "float8_e5m2", "float32", "complex64"])
def test_a_fingerprint_tells_bits_and_their_order(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 6))).astype(dtype)
    same = int(manifest.fingerprint(x))
    assert int(manifest.fingerprint(jnp.array(x, copy=True))) == same
    for row in range(4):
        changed = x.at[row, 5].set(jnp.asarray(x[row, 5] == 0).astype(dtype))
        assert int(manifest.fingerprint(changed)) != same
    assert int(manifest.fingerprint(x[::-1])) != same


def test_a_fingerprint_does_not_depend_on_the_sharding() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model")))
    assert int(manifest.fingerprint(split)) == int(manifest.fingerprint(x))
