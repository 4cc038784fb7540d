"""Bisection: to the pass and to the site, whatever it is that fails."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import compax
from compax.errors import PipelineError
from compax.pipeline import Pipeline
from compax.transform import Footprint


@pytest.fixture(scope="module")
def samples() -> Any:
    import sample_passes

    return sample_passes


@pytest.fixture
def program(samples: Any) -> compax.Program:
    return samples.make_program()


@pytest.fixture
def x(samples: Any) -> jax.Array:
    return samples.example()


def test_nothing_is_found_where_nothing_fails(program: compax.Program, x: jax.Array) -> None:
    assert Pipeline.parse("copy | keep | quantize").bisect(program, x) is None


@pytest.mark.parametrize("bad", ["blocks.0", "blocks.2", "blocks.4"])
def test_a_changed_value_is_found(samples: Any, program: compax.Program, x: jax.Array, bad: str) -> None:
    finding = Pipeline.parse(f"copy | break_value(bad={bad}) | quantize").bisect(program, x)
    assert finding is not None
    assert finding.pass_ == samples.BreakValue(bad=bad)
    assert finding.position == 1
    assert finding.site == bad
    assert finding.alone
    assert 0.001 < finding.metric < math.inf
    assert "'output' differs by" in finding.reason
    assert str(finding).startswith(f"pass 2, break_value(bad={bad}), at {bad}: ")


def test_a_nan_is_found(program: compax.Program, x: jax.Array) -> None:
    finding = Pipeline.parse("copy | break_nan").bisect(program, x)
    assert finding is not None
    assert (finding.pass_.name, finding.site, finding.metric) == ("break_nan", "blocks.1", math.inf)
    assert "NaN" in finding.reason


def test_a_crash_is_found_without_inputs(program: compax.Program) -> None:
    finding = Pipeline.parse("copy | crash(bad=blocks.3)").bisect(program)
    assert finding is not None
    assert (finding.pass_.name, finding.site) == ("crash", "blocks.3")
    assert "no scale at all" in finding.reason


def test_a_malformed_program_is_found(program: compax.Program, x: jax.Array) -> None:
    finding = Pipeline.parse("copy | break_shape(at=blocks.2)").bisect(program, x)
    assert finding is not None
    assert (finding.pass_.name, finding.site) == ("break_shape", "blocks.2")
    assert "dot_general" in finding.reason


def test_what_has_no_sites_is_found_as_a_pass(program: compax.Program, x: jax.Array) -> None:
    finding = Pipeline.parse("copy | drop_parameter").bisect(program, x)
    assert finding is not None
    assert finding.pass_.name == "drop_parameter"
    assert "drops the parameter" in finding.reason


def test_errors_that_add_up_are_found_at_their_largest(program: compax.Program, x: jax.Array) -> None:
    finding = Pipeline.parse("copy | drift").bisect(program, x)
    assert finding is not None
    assert (finding.pass_.name, finding.site, finding.alone) == ("drift", "blocks.2", False)
    assert 0 < finding.metric < 0.01
    assert "(largest share; it takes others to fail)" in str(finding)


def test_a_predicate_is_bisected(program: compax.Program) -> None:
    def large(program: compax.Program) -> bool:
        return Footprint.of(program).nbytes > 650

    finding = Pipeline.parse("copy | quantize").bisect(program, predicate=large)
    assert finding is not None
    assert finding.pass_.name == "quantize"
    assert finding.reason == "the predicate does not hold after it"
    assert len(finding.sites) > 1

    def float_at_three(program: compax.Program) -> bool:
        return isinstance(program.params["blocks.3.kernel"], jax.Array)

    finding = Pipeline.parse("copy | quantize").bisect(program, predicate=float_at_three)
    assert finding is not None
    assert finding.site == "blocks.3"


def test_a_predicate_that_fails_from_the_start(program: compax.Program) -> None:
    with pytest.raises(PipelineError, match="does not hold of the program before any pass"):
        Pipeline.parse("copy").bisect(program, predicate=lambda program: False)


def test_the_order_is_checked_first(program: compax.Program) -> None:
    with pytest.raises(PipelineError, match="has to come before"):
        Pipeline.parse("quantize | copy").bisect(program)


def test_a_program_with_nan_before_any_pass(samples: Any, program: compax.Program, x: jax.Array) -> None:
    params = {**program.params, "blocks.0.bias": jnp.full((samples.D,), jnp.nan)}
    assert Pipeline.parse("copy").bisect(program.replace(params=params), x) is None
