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

N = 128
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
    """Two of the chain beside it at a time, one of which lies in the result's memory."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        first = x @ w
        return first @ w @ w @ w + first

    assert predict(function, X, X).temporaries == 2 * SIZE
    assert predict(function, X, X).peak == of_compiler(function, X, X)


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


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((), 4),
        ((8, 128), 8 * 128 * 4),
        ((96, 32), 32 * 128 * 4),  # the longer dimension is filled up
        ((3, 1, 128), 4 * 128 * 4),  # tiles of four rows; dimensions of one take nothing
        ((200,), 256 * 4),
        ((1500,), 2048 * 4),
        ((5, 20, 256), 5 * 24 * 256 * 4),
    ],
)
def test_a_tpu_stores_arrays_in_tiles(shape: tuple[int, ...], stored: int) -> None:
    found = predict(lambda x: x + 1, jax.ShapeDtypeStruct(shape, jnp.float32), platform="tpu")
    assert found.arguments == {"argument 0": stored}


@pytest.mark.parametrize(("dtype", "copies"), [(jnp.bfloat16, 1), (jnp.float32, 1)])
def test_a_tpu_converts_stacked_weights_before_a_loop(dtype: Any, copies: int) -> None:
    """Two loops read the same copy; products of float32 take bfloat16 as well."""

    def function(ws: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w.astype(dtype)), None

        return jax.lax.scan(layer, jax.lax.scan(layer, x, ws)[0], ws)[0]

    ws, x = jax.ShapeDtypeStruct((16, N, N), jnp.float32), jax.ShapeDtypeStruct((8, N), dtype)
    narrow = [alive for alive in predict(function, ws, x, platform="tpu").alive if alive.operation == "narrow"]
    assert [alive.nbytes for alive in narrow] == [16 * SIZE // 2] * copies
    assert not any(alive.operation == "narrow" for alive in predict(function, ws, x).alive)


def test_a_library_on_a_cpu_reads_its_operands_from_memory() -> None:
    """A factor that is read inside of a library's sum and outside of it is stretched in memory."""

    def function(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        stretched = scale[None, :]
        return x * stretched, jnp.sum(x @ x * stretched, axis=-1)

    shapes = X, jax.ShapeDtypeStruct((N,), jnp.float32)
    for platform, kept in (("cpu", True), ("gpu", False)):
        found = predict(function, *shapes, platform=platform)
        assert ("broadcast_in_dim" in {alive.operation for alive in found.alive}) == kept


def test_a_library_on_a_cpu_takes_in_what_nothing_else_reads() -> None:
    found = predict(lambda x: jnp.sum(jnp.exp(x) * x, axis=-1), X)
    assert found.temporaries == 0


def test_small_reductions_are_left_to_loops() -> None:
    """The library takes reductions of 4096 elements and more."""

    def function(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        doubled = x * 2
        return jnp.sum(doubled, axis=-1), jnp.max(doubled, axis=-1)

    assert predict(function, jax.ShapeDtypeStruct((32, 64), jnp.float32)).temporaries == 0
    assert predict(function, X).temporaries == SIZE


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradients_of_unrolled_layers_against_the_compiler(num_layers: int) -> None:
    """Normalization, a softmax and a gate: what XLA keeps for the backward pass, within a twentieth."""

    def loss(ws: list[jax.Array], scale: jax.Array, x: jax.Array) -> jax.Array:
        for w in ws:
            normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale
            x = x + jax.nn.softmax(normal @ w) @ w
            x = x + jax.nn.silu(x @ w) * (x @ w.T)
        return jnp.sum(x * x)

    ws = [jax.ShapeDtypeStruct((N, N), jnp.float32)] * num_layers
    shapes = ws, jax.ShapeDtypeStruct((N,), jnp.float32), jax.ShapeDtypeStruct((1024, N), jnp.float32)
    graph = ir.import_jaxpr(jax.make_jaxpr(jax.grad(loss))(*shapes))
    found = liveness(Traced(graph, tuple(Role("argument", "") for _ in graph.inputs), None, {}), "cpu")
    memory = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert abs(found.peak / allocated - 1) < 0.05


def of_compiler(function: Callable[..., Any], *shapes: Any, donated: tuple[int, ...] = ()) -> int:
    """Bytes that XLA allocates, less the table of pointers to several results."""
    memory = jax.jit(function, donate_argnums=donated).lower(*shapes).compile().memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    results = len(jax.tree.leaves(jax.eval_shape(function, *shapes)))
    return kept + memory.temp_size_in_bytes - (8 * results if results > 1 else 0)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_temporaries_lie_in_results_that_are_not_written_yet(length: int) -> None:
    """To the byte what XLA makes of a chain of products."""

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(length):
            x = x @ w
        return x

    assert predict(chain, X, X).peak == of_compiler(chain, X, X)


def test_a_donated_input_that_is_read_later_is_copied() -> None:
    """Nothing orders the second product before the update, so that the compiler copies the weight; else it need not."""

    def both(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return w - x.T @ x, x @ w

    def one(w: jax.Array, x: jax.Array) -> jax.Array:
        return w - x @ w

    for function, copied in ((both, True), (one, False)):
        found = predict(function, X, X, donated=(0,))
        assert ("copy" in {alive.operation for alive in found.alive}) == copied
        assert found.peak == of_compiler(function, X, X, donated=(0,))


def test_a_product_reads_a_transpose_of_what_has_another_order() -> None:
    """Batch dimensions come first; two dimensions of a matrix change places for nothing."""
    wide = jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)

    def operations(equation: str, *shapes: Any) -> set[str]:
        return {alive.operation for alive in predict(lambda *xs: jnp.sin(jnp.einsum(equation, *xs)), *shapes).alive}

    assert "transpose" in operations("abc,abd->bcd", wide, wide)
    assert "transpose" not in operations("bac,bcd->bad", wide, jax.ShapeDtypeStruct((8, 16, 16), jnp.float32))
    assert "transpose" not in operations("ab,cb->ac", X, X)


def test_operations_on_a_cpu_run_as_soon_as_they_can() -> None:
    """What depends on inputs alone is computed first, however late it is read."""

    def function(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jnp.tanh(x @ w)
        return x @ (v @ w)

    graph = ir.import_jaxpr(jax.make_jaxpr(function)(X, X, X))
    steps = Buffers(graph, BACKENDS["cpu"]).steps
    early = next(i for i, step in enumerate(steps) if graph.inputs[2] in step.reads)
    assert early == 1


def test_a_gradient_of_a_lookup_is_added_in_place() -> None:
    """A scatter into zeros that is added to something is a scatter into that."""

    def function(table: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array:
        return table.T @ x + jnp.zeros((N, N)).at[rows].add(x)

    rows = jax.ShapeDtypeStruct((N,), jnp.int32)
    names = [step.op.name for step in Buffers(imported(function, X, X, rows), BACKENDS["cpu"]).steps]
    assert names.count("scatter-add") == 1
    assert not {"broadcast_in_dim", "add"} & set(names)


def test_a_tpu_selects_where_a_cross_entropy_scatters() -> None:
    def loss(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        logits = x @ w
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels, axis=-1)[:, 0])

    labels = jax.ShapeDtypeStruct((N, 1), jnp.int32)
    for platform, scatters in (("cpu", True), ("tpu", False)):
        buffers = Buffers(imported(jax.grad(loss, (0, 1)), X, X, labels), BACKENDS[platform])
        written = {step.op.name for step in buffers.steps if any(y.shape == (N, N) for y in step.outputs)}
        assert ("scatter-add" in written) == scatters


def imported(function: Callable[..., Any], *shapes: Any) -> ir.Graph:
    return ir.import_jaxpr(jax.make_jaxpr(function)(*shapes))


def test_a_tpu_gathers_from_memory() -> None:
    """Such as the labels' logits in float32, from bfloat16 ones."""

    def function(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        logits = (hidden @ head).astype(jnp.float32)
        return jnp.take_along_axis(logits, labels[:, None], axis=-1)

    narrow = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
    graph = ir.import_jaxpr(jax.make_jaxpr(function)(narrow, narrow, jax.ShapeDtypeStruct((N,), jnp.int32)))
    for platform, kept in (("cpu", {"bfloat16"}), ("tpu", {"bfloat16", "float32"})):
        steps = Buffers(graph, BACKENDS[platform]).steps
        assert {str(y.dtype) for step in steps for y in step.outputs if y.shape == (N, N)} == kept


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
