"""Which values of a computation become buffers, by a simple model of what XLA fuses.

The computation is read flat: calls and rematerialized parts are entered, loops and branches stay one operation each.
What only renames or rearranges is followed to what it renames. Operations on elements are fused into whoever reads
them, and computed again for each reader, unless that would read more than it saves. What differs between backends is in
`Backend`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compax.analysis.normal import CALLS
from compax.ir import Graph, Literal, Op, Path, Value

RENAMING = frozenset(
    {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "copy_p", "optimization_barrier", "name", "pvary"}
    | {"pcast", "sharding_constraint", "constrain", "reshard"}
)
"""Operations whose result is their operand under another name."""

CHEAP = frozenset(
    {"add", "add_any", "sub", "mul", "neg", "max", "min", "abs", "sign", "floor", "ceil", "round", "and", "or", "not"}
    | {"xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type", "broadcast_in_dim", "iota", "rev"}
    | {"transpose", "slice", "split", "pad", "concatenate", "clamp", "is_finite", "square", "integer_pow", "rem"}
    | {"dynamic_slice", "gather", "real", "imag", "shift_left", "shift_right_logical", "shift_right_arithmetic"}
    | {"population_count", "reduce_precision", "nextafter", "bitcast_convert_type", "stack", "unstack", "tile"}
)
"""Operations that are computed again rather than kept."""

COSTLY = frozenset(
    {
        "exp",
        "exp2",
        "log",
        "log1p",
        "expm1",
        "tanh",
        "logistic",
        "div",
        "rsqrt",
        "sqrt",
        "pow",
        "erf",
        "erfc",
        "erf_inv",
    }
    | {
        "sin",
        "cos",
        "tan",
        "cbrt",
        "atan2",
        "random_bits",
        "threefry2x32",
        "random_wrap",
        "random_unwrap",
        "random_seed",
    }
)
"""Operations on elements that a backend may rather keep than compute again."""

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter-mul", "sort"})
_SMALL = 1024
_READS_MORE = 1.3


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend's compiler does with buffers.

    Attributes:
        fuses_into_products: whether operations on elements are fused into the products that read them.
        keeps_costly: whether transcendental functions that are read several times are kept.
        narrow_products: whether float32 values that products alone read are stored as the bfloat16 that these take.
        merges_recomputation: whether outside of loops a value that rematerialization computes again is the first one.
    """

    fuses_into_products: bool
    keeps_costly: bool
    narrow_products: bool
    merges_recomputation: bool


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(
        fuses_into_products=False,
        keeps_costly=True,
        narrow_products=False,
        merges_recomputation=True,
    ),
    "gpu": Backend(
        fuses_into_products=False,
        keeps_costly=True,
        narrow_products=False,
        merges_recomputation=False,
    ),
    "tpu": Backend(
        fuses_into_products=True,
        keeps_costly=False,
        narrow_products=True,
        merges_recomputation=False,
    ),
}


@dataclasses.dataclass(eq=False, slots=True)
class Step:
    """An operation that writes buffers, with everything that is fused into it.

    Attributes:
        op: the operation.
        path: where it stands.
        outputs: the values that it writes.
        reads: the buffers that it reads.
    """

    op: Op
    path: Path
    outputs: list[Value]
    reads: list[Value]


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """An operation, its operands and results as they are called after renamings are looked through."""

    op: Op
    path: Path
    operands: list[Value | None]
    outputs: list[Value]
    number: int = 0

    @property
    def inputs(self) -> list[Value]:
        return [x for x in self.operands if x is not None]

    @property
    def fusible(self) -> bool:
        return fusible(self.op)


def fusible(op: Op) -> bool:
    """Whether an operation is computed where its result is read."""
    return op.name in CHEAP or op.name in COSTLY


class Buffers:
    """The buffers of a graph, in the order in which they are written.

    Attributes:
        inputs: the graph's inputs.
        nodes: the operations that some output needs, in order.
        steps: what writes buffers, in order.
        outputs: what is returned: buffers, inputs, or none for a constant.
    """

    def __init__(self, graph: Graph, backend: Backend, prefix: Path = (), bodies: "dict[int, Buffers] | None" = None):
        self.backend = backend
        self._bodies = {} if bodies is None else bodies
        self.inputs = graph.inputs
        flat = Flat(graph, merge=backend.merges_recomputation, prefix=prefix)
        self.outputs: list[Value | None] = flat.outputs
        self._returned = {x for x in flat.outputs if x is not None}
        self.nodes = _needed(flat.nodes, self._returned)
        self._producer = {y: node for node in self.nodes for y in node.outputs}
        self._readers: dict[Value, list[Node]] = {}
        for number, node in enumerate(self.nodes):
            node.number = number
            for x in dict.fromkeys(node.inputs):
                self._readers.setdefault(x, []).append(node)
        self._kept: set[Value] = set()
        self._choose()
        self.steps = [self._step(node) for node in self.nodes if any(y in self._kept for y in node.outputs)]
        self._only: dict[Value, bool] = {}

    # -- Which values are kept ----------------------------------------------------------------------------------------

    def _choose(self) -> None:
        for node in self.nodes:
            if not node.fusible:
                self._kept.update(node.outputs)
                for x in node.inputs:
                    x = self._through_layout(x) if node.op.name in PRODUCTS else x
                    if self._reads_buffers(node) and x in self._producer:
                        self._kept.add(x)
        self._kept.update(x for x in self._returned if x in self._producer)
        reached: dict[Value, set[int]] = {}
        for node in reversed(self.nodes):
            for y in node.outputs:
                if y in self._kept:
                    continue
                found: set[int] = set()
                for reader in self._readers.get(y, ()):
                    inside = reader.fusible and not any(z in self._kept for z in reader.outputs)
                    found |= (
                        set[int]().union(*(reached.get(z, ()) for z in reader.outputs)) if inside else {reader.number}
                    )
                reached[y] = found
                if size_bytes(y) > _SMALL and self._worth_keeping(node, y, len(found)):
                    self._kept.add(y)

    def _worth_keeping(self, node: Node, y: Value, readers: int) -> bool:
        if readers > 1 and node.op.name in COSTLY and self.backend.keeps_costly:
            return True
        into_product = any(reader.op.name in PRODUCTS for reader in self._readers.get(y, ()))
        if readers > 1 or into_product:
            return sum(map(size_bytes, self._sources(node.inputs))) > _READS_MORE * size_bytes(y)
        return False

    def _reads_buffers(self, node: Node) -> bool:
        """Whether an operation that is not fused reads its operands as buffers."""
        if node.op.name in PRODUCTS:
            return not self.backend.fuses_into_products
        return node.op.name in ("scan", "while", "cond", "pallas_call", "custom_call") or node.op.name in _IN_PLACE

    def _through_layout(self, x: Value) -> Value:
        while x in self._producer and self._producer[x].op.name == "transpose":
            x = self._producer[x].inputs[0]
        return x

    def _sources(self, values: Sequence[Value]) -> list[Value]:
        """The buffers and inputs that values are computed from where they are fused."""
        found: dict[Value, None] = {}
        waiting, seen = list(values), set(values)
        while waiting:
            x = waiting.pop()
            if x in self._kept or x not in self._producer:
                found[x] = None
                continue
            fresh = [y for y in self._producer[x].inputs if y not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        return list(found)

    def _step(self, node: Node) -> Step:
        return Step(node.op, node.path, [y for y in node.outputs if y in self._kept], self._sources(node.inputs))

    def body(self, graph: Graph) -> "Buffers":
        """The buffers of a loop's body or of a branch; a body that several operations share is looked at once."""
        if id(graph) not in self._bodies:
            backend = dataclasses.replace(self.backend, merges_recomputation=False)
            self._bodies[id(graph)] = Buffers(graph, backend, bodies=self._bodies)
        return self._bodies[id(graph)]

    def keeps(self, x: Value) -> bool:
        """Whether a value is a buffer."""
        return x in self._kept

    # -- Sizes --------------------------------------------------------------------------------------------------------

    def nbytes(self, x: Value) -> int:
        """Bytes of a buffer."""
        size = size_bytes(x)
        if self.backend.narrow_products and x.dtype == jnp.float32 and x in self._producer and self.feeds_products(x):
            return size // 2
        return size

    def feeds_products(self, x: Value) -> bool:
        """Whether products alone read a value, rearranged or in the turns of a loop."""
        if x not in self._only:
            self._only[x] = False
            readers = self._readers.get(x, ())
            self._only[x] = (
                bool(readers) and x not in self._returned and all(self._feeds(x, reader) for reader in readers)
            )
        return self._only[x]

    def _feeds(self, x: Value, reader: Node) -> bool:
        name = reader.op.name
        if name in PRODUCTS:
            return True
        if name in ("transpose", "slice", "split", "broadcast_in_dim", "concatenate"):
            return all(self.feeds_products(y) for y in reader.outputs)
        if name == "scan":
            body = self.body(reader.op.bodies[0])
            return all(body.feeds_products(body.inputs[i]) for i, y in enumerate(reader.operands) if y is x)
        return False


def size_bytes(x: Value) -> int:
    """Bytes of an array."""
    dtype = x.dtype
    if dtype is None:
        return 0
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 8 * math.prod(x.shape)
    return math.prod(x.shape) * np.dtype(dtype).itemsize


class Flat:
    """The operations of a graph with calls entered and renamings looked through.

    Attributes:
        nodes: the operations.
        outputs: what is returned; none for constants.
    """

    def __init__(self, graph: Graph, *, merge: bool = False, prefix: Path = ()):
        self.nodes: list[Node] = []
        self._merged: dict[object, list[Value]] | None = {} if merge else None
        env: dict[Value, Value | None] = {value: value for value in graph.inputs}
        self.outputs = self._enter(graph, env, prefix)

    def _enter(self, graph: Graph, env: dict[Value, Value | None], prefix: Path) -> list[Value | None]:
        def read(x: Value | Literal) -> Value | None:
            return None if isinstance(x, Literal) else env[x]

        env.update((value, None) for value, array in graph.constants if np.size(array) <= _SMALL)
        env.update((value, value) for value, array in graph.constants if np.size(array) > _SMALL)
        for position, op in enumerate(graph.ops):
            given = [read(x) for x in op.inputs]
            path = (*prefix, (position, -1))
            if op.name in CALLS or (op.equation is None and op.bodies):
                body = op.bodies[0]
                inside = dict(zip(body.inputs, given, strict=True))
                env.update(zip(op.outputs, self._enter(body, inside, (*prefix, (position, 0))), strict=True))
            elif op.name in RENAMING and len(op.outputs) == len(op.inputs):
                env.update(zip(op.outputs, given, strict=True))
            elif op.name in RENAMING:
                env.update(dict.fromkeys(op.outputs, given[0]))
            else:
                env.update(zip(op.outputs, self._define(op, path, given), strict=True))
        return [read(x) for x in graph.outputs]

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


def _needed(nodes: Sequence[Node], outputs: Iterable[Value]) -> list[Node]:
    needed, found = set(outputs), list[Node]()
    for node in reversed(nodes):
        if any(y in needed for y in node.outputs):
            found.append(node)
            needed.update(node.inputs)
    return found[::-1]
