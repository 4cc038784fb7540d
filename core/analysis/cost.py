"""Cost: what a graph computes and moves, operation by operation, and the least time that this takes on a chip.

Everything is counted from the graph, nothing is run or compiled: the figures predict. Bodies are entered; a loop counts
as often as it turns, a branch as the largest of its alternatives, a `shard_map` on each of its devices. What cannot be
counted is listed (`Cost.unknown`), never taken for nothing.

The time is a roofline (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", Communications of the ACM 52(4), 2009): a kernel takes as long as the slower of computing and moving.
Communication between chips, launches and caches are not in it.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from compax import ir
from compax.analysis.cost_rules import Work
from compax.analysis.kernels import Item, Note, find_kernels
from compax.encoding import leaf_nbytes
from compax.errors import TargetError
from compax.ir import Graph, Op, Path

if TYPE_CHECKING:
    from compax.target import Target

Owner = Callable[[Op, Path], str]

UNOWNED = ""
"""The owner of what belongs to no composite."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What some operations cost together, in one call, on all devices.

    Attributes:
        flops: floating-point operations, a multiply-add as two; those on integers and booleans count too.
        product_flops: those of products and convolutions, which a chip's matrix unit computes.
        flops_by_dtype: all of them by what they compute in, such as "float32".
        transcendentals: transcendental functions.
        bytes_unfused: bytes moved if each operation read its operands and wrote its results.
        bytes_fused: bytes moved by kernels; one that holds operations of several owners is the product's, or else the
            last one's.
        count: operations, each counted as often as it runs.
    """

    flops: int = 0
    product_flops: int = 0
    flops_by_dtype: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    transcendentals: int = 0
    bytes_unfused: int = 0
    bytes_fused: int = 0
    count: int = 0

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that is moved after fusion; 0 where nothing is moved."""
        return self.flops / self.bytes_fused if self.bytes_fused else 0.0


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal kernels.

    Attributes:
        owner: what they belong to.
        operation: the operation whose result they write.
        products: floating-point operations of products in each, by dtype.
        others: all other operations and transcendental functions of each; what is computed again counts again.
        bytes: bytes that each reads and writes.
        count: how many run on one device in a call.
    """

    owner: str
    operation: str
    products: tuple[tuple[str, int], ...]
    others: int
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class Time:
    """The least time of one call on one device, in seconds. Predicted.

    Attributes:
        seconds: the sum over kernels of the slower of computing and moving.
        bound_seconds: the slower of computing everything and moving everything: what no schedule beats.
        compute_seconds: computing everything.
        memory_seconds: moving everything.
        seconds_by_owner: `seconds` by what the kernels belong to.
        assumptions: how a chip computes what it has no unit for.
    """

    seconds: float
    bound_seconds: float
    compute_seconds: float
    memory_seconds: float
    seconds_by_owner: Mapping[str, float]
    assumptions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call of a graph costs. Predicted: every figure is counted from the graph.

    Attributes:
        name: what was counted.
        total: everything together, on all devices.
        by_owner: the same by composite or site; what belongs to none is at `UNOWNED`.
        by_operation: the same by kind of operation.
        by_phase: the same by phase of a train step, where that is known.
        input_bytes: bytes of the inputs by what they are: "parameter" (as stored, encodings to the byte), "state",
            "argument", ...
        output_bytes: bytes of the outputs.
        kernels: what runs together, with owners; equal ones together.
        unknown: what could not be counted, and why.
        loops: loops of unknown length; one turn of each is counted.
        branches: conditionals whose branches differ; the largest is counted.
        target: what the program is meant for, if that was said.
    """

    name: str
    total: Part
    by_owner: Mapping[str, Part]
    by_operation: Mapping[str, Part]
    by_phase: Mapping[str, Part]
    input_bytes: Mapping[str, int]
    output_bytes: int
    kernels: tuple[Group, ...]
    unknown: tuple[Note, ...]
    loops: tuple[Note, ...]
    branches: tuple[Note, ...]
    target: "Target | None" = None

    @property
    def flops(self) -> int:
        """Floating-point operations of one call, on all devices."""
        return self.total.flops

    @property
    def product_flops(self) -> int:
        """Those of products and convolutions."""
        return self.total.product_flops

    @property
    def flops_by_dtype(self) -> Mapping[str, int]:
        """Floating-point operations by what they compute in."""
        return self.total.flops_by_dtype

    @property
    def transcendentals(self) -> int:
        """Transcendental functions."""
        return self.total.transcendentals

    @property
    def bytes_unfused(self) -> int:
        """Bytes moved if each operation read its operands and wrote its results."""
        return self.total.bytes_unfused

    @property
    def bytes_fused(self) -> int:
        """Bytes moved after fusion."""
        return self.total.bytes_fused

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that is moved after fusion."""
        return self.total.intensity

    @property
    def product_flops_per_device(self) -> int:
        """Products of each device: those outside of any `shard_map` run on all."""
        return sum(flops * group.count for group in self.kernels for _, flops in group.products)

    @property
    def time(self) -> Time | None:
        """The least time on the target, or nothing without one."""
        return None if self.target is None else self.on(self.target)

    def on(self, target: "Target") -> Time:
        """The least time of one call on one device of a target.

        Products run at the rate of their dtype. Products of dtypes that no unit of the chip multiplies, and all other
        operations, run at the chip's rate for vectors; where that is not known, what they move alone counts.
        """
        vector_rate = target.vector_rate
        rates: dict[str, float | None] = {}
        assumptions: list[str] = []
        for dtype in sorted({dtype for group in self.kernels for dtype, _ in group.products}):
            try:
                found = target.rate(dtype)
                rates[dtype] = found.flops_per_second
                assumptions += [found.note] if found.note else []
            except TargetError:
                rates[dtype] = vector_rate
                assumptions.append(f"products of {dtype} as operations on vectors: {target.chip.name} has no unit")
        if vector_rate is None:
            assumptions.append(f"operations on vectors take no time: no rate of {target.chip.name} is known")
        time = self.roofline(rates, target.device_memory_bandwidth, vector_rate)
        return dataclasses.replace(time, assumptions=tuple(assumptions))

    def roofline(
        self, rate: "Mapping[str, float | None] | float", bandwidth: float, vector_rate: float | None = None
    ) -> Time:
        """The least time of one call on one device.

        Args:
            rate: of products in operations a second: for all dtypes, or for each; none takes no time.
            bandwidth: bytes a second between the device and its memory.
            vector_rate: of all other operations; none takes no time.

        Raises:
            KeyError: `rate` lacks a dtype.
        """

        def seconds_of(flops: float, per_second: float | None) -> float:
            return flops / per_second if per_second else 0.0

        seconds = compute = memory = 0.0
        by_owner: dict[str, float] = collections.defaultdict(float)
        for group in self.kernels:
            computing = seconds_of(group.others, vector_rate)
            for dtype, flops in group.products:
                computing += seconds_of(flops, rate[dtype] if isinstance(rate, Mapping) else rate)
            moving = group.bytes / bandwidth
            compute += computing * group.count
            memory += moving * group.count
            seconds += max(computing, moving) * group.count
            by_owner[group.owner] += max(computing, moving) * group.count
        return Time(seconds, max(compute, memory), compute, memory, dict(by_owner))

    def __str__(self) -> str:
        from compax.analysis.cost_text import cost_text

        return cost_text(self)


def graph_cost(
    graph: Graph,
    owner: Owner | None = None,
    *,
    phase: Owner | None = None,
    input_bytes: Mapping[str, int] | None = None,
    name: str = "graph",
    target: "Target | None" = None,
) -> Cost:
    """What one call of a graph costs: of a captured program, or of anything that `ir.import_jaxpr` takes.

    Args:
        graph: the graph.
        owner: what an operation belongs to, by where it stands; by default all of it to nothing.
        phase: the phase of a train step that an operation is in; by default none.
        input_bytes: bytes of the inputs by what they are; by default all are arguments.
        name: what to call it.
        target: what it is meant for: its platform says how operations fuse.
    """
    region = find_kernels(graph, epilogues=target is not None and target.chip.platform == "tpu")
    owner = owner or (lambda op, path: UNOWNED)
    total = _Sum()
    by_owner: dict[str, _Sum] = collections.defaultdict(_Sum)
    by_operation: dict[str, _Sum] = collections.defaultdict(_Sum)
    by_phase: dict[str, _Sum] = collections.defaultdict(_Sum)

    def sums(belongs: str, op: Op, path: Path) -> list[_Sum]:
        found = [total, by_owner[belongs], by_operation[op.name]]
        return found if phase is None else [*found, by_phase[phase(op, path)]]

    for item in region.items:
        for sum_ in sums(owner(item.op, item.path), item.op, item.path):
            sum_.item(item)
    groups: collections.Counter[Group] = collections.Counter()
    for kernel in region.kernels:
        owners = (owner(op, path) for op, path in kernel.leading)
        belongs, (root, path) = next(filter(None, owners), UNOWNED), kernel.root
        groups[Group(belongs, root.name, kernel.products, kernel.others, kernel.bytes, 0)] += kernel.times
        for sum_ in sums(belongs, root, path):
            sum_.fused += kernel.bytes * kernel.times * kernel.devices

    def notes(kind: str) -> tuple[Note, ...]:
        return tuple(note for note in region.notes if note.kind == kind)

    return Cost(
        name=name,
        total=total.part(),
        by_owner={key: sum_.part() for key, sum_ in by_owner.items()},
        by_operation={key: sum_.part() for key, sum_ in by_operation.items()},
        by_phase={key: sum_.part() for key, sum_ in by_phase.items()},
        input_bytes=input_bytes or {"argument": sum(map(leaf_nbytes, graph.inputs))},
        output_bytes=sum(leaf_nbytes(x) for x in graph.outputs if x.dtype is not None),
        kernels=tuple(dataclasses.replace(group, count=count) for group, count in groups.items()),
        unknown=notes("unknown"),
        loops=notes("loop"),
        branches=notes("branch"),
        target=target,
    )


def function_cost(function: Callable[..., Any], *args: Any, target: "Target | None" = None) -> Cost:
    """What one call of a JAX function costs, such as a whole train step.

    Args:
        function: the function.
        *args: its arguments: arrays, shapes, or trees of them.
        target: what it is meant for.
    """
    graph = ir.import_jaxpr(jax.make_jaxpr(function)(*args))
    return graph_cost(graph, name=getattr(function, "__name__", "function"), target=target)


class _Sum:
    """A `Part` while it is added up."""

    __slots__ = ("count", "flops", "fused", "products", "transcendentals", "unfused")

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.products = self.transcendentals = self.unfused = self.fused = self.count = 0

    def item(self, item: Item) -> None:
        times, work = item.times * item.devices, item.work
        self.count += times
        self.unfused += item.unfused_bytes * times
        if not isinstance(work, Work):
            return
        self.transcendentals += work.transcendentals * times
        if work.flops:
            self.flops[work.dtype] = self.flops.get(work.dtype, 0) + work.flops * times
            self.products += work.flops * times if work.product else 0

    def part(self) -> Part:
        total, by_dtype = sum(self.flops.values()), dict(sorted(self.flops.items()))
        return Part(total, self.products, by_dtype, self.transcendentals, self.unfused, self.fused, self.count)
