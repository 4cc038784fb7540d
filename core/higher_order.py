"""Operations with bodies, rebuilt through JAX's public functions with encoded operands and changed bodies.

A rebuilt body is memoized on its graph, so that `jit` traces it once for each structure of operands and equal layers
stay one function. Where JAX wants equal types on both sides (carries, branches, mapped outputs) encodings are unpacked.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.ad_checkpoint import checkpoint_name

from compax import _jax
from compax.encoding import Encoded
from compax.ir import Graph, Op, forwarded

if TYPE_CHECKING:
    from compax.lowering import Evaluator

DOT_NAME = "compax.dot"
BATCH_DOT_NAME = "compax.batch_dot"


def name_dot(output: jax.Array, batched: bool) -> jax.Array:
    """Marks the output of a rule that stands for a `dot_general`, for rematerialization policies that save dots."""
    return checkpoint_name(output, BATCH_DOT_NAME if batched else DOT_NAME)


def rebuild(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    """The outputs of an operation with bodies, evaluated by `evaluator`."""
    return _REBUILD[op.name](evaluator, op, operands)


def _body(evaluator: "Evaluator", graph: Graph, operands: list[Any]) -> Callable[..., list[Any]]:
    """A body as a function. What loops around hold, they hold inside under the body's own names."""
    held = [evaluator.loops_holding(x) for x in operands]

    def function(*args: Any) -> list[Any]:
        for x, loops in zip(args, held, strict=True):
            evaluator.hold(x, loops)
        return evaluator.run(graph, args)

    return function


def _dense_body(evaluator: "Evaluator", graph: Graph, operands: list[Any], needed_by: str) -> Callable[..., list[Any]]:
    function = _body(evaluator, graph, operands)
    return lambda *args: [evaluator.dense(x, needed_by) for x in function(*args)]


def _jit(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    attributes, body = op.attributes, op.bodies[0]
    key = ("jit", id(body), tuple(map(evaluator.loops_holding, operands)))
    if key not in evaluator.memo or evaluator.observer is not None:
        function = _body(evaluator, body, operands)
        function.__name__ = attributes["name"]
        options = dict(attributes.get("compiler_options_kvs") or ())
        evaluator.memo[key] = jax.jit(function, inline=attributes["inline"], compiler_options=options or None)
    shardings = attributes["in_shardings"]
    placed = [_place(x, sharding) for x, sharding in zip(operands, shardings, strict=True)]
    outputs = evaluator.memo[key](*placed)
    return [_place(x, sharding) for x, sharding in zip(outputs, attributes["out_shardings"], strict=True)]


def _place(x: Any, sharding: Any) -> Any:
    """An operand of a nested `jit` under the sharding that was asked for, if any."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return x
    specs = x.spec(sharding.spec) if isinstance(x, Encoded) else sharding.spec
    return jax.tree.map(
        lambda leaf, spec: jax.lax.with_sharding_constraint(leaf, jax.sharding.NamedSharding(sharding.mesh, spec)),
        x,
        specs,
    )


def _remat(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    policy = op.attributes["policy"]
    function = jax.checkpoint(
        _body(evaluator, op.bodies[0], operands),
        prevent_cse=op.attributes["prevent_cse"],
        policy=None if policy is None else _dots_by_name(policy),
    )
    return function(*operands)


def _dots_by_name(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A policy that treats our named outputs as the dots that they stand for, and never keeps integer accumulators."""

    def decide(primitive: Any, *avals: Any, **parameters: Any) -> Any:
        if primitive.name == "name" and parameters["name"] in (DOT_NAME, BATCH_DOT_NAME):
            batch = ((0,), (0,)) if parameters["name"] == BATCH_DOT_NAME else ((), ())
            return policy(jax.lax.dot_general_p, *avals, *avals, dimension_numbers=(((), ()), batch))
        if primitive is jax.lax.dot_general_p and all(jax.numpy.issubdtype(a.dtype, jax.numpy.integer) for a in avals):
            return False
        return policy(primitive, *avals, **parameters)

    return decide


def _scan(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    attributes, body = op.attributes, op.bodies[0]
    num_constants, num_carry = _jax.scan_counts(dict(attributes))
    constants = operands[:num_constants]
    initial = operands[num_constants : num_constants + num_carry]
    length = attributes["length"]
    xs = [x.stacked(length) if isinstance(x, Encoded) else x for x in operands[num_constants + num_carry :]]
    kept = [isinstance(x, Encoded) and _invariant(body, num_constants + i, i) for i, x in enumerate(initial)]
    carried = [evaluator.dense(x, "scan carry") for x, keep in zip(initial, kept, strict=True) if not keep]

    def turn(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        given = iter(carry)
        full = [held if keep else next(given) for held, keep in zip(initial, kept, strict=True)]
        with evaluator.loop(length, [*constants, *initial]):
            outputs = evaluator.run(body, [*constants, *full, *x])
            after = [
                evaluator.dense(y, "scan carry") for y, keep in zip(outputs[:num_carry], kept, strict=True) if not keep
            ]
            return after, [evaluator.dense(y, "scan output") for y in outputs[num_carry:]]

    final, ys = jax.lax.scan(
        turn, carried, xs, length=length, reverse=attributes["reverse"], unroll=attributes["unroll"]
    )
    given = iter(final)
    return [*(held if keep else next(given) for held, keep in zip(initial, kept, strict=True)), *ys]


def _invariant(body: Graph, input_index: int, output_index: int) -> bool:
    """Whether a loop hands a carried value on unchanged."""
    return forwarded(body, body.outputs[output_index]) is body.inputs[input_index]


def _while(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    attributes = op.attributes
    condition, body = op.bodies
    num_condition, num_body = attributes["cond_nconsts"], attributes["body_nconsts"]
    condition_constants = operands[:num_condition]
    body_constants = operands[num_condition : num_condition + num_body]
    initial = operands[num_condition + num_body :]
    kept = [isinstance(x, Encoded) and _invariant(body, num_body + i, i) for i, x in enumerate(initial)]
    carried = [evaluator.dense(x, "while carry") for x, keep in zip(initial, kept, strict=True) if not keep]

    def full(carry: list[Any]) -> list[Any]:
        given = iter(carry)
        return [held if keep else next(given) for held, keep in zip(initial, kept, strict=True)]

    def test(carry: list[Any]) -> Any:
        with evaluator.loop(None, condition_constants):
            return evaluator.run(condition, [*condition_constants, *full(carry)])[0]

    def turn(carry: list[Any]) -> list[Any]:
        with evaluator.loop(None, [*body_constants, *initial]):
            outputs = evaluator.run(body, [*body_constants, *full(carry)])
            return [evaluator.dense(y, "while carry") for y, keep in zip(outputs, kept, strict=True) if not keep]

    return full(jax.lax.while_loop(test, turn, carried))


def _cond(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    index, *rest = operands
    branches = [_dense_body(evaluator, body, rest, "cond output") for body in op.bodies]
    return list(jax.lax.switch(index, branches, *rest))


def _shard_map(evaluator: "Evaluator", op: Op, operands: list[Any]) -> list[Any]:
    attributes = op.attributes
    specs = attributes["in_specs"]
    in_specs = tuple(x.spec(spec) if isinstance(x, Encoded) else spec for x, spec in zip(operands, specs, strict=True))

    body = _dense_body(evaluator, op.bodies[0], operands, "shard_map output")

    def local(*args: Any) -> list[Any]:
        return body(*(x.manual(spec) if isinstance(x, Encoded) else x for x, spec in zip(args, specs, strict=True)))

    function = jax.shard_map(
        local,
        mesh=attributes["mesh"],
        in_specs=in_specs,
        out_specs=list(attributes["out_specs"]),
        check_vma=attributes["check_vma"],
        axis_names=attributes["newly_manual_axes"],
    )
    return function(*operands)


_REBUILD: dict[str, Callable[["Evaluator", Op, list[Any]], list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
assert _REBUILD.keys() == _jax.ENTERABLE
