"""Kernels: which operations of a graph run together, and what each group reads from memory and writes to it.

A simple model of what XLA's fusion does:

1. Operations that compute or move element by element fuse into the operation that reads them. A result that is read
   inside of one kernel alone is never in memory.
2. A result that several kernels read is written once and read by each, unless it is cheap (no transcendental function,
   division, gather, ...) and reading its operands in each moves no more: then each computes it again. So broadcasts,
   iotas and conversions to wider types are never in memory.
3. Reductions fuse what they read, and write their result. Products, convolutions, sorts, scatters and whatever a
   library computes read their operands from memory and write their results. Where the backend has epilogues (a TPU), a
   product fuses into the elementwise operations that alone read it, one product in a kernel, and a reduction runs in
   the kernel that writes what it reads; elsewhere what follows a product, and every reduction, is a kernel of its own.
4. Reshapes are free, and so are transposes that a product reads. A slice or a gather reads what it returns; an update
   of a slice and a scatter work in place and move the slice.
5. Bodies of `jit`, `remat` and custom derivatives are part of the graph around them. Those of loops and branches are
   not: what crosses their border is in memory.

What nobody reads is not computed. Nothing stays in a cache from one kernel to the next.

Beside the bytes that XLA's compilers count (jax 0.10.2, libtpu 0.0.42, 2026-11): on the CPU 0.9 to 1.15 times as many
for the forward passes of tiny models and 0.6 to 0.9 for their gradients; on v5e, decoders of 4 and 28 million
parameters, 1.6 times for forward passes, whose softmax it divides inside of the product, and 0.7 to 1.05 for gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from compax import _jax
from compax.analysis import cost_rules
from compax.analysis.cost_rules import Unknown, Work
from compax.encoding import leaf_nbytes
from compax.ir import Graph, Literal, Op, Path, Value

_UNTYPED = -1
_IN_PARTS = frozenset(("split", "unstack"))
_TAKES_PART = frozenset(("slice", "dynamic_slice", "gather", *_IN_PARTS))
_IN_PLACE = cost_rules.SCATTERS | {"dynamic_update_slice"}
_VIEWS = cost_rules.NAMING | {"reshape", "squeeze", "expand_dims"}
_FUSIBLE = cost_rules.ELEMENTWISE | cost_rules.MOVES - {"dynamic_update_slice", "tile"}
_EXPENSIVE = (
    cost_rules.TRANSCENDENTAL | cost_rules.WRITTEN_OUT.keys() | {"div", "rem", "gather", "concatenate", "pad", "stack"}
)
_PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot_general"))
_INLINED = cost_rules.named(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr "
    "custom_lin composite linear_call custom_linear_solve call custom_vmap_call"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One operation that was counted.

    Attributes:
        op: the operation.
        path: where it stands.
        work: what it computes, once.
        unfused_bytes: bytes that it reads and writes by itself.
        times: how often it runs in one call on one device.
        devices: on how many devices it runs.
    """

    op: Op
    path: Path
    work: Work | Unknown
    unfused_bytes: int
    times: int = 1
    devices: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """Operations that run as one, once.

    Attributes:
        members: its operations in order, each with where it stands; it writes the result of the last one.
        products: floating-point operations of products by dtype: what a matrix unit computes.
        others: all other floating-point operations, and transcendental functions; what is computed again counts again.
        bytes: bytes that it reads and writes.
        times: how often it runs in one call on one device.
        devices: on how many devices it runs.
    """

    members: tuple[tuple[Op, Path], ...]
    products: tuple[tuple[str, int], ...]
    others: int
    bytes: int
    times: int = 1
    devices: int = 1

    @property
    def leading(self) -> list[tuple[Op, Path]]:
        """Its operations, what it is there for first: products, then from the last one back."""
        backwards = self.members[::-1]
        products = [member for member in backwards if member[0].name in _PRODUCTS]
        return [*products, *(member for member in backwards if member[0].name not in _PRODUCTS)]

    @property
    def root(self) -> tuple[Op, Path]:
        """The operation whose result it writes."""
        return self.members[-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """Something about a figure that a reader has to know.

    Attributes:
        kind: "unknown" (not counted), "loop" (of unknown length, one turn is counted), "branch" (the largest is).
        operation: the operation.
        path: where it stands.
        text: what and why.
    """

    kind: str
    operation: str
    path: Path
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """What a graph consists of: everything between two borders that fusion does not cross, and all inside of it."""

    items: tuple[Item, ...]
    kernels: tuple[Kernel, ...]
    notes: tuple[Note, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of one call, on all devices."""
        return sum(x.work.flops * x.times * x.devices for x in self.items if isinstance(x.work, Work))

    def at(self, prefix: Path, times: int = 1, devices: int = 1) -> "Region":
        """The same below another operation, more often, or on more devices."""
        return Region(
            tuple(
                dataclasses.replace(x, path=(*prefix, *x.path), times=x.times * times, devices=x.devices * devices)
                for x in self.items
            ),
            tuple(
                dataclasses.replace(
                    x,
                    members=tuple((op, (*prefix, *path)) for op, path in x.members),
                    times=x.times * times,
                    devices=x.devices * devices,
                )
                for x in self.kernels
            ),
            tuple(dataclasses.replace(x, path=(*prefix, *x.path)) for x in self.notes),
        )


def find_kernels(graph: Graph, *, epilogues: bool = False) -> Region:
    """The operations of a graph, bodies included, and the kernels that they run as.

    Args:
        graph: the graph.
        epilogues: whether elementwise operations and reductions fuse into what writes their operand.
    """
    return _Finder(epilogues).region(graph)


@dataclasses.dataclass(slots=True)
class _Step:
    """One operation of a flattened region: operands and results as numbers of values."""

    op: Op
    path: Path
    inputs: list[int]
    outputs: list[int]
    work: Work | Unknown = dataclasses.field(default_factory=Work)
    inner: Region | None = None
    kernels: set[int] = dataclasses.field(default_factory=set[int])
    live: bool = False


class _Finder:
    """Regions by graph, so that a body that many operations share is looked at once."""

    def __init__(self, epilogues: bool) -> None:
        self.epilogues = epilogues
        self.regions: dict[int, Region] = {}
        self.works: dict[Op, Work | Unknown] = {}

    def region(self, graph: Graph) -> Region:
        if id(graph) not in self.regions:
            self.regions[id(graph)] = _Flat(self, graph).result()
        return self.regions[id(graph)]

    def work(self, op: Op) -> Work | Unknown:
        if op not in self.works:
            self.works[op] = cost_rules.work(op)
        return self.works[op]


class _Flat:
    """One region: its operations in order, bodies that fusion crosses put in their places."""

    def __init__(self, finder: _Finder, graph: Graph):
        self.finder = finder
        self.steps: list[_Step] = []
        self.sizes: list[int] = []
        self.notes: list[Note] = []
        self.before_transpose: dict[int, int] = {}
        self.with_product: set[int] = set()
        inputs = [self.value(x) for x in graph.inputs]
        self.outputs = self.flatten(graph, inputs, ())
        self.writer = {x: number for number, step in enumerate(self.steps) for x in step.outputs}

    def value(self, x: Any) -> int:
        self.sizes.append(_array_bytes(x.shape, x.dtype))
        return len(self.sizes) - 1

    # -- Flattening ---------------------------------------------------------------------------------------------------

    def flatten(self, graph: Graph, inputs: Sequence[int], prefix: Path) -> list[int]:
        env: dict[Value, int] = dict(zip(graph.inputs, inputs, strict=True))
        for value, _ in graph.constants:
            env[value] = self.value(value)
        for position, op in enumerate(graph.ops):
            operands = [_UNTYPED if isinstance(x, Literal) else env[x] for x in op.inputs]
            env.update(zip(op.outputs, self.operation(op, operands, prefix, position), strict=True))
        return [_UNTYPED if isinstance(x, Literal) else env[x] for x in graph.outputs]

    def operation(self, op: Op, operands: list[int], prefix: Path, position: int) -> list[int]:
        """The results of one operation, as numbers of values."""
        if _is_view(op):
            return operands[: len(op.outputs)]
        if op.bodies and not cost_rules.has_formula(op):
            return self.with_bodies(op, operands, prefix, position)
        if op.name in _IN_PARTS:
            # Each part is read by itself, wherever it is needed.
            path = (*prefix, (position, -1))
            return [self.step(dataclasses.replace(op, outputs=(x,)), operands, path).outputs[0] for x in op.outputs]
        return self.step(op, operands, (*prefix, (position, -1))).outputs

    def step(self, op: Op, operands: list[int], path: Path, inner: Region | None = None) -> _Step:
        if op.name in _PRODUCTS:
            operands = [self.before_transpose.get(x, x) for x in operands]
        outputs = [self.value(x) for x in op.outputs]
        if op.name == "transpose":
            self.before_transpose[outputs[0]] = self.before_transpose.get(operands[0], operands[0])
        step = _Step(op, path, operands, outputs, inner=inner)
        if inner is None:
            step.work = self.finder.work(op)
        self.steps.append(step)
        return step

    def with_bodies(self, op: Op, operands: list[int], prefix: Path, position: int) -> list[int]:
        path = (*prefix, (position, -1))
        if op.name in _INLINED or op.equation is None:
            index, given = _entered(op, operands)
            body = op.bodies[index]
            if (len(body.inputs), len(body.outputs)) == (len(given), len(op.outputs)):
                return self.flatten(body, given, (*prefix, (position, index)))
        inner = self.loop_or_branch(op, (*prefix, (position, 0)))
        if inner is not None:
            return self.step(op, operands, path, inner).outputs
        step = self.step(op, operands, path)
        step.work = Unknown(f"no formula for the operation '{op.name}', whose bodies are not a definition of it")
        return step.outputs

    def loop_or_branch(self, op: Op, first: Path) -> Region | None:
        region, path = self.finder.region, (*first[:-1], (first[-1][0], -1))
        if op.name == "scan":
            return region(op.bodies[0]).at(first, op.attributes["length"])
        if op.name == "while":
            turns = _turns(op)
            second = (*first[:-1], (first[-1][0], 1))
            parts = [region(op.bodies[0]).at(first, turns or 1), region(op.bodies[1]).at(second, turns or 1)]
            notes = [] if turns is not None else [Note("loop", "while", path, "a loop of unknown length: one turn")]
            return Region(
                parts[0].items + parts[1].items,
                parts[0].kernels + parts[1].kernels,
                (*parts[0].notes, *parts[1].notes, *notes),
            )
        if op.name == "cond":
            found = [region(body) for body in op.bodies]
            largest = max(range(len(found)), key=lambda i: (found[i].flops, sum(x.bytes for x in found[i].kernels)))
            chosen = found[largest].at((*first[:-1], (first[-1][0], largest)))
            if len(found) > 1 and len({x.flops for x in found}) > 1:
                text = f"the largest of {len(found)} branches"
                chosen = dataclasses.replace(chosen, notes=(*chosen.notes, Note("branch", "cond", path, text)))
            return chosen
        if op.name == "shard_map":
            mesh = op.attributes["mesh"]
            axes = op.attributes.get("newly_manual_axes", op.attributes.get("manual_axes", mesh.axis_names))
            return region(op.bodies[0]).at(first, devices=math.prod(mesh.shape[name] for name in axes))
        return None

    # -- Fusion -------------------------------------------------------------------------------------------------------

    def result(self) -> Region:
        self.fuse()
        items: list[Item] = []
        kernels: list[Kernel] = []
        notes = list(self.notes)
        members: dict[int, list[int]] = {}
        for number, step in enumerate(self.steps):
            if not step.live:
                continue
            if step.inner is not None:
                items += step.inner.items
                kernels += step.inner.kernels
                notes += step.inner.notes
                continue
            if isinstance(step.work, Unknown):
                notes.append(Note("unknown", step.op.name, step.path, step.work.reason))
            items.append(Item(step.op, step.path, step.work, self.unfused(step)))
            for root in step.kernels:
                members.setdefault(root, []).append(number)
        for root, numbers in members.items():
            kernels.append(self.kernel(root, numbers))
        return Region(tuple(items), tuple(kernels), tuple(notes))

    def fuse(self) -> None:
        """Notes for every live step in which kernels it runs, by the number of their last step."""
        readers: dict[int, list[tuple[int, int]]] = {}
        returned = set(self.outputs)
        for number in range(len(self.steps) - 1, -1, -1):
            step = self.steps[number]
            read = [reader for x in step.outputs for reader in readers.get(x, ())]
            step.live = bool(read) or any(x in returned for x in step.outputs) or _jax.has_effects(step.op.equation)
            if not step.live:
                continue
            step.kernels = self.kernels_of(number, step, read, any(x in returned for x in step.outputs))
            for place, x in enumerate(step.inputs):
                if x != _UNTYPED:
                    readers.setdefault(x, []).append((number, place))

    def kernels_of(self, number: int, step: _Step, read: Sequence[tuple[int, int]], returned: bool) -> set[int]:
        if returned or (step.op.name not in _FUSIBLE and not self.may_have_epilogue(step)):
            return {number}
        if any(not _fuses(self.steps[reader].op, place) for reader, place in read):
            return {number}
        kernels = {kernel for reader, _ in read for kernel in self.steps[reader].kernels}
        if step.op.name in _PRODUCTS:
            (root, *others) = kernels
            if others or root in self.with_product or self.steps[root].op.name not in _FUSIBLE:
                return {number}
            self.with_product.add(root)
            return kernels
        return kernels if len(kernels) == 1 or self.again(step, len(kernels)) else {number}

    def may_have_epilogue(self, step: _Step) -> bool:
        return self.finder.epilogues and step.op.name in _PRODUCTS

    def again(self, step: _Step, times: int) -> bool:
        """Whether to compute a result in each of several kernels rather than once, and write it for them."""
        if step.op.name in _EXPENSIVE:
            return False
        read = sum(self.sizes[x] for x in set(step.inputs) - {_UNTYPED})
        return read * times <= read + self.sizes[step.outputs[0]] * (1 + times)

    def kernel(self, root: int, numbers: Sequence[int]) -> Kernel:
        products: dict[str, int] = {}
        others = 0
        inside = {x for number in numbers if number != root for x in self.steps[number].outputs}
        reads: dict[int, int] = {}
        for number in numbers:
            step = self.steps[number]
            if isinstance(step.work, Work):
                others += step.work.transcendentals
                if step.work.product:
                    products[step.work.dtype] = products.get(step.work.dtype, 0) + step.work.flops
                else:
                    others += step.work.flops
            for place, x in enumerate(step.inputs):
                if x != _UNTYPED and x not in inside:
                    # Two parts of one array are read apart; the whole of it once.
                    reads[x] = min(self.sizes[x], reads.get(x, 0) + self.read(step, place))
        last = self.steps[root]
        if self.finder.epilogues and last.op.name in cost_rules.REDUCTIONS:
            reads = self.without_what_is_at_hand(reads)
        stated = last.work.bytes if isinstance(last.work, Work) else None
        moved = stated if stated is not None else sum(reads.values()) + self.written(last)
        members = tuple((self.steps[number].op, self.steps[number].path) for number in numbers)
        return Kernel(members, tuple(sorted(products.items())), others, moved)

    def without_what_is_at_hand(self, reads: dict[int, int]) -> dict[int, int]:
        """What a reduction reads when it runs in the kernel that writes its operand, if all else was there before."""
        written = {x: self.writer[x] for x in reads if x in self.writer}
        if not written:
            return reads
        last = max(written, key=lambda x: written[x])
        fuses = self.steps[written[last]].op.name in _FUSIBLE | _PRODUCTS
        return {x: size for x, size in reads.items() if x != last} if fuses else reads

    def unfused(self, step: _Step) -> int:
        if isinstance(step.work, Work) and step.work.bytes is not None:
            return step.work.bytes
        read = {x: self.read(step, place) for place, x in enumerate(step.inputs) if x != _UNTYPED}
        return sum(read.values()) + self.written(step)

    def read(self, step: _Step, place: int) -> int:
        """Bytes that a step reads of one of its operands."""
        if step.op.name in _TAKES_PART and place == 0:
            return sum(self.sizes[x] for x in step.outputs)
        if step.op.name in _IN_PLACE and place == 0:
            # A slice is overwritten; what a scatter adds to is read first.
            return 0 if step.op.name in ("dynamic_update_slice", "scatter") else self.update(step)
        return self.sizes[step.inputs[place]]

    def written(self, step: _Step) -> int:
        if step.op.name in _IN_PLACE:
            return self.update(step)
        return sum(self.sizes[x] for x in step.outputs)

    def update(self, step: _Step) -> int:
        """Bytes of the part that a step changes in place."""
        place = 1 if step.op.name == "dynamic_update_slice" else 2
        x = step.op.inputs[place]
        return _array_bytes(x.shape, x.dtype)


@functools.cache
def _array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return leaf_nbytes(jax.ShapeDtypeStruct(shape, dtype)) if dtype is not None else 0


def _is_view(op: Op) -> bool:
    """Whether an operation hands its operand on as it lies in memory."""
    if op.name in _VIEWS:
        return op.name != "reshape" or op.attributes.get("dimensions") is None
    if isinstance(op.inputs[0] if op.inputs else None, Literal) or len(op.inputs) != 1 or len(op.outputs) != 1:
        return False
    if op.name == "convert_element_type":
        return op.inputs[0].dtype == op.outputs[0].dtype
    if op.name == "broadcast_in_dim":
        kept = op.attributes["broadcast_dimensions"]
        same = math.prod(op.inputs[0].shape) == math.prod(op.outputs[0].shape)
        return same and list(kept) == sorted(kept)
    return False


def _fuses(op: Op, place: int) -> bool:
    """Whether an operation computes an operand by itself, element by element, where it needs it."""
    if op.name == "dynamic_update_slice":
        return place != 0
    return op.name in _FUSIBLE or op.name in cost_rules.REDUCTIONS


def _entered(op: Op, operands: list[int]) -> tuple[int, list[int]]:
    """Which body an operation stands for, and its operands."""
    if op.name != "custom_linear_solve":
        return 0, operands
    # Of matvec, vecmat, solve and transpose_solve, the solution is what the third one computes.
    lengths = list(op.attributes["const_lengths"])
    start = sum(lengths[:2])
    return 2, [*operands[start : start + lengths[2]], *operands[sum(lengths) :]]


def _turns(op: Op) -> int | None:
    """How often a `while` runs that counts from one literal to another, or None."""
    num_condition, num_body = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
    condition, body = op.bodies
    if len(condition.ops) != 1 or condition.ops[0].name not in ("lt", "gt") or num_condition:
        return None
    initial = op.inputs[num_body:]
    counter, limit = condition.ops[0].inputs
    if condition.ops[0].name == "gt":
        counter, limit = limit, counter
    start, end = (_initial(x, condition, initial) for x in (counter, limit))
    if start is None or end is None or not isinstance(counter, Value):
        return None
    index = condition.inputs.index(counter)
    after = body.outputs[index]
    producer = next((inner for inner in body.ops if after in inner.outputs), None)
    if producer is None or producer.name != "add" or producer.inputs[0] is not body.inputs[num_body + index]:
        return None
    step = producer.inputs[1]
    unmoved = not isinstance(limit, Value) or _unchanged(body, num_body, condition.inputs.index(limit))
    if not isinstance(step, Literal) or int(step.value) < 1 or not unmoved:
        return None
    return max(0, -((start - end) // int(step.value)))


def _initial(x: Any, condition: Graph, initial: Sequence[Any]) -> int | None:
    if not isinstance(x, Literal):
        x = initial[condition.inputs.index(x)]
    return int(x.value) if isinstance(x, Literal) and not x.shape else None


def _unchanged(body: Graph, num_body: int, index: int) -> bool:
    return body.outputs[index] is body.inputs[num_body + index]
