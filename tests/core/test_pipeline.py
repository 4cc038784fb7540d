"""Pipelines: text form, order, the manager, and what it does with passes that break their promises."""

import dataclasses
import logging
import re
from typing import Any, ClassVar

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax.errors import ContractError, PassError, PipelineError, SelectorError, VerificationError
from compax.instruments import Journal
from compax.pipeline import Pipeline
from compax.transform import Pass


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


def fails(kind: type[Exception], pipeline: str, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        Pipeline.parse(pipeline)(*args, **kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


# -- text


def test_parse_gives_the_passes(samples: Any) -> None:
    pipeline = Pipeline.parse("copy(at=blocks.*) | break_value(factor=2, bad=head)")
    assert pipeline.passes == (samples.Copy(at="blocks.*"), samples.BreakValue(factor=2.0, bad="head"))
    assert str(pipeline) == "copy(at=blocks.*) | break_value(bad=head, factor=2.0)"
    assert Pipeline.parse("") == Pipeline([]) == Pipeline()
    assert str(Pipeline()) == ""


def test_instruments_are_no_part_of_equality(samples: Any) -> None:
    assert Pipeline([samples.Copy()], [Journal()]) == Pipeline([samples.Copy()])
    assert Pipeline([samples.Copy()]) != Pipeline([samples.Keep()])


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("freeze | quantise()", 9, "no pass 'quantise', did you mean 'quantize'?"),
        ("zzz()", 0, "no pass 'zzz'; there are: "),
        ("quantize(wieghts=int8)", 9, "'quantize' has no option 'wieghts', did you mean 'weights'? There are: at,"),
        ("freeze(strict=yes)", 14, "the option 'strict' of 'freeze' takes true or false, not the text 'yes'"),
        ("freeze(at=8)", 10, "the option 'at' of 'freeze' takes text, not the number 8"),
        ("freeze | quantize(weights=int7)", 9, "int7"),
        ("misbehave()", 0, "'misbehave' needs the option 'how'"),
        ("misbehave(how=sing)", 14, "takes mutate or conceal or pretend"),
        ("copy(at=a, strict yes)", 18, "expected '=' after the option 'strict', found 'y'"),
        ("copy(at)", 5, "the option 'at' of 'copy' takes text, not true"),
    ],
)
@pytest.mark.usefixtures("samples")
def test_wrong_text_is_pointed_at(text: str, position: int, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    *message, line, caret = str(caught.value).split("\n")
    assert says in "\n".join(message)
    assert (line, caret) == (f"  {text}", " " * (position + 2) + "^")


@pytest.mark.usefixtures("samples")
def test_a_malformed_selector_in_a_pipeline() -> None:
    with pytest.raises(PipelineError, match="malformed selector: a component between two dots is missing"):
        Pipeline.parse("copy(at=a..b)")


def test_what_is_no_pass_is_refused(samples: Any) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nameless(Pass):
        """Not registered."""

        phase: ClassVar[str] = "structure"

    for wrong in ("copy()", samples.Copy):
        with pytest.raises(PipelineError, match="is made of passes"):
            Pipeline([wrong])
    with pytest.raises(PipelineError, match=r"Nameless has no name in text: decorate it with @register"):
        Pipeline([Nameless()])


words = st.one_of(st.text(), st.from_regex(r"[\w.*:!/#+-]{1,8}", fullmatch=True))
floats = st.floats(allow_nan=False)


@hypothesis.given(st.data())
def test_any_pipeline_is_read_back_equal(samples: Any, data: st.DataObject) -> None:
    every = st.builds(
        samples.EveryOption,
        at=st.sampled_from(["**", "a.*", "**:linear, !b", "blocks.0.attn#2"]),
        strict=st.booleans(),
        flag=st.booleans(),
        count=st.integers(),
        maybe=st.none() | st.integers(),
        share=floats,
        either=st.none() | st.integers() | floats | words,
        budget=st.none() | st.integers() | st.integers(0, 64).map(lambda n: n * 2**30),
        word=words,
        choice=st.sampled_from(["sum", "mean", 2]),
        numbers=st.lists(st.integers(), max_size=3).map(tuple),
        shape=st.tuples(st.integers(), words),
        words=st.lists(words, max_size=3).map(tuple),
        nested=st.lists(st.lists(floats, max_size=2).map(tuple), max_size=2).map(tuple),
    )
    others = st.builds(samples.BreakValue, bad=words, factor=floats) | st.builds(samples.Copy)
    pipeline = Pipeline(data.draw(st.lists(every | others, max_size=4)))
    again = Pipeline.parse(str(pipeline))
    assert again == pipeline
    assert str(again) == str(pipeline)


def test_examples_of_registered_passes_are_read_back_equal() -> None:
    from compax.transform import registered

    for pass_type in registered().values():
        pipeline = Pipeline.parse(pass_type.example)
        assert Pipeline.parse(str(pipeline)) == pipeline


# -- order


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("break_value | copy", "'copy()' has to come before 'break_value()': 'copy' is of the phase structure, "),
        ("break_value | copy", "; write: copy() | break_value()"),
        ("second | first", "'second' comes after it where both are used; write: first() | second()"),
        ("last(at=a) | first", "'last' requires it; write: first() | last(at=a)"),
        (
            "copy | last",
            "'last()' requires 'first' before it, which is missing; write: first(at=blocks.0) | copy() | last()",
        ),
        ("second | rival", "'rival()' cannot be combined with 'second()': leave one out"),
        ("rival | second", "'second()' cannot be combined with 'rival()': leave one out"),
        ("last | keep | second | first", "; write: first() | second() | keep() | last()"),
    ],
)
def test_the_order_is_checked_before_anything_runs(program: compax.Program, text: str, says: str) -> None:
    assert says in fails(PipelineError, f"{text}", program)
    with pytest.raises(PipelineError):
        Pipeline.parse(text).check()


def test_the_remedy_is_a_pipeline_that_is_right(program: compax.Program) -> None:
    message = fails(PipelineError, "last | keep | second | first", program)
    Pipeline.parse(message.partition("write: ")[2]).check()


@pytest.mark.usefixtures("samples")
def test_right_orders_pass() -> None:
    for text in ("", "first | second", "first | first | last", "copy | break_value | keep", "second", "rival"):
        Pipeline.parse(text).check()


def test_the_history_of_a_program_counts(program: compax.Program) -> None:
    program = Pipeline.parse("first(at=blocks.0)")(program)
    done = Pipeline.parse("last(at=blocks.0)")(program)
    assert [record.text for record in done.history] == ["first(at=blocks.0)", "last(at=blocks.0)"]
    message = fails(PipelineError, "copy", done)
    assert "the program went through first(at=blocks.0) | last(at=blocks.0) already: capture the model again" in message
    assert "write: first(at=blocks.0) | copy() | last(at=blocks.0)" in message


def test_a_conflict_with_the_history(program: compax.Program) -> None:
    program = Pipeline.parse("second")(program)
    assert "the program went through that already" in fails(PipelineError, "rival", program)


# -- running


def test_a_right_pipeline(program: compax.Program, x: jax.Array) -> None:
    journal = Journal()
    result = Pipeline.parse("copy(at=blocks.0) | copy | quantize(at=blocks.1)")(program, x, instruments=[journal])
    assert result is not program
    assert program.history == ()
    assert list(result.history) == journal.records
    first, _, last = result.history
    assert first.text == "copy(at=blocks.0)"
    assert [(site.name, site.status) for site in first.sites] == [("blocks.0", "rewritten")]
    assert first.metrics["relative output error"] == 0
    assert last.before.nbytes > last.after.nbytes
    assert 0 < last.metrics["relative output error"] < 0.1
    assert last.seconds > 0
    np.testing.assert_allclose(result(x), program(x), atol=0.05)


def test_without_inputs_outputs_are_not_compared_and_that_is_said(program: compax.Program) -> None:
    result = Pipeline.parse("break_value")(program)
    assert result.history[0].notes == ("outputs not compared: no sample inputs were given",)


def test_without_checks_nothing_is_checked(program: compax.Program, x: jax.Array) -> None:
    result = Pipeline.parse("break_value | break_nan")(program, x, check=False)
    assert jnp.isnan(result(x)).any()
    assert result.history[0].notes == ()


def test_nothing_changed_is_the_same_program(program: compax.Program, x: jax.Array, caplog: Any) -> None:
    journal = Journal()
    with caplog.at_level(logging.WARNING, "compax"):
        assert Pipeline.parse("keep")(program, x, instruments=[journal]) is program
    assert journal.records[0].count("matched") == 5
    assert journal.records[0].notes == ("nothing was changed",)
    assert "keep(): 5 matched" in caplog.text
    assert Pipeline()(program, x) is program


def test_a_program_of_shapes(samples: Any, program: compax.Program, x: jax.Array) -> None:
    shapes = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in program.params.items()}
    result = Pipeline.parse("quantize")(program.replace(params=shapes), x)
    assert result.history[0].notes == ("outputs not compared: parameters or inputs are shapes without values",)


def test_the_loss_is_recorded(samples: Any, x: jax.Array) -> None:
    def loss(model: Any, x: jax.Array) -> Any:
        return jnp.mean(model(x) ** 2), {"largest": jnp.max(model(x))}

    program = compax.capture(samples.make_model(), x, loss=loss, mode="eval")
    record = Pipeline.parse("quantize")(program, x).history[0]
    before, after = record.metrics["loss"]
    assert before == pytest.approx(float(program(x)[0]), rel=1e-5)
    assert before != after
    assert f"loss {before:.4g} -> {after:.4g}" in str(record)


def test_arrays_that_are_given_away_are_deleted_and_still_checked(program: compax.Program, x: jax.Array) -> None:
    kernel, bias = program.params["blocks.0.kernel"], program.params["blocks.0.bias"]
    result = Pipeline.parse("quantize")(program, x, donate=True)
    assert kernel.is_deleted()
    assert not bias.is_deleted()
    assert result.history[0].metrics["relative output error"] > 0
    assert jnp.isfinite(result(x)).all()


def test_inputs_by_name_and_another_entry(samples: Any, x: jax.Array) -> None:
    program = samples.make_program().with_entry("other", x=x, mode="eval")
    record = Pipeline.parse("copy")(program, x=x, entry="other").history[0]
    assert record.metrics == {"relative output error": 0.0}


# -- what fails


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("break_shape", VerificationError, "dot_general"),
        ("drop_declared", VerificationError, "reads the parameter 'blocks.4.bias'"),
        ("drop_parameter", ContractError, "drops the parameter 'blocks.4.bias' (1 in all)"),
        ("reshape_parameter", ContractError, "the shape of the parameter 'blocks.0.kernel' from [6, 6] to [36]"),
        ("break_value", ContractError, "'output' differs by"),
        ("break_nan", ContractError, "NaN of 18 values where there was none"),
        ("crash", PassError, "failed with ZeroDivisionError: no scale at all"),
        ("misbehave(how=mutate)", PassError, "it changed the parameters of the program that it was given"),
        ("misbehave(how=conceal)", PassError, "it returned another program, and reports no rewritten site"),
        ("misbehave(how=pretend)", PassError, "it reports rewritten sites, and returned the program that it was given"),
        ("misbehave(how=return_nothing)", PassError, "it returned NoneType"),
        ("misbehave(how=match_nothing)", SelectorError, "it fits none of the 5 sites that '**' selects (linear)"),
        ("misbehave(how=match_nothing, at=block.0)", SelectorError, "closest of 5: 'blocks.0' (linear)"),
        ("copy(at=block.0)", SelectorError, "matches no linear; closest of 5: 'blocks.0' (linear)"),
    ],
)
def test_broken_passes_are_caught_by_name(
    program: compax.Program, x: jax.Array, text: str, kind: type[Exception], says: str
) -> None:
    message = fails(kind, f"copy | {text}", program, x)
    assert message.startswith(str(Pipeline.parse(text)) + ": ")
    assert says in message


@pytest.mark.parametrize("rows", [3, 5])
def test_inputs_of_new_shapes_go_through_the_pass_that_is_checked(
    program: compax.Program, x: jax.Array, rows: int
) -> None:
    assert "break_graph(): 'output' differs" in fails(
        ContractError, "copy | break_graph", program, jnp.resize(x, (rows, 6))
    )


def test_the_cause_of_a_failure_is_kept(program: compax.Program) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline.parse("crash")(program)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_pass_that_is_not_strict_warns_and_changes_nothing(program: compax.Program, x: jax.Array) -> None:
    journal = Journal()
    with pytest.warns(UserWarning, match=re.escape("keep(at=head, strict=false): the selector 'head' matches no site")):
        result = Pipeline.parse("keep(at=head, strict=false)")(program, x, instruments=[journal])
    assert result is program
    assert "matches no site" in journal.records[0].notes[0]


def test_a_pass_that_changes_draws_has_to_say_so(samples: Any, x: jax.Array) -> None:
    program = compax.capture(samples.make_model(), x, mode="train")
    assert "redraw_silently(): " in fails(ContractError, "redraw_silently", program, x)
    note = Pipeline.parse("redraw")(program, x).history[0].notes[0]
    assert note.startswith(
        "outputs not compared: the pass changes random draws, and the program has no entry in eval mode"
    )


def test_a_pass_that_changes_draws_is_checked_in_eval_mode(samples: Any, x: jax.Array) -> None:
    program = compax.capture(samples.make_model(), x, mode="train").with_entry("eval", x, mode="eval")
    record = Pipeline.parse("redraw")(program, x).history[0]
    assert record.notes == ()
    assert record.metrics["relative output error"] == 0
