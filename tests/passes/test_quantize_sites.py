"""Quantization: what is selected, skipped and refused, a second run, new shapes, and other passes beside it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from bodies import relative_error
from compax import Pipeline
from compax.errors import PipelineError, SelectorError
from compax.models import decoder
from compax.passes import Quantize
from compax.passes.quantize.encoding import QuantizedArray, SimulatedArray
from compax.transform import Context
from oracle import assert_preserves
from small import TOKENS, D, Model, program_of, reasons, run, statuses, values

WEIGHTS = "quantize(weights=int8)"
BOTH = "quantize(weights=int8, activations=int8)"
TRAIN = "quantize(train=true)"
TRAIN_BOTH = "quantize(weights=int8, activations=int8, train=true)"
ROUNDING = 2e-5
"""Relative to the norm: what float32 sums in another order may differ by."""


# -- Again, and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [WEIGHTS, BOTH, TRAIN, TRAIN_BOTH])
def test_again_changes_nothing(pipeline: str) -> None:
    """The same object comes back, and every site says why."""
    program = run(pipeline, program_of())
    result = Pipeline.parse(pipeline).passes[0].run(program, Context())
    assert result.program is program
    assert {site.status for site in result.sites} == {"skipped"}
    assert all("already" in site.reason for site in result.sites)
    assert run(pipeline, program) is program


def test_activations_after_weights() -> None:
    """The weights are int8 already; what the second run adds is counted as rewritten."""
    both = run(BOTH, run(WEIGHTS, program_of()))
    assert statuses(both) == {
        "embed": "skipped",
        "blocks.0": "rewritten",
        "blocks.1": "rewritten",
        "embed#2": "rewritten",
    }
    np.testing.assert_array_equal(both(TOKENS), run(BOTH, program_of())(TOKENS))


def test_simulation_of_what_is_stored_is_refused() -> None:
    stored = run(WEIGHTS, program_of())
    again = run(TRAIN, stored)
    assert again is stored


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize(weights=int4)", "weights=int4"),
        ("quantize(activations=int4)", "activations=int4"),
        ("quantize(weights=none)", "weights"),
        ("quantize(train=perhaps)", "train"),
        ("quantize(bits=8)", "bits"),
    ],
)
def test_options_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline.parse(text)


def test_options_of_the_wrong_type() -> None:
    for options in ({"weights": 8}, {"train": "yes"}, {"activations": True}):
        with pytest.raises(PipelineError):
            Quantize(**options)


def test_a_selector_that_matches_nothing_names_what_is_close() -> None:
    with pytest.raises(SelectorError, match=r"blocks\.0"):
        run("quantize(at=block.0)", program_of())


def test_selectors_choose_sites() -> None:
    program = run("quantize(at=blocks.1)", program_of())
    assert [path for path, x in program.params.items() if isinstance(x, compax.Encoded)] == ["blocks.1.kernel"]
    program = run('quantize(at="**:linear,!embed#2", activations=int8)', program_of())
    assert statuses(program) == {"blocks.0": "rewritten", "blocks.1": "rewritten"}


def test_a_weight_shared_with_a_site_that_is_not_selected_stays() -> None:
    program = run('quantize(at="**:linear")', program_of())
    assert "embed" in reasons(program)["embed#2"]
    assert not isinstance(program.params["embed.embedding"], compax.Encoded)
    assert isinstance(program.params["blocks.0.kernel"], compax.Encoded)


def test_a_model_without_weights() -> None:
    program = compax.capture(lambda p, x: x @ x.T + p["b"], {"b": values(4)}, values(4, D))
    with pytest.raises(SelectorError):
        run(WEIGHTS, program)


def test_matmuls_of_computed_values_are_left_alone() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["w"]) @ x.T

    program = run(BOTH, compax.capture(function, {"w": values(D, D)}, values(4, D)))
    assert statuses(program) == {"w": "rewritten"}


@jax.custom_vjp
def custom(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product with a derivative of its own."""
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def test_activations_of_a_custom_derivative_stay_as_they_are() -> None:
    program = run(BOTH, compax.capture(lambda p, x: custom(x, p["w"]), {"w": values(D, D)}, values(4, D)))
    assert "custom_vjp" in reasons(program)["w"]
    x = values(4, D)
    assert relative_error(program(x), program.decode()(x)) < ROUNDING


def test_a_site_that_is_opaque_in_one_entry_only() -> None:
    """The same name in two graphs: activations are rounded where that is possible, and the other is left."""

    def model(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"]

    program = compax.capture(model, {"w": values(D, D)}, values(4, D))
    program = program.with_entry("loss", values(4, D), loss=lambda p, x: jnp.sum(custom(x, p["w"])))
    program = run(BOTH, program)
    assert np.isfinite(program(values(4, D), entry="loss"))
    assert relative_error(program(values(4, D)), model({"w": values(D, D)}, values(4, D))) < 0.05


def test_new_shapes_and_new_entries_get_the_same_treatment() -> None:
    program = run(BOTH, program_of())
    longer = jnp.concatenate([TOKENS, TOKENS], 1)
    fresh = run(BOTH, program_of(None, longer))
    np.testing.assert_array_equal(program(longer), fresh(longer))
    np.testing.assert_array_equal(program.specialize(longer)(longer), fresh(longer))
    with_loss = program.with_entry("loss", TOKENS, loss=lambda model, tokens: jnp.mean(model(tokens)))
    np.testing.assert_allclose(with_loss(TOKENS, entry="loss"), np.mean(program(TOKENS)), rtol=1e-5)


def test_abstract_parameters() -> None:
    """A model of any size is quantized without memory."""
    config = decoder.SIZES["tiny"]
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = decoder.example_inputs(config, sequence=16)
    program = run(BOTH, compax.capture(model, *tokens))
    real = run(BOTH, compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *tokens))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(program.params))
    assert jax.tree.structure(program.params) == jax.tree.structure(real.params)
    for one, other in zip(jax.tree.leaves(program.params), jax.tree.leaves(real.params), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert jax.eval_shape(lambda p: p(*tokens), program).shape == (*tokens[0].shape, config.vocab_size)


def test_given_arrays_are_deleted_only_if_they_are_donated() -> None:
    for donate in (False, True):
        params = {"w": values(D, D), "b": values(D)}
        program = compax.capture(lambda p, x: x @ p["w"] + p["b"], params, values(4, D))
        Pipeline([Quantize()])(program, donate=donate)
        assert params["w"].is_deleted() == donate
        assert not params["b"].is_deleted()


def test_bytes() -> None:
    program = run(WEIGHTS, program_of())
    record = program.history[-1]
    assert record.before.nbytes == 4 * (12 * D + 2 * (D * D + D) + 2 * D)
    assert record.after.nbytes == (12 * D + 4 * 12) + 2 * (D * D + 4 * D + 4 * D) + 4 * 2 * D
    assert record.before.parameters == record.after.parameters


# -- The oracle, and other passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"activations": "int8"}, {"train": True}, {"train": True, "activations": "int8"}],
    ids=["weights", "both", "train", "train both"],
)
def test_oracle(options: dict[str, Any]) -> None:
    assert_preserves(Quantize(**options), Model(), TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_oracle_on_the_decoder(scan: bool) -> None:
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=scan, remat=True)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    assert_preserves(Quantize(activations="int8"), model, *decoder.example_inputs(config, sequence=8))


@pytest.mark.parametrize("quantize", [WEIGHTS, BOTH])
def test_beside_freeze(quantize: str) -> None:
    freeze = "freeze(at=embed.**)"
    first, last = (run(text, program_of()) for text in (f"{freeze} | {quantize}", f"{quantize} | {freeze}"))
    np.testing.assert_array_equal(first(TOKENS), last(TOKENS))
    assert first.frozen == last.frozen == {"embed.embedding"}


def test_frozen_parameters_are_not_simulated() -> None:
    """There is nothing to train in them; they can be stored at once."""
    program = run(f"freeze(at=embed.**) | {TRAIN}", program_of())
    assert "frozen" in reasons(program)["embed"]
    assert isinstance(program.params["blocks.0.kernel"], SimulatedArray)
    assert isinstance(program.params["embed.embedding"], jax.Array)
    stored = run('quantize(at="embed,embed#2")', program)
    assert isinstance(stored.params["embed.embedding"], QuantizedArray)
    assert isinstance(stored.params["blocks.0.kernel"], SimulatedArray)


def test_frozen_while_training_stored_afterwards() -> None:
    """Trained with some parameters frozen, a model is stored in int8 like any other."""
    trained = run(f"{TRAIN_BOTH} | freeze(at=embed.**)", program_of())
    stored = run(BOTH, trained)
    assert all(not isinstance(x, SimulatedArray) for x in stored.params.values())
    assert relative_error(stored(TOKENS), trained(TOKENS)) < ROUNDING


@pytest.mark.parametrize("quantize", [WEIGHTS, BOTH, TRAIN_BOTH])
@pytest.mark.parametrize("first", ["cast", "quantize"])
def test_beside_cast(quantize: str, first: str) -> None:
    cast = "cast(compute=bfloat16)"
    program = run(f"{cast} | {quantize}" if first == "cast" else f"{quantize} | {cast}", program_of())
    assert isinstance(program.params["blocks.0.kernel"], compax.Encoded)
    assert relative_error(program(TOKENS), program_of()(TOKENS)) < 0.06
    assert program.coverage().unpacked == ()
    gradient = jax.grad(lambda t: jnp.sum(program.apply({**program.params, **t}, program.state, TOKENS)[0]))(
        program.partition()[0]
    )
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(gradient))


def test_weights_read_in_a_row_are_stored_together_or_not_at_all() -> None:
    """One product reads both: with one of them dense, the other would be unpacked for it."""

    def function(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([p["a"], p["b"]], 1) + jnp.sum(x @ p["b"])

    params = {name: jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate("ab")}
    program = compax.capture(function, params, jnp.ones((2, 8)))
    first, second = (site.name for site in program.sites())
    both = Quantize().run(program, Context()).program
    assert all(isinstance(x, QuantizedArray) for x in both.params.values())
    result = Quantize(at=first).run(program, Context())
    assert second != first
    assert result.program is program
    (report,) = result.sites
    assert "not selected" in report.reason or "read together" in report.reason
