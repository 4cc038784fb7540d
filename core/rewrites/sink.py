"""Sinking: a fused product that is taken apart afterwards becomes one product for each part, and back.

Models store queries, keys and values (or a gate and what it gates) in one kernel and split its product. `sink` moves
the split into the parameter, and into what else goes the same way, such as its bias; `fuse` puts parts together again.
Where to cut is told by the axes: the dimension is a sum in the product's result, at whatever place in the kernel's own
dimension, also inside of heads.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from compax import _jax, ir, lowering
from compax.analysis.atoms import Atom, size_of
from compax.analysis.normal import Node, Val
from compax.capture import Captured, Input
from compax.composites.view import View, parameter_only
from compax.encoding import Encoded
from compax.errors import EncodingError, RewriteError
from compax.program import Program
from compax.rewrites.parts import Cut, Part, Parts, result_axis, reunited, together


def sink(program: Program, parameter: str) -> Program:
    """A program in which a fused product is one product for each part.

    Args:
        program: the program; it is not changed.
        parameter: path of the fused kernel.

    Returns:
        A program with the parameters `path.0`, `path.1`, ... in place of the kernel and of what goes the same way.

    Raises:
        RewriteError: the parameter is unknown or encoded, its product is not taken apart, or something needs the
            product as a whole.
    """
    if parameter not in program.params:
        raise RewriteError(f"the program '{program.name}' has no parameter '{parameter}'")
    cuts = _cuts(program, parameter)
    params: dict[str, Any] = {}
    by_path = {cut.path: cut for cut in cuts}
    for path, x in program.params.items():
        if path not in by_path:
            params[path] = x
            continue
        if isinstance(x, Encoded):
            raise RewriteError(f"'{path}' is {x.format}; sink before parameters are encoded")
        params |= dict(zip(by_path[path].paths(), by_path[path].apart(x), strict=True))
    graphs = {key: sink_captured(captured, cuts) for key, captured in program.graphs.items()}
    frozen = frozenset(
        name for path in program.frozen for name in (by_path[path].paths() if path in by_path else (path,))
    )
    return program.restructured(params=params, graphs=graphs, frozen=frozen)


def sink_captured(captured: Captured, cuts: Sequence[Cut]) -> Captured:
    """One graph, with some parameters taken apart.

    Raises:
        RewriteError: something needs one of them, or a product with one, as a whole.
    """
    by_path = {cut.path: cut for cut in cuts}
    avals: list[Any] = []
    tags: list[Input] = []
    for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True):
        cut = by_path.get(tag.path) if tag.kind == "parameter" else None
        if cut is None:
            avals.append(value.aval)
            tags.append(tag)
            continue
        for name, part in zip(cut.paths(), cut.apart(jax.ShapeDtypeStruct(value.shape, value.dtype)), strict=True):
            avals.append(_jax.with_shape(value.aval, part.shape))
            tags.append(Input("parameter", name))
    if len(tags) == len(captured.inputs) and tuple(tags) == captured.inputs:
        return captured
    evaluator = lowering.Evaluator()

    def function(*arrays: Any) -> list[Any]:
        given = iter(arrays)
        values: list[Any] = []
        for tag in captured.inputs:
            cut = by_path.get(tag.path) if tag.kind == "parameter" else None
            if cut is None:
                values.append(next(given))
            else:
                values.append(Parts(tuple(next(given) for _ in cut.sizes), cut.dim, cut.outer))
        return [evaluator.dense(x, "output") for x in evaluator.run(captured.graph, values)]

    with captured.under_mesh():
        try:
            graph = ir.trace(function, *avals)
        except EncodingError as error:
            raise RewriteError(f"{', '.join(by_path)}: {error}") from error
    if evaluator.decodes:
        first = evaluator.decodes[0]
        raise RewriteError(
            f"'{first.operation}' in the graph '{captured.entry.name}' needs {', '.join(by_path)}, or a product with "
            "it, as a whole; leave it fused"
        )
    return dataclasses.replace(captured, graph=graph, inputs=tuple(tags))


def fuse(program: Program, parameters: Sequence[str], name: str, dim: int = -1, outer: int = 1) -> Program:
    """A program in which several parameters are one, and their products of one value are one product.

    The reverse of `sink`: the product is taken apart again where its parts are used. Parameters that no product
    consumes, such as biases, are stored together and taken apart at their use.

    Args:
        program: the program; it is not changed.
        parameters: paths of the parts, in order.
        name: path of the whole.
        dim: the dimension along which the parts lie in a row, counted from the end.
        outer: how many times the parts alternate along it, as in `Cut`.

    Raises:
        RewriteError: the parts do not fit together, only some of them are frozen, or the name is taken.
    """
    missing = [path for path in parameters if path not in program.params]
    if missing or len(parameters) < 2:
        raise RewriteError(f"fuse takes two parameters or more of the program; not there: {', '.join(missing) or '-'}")
    if name in program.params and name not in parameters:
        raise RewriteError(f"the program has a parameter '{name}' already")
    parts = [program.params[path] for path in parameters]
    shapes = {(*x.shape[: x.ndim + dim], *x.shape[x.ndim + dim + 1 :]) for x in parts}
    if len(shapes) > 1 or len({x.dtype for x in parts}) > 1 or any(isinstance(x, Encoded) for x in parts):
        listed = ", ".join(f"{path} {x.dtype}{list(x.shape)}" for path, x in zip(parameters, parts, strict=True))
        raise RewriteError(f"{listed} do not lie in a row along dimension {dim}")
    if any(x.shape[dim] % outer for x in parts):
        raise RewriteError(f"parts of sizes {[x.shape[dim] for x in parts]} cannot alternate {outer} times")
    held = [path for path in parameters if path in program.frozen]
    if held and len(held) < len(parameters):
        raise RewriteError(f"of these parameters only {', '.join(held)} are frozen; freeze all of them or none")
    cut = Cut(name, dim, outer, tuple(x.shape[dim] // outer for x in parts))
    whole = Parts(tuple(parts), dim, outer).decode()
    params: dict[str, Any] = {}
    for path, x in program.params.items():
        if path == parameters[0]:
            params[name] = whole
        elif path not in parameters:
            params[path] = x
    graphs = {key: fuse_captured(captured, tuple(parameters), cut) for key, captured in program.graphs.items()}
    frozen = (program.frozen - set(parameters)) | ({name} if held else set[str]())
    return program.restructured(params=params, graphs=graphs, frozen=frozen)


def fuse_captured(captured: Captured, parameters: Sequence[str], cut: Cut) -> Captured:
    """One graph, with some parameters put together."""
    places = {tag.path: i for i, tag in enumerate(captured.inputs) if tag.kind == "parameter"}
    if not any(path in places for path in parameters):
        return captured
    missing = [path for path in parameters if path not in places]
    if missing:
        raise RewriteError(
            f"the graph '{captured.entry.name}' does not read {', '.join(missing)}; fuse what all graphs read together"
        )
    inputs = [captured.graph.inputs[places[path]] for path in parameters]
    first = inputs[0]
    size = sum(cut.sizes) * cut.outer
    axis = len(first.shape) + cut.dim
    aval = _jax.with_shape(first.aval, (*first.shape[:axis], size, *first.shape[axis + 1 :]))
    evaluator = _Fusing()
    order = [tag for tag in captured.inputs if tag.path not in parameters[1:] or tag.kind != "parameter"]
    tags = [Input("parameter", cut.path) if tag == Input("parameter", parameters[0]) else tag for tag in order]
    avals = [
        aval
        if tag.path == cut.path and tag.kind == "parameter"
        else captured.graph.inputs[captured.inputs.index(old)].aval
        for tag, old in zip(tags, order, strict=True)
    ]

    def function(*arrays: Any) -> list[Any]:
        by_tag = dict(zip(tags, arrays, strict=True))
        fused = by_tag[Input("parameter", cut.path)]
        values: list[Any] = []
        for tag in captured.inputs:
            if tag.kind == "parameter" and tag.path in parameters:
                values.append(Part(fused, cut.dim, cut.outer, cut.sizes, tuple(parameters).index(tag.path)))
            else:
                values.append(by_tag[tag])
        return [x.decode() if isinstance(x, Encoded) else x for x in evaluator.run(captured.graph, values)]

    with captured.under_mesh():
        graph = ir.trace(function, *avals)
    return dataclasses.replace(captured, graph=graph, inputs=tuple(tags))


# -- Where to cut -----------------------------------------------------------------------------------------------------


def _cuts(program: Program, parameter: str) -> list[Cut]:
    """How a parameter, and those that go the same way, are taken apart."""
    for captured in program.graphs.values():
        view = View(captured)
        start = next((x for x in view.normal.inputs if x.input == Input("parameter", parameter)), None)
        found = None if start is None else _first_cut(view, start)
        if found is None:
            continue
        atom, sizes = found
        cuts: list[Cut] = []
        for x in view.normal.inputs:
            if x.input is None or x.input.kind != "parameter":
                continue
            for dim in range(len(x.shape)):
                factors = view.factors(x, dim)
                if atom in factors:
                    place = factors.index(atom)
                    inner = size_of(factors[place + 1 :])
                    outer = size_of(factors[:place])
                    cuts.append(Cut(x.input.path, dim - len(x.shape), outer, tuple(n * inner for n in sizes)))
        return cuts
    raise RewriteError(f"no product with '{parameter}' is split or sliced into parts: there is nothing to sink into it")


def _first_cut(view: View, start: Val) -> tuple[Atom, tuple[int, ...]] | None:
    """The first place at which a product with a parameter is taken apart: the axis, and the sizes of the parts."""
    own = {atom for dim in range(len(start.shape)) for atom in view.factors(start, dim)}
    waiting, seen = [start], {start}
    for value in waiting:
        readers = view.normal.readers(value)
        if not parameter_only(value):
            for dim in range(len(value.shape)):
                factors = view.factors(value, dim)
                if factors and factors[0] in own and (borders := _borders(readers, value, dim, size_of(factors[1:]))):
                    edges = [0, *borders, factors[0].size]
                    return factors[0], tuple(b - a for a, b in itertools.pairwise(edges))
        for node in readers:
            fresh = [y for y in node.outputs if y not in seen and own & set(_factors(view, y))]
            seen.update(fresh)
            waiting.extend(fresh)
    return None


def _factors(view: View, x: Val) -> list[Atom]:
    return [atom for dim in range(len(x.shape)) for atom in view.factors(x, dim)]


def _borders(readers: Sequence[Node], x: Val, dim: int, inner: int) -> list[int]:
    """Where the readers of a value cut one of its dimensions, in units of its major factor."""
    found: set[int] = set()
    for node in readers:
        if node.name == "split" and node.attributes["axis"] == dim:
            found.update(np.cumsum(node.attributes["sizes"])[:-1].tolist())
        elif node.name == "unstack" and node.attributes["axis"] == dim:
            found.update(range(1, x.shape[dim]))
        elif node.name == "slice":
            found.update((node.attributes["start_indices"][dim], node.attributes["limit_indices"][dim]))
    found -= {0, x.shape[dim]}
    return sorted(border // inner for border in found) if all(border % inner == 0 for border in found) else []


_WITH_ONE_BODY = frozenset({"jit", "pjit", "remat", "remat2", "checkpoint", "scan"})
"""Operations that hand all operands to one body, so that a fused array can enter it once."""


class _Fusing(lowering.Evaluator):
    """Evaluates products of one value with all parts of a fused parameter as one product."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[Any, tuple[Any, Any]] = {}

    def run(self, graph: ir.Graph, inputs: Sequence[Any]) -> list[Any]:
        return super().run(graph, reunited(inputs))

    def _apply(self, op: ir.Op, operands: list[Any]) -> list[Any]:
        sides = [i for i, x in enumerate(operands) if isinstance(x, Part)]
        if not sides:
            return super()._apply(op, operands)
        if op.name in _WITH_ONE_BODY:
            return super()._apply(op, together(operands))
        (side, *_) = sides
        part = operands[side]
        if op.name == "transpose":
            axis = list(op.attributes["permutation"]).index(part.ndim + part.axis) - part.ndim
            return [dataclasses.replace(part, fused=self._once(op, part.fused), axis=axis)]
        if op.name == "convert_element_type":
            return [dataclasses.replace(part, fused=self._once(op, part.fused))]
        axis = result_axis(op, side, part.ndim + part.axis) if op.name == "dot_general" and len(sides) == 1 else None
        if axis is None:
            return super()._apply(op, [x.decode() if isinstance(x, Part) else x for x in operands])
        other = operands[1 - side]
        key = (op.name, str(op.attributes), side, id(other), id(part.fused))
        if key not in self.products:
            given = [part.fused if i == side else x for i, x in enumerate(operands)]
            self.products[key] = (_jax.bind(op.equation, given)[0], (other, part.fused))
        return [part.of(self.products[key][0], axis)]

    def _once(self, op: ir.Op, fused: Any) -> Any:
        """A rearrangement of the whole, made once for all parts."""
        key = (op.name, str(op.attributes), id(fused))
        if key not in self.products:
            self.products[key] = (_jax.bind(op.equation, [fused])[0], fused)
        return self.products[key][0]
