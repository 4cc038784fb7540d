"""The text form of passes: what is read, what is written, and where errors point."""

import math
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from compax import text
from compax.errors import PipelineError
from compax.text import Bytes


def value(written: str, annotation: Any) -> Any:
    (call,) = text.parse(f"p(x={written})")
    return text.read(call.options["x"], annotation)


@pytest.mark.parametrize(
    ("written", "annotation", "expected"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        ("12GiB", int, 12 * 2**30),
        ("1.5MiB", Bytes, 3 * 2**19),
        ("2GB", Bytes, 2_000_000_000),
        ("1e-5", float, 1e-5),
        ("1e+16", float, 1e16),
        (".5", float, 0.5),
        ("2", float, 2.0),
        ("-inf", float, -math.inf),
        ("true", bool, True),
        ("false", bool, False),
        ("none", int | None, None),
        ("none", str | None, None),
        ("int8", str, "int8"),
        ("8bit", str, "8bit"),
        ("2:4", str, "2:4"),
        ("blocks.*.mlp.**:linear", str, "blocks.*.mlp.**:linear"),
        ("blocks.0.attn#2", str, "blocks.0.attn#2"),
        ('"a, b | c=(d)"', str, "a, b | c=(d)"),
        (r'"quote \" and \u00e9"', str, 'quote " and é'),
        ('""', str, ""),
        ('"none"', str | None, "none"),
        ("mean", Literal["sum", "mean"], "mean"),
        ("2", Literal["sum", 2], 2),
        ("1", int | float, 1),
        ("1", float | int, 1),
        ("1.0", int | float, 1.0),
        ("[]", tuple[int, ...], ()),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("[ [1,2] , [] ]", tuple[tuple[float, ...], ...], ((1.0, 2.0), ())),
        ("[1, a]", tuple[int, str], (1, "a")),
        ("norm", str | tuple[str, ...], "norm"),
        ("[norm]", str | tuple[str, ...], ("norm",)),
    ],
)
def test_reads(written: str, annotation: Any, expected: Any) -> None:
    found = value(written, annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("written", "annotation", "says"),
    [
        ("abc", int, "takes an integer, not the text 'abc'"),
        ("1.0", int, "takes an integer, not the number 1.0"),
        ("true", int, "takes an integer, not true"),
        ("1", bool, "takes true or false, not the number 1"),
        ("none", str, "takes text, not none (text that looks like this is written in double quotes)"),
        ("8", str, "takes text, not the number 8 (text that looks like this is written in double quotes)"),
        ("x", int | None, "takes an integer or none, not the text 'x'"),
        ("max", Literal["sum", "mean"], "takes sum or mean, not the text 'max'"),
        ("[1]", Literal["sum", "mean"], "takes sum or mean, not a list"),
        ("[1, a]", tuple[int, ...], "takes a list [an integer, ...], not a list"),
        ("[1, 2, 3]", tuple[int, int], "takes a list [an integer, an integer], not a list"),
        ("1", tuple[int, ...], "takes a list [an integer, ...], not the number 1"),
        ("x", Bytes, "takes a size such as 12GiB, not the text 'x'"),
    ],
)
def test_refuses_other_types(written: str, annotation: Any, says: str) -> None:
    with pytest.raises(text.Mismatch) as caught:
        value(written, annotation)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("malformed", "position", "says"),
    [
        ("a |", 3, "expected the name of a pass, found the end"),
        ("| a", 0, "expected the name of a pass, found '|'"),
        ("a b", 2, "expected '|' and another pass, or the end, found 'b'"),
        ("a)", 1, "expected '|' and another pass"),
        ("8a()", 0, "expected the name of a pass, found '8'"),
        ("a(", 2, "expected an option"),
        ("a(,)", 2, "expected an option"),
        ("a(b c)", 4, "expected '=' after the option 'b', found 'c'"),
        ("a(b=)", 4, "expected a value, found ')'"),
        ("a(b=1", 5, "expected ',' or ')' after the option 'b', found the end"),
        ("a(b=1 c=2)", 6, "expected ',' or ')' after the option 'b', found 'c'"),
        ("a(b=1, b=2)", 7, "the option 'b' of 'a' is given twice"),
        ("a(b=1,)", 6, "expected an option"),
        ("a(at=x,!y)", 7, "a value with a comma is written in double quotes"),
        ("a(b='x')", 4, "written in double quotes"),
        ('a(b="x)', 4, "no closing double quote"),
        (r'a(b="x\q")', 6, "malformed string"),
        ("a(b=[1, 2)", 9, "expected ',' or ']' in a list, found ')'"),
        ("a(b=[1,])", 7, "expected a value, found ']'"),
        ("a(b=x{y})", 5, "expected ',' or ')' after the option 'b', found '{'"),
    ],
)
def test_malformed_text_is_pointed_at(malformed: str, position: int, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        text.parse(malformed)
    message, line, caret = str(caught.value).split("\n")
    assert says in message
    assert line == f"  {malformed}"
    assert caret == " " * (position + 2) + "^"


def test_the_caret_stands_in_the_line_that_it_is_about() -> None:
    with pytest.raises(PipelineError) as caught:
        text.parse("quantize(\n\tat=x,\n\tweights int8)\n| freeze")
    assert str(caught.value).split("\n")[1:] == ["  \tweights int8)", "  \t        ^"]


def test_a_key_alone_says_true() -> None:
    (call,) = text.parse("a(b, c=1, d)")
    assert {key: written.value for key, written in call.options.items()} == {"b": True, "c": 1, "d": True}
    assert text.read(call.options["b"], bool) is True


def test_names_without_brackets_and_empty_texts() -> None:
    assert [call.name for call in text.parse(" a|b() | c( ) ")] == ["a", "b", "c"]
    assert text.parse(" \n ") == ()


@pytest.mark.parametrize(
    ("given", "annotation", "expected"),
    [
        (2**20, int, "1048576"),
        (2**20, Bytes, "1MiB"),
        (12 * 2**30, Bytes | None, "12GiB"),
        (2**20 + 1, Bytes, "1048577"),
        (0, Bytes, "0"),
        (-1024, Bytes, "-1024"),
        (True, bool, "true"),
        (None, str | None, "none"),
        ("none", str, '"none"'),
        ("1e5", str, '"1e5"'),
        ("12GiB", str, '"12GiB"'),
        ("é", str, '"é"'),
        ((1.5, ("a b",)), Any, '[1.5, ["a b"]]'),
    ],
)
def test_writes(given: Any, annotation: Any, expected: str) -> None:
    assert text.write(given, annotation) == expected


def test_coerces_python_values() -> None:
    assert text.coerce([1, 2], tuple[float, ...]) == (1.0, 2.0)
    assert type(text.coerce(1, int | float)) is int
    for wrong, annotation in (
        (True, int),
        (1, bool),
        (1.0, int),
        (1, str),
        (math.nan, float),
        ("c", Literal["a", "b"]),
    ):
        with pytest.raises(text.Mismatch):
            text.coerce(wrong, annotation)


def test_supported_types() -> None:
    for annotation in (bool, int, Bytes, float | None, Literal["a", 1], tuple[str, ...], tuple[tuple[int, str], ...]):
        assert text.supported(annotation)
    for annotation in (dict[str, int], list[int], object, Any, tuple, int | dict[str, int], bytes):
        assert not text.supported(annotation)


plain = {
    bool: st.booleans(),
    int: st.integers(),
    Bytes: st.one_of(st.integers(), st.integers(0, 2**20).map(lambda n: n * 2**30)),
    float: st.floats(allow_nan=False),
    str: st.text(),
    type(None): st.none(),
}


@hypothesis.given(st.data())
def test_what_is_written_is_read_back(data: st.DataObject) -> None:
    annotation: Any = data.draw(st.sampled_from(list(plain)))
    strategy = plain[annotation]
    if data.draw(st.booleans()):
        annotation, strategy = tuple[annotation, ...], st.lists(strategy, max_size=3).map(tuple)
    if data.draw(st.booleans()):
        annotation, strategy = annotation | None, st.one_of(st.none(), strategy)
    given = data.draw(strategy)
    found = value(text.write(given, annotation), annotation)
    assert found == given
    assert type(found) is type(given)


@hypothesis.given(st.text(st.characters(codec="ascii"), max_size=20))
def test_any_text_is_read_or_refused_with_a_caret(anything: str) -> None:
    message = "^"
    try:
        text.parse(anything)
    except PipelineError as error:
        message = str(error)
    assert message.endswith("^")
