"""Graphs read flat: calls and rematerialized parts entered, and what only renames a value looked through."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.analysis.library import PRODUCTS, Node
from compax.analysis.normal import CALLS
from compax.ir import Graph, Literal, Op, Path, Value

RENAMING = frozenset(
    {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "copy_p", "optimization_barrier", "name", "pvary"}
    | {"pcast", "sharding_constraint", "constrain", "compress", "reshard"}
)
"""Operations whose result is their operand under another name."""

_NEUTRAL = {"add": 0, "add_any": 0, "sub": 0, "mul": 1, "div": 1}
_COMMUTATIVE = ("add", "add_any", "mul")

SMALL_ELEMENTS = 1024
"""Constants, and values, of so few elements do not count."""


class Flat:
    """The operations of a graph with calls entered and renamings looked through.

    Attributes:
        nodes: the operations.
        results: for each operation, calls and renamings among them, what its results are; none for constants.
        outputs: what is returned; none for constants.
    """

    def __init__(self, graph: Graph, *, merge: bool = False, prefix: Path = (), narrowed: Collection[Value] = ()):
        self._narrowed = frozenset(narrowed)
        self.nodes: list[Node] = []
        self.results: dict[Path, list[Value | None]] = {}
        self._filled: dict[Value, Any] = {}
        self._merged: dict[object, list[Value]] | None = {} if merge else None
        env: dict[Value, Value | None] = {value: value for value in graph.inputs}
        self.outputs = self._enter(graph, env, prefix)

    def _enter(self, graph: Graph, env: dict[Value, Value | None], prefix: Path) -> list[Value | None]:
        def read(x: Value | Literal) -> Value | None:
            return None if isinstance(x, Literal) else env[x]

        env.update((value, None) for value, array in graph.constants if np.size(array) <= SMALL_ELEMENTS)
        env.update((value, value) for value, array in graph.constants if np.size(array) > SMALL_ELEMENTS)
        for position, op in enumerate(graph.ops):
            given = [read(x) for x in op.inputs]
            path = (*prefix, (position, -1))
            if op.name in CALLS or (op.equation is None and op.bodies):
                body = op.bodies[0]
                inside = dict(zip(body.inputs, given, strict=True))
                env.update(zip(op.outputs, self._enter(body, inside, (*prefix, (position, 0))), strict=True))
            elif op.name in RENAMING and len(op.outputs) == len(op.inputs):
                env.update(zip(op.outputs, given, strict=True))
            elif (unchanged := self._unchanged(op, given)) is not None:
                env[op.outputs[0]] = given[unchanged]
            elif op.name in RENAMING:
                env.update(dict.fromkeys(op.outputs, given[0]))
            else:
                env.update(zip(op.outputs, self._define(op, path, given), strict=True))
            self.results[path] = [env[y] for y in op.outputs]
        return [read(x) for x in graph.outputs]

    def _unchanged(self, op: Op, given: Sequence[Value | None]) -> int | None:
        """The operand that a result is: with dimensions of one, sums with zero, products with one, or narrowed."""
        if op.name == "broadcast_in_dim":
            x = op.inputs[0]
            if isinstance(x, Literal) and np.size(x.value) == 1:
                self._filled[op.outputs[0]] = np.ravel(x.value)[0]
            kept = list(op.attributes["broadcast_dimensions"])
            return 0 if math.prod(x.shape) == math.prod(op.outputs[0].shape) and kept == sorted(kept) else None
        if op.name == "convert_element_type":
            return 0 if given[0] in self._narrowed else None
        if op.name not in _NEUTRAL:
            return None
        for i, by in enumerate(reversed(op.inputs[:2] if op.name in _COMMUTATIVE else op.inputs[1:2])):
            value = self._filled.get(by) if isinstance(by, Value) else by.value
            neutral = value is not None and np.size(value) == 1 and bool(np.all(np.equal(value, _NEUTRAL[op.name])))
            if neutral and given[i] is not None and op.inputs[i].shape == op.outputs[0].shape:
                return i
        return None

    def _define(self, op: Op, path: Path, given: Sequence[Value | None]) -> list[Value]:
        key = None
        if self._merged is not None and not op.bodies:
            literals = tuple(repr(x.value) for x in op.inputs if isinstance(x, Literal))
            key = (op.name, tuple(given), literals, repr(sorted(op.attributes.items(), key=lambda item: item[0])))
            if key in self._merged:
                return self._merged[key]
        outputs = [Value(x.aval) for x in op.outputs]
        self.nodes.append(Node(op, path, list(given), outputs))
        if key is not None and self._merged is not None:
            self._merged[key] = outputs
        return outputs


def needed(nodes: Sequence[Node], outputs: Iterable[Value]) -> list[Node]:
    """The operations that some outputs need, in order."""
    live, found = set(outputs), list[Node]()
    for node in reversed(nodes):
        if any(y in live for y in node.outputs):
            found.append(node)
            live.update(node.inputs)
    return found[::-1]


def narrowed_in_turns(op: Op, in_products: Collection[int] = ()) -> Mapping[int, Any]:
    """Which operands the turns of a `scan` read in a narrower type alone, and in which; carries excepted.

    Args:
        op: the scan.
        in_products: operands that products of matrices take as bfloat16 where they are float32.
    """
    num_constants, num_carry = _jax.scan_counts(dict(op.attributes))
    flat = Flat(op.bodies[0])
    readers: dict[Value, list[Node]] = {}
    for node in flat.nodes:
        for x in node.inputs:
            readers.setdefault(x, []).append(node)

    def types(x: Value, in_product: bool) -> set[Any]:
        found: set[Any] = {x.dtype} if x in flat.outputs else set()
        for node in readers.get(x, ()):
            if node.op.name == "convert_element_type":
                found.add(node.outputs[0].dtype)
            elif in_product and node.op.name in PRODUCTS and x.dtype == jnp.float32:
                found.add(np.dtype(jnp.bfloat16))
            elif in_product and node.op.name == "transpose":
                found |= types(node.outputs[0], in_product)
            else:
                found.add(x.dtype)
        return found

    found: dict[int, Any] = {}
    for i, x in enumerate(op.bodies[0].inputs):
        dtypes = types(x, i in in_products)
        carried = num_constants <= i < num_constants + num_carry
        if not carried and len(dtypes) == 1 and np.dtype(next(iter(dtypes))).itemsize < np.dtype(x.dtype).itemsize:
            (found[i],) = dtypes
    return found
