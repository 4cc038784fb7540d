"""Checkpoints of programs: what comes back is what was saved, to the bit."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from checkpoints import QUANTIZE, D, Network, assert_same, rows
from compax import manifest, storage
from compax.errors import CheckpointError
from compax.passes.quantize import QuantizedArray
from compax.pipeline import Pipeline
from compax.program import Program, capture
from compax.storage import load, save
from sample_encodings import Adapted, Packed


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


def test_what_a_person_declared_comes_back(tmp_path: Path, program: Program) -> None:
    axis = program.axes()[0].name
    declared = program.declare(axis=axis, kind="fixed")
    save(declared, tmp_path / "declared")
    loaded = load(tmp_path / "declared", Network(seed=1), rows(), mode="train")
    assert loaded.declared == declared.declared
    assert "declared fixed" in loaded.meaning().axis(axis).fixed
    assert load(tmp_path / "declared", declared).declared == declared.declared


def test_several_passes_are_replayed_in_order(tmp_path: Path, program: Program) -> None:
    pipeline = "quantize(at=blocks.0.**) | quantize(at=blocks.1.**, train=true) | freeze(at=scale)"
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


def test_nested_encodings_come_back(tmp_path: Path, program: Program) -> None:
    path = "blocks.0.up.kernel"
    encoded = program.replace(params={**program.params, path: Adapted.over(Packed.random((D, 32)))})
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
    encoded = program.replace(params={**program.params, "blocks.0.up.kernel": Packed.random((D, 32))})
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
    first = Pipeline.parse(QUANTIZE)(program)
    save(first, tmp_path / "first")
    whole = f"{QUANTIZE} | freeze(at=scale)"
    loaded = load(tmp_path / "first", Network(), rows(), mode="train", pipeline=whole)
    assert_same(loaded, Pipeline.parse(whole)(program))


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


# -- memory --------------------------------------------------------------------------------------------------


def test_arrays_are_read_in_groups_no_larger_than_the_largest() -> None:
    def groups(*sizes: int) -> list[list[int]]:
        wanted: Any = {
            str(index): storage._Wanted(
                jax.ShapeDtypeStruct((size,), jnp.int8), manifest.StoredArray((), "", None), None
            )
            for index, size in enumerate(sizes)
        }
        return [[sizes[int(name)] for name in group] for group in storage._groups(wanted)]

    assert groups(3, 3, 10, 1, 9, 1, 4, 4, 4) == [[3, 3], [10], [1, 9], [1, 4, 4], [4]]
    most = storage.GROUP_BYTES
    assert groups(most // 2, most // 2, 1, 5 * most, most, 1) == [[most // 2, most // 2], [1], [5 * most], [most], [1]]
    assert groups() == []


MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp
from compax.program import capture
from compax.storage import load

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def peak_of(call):
    peak, done = 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    return result, peak - before

def shapes(count, size):
    params = {f"w{i}": jax.ShapeDtypeStruct((size, 1 << 20), jnp.int8) for i in range(count)}
    return params | {"large": jax.ShapeDtypeStruct((4 * size, 1 << 20), jnp.int8)}

small, large = (capture(lambda params, x: x, shapes(*arguments), 1.0) for arguments in ((2, 1), (20, 16)))
load(sys.argv[1], small)  # imports, and what is allocated once
program, peak = peak_of(lambda: load(sys.argv[2], large))
print(peak, sum(x.nbytes for x in program.params.values()), max(x.nbytes for x in program.params.values()))
"""


@pytest.mark.slow  # writes and reads 400 MB
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_loading_needs_the_stored_program_and_its_largest_array(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count, size in (("small", 2, 1), ("large", 20, 16)):
        sizes = {f"w{index}": size for index in range(count)} | {"large": 4 * size}
        params = {key: jnp.asarray(generator.integers(-127, 128, (n, 1 << 20), np.int8)) for key, n in sizes.items()}
        save(capture(lambda params, x: x, params, 1.0), tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # glibc gives freed blocks back: count what is held
    )
    peak, stored, largest = map(int, result.stdout.split())
    assert (stored, largest) == (384 << 20, 64 << 20)
    assert peak < stored + largest + (48 << 20), "the last term: buffers that do not grow with the program"


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from compax.program import capture
from compax.storage import load, save

values = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
w = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
program = capture(lambda w, x: x @ w, w, jax.ShapeDtypeStruct((2, 64), jnp.float32))
for _ in range(2):
    save(program, sys.argv[3], overwrite=True)
loaded = load(sys.argv[3], program, shardings={"params": split})
for shard in loaded.params["params"].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
assert len(loaded.params["params"].addressable_shards) == 4
"""


@pytest.mark.slow  # starts two processes
def test_several_processes_save_and_load_one_program(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", PROCESS, str(port)]
    processes = [
        subprocess.Popen(
            [*arguments, str(index), str(tmp_path / "shared")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    program = capture(lambda w, x: x @ w, jnp.zeros((64, 16)), jnp.zeros((2, 64)))
    loaded = load(tmp_path / "shared", program)  # and in one process
    np.testing.assert_array_equal(loaded.params["params"], np.arange(64 * 16, dtype=np.float32).reshape(64, 16))
