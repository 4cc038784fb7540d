"""Which array has which sharding: rules, what follows them, and what is wrong with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import compax
from compax.errors import ShardingError
from compax.experiments import programs, shardings
from compax.manifest import is_key
from compax.passes.shard.rules import parameter_specs
from compax.placement import Placement

AXES = {"data": 2, "model": 4}
PARAMS = {
    "embed.embedding": jax.ShapeDtypeStruct((96, 32), jnp.float32),
    "blocks.mlp.up.kernel": jax.ShapeDtypeStruct((2, 32, 80), jnp.float32),
    "blocks.mlp.down.kernel": jax.ShapeDtypeStruct((2, 80, 32), jnp.float32),
    "norm.scale": jax.ShapeDtypeStruct((32,), jnp.float32),
}


def test_rules_name_parameters_and_later_ones_override():
    rules = ("blocks.**: -,data", "blocks.mlp.up.kernel: -,data,model", "embed.*: data+model,-")
    assert parameter_specs(PARAMS, rules, AXES) == {
        "embed.embedding": PartitionSpec(("data", "model")),
        "blocks.mlp.up.kernel": PartitionSpec(None, "data", "model"),
        "blocks.mlp.down.kernel": PartitionSpec(None, "data"),
        "norm.scale": PartitionSpec(),
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embed.embedding", "is not 'GLOB: SPEC'"),
        ("embed.embedding:", "is not 'GLOB: SPEC'"),
        ("embed.embedding: modle,-", "names the mesh axis 'modle', the mesh has data, model; did you mean model?"),
        ("embed.embedding: data,data", "uses the mesh axis 'data' for two dimensions"),
        ("embed.embeding: data,-", "embed.embedding"),
        ("norm.scale: -,data", "2 entries for 1 dimension(s)"),
        ("blocks.mlp.up.kernel: model,-,-", "dimension 0 is 2, which model (4) does not divide"),
        ("blocks.mlp.up.kernel: -,-,data+model", None),
        ("embed.embedding: -,x+data", "names the mesh axis 'x'"),
    ],
)
def test_what_is_wrong_with_a_rule(rule, message):
    if message is None:
        assert parameter_specs(PARAMS, (rule,), AXES)
        return
    with pytest.raises(ShardingError) as told:
        parameter_specs(PARAMS, (rule,), AXES)
    assert message in str(told.value)
    assert str(told.value).startswith("shard(rules=...): ")
    assert "\n" not in str(told.value)


def test_rules_of_the_optimizer_come_after_those_of_parameters():
    params = parameter_specs(PARAMS, ("blocks.**: -,data",), AXES)
    specs = parameter_specs(PARAMS, ("**.up.kernel: -,-,model",), AXES, params, "sharding.optimizer")
    assert specs["blocks.mlp.down.kernel"] == PartitionSpec(None, "data")
    assert specs["blocks.mlp.up.kernel"] == PartitionSpec(None, None, "model")
    with pytest.raises(ShardingError, match=r"^sharding\.optimizer: 'nothing: data'"):
        parameter_specs(PARAMS, ("nothing: data",), AXES, params, "sharding.optimizer")


def test_the_optimizer_follows_its_parameters():
    specs = parameter_specs(PARAMS, ("blocks.mlp.up.kernel: -,data,model",), AXES)
    state = jax.eval_shape(optax.adamw(1e-3).init, PARAMS)
    found = shardings.follow(state, PARAMS, specs)
    assert found[0].mu["blocks.mlp.up.kernel"] == PartitionSpec(None, "data", "model")
    assert found[0].nu["blocks.mlp.up.kernel"] == PartitionSpec(None, "data", "model")
    assert found[0].mu["norm.scale"] == found[0].count == PartitionSpec()


def test_factored_moments_have_another_shape_and_stay_whole():
    specs = parameter_specs(PARAMS, ("embed.embedding: model,-",), AXES)
    state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, PARAMS)
    found = jax.tree.leaves(shardings.follow(state, PARAMS, specs))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (96,) in shapes
    assert all(spec == PartitionSpec() for spec, shape in zip(found, shapes, strict=True) if shape != (96, 32))


def test_encoded_parameters_are_split_leaf_by_leaf():
    program = compax.capture(lambda params, x: x @ params["w"], {"w": jnp.ones((64, 32))}, jnp.ones((4, 64)))
    encoded = compax.Pipeline.parse("quantize(weights=int8)")(program).params
    specs = parameter_specs(encoded, ("w: -,model",), AXES)
    leaves = jax.tree.leaves(shardings.follow(encoded, encoded, specs))
    assert len(leaves) == len(jax.tree.leaves(encoded)) > 1
    assert PartitionSpec(None, "model") in leaves


def test_a_batch_over_axes():
    assert shardings.batch_spec(("data",), AXES, 6) == PartitionSpec(None, "data")
    assert shardings.batch_spec(("data", "model"), AXES, 16) == PartitionSpec(None, ("data", "model"))
    assert shardings.batch_spec((), AXES, 3) == PartitionSpec(None, None)
    with pytest.raises(ShardingError, match=r"a micro-batch of 3 sequence\(s\) does not divide over data \(2\)"):
        shardings.batch_spec(("data",), AXES, 3)
    with pytest.raises(ShardingError, match="did you mean data"):
        shardings.batch_spec(("dat",), AXES, 4)


def test_bytes_of_one_device():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = parameter_specs(PARAMS, ("blocks.mlp.up.kernel: -,data,model",), AXES)
    placed = shardings.abstract(mesh, PARAMS, shardings.follow(PARAMS, PARAMS, specs))
    expected = 4 * (96 * 32 + 2 * 32 * 80 // 8 + 2 * 80 * 32 + 32)
    assert shardings.device_bytes(placed) == expected


def test_tokens_come_to_the_devices_row_by_row():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    feed = shardings.Feed.of(Placement(mesh=mesh, batch=("data",)), (2, 8, 3))
    assert feed.batch_rows == list(range(16))
    tokens = np.arange(48, dtype=np.int32).reshape(16, 3)
    found = feed.put(tokens)
    np.testing.assert_array_equal(found, tokens.reshape(2, 8, 3))
    assert found.sharding.spec == PartitionSpec(None, "data")


def test_all_devices_are_one_mesh(make):
    def placed(**changes) -> Placement:
        config = make(**changes)
        return shardings.over_all_devices(config, programs.build_program(config, 260, abstract=True))

    assert dict(placed().mesh.shape) == {"data": 8}
    rules = {"plan__mesh": "data=2,model=-1", "sharding__params": "('embed.embedding: model,-',)"}
    found = placed(**rules)
    assert dict(found.mesh.shape) == {"data": 2, "model": 4}
    assert found.specs["embed.embedding"] == PartitionSpec("model")
    assert placed(pipeline="shard(fsdp=-1)").batch == ("fsdp",)
    with pytest.raises(ShardingError, match=r"mesh 'data=2' is of 2 devices, and there are 8: make the sizes multiply"):
        placed(plan__mesh="data=2")


@pytest.mark.slow
def test_parameters_are_drawn_where_they_lie(make):
    config = make(pipeline="shard(fsdp=-1)", model__overrides__dropout=0.1)
    program, whole = programs.build_over_devices(config, 260), programs.build_program(config, 260)
    kernel = program.params["blocks.0.mlp.up.kernel"]
    assert kernel.addressable_shards[0].data.nbytes * 8 == kernel.nbytes
    for own, other in ((program.params, whole.params), (program.state, whole.state)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *map(_numbers, (own, other)))


def _numbers(arrays):
    return {path: jax.random.key_data(x) if is_key(x) else x for path, x in arrays.items()}
