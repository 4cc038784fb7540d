"""Re-inference against JAX itself: a graph in other dtypes is what tracing the function in those dtypes gives."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from compax import Program, capture, ir, verify
from compax.compression import compressed
from compax.constraint import constrain
from compax.errors import InferenceError
from compax.infer import Policy, reinfer
from compax.infer_rules import OPERANDWISE, POLYMORPHIC, retypable, widest
from compax.lowering import evaluate
from compax.passes import Cast
from compax.transform import Context

BFLOAT16 = jnp.dtype(jnp.bfloat16)
FLOAT32 = jnp.dtype(jnp.float32)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


A, B = normal(4, 4), normal(4, 4, seed=1)
V = normal(4, seed=2)


def retyped(function: Callable[..., Any], arrays: Sequence[jax.Array], dtype: Any, policy: Policy | None = None):
    """A function of arrays in another dtype: the program, verified, and what re-inference says."""
    params = {str(index): x for index, x in enumerate(arrays)}
    program = capture(lambda params: function(*(params[name] for name in sorted(params))), params)
    ((key, captured),) = program.graphs.items()
    floats = {v: dtype for v in captured.graph.inputs if retypable(v.dtype)}
    result = reinfer(captured.graph, floats, policy)
    params = {name: x.astype(dtype) if retypable(x.dtype) else x for name, x in params.items()}
    program = program.replace(params=params, graphs={key: dataclasses.replace(captured, graph=result.graph)})
    verify(program)
    return program, result


def run(program: Program) -> list[jax.Array]:
    """Operation by operation."""
    (captured,) = program.graphs.values()
    return evaluate(captured.graph, [program.params[tag.path] for tag in captured.inputs])


def operations(graph: ir.Graph, name: str) -> list[ir.Op]:
    return [op for _, op in ir.walk(graph) if op.name == name]


# -- the table --------------------------------------------------------------------------------------------------------

NUMBERS = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
SCATTER = lax.ScatterDimensionNumbers(
    update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)
ROWS = jnp.asarray([[2], [0]])


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=x.dtype)


def window(reduce: Callable[..., Any], initial: float):
    return lambda x: lax.reduce_window(x, np.asarray(initial, x.dtype), reduce, (2, 2), (1, 1), "SAME")


UNARY = """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2
    expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square stop_gradient tan tanh
    cumlogsumexp cummax cummin cumprod cumsum
"""
BINARY = "add atan2 div eq ge gt igamma igammac le lt max min mul ne nextafter pow rem sub"

EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    **{name: (getattr(lax, name), (jnp.abs(A) % 1,)) for name in UNARY.split()},
    **{name: (getattr(lax, name), (jnp.abs(A) + 1, jnp.abs(B) + 1)) for name in BINARY.split()},
    "compress": (lambda x: compressed(x), (A,)),
    "copy": (lambda x: jnp.copy(x), (A,)),
    "clamp": (lambda x: lax.clamp(x * 0 - 1, x, x * 0 + 1), (A,)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), (A,)),
    "select_n": (lambda x, y: lax.select_n(x > 0, x, y), (A, B)),
    "name": (lambda x: jax.ad_checkpoint.checkpoint_name(x, "here"), (A,)),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 4, 4), (1, 2)), (A,)),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 0), (A, B)),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(0)), (2, 3)), (A,)),
    "dynamic_update_slice": (lambda x, y: lax.dynamic_update_slice(x, y[:2], (jnp.int32(1), jnp.int32(0))), (A, B)),
    "gather": (lambda x: lax.gather(x, ROWS, NUMBERS, (1, 4)), (A,)),
    "pad": (lambda x: lax.pad(x, lax.full((), 1, x.dtype), ((1, 1, 0), (0, 0, 0))), (A,)),
    "reshape": (lambda x: lax.reshape(x, (2, 8)), (A,)),
    "rev": (lambda x: lax.rev(x, (0,)), (A,)),
    "slice": (lambda x: lax.slice(x, (1, 0), (3, 4)), (A,)),
    "split": (lambda x: lax.split(x, (1, 3)), (A,)),
    "squeeze": (lambda x: lax.squeeze(x[:1], (0,)), (A,)),
    "tile": (lambda x: lax.tile(x, (2, 1)), (A,)),
    "transpose": (lambda x: lax.transpose(x, (1, 0)), (A,)),
    "argmax": (lambda x: lax.argmax(x, 1, jnp.int32), (A,)),
    "argmin": (lambda x: lax.argmin(x, 1, jnp.int32), (A,)),
    "reduce_max": (lambda x: lax.reduce_max_p.bind(x, axes=(0,)), (A,)),
    "reduce_min": (lambda x: lax.reduce_min_p.bind(x, axes=(0,)), (A,)),
    "reduce_prod": (lambda x: lax.reduce_prod(x, (0,)), (A,)),
    "reduce_sum": (lambda x: lax.reduce_sum(x, (0,)), (A,)),
    "reduce_window_max": (window(lax.max, -np.inf), (A,)),
    "reduce_window_min": (window(lax.min, np.inf), (A,)),
    "reduce_window_sum": (window(lax.add, 0.0), (A,)),
    "top_k": (lambda x: lax.top_k(x, 2), (A,)),
    "scatter": (lambda x, y: lax.scatter(x, ROWS, y[:2], SCATTER), (A, B)),
    "scatter-add": (lambda x, y: lax.scatter_add(x, ROWS, y[:2], SCATTER), (A, B)),
    "scatter-sub": (lambda x, y: lax.scatter_sub(x, ROWS, y[:2], SCATTER), (A, B)),
    "scatter-mul": (lambda x, y: lax.scatter_mul(x, ROWS, y[:2], SCATTER), (A, B)),
    "scatter-min": (lambda x, y: lax.scatter_min(x, ROWS, y[:2], SCATTER), (A, B)),
    "scatter-max": (lambda x, y: lax.scatter_max(x, ROWS, y[:2], SCATTER), (A, B)),
    "dot_general": (
        lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ())), preferred_element_type=x.dtype),
        (A, B),
    ),
    "ragged_dot_general": (lambda x, y: lax.ragged_dot(x, y[None], jnp.asarray([4])), (A, B)),
    "conv_general_dilated": (lambda x, y: lax.conv(x[None, None], y[None, None], (1, 1), "SAME"), (A, B)),
    "sort": (lambda x, y: lax.sort((x, y), num_keys=1), (A, B)),
    "optimization_barrier": (lambda x, y: lax.optimization_barrier((x, y)), (A, B)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_operation_of_the_table(name):
    """In bfloat16 it computes, bit for bit, what JAX computes when it is given bfloat16."""
    function, arrays = EXAMPLES[name]
    program, result = retyped(function, arrays, jnp.bfloat16)
    found = operations(result.graph, name)
    assert found, f"the example of '{name}' has {[op.name for _, op in ir.walk(result.graph)]}"
    assert all(x.dtype != FLOAT32 for op in found for x in (*op.inputs, *op.outputs))
    assert not result.fallbacks
    expected = function(*(x.astype(jnp.bfloat16) for x in arrays))
    for got, want in zip(run(program), jax.tree.leaves(expected), strict=True):
        want = want.astype(jnp.float32) if want.dtype == BFLOAT16 else want
        np.testing.assert_array_equal(got, want)


COLLECTIVES = """
    all_gather all_gather_invariant all_to_all pbroadcast pcast pmax pmin ppermute psum psum_invariant pvary
    reduce_scatter
"""
UNREACHED = {
    "add_any": "JAX makes it when it differentiates",
    "copy_p": "another name that releases give 'copy'",
    "eq_to": "total order, inside sort comparators",
    "le_to": "total order, inside sort comparators",
    "lt_to": "total order, inside sort comparators",
    "stack": "newer releases bind it for jnp.stack",
    "unstack": "newer releases bind it for jnp.unstack",
    "mesh_cast": "explicit meshes",
    "reshard": "explicit meshes",
    "sharding_constraint": "tested with a mesh",
    "constrain": "tested with a mesh",
    **dict.fromkeys(COLLECTIVES.split(), "tested under shard_map"),
}


def test_every_operation_of_the_table_has_an_example():
    assert POLYMORPHIC.keys() | OPERANDWISE == EXAMPLES.keys() | UNREACHED.keys()


def test_collectives():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")

    def local(x):
        total = lax.psum(x, "i") + lax.pmax(x, "i")
        gathered = lax.all_gather(x, "i", axis=0, tiled=True)
        shifted = lax.ppermute(x, "i", [(i, (i + 1) % 8) for i in range(8)])
        turned = lax.all_to_all(gathered, "i", 0, 0, tiled=True)
        scattered = lax.psum_scatter(gathered, "i", scatter_dimension=0, tiled=True)
        return total + shifted + turned.sum() + scattered

    def function(x):
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    x = normal(8, 4)
    program, result = retyped(function, [x], jnp.bfloat16)
    assert not result.fallbacks
    assert all(op.outputs[0].dtype == BFLOAT16 for op in operations(result.graph, "ppermute"))
    got = jax.jit(lambda x: program.apply({"0": x}, {})[0])(x.astype(jnp.bfloat16))
    np.testing.assert_allclose(got, function(x), rtol=0.05, atol=0.1)


def test_sharding_constraint():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    _, result = retyped(lambda x: lax.with_sharding_constraint(x * 2, sharding), [normal(8, 4)], jnp.bfloat16)
    (op,) = operations(result.graph, "sharding_constraint")
    assert op.outputs[0].dtype == BFLOAT16


def test_constrain():
    mesh = jax.sharding.AbstractMesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    _, result = retyped(lambda x: constrain(x * 2, mesh, spec), [normal(8, 4)], jnp.bfloat16)
    (op,) = operations(result.graph, "constrain")
    assert op.outputs[0].dtype == BFLOAT16


# -- literals, weak types, conversions --------------------------------------------------------------------------------


def test_literals_take_the_dtype_of_what_they_meet():
    program, result = retyped(lambda x: jnp.where(x > 0.5, 2.0 * x, 1.0) + 3, [A], jnp.bfloat16)
    assert all(op.outputs[0].dtype == BFLOAT16 for op in operations(result.graph, "mul"))
    x = A.astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(program)[0], (jnp.where(x > 0.5, 2.0 * x, 1.0) + 3).astype(jnp.float32))


def test_arrays_keep_theirs():
    """A float32 constant and a bfloat16 input meet in float32, as in JAX."""
    table = np.asarray(B)
    program, result = retyped(lambda x: x * 2 + table, [A], jnp.bfloat16)
    assert [op.outputs[0].dtype for op in operations(result.graph, "add")] == [FLOAT32]
    x = A.astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(program)[0], x * 2 + table)


def test_conversions_of_the_model_stay():
    def function(x):
        return jnp.sin(x.astype(jnp.float16).astype(jnp.float32)).astype(jnp.float16), x.astype(jnp.int32)

    program, result = retyped(function, [A], jnp.bfloat16)
    assert operations(result.graph, "sin")[0].inputs[0].dtype == FLOAT32
    for got, want in zip(run(program), function(A.astype(jnp.bfloat16)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_accumulator_that_the_model_asked_for():
    def function(x, y):
        return lax.dot(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=jnp.float32)

    _, result = retyped(function, [A, B], jnp.float16)
    (product,) = operations(result.graph, "dot_general")
    assert (product.inputs[0].dtype, product.outputs[0].dtype) == (BFLOAT16, FLOAT32)


def test_outputs_keep_their_dtypes():
    program, result = retyped(lambda x: (x, x + 1), [A], jnp.bfloat16)
    assert [v.dtype for v in result.graph.outputs] == [FLOAT32, FLOAT32]
    assert run(program)[0].dtype == FLOAT32


def test_nothing_changes_nothing():
    (captured,) = capture(lambda params: jnp.tanh(params["x"] @ params["x"]), {"x": A}).graphs.values()
    assert reinfer(captured.graph).graph is captured.graph


def test_only_floating_inputs_change():
    (captured,) = capture(lambda params: params["x"] * 2, {"x": jnp.arange(3)}).graphs.values()
    with pytest.raises(InferenceError, match=r"i32\[3\] cannot become bf16"):
        reinfer(captured.graph, {captured.graph.inputs[0]: BFLOAT16})


def test_widest():
    assert widest(jnp.float16, jnp.bfloat16) == FLOAT32
    assert widest(jnp.bfloat16, jnp.float32) == FLOAT32
    assert widest(jnp.float16) == jnp.float16


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", True), ("bfloat16", True), ("float8_e4m3fn", False), ("int4", False), ("bool", False)],
)
def test_storage_formats_are_no_compute_dtypes(dtype, expected):
    assert retypable(jnp.dtype(dtype)) is expected
    assert not retypable(jax.random.key(0).dtype)


# -- bodies -----------------------------------------------------------------------------------------------------------


def test_relu_is_bound_as_recorded():
    """FACTS: `jax.nn.relu` traced in float32 fails on bfloat16 only when it runs."""
    program, result = retyped(lambda x: jax.nn.relu(x * 2), [A], jnp.bfloat16)
    assert dict(result.fallbacks) == {
        ("custom_jvp_call", "its derivative rule belongs to the body as it was recorded"): 1
    }
    np.testing.assert_array_equal(run(program)[0], jax.nn.relu(A.astype(jnp.bfloat16) * 2).astype(jnp.float32))
    gradient = jax.grad(lambda x: program.apply({"0": x}, {})[0].sum())(A.astype(jnp.bfloat16))
    np.testing.assert_array_equal(gradient, jnp.where(A > 0, 2, 0).astype(jnp.bfloat16))


def test_scan_carry_and_outputs():
    def function(x, w):
        def step(carry, row):
            carry = jnp.tanh(carry * row + 0.5)
            return carry, carry * 2

        return lax.scan(step, x, w)

    program, result = retyped(function, [V, A], jnp.bfloat16)
    (scan,) = operations(result.graph, "scan")
    assert [v.dtype for v in scan.outputs] == [BFLOAT16, BFLOAT16]
    for got, want in zip(run(program), function(V.astype(jnp.bfloat16), A.astype(jnp.bfloat16)), strict=True):
        np.testing.assert_allclose(got, want.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_scan_carry_that_has_to_widen():
    """The carry enters in bfloat16 and leaves in float32: JAX refuses that, so it is float32 throughout."""
    table = np.asarray(V)

    def function(x):
        return lax.scan(lambda carry, _: (carry * table, None), x, None, length=3)[0]

    program, result = retyped(function, [V], jnp.bfloat16)
    (scan,) = operations(result.graph, "scan")
    assert scan.outputs[0].dtype == FLOAT32
    np.testing.assert_allclose(run(program)[0], V.astype(jnp.bfloat16).astype(jnp.float32) * table**3, rtol=1e-5)


def test_while_cond_remat_and_jit():
    def function(x, y):
        x = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] * y)), (0, x))[1]
        x = lax.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, x)
        x = jax.checkpoint(lambda x: jnp.sin(x) * y)(x)
        return jax.jit(lambda x: x + 1)(x)

    program, result = retyped(function, [A, B], jnp.bfloat16)
    assert not result.fallbacks
    assert all(
        op.outputs[-1].dtype == BFLOAT16 for name in ("while", "cond", "jit") for op in operations(result.graph, name)
    )
    expected = function(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
    np.testing.assert_allclose(run(program)[0], expected.astype(jnp.float32), rtol=0.05, atol=0.02)


def test_branches_of_which_one_is_float32():
    table = np.asarray(A)

    def function(x):
        return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x + table, x)

    _, result = retyped(function, [A], jnp.bfloat16)
    assert operations(result.graph, "cond")[0].outputs[0].dtype == FLOAT32


def test_bodies_that_do_not_change_are_shared():
    inner = jax.jit(lambda x: jnp.tanh(x) * 2)

    def function(x, n):
        return inner(x), inner(n.astype(jnp.float32))

    (captured,) = capture(
        lambda p: function(p["x"], p["n"]), {"x": A, "n": jnp.arange(16).reshape(4, 4)}
    ).graphs.values()
    (x,) = (v for v in captured.graph.inputs if v.dtype == FLOAT32)
    result = reinfer(captured.graph, {x: BFLOAT16})
    first, second = (op.bodies[0] for op in operations(result.graph, "jit"))
    untouched = operations(captured.graph, "jit")[0].bodies[0]
    assert first is not untouched
    assert second is untouched


def test_policy_that_never_settles():
    class Restless(Policy):
        def carried_on(self, before, after):
            from compax.infer import Kind

            return Kind(BFLOAT16 if before.dtype == FLOAT32 else FLOAT32, False)

    with pytest.raises(InferenceError, match="'scan' carries find no dtypes that stay the same"):
        retyped(lambda x: lax.scan(lambda c, _: (c * 2, None), x, None, length=2)[0], [V], jnp.bfloat16, Restless())


# -- random programs --------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "product": lambda x, w: x @ w,
    "sum": lambda x, w: x + w,
    "tanh": lambda x, w: jnp.tanh(x),
    "relu": lambda x, w: jax.nn.relu(x),
    "softmax": lambda x, w: jax.nn.softmax(x),
    "normalize": lambda x, w: x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6),
    "scan": lambda x, w: lax.scan(lambda c, r: (jnp.tanh(c * r), c), x, w)[0],
    "accumulate": lambda x, w: lax.scan(lambda c, r: (c + r, c @ w), jnp.zeros_like(w[0]), x)[1],
    "fori": lambda x, w: lax.fori_loop(0, 2, lambda i, c: jnp.sin(c @ w) + i, x),
    "cond": lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: jnp.exp(-jnp.abs(x)), x),
    "remat": lambda x, w: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x),
    "jit": lambda x, w: jax.jit(lambda x, w: x * 0.5 + w)(x, w),
    "gather": lambda x, w: w[jnp.argmax(x, -1) % 4] + x,
    "mask": lambda x, w: jnp.where(x > 0, x, jnp.finfo(jnp.float32).min * 0.1).clip(-3, 3),
    "integers": lambda x, w: jnp.round(x).astype(jnp.int32).astype(jnp.float32) + x,
    "scatter": lambda x, w: x.at[0].add(w[1]),
    "vmap": lambda x, w: jax.vmap(lambda row: jnp.dot(w, row))(x),
    "sort": lambda x, w: jnp.sort(x, -1) + jnp.cumsum(x, 0),
}


@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 1)), min_size=1, max_size=6))
def test_random_programs_survive(steps):
    """A change of dtypes, and mixed precision twice: what comes out verifies and has the dtypes that it had."""

    def function(params, x):
        for name, index in steps:
            x = STEPS[name](x, params[f"w{index}"])
        return x

    params = {"w0": A, "w1": B}
    retyped(lambda x, w0, w1: function({"w0": w0, "w1": w1}, x), [normal(4, 4, seed=3), A, B], jnp.bfloat16)
    program = capture(function, params, normal(4, 4, seed=3))
    result = Cast(strict=False).run(program, Context())
    verify(result.program)
    again = Cast(strict=False).run(result.program, Context())
    assert again.program is result.program
    assert result.program(normal(4, 4, seed=3)).dtype == FLOAT32
