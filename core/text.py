"""The text form of passes: `name(key=value, ...) | name(...)`.

Values are integers, numbers, `true`, `false`, `none`, sizes such as `12GiB`, bare words and globs, JSON strings in
double quotes, and lists `[a, b]`. A key alone says `true`. What a value means is decided by the type of the field that
it is for, and every value of a supported type is written so that it is read back equal.

Supported types: `bool`, `int`, `Bytes`, `float`, `str`, `None`, `typing.Literal`, tuples, and unions of these.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, Union

from compax.errors import PipelineError

Bytes = Annotated[int, "bytes"]
"""An integer that is printed with a binary unit where one divides it."""

_WORD = re.compile(r"[\w.*:!/#+>-]+", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_SPACE = re.compile(r"\s*")
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf)", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTP])(i?)B", re.ASCII)
_PREFIXES = "KMGTP"

Kind = Literal["integer", "number", "size", "truth", "none", "word", "string", "list"]


@dataclasses.dataclass(frozen=True)
class Written:
    """A value as it was written.

    Attributes:
        kind: what it looks like.
        value: what it says: a Python value, or a tuple of `Written` for a list.
        start: where it begins in the text.
    """

    kind: Kind
    value: Any
    start: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass as it was written.

    Attributes:
        name: the pass.
        start: where its name begins in the text.
        options: values by key.
        keys: where each key begins in the text.
    """

    name: str
    start: int
    options: Mapping[str, Written]
    keys: Mapping[str, int]


class Mismatch(Exception):
    """A value is not of the type that it is for; the message says what was expected."""


def point(text: str, position: int, message: str) -> str:
    """A message, the text, and a caret under the character at `position`; of several lines the one that it is in."""
    begin = text.rfind("\n", 0, position) + 1
    line = text[begin:].split("\n", 1)[0]
    margin = "".join("\t" if character == "\t" else " " for character in text[begin:position])
    return f"{message}\n  {line}\n  {margin}^"


def parse(text: str) -> tuple[Call, ...]:
    """The calls that a pipeline's text consists of; an empty text has none.

    Raises:
        PipelineError: the text is malformed; the message points at the character.
    """
    return _Reader(text).pipeline()


class _Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        raise PipelineError(point(self.text, self.position if position is None else position, message))

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def take(self, character: str) -> bool:
        """Moves past `character`, if it comes next."""
        self.skip()
        found = self.text.startswith(character, self.position)
        self.position += found
        return found

    def name(self, what: str) -> str:
        self.skip()
        match = _NAME.match(self.text, self.position)
        if match is None:
            self.fail(f"expected {what}, found {self.next()}")
        self.position = match.end()
        return match[0]

    def next(self) -> str:
        """What comes next, for a message."""
        self.skip()
        return "the end" if self.position == len(self.text) else f"'{self.text[self.position]}'"

    def pipeline(self) -> tuple[Call, ...]:
        self.skip()
        if self.position == len(self.text):
            return ()
        calls = [self.call()]
        while self.take("|"):
            calls.append(self.call())
        if self.position != len(self.text):
            self.fail(f"expected '|' and another pass, or the end, found {self.next()}")
        return tuple(calls)

    def call(self) -> Call:
        self.skip()
        start = self.position
        name = self.name("the name of a pass")
        options: dict[str, Written] = {}
        keys: dict[str, int] = {}
        if self.take("(") and not self.take(")"):
            while True:
                self.skip()
                position = self.position
                key = self.name("an option, as in key=value (a value with a comma is written in double quotes)")
                if key in options:
                    self.fail(f"the option '{key}' of '{name}' is given twice", position)
                if self.take("="):
                    value = self.value()
                elif self.next() in ("','", "')'"):
                    value = Written("truth", True, position)
                else:
                    self.fail(f"expected '=' after the option '{key}', found {self.next()}")
                keys[key], options[key] = position, value
                if self.take(")"):
                    break
                if not self.take(","):
                    self.fail(f"expected ',' or ')' after the option '{key}', found {self.next()}")
        return Call(name, start, options, keys)

    def value(self) -> Written:
        self.skip()
        start = self.position
        if self.take("["):
            return Written("list", self.items(), start)
        if match := _STRING.match(self.text, start):
            self.position = match.end()
            try:
                return Written("string", json.loads(match[0]), start)
            except json.JSONDecodeError as error:
                self.fail(f"malformed string: {error.msg}", start + error.pos)
        if self.text.startswith('"', start):
            self.fail("this string has no closing double quote")
        match = _WORD.match(self.text, start)
        if match is None:
            self.fail(f"expected a value, found {self.next()}; text with other characters is written in double quotes")
        self.position = match.end()
        return Written(*_classify(match[0]), start)

    def items(self) -> tuple[Written, ...]:
        if self.take("]"):
            return ()
        items = [self.value()]
        while self.take(","):
            items.append(self.value())
        if not self.take("]"):
            self.fail(f"expected ',' or ']' in a list, found {self.next()}")
        return tuple(items)


def _classify(word: str) -> tuple[Kind, Any]:
    """What a word without quotes says."""
    if word in ("true", "false"):
        return "truth", word == "true"
    if word == "none":
        return "none", None
    if _INTEGER.fullmatch(word):
        return "integer", int(word)
    if _NUMBER.fullmatch(word):
        return "number", float(word)
    if match := _SIZE.fullmatch(word):
        unit = (1024 if match[3] else 1000) ** (_PREFIXES.index(match[2]) + 1)
        return "size", round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    return "word", word


def read(written: Written, annotation: Any) -> Any:
    """The value of type `annotation` that was written.

    Raises:
        Mismatch: it is of another type.
    """
    for lenient in (False, True):  # so that `1` is an integer where integers and numbers are both allowed
        found = _read(written, annotation, lenient)
        if found is not _NO:
            return found
    quoted = dataclasses.replace(written, kind="string", value="")
    looks = " (text that looks like this is written in double quotes)" if _read(quoted, annotation, False) == "" else ""
    raise Mismatch(f"takes {describe(annotation)}, not {_describe_written(written)}{looks}")


_NO: Any = object()


def _read(written: Written, annotation: Any, lenient: bool) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        found = (_read(written, member, lenient) for member in arguments)
        return next((value for value in found if value is not _NO), _NO)
    if origin is Annotated:
        return _read(written, arguments[0], lenient)
    if origin is Literal:
        plain = written.kind != "list"
        return next((x for x in arguments if plain and type(x) is type(written.value) and x == written.value), _NO)
    if origin is tuple:
        if written.kind != "list":
            return _NO
        items = written.value
        members = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(members) != len(items):
            return _NO
        values = [_read(item, member, lenient) for item, member in zip(items, members, strict=True)]
        return _NO if any(value is _NO for value in values) else tuple(values)
    if annotation is float and lenient and written.kind == "integer":
        return float(written.value)
    return written.value if written.kind in _KINDS[annotation] else _NO


_KINDS: dict[Any, tuple[Kind, ...]] = {
    bool: ("truth",),
    int: ("integer", "size"),
    float: ("number",),
    str: ("word", "string"),
    type(None): ("none",),
}


def coerce(value: Any, annotation: Any) -> Any:
    """A Python value as one of type `annotation`: integers become floats and lists tuples where these are asked for.

    Raises:
        Mismatch: it is of another type.
    """
    for lenient in (False, True):
        found = _coerce(value, annotation, lenient)
        if found is not _NO:
            return found
    raise Mismatch(f"takes {describe(annotation)}, not {value!r}")


def _coerce(value: Any, annotation: Any, lenient: bool) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        found = (_coerce(value, member, lenient) for member in arguments)
        return next((x for x in found if x is not _NO), _NO)
    if origin is Annotated:
        return _coerce(value, arguments[0], lenient)
    if origin is Literal:
        return next((x for x in arguments if type(x) is type(value) and x == value), _NO)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return _NO
        members = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(members) != len(value):
            return _NO
        values = [_coerce(item, member, lenient) for item, member in zip(value, members, strict=True)]
        return _NO if any(x is _NO for x in values) else tuple(values)
    if annotation is float and lenient and type(value) is int:
        return float(value)
    if annotation is float and type(value) is float and math.isnan(value):
        return _NO
    return value if type(value) is annotation or (value is None and annotation is type(None)) else _NO


def supported(annotation: Any) -> bool:
    """Whether values of a type can be written as text."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return all(map(supported, arguments))
    if origin is Annotated:
        return supported(arguments[0])
    if origin is Literal:
        return all(type(x) in _KINDS for x in arguments)
    if origin is tuple:
        return bool(arguments) and all(supported(x) for x in arguments if x is not Ellipsis)
    return annotation in _KINDS


def write(value: Any, annotation: Any = Any) -> str:
    """A value as text that `read` gives back for a field of type `annotation`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _write_size(value) if _is_size(annotation) else str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        bare = _WORD.fullmatch(value) is not None and _classify(value)[0] == "word"
        return value if bare else json.dumps(value, ensure_ascii=False)
    assert isinstance(value, tuple), f"{value!r} is of no type that has a text form"
    return "[" + ", ".join(map(write, value)) + "]"


def _is_size(annotation: Any) -> bool:
    return annotation == Bytes or any(member == Bytes for member in typing.get_args(annotation))


def _write_size(value: int) -> str:
    exponent = 0
    while value > 0 and value % 1024 == 0 and exponent < len(_PREFIXES):
        value, exponent = value // 1024, exponent + 1
    return f"{value}{_PREFIXES[exponent - 1]}iB" if exponent else str(value)


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "none"}


def describe(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Annotated:
        return "a size such as 12GiB" if annotation == Bytes else describe(arguments[0])
    if origin is Literal:
        return " or ".join(map(write, arguments))
    if origin is tuple:
        items = [describe(x) for x in arguments if x is not Ellipsis]
        return f"a list [{', '.join(items)}{', ...' if Ellipsis in arguments else ''}]"
    return _NAMES[annotation]


def _describe_written(written: Written) -> str:
    if written.kind == "list":
        return "a list"
    if written.kind in ("word", "string"):
        return f"the text '{written.value}'"
    if written.kind in ("truth", "none"):
        return write(written.value)
    return f"the number {written.value}"
