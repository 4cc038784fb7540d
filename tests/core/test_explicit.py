"""Sharded programs called on meshes with Explicit axes: the values of one device, and types that say how they lie."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import compax
from compax import Pipeline
from compax.errors import PlacementError, ShardingError
from compax.models import decoder
from compax.program import Program

SHAPE = dataclasses.replace(
    decoder.SIZES["smollm2-135m"],
    num_layers=2,
    model_dim=32,
    hidden_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    scan=True,
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 17), 0, 64)


@pytest.fixture(scope="module")
def model() -> decoder.Decoder:
    return decoder.Decoder(SHAPE, rngs=nnx.Rngs(0))


def mesh_of(**sizes: int) -> Mesh:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def split(mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize(
    "pipeline", ["shard(fsdp=4, tensor=2, sequence=tensor)", "shard(data=4, tensor=2, zero=2) | remat()"]
)
def test_losses_and_gradients_are_those_of_one_device(model: Any, pipeline: str, in_context: bool) -> None:
    base = compax.capture(model, {"tokens": TOKENS}, loss=decoder.loss)
    laid = Pipeline.parse(pipeline)(base)
    assert laid.placement.mesh is not None
    mesh = mesh_of(**laid.placement.mesh.shape)

    def loss(params: Any, program: Program, tokens: jax.Array) -> jax.Array:
        return program.apply(params, program.state, {"tokens": tokens})[0][0]

    value, gradients = jax.value_and_grad(loss)(dict(base.params), base, TOKENS)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        placed = laid.place(mesh)
        tokens = split(mesh, laid.placement.batch)
        step = jax.jit(jax.value_and_grad(lambda params, tokens: loss(params, placed, tokens)))
        found, here = step(dict(placed.params), tokens)
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    for path, gradient in here.items():
        np.testing.assert_allclose(gradient, gradients[path], atol=2e-6)
        assert jax.typeof(gradient).sharding.spec == jax.typeof(placed.params[path]).sharding.spec


def test_results_have_the_types_of_their_constraints(model: Any) -> None:
    base = compax.capture(model, TOKENS)
    mesh = mesh_of(fsdp=4, tensor=2)
    program = Pipeline.parse("shard(fsdp=4, tensor=2)")(base).place(mesh)
    logits = program(split(mesh, "fsdp"))
    assert jax.typeof(logits).sharding.spec == PartitionSpec("fsdp", None, "tensor")
    np.testing.assert_allclose(logits, base(TOKENS), atol=2e-6)
    # Other shapes are captured when they come, on Auto axes too; values that are whole are taken as well.
    with jax.set_mesh(mesh):
        shorter = program(jnp.asarray(TOKENS[:4, :9]))
    np.testing.assert_allclose(shorter, base(TOKENS[:4, :9]), atol=2e-6)


def test_many_at_once(model: Any) -> None:
    base = compax.capture(model, TOKENS)
    mesh = mesh_of(data=8)
    program = Pipeline.parse("shard(data=8)")(base).place(mesh)
    tokens = jax.device_put(jnp.stack([TOKENS, TOKENS[::-1]]), NamedSharding(mesh, PartitionSpec(None, "data")))
    logits = jax.jit(jax.vmap(lambda tokens: program.apply(program.params, program.state, tokens)[0]))(tokens)
    assert jax.typeof(logits).sharding.spec == PartitionSpec(None, "data", None, None)
    np.testing.assert_allclose(logits[1], base(TOKENS[::-1]), atol=2e-6)


def test_another_mesh_is_refused(model: Any) -> None:
    program = Pipeline.parse("shard(data=8)")(compax.capture(model, TOKENS)).place()
    with pytest.raises(PlacementError, match="laid over data=8, and the mesh given is rows=8"):
        program(split(mesh_of(rows=8), "rows"))


def test_a_model_that_says_how_values_lie_is_refused() -> None:
    mesh = mesh_of(data=8)
    with jax.set_mesh(mesh):
        program = compax.capture(
            lambda params, x: jax.sharding.reshard(x @ params["w"], PartitionSpec("data")),
            {"w": jnp.ones((4, 4))},
            jnp.ones((8, 4)),
        )
    with pytest.raises(ShardingError, match="capture the model under a mesh whose axes are Auto, or under none"):
        Pipeline.parse("shard(data=8)")(program)
