"""Predicted memory: small computations by hand, and larger ones against what XLA allocates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from compax import ir
from compax.analysis.buffers import BACKENDS, Buffers
from compax.analysis.liveness import Liveness, liveness
from compax.analysis.tracing import Role, Traced

N = 64
SIZE = N * N * 4
X = jax.ShapeDtypeStruct((N, N), jnp.float32)


def predict(
    function: Callable[..., Any], *shapes: Any, platform: str = "cpu", donated: tuple[int, ...] = ()
) -> Liveness:
    graph = ir.import_jaxpr(jax.make_jaxpr(function)(*shapes))
    roles = tuple(Role(f"argument {i}", "") for i, _ in enumerate(shapes))
    return liveness(Traced(graph, roles, None, {}), platform, donated=[f"argument {i}" for i in donated])


def test_elementwise_operations_need_nothing() -> None:
    found = predict(lambda x: jnp.tanh(x * 2 + 1), X)
    assert found.temporaries == 0
    assert found.peak == 2 * SIZE


def test_a_chain_of_products_has_two_results_at_a_time() -> None:
    found = predict(lambda x, w: x @ w @ w @ w @ w, X, X)
    assert found.temporaries == 2 * SIZE
    assert found.arguments == {"argument 0": SIZE, "argument 1": SIZE}


def test_a_value_that_is_read_late_stays() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        first = x @ w
        return first @ w @ w @ w + first

    assert predict(function, X, X).temporaries == 3 * SIZE


def test_results_take_the_place_of_donated_arguments() -> None:
    found = predict(lambda x, w: (x + 1, w @ w), X, X, donated=(0,))
    assert found.donated == SIZE
    assert found.peak == 3 * SIZE


def test_a_loop_counts_one_turn_and_what_it_stacks() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        _, ys = jax.lax.scan(lambda c, _: (c @ w, jnp.sum(c @ w @ w)), x, None, length=9)
        return jnp.sum(ys)

    found = predict(function, X, X)
    assert 2 * SIZE <= found.temporaries <= 4 * SIZE + 64
    assert found.alive[0].operation in ("scan", "a turn of scan")


def test_a_tpu_keeps_what_products_alone_read_in_bfloat16() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        kept = jnp.tanh(x @ w) + jnp.sin(x)
        return (kept @ w) @ (kept @ w)

    graph = ir.import_jaxpr(jax.make_jaxpr(function)(X, X))
    for platform, halves in (("cpu", False), ("tpu", True)):
        buffers = Buffers(graph, BACKENDS[platform])
        sizes = {buffers.nbytes(y) for made in buffers.steps for y in made.outputs}
        assert (SIZE // 2 in sizes) == halves


def test_the_timeline_reaches_the_peak() -> None:
    found = predict(lambda x, w: x @ w @ w @ w, X, X)
    assert max(found.timeline) == found.peak


@pytest.mark.parametrize("length", [2, 8])
def test_gradients_of_scans_against_the_compiler(length: int) -> None:
    """What a scan keeps for its backward pass dominates: the prediction is within a tenth of what XLA allocates."""

    def loss(ws: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    ws, x = jax.ShapeDtypeStruct((length, 64, 64), jnp.float32), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    found = predict(jax.grad(loss), ws, x)
    memory = jax.jit(jax.grad(loss)).lower(ws, x).compile().memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert abs(found.peak / allocated - 1) < 0.1
