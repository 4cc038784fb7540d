"""How operations with bodies are taken over at other sizes.

A custom derivative (`jax.custom_jvp`: relu, softmax, logsumexp) is made anew, with the body and the recorded rule at
the new sizes. That of a `jax.custom_vjp` is two functions that JAX has not traced yet: such an operation stays as it
is, or the rewrite is refused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax, ir
from compax.capture import Input
from compax.errors import RewriteError
from compax.ir import Graph, Op, Operand, Path, Value
from compax.lowering import Evaluator
from compax.rewrites.narrowing import Dims, Narrowing, signature, spelled
from compax.rewrites.resizing import Frame, Held, Resizer, whole

Handler = Callable[[Frame, Op, list[Held], Path], list[Held]]


def handler(op: Op) -> Handler | None:
    """How to take over an operation with bodies that are entered; none, if it is like any other."""
    return _ours if op.equation is None else _HANDLERS.get(op.name)


def _inside(path: Path, index: int) -> Path:
    return (*path[:-1], (path[-1][0], index))


def _body(
    frame: Frame, op: Op, path: Path, index: int, given: Sequence[Dims], wanted: Sequence[Dims | None]
) -> tuple[Graph, list[Held]]:
    inner = Frame(frame.resizer, op.bodies[index], _inside(path, index), op.equation or frame.beside)
    return inner.run(given, wanted)


def _given(frame: Frame, op: Op, operands: Sequence[Held]) -> list[Held]:
    """Operands of an operation with bodies: zeros for those that nothing needs."""
    if any(x.dropped for x in operands):
        raise RewriteError(f"{frame.place(op)} needs what belongs to indices that are not kept; keep them")
    return [
        frame.zeros(old, whole(old)) if x.operand is None else x for x, old in zip(operands, op.inputs, strict=True)
    ]


def _emit(
    frame: Frame,
    op: Op,
    given: Sequence[Held],
    bodies: tuple[Graph, ...],
    dims: Sequence[Dims],
    dropped: Sequence[bool],
) -> list[Held]:
    results = frame.emit(op, [frame.there(op, x) for x in given], dims, bodies=bodies)
    return [dataclasses.replace(x, dropped=gone) for x, gone in zip(results, dropped, strict=True)]


def _call(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    given = _given(frame, op, operands)
    body, held = _body(frame, op, path, 0, [x.dims for x in given], [None] * len(op.outputs))
    return _emit(frame, op, given, (body,), [x.dims for x in held], [x.dropped for x in held])


def _ours(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    """An operation of ours: its body defines it."""
    results = _call(frame, op, operands, path)
    if op.attributes and frame.ops[-1].bodies[0] is not op.bodies[0]:
        raise RewriteError(
            f"the operation '{op.name}' reads an axis that changes, and it is not known what its options "
            f"({', '.join(op.attributes)}) have to be then; do this before the pass that put the operation there"
        )
    return results


def _shard_map(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    given, inner = _given(frame, op, operands), frame.narrowing.normal.frames[_inside(path, 0)]
    entered = [_alive_dims(frame, inner[value], value) for value in op.bodies[0].inputs]
    body, held = _body(frame, op, path, 0, entered, [None] * len(op.outputs))
    dims = [_alive_dims(frame, frame.vals[value], value) for value in op.outputs]
    return _emit(frame, op, given, (body,), dims, [x.dropped for x in held])


def _alive_dims(frame: Frame, x: Any, value: Value) -> Dims:
    return frame.narrowing.dims(x) if frame.narrowing.alive(x) else whole(value)


def _carried(frame: Frame, op: Op, x: Held, old: Operand, inner: Any) -> Held:
    """A carried value as it enters the first turn."""
    if not frame.narrowing.alive(inner):
        return x
    return frame.adapt(x, frame.narrowing.dims(inner), old)


def _scan(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    constants, carry = _jax.scan_counts(dict(op.attributes))
    first = constants + carry
    given, inner = _given(frame, op, operands), frame.narrowing.normal.frames[_inside(path, 0)]
    for i in range(constants, first):
        given[i] = _carried(frame, op, given[i], op.inputs[i], inner[op.bodies[0].inputs[i]])
    carried = [x.dims for x in given[constants:first]]
    rows = [x.dims[1:] for x in given[first:]]
    wanted = [*carried, *(None for _ in op.outputs[carry:])]
    body, held = _body(frame, op, path, 0, [*(x.dims for x in given[:constants]), *carried, *rows], wanted)
    dims = [*carried, *((None, *x.dims) for x in held[carry:])]
    return _emit(frame, op, given, (body,), dims, [x.dropped for x in held])


def _while(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    first, second = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
    start = first + second
    given, inner = _given(frame, op, operands), frame.narrowing.normal.frames[_inside(path, 1)]
    test = frame.narrowing.normal.frames[_inside(path, 0)]
    (finished,) = op.bodies[0].outputs
    if isinstance(finished, Value) and not frame.narrowing.alive(test[finished]):
        raise RewriteError(f"the condition of {frame.place(op)} was not followed; keep all indices of what it carries")
    for i in range(start, len(given)):
        given[i] = _carried(frame, op, given[i], op.inputs[i], inner[op.bodies[1].inputs[second + i - start]])
    carried = [x.dims for x in given[start:]]
    condition, _ = _body(frame, op, path, 0, [*(x.dims for x in given[:first]), *carried], [()])
    body, held = _body(frame, op, path, 1, [*(x.dims for x in given[first:start]), *carried], carried)
    return _emit(frame, op, given, (condition, body), carried, [x.dropped for x in held])


def _cond(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    given = _given(frame, op, operands)
    wanted = [_alive_dims(frame, frame.vals[value], value) for value in op.outputs]
    made = [_body(frame, op, path, i, [x.dims for x in given[1:]], wanted) for i in range(len(op.bodies))]
    dropped = [any(x.dropped for x in each) for each in zip(*(held for _, held in made), strict=True)]
    return _emit(frame, op, given, tuple(body for body, _ in made), wanted, dropped)


# -- custom derivatives -----------------------------------------------------------------------------------------------


def _custom_vjp(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    given = _given(frame, op, operands)
    body, held = _body(frame, op, path, 0, [x.dims for x in given], [None] * len(op.outputs))
    if body is not op.bodies[0] or any(x.changed for x in (*given, *held)):
        raise RewriteError(
            f"{frame.place(op)} reads an axis that changes, and the two functions of a jax.custom_vjp can only run as "
            "they were recorded; keep all indices of that axis, or write the function as a jax.custom_jvp"
        )
    return frame.emit(op, [frame.there(op, x) for x in given], [x.dims for x in held])


def _custom_jvp(frame: Frame, op: Op, operands: list[Held], path: Path) -> list[Held]:
    given = _given(frame, op, operands)
    body, held = _body(frame, op, path, 0, [x.dims for x in given], [None] * len(op.outputs))
    results = [x.dims for x in held]
    if body is op.bodies[0] and not any(x.changed for x in (*given, *held)):
        return frame.emit(op, [frame.there(op, x) for x in given], results)
    dims = [*(x.dims for x in given), *results]
    key = (id(op.equation), id(body), *map(signature, dims))
    functions = frame.resizer.functions
    if key not in functions:
        functions[key] = (_with_rule(frame, op, body, [x.dims for x in given], results), op, body)
    values = frame.splice(functions[key][0], [frame.there(op, x) for x in given])
    return [Held(each, value, dropped=x.dropped) for each, value, x in zip(results, values, held, strict=True)]


def _with_rule(frame: Frame, op: Op, body: Graph, given: Sequence[Dims], wanted: Sequence[Dims]) -> Graph:
    """A graph of one operation with a derivative rule: a body, and the recorded rule at its sizes."""
    equation = op.equation
    assert equation is not None
    closed_over = equation.params["num_consts"]
    made: list[tuple[Graph, list[bool]]] = []

    def derivative() -> tuple[Graph, list[bool]]:
        if not made:
            made.append(_rule(frame, op, given[closed_over:], wanted))
        return made[0]

    @jax.custom_jvp
    def function(*operands: Any) -> list[Any]:
        return Evaluator().run(body, operands)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        graph, zeros = derivative()
        outputs = Evaluator().run(graph, [*primals[closed_over:], *tangents[closed_over:]])
        values, rest = outputs[: len(zeros)], iter(outputs[len(zeros) :])
        return values, [_zero_tangent(x) if zero else next(rest) for x, zero in zip(values, zeros, strict=True)]

    name = _jax.function_name(equation.params["call_jaxpr"])
    function.__name__ = name  # pyright: ignore[reportAttributeAccessIssue]
    # A rule may call the function that it belongs to, so those inside of rules wait until they are asked for.
    if not frame.resizer.depth:
        derivative()
    with _jax.recorded_context(equation):
        return ir.trace(function, *(value.aval for value in body.inputs))


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _rule(frame: Frame, op: Op, given: Sequence[Dims], wanted: Sequence[Dims]) -> tuple[Graph, list[bool]]:
    """The recorded derivative rule at other sizes, and which tangents it leaves out."""
    closed, zeros = _jax.derivative_rule(op.equation)
    graph = ir.import_jaxpr(closed)
    captured = dataclasses.replace(
        frame.narrowing.captured,
        graph=graph,
        inputs=tuple(Input("operand", str(i)) for i in range(len(graph.inputs))),
        output_leaves=(),
        updates=(),
    )
    narrowing, place = Narrowing(captured), f"an operand of the derivative rule of {frame.place(op)}"
    entering = [*given, *given]
    for x, dims in zip(narrowing.normal.inputs, entering, strict=True):
        for factors, kept, size in zip(narrowing.engine.dims[x], dims, x.shape, strict=True):
            if kept is not None:
                narrowing.assign(factors, spelled(kept, size), place)
    leaving = [*wanted, *(dims for dims, zero in zip(wanted, zeros, strict=True) if not zero)]
    return Resizer(narrowing, frame.resizer.depth + 1).run(entering, leaving), zeros


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"), _call),
    **dict.fromkeys(("custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_vjp),
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
