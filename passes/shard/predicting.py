"""What a train step takes on each device of a mesh, from the program as one device would run it. Predicted.

- Compute and memory: what products compute and kernels move in the whole step, recomputation included, over the devices
  among which it is split: the batch's axes split all of it, `tensor` and `expert` what belongs to composites that they
  split; the optimizer's update is split as its state is. Parameters are read and gradients written whole on each device
  but for `tensor`, however small the batch is.
- Exchanges: parameters that are stored in parts are gathered for the forward pass, and again for the backward pass
  inside of loops and of what is computed again; gradients are scattered, or summed whole, in the dtype that the
  parameter is used in; products over a split dimension are summed over `tensor`, and so are gradients of what goes
  into products that split their result; with `sequence` both are a scatter and a gather. Tokens go to their experts and
  back.
- Overlap, as libtpu 0.0.42 compiles with `compax.tpu.options`: gathers and scatters of parameters and gradients hide
  behind compute and memory, as far as these take longer, and so do those of activations that the backward pass needs;
  sums of activations and of whole gradients, exchanges between experts, and scatters and gathers of activations in the
  forward pass are waited for. Step = max(compute, memory, hidden) + waits (`compax.analysis.times`).
- Memory: parameters, gradients and the optimizer's state by their specs; what is alive at the peak of the step of the
  whole batch on one device, each buffer over the axes that split values of its shape; parameters gathered for one turn
  and the next.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from compax.analysis.cost import Cost, graph_cost
from compax.analysis.liveness import Alive, Liveness, liveness
from compax.analysis.normal import Val, rearranged
from compax.analysis.program_cost import owner_names, owner_of
from compax.analysis.times import Times
from compax.analysis.training import TrainStep
from compax.capture import Captured
from compax.composites.base import Attention, Experts, FeedForward
from compax.encoding import nbytes
from compax.ir import Op, Path
from compax.meaning import Meaning
from compax.mesh_links import DCN, MeshLinks
from compax.passes.shard.activations import positions_of
from compax.passes.shard.candidates import Candidate
from compax.passes.shard.layout import MODEL, Laying, Layout, word
from compax.placement import axes_of, entries_of
from compax.program import GraphKey, Program
from compax.raising import Site, find_sites
from compax.target import Kind, Target

_UPDATE = "update"
_READS = 4
"""How often a step reads a parameter or writes its gradient: forward, twice backward, and the gradient."""
_PREFETCHED = 2


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Equal collectives.

    Attributes:
        kind: which.
        bytes: of one, of the larger of operand and result.
        axes: of the mesh.
        count: how many in a step.
        hidden: whether other work hides them.
    """

    kind: Kind
    bytes: float
    axes: tuple[str, ...]
    count: int = 1
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What a step takes on each device.

    Attributes:
        times: seconds.
        wire_bytes: that a device sends.
        peak: bytes at the peak.
        held: of them, parameters, gradients and the optimizer's state.
    """

    times: Times
    wire_bytes: float
    peak: int
    held: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Use:
    """A product or a lookup with a parameter.

    Attributes:
        site: where.
        x: the value that goes in, as it was before it was rearranged.
        x_bytes: its bytes.
        out_bytes: bytes of the result.
        count: turns of the loops around it.
    """

    site: Site
    x: Val | None
    x_bytes: int
    out_bytes: int
    count: int


class Model:
    """A program's train step, in what does not depend on the mesh.

    Args:
        program: before it is sharded.
        key: of the graph with the loss.
        meaning: of that graph.
        step: the train step with the passes that follow.
        after: the program with these.
        captured: the graph in it.
        target: the slice.
    """

    def __init__(
        self,
        program: Program,
        key: GraphKey,
        meaning: Meaning,
        step: TrainStep,
        after: Program,
        captured: Captured,
        target: Target,
    ):
        self.program, self.key, self.meaning, self.target = program, key, meaning, target
        traced = step.traced(captured, target.chip.platform)
        names = owner_names(after, captured.entry.name)

        def owner(op: Op, path: Path) -> str:
            place = traced.places.get(path)
            if place is None or place.phase == _UPDATE:
                return _UPDATE
            return "" if place.path is None else owner_of(names, place.path)

        self.cost: Cost = graph_cost(traced.graph, owner, target=target)
        self.live: Liveness = liveness(traced, target.chip.platform, donated=step.donated)
        sites = {site.path: site for site in find_sites(captured)}
        places = [place.path for place in traced.places.values() if place.phase == "recompute" and place.path]
        self.again = {sites[path].parameter for path in places if path in sites}
        bodies = {path[:-1] for path in places} - {()}
        self.inside = {
            site.parameter for path, site in sites.items() if any(path[:d] in bodies for d in range(1, len(path)))
        }
        self.uses = list(self._uses(program.graphs[key]))
        self.itemsizes: dict[str, int] = {}
        for use in self.uses:
            path, size = use.site.uses[0].parameter, use.site.primitive.inputs[use.site.weight].dtype.itemsize
            self.itemsizes[path] = min(size, self.itemsizes.get(path, size))
        self.lookups = {
            use.site.uses[0].parameter: 4 * use.out_bytes // use.site.op.outputs[0].dtype.itemsize
            for use in self.uses
            if use.site.kind == "embedding"
        }
        self.parameters_of = {site.name: site.parameter for site in sites.values() if site.parameter}
        trained = sum(value.size for value in program.partition()[0].values())
        kept = sum(map(nbytes, jax.tree.leaves(step.arguments["optimizer"])))
        # Bytes that the optimizer keeps for each element.
        self.moments = kept / max(1, trained)
        # Devices that a machine stands for share its speed.
        self._sharing = jax.device_count() if target.chip.platform == "cpu" else 1

    def _uses(self, captured: Captured) -> Iterator[_Use]:
        nodes = {node.path: node for node in self.meaning.view.normal.nodes if node.outputs}
        for site in find_sites(captured):
            if site.parameter is None or site.kind == "matmul":
                continue
            node, other = nodes.get(site.path), 1 - site.weight
            inputs = site.primitive.inputs
            x = inputs[other] if site.kind == "linear" and other < len(inputs) else None
            value = rearranged(node.inputs[other]) if x is not None and node is not None else None
            size = 0 if x is None else math.prod(x.shape) * x.dtype.itemsize
            yield _Use(site, value, size, nbytes(site.op.outputs[0]), math.prod(site.loops))

    # -- One candidate ------------------------------------------------------------------------------------------------

    def least_seconds(self, candidate: Candidate, devices: int) -> float:
        """A bound from below, without looking at how values lie.

        Products are split evenly, and parameters that are stored in parts cross each device's links once in 16 bits.
        """
        work = sum(
            flops * group.count / self._rate(dtype) for group in self.cost.kernels for dtype, flops in group.products
        )
        fsdp, tensor, link = candidate.size("fsdp"), candidate.size("tensor"), self.target.chip.link
        if link.kind == "none":
            return work / devices
        gathered = sum(value.size for value in self.program.partition()[0].values()) * (1 - 1 / fsdp) / tensor
        return max(work / devices, 2 * gathered / (link.bytes_per_second * link.per_chip))

    def _rate(self, dtype: str) -> float:
        return self.target.rate(_unit(dtype)).flops_per_second / self._sharing

    def predict(self, candidate: Candidate, laid: Laying) -> Predicted:
        """What a step takes on each device.

        Args:
            candidate: the mesh.
            laid: how the program lies on it.
        """
        assert laid.placement.mesh is not None
        sizes = dict(laid.placement.mesh.shape)
        layout = laid.layouts[self.key]
        links = MeshLinks(self.target, sizes)
        compute, memory = self._work(candidate, laid, layout)
        waits = hidden = wire = 0.0
        for exchange in self.exchanges(candidate, laid, layout):
            members = math.prod(sizes[name] for name in exchange.axes)
            if members == 1:
                continue
            seconds = exchange.count * links.seconds(exchange.kind, exchange.bytes, exchange.axes)
            times = 2 if exchange.kind == "all-reduce" else 1
            wire += exchange.count * times * exchange.bytes * (members - 1) / members
            hidden, waits = hidden + seconds * exchange.hidden, waits + seconds * (not exchange.hidden)
        held, working = self._memory(candidate, laid, layout)
        return Predicted(Times(compute, memory, hidden, waits), wire, held + working, held)

    def _work(self, candidate: Candidate, laid: Laying, layout: Layout) -> tuple[float, float]:
        """Seconds of compute and of moving bytes."""
        sizes, batch = layout.sizes, candidate.batch_shards
        trainable = self.program.partition()[0]
        whole = sum(map(nbytes, trainable.values()))
        kept = sum(nbytes(x) / _ways(laid.placement.optimizer_spec(path), sizes) for path, x in trainable.items())
        compute = moved = 0.0
        splits = {name: self._split(name, candidate, laid, layout) for name in self.cost.by_owner}
        for group in self.cost.kernels:
            ways = whole / kept if group.owner == _UPDATE else batch * splits[group.owner]
            for dtype, flops in group.products:
                compute += flops * group.count / ways / self._rate(dtype)
            moved += group.bytes * group.count / ways
        used = sum(
            nbytes(x) / 2 / _ways(laid.compute.get(path, PartitionSpec()), sizes) for path, x in trainable.items()
        )
        moved += _READS * used * (1 - 1 / batch)
        return compute, moved * self._sharing / self.target.device_memory_bandwidth

    def _split(self, owner: str, candidate: Candidate, laid: Laying, layout: Layout) -> int:
        """Into how many parts axes other than the batch's split what belongs to a site or composite."""
        tensor = candidate.size("tensor")
        path = self.parameters_of.get(owner)
        found = 1
        if path is not None:
            found = _ways(laid.compute.get(path, PartitionSpec()), layout.sizes, ("tensor",))
        composite = next((each for each in self.meaning.composites if each.name == owner), None)
        if isinstance(composite, Attention):
            found = tensor if layout.dimension((*composite.groups, *composite.repeats)) else 1
        elif isinstance(composite, (FeedForward, Experts)):
            found = tensor if layout.dimension(composite.hidden) else 1
        return max(found, tensor) if candidate.sequence else found

    # -- Exchanges ----------------------------------------------------------------------------------------------------

    def exchanges(self, candidate: Candidate, laid: Laying, layout: Layout) -> list[Exchange]:
        """The collectives of a step."""
        found = [*self._of_parameters(laid, layout), *self._of_experts(candidate, layout)]
        if candidate.size("tensor") > 1:
            found += self._of_activations(candidate, laid, layout)
        return found

    def _of_parameters(self, laid: Laying, layout: Layout) -> list[Exchange]:
        placement, sizes, found = laid.placement, layout.sizes, list[Exchange]()
        summed: dict[tuple[str, ...], float] = collections.defaultdict(float)
        first = {use.site.parameter: use for use in reversed(self.uses)}
        trainable = self.program.partition()[0]
        for path, value in self.program.params.items():
            use = first.get(path)
            count = 1 if use is None else use.count
            whole = min(nbytes(value), value.size * self.itemsizes.get(path, value.dtype.itemsize))
            compute = laid.compute.get(path, PartitionSpec())
            size = whole / _ways(compute, sizes)
            stored = [name for name in axes_of(placement.spec(path)) if name not in axes_of(compute)]
            if stored:
                times = 2 if count > 1 or path in self.inside else 1
                found += _steps("all-gather", size / count, stored, sizes, times * count)
            if path not in trainable:
                continue
            scattered = [name for name in axes_of(placement.gradient_spec(path)) if name not in axes_of(compute)]
            updated = [name for name in axes_of(placement.optimizer_spec(path)) if name not in axes_of(compute)]
            if scattered:
                found += _steps("reduce-scatter", size / count, scattered, sizes, count)
            rest = tuple(n for n in placement.batch if n not in scattered and n not in axes_of(compute))
            summed[rest] += size / _parts(scattered, sizes)
            if updated and not stored:
                found.append(Exchange("all-gather", nbytes(value) / _ways(compute, sizes), tuple(updated)))
            if stored and path in self.lookups:
                found.append(self._lookup(path, laid, sizes))
        found += [Exchange("all-reduce", size, axes) for axes, size in summed.items() if axes]
        return found

    def _lookup(self, path: str, laid: Laying, sizes: Mapping[str, int]) -> Exchange:
        """The gradient of a table that is stored in parts: what is added to its rows, of all tokens, is put together.

        Or the table is summed whole, if that is less. Where `tensor` splits rows, tokens go where their rows are.
        """
        batch = tuple(name for name in laid.placement.batch if name != DCN)
        tokens, table = self.lookups[path], 4 * self.program.params[path].size
        if axes_of(laid.compute.get(path, PartitionSpec())):
            return Exchange("all-to-all", tokens / _parts(batch, sizes), batch)
        return (
            Exchange("all-reduce", table, batch) if table < tokens else Exchange("all-gather", tokens, batch, 1, True)
        )

    def _of_activations(self, candidate: Candidate, laid: Laying, layout: Layout) -> list[Exchange]:
        found, seen = list[Exchange](), set[Val]()
        for use in self.uses:
            (of,) = use.site.uses
            entries = entries_of(laid.compute.get(of.parameter, PartitionSpec()), 0)
            split = {d for d, names in enumerate(entries) if "tensor" in names}
            if not split:
                continue
            # A lookup returns some dimensions of a table, and adds up over the others; a product the other way round.
            summed = split.issubset(of.reduced) != (use.site.kind == "embedding")
            out, x = (size / candidate.batch_shards for size in (use.out_bytes, use.x_bytes))
            again = use.count * (of.parameter in self.again)
            if summed:
                found += _summed(out, use.count, again, sequence=candidate.sequence, gradient=use.site.kind == "linear")
            elif use.x is not None and use.x not in seen:
                seen.add(use.x)
                found += _shared(x, use.count, again, sequence=candidate.sequence)
                if candidate.sequence and self._labels(of.parameter, split, layout):
                    # Logits are cut along positions where the loss looks a label up.
                    logits = 4 * use.out_bytes / use.site.op.outputs[0].dtype.itemsize
                    size = logits / candidate.batch_shards / candidate.size("tensor")
                    found.append(Exchange("all-to-all", size, ("tensor",), use.count))
        return found

    def _labels(self, path: str, split: Iterable[int], layout: Layout) -> bool:
        """Whether some dimensions of a parameter are the vocabulary."""
        vocabulary = {axis.atom for axis in self.meaning.axes if word(axis.name) == "vocabulary"}
        dims = layout.parameters()[path]
        return any(vocabulary.intersection(layout.expand(dims[d])) for d in split)

    def _of_experts(self, candidate: Candidate, layout: Layout) -> list[Exchange]:
        found = list[Exchange]()
        for composite in self.meaning.of_kind(Experts) if candidate.size("expert") > 1 else ():
            count = math.prod(composite.loops)
            tokens = math.prod(composite.x.shape) * jnp.dtype(composite.x.dtype).itemsize / candidate.batch_shards
            if composite.form == "dense":
                # Every expert computes every token of its group.
                size = tokens * candidate.size("expert")
                found.append(Exchange("all-gather", size, ("expert",), 2 * count))
                found.append(Exchange("reduce-scatter", size, ("expert",), 2 * count))
            else:
                found.append(Exchange("all-to-all", tokens * (composite.top_k or 1), ("expert",), 4 * count))
        return found

    # -- Memory -------------------------------------------------------------------------------------------------------

    def _memory(self, candidate: Candidate, laid: Laying, layout: Layout) -> tuple[int, int]:
        """Bytes that are held from step to step, and those beside at the peak."""
        placement, sizes = laid.placement, layout.sizes
        trainable, frozen = self.program.partition()
        held = gradients = 0.0
        gathered: dict[bool, float] = {True: 0.0, False: 0.0}
        first = {use.site.parameter: use for use in self.uses}
        for path, value in {**trainable, **frozen}.items():
            size = nbytes(value)
            held += size / _ways(placement.spec(path), sizes)
            if path in trainable:
                held += self.moments * value.size / _ways(placement.optimizer_spec(path), sizes)
                gradients += size / _ways(placement.gradient_spec(path), sizes)
            if path in laid.gathered:
                count = first[path].count if path in first else 1
                turn = size / count / _ways(laid.compute.get(path, PartitionSpec()), sizes)
                gathered[count > 1] = gathered[count > 1] + turn
        splits = self._by_shape(candidate, layout)
        stored = {tuple(sorted(x.shape)): _ways(placement.gradient_spec(path), sizes) for path, x in trainable.items()}
        stored |= {
            tuple(sorted(x.shape[1:])): _ways(laid.compute.get(path, PartitionSpec()), sizes)
            for path, x in trainable.items()
            if path in first and first[path].count > 1
        }
        values = self._alive(self.live.alive, splits, stored, candidate)
        tables = [path for path in self.lookups if path in laid.gathered and not axes_of(laid.compute[path])]
        lookup = max((min(self.lookups[path], 4 * self.program.params[path].size) for path in tables), default=0)
        working = max(values, gradients, gradients + lookup)
        return round(held), round(working + _PREFETCHED * gathered[True] / 2 + gathered[False] / 2)

    def _alive(
        self, alive: Sequence[Alive], splits: Mapping[Any, int], stored: Mapping[Any, int], candidate: Candidate
    ) -> float:
        total = 0.0
        for each in alive:
            if each.shape is None:
                inside = self._alive(each.inside, splits, stored, candidate)
                total += inside or each.nbytes / candidate.batch_shards
                continue
            shape = tuple(sorted(each.shape))
            # What a loop keeps is a stack of values.
            inner = (shape[:i] + shape[i + 1 :] for i in range(len(shape)))
            known = next((splits[one] for one in (shape, *inner) if one in splits), candidate.batch_shards)
            total += each.nbytes / stored.get(shape, known)
        return total

    def _by_shape(self, candidate: Candidate, layout: Layout) -> dict[tuple[int, ...], int]:
        """Into how many parts values of a shape are split; the least where several of it differ."""
        found: dict[tuple[int, ...], int] = {}
        positions, features = positions_of(layout), set(layout.named(MODEL))
        for node in self.meaning.view.normal.nodes:
            for x in node.outputs:
                if x.static:
                    continue
                dims = layout.dims(x)
                names = [name for factors in dims for name in layout.over(factors)]
                ways = _parts(set(names), layout.sizes)
                if candidate.sequence and "tensor" not in names:
                    atoms = {atom for factors in dims for atom in layout.expand(factors)}
                    if atoms & positions and atoms & features:
                        ways *= candidate.size("tensor")
                shape = tuple(sorted(x.shape))
                found[shape] = min(ways, found.get(shape, ways))
        return found


def _summed(size: float, count: int, again: int, *, sequence: bool, gradient: bool) -> list[Exchange]:
    """Exchanges of a product whose terms lie on several devices: of its result, and of its result's gradient."""
    if not sequence:
        return [Exchange("all-reduce", size, ("tensor",), count + again)]
    found = [Exchange("reduce-scatter", size, ("tensor",), count)]
    found += [Exchange("reduce-scatter", size, ("tensor",), again, hidden=True)] if again else []
    return found + ([Exchange("all-gather", size, ("tensor",), count, hidden=True)] if gradient else [])


def _shared(size: float, count: int, again: int, *, sequence: bool) -> list[Exchange]:
    """Exchanges of what goes into products that split their results: of the value, and of its gradient."""
    if not sequence:
        return [Exchange("all-reduce", size, ("tensor",), count)]
    return [
        Exchange("all-gather", size, ("tensor",), count + again),
        Exchange("reduce-scatter", size, ("tensor",), count),
    ]


def _steps(kind: Kind, size: float, axes: Sequence[str], sizes: Mapping[str, int], count: int) -> list[Exchange]:
    """A gather or a scatter over axes, one after another: over the last one first, when least has to move."""
    found, size = list[Exchange](), size / _parts(axes, sizes)
    for name in reversed(axes):
        size *= sizes[name]
        found.append(Exchange(kind, size, (name,), count, hidden=True))
    return found


def _parts(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[name] for name in axes)


def _ways(spec: PartitionSpec, sizes: Mapping[str, int], only: Sequence[str] | None = None) -> int:
    return _parts([name for name in axes_of(spec) if only is None or name in only], sizes)


def _unit(dtype: str) -> str:
    return dtype if jnp.issubdtype(jnp.dtype(dtype), jnp.floating) else "float32"
