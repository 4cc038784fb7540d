"""Checkpointing: parts of a graph whose values the backward pass computes again, but for those that are marked.

A region is one layer: what lies between two points of a residual stream, or the body of a scan. Where regions begin and
end is told by the stream and by what repeats along it, never by names. Chen et al., "Training Deep Nets with Sublinear
Memory Cost", 2016, arXiv:1604.06174.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from compax import ir, lowering
from compax.capture import Captured
from compax.composites.streams import Residual, on_the_way
from compax.compression import COMPRESS, compressed, is_compress
from compax.ir import Graph, Op, Operand, Path, Value
from compax.meaning import Meaning
from compax.raising import Site, common_prefix

SAVE, OFFLOAD = "compax.save", "compax.offload"
"""Names of the values that are kept on the device, and in host memory."""

KERNEL_RESIDUALS = ("compax.attention.out", "compax.attention.lse")
"""Names that fused kernels give to what their backward pass reads: where all is kept, the kernel is not run again."""

REMATERIALIZED = frozenset({"remat", "remat2", "checkpoint"})
_LOOPS = frozenset({"scan"})

Mark = Literal["save", "offload", "compress"]
"""Kept on the device, in host memory, or on the device as int8."""


@dataclasses.dataclass(frozen=True)
class Region:
    """A layer.

    Attributes:
        name: what its composites' names have in common.
        kind: "layer".
        holder: which graph it is in: the steps that lead to a scan's body; empty at the top.
        start: position of its first operation.
        stop: position after its last one.
        times: how often it runs: the length of the scan.
    """

    name: str
    holder: Path
    start: int
    stop: int
    times: int
    kind: str = "layer"

    def holds(self, path: Path) -> bool:
        """Whether an operation is in it."""
        depth = len(self.holder)
        return len(path) > depth and path[:depth] == self.holder and self.start <= path[depth][0] < self.stop


def graph_at(graph: Graph, holder: Path) -> Graph:
    """The graph that some steps lead to."""
    for position, index in holder:
        graph = graph.ops[position].bodies[index]
    return graph


def find_regions(captured: Captured, meaning: Meaning) -> list[Region]:
    """The layers of a graph, in order of evaluation. None where there is no residual stream."""
    found: list[Region] = []
    for stream in meaning.streams:
        by_holder: dict[Path, list[Residual]] = {}
        for residual in stream:
            by_holder.setdefault(_holder(captured.graph, residual.node.path), []).append(residual)
        for holder, residuals in by_holder.items():
            found += _regions(captured, meaning, holder, residuals)
    return _apart(found)


def _holder(graph: Graph, path: Path) -> Path:
    """The steps to the innermost scan around an operation."""
    result: Path = ()
    for depth in range(len(path) - 1):
        op = ir.resolve(graph, (*path[:depth], (path[depth][0], -1)))
        if op.name in _LOOPS:
            result = path[: depth + 1]
    return result


def _regions(captured: Captured, meaning: Meaning, holder: Path, residuals: Sequence[Residual]) -> list[Region]:
    graph, depth = graph_at(captured.graph, holder), len(holder)
    named = {node: composite for composite in meaning.composites for node in composite.nodes}
    branches = []
    for residual in residuals:
        inside = dict.fromkeys(named[node] for node in on_the_way(residual) if node in named)
        branches.append([composite for composite in inside if composite.name])
    if holder:
        names = [x.name for branch in branches for x in branch]
        times = ir.resolve(captured.graph, (*holder[:-1], (holder[-1][0], -1))).attributes["length"]
        return [Region(common_prefix(names) or "layers", holder, 0, len(graph.ops), times)]
    signatures = [tuple(sorted(x.kind for x in branch)) for branch in branches]
    period = _period(signatures)
    ends = [residual.node.path[depth][0] + 1 for residual in residuals]
    source = residuals[0].source.node
    start = source.path[depth][0] + 1 if source is not None and source.path[:depth] == holder else 0
    result: list[Region] = []
    for first in range(0, len(residuals), period):
        last = min(first + period, len(residuals)) - 1
        if ends[last] <= start:
            continue
        names = [x.name for branch in branches[first : last + 1] for x in branch]
        result.append(Region(common_prefix(names) or f"layer.{len(result)}", holder, start, ends[last], 1))
        start = ends[last]
    return result


def _period(signatures: Sequence[tuple[str, ...]]) -> int:
    """After how many additions a stream repeats itself; all of them if it does not."""
    count = len(signatures)
    for period in range(1, count // 2 + 1):
        if all(signatures[i] == signatures[i + period] for i in range(count - period)):
            return period
    return 1


def _apart(regions: Sequence[Region]) -> list[Region]:
    """Regions that do not overlap and have different names, in order."""
    result: list[Region] = []
    seen: dict[str, int] = {}
    for region in sorted(regions, key=lambda region: (region.holder, region.start)):
        if result and result[-1].holder == region.holder and region.start < result[-1].stop:
            region = dataclasses.replace(region, start=result[-1].stop)
            if region.start >= region.stop:
                continue
        seen[region.name] = seen.get(region.name, 0) + 1
        if seen[region.name] > 1:
            region = dataclasses.replace(region, name=f"{region.name}#{seen[region.name]}")
        result.append(region)
    return result


def value_names(
    captured: Captured, meaning: Meaning, sites: Sequence[Site], regions: Sequence[Region]
) -> dict[str, Path]:
    """A name for the result of every operation in regions: whose it is, what it is, and its number among equal ones.

    Such as `blocks.0.attn/exp` and `blocks.0.mlp.up/dot_general#2`. They stay the same for other shapes.
    """
    owners: dict[Path, str] = {path: composite.name for path, composite in meaning.owners().items()}
    owners |= {site.path: site.name for site in sites}
    found: dict[str, Path] = {}
    counts: dict[str, int] = {}
    for path, op in ir.walk(captured.graph):
        region = next((region for region in regions if region.holds(path)), None)
        if region is None:
            continue
        name = f"{owners.get(path, region.name)}/{op.name}"
        counts[name] = counts.get(name, 0) + 1
        found[name if counts[name] == 1 else f"{name}#{counts[name]}"] = path
    return found


def checkpointed(
    captured: Captured,
    regions: Sequence[Region],
    marks: Mapping[Path, Mark],
    policy: Callable[..., Any] | None = None,
) -> Captured:
    """A graph in which some regions are computed again in the backward pass.

    Args:
        captured: the graph; its regions have no rematerialization of their own.
        regions: which to compute again.
        marks: operations whose results are kept all the same.
        policy: of `jax.checkpoint`, such as one of `jax.checkpoint_policies`, for what has no mark.
    """
    return _evaluated(captured, _Checkpointing(captured, regions, marks, policy)) if regions else captured


def without_checkpoints(captured: Captured, regions: Sequence[Region]) -> Captured:
    """A graph without the rematerialization that is in some regions, or right around them, and without its marks."""
    inside = frozenset(
        id(op)
        for path, op in ir.walk(captured.graph)
        if (op.name in REMATERIALIZED or _is_mark(op))
        and any(region.holds(path) or _around(captured.graph, path, region) for region in regions)
    )
    return dataclasses.replace(captured, graph=_inlined(captured.graph, inside, {})) if inside else captured


def _inlined(graph: Graph, inside: frozenset[int], memo: dict[int, Graph]) -> Graph:
    """A graph in which some checkpoints are what they hold, and some marks what they mark. All else stays as it is."""
    if id(graph) in memo:
        return memo[id(graph)]
    env: dict[Value, Operand] = {}
    ops: list[Op] = []
    constants = list(graph.constants)
    for op in graph.ops:
        operands = tuple(env.get(x, x) if isinstance(x, Value) else x for x in op.inputs)
        bodies = tuple(_inlined(body, inside, memo) for body in op.bodies)
        if id(op) not in inside:
            same = all(a is b for a, b in zip((*operands, *bodies), (*op.inputs, *op.bodies), strict=True))
            ops.append(op if same else dataclasses.replace(op, inputs=operands, bodies=bodies))
        elif _is_mark(op):
            env[op.outputs[0]] = operands[0]
        else:
            (body,) = bodies
            inner: dict[Value, Any] = dict(zip(body.inputs, operands, strict=True))
            for value, array in body.constants:
                inner[value] = ir.Value(value.aval)
                constants.append((inner[value], array))
            ops += [ir.copied(each, inner) for each in body.ops]
            results = [inner[y] if isinstance(y, Value) else y for y in body.outputs]
            env.update(zip(op.outputs, results, strict=True))
    outputs = tuple(env.get(x, x) if isinstance(x, Value) else x for x in graph.outputs)
    same = len(ops) == len(graph.ops) and all(a is b for a, b in zip(ops, graph.ops, strict=True))
    memo[id(graph)] = (
        graph
        if same
        else dataclasses.replace(graph, ops=tuple(ops), outputs=outputs, constants=tuple(constants), imported=False)
    )
    return memo[id(graph)]


def _evaluated(captured: Captured, evaluator: "_Checkpointing") -> Captured:
    def function(*arrays: Any) -> list[Any]:
        return [evaluator.dense(x, "output") for x in evaluator.run(captured.graph, arrays)]

    with captured.under_mesh():
        graph = ir.trace(function, *(value.aval for value in captured.graph.inputs))
    return dataclasses.replace(captured, graph=graph)


def _is_mark(op: Op) -> bool:
    return op.name == COMPRESS or (op.name == "name" and op.attributes["name"] in (SAVE, OFFLOAD))


def _around(graph: Graph, path: Path, region: Region) -> bool:
    """Whether an operation holds a region, between the loop that the region is the body of and the loop around."""
    depth = len(path) - 1
    if (
        len(region.holder) <= depth
        or region.holder[:depth] != path[:depth]
        or region.holder[depth][0] != path[depth][0]
    ):
        return False
    return all(
        ir.resolve(graph, (*region.holder[:i], (region.holder[i][0], -1))).name not in _LOOPS
        for i in range(depth + 1, len(region.holder))
    )


class _Checkpointing(lowering.Evaluator):
    """Evaluates regions under `jax.checkpoint`, and gives names to what is kept."""

    def __init__(
        self,
        captured: Captured,
        regions: Sequence[Region],
        marks: Mapping[Path, Mark],
        policy: Callable[..., Any] | None = None,
    ):
        super().__init__(rebuild=True)
        self._regions: dict[int, list[Region]] = {}
        for region in regions:
            self._regions.setdefault(id(graph_at(captured.graph, region.holder)), []).append(region)
        marked = {path: ir.resolve(captured.graph, path) for path in marks}
        self._marks = {id(marked[path]): mark for path, mark in marks.items()}
        kernels = any(op.equation is None for op in marked.values())
        saved = [SAVE, *(KERNEL_RESIDUALS if kernels else ())]
        self._inside = 0
        offloaded = "offload" in marks.values()
        policies = jax.checkpoint_policies
        by_name = policy or (
            policies.save_and_offload_only_these_names(
                names_which_can_be_saved=saved,
                names_which_can_be_offloaded=[OFFLOAD],
                offload_src="device",
                offload_dst="pinned_host",
            )
            if offloaded
            else policies.save_only_these_names(*saved)
        )

        def keeps(primitive: Any, *types: Any, **attributes: Any) -> Any:
            return is_compress(primitive) or by_name(primitive, *types, **attributes)

        self._policy: Callable[..., Any] = keeps if "compress" in marks.values() else by_name

    def apply(self, op: Op, operands: list[Any]) -> list[Any]:
        outputs = super().apply(op, operands)
        mark = self._marks.get(id(op)) if self._inside else None
        if mark is None:
            return outputs
        if mark == "compress":
            return list(map(compressed, outputs))
        return [checkpoint_name(y, SAVE if mark == "save" else OFFLOAD) for y in outputs]

    def run(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        regions = self._regions.get(id(graph))
        if regions is None:
            return super().run(graph, inputs)
        env: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
        env.update(graph.constants)
        position = 0
        for region in regions:
            self._evaluate(graph.ops[position : region.start], env)
            self._region(graph, region, env)
            position = region.stop
        self._evaluate(graph.ops[position:], env)
        return [_read(x, env) for x in graph.outputs]

    def _evaluate(self, ops: Sequence[Op], env: dict[Value, Any]) -> None:
        for op in ops:
            env.update(zip(op.outputs, self.apply(op, [_read(x, env) for x in op.inputs]), strict=True))

    def _region(self, graph: Graph, region: Region, env: dict[Value, Any]) -> None:
        ops = graph.ops[region.start : region.stop]
        defined = {y for op in ops for y in op.outputs}
        later = {x for op in graph.ops[region.stop :] for x in op.inputs} | set(graph.outputs)
        given = list(dict.fromkeys(x for op in ops for x in op.inputs if isinstance(x, Value) and x not in defined))
        results = [y for op in ops for y in op.outputs if y in later]

        def function(*arrays: Any) -> list[Any]:
            inner = dict(zip(given, arrays, strict=True))
            self._inside += 1
            try:
                self._evaluate(ops, inner)
            finally:
                self._inside -= 1
            return [inner[y] for y in results]

        checkpoint = jax.checkpoint(function, policy=self._policy, prevent_cse=not region.holder)
        env.update(zip(results, checkpoint(*(env[x] for x in given)), strict=True))


def _read(x: Any, env: Mapping[Value, Any]) -> Any:
    return env[x] if isinstance(x, Value) else x.value
