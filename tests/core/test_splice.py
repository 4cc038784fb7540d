"""Values of a graph computed otherwise: what is put in, what goes, and the order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
from compax import Program, ir
from compax.errors import RewriteError
from compax.ir import Op
from compax.rewrites.splice import emit, live, splice, with_body
from compax.verify import verify

X = jnp.linspace(-1, 1, 6)


def captured(function: Any) -> Program:
    return compax.capture(lambda p, x: function(x) + p["b"], {"b": jnp.ones(6)}, X)


def replaced(program: Program, graph: ir.Graph) -> Program:
    import dataclasses

    (key,) = program.graphs
    after = program.replace(graphs={key: dataclasses.replace(program.graph(), graph=graph)})
    verify(after)
    return after


def named(graph: ir.Graph, name: str) -> Op:
    return next(op for op in graph.ops if op.name == name)


def test_a_value_is_computed_otherwise_and_what_made_it_goes() -> None:
    program = captured(lambda x: jnp.exp(jnp.sin(x) * 2))
    graph = program.graph().graph
    old = named(graph, "exp").outputs[0]
    ops, (new,) = emit(lambda x: jnp.cos(x), graph.inputs[1])
    after = replaced(program, splice(graph, ops, {old: new}))
    np.testing.assert_array_equal(after(X), jnp.cos(X) + 1)
    assert [op.name for op in after.graph().graph.ops] == ["cos", "add"]
    np.testing.assert_allclose(program(X), jnp.exp(jnp.sin(X) * 2) + 1, rtol=1e-6)


def test_new_operations_stand_behind_what_they_read() -> None:
    """What is replaced comes first in the graph, what replaces it reads something that comes last."""
    program = captured(lambda x: jnp.sin(x) + jnp.tanh(jnp.cos(x)))
    graph = program.graph().graph
    late = named(graph, "tanh").outputs[0]
    ops, (new,) = emit(lambda x: x * 3, late)
    after = replaced(program, splice(graph, ops, {named(graph, "sin").outputs[0]: new}))
    np.testing.assert_allclose(after(X), 4 * jnp.tanh(jnp.cos(X)) + 1, rtol=1e-6)


def test_another_value_in_its_place() -> None:
    program = captured(lambda x: jnp.exp(x) + jnp.sin(x))
    graph = program.graph().graph
    after = splice(graph, [], {named(graph, "exp").outputs[0]: named(graph, "sin").outputs[0]})
    np.testing.assert_allclose(replaced(program, after)(X), 2 * jnp.sin(X) + 1, rtol=1e-6)
    _, (same,) = emit(lambda x: x, graph.inputs[1])
    assert same is graph.inputs[1]


def test_a_circle_is_refused() -> None:
    graph = captured(lambda x: jnp.exp(jnp.sin(x))).graph().graph
    ops, (new,) = emit(lambda x: x * 2, named(graph, "exp").outputs[0])
    with pytest.raises(RewriteError, match="computed from it"):
        splice(graph, ops, {named(graph, "sin").outputs[0]: new})


def test_closed_over_arrays_are_refused() -> None:
    graph = captured(jnp.exp).graph().graph
    array = jnp.arange(6.0)
    with pytest.raises(RewriteError, match="pass them as operands"):
        emit(lambda x: x + array, graph.inputs[1])


def test_bodies_are_replaced_where_they_are() -> None:
    program = captured(lambda x: jax.jit(lambda y: jnp.sin(y) * 2)(x))
    graph = program.graph().graph
    position = next(i for i, op in enumerate(graph.ops) if op.bodies)
    body = graph.ops[position].bodies[0]
    ops, (new,) = emit(jnp.cos, body.inputs[0])
    changed = with_body(graph, ((position, 0),), splice(body, ops, {named(body, "sin").outputs[0]: new}))
    np.testing.assert_allclose(replaced(program, changed)(X), 2 * jnp.cos(X) + 1, rtol=1e-6)


def test_live_operations() -> None:
    def function(x: jax.Array) -> jax.Array:
        jnp.exp(x)
        return jnp.sin(x)

    assert {op.name for op in live(captured(function).graph().graph)} == {"sin", "add"}
