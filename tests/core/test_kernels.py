"""Which operations run as one kernel, what each kernel moves, and how often what is in bodies runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from compax import ir
from compax.analysis.cost import Cost, function_cost
from compax.analysis.kernels import find_kernels

N = 64
ARRAY = N * N * 4
X = jnp.ones((N, N))


def cost(function: Callable[..., Any], *args: Any) -> Cost:
    return function_cost(function, *(args or (X,)))


def moved(function: Callable[..., Any], *args: Any) -> float:
    """Bytes after fusion, in arrays of the common size."""
    return cost(function, *args).bytes_fused / ARRAY


def roots(function: Callable[..., Any], *args: Any) -> list[str]:
    return sorted(group.operation for group in cost(function, *args).kernels for _ in range(group.count))


# -- Chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_reads_and_writes_once() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jnp.tanh(x * 2 + 1).astype(jnp.bfloat16).astype(jnp.float32)

    assert moved(function) == 2
    assert cost(function).bytes_unfused / ARRAY == 3 * 2 + 2 * 1.5


def test_an_expensive_result_of_two_readers_is_written() -> None:
    """The exponentials of a softmax: written for the sum, read again for the quotient."""
    assert moved(lambda x: jax.nn.softmax(x)) == pytest.approx(1 + 2 + 1 + 2, rel=0.02)
    assert roots(lambda x: jax.nn.softmax(x)) == ["div", "exp", "reduce_max", "reduce_sum"]


def test_a_cheap_result_of_two_readers_is_computed_twice() -> None:
    def function(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x + 1
        return y.sum(0), y.max(1)

    assert roots(function) == ["reduce_max", "reduce_sum"]
    assert cost(function).flops == N * N + 2 * (N * N - N)
    assert sum(group.others for group in cost(function).kernels) == cost(function).flops + N * N


def test_a_result_of_two_readers_in_one_kernel_is_not_written() -> None:
    assert moved(lambda x: jnp.exp(x) * jnp.exp(x).sum() + jax.nn.silu(x)) < 5
    assert moved(lambda x: jax.nn.silu(x)) == 2


def test_broadcasts_and_counters_are_never_in_memory() -> None:
    def function(x: jax.Array, v: jax.Array) -> jax.Array:
        mask = lax.broadcasted_iota(jnp.int32, x.shape, 0) >= lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(mask, x + v, 0.0)

    assert moved(function, X, X[0]) == 2 + 1 / N


def test_a_reduction_fuses_what_it_reads() -> None:
    assert moved(lambda x: jnp.square(x).sum()) == pytest.approx(1, rel=0.01)


def test_what_nobody_reads_is_not_computed() -> None:
    def function(x: jax.Array) -> jax.Array:
        jnp.tanh(x)
        return x + 1

    result = cost(function)
    assert (result.transcendentals, result.flops, result.bytes_fused) == (0, N * N, 2 * ARRAY)


# -- Layout -----------------------------------------------------------------------------------------------------------


def test_reshapes_are_free() -> None:
    assert moved(lambda x: (x.reshape(-1)[None] + 1).reshape(N, N)) == 2
    assert moved(lambda x: x.reshape(-1)) == 0


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    result = cost(lambda x: jnp.tanh((x + 1) @ x.T))
    assert result.bytes_fused / ARRAY == (1 + 1) + (1 + 1 + 1) + (1 + 1)
    assert result.product_flops == 2 * N**3


def test_where_there_are_epilogues_a_product_fuses_into_what_alone_reads_it() -> None:
    def kernels(function: Callable[..., Any]) -> list[tuple[str, int]]:
        graph = ir.import_jaxpr(jax.make_jaxpr(function)(X))
        found = find_kernels(graph, epilogues=True).kernels
        return sorted((kernel.root[0].name, kernel.bytes // ARRAY) for kernel in found)

    assert kernels(lambda x: jnp.tanh(x @ x + 1)) == [("tanh", 2)]
    assert kernels(lambda x: (x @ x) + (x @ x.T)) == [("add", 3), ("dot_general", 2)]  # one product in a kernel
    assert kernels(lambda x: (x @ x).sum()) == [("dot_general", 2), ("reduce_sum", 0)]
    assert kernels(lambda x: x.sum()) == [("reduce_sum", 1)]
    assert kernels(lambda x: (x @ x) @ x) == [("dot_general", 2), ("dot_general", 3)]


def test_a_transpose_is_free_for_a_product_alone() -> None:
    assert moved(lambda x: x.T @ x) == 2
    assert moved(lambda x: x.T) == 2


def test_parts_are_read_alone() -> None:
    assert moved(lambda x: x[:4] * 2) == 2 * 4 / N
    assert moved(lambda x, i: x[i] * 2, X, jnp.array([1, 2])) == pytest.approx(2 * 2 / N, rel=0.1)
    assert moved(lambda x, i: lax.dynamic_slice_in_dim(x, i, 2), X, 3) == pytest.approx(2 * 2 / N, rel=0.1)
    assert moved(lambda x: jnp.split(x, 2)[0] * 2) == 1
    assert moved(lambda x: functools.reduce(jnp.add, jnp.split(x, 4))) == 1 + 1 / 4


def test_updates_move_the_part_that_changes() -> None:
    part = X[:2]
    assert moved(lambda x, y, i: lax.dynamic_update_slice(x, y * 2, (i, 0)), X, part, 3) == pytest.approx(
        2 * 2 / N, rel=0.1
    )
    assert moved(lambda x, y: x.at[jnp.array([5, 9])].add(y), X, part) == pytest.approx(3 * 2 / N, rel=0.1)


# -- Bodies -----------------------------------------------------------------------------------------------------------


def test_fusion_crosses_calls_and_rematerialization() -> None:
    inner = jax.jit(lambda x: x + 1)
    assert moved(lambda x: jnp.tanh(inner(x)) * 2) == 2
    assert moved(lambda x: jax.checkpoint(jnp.sin)(x) + 1) == 2
    assert moved(lambda x: jax.nn.relu(x) + 1) == 2  # a custom derivative


def test_a_scan_counts_every_turn() -> None:
    def function(x: jax.Array, ws: jax.Array) -> Any:
        return lax.scan(lambda x, w: (x @ w, jnp.sum(x)), x, ws)

    result = cost(function, X, jnp.ones((5, N, N)))
    assert result.product_flops == 5 * 2 * N**3
    assert result.by_operation["dot_general"].bytes_fused == 5 * 3 * ARRAY
    assert (result.loops, result.unknown) == ((), ())


def test_a_scan_in_a_scan() -> None:
    def function(x: jax.Array) -> jax.Array:
        inner = lambda x: lax.scan(lambda c, _: (c @ c, None), x, None, length=3)[0]  # noqa: E731
        return lax.scan(lambda c, _: (inner(c), None), x, None, length=4)[0]

    assert cost(function).product_flops == 12 * 2 * N**3


def test_equal_bodies_are_looked_at_once_and_counted_each_time() -> None:
    layer = jax.jit(lambda x: jnp.tanh(x @ x))
    assert cost(lambda x: layer(layer(layer(x)))).product_flops == 3 * 2 * N**3


def test_a_loop_that_counts_to_a_number() -> None:
    def function(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ c[1]), (0, x))[1]

    result = cost(function)
    assert result.product_flops == 4 * 2 * N**3
    assert result.loops == ()


def test_a_loop_of_unknown_length_is_said_to_be() -> None:
    def function(x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.fori_loop(0, n, lambda i, x: x @ x, x)

    result = cost(function, X, jnp.int32(4))
    assert result.product_flops == 2 * N**3
    (note,) = result.loops
    assert note.text == "a loop of unknown length: one turn"
    assert "loops of unknown length, counted as one turn: 1" in str(result)


def test_a_conditional_counts_its_largest_branch() -> None:
    def function(p: jax.Array, x: jax.Array) -> jax.Array:
        return lax.cond(p, lambda x: x + 1, lambda x: x @ x, x)

    result = cost(function, jnp.bool_(True), X)
    assert result.flops == 2 * N**3 + 1  # the condition is converted to an index
    assert [note.text for note in result.branches] == ["the largest of 2 branches"]


def test_a_shard_map_counts_on_every_device() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def function(x: jax.Array) -> jax.Array:
        local = lambda x: lax.psum(x.sum(), "x") + x @ jnp.ones((N, N))  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))(x)

    result = cost(function)
    assert result.product_flops == 2 * N**3
    assert result.product_flops_per_device == 2 * N**3 // 4


def test_a_linear_solve_is_its_solution() -> None:
    def function(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.custom_linear_solve(lambda x: a @ x, b, solve=lambda _, b: b / jnp.diag(a), symmetric=True)

    result = cost(function, X, X[0])
    assert "dot_general" not in result.by_operation
    assert result.by_operation["div"].flops == N
    assert result.unknown == ()


# -- Kernels by hand --------------------------------------------------------------------------------------------------


def _twice(estimate: pl.CostEstimate | None) -> Callable[[jax.Array], jax.Array]:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((N, N), jnp.float32), cost_estimate=estimate)


def test_a_pallas_kernel_counts_as_it_states() -> None:
    result = cost(_twice(pl.CostEstimate(flops=123, transcendentals=4, bytes_accessed=5678)))
    assert (result.flops, result.transcendentals, result.bytes_fused) == (123, 4, 5678)
    assert result.unknown == ()


def test_a_pallas_kernel_that_states_nothing_is_unknown() -> None:
    result = cost(lambda x: _twice(None)(x) + 1)
    (note,) = result.unknown
    assert "without a cost estimate: pass cost_estimate" in note.text
    assert result.flops == N * N
