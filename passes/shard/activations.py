"""Which values of a graph are constrained: along residual streams, what comes out of matrix products, and outputs.

The compiler finds the rest from these by itself. Between two of them it never has a reason to gather.
"""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

from compax import ir
from compax.analysis.atoms import Atom, Factors
from compax.analysis.normal import Node, Val
from compax.capture import Captured
from compax.composites.base import Attention, Normalization
from compax.ir import Path
from compax.passes.shard.layout import MODEL, SEQUENCE, Layout, activation_spec
from compax.raising import find_sites
from compax.rewrites.constraints import ENTERED, Laid

Results = dict[Path, tuple[Laid, ...]]
Operands = dict[tuple[Path, int], Laid]


def activation_constraints(captured: Captured, layout: Layout, sequence: str | None) -> tuple[Results, Operands]:
    """Constraints of a graph.

    Args:
        captured: the graph.
        layout: how its axes are split.
        sequence: the mesh axis over which positions are split where no other axis is.

    Returns:
        Constraints on results and on single operands.
    """
    return _Chooser(captured, layout, sequence).chosen()


def positions_of(layout: Layout) -> set[Atom]:
    """The axes of positions: those that attentions are over, and the one that is called so."""
    found = set(layout.named(SEQUENCE))
    for attention in layout.meaning.of_kind(Attention):
        found.update(layout.expand(attention.queries)[:1])
    return found


class _Chooser:
    def __init__(self, captured: Captured, layout: Layout, sequence: str | None):
        self.captured = captured
        self.layout = layout
        self.sequence = sequence
        self.positions, self.features = positions_of(layout), set(layout.named(MODEL))
        self.results: Results = {}
        self.operands: Operands = {}

    def chosen(self) -> tuple[Results, Operands]:
        meaning = self.layout.meaning
        by_path = {node.path: node for node in meaning.view.normal.nodes if node.outputs}
        for stream in meaning.streams:
            for residual in stream:
                self._constrain(residual.node)
        for composite in meaning.composites:
            if isinstance(composite, Attention):
                self._constrain(composite.pv)
            elif isinstance(composite, Normalization) and composite.output.node is not None:
                self._constrain(composite.output.node)
        for site in find_sites(self.captured):
            node = by_path.get(site.path)
            if node is None or site.opaque:
                continue
            self._constrain(node)
            if self.sequence is not None and site.kind == "linear":
                self._gather(site.path, 1 - site.weight, node)
        outputs = set(self.captured.graph.outputs)
        for position, op in enumerate(self.captured.graph.ops):
            node = by_path.get(((position, -1),))
            if node is not None and outputs.intersection(op.outputs[:1]):
                self._constrain(node)
        return self.results, self.operands

    def _constrain(self, node: Node) -> None:
        x = node.outputs[0]
        if node.path in self.results or not self._reachable(node.path, x):
            return
        spec = self._spec(self.layout.dims(x))
        if any(entry is not None and entry is not PartitionSpec.UNCONSTRAINED for entry in spec):
            self.results[node.path] = (Laid(spec),)

    def _gather(self, path: Path, operand: int, node: Node) -> None:
        """Positions are put together before a product that splits its features, once for all that take the value."""
        if operand >= len(node.inputs) or not self._reachable(path, node.outputs[0]):
            return
        x = node.inputs[operand]
        op = ir.resolve(self.captured.graph, path)
        if tuple(getattr(op.inputs[operand], "shape", ())) != tuple(x.shape):
            return
        dims = self.layout.dims(x)
        if self._split_positions(dims) is None:
            return
        expanded = [self.layout.expand(factors) for factors in self.layout.dims(node.outputs[0])]
        if not any(self.features.intersection(atoms) for atoms in expanded):
            self.operands[path, operand] = Laid(activation_spec(self.layout.entries(dims)))

    def _reachable(self, path: Path, x: Val) -> bool:
        """Whether a constraint can be put there: outside of bodies that must stay as they were recorded."""
        graph = self.captured.graph
        for position, index in path[:-1]:
            op = graph.ops[position]
            if op.name not in ENTERED or op.equation is None:
                return False
            graph = op.bodies[index]
        outputs = graph.ops[path[-1][0]].outputs
        return bool(outputs) and tuple(outputs[0].shape) == tuple(x.shape) and bool(x.shape)

    def _spec(self, dims: Sequence[Factors]) -> PartitionSpec:
        entries = self.layout.entries(dims)
        at = self._split_positions(dims)
        if at is not None and self.sequence is not None:
            entries[at] = (*(entries[at] or ()), self.sequence)
        return activation_spec(entries)

    def _split_positions(self, dims: Sequence[Factors]) -> int | None:
        """The dimension of positions of a value in which they are to be split; none if they are not."""
        if self.sequence is None or not self.positions or not self.features:
            return None
        if any(names is None or self.sequence in names for names in self.layout.entries(dims)):
            return None
        expanded = [self.layout.expand(factors) for factors in dims]
        if not any(self.features.intersection(atoms) for atoms in expanded):
            return None
        for d, atoms in enumerate(expanded):
            if atoms and atoms[0] in self.positions:
                return d if atoms[0].size % self.layout.sizes[self.sequence] == 0 else None
        return None
