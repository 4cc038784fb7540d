"""Which values of a computation become buffers, by a simple model of what XLA fuses.

The computation is read flat: calls and rematerialized parts are entered, loops and branches stay one operation each.
What only renames or rearranges is followed to what it renames. Operations on elements are fused into whoever reads
them, and computed again for each reader, unless that would read more than it saves. What differs between backends is in
`Backend`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.analysis.flat import SMALL_ELEMENTS, Flat, narrowed_in_turns, needed
from compax.analysis.library import (
    COSTLY,
    PRODUCTS,
    AllPaths,
    Library,
    Node,
    by_element,
    fusible,
    library_nodes,
    slices,
)
from compax.analysis.scatters import into_rows, with_accumulation
from compax.analysis.scheduling import breadth_first
from compax.ir import Graph, Op, Path, Value

__all__ = ["BACKENDS", "COSTLY", "PRODUCTS", "Backend", "Buffers", "Flat", "Node", "Step", "fusible", "size_bytes"]

_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scatter-mul", "sort"})
_READS_MORE = 1.3


@dataclasses.dataclass(frozen=True)
class Backend:
    """What a backend's compiler does with buffers.

    Attributes:
        fuses_into_products: whether operations on elements are fused into the products that read them.
        keeps_costly: whether transcendental functions that are read several times are kept.
        narrow_products: whether float32 values that products alone read are stored as the bfloat16 that these take.
        merges_recomputation: whether outside of loops a value that rematerialization computes again is the first one.
        copies_donated: whether a donated input that may be overwritten too early is copied.
        breadth_first: whether an operation runs as soon as its operands are there.
        selects_for_scatters: whether a scatter of one element into each row of a constant is a selection.
        narrows_before_loops: whether what the turns of a loop read in a narrower type is converted as a whole before.
        tiles: whether arrays are stored in tiles of 8 by 128 elements, filled up with nothing.
        library_reductions: whether reductions are kernels of a library, with what stands around them, that read their
            operands from memory.
        duplicates_on_all_paths: whether what has several operands is computed again only for readers that it can be
            fused into on all paths.
        gathers_from_memory: whether a gather reads its operand from memory, so that nothing is fused into it there.
    """

    fuses_into_products: bool
    keeps_costly: bool
    narrow_products: bool
    merges_recomputation: bool
    selects_for_scatters: bool = False
    copies_donated: bool = False
    breadth_first: bool = False
    narrows_before_loops: bool = False
    tiles: bool = False
    library_reductions: bool = False
    duplicates_on_all_paths: bool = False
    gathers_from_memory: bool = False


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(
        fuses_into_products=False,
        keeps_costly=True,
        narrow_products=False,
        merges_recomputation=True,
        library_reductions=True,
        duplicates_on_all_paths=True,
        copies_donated=True,
        breadth_first=True,
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
        selects_for_scatters=True,
        narrows_before_loops=True,
        tiles=True,
        gathers_from_memory=True,
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
        replaces: those of them whose place a result may take.
    """

    op: Op
    path: Path
    outputs: list[Value]
    reads: list[Value]
    replaces: list[Value]


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
        sliced: Collection[Value] = (),
    ):
        self.backend = backend
        self._bodies = {} if bodies is None else bodies
        self.inputs = graph.inputs
        flat = Flat(graph, merge=backend.merges_recomputation, prefix=prefix, narrowed=narrowed)
        self.outputs: list[Value | None] = flat.outputs
        self._returned = {x for x in flat.outputs if x is not None}
        self.nodes = needed(flat.nodes, self._returned)
        self._nodes = self.nodes
        self._sliced: dict[int, Sequence[Value]] = {}
        if backend.library_reductions:
            self._sliced = {id(node.op.bodies[0]): slices(node.op) for node in self.nodes if node.op.name == "scan"}
            self._nodes = library_nodes(self.nodes, sliced)
        self._narrowed: dict[int, list[Value]] = {}
        self._nodes = with_accumulation(self._nodes, selects=backend.selects_for_scatters)
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
        steps = [self._step(node) for node in self._nodes if any(y in self._kept for y in node.outputs)]
        self.steps = breadth_first(steps) if backend.breadth_first else steps
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
                given = {i for i, x in enumerate(operands) if x in self.inputs} if self.backend.narrow_products else ()
                found = narrowed_in_turns(node.op, given)
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
            if node.op.name == "gather" and self.backend.gathers_from_memory:
                self._kept.update(x for x in node.operands[:1] if x in self._producer)
            if node in self._inside:
                self._keep_for_library(node)
            elif not self._fusible(node):
                self._kept.update(node.outputs)
                for x in node.inputs:
                    x = (
                        self._through_layout(x)
                        if node.op.name in PRODUCTS and not self.backend.library_reductions
                        else x
                    )
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
                    inside = self._fusible(reader) and not any(z in self._kept for z in reader.outputs)
                    found |= (
                        set[int]().union(*(reached.get(z, ()) for z in reader.outputs)) if inside else {reader.number}
                    )
                reached[y] = found
                if size_bytes(y) > SMALL_ELEMENTS and self._worth_keeping(node, y, len(found)):
                    self._kept.add(y)

    def _fusible(self, node: Node) -> bool:
        return node.fusible or (self.backend.selects_for_scatters and into_rows(node, self._producer))

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
        if readers > 1 or (into_product and not self.backend.fuses_into_products):
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
        reads = self._sources(node.inputs)
        outputs = [y for y in node.outputs if y in self._kept]
        return Step(node.op, node.path, outputs, reads, self._replaced(node, reads))

    def _replaced(self, node: Node, reads: Sequence[Value]) -> list[Value]:
        """What a step may overwrite: the state of loops and updates, and what is read element by element alone."""
        if node.op.name in _IN_PLACE or node.op.name in ("scan", "while"):
            return list(reads)
        if node in self._inside or not fusible(node.op):
            return []
        moved: set[Value] = set()
        waiting, seen = [node], {node}
        while waiting:
            inner = waiting.pop()
            sources = [x for x in inner.inputs if x in self._kept or x not in self._producer]
            if not by_element(inner):
                moved.update(self._sources(inner.inputs))
                continue
            moved.update(x for x in sources if x.shape != inner.outputs[0].shape)
            fresh = {self._producer[x] for x in inner.inputs if x not in sources} - seen
            seen |= fresh
            waiting.extend(fresh)
        return [x for x in reads if x not in moved]

    def body(self, graph: Graph) -> "Buffers":
        """The buffers of a loop's body or of a branch; a body that several operations share is looked at once."""
        if id(graph) not in self._bodies:
            backend = dataclasses.replace(self.backend, merges_recomputation=False)
            narrowed = self._narrowed.get(id(graph), ())
            sliced = self._sliced.get(id(graph), ())
            self._bodies[id(graph)] = Buffers(graph, backend, bodies=self._bodies, narrowed=narrowed, sliced=sliced)
        return self._bodies[id(graph)]

    def copy_inputs(self, inputs: Sequence[Value]) -> None:
        """Has everything read copies of some inputs, made first."""
        copies = {x: Value(x.aval) for x in inputs}
        for step in self.steps:
            step.reads = [copies.get(x, x) for x in step.reads]
            step.replaces = [copies.get(x, x) for x in step.replaces]
        first = [Step(Op("copy", (x,), (y,), {}), (), [y], [x], []) for x, y in copies.items()]
        self.steps = first + self.steps

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
