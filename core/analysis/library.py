"""What XLA's compiler for CPUs fuses: the groups that it hands to a library, and what its own loops compute again.

The rules are those of XLA's source (`xla/backends/cpu/transforms/library_rewriter.cc`, `ynn_matcher.h`,
`ynn_support.cc`, `xla/service/instruction_fusion.cc`), on a graph that is read flat.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np

from compax import _jax
from compax.ir import Op, Path, Value

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

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_SUPPORTED = frozenset(
    {"abs", "ceil", "convert_element_type", "cos", "erf", "exp", "exp2", "expm1", "floor", "log", "log1p", "logistic"}
    | {"neg", "round", "rsqrt", "sign", "sin", "sqrt", "tanh", "tan", "add", "add_any", "div", "max", "min", "mul"}
    | {"pow", "integer_pow", "square", "sub"}
)
_MOVES = frozenset({"broadcast_in_dim", "transpose", "pad"})
_DTYPES = frozenset({"float64", "float32", "bfloat16", "int8", "uint8"})
_LEAST_ELEMENTS = 4096
_RESHAPING = frozenset(
    {"broadcast_in_dim", "transpose", "slice", "split", "pad", "concatenate", "dynamic_slice", "gather", "stack"}
    | {"unstack", "tile", "rev", "iota", "bitcast_convert_type"}
    | {name for name in COSTLY if name.startswith(("random", "threefry"))}
)


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


def by_element(node: Node) -> bool:
    """Whether a result's element depends on the operands' elements in the same place alone."""
    return node.fusible and node.op.name not in _RESHAPING


def with_broadcasts(nodes: Sequence[Node]) -> list[Node]:
    """Operations on elements with operands of the result's size: what JAX stretches becomes a broadcast of its own.

    Equal ones are one, as after XLA's elimination of common subexpressions.
    """
    found: list[Node] = []
    stretched: dict[tuple[Value, tuple[int, ...]], Value] = {}
    for node in nodes:
        operands = list(node.operands)
        if by_element(node) and len(node.outputs) == 1:
            shape = node.outputs[0].shape
            for i, x in enumerate(operands):
                if x is None or math.prod(x.shape) == math.prod(shape):
                    continue
                if (x, shape) not in stretched:
                    y = stretched[x, shape] = Value(_jax.abstract(jax.ShapeDtypeStruct(shape, x.dtype)))
                    op = dataclasses.replace(node.op, name="broadcast_in_dim", attributes={}, equation=None)
                    found.append(Node(op, node.path, [x], [y]))
                operands[i] = stretched[x, shape]
        found.append(dataclasses.replace(node, operands=operands))
    return found


def slices(op: Op) -> Sequence[Value]:
    """The inputs of a scan's body that are slices of its operands."""
    constants, carry = _jax.scan_counts(dict(op.attributes))
    return op.bodies[0].inputs[constants + carry :]


def with_slices(nodes: Sequence[Node], sliced: Collection[Value]) -> list[Node]:
    """Operations of a loop's body, with slices of what the loop goes over: a product reads them from memory."""
    taken = {x: Value(x.aval) for x in dict.fromkeys(x for node in nodes for x in node.inputs) if x in sliced}
    first: list[Node] = []
    for x, y in taken.items():
        first.append(Node(Op("dynamic_slice", (x,), (y,), {}), (), [x], [y]))
    return first + [
        dataclasses.replace(node, operands=[x if x is None else taken.get(x, x) for x in node.operands])
        for node in nodes
    ]


def with_rearranged(nodes: Sequence[Node]) -> list[Node]:
    """Products with operands in the order that the library takes: what has another order becomes a transpose.

    XLA's `DotDecomposer` puts batch dimensions first and brings what is contracted together, on the right before and on
    the left behind the other dimensions. Its `TransposeFolding` takes back what only exchanges the two dimensions of a
    matrix. Equal transposes are one.
    """
    producer = {y: node for node in nodes for y in node.outputs}
    rearranged: dict[tuple[Value, tuple[int, ...], tuple[int, ...]], Value] = {}
    found: list[Node] = []
    for node in nodes:
        operands = list(node.operands)
        if node.op.name == "dot_general":
            contracted, batch = node.op.attributes["dimension_numbers"]
            for i, x in enumerate(operands):
                if x is None:
                    continue
                given = node.op.inputs[i]
                free = [dim for dim in range(len(given.shape)) if dim not in contracted[i] and dim not in batch[i]]
                parts = (batch[i], free, contracted[i]) if i == 0 else (batch[i], contracted[i], free)
                order = [int(dim) for part in parts for dim in part]
                while x.shape == given.shape and x in producer and producer[x].op.name == "transpose":
                    before = producer[x].op.attributes["permutation"]
                    source = producer[x].inputs[0]
                    order, x, given = [int(before[dim]) for dim in order], source, producer[x].op.inputs[0]
                moved = [dim for dim in order if given.shape[dim] > 1]
                if moved != sorted(moved) and (batch[i] or len(moved) > 2):
                    key = (x, tuple(given.shape), tuple(order))
                    if key not in rearranged:
                        shape = tuple(given.shape[dim] for dim in order)
                        y = rearranged[key] = Value(_jax.abstract(jax.ShapeDtypeStruct(shape, given.dtype)))
                        op = dataclasses.replace(node.op, name="transpose", attributes={}, equation=None)
                        found.append(Node(op, node.path, [x], [y]))
                    x = rearranged[key]
                operands[i] = x
        found.append(dataclasses.replace(node, operands=operands))
    return found


def library_nodes(nodes: Sequence[Node], sliced: Collection[Value]) -> list[Node]:
    """Operations as XLA for CPUs has them before it fuses: with broadcasts, slices and transposes of their own."""
    return with_rearranged(with_broadcasts(with_slices(nodes, sliced)))


class Library:
    """The groups of operations that become kernels of YNNPACK, the library that XLA uses on CPUs.

    A group starts at a reduction. It takes in operands that nothing else reads, and the one reader of its result, as
    long as the library knows them. Only then comes XLA's own fusion, which leaves these kernels alone: their operands
    and results are in memory. Products are kernels by themselves, unless a group takes them in.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        producer: Mapping[Value, Node],
        readers: Mapping[Value, Sequence[Node]],
        returned: Collection[Value],
    ):
        self._nodes = nodes
        self._producer = producer
        self._readers = readers
        self._returned = returned
        self._root: dict[Node, Node] = {}

    def grow(self) -> Mapping[Node, Node]:
        """For each operation in a group, the one whose result the group writes."""
        for node in reversed(self._nodes):
            if node.op.name in _REDUCTIONS and node not in self._root and _large(node) and _known_dtypes(node):
                self._grow(node)
        return self._root

    def _grow(self, start: Node) -> None:
        group, root = {start}, start
        changed = True
        while changed:
            changed = False
            waiting = list(group)
            while waiting:
                node = waiting.pop()
                for x in node.inputs if node.op.name not in PRODUCTS else ():
                    found = self._producer.get(x)
                    if found is not None and found not in group and self._absorbs(found, group):
                        group.add(found)
                        waiting.append(found)
                        changed = True
            reader = self._only_reader(root)
            if reader is not None and reader not in self._root and _supported(reader):
                group.add(reader)
                root, changed = reader, True
        self._root.update(dict.fromkeys(group, root))

    def _absorbs(self, node: Node, group: Collection[Node]) -> bool:
        return (
            node not in self._root
            and _supported(node)
            and all(y not in self._returned for y in node.outputs)
            and all(reader in group for y in node.outputs for reader in self._readers.get(y, ()))
        )

    def _only_reader(self, node: Node) -> Node | None:
        (y,) = node.outputs
        readers = self._readers.get(y, ())
        return readers[0] if len(readers) == 1 and y not in self._returned else None


def _supported(node: Node) -> bool:
    if node.op.name in _MOVES:
        return _known_dtypes(node)
    known = node.op.name in _SUPPORTED or node.op.name in _REDUCTIONS or node.op.name == "dot_general"
    return known and _large(node) and _known_dtypes(node)


def _large(node: Node) -> bool:
    return any(math.prod(x.shape) >= _LEAST_ELEMENTS for x in (*node.inputs, *node.outputs))


def _known_dtypes(node: Node) -> bool:
    return all(x.dtype is not None and np.dtype(x.dtype).name in _DTYPES for x in (*node.inputs, *node.outputs))


class AllPaths:
    """Which values XLA's loop fusion writes to memory because it cannot fuse them on all paths to some reader.

    A value of several operands is computed again for several readers only if all paths to each of them can be fused. So
    what the forward pass hands on to the backward pass is in memory: the other operand of the reader there depends on
    it through products. What has one operand of full rank, broadcasts not counted, is computed again.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        producer: Mapping[Value, Node],
        readers: Mapping[Value, Sequence[Node]],
        kept: Collection[Value],
        inside: Mapping[Node, Node],
    ):
        self._nodes = nodes
        self._producer = producer
        self._readers = readers
        self._kept = set(kept)
        self._inside = inside
        self._before: dict[Node, int] = {}
        for node in nodes:
            mask = 1 << node.number
            for x in node.inputs:
                if x in producer:
                    mask |= self._before[producer[x]]
            self._before[node] = mask

    def split(self) -> set[Value]:
        """The values."""
        found: set[Value] = set()
        for consumer in self._nodes:
            for y in consumer.inputs:
                node = self._producer.get(y)
                if node is None or y in self._kept or node in self._inside or len(self._readers[y]) == 1:
                    continue
                if not self._at_most_unary(node) and not self._can(node, consumer, {}):
                    self._kept.add(y)
                    found.add(y)
        return found

    def _at_most_unary(self, node: Node) -> bool:
        rank = _rank(node.outputs[0])
        # A value added to itself is a product with two.
        operands = dict.fromkeys(node.inputs)
        return sum(_rank(x) >= rank for x in operands if not self._broadcasts(x)) <= 1

    def _broadcasts(self, x: Value) -> bool:
        return x in self._producer and self._producer[x].op.name in ("broadcast_in_dim", "iota")

    def _can(self, node: Node, consumer: Node, seen: dict[Node, bool]) -> bool:
        """Whether a value can be fused into a reader on all paths that lead there."""
        if consumer is node:
            return True
        if consumer not in seen:
            seen[consumer] = False
            seen[consumer] = (
                consumer.fusible
                and consumer not in self._inside
                and all(
                    self._fuses(x) and self._can(node, self._producer[x], seen)
                    for x in consumer.inputs
                    if x in self._producer and self._before[self._producer[x]] >> node.number & 1
                )
            )
        return seen[consumer]

    def _fuses(self, x: Value) -> bool:
        node = self._producer[x]
        return x not in self._kept and node.fusible and node not in self._inside


def _rank(x: Value) -> int:
    """Dimensions that are longer than one."""
    return sum(size > 1 for size in x.shape)
