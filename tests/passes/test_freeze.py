"""Freezing: no gradient, nothing to train, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
import stablehlo
from bodies import relative_error
from compax import Pipeline, Program
from compax.errors import PipelineError, SelectorError
from compax.passes import Freeze
from compax.transform import Context
from oracle import assert_preserves
from small import TOKENS, Model, program_of, reasons, run, statuses


def gradients(program: Program) -> dict[str, jax.Array]:
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(program.apply(params, program.state, TOKENS)[0]))

    return jax.grad(loss)(program.params)


def products(program: Program) -> int:
    """How many products the forward and backward pass have, for what is trained."""
    trainable, rest = program.partition()

    def loss(trainable: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(program.apply({**trainable, **rest}, program.state, TOKENS)[0])

    return stablehlo.lower(jax.grad(loss), trainable).count("stablehlo.dot_general")


def test_values_are_the_same_bits() -> None:
    program = program_of()
    np.testing.assert_array_equal(run("freeze(at=blocks.**)", program)(TOKENS), program(TOKENS))


def test_oracle() -> None:
    program = assert_preserves(Freeze(at="embed.**"), Model(), TOKENS)
    assert program.frozen == {"embed.embedding"}


def test_partition() -> None:
    program = run("freeze(at=**.kernel)", program_of())
    trainable, rest = program.partition()
    assert set(rest) == {"blocks.0.kernel", "blocks.1.kernel"}
    assert set(trainable) == {"blocks.0.bias", "blocks.1.bias", "embed.embedding", "norm.scale", "norm.bias"}


def test_frozen_parameters_get_no_gradient_and_others_the_same() -> None:
    program = program_of()
    frozen = run("freeze(at=blocks.0.**)", program)
    before, after = gradients(program), gradients(frozen)
    for path, gradient in after.items():
        expected = np.zeros_like(gradient) if path.startswith("blocks.0") else before[path]
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


def test_no_gradient_is_computed() -> None:
    """Fewer products: those that would give the gradient of a frozen kernel are not there."""
    program = program_of()
    assert products(run("freeze(at=blocks.*.kernel)", program)) == products(program) - 2


def test_everything_frozen_trains_nothing() -> None:
    program = run("freeze()", program_of())
    assert program.partition()[0] == {}
    assert program.frozen == set(program.params)


def test_again_changes_nothing() -> None:
    program = run("freeze(at=embed.**)", program_of())
    result = Freeze(at="embed.**").run(program, Context())
    assert result.program is program
    assert not result.changed
    assert [(site.status, site.reason) for site in result.sites] == [("skipped", "already frozen")]


def test_more_is_added() -> None:
    program = run("freeze(at=embed.**) | freeze(at=**.kernel)", program_of())
    assert program.frozen == {"embed.embedding", "blocks.0.kernel", "blocks.1.kernel"}
    again = run("freeze(at=**)", program)
    assert reasons(again) == dict.fromkeys(program.frozen, "already frozen")
    assert set(statuses(again).values()) == {"rewritten", "skipped"}


def test_parameters_are_selected_by_path_not_by_site() -> None:
    """A bias has no site; the kernel's path ends in `kernel`."""
    assert run("freeze(at=blocks.0.bias)", program_of()).frozen == {"blocks.0.bias"}
    with pytest.raises(SelectorError, match=r"blocks\.0\.kernel"):
        run("freeze(at=blocks.0)", program_of())


def test_nothing_to_freeze() -> None:
    with pytest.raises(SelectorError, match="no parameters"):
        run("freeze()", compax.capture(lambda p, x: x + 1, {}, jnp.ones(3)))


def test_the_program_that_was_given_stays() -> None:
    program = program_of()
    run("freeze()", program)
    assert program.frozen == frozenset()


def test_new_shapes_and_entries_are_frozen_too() -> None:
    program = run("freeze(at=blocks.**)", program_of())
    program = program.with_entry("loss", TOKENS, loss=lambda model, tokens: jnp.sum(jnp.sin(model(tokens))))

    def loss(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return program.apply(params, program.state, tokens, entry="loss")[0]

    for tokens in (TOKENS, TOKENS[:, :2]):
        gradient = jax.grad(loss)(program.params, tokens)
        assert not np.any(gradient["blocks.0.kernel"])
        assert np.any(gradient["embed.embedding"])


def test_the_module_again_trains_what_is_not_frozen() -> None:
    module = run("freeze(at=embed.**)", program_of()).to_module()
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert not any("embed" in path for path in paths)
    assert any("kernel" in path for path in paths)
    assert relative_error(module(TOKENS), program_of()(TOKENS)) < 2e-5  # one is compiled as a whole, one is not


def test_an_encoded_parameter_can_be_frozen() -> None:
    program = run("quantize(train=true) | freeze(at=blocks.0.kernel)", program_of())
    assert set(program.partition()[1]) == {"blocks.0.kernel"}
    gradient = gradients(program)
    assert not np.any(gradient["blocks.0.kernel"].master)
    assert np.any(gradient["blocks.1.kernel"].master)


@pytest.mark.parametrize("options", ["at=3", "below=embed", "strict=perhaps", "at=a..b"])
def test_options_that_there_are_not(options: str) -> None:
    with pytest.raises((PipelineError, SelectorError)):
        Pipeline.parse(f"freeze({options})")
