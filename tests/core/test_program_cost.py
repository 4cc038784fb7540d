"""Costs of programs as they are lowered: encodings, owners, phases of a train step, targets, and what is stored."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from compax.analysis.program_cost import owner_names, stored_bytes, traced_cost
from compax.analysis.tracing import Scoped, evaluated, traced
from compax.encoding import nbytes
from compax.errors import SignatureError, TargetError
from small import D, program_of, run


def test_a_program_by_site() -> None:
    cost = program_of().cost()
    tokens = 8
    assert cost.by_owner["blocks.0"].product_flops == 2 * tokens * D * D
    assert cost.by_owner["embed#2"].product_flops == 2 * tokens * 12 * D
    assert cost.by_owner["embed"].product_flops == 0
    assert cost.by_owner["embed"].bytes_fused > 0
    assert cost.by_owner["norm"].transcendentals == tokens
    assert cost.name == "model, entry call"
    assert cost.unknown == ()


def test_every_product_belongs_to_a_site() -> None:
    program = program_of()
    cost = program.cost()
    assert set(owner_names(program).values()) >= {"embed", "embed#2", "blocks.0", "blocks.1", "norm"}
    assert sum(part.product_flops for name, part in cost.by_owner.items() if name) == cost.product_flops


def test_encoded_parameters_count_to_the_byte_and_as_they_are_computed() -> None:
    program = program_of()
    dense, quantized = program.cost(), run("quantize(weights=int8, activations=int8)", program)
    cost = quantized.cost()
    assert dense.input_bytes["parameter"] == sum(map(nbytes, program.params.values()))
    assert cost.input_bytes["parameter"] == sum(map(nbytes, quantized.params.values()))
    assert cost.flops_by_dtype["int8"] >= 2 * 8 * 2 * D * D
    assert cost.product_flops == dense.product_flops
    assert cost.by_owner["blocks.0"].flops > dense.by_owner["blocks.0"].flops  # rounding and scaling
    assert cost.by_owner["blocks.0"].flops_by_dtype["int8"] == 2 * 8 * D * D + 8 * D  # rounded rows are converted


def test_a_target_decides_how_a_program_is_lowered() -> None:
    cost = run("quantize(weights=int8)", program_of()).cost("v5e")
    assert str(cost.target) == "v5e"
    assert cost.time is not None
    assert cost.time.seconds > 0
    assert cost.time.seconds >= cost.time.bound_seconds * (1 - 1e-9)
    assert sum(cost.time.seconds_by_owner.values()) == pytest.approx(cost.time.seconds)
    assert "on one" not in str(program_of().cost())


def test_wrong_targets_and_entries() -> None:
    with pytest.raises(TargetError, match="unknown chip 'v9'"):
        program_of().cost("v9")
    with pytest.raises(SignatureError, match="no entry 'decode'"):
        program_of().cost(entry="decode")


def test_a_train_step_by_phase_and_site() -> None:
    program = program_of()
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(optimizer.init, program.params)

    def step(
        evaluator: Scoped, parameter: Mapping[str, Any], state: Any, optimizer_state: Any, argument: Mapping[str, Any]
    ) -> Any:
        def loss(parameter: Mapping[str, Any]) -> jax.Array:
            return jnp.square(evaluated(evaluator, parameter, state, argument)[0]).mean()

        value, gradients = jax.value_and_grad(loss)(parameter)
        updates, after = optimizer.update(gradients, optimizer_state, parameter)
        return value, optax.apply_updates(parameter, updates), after

    captured = program.graph()
    argument = {
        tag.path: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for tag, x in zip(captured.inputs, captured.graph.inputs, strict=True)
        if tag.kind == "argument"
    }
    found = traced(
        step, captured, parameter=program.params, state=program.state, optimizer_state=state, argument=argument
    )
    cost = traced_cost(found, program)
    forward = program.cost().product_flops
    assert cost.by_phase["forward"].product_flops == forward
    assert cost.by_phase["backward"].product_flops == 2 * forward
    assert cost.by_phase["update"].product_flops == 0
    assert cost.by_phase["update"].flops > 10 * sum(x.size for x in program.params.values())
    assert cost.by_owner["blocks.1"].product_flops == 3 * 2 * 8 * D * D
    assert cost.input_bytes["optimizer_state"] == stored_bytes(program, optimizer.init).optimizer
    assert "  by phase" in str(cost)


def test_stored_bytes() -> None:
    program = program_of()
    dense = sum(x.size for x in program.params.values()) * 4
    stored = stored_bytes(program, optax.adamw(1e-3).init)
    assert (stored.parameters, stored.dense_parameters, stored.trainable, stored.gradients) == (dense,) * 4
    assert stored.optimizer == 2 * dense + 4  # two moments, and a counter
    assert stored.training == stored.parameters + stored.gradients + stored.optimizer + stored.state
    assert stored_bytes(program).optimizer == 0


def test_stored_bytes_of_encodings() -> None:
    program = run("quantize(weights=int8)", program_of())
    stored = stored_bytes(program, optax.adamw(1e-3).init)
    assert stored.parameters == sum(map(nbytes, program.params.values())) < stored.dense_parameters
    assert stored.trainable == stored.gradients == sum(nbytes(x) for x in program.partition()[0].values())
    assert stored.optimizer == 2 * stored.trainable + 4
