"""Operations of lowered and differentiated programs know where they come from."""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
from compax import ir
from compax.analysis.tracing import evaluated, traced, traced_call
from compax.models import decoder


def program(**options: Any) -> compax.Program:
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    return compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *decoder.example_inputs(config, sequence=8))


def step(evaluator: Any, parameter: Any, argument: Any) -> Any:
    def loss(parameter: Any) -> jax.Array:
        return jnp.mean(evaluated(evaluator, parameter, {}, argument)[0] ** 2)

    value, gradients = jax.value_and_grad(loss)(parameter)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, parameter, gradients)


def products(found: compax.Program) -> dict[str, list[str]]:
    """For each site the phases in which a train step has products of it."""
    captured = found.graph()
    arguments = {
        tag.path: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for tag, x in zip(captured.inputs, captured.graph.inputs, strict=True)
        if tag.kind == "argument"
    }
    result = traced(step, captured, parameter=found.params, argument=arguments)
    sites = {site.path: site.name for site in found.sites()}
    phases: dict[str, list[str]] = collections.defaultdict(list)
    for path, place in result.places.items():
        if ir.resolve(result.graph, path).name == "dot_general":
            assert place.path is not None
            phases[sites[place.path]].append(place.phase)
    return phases


def test_products_of_a_train_step_belong_to_their_sites() -> None:
    found = program()
    phases = products(found)
    assert set(phases) == {site.name for site in found.sites() if site.kind != "embedding"}
    assert all(each == ["forward", "backward", "backward"] for each in phases.values())


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_computed_again_is_told_apart(scan: bool) -> None:
    phases = products(program(scan=scan, remat=True))
    name = "blocks.mlp.up" if scan else "blocks.1.mlp.up"
    assert sorted(phases[name]) == ["backward", "backward", "forward", "recompute"]


def test_a_call_has_its_inputs_by_kind() -> None:
    found = program()
    call = traced_call(found)
    kinds = collections.Counter(role.kind for role in call.inputs)
    assert kinds == {"parameter": len(found.params), "argument": 1}
    assert {place.phase for place in call.places.values()} == {"forward"}
    assert len(call.inputs) == len(call.graph.inputs)


def test_rules_of_encodings_are_traced() -> None:
    quantized = compax.Pipeline.parse("quantize(activations=int8)")(program())
    call = traced_call(quantized)
    dots = [op for _, op in ir.walk(call.graph) if op.name == "dot_general"]
    assert any(op.inputs[0].dtype == jnp.int8 for op in dots)
