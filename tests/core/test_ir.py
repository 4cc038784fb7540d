"""The intermediate representation: importing jaxprs, walking, rewriting, inlining."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax import _jax, ir, lowering
from compax.ir import Graph, Literal, Op, Value

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def names(graph: Graph) -> list[str]:
    return [op.name for _, op in ir.walk(graph)]


def run(graph: Graph, *inputs: Any) -> list[Any]:
    return lowering.evaluate(graph, inputs)


def block(x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.sin(x))


def layered(x: jax.Array, w: jax.Array) -> jax.Array:
    """One jitted function called three times, and a scan around a nested one."""
    layer = jax.jit(lambda x, w: block(x @ w))
    x = layer(layer(layer(x, w), w), w)
    return jax.lax.scan(lambda c, _: (jax.jit(block)(c), None), x, None, length=2)[0]


# -- Import -----------------------------------------------------------------------------------------------------------


def test_import_keeps_order_types_and_attributes() -> None:
    graph = ir.trace(lambda x: jnp.sum(x.T, axis=0) + 1, X)
    assert [op.name for op in graph.ops] == ["transpose", "reduce_sum", "add"]
    assert graph.ops[0].attributes["permutation"] == (1, 0)
    assert graph.imported
    (x,) = graph.inputs
    assert (x.shape, x.dtype) == ((4, 4), jnp.float32)
    assert graph.ops[1].inputs == graph.ops[0].outputs
    literal = graph.ops[2].inputs[1]
    assert isinstance(literal, Literal)
    assert (literal.shape, literal.dtype, float(literal.value)) == ((), jnp.float32, 1.0)
    assert graph.outputs == graph.ops[2].outputs


def test_a_body_that_serves_many_operations_is_imported_once() -> None:
    graph = ir.trace(layered, X, X)
    jits = [op for op in graph.ops if op.name in ("jit", "pjit")]
    assert len(jits) == 3
    assert len({id(op.bodies[0]) for op in jits}) == 1


@pytest.mark.parametrize(
    ("function", "name", "bodies"),
    [
        (lambda x: jax.jit(block)(x), "jit", 1),
        (lambda x: jax.checkpoint(block)(x), None, 1),
        (lambda x: jax.lax.scan(lambda c, _: (block(c), None), x, None, length=3)[0], "scan", 1),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x), "while", 2),
        (lambda x: jax.lax.cond(x[0, 0] > 0, block, jnp.negative, x), "cond", 2),
        (lambda x: jax.lax.switch(1, [block, jnp.negative, jnp.sin], x), "cond", 3),
        (lambda x: jax.nn.relu(x), "custom_jvp_call", 1),
    ],
)
def test_nested_computations_become_bodies(function: Callable[..., Any], name: str | None, bodies: int) -> None:
    graph = ir.trace(function, X)
    holders = [op for op in graph.ops if op.bodies]
    if name is not None:
        assert [op.name for op in holders] == [name]
    assert sum(len(op.bodies) for op in holders) == bodies
    for _, op in ir.walk(graph):
        assert not any(hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in op.attributes.values())
    x = jnp.linspace(-1, 1, 16).reshape(4, 4)
    np.testing.assert_array_equal(run(graph, x)[0], function(x))


def test_constants_are_kept_with_their_values() -> None:
    table = np.arange(16, dtype=np.float32).reshape(4, 4)
    graph = ir.trace(lambda x: x + jnp.asarray(table), X)
    np.testing.assert_array_equal(run(graph, jnp.ones((4, 4)))[0], table + 1)


def test_outputs_may_be_inputs_literals_or_repeated() -> None:
    graph = ir.trace(lambda x: (x, 1.0, x, jnp.sin(x)), X)
    x = jnp.ones((4, 4))
    outputs = run(graph, x)
    assert outputs[0] is x
    assert outputs[2] is x
    assert float(outputs[1]) == 1.0


def test_weak_types_survive() -> None:
    closed = jax.make_jaxpr(lambda x, y: x * y)(jnp.ones(3, jnp.bfloat16), 2.0)
    graph = ir.import_jaxpr(closed)
    assert _jax.as_struct(graph.inputs[1].aval).weak_type
    assert run(graph, jnp.ones(3, jnp.bfloat16), 2.0)[0].dtype == jnp.bfloat16


def test_the_type_of_a_value_is_in_its_text() -> None:
    (x,) = ir.trace(lambda x: x, jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)).inputs
    assert repr(x) == "Value(bf16[8,16])"


# -- Walking ----------------------------------------------------------------------------------------------------------


def test_walk_enters_every_body() -> None:
    graph = ir.trace(layered, X, X)
    assert names(graph).count("tanh") == 4
    assert names(graph).count("dot_general") == 3


def test_paths_resolve_to_their_operations() -> None:
    graph = ir.trace(layered, X, X)
    paths = [path for path, _ in ir.walk(graph)]
    assert len(set(paths)) == len(paths)
    for path, op in ir.walk(graph):
        assert ir.resolve(graph, path) is op


def test_producers_and_users_are_those_of_one_level() -> None:
    graph = ir.trace(lambda x: jnp.sin(x) * jnp.sin(x) + x, X)
    producers, users = graph.producers(), graph.users()
    assert all(value in op.outputs for value, op in producers.items())
    assert graph.inputs[0] not in producers
    assert [op.name for op in users[graph.inputs[0]]] == ["sin", "sin", "add"]


# -- Copies -----------------------------------------------------------------------------------------------------------


def handed_on(function: Callable[..., Any], count: int = 2) -> list[int | None]:
    """For each output the number of the input that it is a copy of."""
    graph = ir.trace(function, *[X] * count)
    found = []
    for output in graph.outputs:
        source = ir.forwarded(graph, output)
        found.append(next((i for i, value in enumerate(graph.inputs) if value is source), None))
    return found


def test_values_handed_on_through_bodies() -> None:
    def turn(carry: Any, _: Any) -> Any:
        x, w = carry
        return (x @ w, w), None

    assert handed_on(lambda x, w: (w, x)) == [1, 0]
    assert handed_on(lambda x, w: jax.jit(lambda x, w: (jnp.sin(x), w))(x, w)) == [None, 1]
    assert handed_on(lambda x, w: jax.checkpoint(lambda x, w: (jnp.sin(x), w))(x, w)) == [None, 1]
    assert handed_on(lambda x, w: jax.lax.scan(turn, (x, w), None, length=3)[0]) == [None, 1]
    nested = jax.jit(lambda x, w: jax.lax.scan(turn, (x, w), None, length=3)[0])
    assert handed_on(lambda x, w: nested(x, w)) == [None, 1]


def test_values_that_a_loop_changes_are_not_handed_on() -> None:
    def swap(carry: Any, _: Any) -> Any:
        return (carry[1], carry[0]), None

    assert handed_on(lambda x, w: jax.lax.scan(swap, (x, w), None, length=2)[0]) == [None, None]
    assert handed_on(lambda x, w: jax.lax.scan(lambda c, _: (c + 1, c), x, None, length=2)[1]) == [None]


# -- Rewriting --------------------------------------------------------------------------------------------------------


def retagged(op: Op) -> tuple[Op]:
    """A sine in place of a tangens hyperbolicus."""
    body = ir.trace(jnp.sin, *(x.aval for x in op.inputs))
    return (ir.inline(body, op.inputs, op.outputs)[0],)


def all_paths(graph: Graph, name: str) -> list[ir.Path]:
    return [path for path, op in ir.walk(graph) if op.name == name]


def test_rewrite_replaces_operations_at_any_depth() -> None:
    graph = ir.trace(layered, X, X)
    new = ir.rewrite(graph, dict.fromkeys(all_paths(graph, "tanh"), retagged))
    assert "tanh" not in names(new)
    assert names(new).count("sin") == 8
    assert not new.imported
    assert names(graph).count("tanh") == 4  # the old graph is as it was
    x, w = jnp.linspace(-1, 1, 16).reshape(4, 4), jnp.eye(4)

    def expected(x: jax.Array) -> jax.Array:
        for _ in range(5):
            x = jnp.sin(jnp.sin(x))
        return x

    np.testing.assert_allclose(run(new, x, w)[0], expected(x), rtol=1e-6)


def test_equal_rewrites_of_a_shared_body_keep_it_shared() -> None:
    graph = ir.trace(layered, X, X)
    new = ir.rewrite(graph, dict.fromkeys(all_paths(graph, "tanh"), retagged))
    assert len({id(op.bodies[0]) for op in new.ops if op.name in ("jit", "pjit")}) == 1


def test_a_rewrite_of_one_call_leaves_the_other_calls_alone() -> None:
    graph = ir.trace(layered, X, X)
    jits = [i for i, op in enumerate(graph.ops) if op.name in ("jit", "pjit")]
    path = next(p for p in all_paths(graph, "tanh") if p[0] == (jits[1], 0))
    new = ir.rewrite(graph, {path: retagged})
    bodies = [new.ops[i].bodies[0] for i in jits]
    assert bodies[0] is bodies[2] is graph.ops[jits[0]].bodies[0]
    assert bodies[1] is not bodies[0]
    assert [names(body).count("tanh") for body in bodies] == [1, 0, 1]
    assert bodies[0].imported
    assert not bodies[1].imported


def test_nothing_to_replace_is_the_same_graph() -> None:
    graph = ir.trace(layered, X, X)
    assert ir.rewrite(graph, {}) is graph


def test_imported_is_false_above_a_changed_body() -> None:
    graph = ir.trace(layered, X, X)
    scan = next(i for i, op in enumerate(graph.ops) if op.name == "scan")
    path = next(p for p in all_paths(graph, "tanh") if p[0][0] == scan)
    new = ir.rewrite(graph, {path: retagged})
    assert graph.ops[scan].imported
    assert not new.ops[scan].imported
    assert new.ops[scan].equation is graph.ops[scan].equation


# -- Inlining ---------------------------------------------------------------------------------------------------------


def test_inline_renames_values_and_keeps_meaning() -> None:
    graph = ir.trace(lambda x, y: jnp.sin(x) * y, X, X)
    outer = [Value(graph.inputs[0].aval), Value(graph.inputs[1].aval)]
    result = Value(graph.outputs[0].aval)
    once, twice = (ir.inline(graph, outer, [r]) for r in (result, Value(result.aval)))
    inner = {value for op in graph.ops for value in op.outputs}
    assert not inner & {value for op in once for value in op.outputs}
    assert once[0].outputs[0] is not twice[0].outputs[0]
    inlined = Graph(tuple(outer), tuple(once), (result,))
    x = jnp.linspace(0, 1, 16).reshape(4, 4)
    np.testing.assert_array_equal(run(inlined, x, x)[0], jnp.sin(x) * x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, "input or a literal"),
        (lambda x: 1.0, "input or a literal"),
        (lambda x: [jnp.sin(x)] * 2, "twice"),
    ],
)
def test_graphs_that_cannot_be_inlined(function: Any, message: str) -> None:
    graph = ir.trace(function, X)
    with pytest.raises(ValueError, match=message):
        ir.inline(graph, graph.inputs, [Value(graph.inputs[0].aval) for _ in graph.outputs])


def test_a_graph_with_constants_cannot_be_inlined() -> None:
    graph = Graph((), (), (), ((Value(_jax.abstract(jnp.ones(3))), jnp.ones(3)),))
    with pytest.raises(ValueError, match="constants"):
        ir.inline(graph, [], [])
