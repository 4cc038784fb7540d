"""The text form of numbers, stored formats and graphs, for people, goldens and reproducers.

Everything here is deterministic: the same program gives the same text in every process. No object's address, time or
hash order gets in, and JAX's own printer is not used.
"""

import dataclasses
import enum
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.encoding import Encoded
from compax.ir import Graph, Literal, Op, Operand, Value

if TYPE_CHECKING:
    from compax.capture import Input


# -- Numbers ----------------------------------------------------------------------------------------------------------


def count_text(count: float) -> str:
    """A number of things: 950, 12.3K, 124.4M, 6.74B."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def bytes_text(count: float) -> str:
    """A number of bytes in powers of 1000: 950 B, 12.3 kB, 62.2 MB."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB", " PB"))


def flops_text(count: float) -> str:
    """A number of floating-point operations: 950 FLOPs, 1.2 GFLOPs."""
    return _scaled(count, (" FLOPs", " kFLOPs", " MFLOPs", " GFLOPs", " TFLOPs", " PFLOPs"))


def seconds_text(seconds: float) -> str:
    """A duration with its unit: 1.23 s, 45.6 ms, 7.8 us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def figure_text(name: str, value: Any) -> str:
    """A figure in the unit that its name ends in: `peak_bytes` in bytes, `step_flops`, `step_seconds`.

    A pair is before and after; what is not known is a question mark.
    """
    if isinstance(value, tuple):
        return " -> ".join(figure_text(name, each) for each in value)
    if value is None:
        return "?"
    for unit, text in (("bytes", bytes_text), ("flops", flops_text), ("seconds", seconds_text)):
        if name.endswith(f"_{unit}"):
            return text(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share_text(share: float) -> str:
    """A share in percent. Only what is all reads 100 %, and only what is nothing 0 %."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def _scaled(count: float, units: Sequence[str]) -> str:
    power = 0
    while power < len(units) - 1 and abs(count) >= 999.95:
        count /= 1000
        power += 1
    return f"{count:.1f}{units[power]}" if power else f"{round(count)}{units[0]}"


def plural(count: int, noun: str) -> str:
    """A number of things with the noun in its form: 1 site, 2 sites."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_text(x: Any) -> str:
    """How a parameter is stored: `bf16[32000,768]`, or with its encoding `int8[768,2304]`."""
    if isinstance(x, Encoded):
        return f"{x.format}[{','.join(map(str, x.shape))}]"
    return _jax.aval_text(x)


# -- Graphs -----------------------------------------------------------------------------------------------------------


def graph_text(graph: Graph, inputs: "Sequence[Input] | None" = None) -> str:
    """Every operation of a graph as text, a line each, bodies indented below the operation that holds them.

    Values are numbered in the order in which the text defines them. A body is `^1`, `^2`, ..., printed where it is
    first held; others that hold it repeat its name only. Attributes that are false, empty or unspecified are left out.

    Args:
        graph: the graph.
        inputs: what its inputs stand for, shown beside them.
    """
    printer = _GraphPrinter()
    tags = [f" {tag.kind} {tag.path}" for tag in inputs] if inputs is not None else [""] * len(graph.inputs)
    lines = ["graph {"]
    lines += [f"  {printer.define(value)}{tag}" for value, tag in zip(graph.inputs, tags, strict=True)]
    printer.contents(graph, "  ", lines)
    return "\n".join([*lines, "}"])


class _GraphPrinter:
    """Names of the values and bodies that were printed so far."""

    def __init__(self) -> None:
        self.values: dict[Value, str] = {}
        self.bodies: dict[int, str] = {}

    def define(self, value: Value) -> str:
        self.values[value] = f"%{len(self.values)}"
        return f"{self.values[value]}: {_jax.aval_text(value.aval)}"

    def read(self, operand: Operand) -> str:
        return _literal_text(operand) if isinstance(operand, Literal) else self.values[operand]

    def contents(self, graph: Graph, indent: str, lines: list[str]) -> None:
        for value, array in graph.constants:
            lines.append(f"{indent}{self.define(value)} = constant {_array_text(array)}")
        for op in graph.ops:
            self.operation(op, indent, lines)
        lines.append(f"{indent}return {', '.join(map(self.read, graph.outputs))}".rstrip())

    def operation(self, op: Op, indent: str, lines: list[str]) -> None:
        operands = ", ".join(map(self.read, op.inputs))
        new = [body for body in _unique(op.bodies) if id(body) not in self.bodies]
        for body in new:
            self.bodies[id(body)] = f"^{len(self.bodies) + 1}"
        held = "".join(f" {self.bodies[id(body)]}" for body in op.bodies)
        outputs = ", ".join(map(self.define, op.outputs))
        attributes = _attributes_text(op.attributes)
        lines.append(f"{indent}{outputs} = {op.name}{held}({operands}){attributes}")
        for body in new:
            inner = f"{indent}    "
            inputs = ", ".join(map(self.define, body.inputs))
            lines.append(f"{indent}  {self.bodies[id(body)]}({inputs})")
            self.contents(body, inner, lines)


def _unique(bodies: Iterable[Graph]) -> list[Graph]:
    return list({id(body): body for body in bodies}.values())


def _literal_text(literal: Literal) -> str:
    return f"{_array_text(literal.value)}:{_jax.dtype_text(literal.dtype)}"


def _array_text(array: Any) -> str:
    """A scalar as it is, anything else by its type and a digest of its contents."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    if array.ndim == 0:
        return str(array.item())
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]
    return f"{_jax.aval_text(array)} sha256:{digest}"


def _attributes_text(attributes: Mapping[str, Any]) -> str:
    written = [f"{key}={_attribute_text(attributes[key])}" for key in sorted(attributes) if not _empty(attributes[key])]
    return f" {', '.join(written)}" if written else ""


def _empty(value: Any) -> bool:
    if value is None or value is False or type(value).__name__ == "UnspecifiedValue":
        return True
    if isinstance(value, (tuple, list)):
        return all(map(_empty, value))
    if isinstance(value, (dict, frozenset, set, str)):
        return not value
    if isinstance(value, enum.Enum):
        return value.name == "AUTO"
    return isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)) and value.empty


def _attribute_text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array_text(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _jax.dtype_text(np.dtype(value))
    if isinstance(value, jax.sharding.PartitionSpec):
        return f"P({', '.join('-' if part is None else _attribute_text(part) for part in value)})"
    if isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        return f"mesh({', '.join(f'{name}={size}' for name, size in value.shape.items())})"
    if isinstance(value, jax.sharding.NamedSharding):
        return f"sharding({_attribute_text(value.mesh)}, {_attribute_text(value.spec)})"
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return _call_text(type(value).__name__, zip(names, value, strict=True))
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(_attribute_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, (frozenset, set)):
        return f"{{{', '.join(sorted(map(_attribute_text, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_attribute_text(k)}: {_attribute_text(v)}' for k, v in value.items()))}}}"
    if isinstance(value, functools.partial):
        return f"partial({_attribute_text(value.func)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _call_text(
            type(value).__name__, ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return f"<{value.__qualname__}>"
    text = _without_addresses(repr(value))
    return f"<{type(value).__name__}>" if "\n" in text or text.startswith("<") else text


def _call_text(name: str, fields: Iterable[tuple[str, Any]]) -> str:
    return f"{name}({', '.join(f'{key}={_attribute_text(value)}' for key, value in fields if not _empty(value))})"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
