"""The text of a cost: totals, what they are of, tables with equal layers together, and what was left out."""

import jax
import jax.numpy as jnp
import pytest

from compax.analysis.cost import function_cost
from compax.analysis.cost_text import cost_text, seconds_text
from small import program_of


def test_figures_say_that_they_are_predicted_and_of_what() -> None:
    lines = cost_text(program_of().cost("v5p")).splitlines()
    assert lines[0] == "cost of model, entry call (predicted: counted from the graph)"
    assert lines[1] == ("  computes         4.3 kFLOPs a call (4.3 kFLOPs f32, 24 FLOPs i32); 82.5% in products")
    assert lines[3] == "  reads            1.0 kB parameter, 32 B argument"
    assert any(line.startswith("  at least ") and "if one device of v5p does all" in line for line in lines)
    assert "    float32 in 1 pass(es) of bfloat16" in lines
    assert lines[-3:] == [
        "  not counted: none",
        "  loops of unknown length, counted as one turn: none",
        "  conditionals, counted as their largest branch: none",
    ]


def test_equal_layers_are_one_line() -> None:
    text = cost_text(program_of().cost())
    assert "    blocks.{0,1} " in text
    assert "blocks.0" not in text
    assert "(in no composite)" in text


def test_a_function_has_no_owners() -> None:
    text = cost_text(function_cost(lambda x: jnp.tanh(x @ x), jnp.ones((4, 4))))
    assert "by composite" not in text
    assert "  by operation\n    dot_general" in text
    assert "by phase" not in text


def test_small_parts_are_counted_and_not_listed() -> None:
    def function(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ x, y + 1

    text = cost_text(function_cost(function, jnp.ones((256, 256)), jnp.ones(())))
    assert "    and 1 smaller one" in text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us"), (0.0, "0 us")])
def test_durations(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
