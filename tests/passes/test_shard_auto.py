"""The pass `shard` with `auto`: what it chooses, that losses stay, what it refuses, and that its choice is replayed."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.passes.test_shard import SHAPE, trained

import compax
from compax import Pipeline, Program
from compax.errors import BudgetError, PipelineError, ShardingError
from compax.mesh_links import MeshLinks
from compax.models import decoder
from compax.passes import Shard
from compax.target import Target

SLICE = Target.parse("v5e:2x4")
AUTO = "shard(auto, compiles=0)"
WHOLE = "heads->-, hidden->-, vocabulary->-"
LARGE = {"model_dim": 512, "hidden_dim": 2048, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "num_layers": 4}


def shapes(batch: int, length: int = 17) -> dict[str, Any]:
    return {"tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32)}


def capture(batch: int, length: int = 17, **changes: Any) -> Program:
    config = dataclasses.replace(SHAPE, scan=True, **changes)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    return compax.capture(model, shapes(batch, length), loss=decoder.loss)


def chosen(program: Program, text: str = AUTO, target: Target = SLICE) -> Shard:
    pass_ = Pipeline.parse(text)(program, target=target).history[-1].pass_
    assert isinstance(pass_, Shard)
    return pass_


def test_a_small_model_with_a_large_batch_is_data_parallel() -> None:
    assert chosen(capture(64)) == Shard(data=8)


def test_parameters_are_split_where_memory_is_short() -> None:
    program = capture(64, num_layers=8)
    assert chosen(program) == Shard(data=8)
    assert chosen(program, f"shard(auto, compiles=0, budget=7.85MB, rules=[{WHOLE}])").fsdp is not None


def test_parameters_are_split_where_compute_hides_their_gathers() -> None:
    assert chosen(capture(64, 257, **LARGE)) == Shard(fsdp=8)


def test_heads_are_split_where_the_batch_is_smaller_than_the_devices() -> None:
    assert (chosen(capture(2, 257, **LARGE)).tensor or 0) >= 4


def _mixture(params: Any, x: jax.Array) -> jax.Array:
    """Two of eight experts for each token. Their hidden axis divides by nothing, so that `tensor` cannot split it."""
    gates, index = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    weights = (jax.nn.one_hot(index, 8) * gates[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, params["gate"]))
    hidden = hidden * jnp.einsum("btd,edf->btef", x, params["up"])
    return jnp.square(x + jnp.einsum("btef,efd,bte->btd", hidden, params["down"], weights)).mean()


def test_experts_are_split_where_they_are_larger_than_what_they_compute() -> None:
    random = np.random.default_rng(0)
    sizes = {"router": (128, 8), "gate": (8, 128, 509), "up": (8, 128, 509), "down": (8, 509, 128)}
    params = {name: jnp.asarray(0.1 * random.standard_normal(size), jnp.float32) for name, size in sizes.items()}
    x = jnp.asarray(random.standard_normal((8, 16, 128)), jnp.float32)
    base = compax.capture(_mixture, params, x)
    program = Pipeline.parse(AUTO)(base, target=SLICE)
    assert program.history[-1].pass_ == Shard(expert=8)
    program = program.place()
    gradients = [
        jax.jit(jax.grad(lambda p, at=at: at.apply(p, at.state, x)[0]))(dict(at.params)) for at in (program, base)
    ]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.slow
def test_losses_are_those_of_one_device() -> None:
    model = decoder.Decoder(dataclasses.replace(SHAPE, scan=True), rngs=nnx.Rngs(0))
    base = compax.capture(model, {"tokens": jnp.zeros((8, 17), jnp.int32)}, loss=decoder.loss)
    expected = trained(base, 5)
    for text in (AUTO, 'shard(auto, mesh="fsdp=2,tensor=4", compiles=0) | remat(keep=nothing)'):
        program = Pipeline.parse(text)(base, target=SLICE).place()
        np.testing.assert_allclose(trained(program, 5), expected, rtol=2e-5)


def test_of_a_given_mesh_the_rest_is_chosen() -> None:
    pass_ = chosen(capture(8), 'shard(auto, mesh="fsdp=2,tensor=4", compiles=0)')
    assert (pass_.fsdp, pass_.tensor) == (2, 4)
    assert pass_.auto is False


def test_rules_are_respected() -> None:
    program = capture(8, 17, **LARGE)
    assert chosen(program).tensor is not None
    pass_ = chosen(program, f"shard(auto, compiles=0, rules=[{WHOLE}])")
    assert pass_.tensor is None
    assert len(pass_.rules) == 3


def test_history_has_what_was_chosen_and_replays_it_without_a_search(tmp_path: Any) -> None:
    model = decoder.Decoder(dataclasses.replace(SHAPE, scan=True), rngs=nnx.Rngs(0))
    base = compax.capture(model, {"tokens": jnp.zeros((8, 17), jnp.int32)}, loss=decoder.loss)
    program = Pipeline.parse(AUTO)(base, target=SLICE)
    record = program.history[-1]
    assert "auto" not in record.text
    assert any("auto chose of" in note and "predicted" in note for note in record.notes)
    assert sum(note.startswith("or ") for note in record.notes) >= 3
    again = Pipeline.parse(record.text)(base, target=SLICE)
    assert again.placement == program.placement
    compax.save(program, tmp_path / "saved")
    loaded = compax.load(tmp_path / "saved", base)
    assert loaded.history[-1].text == record.text


def test_passes_that_follow_are_looked_at() -> None:
    program = capture(64, 257, **LARGE)
    plain, again = (
        Pipeline.parse(f"shard(auto, compiles=0){rest}")(program, target=SLICE).history[0].notes[0]
        for rest in ("", " | remat(keep=nothing)")
    )
    assert plain != again


@pytest.mark.slow
def test_the_best_are_compiled_where_there_is_a_compiler() -> None:
    program = Pipeline.parse("shard(auto, compiles=2)")(capture(16), target=Target.parse("cpu"))
    notes = program.history[-1].notes
    assert sum("compiled" in note for note in notes) == 2
    assert program.placement.mesh is not None
    assert program.placement.mesh.size == 8


def test_a_budget_that_cannot_be_met_says_the_least() -> None:
    with pytest.raises(BudgetError, match=r"needs least, 777.1 kB \(predicted\).*remat.*more chips"):
        Pipeline.parse("shard(auto, compiles=0, budget=1KiB)")(capture(8), target=SLICE)


def test_without_a_loss_nothing_is_chosen() -> None:
    model = nnx.eval_shape(lambda: decoder.Decoder(SHAPE, rngs=nnx.Rngs(0)))
    program = compax.capture(model, jax.ShapeDtypeStruct((8, 16), jnp.int32))
    with pytest.raises(ShardingError, match="capture the model with it"):
        Pipeline.parse(AUTO)(program, target=SLICE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shard(auto, fsdp=8)", "auto chooses 'fsdp'"),
        ("shard(auto, sequence=tensor)", "auto chooses 'sequence'"),
        ("shard(data=8, budget=1GiB)", "'budget' is for auto"),
        ('shard(data=8, mesh="data=8")', "'mesh' is for auto"),
    ],
)
def test_impossible_options(text: str, said: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(said)):
        Pipeline.parse(text)


def test_axes_lie_on_the_torus_as_jax_lays_them() -> None:
    links = MeshLinks(Target.parse("v5p:4x4x8"), {"fsdp": 32, "tensor": 4})
    # 32 lie along two rings (4 and 8), 4 along one: twice as many links.
    wide, narrow = (links.seconds("all-gather", 1e9, (name,)) for name in ("fsdp", "tensor"))
    assert narrow / wide == pytest.approx(2 * (3 / 4) / (31 / 32), rel=0.01)
