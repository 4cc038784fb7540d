"""Raising: finds composites in a graph by dataflow, and names their sites.

Finding rewrites nothing. A `linear` is a contraction with one operand that derives from a parameter; an `embedding`
gathers from a parameter; a `convolution` convolves with one; a `matmul` contracts two computed values.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from compax import _jax
from compax.analysis.provenance import Origin, layout, parameter_origin, sliced
from compax.capture import Captured
from compax.ir import Graph, Literal, Op, Operand, Path, Value, forwarded

COMPOSITES = ("linear", "embedding", "convolution", "matmul")
_MOST_NEAR = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """How a site uses a parameter.

    Attributes:
        parameter: its path.
        reduced: the parameter's dimensions that the site contracts (for an embedding: that one lookup returns).
    """

    parameter: str
    reduced: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One composite at one call path.

    Attributes:
        name: such as `blocks.0.mlp.up`; unique in its graph.
        kind: "linear", "embedding", "convolution" or "matmul".
        path: where the operation stands.
        op: the operation.
        uses: the parameters that it consumes; none for a matmul.
        weight: which operand derives from them.
        flops: floating-point operations in one call of the program (2 for a multiply-add), loops of known length
            counted in full, and all devices of a `shard_map`.
        loops: lengths of the loops around it; 0 where it is not known before running.
        opaque: why the operation cannot be rewritten, or empty.
    """

    name: str
    kind: str
    path: Path
    op: Op
    uses: tuple[Use, ...]
    weight: int
    flops: int
    loops: tuple[int, ...]
    opaque: str

    @property
    def parameter(self) -> str | None:
        """Path of the parameter, if there is just one."""
        return self.uses[0].parameter if len(self.uses) == 1 else None

    @property
    def primitive(self) -> Op:
        """The JAX operation: the site's own, or the one that an operation of ours stands for."""
        return self.op if self.op.equation is not None else self.op.bodies[0].ops[0]


@dataclasses.dataclass(frozen=True)
class _Fact:
    """What is known of a value: its origin, and the parameters nearest upstream, for naming."""

    origin: Origin | None = None
    near: frozenset[str] = frozenset()


_NOTHING = _Fact()


def find_sites(captured: Captured) -> tuple[Site, ...]:
    """All composites of a graph, bodies included, in order of evaluation."""
    finder = _Finder()
    facts = []
    for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True):
        if tag.kind == "parameter":
            facts.append(_Fact(parameter_origin(tag.path, len(value.shape)), frozenset((tag.path,))))
        else:
            facts.append(_NOTHING)
    finder.visit(captured.graph, facts, (), (), "")
    return _named(finder.found)


class _Finder:
    def __init__(self) -> None:
        self.found: list[tuple[Site, frozenset[str]]] = []
        self.devices = 1

    def visit(
        self, graph: Graph, inputs: Sequence[_Fact], prefix: Path, loops: tuple[int, ...], opaque: str
    ) -> list[_Fact]:
        env: dict[Value, _Fact] = dict(zip(graph.inputs, inputs, strict=True))

        def read(x: Operand) -> _Fact:
            return _NOTHING if isinstance(x, Literal) else env.get(x, _NOTHING)

        for position, op in enumerate(graph.ops):
            facts = [read(x) for x in op.inputs]
            here = (*prefix, (position, -1))
            if self._composite(op, facts, here, loops, opaque):
                uses = self.found[-1][0].uses
                names = frozenset(use.parameter for use in uses) or frozenset().union(*(f.near for f in facts))
                env.update(dict.fromkeys(op.outputs, _Fact(None, names)))
            elif op.bodies:
                outputs = self._enter(op, facts, (*prefix, (position, 0)), loops, opaque)
                env.update(zip(op.outputs, outputs, strict=True))
            else:
                near = _bounded(frozenset().union(*(fact.near for fact in facts)))
                if op.name == "optimization_barrier":
                    env.update(zip(op.outputs, facts, strict=True))
                    continue
                env.update(dict.fromkeys(op.outputs, _Fact(layout(op, [f.origin for f in facts]), near)))
        return [read(x) for x in graph.outputs]

    def _composite(self, op: Op, facts: Sequence[_Fact], path: Path, loops: tuple[int, ...], opaque: str) -> bool:
        if op.equation is None and op.bodies:
            primitive = op.bodies[0].ops[0] if len(op.bodies[0].ops) == 1 else None
        else:
            primitive = op
        if primitive is None or primitive.name not in _RECOGNIZE:
            return False
        found = _RECOGNIZE[primitive.name](primitive, facts)
        if found is None:
            return False
        kind, uses, weight, flops = found
        times = self.devices * math.prod(length or 1 for length in loops)
        site = Site("", kind, path, op, uses, weight, flops * times, loops, opaque)
        self.found.append((site, frozenset().union(*(fact.near for fact in facts))))
        return True

    def _enter(self, op: Op, facts: Sequence[_Fact], step: Path, loops: tuple[int, ...], opaque: str) -> list[_Fact]:
        """Facts of the outputs of an operation with bodies."""
        bodies = op.bodies
        if op.name == "scan":
            constants, carry = _jax.scan_counts(dict(op.attributes))
            body = bodies[0]
            inputs = [*facts[:constants]]
            for i, fact in enumerate(facts[constants : constants + carry]):
                same = forwarded(body, body.outputs[i]) is body.inputs[constants + i]
                inputs.append(fact if same else _Fact(None, fact.near))
            inputs += [_Fact(sliced(fact.origin), fact.near) for fact in facts[constants + carry :]]
            outputs = self.visit(body, inputs, step, (*loops, op.attributes["length"]), opaque)
            return [
                inputs[constants + i] if i < carry and inputs[constants + i].origin else _Fact(None, fact.near)
                for i, fact in enumerate(outputs)
            ]
        if op.name == "while":
            return self._while(op, facts, step, loops, opaque)
        if op.name == "shard_map":
            mesh, outside = op.attributes["mesh"], self.devices
            self.devices *= math.prod(mesh.shape[name] for name in op.attributes["newly_manual_axes"])
            outputs = self.visit(bodies[0], facts, step, loops, opaque)
            self.devices = outside
            return outputs
        if op.name == "cond":
            results = [
                self.visit(body, facts[1:], (*step[:-1], (step[-1][0], index)), loops, opaque)
                for index, body in enumerate(bodies)
            ]
            return [
                _Fact(None, _bounded(frozenset().union(*(f.near for f in each)))) for each in zip(*results, strict=True)
            ]
        reason = opaque
        if op.name not in _jax.ENTERABLE and op.equation is not None:
            reason = opaque or f"inside {op.name}, whose derivative rule belongs to the body as it is"
        if all(len(body.inputs) == len(facts) for body in bodies[:1]) and len(bodies[0].outputs) == len(op.outputs):
            return self.visit(bodies[0], facts, step, loops, reason)
        near = _bounded(frozenset().union(*(fact.near for fact in facts)))
        for index, body in enumerate(bodies):
            path = (*step[:-1], (step[-1][0], index))
            self.visit(body, [_Fact(None, near)] * len(body.inputs), path, loops, reason)
        return [_Fact(None, near)] * len(op.outputs)

    def _while(self, op: Op, facts: Sequence[_Fact], step: Path, loops: tuple[int, ...], opaque: str) -> list[_Fact]:
        num_condition, num_body = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
        condition, body = op.bodies
        initial = facts[num_condition + num_body :]
        carried = [
            fact if forwarded(body, body.outputs[i]) is body.inputs[num_body + i] else _Fact(None, fact.near)
            for i, fact in enumerate(initial)
        ]
        inner = (*loops, 0)
        self.visit(condition, [*facts[:num_condition], *carried], step, inner, opaque)
        path = (*step[:-1], (step[-1][0], 1))
        outputs = self.visit(body, [*facts[num_condition : num_condition + num_body], *carried], path, inner, opaque)
        return [
            before if before.origin else _Fact(None, after.near) for before, after in zip(carried, outputs, strict=True)
        ]


def _bounded(near: frozenset[str]) -> frozenset[str]:
    return near if len(near) <= _MOST_NEAR else frozenset((common_prefix(near),))


def common_prefix(paths: Any) -> str:
    """The longest common prefix of dotted paths, by component."""
    split = [path.split(".") for path in paths]
    if not split:
        return ""
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


_Found = tuple[str, tuple[Use, ...], int, int]


def _uses(origin: Origin, dims: Sequence[int]) -> tuple[Use, ...]:
    return tuple(
        Use(part.parameter, tuple(sorted(frozenset().union(*(part.dims[d] for d in dims))))) for part in origin.parts
    )


def _dot(op: Op, facts: Sequence[_Fact]) -> _Found | None:
    (contract, _) = op.attributes["dimension_numbers"]
    left, right = op.inputs[0].shape, op.inputs[1].shape
    if not contract[0] or not _floating(op.outputs[0]):
        return None
    depth = math.prod(left[d] for d in contract[0])
    flops = 2 * math.prod(op.outputs[0].shape) * depth
    return _contraction(facts, (contract[0], contract[1]), flops, (left, right))


def _ragged_dot(op: Op, facts: Sequence[_Fact]) -> _Found | None:
    numbers = op.attributes["ragged_dot_dimension_numbers"]
    contract = numbers.dot_dimension_numbers[0]
    if len(numbers.rhs_group_dimensions) != 1 or facts[1].origin is None:
        return None
    depth = math.prod(op.inputs[0].shape[d] for d in contract[0])
    flops = 2 * math.prod(op.outputs[0].shape) * depth
    return "linear", _uses(facts[1].origin, contract[1]), 1, flops


def _contraction(
    facts: Sequence[_Fact], contract: Sequence[Sequence[int]], flops: int, shapes: Sequence[Sequence[int]]
) -> _Found:
    weights = [i for i in (0, 1) if facts[i].origin is not None and len(shapes[i]) > 1]
    if len(weights) != 1:
        return "matmul", (), 1, flops
    (weight,) = weights
    origin = facts[weight].origin
    assert origin is not None
    return "linear", _uses(origin, contract[weight]), weight, flops


def _convolution(op: Op, facts: Sequence[_Fact]) -> _Found | None:
    numbers = op.attributes["dimension_numbers"]
    kernel = op.inputs[1].shape
    flops = 2 * math.prod(op.outputs[0].shape) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    if facts[1].origin is None:
        return "matmul", (), 1, flops
    return "convolution", _uses(facts[1].origin, numbers.rhs_spec[1:]), 1, flops


def _gather(op: Op, facts: Sequence[_Fact]) -> _Found | None:
    origin, table = facts[0].origin, op.inputs[0]
    if origin is None or len(table.shape) < 2 or not _floating(table) or facts[1].origin is not None:
        return None
    indexed = set(op.attributes["dimension_numbers"].start_index_map)
    sizes = op.attributes["slice_sizes"]
    row = [dim for dim in range(len(sizes)) if dim not in indexed]
    if not row or any(sizes[dim] != table.shape[dim] for dim in row):
        return None
    return "embedding", _uses(origin, row), 0, 0


def _floating(x: Operand) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


_RECOGNIZE: Mapping[str, Any] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}


def _named(found: Sequence[tuple[Site, frozenset[str]]]) -> tuple[Site, ...]:
    """Sites with their names: the parameter's module if it owns no other such parameter, else the parameter."""
    owned: dict[str, set[str]] = collections.defaultdict(set)
    for site, _ in found:
        for use in site.uses:
            owned[_parent(use.parameter)].add(use.parameter)

    def short(parameter: str) -> str:
        parent = _parent(parameter)
        return parent if parent and len(owned[parent]) == 1 else parameter

    names = []
    for site, near in found:
        if site.uses:
            names.append(common_prefix([short(use.parameter) for use in site.uses]) or short(site.uses[0].parameter))
        else:
            prefix = common_prefix([_parent(path) or path for path in near])
            names.append(f"{prefix}.{site.kind}" if prefix else site.kind)
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for (site, _), name in zip(found, names, strict=True):
        seen[name] += 1
        result.append(dataclasses.replace(site, name=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return tuple(result)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
