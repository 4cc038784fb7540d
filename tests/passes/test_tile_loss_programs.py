"""The loss in chunks in whole models, after other passes, and in the settings that programs run in."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compax
from compax import Program
from compax.contracts import rounding_tolerance
from compax.errors import SelectorError
from compax.models import decoder
from compax.passes.tile_loss import OPERATION, TileLoss
from compax.placement import Placement
from oracle import assert_preserves
from small import TOKENS, Model, run, statuses
from tiled import (
    LABELS,
    PARAMS,
    WEIGHTS,
    D,
    V,
    X,
    assert_alike,
    assert_tiled,
    biased,
    log_softmax_picked,
    looked_at,
    operations,
    program,
    with_accuracy,
)

TINY = decoder.SIZES["tiny"]


# -- models -----------------------------------------------------------------------------------------------------------


def decoder_program(batch: int = 2, sequence: int = 16, mode: str = "train", **options: Any) -> tuple[Program, Any]:
    config = dataclasses.replace(TINY, **options)
    given = {"tokens": decoder.example_inputs(config, batch=batch, sequence=sequence + 1)[0]}
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    return compax.capture(model, given, loss=decoder.loss, mode=mode), given


def loss_and_gradients(program: Program, batch: Any) -> Any:
    trainable, rest = program.partition()
    loss = lambda params: jax.tree.leaves(program.apply({**rest, **params}, program.state, batch)[0])[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(trainable)


DECODERS = {
    "tied": {},
    "untied": {"tied": False},
    "scanned, with remat": {"scan": True, "remat": True},
    "with dropout": {"dropout": 0.1},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=40)"])
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_decoder(options: Any, pipeline: str) -> None:
    before, batch = decoder_program(**options)
    after = run(pipeline, before)
    assert list(statuses(after).values()) == ["rewritten"]
    assert_alike(loss_and_gradients(before, batch), loss_and_gradients(after, batch), _tolerance(options))


def _tolerance(options: Any) -> float | None:
    return rounding_tolerance("bfloat16") if "dtype" in options else None


def test_linen() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(V, D)
            return embed.attend(nn.tanh(nn.Dense(D)(embed(tokens)))) + self.param("bias", nn.initializers.zeros, (V,))

    variables = Model().init(jax.random.key(0), LABELS)
    loss = lambda model, y: optax.softmax_cross_entropy_with_integer_labels(model(y), y).mean()  # noqa: E731
    before = compax.capture(Model(), LABELS, variables=variables, loss=loss)
    after = run("tile_loss(tokens=8)", before)
    assert list(statuses(after).values()) == ["rewritten"]
    assert_alike(loss_and_gradients(before, LABELS), loss_and_gradients(after, LABELS))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=40)"])
@pytest.mark.parametrize(
    "first",
    ["quantize(weights=int8)", "quantize(weights=int8, activations=int8)", "quantize(weights=int8, train=true)"],
)
def test_heads_stored_in_int8(first: str, pipeline: str) -> None:
    for tied in (False, True):
        before, batch = decoder_program(tied=tied)
        before = run(first, before)
        after = run(pipeline, before)
        assert list(statuses(after).values()) == ["rewritten"]
        assert_alike(loss_and_gradients(before, batch), loss_and_gradients(after, batch))
        assert str(after.coverage()) == str(before.coverage())


def test_after_cast() -> None:
    before, batch = decoder_program()
    before = run("cast(compute=bfloat16)", before)
    after = run("tile_loss(tokens=8)", before)
    (value, gradients), (expected, exact) = loss_and_gradients(after, batch), loss_and_gradients(before, batch)
    assert_alike(expected, value)
    assert_alike(exact, gradients, rounding_tolerance("bfloat16"))


def test_frozen_head() -> None:
    before, batch = decoder_program(tied=False)
    before = run("freeze(at=head.**)", before)
    after = run("tile_loss(tokens=8)", before)
    assert_alike(loss_and_gradients(before, batch), loss_and_gradients(after, batch))


def test_attention_and_routers_are_no_losses() -> None:
    config = dataclasses.replace(TINY)
    tokens = decoder.example_inputs(config, sequence=16)
    with pytest.raises(SelectorError):
        run("tile_loss(tokens=8)", compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *tokens))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_remat_around_the_loss() -> None:
    checkpointed = jax.checkpoint(lambda p, x, y: log_softmax_picked(biased(p, x), y).mean())
    before = compax.capture(lambda p, x, y, w: checkpointed(p, x, y), PARAMS, X, LABELS, WEIGHTS)
    assert_tiled(before)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tile_loss(tokens=8)", "tile_loss(vocabulary=8)"])
def test_vmap_scan_and_jit(pipeline: str) -> None:
    before = program(with_accuracy, biased)
    after = run(pipeline, before)
    many = jnp.stack([X, 2 * X, X[::-1]])

    def loss(program: Program, params: Any, x: jax.Array) -> jax.Array:
        return program.apply(params, {}, x, LABELS, WEIGHTS)[0][0]

    for setting in (
        lambda p: jax.vmap(lambda x: jax.grad(lambda params: loss(p, params, x))(p.params))(many),
        lambda p: jax.lax.scan(lambda c, x: (c, jax.value_and_grad(lambda w: loss(p, w, x))(c)), p.params, many)[1],
        lambda p: jax.jit(lambda program, x: program(x, LABELS, WEIGHTS))(p, X),
        lambda p: jax.grad(jax.checkpoint(lambda params: loss(p, params, X)))(p.params),
    ):
        assert_alike(setting(before), setting(after))


def test_several_devices_do_not_exchange_tokens() -> None:
    """Chunks take positions of every sequence, which stay where they are."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    before, _ = decoder_program(batch=8)
    after = run("tile_loss(tokens=16)", before)
    batch = {"tokens": decoder.example_inputs(TINY, batch=8, sequence=17)[0]}
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(after.params, NamedSharding(mesh, PartitionSpec()))

    def gradient(program: Program) -> Any:
        loss = lambda params, batch: program.apply(params, program.state, batch)[0][0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))

    assert_alike(gradient(before)(params, spread), gradient(after)(params, spread))
    text = gradient(after).lower(params, spread).compile().as_text()
    assert text is not None
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text


def test_shards_of_the_batch_make_chunks_longer() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    before, _ = decoder_program(batch=8, sequence=16)
    for placement, positions in ((Placement(), 2), (Placement(mesh, batch=("data",)), 8)):
        after = run("tile_loss(tokens=16)", before.replace(placement=placement))
        (op,) = operations(after)
        assert op.attributes["tiles"].positions == positions


@pytest.mark.parametrize("checked", [False, True])
def test_inside_shard_map(checked: bool) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    data, whole = PartitionSpec("data"), PartitionSpec()

    def loss(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def local(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return log_softmax_picked(biased(p, x), y)

        specs = {"in_specs": (whole, data, data), "out_specs": data, "check_vma": checked}
        return jax.shard_map(local, mesh=mesh, **specs)(p, x, y).mean()

    before = compax.capture(loss, PARAMS, X, LABELS)
    if checked:
        report = looked_at(before, tokens=5)
        assert report.status == "skipped"
        assert "shard_map that checks" in report.reason
        return
    for pipeline in ("tile_loss(tokens=5)", "tile_loss(vocabulary=8)"):
        after = run(pipeline, before)
        assert statuses(after) == {"head": "rewritten"}
        value = lambda p: jax.jit(jax.value_and_grad(lambda w: p.apply(w, {}, X, LABELS)[0]))(p.params)  # noqa: E731
        assert_alike(value(before), value(after))


def test_new_shapes_are_tiled_too() -> None:
    before, _ = decoder_program()
    after = run("tile_loss(tokens=8)", before)
    longer = {"tokens": decoder.example_inputs(TINY, batch=3, sequence=24)[0]}
    assert_alike(loss_and_gradients(before, longer), loss_and_gradients(after, longer))
    captured = after.specialize(longer).graphs
    assert all(any(op.name == OPERATION for op in each.graph.ops) for each in captured.values())


def test_two_entries() -> None:
    before, batch = decoder_program(dropout=0.1)
    both = before.with_entry("eval", batch, loss=decoder.loss, mode="eval")
    after = run("tile_loss(tokens=8)", both)
    assert all(any(op.name == OPERATION for op in each.graph.ops) for each in after.graphs.values())


def test_again_changes_nothing() -> None:
    before = program(with_accuracy)
    after = run("tile_loss(tokens=8)", before)
    report = looked_at(after, tokens=4)
    assert (report.status, report.reason) == ("matched", "computed in chunks already")


class Losses(Model):
    """The loss of each token, from a small model with a tied head."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return log_softmax_picked(super().__call__(tokens), jnp.roll(tokens, -1, axis=1))


@pytest.mark.parametrize("pass_", [TileLoss(tokens=2), TileLoss(tokens=6), TileLoss(vocabulary=5)], ids=str)
def test_oracle(pass_: TileLoss) -> None:
    assert_preserves(pass_, Losses(), TOKENS)
