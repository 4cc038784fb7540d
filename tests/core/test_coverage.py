"""Coverage: shares, what is in no composite, what is unpacked, what is left dense, and that the figures are right."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import compax
import zoo
from compax.analysis.coverage import Coverage, Unpacked, coverage
from compax.encoding import nbytes
from compax.errors import SignatureError
from compax.models import decoder
from compax.passes.quantize.encoding import quantize_array
from small import TOKENS, D, Model, program_of, run, values


def of(function: Any, params: Any, *inputs: Any, pipeline: str | None = None) -> Coverage:
    program = compax.capture(function, params, *inputs)
    return (run(pipeline, program) if pipeline else program).coverage()


# -- Shares -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_covered() -> None:
    result = program_of().coverage()
    assert result.flops == 2 * 8 * (2 * D * D + 12 * D)
    assert (result.share_in_composites, result.share_with_parameter) == (1.0, 1.0)
    assert result.parameter_bytes == result.stored_bytes == sum(map(nbytes, program_of().params.values()))
    assert result.share_consumed == (12 * D + 2 * D * D) / 256
    assert result.share_encoded == 0
    assert (result.uncovered, result.unpacked, result.opaque) == ((), (), ())


def test_flops_are_those_of_the_compiler() -> None:
    """Where XLA counts the same thing: products alone, without loops."""

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bd,dhk->bhk", x @ p["w"], p["heads"])

    params, x = {"w": values(16, 32), "heads": values(32, 4, 8)}, values(5, 16)
    compiled = jax.jit(function).lower(params, x).compile().cost_analysis()
    assert of(function, params, x).flops == compiled["flops"]


def test_products_of_computed_values_have_no_parameter() -> None:
    result = of(lambda p, x: (x @ p["w"]) @ x.T, {"w": values(D, D)}, values(4, D))
    assert result.share_in_composites == 1.0
    assert result.share_with_parameter == (4 * D * D) / (4 * D * D + 4 * D * 4)


def test_loops_count_in_full() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p)[0]

    assert of(function, values(5, D, D), values(4, D)).flops == 5 * 2 * 4 * D * D


@zoo.foreign_warnings
@pytest.mark.parametrize("name", [name for name in zoo.ENTRIES if "experts" not in name and "_moe" not in name])
def test_models_of_others_are_covered(name: str) -> None:
    model = zoo.load(name)
    options = {} if model.variables is None else {"variables": model.variables}
    result = compax.capture(model.module, *model.inputs, **options, **model.kwargs).coverage()
    assert result.uncovered == ()
    assert result.share_in_composites == 1.0
    assert result.share_with_parameter > 0.8
    assert result.share_consumed > 0.9


# -- What is in no composite ------------------------------------------------------------------------------------------


def test_integer_products_are_named_with_the_reason() -> None:
    def function(p: Any, x: jax.Array, i: jax.Array) -> Any:
        def turn(i: jax.Array, _: Any) -> Any:
            return jax.jit(lambda i: i @ i)(i), None

        return x @ p, jax.lax.scan(turn, i, None, length=3)[0]

    result = of(function, values(D, D), values(4, D), jnp.ones((D, D), jnp.int32))
    (missing,) = result.uncovered
    assert (missing.name, missing.inside) == ("dot_general i32[8,8]", ("scan", "jit"))
    assert missing.flops == 3 * 2 * D**3
    assert missing.reason == "a product of integers"
    assert result.share_in_composites == 2 * 4 * D * D / (2 * 4 * D * D + missing.flops)
    assert "dot_general i32[8,8] in scan/jit, 3.1 kFLOPs: a product of integers" in str(result)


def test_grouped_products_of_computed_values() -> None:
    def function(p: Any, x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, jnp.asarray([1, 3], jnp.int32)) + p

    (missing,) = of(function, values(6), values(4, D), values(2, D, 6)).uncovered
    assert missing.name == "ragged_dot_general f32[4,6]"
    assert "grouped product" in missing.reason


def test_outer_products_are_no_contractions() -> None:
    result = of(lambda p, x: jnp.einsum("b,d->bd", x, p), values(D), values(4))
    assert (result.flops, result.uncovered, result.share_in_composites) == (0, (), 1.0)


def test_products_inside_a_composite_are_not_counted_twice() -> None:
    """An operation of ours holds the product that it stands for in its body."""
    before, after = program_of().coverage(), run("quantize(activations=int8)", program_of()).coverage()
    assert (after.flops, after.uncovered) == (before.flops, ())


# -- What is unpacked -------------------------------------------------------------------------------------------------


def test_nothing_is_unpacked_by_a_product() -> None:
    for pipeline in ("quantize()", "quantize(activations=int8)", "quantize(train=true)"):
        assert run(pipeline, program_of()).coverage().unpacked == ()


def test_what_no_rule_computes_is_unpacked() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] + jnp.sum(jnp.tanh(p["w"]))

    result = of(function, {"w": values(D, D)}, values(4, D), pipeline="quantize()")
    assert result.unpacked == (Unpacked("tanh", "int8", (D, D), 4 * D * D, 1, loop=False),)
    assert "int8[8,8] for tanh: 256 B dense" in str(result)


def test_unpacking_in_loops_and_branches_is_found() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def turn(x: jax.Array, w: jax.Array) -> Any:
            return jax.checkpoint(lambda x, w: x @ w + jnp.sum(jnp.sort(w)))(x, w), None

        x = jax.lax.scan(turn, x, p["layers"])[0]
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x * jnp.sum(jnp.sin(p["w"])))

    params = {"layers": values(3, D, D), "w": values(D, D)}
    unpacked = of(function, params, values(4, D), pipeline="quantize()").unpacked
    assert {(x.operation, x.shape, x.loop) for x in unpacked} == {("sort", (D, D), True), ("sin", (D, D), False)}


def test_each_call_of_a_shared_function_counts() -> None:
    layer = jax.jit(lambda x, w: x @ w + jnp.sum(jnp.tanh(w)))

    def function(p: Any, x: jax.Array) -> jax.Array:
        for w in p:
            x = layer(x, w)
        return x

    (unpacked,) = of(function, [values(D, D) for _ in range(3)], values(4, D), pipeline="quantize()").unpacked
    assert (unpacked.operation, unpacked.times) == ("tanh", 3)


def test_a_custom_derivative_is_unpacked_at_the_boundary_and_opaque() -> None:
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    result = of(lambda p, x: product(x, p["w"]), {"w": values(D, D)}, values(4, D), pipeline="quantize()")
    assert [x.operation for x in result.unpacked] == ["custom_vjp_call"]
    (opaque,) = result.opaque
    assert (opaque.name, opaque.parameter, opaque.nbytes) == ("w", "w", 4 * D * D)
    assert "derivative rule" in opaque.reason


def test_a_model_that_needs_a_mesh() -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def function(p: Any, x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, "model"))
        return x @ p["w"]

    with jax.set_mesh(mesh):
        program = run("quantize()", compax.capture(function, {"w": values(D, D)}, values(4, D)))
    assert program.coverage().unpacked == ()


def test_abstract_parameters() -> None:
    config = decoder.SIZES["llama2-7b"]
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    program = run("quantize(activations=int8)", compax.capture(model, *decoder.example_inputs(config, sequence=16)))
    result = program.coverage()
    assert result.unpacked == ()
    assert result.share_encoded > 0.999
    assert 26e9 < result.parameter_bytes < 28e9
    assert result.stored_bytes < result.parameter_bytes / 3.9


# -- What is left dense -----------------------------------------------------------------------------------------------


def test_sites_left_dense_say_why() -> None:
    result = run('quantize(at="**:linear, !blocks.1")', program_of()).coverage()
    assert {x.name: x.reason for x in result.dense} == {
        "embed": "no pass encoded it",
        "embed#2": "shared with embed, which is not selected",
        "blocks.1": "no pass encoded it",
    }
    assert result.share_encoded == D * D / 256
    assert "embed#2 (linear @embed.embedding, 384 B): shared with embed, which is not selected" in str(result)


def test_bytes_as_stored() -> None:
    program = program_of()
    w = quantize_array(program.params["blocks.0.kernel"], [0])
    result = program.replace(params={**program.params, "blocks.0.kernel": w}).coverage()
    assert result.parameter_bytes - result.stored_bytes == 4 * D * D - (D * D + 4 * D)
    assert result.encoded_bytes == 4 * D * D


# -- Entries and text -------------------------------------------------------------------------------------------------


def test_entries() -> None:
    program = compax.capture(Model(), TOKENS).with_entry("half", TOKENS[:1])
    assert program.coverage("half").flops * 2 == program.coverage("call").flops == program.coverage().flops
    assert program.coverage("half").entry == "half"
    with pytest.raises(SignatureError):
        coverage(program, "nothing")


def test_a_program_without_parameters_or_products() -> None:
    result = of(lambda p, x: jnp.tanh(x), {}, values(3))
    assert (result.share_in_composites, result.share_consumed, result.share_encoded) == (1.0, 1.0, 1.0)
    assert "none" in str(result)


def test_text_says_that_it_predicts() -> None:
    text = str(run("quantize(at=blocks.*)", program_of()).coverage())
    assert text.splitlines()[0] == "coverage of model, entry call (predicted: counted from the graph)"
    assert text.splitlines()[1:7] == [
        "  contractions        3.6 kFLOPs a call",
        "    in composites     100%",
        "    with a parameter  100%",
        "  parameters          1.0 kB dense, 704 B as stored",
        "    in composites     87.5%",
        "    encoded           50.0%",
    ]


def test_coverage_changes_nothing() -> None:
    program = run("quantize()", program_of())
    before = program(TOKENS)
    program.coverage()
    assert (program(TOKENS) == before).all()
