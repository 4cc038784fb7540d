"""`quantize` on every body: values and gradients against references written by hand, names, coverage, no side effects.

Qwix leaves about half of these bodies unquantized without a word, or changes the float model
(`experiments/benchmarks/qwix_bodies.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bodies
import compax
import stablehlo
from bodies import FLOAT, INT8, STRAIGHT, WEIGHTS_INT8, Arithmetic
from compax import Program
from compax.encoding import nbytes
from compax.experiments.benchmarks.bodies import BODIES, Body

WEIGHTS = "quantize(weights=int8)"
BOTH = "quantize(weights=int8, activations=int8)"
TRAIN = "quantize(weights=int8, activations=int8, train=true)"

every_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
differentiable = pytest.mark.parametrize(
    "body",
    [
        pytest.param(body, marks=pytest.mark.skip(reason=reason))
        if (reason := bodies.NO_GRADIENT.get(body.name))
        else body
        for body in BODIES
    ],
    ids=lambda body: body.name,
)

UNPACKED = {"custom_vjp": "its derivative rule gets the dense weight at the boundary"}
FLOAT_PRODUCTS = {
    "custom_vjp": bodies.FLOAT_ACTIVATIONS["custom_vjp"],
}
"""Bodies whose products do not run in integers, with the reason."""


def quantize(body: Body, module: nnx.Module, pipeline: str) -> Program:
    return compax.Pipeline.parse(pipeline)(compax.capture(module, *body.inputs()), *body.inputs())


@functools.cache
def quantized(body: Body, pipeline: str) -> Program:
    return quantize(body, body.make(), pipeline)


def loss(body: Body, program: Program, params: dict[str, object], x: jax.Array) -> jax.Array:
    output = program.apply(params, program.state, x, *body.inputs()[1:])[0]
    return jnp.vdot(output, bodies.direction(output))


@every_body
def test_reference_is_the_body(body: Body) -> None:
    """The hand-written mathematics, without quantization, is what the module computes."""
    expected = bodies.reference(body, FLOAT)
    assert bodies.relative_error(body.make()(*body.inputs()), expected) <= bodies.tolerance(body)


@every_body
@pytest.mark.parametrize(
    ("pipeline", "arithmetic"),
    [(WEIGHTS, WEIGHTS_INT8), (BOTH, INT8), (TRAIN, STRAIGHT)],
    ids=["weights", "both", "train"],
)
def test_forward(body: Body, pipeline: str, arithmetic: Arithmetic) -> None:
    output = quantized(body, pipeline)(*body.inputs())
    assert bodies.relative_error(output, bodies.reference(body, arithmetic)) <= bodies.tolerance(body)


@every_body
def test_operation_by_operation(body: Body) -> None:
    program = quantized(body, BOTH)
    output = program.apply(program.params, program.state, *body.inputs())[0]
    assert bodies.relative_error(output, bodies.reference(body, INT8)) <= bodies.tolerance(body)


@every_body
@pytest.mark.parametrize("order", ["float first", "quantized first"])
def test_call_order(body: Body, order: str) -> None:
    """Neither model sees the other, whichever is called first; not compiled, where JAX caches traces of its own."""
    module, inputs = body.make(), body.inputs()
    if order == "float first":
        before = module(*inputs)
    else:
        jax.clear_caches()  # of what other tests traced
    output = quantize(body, module, BOTH)(*inputs)
    after = module(*inputs)
    assert bodies.relative_error(output, bodies.reference(body, INT8)) <= bodies.tolerance(body)
    assert bodies.relative_error(after, bodies.reference(body, FLOAT)) <= bodies.tolerance(body)
    if order == "float first":
        np.testing.assert_array_equal(before, after)
    for path, x in bodies.parameters(body.make()).items():
        np.testing.assert_array_equal(bodies.parameters(module)[path], x)


@differentiable
def test_gradients_straight_through(body: Body) -> None:
    program = quantized(body, TRAIN)
    x = body.inputs()[0]
    expected, expected_input = bodies.reference_gradients(body, STRAIGHT)
    gradients = jax.jit(jax.grad(lambda params, x: loss(body, program, params, x)))(program.params, x)
    masters = {}
    for path, gradient in gradients.items():
        (masters[path],) = jax.tree.leaves(gradient)
    errors = bodies.gradient_errors(masters, expected)
    assert max(errors.values()) <= bodies.tolerance(body), errors
    if expected_input is not None:
        gradient = jax.jit(jax.grad(lambda x: loss(body, program, program.params, x)))(x)
        assert bodies.relative_error(gradient, expected_input) <= bodies.tolerance(body)


@differentiable
def test_stored_weights_pass_gradients_on(body: Body) -> None:
    """int8 parameters get none; inputs and float parameters get those of the simulated program."""
    program = quantized(body, BOTH)
    trainable, rest = program.partition()
    assert not any(isinstance(x, compax.Encoded) for x in trainable.values())
    expected, expected_input = bodies.reference_gradients(body, STRAIGHT)
    x = body.inputs()[0]
    function = lambda trainable, x: loss(body, program, {**trainable, **rest}, x)  # noqa: E731
    masters = jax.jit(jax.grad(function))(trainable, x)
    errors = bodies.gradient_errors(masters, {path: expected[path] for path in masters})
    assert max(errors.values(), default=0) <= bodies.tolerance(body), errors
    if expected_input is not None:
        gradient = jax.jit(jax.grad(function, argnums=1))(trainable, x)
        assert bodies.relative_error(gradient, expected_input) <= bodies.tolerance(body)


@every_body
def test_sites_are_named_after_the_right_layer(body: Body) -> None:
    program = compax.capture(body.make(), *body.inputs())
    assert sorted(site.name for site in program.sites() if site.uses) == sorted(body.site_names)


@every_body
def test_every_site_is_rewritten_or_has_a_reason(body: Body) -> None:
    program = quantized(body, BOTH)
    reports = {report.name: report for report in program.history[-1].sites}
    assert sorted(reports) == sorted(body.site_names)
    assert {report.status for report in reports.values()} == {"rewritten"}
    reasons = [report.reason for report in reports.values() if report.reason]
    if body.name in bodies.FLOAT_ACTIVATIONS:
        assert reasons
        assert all("custom_vjp" in reason for reason in reasons)
    else:
        assert not reasons


@every_body
def test_coverage(body: Body) -> None:
    program = quantized(body, BOTH)
    coverage = program.coverage()
    assert coverage.share_in_composites == 1.0
    assert coverage.uncovered == ()
    assert coverage.dense == ()
    assert bool(coverage.unpacked) == (body.name in UNPACKED), coverage.unpacked
    assert bool(coverage.opaque) == (body.name in bodies.FLOAT_ACTIVATIONS)
    assert coverage.share_with_parameter == 1.0 or body.name == "nnx.MultiHeadAttention"  # scores have no parameter
    assert coverage.share_encoded > 0.95  # biases stay float


@every_body
def test_weights_are_stored_in_a_quarter(body: Body) -> None:
    program = quantized(body, WEIGHTS)
    for path, x in program.params.items():
        dense = bodies.parameters(body.make())[path]
        assert isinstance(x, compax.Encoded) == (dense.ndim > 1 and not path.endswith("bias"))
        if isinstance(x, compax.Encoded):
            assert x.shape == dense.shape
            assert dense.nbytes / 4 < nbytes(x) < dense.nbytes / 2  # a scale for each column besides, 8 long at least
            np.testing.assert_allclose(x.decode(), dense, atol=float(np.abs(dense).max()) / 127)


@every_body
def test_products_run_in_integers(body: Body) -> None:
    """Not only the same numbers: the compiled program has int8 x int8 products that add up in int32."""
    program = quantized(body, BOTH)
    text = stablehlo.lower(lambda program, *inputs: program(*inputs), program, *body.inputs())
    products = [
        line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line
    ]
    integer = [line for line in products if line.count("xi8>") == 2 and line.endswith("xi32>")]
    assert bool(integer) == (body.name not in FLOAT_PRODUCTS), products
    if body.name not in (*FLOAT_PRODUCTS, "nnx.MultiHeadAttention"):  # whose scores have no weight
        assert integer == products


def test_scales_over_a_sharded_dimension_are_of_the_whole() -> None:
    """Per shard they were off by 1.3e-2 with no error."""
    body = next(body for body in BODIES if body.name == "sharded contraction")
    whole = next(body for body in BODIES if body.name == "x @ w")
    assert jax.device_count() > 1
    np.testing.assert_array_equal(*(quantized(each, WEIGHTS).params["w"].decode() for each in (body, whole)))
    expected = quantized(whole, BOTH)(*whole.inputs())
    assert bodies.relative_error(quantized(body, BOTH)(*body.inputs()), expected) <= bodies.TOLERANCE
