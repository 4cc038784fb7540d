"""Regions of a graph as one operation, wherever they lie; and where that is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax import Program, ir, lowering
from compax.analysis.normal import Normal, Val
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.errors import RewriteError
from compax.ir import Op
from compax.rewrites.outline import Region, inline_call, outline
from compax.verify import verify

OPERATION = "region_of_a_test"
X = jnp.linspace(-1, 1, 12).reshape(3, 4)
W = jnp.cos(jnp.arange(16.0)).reshape(4, 4)


@lowering.operation(OPERATION)
def _reference(call: lowering.Call) -> list[Any]:
    return call.evaluator.run(call.op.bodies[0], call.operands)


def nodes(normal: Normal, name: str) -> list[Val]:
    """The results of all operations of a name, in order."""
    return [node.outputs[0] for node in normal.nodes_named(name)]


def outlined(
    function: Callable[..., Any],
    ends: Callable[[Normal], Sequence[tuple[Val, tuple[Val, ...]]]],
    *,
    numbered: bool = False,
) -> Program:
    """The program of a function with regions made one operation each, checked: values, gradients, loops, `vmap`."""
    program = compax.capture(function, {"w": W}, X)
    before = program.graph().graph
    (key,) = program.graphs
    normal = Normal(program.graph())
    regions = [
        Region(OPERATION, output, inputs, {"index": i * numbered}) for i, (output, inputs) in enumerate(ends(normal))
    ]
    changed = program.replace(graphs={key: outline(program.graph(), normal, regions)})
    verify(changed)
    assert program.graph().graph is before
    assert found(changed)

    def loss(program: Program, params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(program.apply(params, {}, x)[0]))

    for run in (
        lambda p: p(X),
        lambda p: jax.grad(lambda params: loss(p, params, X))(p.params)["w"],
        lambda p: jax.grad(jax.checkpoint(lambda params: loss(p, params, X)))(p.params)["w"],
        lambda p: jax.vmap(lambda x: p.apply(p.params, {}, x)[0])(jnp.stack([X, X + 1])),
        lambda p: jax.lax.scan(lambda c, x: (c + loss(p, p.params, x), c), 0.0, jnp.stack([X, X + 1]))[0],
    ):
        assert largest_relative_error(np.asarray(run(program)), np.asarray(run(changed))) <= rounding_tolerance(
            "float32"
        )
    flat = [lowering.evaluate(p.graph().graph, [W, X])[0] for p in (program, changed)]
    np.testing.assert_array_equal(*flat)
    return changed


def found(program: Program) -> list[Op]:
    """The operations that regions became."""
    return [op for _, op in ir.walk(program.graph().graph) if op.name == OPERATION]


def inside(op: Op) -> list[str]:
    """What an operation's reference consists of."""
    return [inner.name for inner in op.bodies[0].ops]


def test_at_the_top_with_what_else_it_reads() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jnp.cos(jnp.tanh(jnp.exp(x @ p["w"]) * 2) + x)

    program = outlined(function, lambda n: [(nodes(n, "tanh")[0], (nodes(n, "dot_general")[0],))])
    (op,) = found(program)
    assert inside(op) == ["exp", "mul", "tanh"]
    assert op.attributes == {"index": 0}
    assert len(op.inputs) == 1
    program = outlined(function, lambda n: [(nodes(n, "tanh")[0], (n.inputs[1],))])
    (op,) = found(program)
    assert [x.shape for x in op.inputs] == [(3, 4), (4, 4)]


def test_casts_belong_to_the_region() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.exp((x @ p["w"]).astype(jnp.bfloat16).astype(jnp.float32))
        return jnp.tanh(h.astype(jnp.bfloat16).astype(jnp.float32))

    program = outlined(function, lambda n: [(nodes(n, "tanh")[0], (nodes(n, "dot_general")[0],))])
    assert inside(found(program)[0]).count("convert_element_type") == 4


def test_inside_a_jit_that_several_layers_share() -> None:
    block = jax.jit(lambda w, x: jnp.sin(jnp.exp(jnp.tanh(x @ w))))

    def function(p: Any, x: jax.Array) -> jax.Array:
        return block(p["w"], block(p["w"], x))

    def all_of_them(n: Normal) -> list[tuple[Val, tuple[Val, ...]]]:
        pairs = zip(nodes(n, "exp"), nodes(n, "dot_general"), strict=True)
        return [(output, (start,)) for output, start in pairs]

    one = outlined(function, lambda n: all_of_them(n)[:1])
    assert len(found(one)) == 1
    assert len({id(op.bodies[0]) for op in one.graph().graph.ops}) == 2
    both = outlined(function, all_of_them)
    assert [inside(op) for op in found(both)] == [["tanh", "exp"]] * 2
    assert len({id(op.bodies[0]) for op in both.graph().graph.ops}) == 1
    numbered = outlined(function, all_of_them, numbered=True)
    assert [op.attributes for op in found(numbered)] == [{"index": 0}, {"index": 1}]


def test_inside_a_scan() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.sin(jnp.exp(jnp.tanh(h * w))), None), x, p["w"])[0]

    program = outlined(function, lambda n: [(nodes(n, "exp")[0], (nodes(n, "mul")[0],))])
    assert inside(found(program)[0]) == ["tanh", "exp"]
    assert [op.name for op in program.graph().graph.ops] == ["scan"]


def test_a_jit_that_is_covered_goes_in_whole_and_one_cut_half_way_is_inlined() -> None:
    first = jax.jit(lambda x: jnp.tanh(x) * 3)
    second = jax.jit(lambda x: jnp.exp(x) + 1)

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(second(first(x @ p["w"])))

    covered = outlined(function, lambda n: [(nodes(n, "sin")[0], (nodes(n, "mul")[0],))])
    assert inside(found(covered)[0]) == ["jit", "sin"]
    assert [op.name for op in covered.graph().graph.ops] == ["dot_general", "jit", OPERATION]
    cut = outlined(function, lambda n: [(nodes(n, "exp")[0], (nodes(n, "dot_general")[0],))])
    assert inside(found(cut)[0]) == ["jit", "exp"]
    assert [op.name for op in cut.graph().graph.ops] == ["dot_general", OPERATION, "add", "sin"]


def test_a_jit_with_a_result_that_is_used_outside_is_inlined() -> None:
    both = jax.jit(lambda x: (jnp.exp(jnp.tanh(x)), jnp.cos(x)))

    def function(p: Any, x: jax.Array) -> jax.Array:
        one, other = both(x @ p["w"])
        return jnp.sin(one) + other

    program = outlined(function, lambda n: [(nodes(n, "sin")[0], (nodes(n, "dot_general")[0],))])
    assert inside(found(program)[0]) == ["tanh", "exp", "sin"]


def test_layout_that_others_need_too_stays_outside() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        scale = jnp.exp(p["w"].T)
        return jnp.tanh(x @ scale) + scale[:3]

    program = outlined(function, lambda n: [(nodes(n, "tanh")[0], (n.inputs[1],))])
    assert inside(found(program)[0]) == ["dot_general", "tanh"]


def regions_of(function: Callable[..., Any], output: str, start: str) -> None:
    program = compax.capture(function, {"w": W}, X)
    normal = Normal(program.graph())
    outline(program.graph(), normal, [Region(OPERATION, nodes(normal, output)[-1], (nodes(normal, start)[0],), {})])


def test_a_value_that_is_used_outside_is_refused() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.exp(x @ p["w"])
        return jnp.tanh(h) + h

    with pytest.raises(RewriteError, match=r"would hide the result of 'exp' \(.*test_outline.py.*used outside"):
        regions_of(function, "tanh", "dot_general")


def test_a_loop_is_never_cut_in_two() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = jax.lax.scan(lambda h, w: (jnp.exp(h * w), None), x, p["w"])[0]
        return jnp.tanh(h)

    with pytest.raises(RewriteError, match="loop or a derivative rule"):
        regions_of(function, "tanh", "mul")


def test_a_region_of_nothing() -> None:
    with pytest.raises(RewriteError, match="would compute nothing"):
        regions_of(lambda p, x: jnp.tanh(x @ p["w"]), "dot_general", "dot_general")


def test_a_call_is_replaced_by_what_is_in_it() -> None:
    table = np.arange(4.0, dtype=np.float32)
    inner = jax.jit(lambda w, x: (x @ w * table, x, 2.0, x))

    def function(p: Any, x: jax.Array) -> jax.Array:
        a, b, c, d = inner(p["w"], x)
        return a + b * c + d

    program = compax.capture(function, {"w": W}, X)
    graph = program.graph().graph
    call = next(op for op in graph.ops if op.name == "jit")
    flat = inline_call(graph, call)
    assert not any(op.name == "jit" for op in flat.ops)
    assert any(op.name == "jit" for op in graph.ops)
    np.testing.assert_array_equal(lowering.evaluate(graph, [W, X])[0], lowering.evaluate(flat, [W, X])[0])
    with pytest.raises(RewriteError, match="no plain call"):
        inline_call(flat, flat.ops[0])
