"""Lowering: rules, what is unpacked and logged, operations with bodies, and what derivatives keep in memory."""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import stablehlo
from compax import ir
from compax.encoding import Encoded
from compax.errors import LoweringError
from compax.lowering import Call, Decode, Evaluator, find_rules, rule
from compax.passes.quantize.encoding import SimulatedArray
from encoded import decodes, lower, shape_of, stored, values

D = 16


# -- Rules ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plain(Encoded):
    """An encoding without layout methods. Each test makes classes of its own, so that its rules meet no other test."""

    format: ClassVar[str] = "plain"
    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def decode(self) -> jax.Array:
        return self.array

    def spec(self, spec: PartitionSpec) -> "Plain":
        return dataclasses.replace(self, array=spec)

    def manual(self, spec: PartitionSpec) -> "Plain":
        return self

    def stacked(self, length: int) -> "Plain":
        return self


def subclass(base: type[Plain]) -> type[Plain]:
    """A new class of encodings; rules of its base serve it too."""
    cls = dataclasses.dataclass(frozen=True)(type("Derived", (base,), {}))
    return jax.tree_util.register_dataclass(cls, data_fields=["array"], meta_fields=[])


def test_the_most_specific_rule_is_chosen() -> None:
    """The nearest class first, then this platform before any."""
    base = subclass(Plain)
    near = subclass(base)

    def make(name: str) -> Callable[[Call], list[Any]]:
        return lambda call: [jnp.full(call.op.outputs[0].shape, float(name))]

    general = rule("sin", base)(make("1"))
    on_tpu = rule("sin", base, "tpu")(make("2"))
    derived = rule("sin", near)(make("3"))
    assert list(find_rules("sin", base, "cpu")) == [general]
    assert list(find_rules("sin", base, "tpu")) == [on_tpu, general]
    assert list(find_rules("sin", near, "cpu")) == [derived, general]
    assert list(find_rules("sin", near, "tpu")) == [derived, on_tpu, general]
    assert list(find_rules("cos", near, "tpu")) == []
    assert list(find_rules("sin", Plain, "cpu")) == []
    graph = ir.trace(jnp.sin, shape_of(values(3)))
    assert [float(Evaluator(p).run(graph, [base(values(3))])[0][0]) for p in ("cpu", "tpu")] == [1.0, 2.0]


def test_a_rule_is_registered_once() -> None:
    cls = subclass(Plain)
    rule("sin", cls)(lambda call: None)
    with pytest.raises(AssertionError, match="exists"):
        rule("sin", cls)(lambda call: None)


def test_a_rule_may_decline() -> None:
    """The next rule is asked, then those of the next operand; when all decline, the operands are unpacked."""
    cls = subclass(Plain)
    asked = []

    def decline(name: str) -> Callable[[Call], None]:
        return lambda call: asked.append((name, call.index))

    rule("add", cls)(decline("general"))
    rule("add", cls, jax.default_backend())(decline("platform"))
    x, y = cls(values(3)), cls(values(3, seed=1))
    np.testing.assert_array_equal(lower(jnp.add, x, y)(x, y), x.array + y.array)
    assert asked == [("platform", 0), ("general", 0), ("platform", 1), ("general", 1)]


def test_a_nested_encoding_hands_on_to_what_it_wraps() -> None:
    cls = subclass(Plain)

    @rule("dot_general", cls)
    def unwrap(call: Call) -> list[Any]:
        operands = list(call.operands)
        operands[call.index] = call.encoded.array
        return call.again(call.op, operands)

    x, w = values(4, D), cls(stored(D, D))
    np.testing.assert_array_equal(lower(jnp.matmul, x, w)(x, w), lower(jnp.matmul, x, w.array)(x, w.array))
    assert decodes(jnp.matmul, x, w) == []


def test_an_operation_of_ours_without_its_pass() -> None:
    value = ir.trace(jnp.sin, shape_of(values(3))).inputs[0]
    op = ir.Op("no such operation", (value,), (ir.Value(value.aval),), {})
    with pytest.raises(LoweringError, match="'no such operation'; import the pass"):
        Evaluator().apply(op, [values(3)])


# -- What is unpacked -------------------------------------------------------------------------------------------------


def test_unpacking_is_logged_with_its_bytes() -> None:
    found = decodes(lambda w: jnp.tanh(w) + jnp.sin(w), stored(4, D))
    assert found == [
        Decode("tanh", "int8", (4, D), 4 * D * 4, loop=False),
        Decode("sin", "int8", (4, D), 4 * D * 4, loop=False),
    ]


def test_a_rule_unpacks_nothing() -> None:
    assert decodes(lambda x, w: x @ w, values(4, D), stored(D, D)) == []


def test_unpacking_in_a_loop_is_marked() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ jnp.tanh(w), None), x, w)[0]

    (found,) = decodes(function, values(4, D), stored(3, D, D))
    assert (found.operation, found.shape, found.loop) == ("tanh", (D, D), True)


def test_an_output_that_is_an_encoding_is_unpacked() -> None:
    (found,) = decodes(lambda w: w.T, stored(4, D))
    assert found.operation == "output"


def test_an_unknown_primitive_gets_the_dense_array() -> None:
    w = stored(D, D)
    for function in (jnp.linalg.cholesky, jnp.linalg.inv, lambda w: jnp.fft.fft(w).real, lambda w: jnp.sort(w)):

        def of_a_definite_matrix(w: jax.Array, function: Any = function) -> jax.Array:
            return function(w @ w.T + 100 * jnp.eye(D))

        np.testing.assert_allclose(
            lower(of_a_definite_matrix, w)(w), of_a_definite_matrix(w.decode()), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in a nested jit"])
def test_unpacking_a_stack_in_every_turn_of_a_loop_is_an_error(nested: bool) -> None:
    """The message says what would happen, to what, and what to do."""

    def layer(w: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.sin(w)[i]

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        taken = jax.jit(layer) if nested else layer
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ taken(w, i), x)

    with pytest.raises(LoweringError, match=r"'sin' inside a loop of 3 turns .* int8\[3, 16, 16\].*slice the layer"):
        decodes(function, values(4, D), stored(3, D, D))


def test_a_slice_of_a_stack_in_a_loop_is_no_error() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

    x, w = values(4, D), stored(3, D, D)
    assert decodes(function, x, w) == []
    np.testing.assert_allclose(lower(function, x, w)(x, w), function(x, w.decode()), rtol=2e-5, atol=1e-6)


def test_a_square_weight_whose_size_is_the_length_of_the_loop_is_no_stack() -> None:
    """Unpacked once more than needed, and logged, but no stack of layers."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ jnp.tanh(w), None), x, None, length=D)[0]

    (found,) = decodes(function, values(4, D), stored(D, D))
    assert found.loop


# -- Bodies -----------------------------------------------------------------------------------------------------------

MESH_AXIS = "model"


def sharded(x: jax.Array, w: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((8,), (MESH_AXIS,), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(None, MESH_AXIS), PartitionSpec(MESH_AXIS, None))
    return jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, MESH_AXIS), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
    )(x, w)


def carried(x: jax.Array, w: jax.Array) -> jax.Array:
    """The weight travels in the carry of a scan and of a while loop, unchanged."""
    x, w = jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), None, length=2)[0]
    return jax.lax.while_loop(lambda c: c[2] < 3, lambda c: (jnp.tanh(c[0] @ c[1]), c[1], c[2] + 1), (x, w, 0))[0]


def constrained(x: jax.Array, w: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec("a", "b")))


def placed(x: jax.Array, w: jax.Array) -> jax.Array:
    """A nested `jit` that asks for shardings."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shardings = (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("a", "b")))
    return jax.jit(lambda x, w: x @ w, in_shardings=shardings, out_shardings=shardings[0])(x, w)


BODIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jit": lambda x, w: jax.jit(lambda x, w: jnp.tanh(x @ w))(x, w),
    "jit with shardings": placed,
    "remat": lambda x, w: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w),
    "scan over activations": lambda x, w: jax.lax.scan(lambda c, r: (c, r @ w), 0, x)[1],
    "scan in reverse": lambda x, w: jax.lax.scan(lambda c, r: (c + jnp.sum(r @ w), r @ w), 0.0, x, reverse=True)[1],
    "scan, carried": carried,
    "while, closed over": lambda x, w: jax.lax.while_loop(
        lambda c: (c[1] < 3) & (jnp.sum(c[0] @ w) < 1e9), lambda c: (jnp.tanh(c[0] @ w), c[1] + 1), (x, 0)
    )[0],
    "cond, taken": lambda x, w: jax.lax.cond(x[0, 0] > -9, lambda w: x @ w, lambda w: x, w),
    "cond, not taken": lambda x, w: jax.lax.cond(x[0, 0] < -9, lambda w: x @ w, lambda w: x, w),
    "cond, returned": lambda x, w: x @ jax.lax.cond(x[0, 0] > -9, lambda w: w, lambda w: w.T, w),
    "switch": lambda x, w: jax.lax.switch(2, [lambda w: x, lambda w: x @ w, lambda w: x @ w.T], w),
    "shard_map": sharded,
    "sharding constraint": constrained,
    "vmap": lambda x, w: jax.vmap(lambda r: jnp.dot(r, w))(x),
    "custom_jvp": lambda x, w: x @ jax.nn.relu(w),
    "custom_linear_solve": lambda x, w: jax.lax.custom_linear_solve(
        lambda v: v + 0.01 * (v @ w), x, lambda _, b: b, lambda _, b: b
    ),
    "jit in scan in remat": lambda x, w: jax.checkpoint(
        lambda x: jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w) / 4, None), x, None, length=2)[0]
    )(x),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_take_encoded_operands(name: str, compiled: bool) -> None:
    function = BODIES[name]
    x, w = values(8, D), stored(D, D)
    lowered = lower(function, x, w)
    result = (jax.jit(lowered) if compiled else lowered)(x, w)
    np.testing.assert_allclose(result, function(x, w.decode()), rtol=2e-5, atol=1e-5)
    unpacks = {"cond, returned", "custom_jvp", "custom_linear_solve"}
    assert bool(decodes(function, x, w)) == (name in unpacks)


@pytest.mark.parametrize("name", sorted(BODIES.keys() - {"scan, carried", "while, closed over"}))
def test_gradients_reach_activations_through_bodies(name: str) -> None:
    function = BODIES[name]
    x, w = values(8, D), stored(D, D)
    lowered = lower(function, x, w)
    ours = jax.grad(lambda x: jnp.sum(jnp.cos(lowered(x, w))))(x)
    dense = w.decode()
    theirs = jax.grad(lambda x: jnp.sum(jnp.cos(function(x, dense))))(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BODIES)
def test_dense_operands_pass_through_rebuilt_bodies_unchanged(name: str) -> None:
    """Entering every body without need changes no bit."""
    x, w = values(8, D), values(D, D)
    function = BODIES[name]
    np.testing.assert_array_equal(lower(function, x, w, rebuild=True)(x, w), lower(function, x, w)(x, w))


def test_what_does_not_touch_an_encoding_is_bound_as_it_was() -> None:
    """The float half of a program lowers to the text that it had."""

    def half(x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(jax.nn.softmax(x), approximate=False)
        return jax.lax.scan(lambda c, _: (jax.nn.relu(c * 2), None), x, None, length=3)[0]

    x, w = values(8, D), stored(D, D)
    whole = lower(lambda x, w: (half(x), x @ w), x, w)
    text = jax.jit(lambda x: whole(x, w)[0]).trace(x).lower().as_text()
    product = stablehlo.lower(lambda x: lower(jnp.matmul, x, w)(x, w), x)
    theirs = operations(stablehlo.lower(half, x))
    assert operations(text) - operations(product) == theirs - operations(product)


def operations(text: str) -> collections.Counter[str]:
    """How often each operation of StableHLO occurs."""
    return collections.Counter(re.findall(r"stablehlo\.\w+", text))


def test_an_observer_sees_every_operation_in_every_body() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        layer = jax.jit(lambda x: jnp.tanh(x @ w))
        return jax.lax.scan(lambda x, _: (jnp.sin(x), None), layer(layer(x)), None, length=2)[0]

    seen: list[str] = []
    graph = ir.trace(function, shape_of(values(4, D)), shape_of(values(D, D)))
    evaluator = Evaluator(observer=lambda op, outputs: seen.append(op.name), rebuild=True)
    evaluator.run(graph, [values(4, D), values(D, D)])
    assert (seen.count("tanh"), seen.count("sin"), seen.count("scan")) == (2, 1, 1)


# -- Functions --------------------------------------------------------------------------------------------------------


def deep(num_layers: int, wrap: Callable[..., Any]) -> Callable[..., Any]:
    layer = wrap(lambda x, w: jnp.tanh(x @ w))

    def function(x: jax.Array, *weights: jax.Array) -> jax.Array:
        for w in weights:
            x = layer(x, w)
        return x

    return function


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))], ids=["jit", "remat", "both"]
)
def test_equal_layers_stay_one_function(wrap: Callable[..., Any]) -> None:
    """The lowered program of 64 layers has as many functions as that of two."""
    counts = []
    for num_layers in (2, 64):
        x, weights = values(4, D), [stored(D, D) for _ in range(num_layers)]
        lowered = lower(deep(num_layers, wrap), x, *weights)
        counts.append(len(stablehlo.functions(stablehlo.lower(lowered, x, *weights))))
    assert counts[0] == counts[1]


def test_one_body_for_different_encodings() -> None:
    """Layers of one traced function, some encoded and some not, each get what they need."""
    x = values(4, D)
    weights = [stored(D, D), values(D, D), SimulatedArray(values(D, D), (-2,)).prepared(), stored(D, D, reduced=(-1,))]
    function = deep(4, jax.jit)
    result = lower(function, x, *weights)(x, *weights)
    dense = [w.decode() if isinstance(w, Encoded) else w for w in weights]
    np.testing.assert_allclose(result, function(x, *dense), rtol=2e-5, atol=1e-6)
