"""Remat under a budget: what the backward pass needs, what it costs to compute again, and what a choice amounts to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from compax import _jax, ir
from compax.analysis import library
from compax.analysis.buffers import BACKENDS, Buffers, Flat, Node, size_bytes
from compax.analysis.cost_rules import Work, work
from compax.analysis.liveness import Liveness, liveness
from compax.analysis.tracing import Traced
from compax.analysis.training import train_step
from compax.capture import Captured
from compax.ir import Path, Value
from compax.passes.remat.approximating import code_bytes, refusals
from compax.passes.remat.solving import Choice, Item, Layers, choose, priced
from compax.program import Program
from compax.rewrites.checkpoint import Mark, Region, checkpointed, graph_at
from compax.target import Target

_MOST_GROUPS = 8
_ROUNDS = 6
_FUSED = 0.1
"""What computing a fused operation again costs, as a share of writing its result."""


# -- What the backward pass needs -------------------------------------------------------------------------------------


def needed_paths(step: Traced) -> dict[Path, bool]:
    """Operations of the captured graph of which the backward pass reads something.

    True where it reads the result itself, false where it reads something that differentiation made of the operation,
    for which its operands are needed.
    """
    found: dict[Path, bool] = {}

    def visit(graph: ir.Graph, prefix: Path, in_backward: bool) -> None:
        flat = Flat(graph, prefix=prefix)
        producer = {y: node for node in flat.nodes for y in node.outputs}
        for node in flat.nodes:
            backward = in_backward or step.places[node.path].phase in ("backward", "recompute")
            for x in node.inputs if backward else ():
                source = producer.get(x)
                if source is not None and step.places[source.path].phase == "forward" and source.op.name != "scan":
                    note(source, x)
            if node.op.name == "scan":
                body = node.op.bodies[0]
                inner = (*prefix[:0], *node.path[:-1], (node.path[-1][0], 0))
                if not backward:
                    saved(node, body, inner)

    def saved(node: Node, body: ir.Graph, prefix: Path) -> None:
        flat = Flat(body, prefix=prefix)
        producer = {y: inner for inner in flat.nodes for y in inner.outputs}
        _, carry = _jax.scan_counts(dict(node.op.attributes))
        for y in flat.outputs[carry:]:
            source = producer.get(y) if y is not None else None
            if source is not None and y is not None:
                note(source, y)
        for inner in flat.nodes:
            if inner.op.name == "scan":
                saved(inner, inner.op.bodies[0], (*inner.path[:-1], (inner.path[-1][0], 0)))

    def note(source: Node, x: Value) -> None:
        place = step.places[source.path]
        if place.path is None:
            return
        original = ir.resolve(step.captured.graph, place.path)
        same = original.name == source.op.name and any(y.shape == x.shape for y in original.outputs)
        found[place.path] = found.get(place.path, False) or same

    visit(step.graph, (), False)
    return found


# -- Layers as items --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Equal layers that are treated alike.

    Attributes:
        regions: the layers.
        layers: their operations, as items.
        paths: for each region the operation of each item.
    """

    regions: tuple[Region, ...]
    layers: Layers
    paths: tuple[tuple[Path, ...], ...]


def groups(
    captured: Captured, regions: Sequence[Region], needed: Mapping[Path, bool], target: Target, *, lossy: bool = False
) -> list[Group]:
    """Layers by kind, many equal ones in several groups so that some may keep more than others.

    Args:
        captured: the graph.
        regions: its layers.
        needed: `needed_paths` of its train step.
        target: the chip.
        lossy: whether values may be kept as int8.
    """
    refused = refusals(captured, regions) if lossy else None
    backend = dataclasses.replace(BACKENDS[target.chip.platform], merges_recomputation=False)
    by_holder: dict[Path, Buffers] = {}
    described: dict[Any, list[tuple[Region, list[Node], list[Item]]]] = {}
    for region in regions:
        if region.holder not in by_holder:
            graph = graph_at(captured.graph, region.holder)
            by_holder[region.holder] = Buffers(graph, backend, prefix=region.holder)
        held = by_holder[region.holder]
        nodes = [node for node in held.nodes if region.holds(node.path)]
        items = _items(nodes, held, needed, target, refused)
        described.setdefault((region.times, tuple(items)), []).append((region, nodes, items))
    found: list[Group] = []
    for (times, _), equal in described.items():
        size = max(1, math.ceil(len(equal) / _MOST_GROUPS))
        for first in range(0, len(equal), size):
            some = equal[first : first + size]
            layers = Layers(tuple(some[0][2]), times * len(some))
            paths = tuple(tuple(node.path for node in nodes) for _, nodes, _ in some)
            found.append(Group(tuple(region for region, _, _ in some), layers, paths))
    return found


def _items(
    nodes: Sequence[Node],
    held: Buffers,
    needed: Mapping[Path, bool],
    target: Target,
    refused: Mapping[Path, str] | None,
) -> list[Item]:
    producer = {y: i for i, node in enumerate(nodes) for y in node.outputs}
    own = {i for i, node in enumerate(nodes) if needed.get(node.path, False)}
    for node in nodes:
        if needed.get(node.path, True) is False:
            own.update(producer[x] for x in node.inputs if x in producer)
    items = []
    for i, node in enumerate(nodes):
        sources = tuple(dict.fromkeys(producer[x] for x in node.inputs if x in producer))
        stored = any(held.keeps(y) for y in node.outputs)
        item = Item(
            sources=sources,
            needed=i in own,
            keepable=bool(sources) or not library.fusible(node.op),
            seconds=_seconds(node, target),
            kept_bytes=sum(map(held.nbytes, node.outputs)),
            working_bytes=sum(map(held.full_bytes, node.outputs)) if stored else 0,
        )
        if refused is not None and item.keepable and node.path not in refused:
            code = code_bytes(node.outputs[0], held)
            moved = size_bytes(node.outputs[0]) + 2 * code
            coding_seconds = moved / target.device_memory_bandwidth
            if code < item.kept_bytes:
                item = dataclasses.replace(item, coded_bytes=code, coding_seconds=coding_seconds)
        items.append(item)
    return items


def _seconds(node: Node, target: Target) -> float:
    """The least time to compute an operation again; what is fused pays for its result alone."""
    moved = sum(map(size_bytes, node.outputs))
    if library.fusible(node.op):
        return _FUSED * moved / target.device_memory_bandwidth
    moved += sum(map(size_bytes, node.inputs))
    done = work(node.op)
    flops = done.flops if isinstance(done, Work) else 0
    dtype = node.op.inputs[0].dtype if node.op.inputs else jnp.float32
    products = node.op.name in library.PRODUCTS and jnp.issubdtype(dtype, jnp.number)
    return target.roofline_seconds({str(dtype): flops} if products else {}, moved)


# -- The search -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What to keep.

    Attributes:
        marks: the operations whose results are kept.
        regions: what is computed again, but for those; none where everything fits.
        choice: what the choice amounts to.
        predicted: what the step needs of memory with it.
    """

    marks: Mapping[Path, Mark]
    regions: tuple[Region, ...]
    choice: Choice
    predicted: Liveness

    def same(self, other: "Plan") -> bool:
        """Whether both keep the same."""
        return self.marks == other.marks and self.regions == other.regions


class Planner:
    """Plans one graph of a program.

    Attributes:
        without: what the step needs of memory where nothing is computed again.
        least: what it needs where nothing is kept.
    """

    def __init__(
        self,
        program: Program,
        captured: Captured,
        regions: Sequence[Region],
        target: Target,
        slots: int,
        *,
        lossy: bool = False,
    ):
        self.captured = captured
        self.regions = tuple(regions)
        self.target = target
        self.step = train_step(program, captured, slots)
        before = self.step.traced(captured)
        self.without = self._liveness(before)
        self.groups = groups(captured, regions, needed_paths(before), target, lossy=lossy)
        self.nothing = priced([group.layers for group in self.groups], [frozenset[int]() for _ in self.groups])
        self.least = self._predict({})

    def _liveness(self, step: Traced) -> Liveness:
        return liveness(step, self.target.chip.platform, donated=self.step.donated)

    def rewritten(self, plan: Plan) -> Captured:
        """The graph with a choice made."""
        return checkpointed(self.captured, plan.regions, plan.marks)

    def keeping_nothing(self) -> Plan:
        """The plan that computes all layers again."""
        return Plan({}, self.regions, self.nothing, self.least)

    def keeping_everything(self) -> Plan:
        """The plan that computes nothing again."""
        everything = [frozenset(range(len(group.layers.items))) for group in self.groups]
        return Plan({}, (), priced([group.layers for group in self.groups], everything), self.without)

    def _predict(self, marks: Mapping[Path, Mark]) -> Liveness:
        """What the step needs of memory with a choice."""
        return self._liveness(self.step.traced(checkpointed(self.captured, self.regions, marks)))

    def plan(self, budget_bytes: int) -> Plan | None:
        """The choice that fits a budget by the prediction; none if even keeping nothing does not.

        The program that chooses counts what is kept and the largest layer at work; the prediction counts everything.
        What it finds too much is taken from what may be kept, until it fits. With int8 it has to be better
        than the best without.
        """
        if self.without.peak <= budget_bytes:
            return self.keeping_everything()
        if self.least.peak > budget_bytes:
            return None
        best = self.keeping_nothing()
        layers = [group.layers for group in self.groups]
        exact = [each.exact() for each in layers]
        for given in (exact,) if exact == layers else (exact, layers):
            best = self._best(given, budget_bytes, best)
        return best

    def _best(self, layers: Sequence[Layers], budget_bytes: int, best: Plan) -> Plan:
        room = float(budget_bytes - self.least.peak + self.nothing.working_bytes)
        fits, too_much, over_before = float(self.nothing.working_bytes), math.inf, math.inf
        for _ in range(_ROUNDS):
            choice = choose(layers, room)
            if choice is None:
                break
            marks = self.marks(choice)
            predicted = self._predict(marks)
            over = predicted.peak - budget_bytes
            better = choice.seconds < best.choice.seconds or (
                choice.seconds == best.choice.seconds and not choice.approximates
            )
            if over <= 0 and better:
                best = Plan(marks, self.regions, choice, predicted)
            if -0.02 * budget_bytes < over <= 0 or (over <= 0 and choice.seconds == 0):
                break
            used = choice.kept_bytes + choice.working_bytes
            if over > 0:
                # What is too much is taken from what was used, not from the room: the choice may have left some of it.
                # If that helps little, or leaves nothing, other values make the peak, and what is kept is halved
                # towards what fits.
                too_much, less = used, used - over
                room = less if less > fits and over <= over_before / 2 else (fits + used) / 2
                over_before = over
            else:
                fits = max(fits, used)
                room, over_before = min(room - 0.8 * over, (used + too_much) / 2), math.inf
        return best

    def marks(self, choice: Choice) -> dict[Path, Mark]:
        """The operations that a choice keeps."""
        found: dict[Path, Mark] = {}
        for group, kept, coded in zip(self.groups, choice.kept, choice.coded, strict=True):
            for paths in group.paths:
                found.update((paths[i], "save") for i in kept)
                found.update((paths[i], "compress") for i in coded)
        return found
