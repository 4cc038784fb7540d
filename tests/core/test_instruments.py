"""Instruments: what each reports, and how programs are observed."""

import io
from typing import Any

import jax
import pytest

import compax
from compax.errors import CompaxError
from compax.instruments import Instrument, Journal, Measured, PrintAfter, Step, Timing
from compax.pipeline import Pipeline
from compax.transform import Context, Pass


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
