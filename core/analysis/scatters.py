"""What compilers make of scatters, which gradients of gathers are."""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from compax.analysis.library import Node
from compax.ir import Literal, Value


def into_rows(node: Node, producer: Mapping[Value, Node]) -> bool:
    """Whether an operation scatters one element into each row of a constant.

    XLA for TPUs compares an iota with the indices instead, and fuses that: the gradient of a cross entropy over a
    vocabulary is a `select_add_fusion` inside of the products that read it (seen in its text with libtpu 0.0.42).
    """
    if not node.op.name.startswith("scatter"):
        return False
    numbers = node.op.attributes["dimension_numbers"]
    operand, _, updates = node.op.inputs
    rows = numbers.operand_batching_dims
    constant = all(x in producer and not producer[x].inputs for x in node.operands[:1] if x is not None)
    return (
        constant
        and not numbers.update_window_dims
        and len(rows) + len(numbers.inserted_window_dims) == len(operand.shape)
        and math.prod(updates.shape) == math.prod(operand.shape[dim] for dim in rows)
    )


def with_accumulation(nodes: Sequence[Node], *, selects: bool) -> list[Node]:
    """Sums of something and of a scatter into zeros, as a scatter into that something.

    XLA's algebraic simplifier writes them so (`AlgebraicSimplifierVisitor::HandleAdd`).

    Args:
        nodes: operations in order.
        selects: whether a scatter of one element into each row is a selection, which is fused; such ones stay.
    """
    producer = {y: node for node in nodes for y in node.outputs}
    readers = collections.Counter(x for node in nodes for x in dict.fromkeys(node.inputs))
    gone: set[Node] = set()
    found: list[Node] = []
    for node in nodes:
        if node.op.name in ("add", "add_any") and len(node.inputs) == 2:
            for x, other in zip(node.inputs, reversed(node.inputs), strict=True):
                scatter = producer.get(x)
                if (
                    scatter is None
                    or scatter.op.name != "scatter-add"
                    or readers[x] > 1
                    or (selects and into_rows(scatter, producer))
                ):
                    continue
                zeros = scatter.operands[0]
                if other.shape == x.shape and (zeros is None or _is_zero(producer.get(zeros))):
                    gone.add(scatter)
                    node = Node(scatter.op, scatter.path, [other, *scatter.operands[1:]], node.outputs)
                    break
        found.append(node)
    return [node for node in found if node not in gone]


def _is_zero(node: Node | None) -> bool:
    if node is None or node.op.name != "broadcast_in_dim":
        return False
    (x,) = node.op.inputs
    return isinstance(x, Literal) and not np.any(x.value)
