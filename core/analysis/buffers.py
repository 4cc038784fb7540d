"""Which values of a computation become buffers, by a simple model of what XLA fuses.

The computation is read flat: calls and rematerialized parts are entered, loops and branches stay one operation each.
What only renames or rearranges is followed to what it renames. Operations on elements are fused into whoever reads
them, and computed again for each reader, unless that would read more than it saves. What differs between backends is in
`Backend`.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.analysis.library import COSTLY, PRODUCTS, AllPaths, Library, Node, fusible, with_broadcasts, with_copies
from compax.analysis.normal import CALLS
from compax.ir import Graph, Literal, Op, Path, Value

__all__ = ["BACKENDS", "COSTLY", "PRODUCTS", "Backend", "Buffers", "Flat", "Node", "Step", "fusible", "size_bytes"]

RENAMING = frozenset(
    {"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "copy_p", "optimization_barrier", "name", "pvary"}
    | {"pcast", "sharding_constraint", "constrain", "reshard"}
)
"""Operations whose result is their operand under another name."""

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
        narrows_before_loops: whether what the turns of a loop read in a narrower type is converted as a whole before.
        tiles: whether arrays are stored in tiles of 8 by 128 elements, filled up with nothing.
        library_reductions: whether reductions are kernels of a library, with what stands around them, that read their
            operands from memory.
        duplicates_on_all_paths: whether what has several operands is computed again only for readers that it can be
            fused into on all paths.
    """

    fuses_into_products: bool
    keeps_costly: bool
    narrow_products: bool
    merges_recomputation: bool
    narrows_before_loops: bool = False
    tiles: bool = False
    library_reductions: bool = False
    duplicates_on_all_paths: bool = False


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(
        fuses_into_products=False,
        keeps_costly=True,
        narrow_products=False,
        merges_recomputation=True,
        library_reductions=True,
        duplicates_on_all_paths=True,
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
        narrows_before_loops=True,
        tiles=True,
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
        rearranged: those whose elements it reads in another order than it writes, so that it cannot work in place.
    """

    op: Op
    path: Path
    outputs: list[Value]
    reads: list[Value]
    rearranged: frozenset[Value] = frozenset()


class Buffers:
    """The buffers of a graph, in the order in which they are written.

    Attributes:
        inputs: the graph's inputs.
        nodes: the operations that some output needs, in order.
        steps: what writes buffers, in order.
        outputs: what is returned: buffers, inputs, or none for a constant.
    """

    def __init__(
        self,
        graph: Graph,
        backend: Backend,
        prefix: Path = (),
        bodies: "dict[int, Buffers] | None" = None,
        narrowed: Collection[Value] = (),
    ):
        self.backend = backend
        self._bodies = {} if bodies is None else bodies
        self.inputs = graph.inputs
        flat = Flat(graph, merge=backend.merges_recomputation, prefix=prefix, narrowed=narrowed)
        self.outputs: list[Value | None] = flat.outputs
        self._returned = {x for x in flat.outputs if x is not None}
        self.nodes = _needed(flat.nodes, self._returned)
        self._nodes = with_copies(with_broadcasts(self.nodes)) if backend.library_reductions else self.nodes
        self._narrowed: dict[int, list[Value]] = {}
        if backend.narrows_before_loops:
            self._nodes = self._narrow_before_loops()
        self._producer = {y: node for node in self._nodes for y in node.outputs}
        self._readers: dict[Value, list[Node]] = {}
        for number, node in enumerate(self._nodes):
            node.number = number
            for x in dict.fromkeys(node.inputs):
                self._readers.setdefault(x, []).append(node)
        self._kept: set[Value] = set()
        library = Library(self._nodes, self._producer, self._readers, self._returned)
        self._inside = library.grow() if backend.library_reductions else {}
        self._choose()
        self.steps = [self._step(node) for node in self._nodes if any(y in self._kept for y in node.outputs)]
        self._only: dict[Value, bool] = {}

    def _narrow_before_loops(self) -> list[Node]:
        """Converts what loops read in a narrower type, in place of each turn's part of it.

        The TPU's compiler moves such conversions out of loops: bfloat16 copies of whole stacks of float32 weights are
        in memory as long as the loop runs, one for all loops that read them (seen in its text with libtpu 0.0.42).
        """
        whole: dict[tuple[Value, str], Value] = {}
        nodes: list[Node] = []
        for node in self._nodes:
            if node.op.name == "scan":
                operands = list(node.operands)
                body = node.op.bodies[0]
                found = narrowed_in_turns(node.op)
                self._narrowed[id(body)] = [body.inputs[i] for i in found]
                for i, dtype in found.items():
                    x = operands[i]
                    if x is None:
                        continue
                    key = (x, np.dtype(dtype).name)
                    if key not in whole:
                        y = whole[key] = Value(_jax.abstract(jax.ShapeDtypeStruct(x.shape, dtype)))
                        op = Op("narrow", (), (), {})
                        nodes.append(Node(op, node.path, [x], [y]))
                    operands[i] = whole[key]
                node = dataclasses.replace(node, operands=operands)
            nodes.append(node)
        return nodes

    # -- Which values are kept ----------------------------------------------------------------------------------------

    def _choose(self) -> None:
        for node in self._nodes:
            if node in self._inside:
                self._keep_for_library(node)
            elif not node.fusible:
                self._kept.update(node.outputs)
                for x in node.inputs:
                    x = self._through_layout(x) if node.op.name in PRODUCTS else x
                    if self._reads_buffers(node) and x in self._producer:
                        self._kept.add(x)
        self._kept.update(x for x in self._returned if x in self._producer)
        if self.backend.duplicates_on_all_paths:
            self._kept.update(AllPaths(self._nodes, self._producer, self._readers, self._kept, self._inside).split())
        reached: dict[Value, set[int]] = {}
        for node in reversed(self._nodes):
            for y in node.outputs:
                if y in self._kept or node in self._inside:
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

    def _keep_for_library(self, node: Node) -> None:
        """The result of a library's kernel, and its operands: nothing is fused into it afterwards."""
        root = self._inside[node]
        if node is root:
            self._kept.update(node.outputs)
        self._kept.update(
            x for x in node.inputs if x in self._producer and self._inside.get(self._producer[x]) is not root
        )

    def _worth_keeping(self, node: Node, y: Value, readers: int) -> bool:
        if readers > 1 and node.op.name in COSTLY and self.backend.keeps_costly and not self._scales(node):
            return True
        if self.backend.duplicates_on_all_paths:
            return False
        into_product = any(reader.op.name in PRODUCTS for reader in self._readers.get(y, ()))
        if readers > 1 or into_product:
            return sum(map(size_bytes, self._sources(node.inputs))) > _READS_MORE * size_bytes(y)
        return False

    def _scales(self, node: Node) -> bool:
        """Whether a division is by what is broadcast: XLA multiplies by the inverse, which is cheap."""
        by = node.operands[-1]
        return node.op.name == "div" and (
            by is None or (by in self._producer and self._producer[by].op.name == "broadcast_in_dim")
        )

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
        written = [y for y in node.outputs if y in self._kept]
        return Step(node.op, node.path, written, self._sources(node.inputs), self._rearranged(node))

    def _rearranged(self, node: Node) -> frozenset[Value]:
        """The buffers that are read through a transpose; a TPU's layouts have room for that, a CPU's do not."""
        if not self.backend.library_reductions or not node.fusible:
            return frozenset()
        found: set[Value] = set()
        waiting, seen = [node], {node}
        while waiting:
            inner = waiting.pop()
            if inner.op.name == "transpose":
                found.update(self._sources(inner.inputs))
                continue
            for x in inner.inputs:
                if x not in self._kept and x in self._producer and self._producer[x] not in seen:
                    seen.add(self._producer[x])
                    waiting.append(self._producer[x])
        return frozenset(found)

    def body(self, graph: Graph) -> "Buffers":
        """The buffers of a loop's body or of a branch; a body that several operations share is looked at once."""
        if id(graph) not in self._bodies:
            backend = dataclasses.replace(self.backend, merges_recomputation=False)
            narrowed = self._narrowed.get(id(graph), ())
            self._bodies[id(graph)] = Buffers(graph, backend, bodies=self._bodies, narrowed=narrowed)
        return self._bodies[id(graph)]

    def keeps(self, x: Value) -> bool:
        """Whether a value is a buffer."""
        return x in self._kept

    # -- Sizes --------------------------------------------------------------------------------------------------------

    def nbytes(self, x: Value) -> int:
        """Bytes of a buffer or an input."""
        size = self.full_bytes(x)
        if self.backend.narrow_products and x.dtype == jnp.float32 and x in self._producer and self.feeds_products(x):
            return size // 2
        return size

    def full_bytes(self, x: Value) -> int:
        """Bytes of a value in its own type, as it lies in memory."""
        return tiled_bytes(x) if self.backend.tiles else size_bytes(x)

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


def narrowed_in_turns(op: Op) -> Mapping[int, Any]:
    """Which operands the turns of a `scan` read in a narrower type alone, and in which; carries excepted."""
    num_constants, num_carry = _jax.scan_counts(dict(op.attributes))
    flat = Flat(op.bodies[0])
    readers: dict[Value, list[Node]] = {}
    for node in flat.nodes:
        for x in node.inputs:
            readers.setdefault(x, []).append(node)
    found: dict[int, Any] = {}
    for i, x in enumerate(op.bodies[0].inputs):
        if num_constants <= i < num_constants + num_carry or x in flat.outputs or x not in readers:
            continue
        dtypes = {node.outputs[0].dtype for node in readers[x]}
        converted = all(node.op.name == "convert_element_type" for node in readers[x])
        if converted and len(dtypes) == 1 and np.dtype(next(iter(dtypes))).itemsize < np.dtype(x.dtype).itemsize:
            (found[i],) = dtypes
    return found


def size_bytes(x: Value) -> int:
    """Bytes of an array."""
    dtype = x.dtype
    if dtype is None:
        return 0
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 8 * math.prod(x.shape)
    return math.prod(x.shape) * np.dtype(dtype).itemsize


def tiled_bytes(x: Value) -> int:
    """Bytes of an array in tiles of 8 by 128 elements, the dimensions in the order that wastes least.

    Those of fewer than 8 rows have tiles of 1, 2 or 4; those of one row are filled up to a power of two of 128 elements
    or to multiples of 1024 (layouts as the compiler writes them: `T(8,128)`, `T(2,128)`, `T(256)`).
    """
    sizes = [size for size in x.shape if size > 1]
    size = size_bytes(x)
    if not sizes or not size:
        return size
    if len(sizes) == 1:
        return size // sizes[0] * _filled(sizes[0], 128, 1024)
    least = min(
        _filled(minor, 128, 128) * _filled(rows, 1, 8) / (minor * rows)
        for i, minor in enumerate(sizes)
        for j, rows in enumerate(sizes)
        if i != j
    )
    return round(size * least)


def _filled(size: int, least: int, most: int) -> int:
    """A size filled up to a power of two times `least`, or to multiples of `most`."""
    if size >= most:
        return -(-size // most) * most
    while least < size:
        least *= 2
    return least


class Flat:
    """The operations of a graph with calls entered and renamings looked through.

    Attributes:
        nodes: the operations.
        outputs: what is returned; none for constants.
    """

    def __init__(self, graph: Graph, *, merge: bool = False, prefix: Path = (), narrowed: Collection[Value] = ()):
        self._narrowed = frozenset(narrowed)
        self.nodes: list[Node] = []
        self._zeros: set[Value] = set()
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
            elif self._changes_nothing(op, given):
                env[op.outputs[0]] = given[0]
            elif op.name in RENAMING:
                env.update(dict.fromkeys(op.outputs, given[0]))
            else:
                env.update(zip(op.outputs, self._define(op, path, given), strict=True))
        return [read(x) for x in graph.outputs]

    def _changes_nothing(self, op: Op, given: Sequence[Value | None]) -> bool:
        """Whether a result is the first operand: one with dimensions of one, less zeros, or converted before."""
        if op.name == "broadcast_in_dim":
            if isinstance(op.inputs[0], Literal) and not np.any(op.inputs[0].value):
                self._zeros.add(op.outputs[0])
            kept = list(op.attributes["broadcast_dimensions"])
            return math.prod(op.inputs[0].shape) == math.prod(op.outputs[0].shape) and kept == sorted(kept)
        if op.name == "convert_element_type":
            return given[0] in self._narrowed
        if op.name != "sub" or given[0] is None or op.inputs[0].shape != op.outputs[0].shape:
            return False
        by = op.inputs[1]
        return by in self._zeros if isinstance(by, Value) else not np.any(by.value)

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
