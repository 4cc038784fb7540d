"""Instruments: what each reports, and how programs are observed."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax.errors import CompaxError
from compax.instruments import CostDelta, Instrument, Journal, Measured, PrintAfter, Step, Timing, observe
from compax.pipeline import Pipeline
from compax.transform import Context, Inputs, Pass


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


class Recorder(Instrument):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, pass_: Pass, program: compax.Program, context: Context) -> None:
        self.calls.append(f"before {pass_}")

    def after(self, step: Step) -> Measured:
        self.calls.append(f"after {step.pass_}, changed: {step.result.changed}")
        return Measured({"figure": 3}, ("a sentence",))

    def recorded(self, record: Any) -> None:
        self.calls.append(f"recorded {record.text}")

    def failed(self, pass_: Pass, program: compax.Program, context: Context, error: Exception) -> str:
        self.calls.append(f"failed {pass_}")
        return "and a word to it"


def test_instruments_are_called_around_every_pass(program: compax.Program) -> None:
    recorder = Recorder()
    result = Pipeline.parse("copy | keep", [recorder])(program)
    assert recorder.calls == [
        "before copy()",
        "after copy(), changed: True",
        "recorded copy()",
        "before keep()",
        "after keep(), changed: False",
        "recorded keep()",
    ]
    assert result.history[0].metrics["figure"] == 3
    assert "a sentence" in result.history[0].notes


def test_instruments_hear_of_failures_and_add_to_the_message(program: compax.Program) -> None:
    recorder = Recorder()
    with pytest.raises(CompaxError, match=r"(?s)no scale at all\nand a word to it"):
        Pipeline.parse("copy | crash")(program, instruments=[recorder])
    assert recorder.calls[-2:] == ["before crash()", "failed crash()"]


def test_timing(program: compax.Program) -> None:
    timing = Timing()
    Pipeline.parse("copy(at=blocks.0) | keep")(program, instruments=[timing])
    assert [text for text, _ in timing.seconds] == ["copy(at=blocks.0)", "keep()"]
    lines = str(timing).split("\n")
    assert [line.split()[0] for line in lines] == ["copy(at=blocks.0)", "keep()", "total"]
    assert len({len(line) for line in lines}) == 1


def test_journal(program: compax.Program) -> None:
    journal = Journal()
    Pipeline.parse("copy | keep")(program, instruments=[journal])
    assert str(journal) == "\n".join(map(str, journal.records))
    assert [record.text for record in journal.records] == ["copy()", "keep()"]


@pytest.mark.parametrize(
    ("names", "printed"), [((), ["copy()", "quantize()"]), (("quantize",), ["quantize()"]), (("keep",), [])]
)
def test_print_after(program: compax.Program, names: tuple[str, ...], printed: list[str]) -> None:
    file = io.StringIO()
    Pipeline.parse("copy | keep | quantize")(program, instruments=[PrintAfter(*names, file=file)])
    assert [line for line in file.getvalue().split("\n") if line.startswith("after")] == [
        f"after {p}:" for p in printed
    ]


def test_print_after_writes_to_standard_output(program: compax.Program, capsys: Any) -> None:
    Pipeline.parse("copy")(program, instruments=[PrintAfter()])
    printed = capsys.readouterr().out
    assert printed.startswith("after copy():\nprogram chain")
    assert "blocks.4" in printed


def test_cost_delta(program: compax.Program) -> None:
    def cost(program: compax.Program) -> dict[str, float]:
        return {"kernels_bytes": float(sum(x.nbytes for path, x in program.params.items() if "kernel" in path))}

    result = Pipeline.parse("quantize")(program, instruments=[CostDelta(cost)])
    before, after = result.history[0].metrics["kernels_bytes"]
    assert after < before


class Counter(nnx.Module):
    """Counts calls, adds a cache that is passed in, and returns something static besides."""

    def __init__(self) -> None:
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.scale = nnx.Param(jnp.full((2,), 3.0))

    def __call__(self, x: jax.Array, cache: Any, *, times: int, verbose: bool = False) -> Any:
        self.calls[...] += 1
        cache.value[...] = cache.value[...] + x
        self.seen = nnx.Intermediate(x)
        return {"out": self.scale[...] * cache.value[...] * times, "verbose": verbose}


class Cache(nnx.Module):
    def __init__(self) -> None:
        self.value = nnx.Cache(jnp.zeros(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_observing_sees_outputs_state_objects_and_new_values(compiled: bool) -> None:
    cache, x = Cache(), jnp.array([1.0, 2.0])
    program = compax.capture(Counter(), x, cache, times=2, verbose=True)
    leaves = observe(program, Inputs((x, cache), {"times": 2, "verbose": True}), compiled=compiled).leaves
    assert {name.split(".")[0] for name in leaves} == {"output", "state", "argument", "aux"}
    np.testing.assert_array_equal(leaves["output.out"], [6, 12])
    np.testing.assert_array_equal(leaves["state.calls"], 1)
    np.testing.assert_array_equal(next(leaf for name, leaf in leaves.items() if name.startswith("argument")), x)
    np.testing.assert_array_equal(next(leaf for name, leaf in leaves.items() if name.startswith("aux")), x)
    np.testing.assert_array_equal(cache.value[...], 0)
    assert int(program.state["calls"]) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_observing_with_constant_and_static_arguments(compiled: bool) -> None:
    def function(params: Any, x: jax.Array, mask: jax.Array, times: int) -> jax.Array:
        return jnp.where(mask, x * params["w"], 0) * times

    x, mask = jnp.arange(3.0), np.array([True, False, True])
    program = compax.capture(function, {"w": jnp.full((), 2.0)}, x, mask, 3, constant=("mask",), static=("times",))
    observed = observe(program, Inputs((x, mask, 3)), compiled=compiled)
    np.testing.assert_array_equal(observed.leaves["output"], [0, 0, 12])
