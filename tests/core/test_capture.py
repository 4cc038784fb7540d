"""Capture of NNX modules: what becomes a parameter, what state, and that the model is only read."""

import collections
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from compax import _jax, ir
from compax.errors import CaptureError, SignatureError
from compax.program import capture

D = 8


def rows(count: int = 4, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def snapshot(model: nnx.Module) -> tuple[Any, dict[Any, Any]]:
    """The structure of a module with all flags, and the very arrays that it holds."""
    graphdef, state = nnx.split(model)
    return graphdef, {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(state)}


def assert_untouched(model: nnx.Module, before: tuple[Any, dict[Any, Any]]) -> None:
    graphdef, arrays = snapshot(model)
    assert graphdef == before[0]
    assert arrays.keys() == before[1].keys()
    assert all(arrays[path] is before[1][path] for path in arrays)


def assert_same(left: Any, right: Any) -> None:
    """Equal structures, dtypes, weak types and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
        np.testing.assert_array_equal(a, b)


def primitives(program: Any) -> collections.Counter[str]:
    """How often each primitive occurs in the default graph, bodies included."""
    return collections.Counter(op.name for _, op in ir.walk(program.graph().graph))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Network(nnx.Module):
    """Blocks with batch statistics and dropout: parameters, state, and two modes."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x))

    def features(self, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
        return self.blocks[0](x) * scale


# -- NNX --------------------------------------------------------------------------------------------------------------


def test_parameters_and_state_are_told_apart_by_path() -> None:
    program = capture(Network(nnx.Rngs(0)), rows(), mode="eval")
    expected = {f"blocks.{i}.{name}.{leaf}" for i in (0, 1) for name in ("up", "down") for leaf in ("kernel", "bias")}
    assert set(program.params) == expected | {"norm.scale", "norm.bias"}
    assert set(program.state) == {"norm.mean", "norm.var", "dropout.rngs.count", "dropout.rngs.key"}
    assert program.params["blocks.1.up.kernel"].shape == (D, 2 * D)


@pytest.mark.parametrize("mode", [None, "train"])
def test_parameters_are_the_models_own_arrays(mode: str | None) -> None:
    model = Network(nnx.Rngs(0))
    program = capture(model, rows(), mode=mode)
    assert program.params["blocks.0.up.kernel"] is model.blocks[0].up.kernel.get_raw_value()


@pytest.mark.parametrize("mode", [None, "train", "eval"])
def test_capture_and_calls_leave_the_model_untouched(mode: str | None) -> None:
    model = Network(nnx.Rngs(0))
    before = snapshot(model)
    program = capture(model, rows(), mode=mode)
    assert_untouched(model, before)
    program(rows())
    program.apply(program.params, program.state, rows())
    program.specialize(rows(5))
    assert_untouched(model, before)
    model(rows())  # and it runs: no tracer leaked into it


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mode_switches_a_copy(mode: str) -> None:
    model = Network(nnx.Rngs(0))
    program = capture(model, rows(), mode=mode)
    reference = nnx.clone(model)
    getattr(reference, mode)()
    expected = nnx.jit(lambda model, x: model(x))(reference, rows())
    output, state, aux = jax.jit(program.apply)(program.params, program.state, rows())
    assert_same(output, expected)
    assert aux == {}
    after = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(reference))}
    for path in program.state:
        left, right = state[path], after[path]
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert_same(left, right)


def test_without_a_mode_the_models_own_flags_count() -> None:
    model = Network(nnx.Rngs(0))
    model.eval()
    assert_same(capture(model, rows())(rows()), capture(model, rows(), mode="eval")(rows()))
    assert "random_bits" not in primitives(capture(model, rows()))
    model.train()
    assert "random_bits" in primitives(capture(model, rows()))


def test_only_written_state_is_an_update() -> None:
    model = Network(nnx.Rngs(0))
    assert capture(model, rows(), mode="eval").graph().updates == ()
    updates = capture(model, rows(), mode="train").graph().updates
    assert set(updates) == {"norm.mean", "norm.var", "dropout.rngs.count"}


def test_a_call_keeps_no_change_of_state() -> None:
    program = capture(Network(nnx.Rngs(0)), rows(), mode="train")
    assert_same(program(rows()), program(rows()))
    assert int(program.state["dropout.rngs.count"]) == 0


def test_method() -> None:
    model = Network(nnx.Rngs(0))
    program = capture(model, rows(), method="features", scale=3.0)
    np.testing.assert_allclose(program(rows(), scale=2.0), model.features(rows(), scale=2.0), rtol=1e-6, atol=1e-6)
    assert set(program.params) == set(capture(model, rows()).params), "the store does not depend on the method"


def test_a_missing_method_is_named() -> None:
    with pytest.raises(CaptureError, match="Network has no method 'encode'"):
        capture(Network(nnx.Rngs(0)), rows(), method="encode")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match="'train', 'eval' or None, not 'test'"):
        capture(Network(nnx.Rngs(0)), rows(), mode="test")


def test_entries_share_one_store() -> None:
    model = Network(nnx.Rngs(0))
    program = capture(model, rows(), mode="train", entry="train")
    program = program.with_entry("eval", rows(2), mode="eval")
    program = program.with_entry("features", rows(2), method="features")
    assert list(program.entries) == ["train", "eval", "features"]
    evaluated = nnx.clone(model)
    evaluated.eval()
    np.testing.assert_allclose(program(rows(2), entry="eval"), evaluated(rows(2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(program(rows(2), entry="features"), model.features(rows(2)), rtol=1e-5, atol=1e-6)
    assert_same(program(rows()), capture(model, rows(), mode="train")(rows()))


def test_a_second_entry_sees_changed_parameters() -> None:
    program = capture(Network(nnx.Rngs(0)), rows(), mode="train", entry="train")
    program = program.replace(params=jax.tree.map(lambda p: 0 * p, program.params))
    program = program.with_entry("features", rows(), method="features")
    assert_same(program(rows(), entry="features"), rows())


def test_an_entry_needs_a_free_name_and_a_known_one() -> None:
    program = capture(Network(nnx.Rngs(0)), rows(), mode="eval")
    with pytest.raises(CaptureError, match="has an entry 'call' already"):
        program.with_entry("call", rows())
    with pytest.raises(SignatureError, match="no entry 'decode'; this program has: call"):
        program(rows(), entry="decode")


def test_loss_is_part_of_the_graph() -> None:
    def loss(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model(x) - y) ** 2)

    model = Network(nnx.Rngs(0))
    program = capture(model, rows(), rows(seed=1), mode="train", loss=loss)
    reference = nnx.clone(model)
    reference.train()
    expected, gradients = nnx.jit(nnx.value_and_grad(loss))(reference, rows(), rows(seed=1))
    value, actual = jax.jit(
        jax.value_and_grad(lambda params: program.apply(params, program.state, rows(), rows(seed=1))[0])
    )(program.params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path, gradient in nnx.to_flat_state(gradients):
        np.testing.assert_allclose(actual[".".join(map(str, path))], gradient[...], rtol=1e-4, atol=1e-6)


def test_loss_with_metrics() -> None:
    def loss(model: Network, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        error = model(batch["x"]) - batch["y"]
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error)), "count": jnp.asarray(error.size)}

    batch = {"x": rows(), "y": rows(seed=1)}
    program = capture(Network(nnx.Rngs(0)), batch, mode="eval", loss=loss)
    value, metrics = program(batch)
    assert value.shape == ()
    assert set(metrics) == {"largest", "count"}
    assert int(metrics["count"]) == rows().size


def test_a_shared_parameter_is_one_parameter() -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(11, D, rngs=rngs)
            self.first = Block(rngs)
            self.second = self.first

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.embed.attend(self.second(self.first(self.embed(tokens))))

    model = Tied(nnx.Rngs(0))
    program = capture(model, jnp.arange(5))
    assert len(program.params) == 5
    assert "embed.embedding" in program.params
    np.testing.assert_allclose(program(jnp.arange(5)), model(jnp.arange(5)), rtol=1e-5, atol=1e-5)


def test_one_cached_body_serves_many_layers() -> None:
    class Cached(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(3)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = call(block, x)
            return x

    call = nnx.jit(lambda block, x: block(x))
    model = Cached(nnx.Rngs(0))
    program = capture(model, rows())
    bodies = [op.bodies[0] for op in program.graph().graph.ops if op.name in ("jit", "pjit")]
    assert len(bodies) == 3
    assert len({id(body) for body in bodies}) == 1
    assert_same(program(rows()), nnx.jit(lambda model, x: model(x))(model, rows()))


def test_nnx_transformations_inside_the_model() -> None:
    class Transformed(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.stack = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(rngs(), 3))
            self.wrapped = Block(rngs)
            self.first, self.second = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x: jax.Array, flag: jax.Array) -> jax.Array:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)
            x = nnx.remat(lambda block, x: block(x))(self.wrapped, x)
            return nnx.cond(
                flag, lambda first, second, x: first(x), lambda first, second, x: second(x), self.first, self.second, x
            )

    model = Transformed(nnx.Rngs(0))
    before = snapshot(model)
    program = capture(model, rows(), jnp.asarray(True))
    assert {"scan", "cond"} <= set(primitives(program))
    run = nnx.jit(lambda model, x, flag: model(x, flag))
    for flag in (jnp.asarray(True), jnp.asarray(False)):
        assert_same(program(rows(), flag), run(nnx.clone(model), rows(), flag))
    assert_untouched(model, before)


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}], ids=["ref", "hijax"])
def test_variables_in_newer_modes(options: dict[str, bool]) -> None:
    model = Network(nnx.Rngs(0))
    expected = capture(model, rows(), mode="eval")(rows())
    newer = nnx.with_vars(model, **options)
    assert_same(capture(newer, rows(), mode="eval")(rows()), expected)


def test_sown_values_are_aux() -> None:
    class Sows(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.block = Block(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "hidden", x)
            x = self.block(x)
            self.sow(nnx.Intermediate, "hidden", x)
            self.sow(nnx.Intermediate, "total", jnp.sum(x))
            return x

    model = Sows(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sowing outside of nnx.capture is common in older models
        program = capture(model, rows())
    assert not hasattr(model, "hidden")
    output, state, aux = program.apply(program.params, program.state, rows())
    assert state == {}
    first, second = aux["hidden"]
    assert_same(first, rows())
    assert_same(second, output)
    np.testing.assert_allclose(aux["total"][0], output.sum(), rtol=1e-5)


def test_values_sown_before_capture_are_state() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(D))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = x * self.weight
            self.seen = nnx.Intermediate((y, x))
            return y

    model = Sows()
    model(rows())
    program = capture(model, rows())
    output, state, _ = program.apply(program.params, program.state, 2 * rows())
    assert_same(output, 2 * rows())
    assert {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)} == {np.asarray(output).tobytes()}


def test_arrays_without_a_variable_are_state() -> None:
    class Table(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(D))
            self.table = jnp.arange(D, dtype=jnp.float32)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.weight + self.table

    model = Table()
    program = capture(model, rows())
    assert (set(program.params), set(program.state)) == ({"weight"}, {"table"})
    np.testing.assert_allclose(program(rows()), model(rows()), rtol=1e-6)


def test_a_write_to_a_parameter_is_refused() -> None:
    class Decays(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(D))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.weight[...] = self.weight * 0.9
            return x * self.weight

    with pytest.raises(CaptureError, match=r"writes the parameter 'weight'; make it another kind of nnx\.Variable"):
        capture(Decays(), rows())


def test_a_parameter_that_is_assigned_itself_is_fine() -> None:
    class Assigns(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.full(D, 2.0))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.weight[...] = self.weight[...]
            return x * self.weight

    assert_same(capture(Assigns(), rows())(rows()), 2 * rows())


def test_abstract_models_need_no_memory() -> None:
    model = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    program = capture(model, jax.ShapeDtypeStruct((4, D), jnp.float32), mode="eval")
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in program.params.values())
    real = capture(Network(nnx.Rngs(0)), rows(), mode="eval")
    output, _, _ = program.apply(real.params, real.state, rows())
    np.testing.assert_allclose(output, real(rows()), rtol=1e-5, atol=1e-6)
    assert program.graph().signature == real.graph().signature


def test_an_abstract_model_of_seven_billion_parameters() -> None:
    class Huge(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([nnx.Linear(30_000, 30_000, use_bias=False, rngs=rngs) for _ in range(8)])

        def __call__(self, x: jax.Array) -> jax.Array:
            return functools.reduce(lambda x, layer: layer(x), self.layers, x)

    program = capture(nnx.eval_shape(lambda: Huge(nnx.Rngs(0))), jax.ShapeDtypeStruct((1, 30_000), jnp.float32))
    assert sum(p.size for p in program.params.values()) == 8 * 30_000**2


def test_python_control_flow_on_values_is_refused_with_the_cause() -> None:
    class Branches(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x if jnp.sum(x) > 0 else -x

    with pytest.raises(CaptureError, match=r"fails while 'call' is traced with x: f32\[4,8\]") as caught:
        capture(Branches(), rows())
    assert isinstance(caught.value.__cause__, jax.errors.TracerBoolConversionError)


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(CaptureError, match=r"cannot capture a dict: give an nnx\.Module"):
        capture({"w": rows()}, rows())
    with pytest.raises(CaptureError, match="variables belong to Linen modules"):
        capture(Block(nnx.Rngs(0)), rows(), variables={"params": {}})


# -- meshes -----------------------------------------------------------------------------------------------------------


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


class Constrained(nnx.Module):
    """Names mesh axes in a constraint, so that it runs under a mesh alone."""

    def __init__(self, rngs: nnx.Rngs):
        self.block = Block(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(self.block(x), PartitionSpec("data", "model"))


def test_a_model_that_needs_a_mesh_in_context() -> None:
    model = Constrained(nnx.Rngs(0))
    with jax.set_mesh(mesh(AxisType.Auto)):
        program = capture(model, rows())
        output = program(rows())
        assert output.sharding.spec == PartitionSpec("data", "model")
        np.testing.assert_allclose(output, nnx.jit(lambda model, x: model(x))(model, rows()), rtol=1e-5, atol=1e-6)
        assert len(program.specialize(rows()).graphs) == 1
    assert program.graph().signature.mesh is not None


def test_another_mesh_is_another_graph() -> None:
    model = Block(nnx.Rngs(0))
    program = capture(model, rows())
    with jax.set_mesh(mesh(AxisType.Auto)):
        assert len(program.specialize(rows()).graphs) == 2
    with pytest.raises(CaptureError, match="fails while 'call' is traced"):
        capture(Constrained(nnx.Rngs(0)), rows())


def test_explicit_shardings_are_part_of_the_signature() -> None:
    explicit = mesh(AxisType.Explicit)
    with jax.set_mesh(explicit):
        x = jax.device_put(rows(), NamedSharding(explicit, PartitionSpec("data", None)))
        program = capture(Block(nnx.Rngs(0)), x)
        output = program(x)
        assert _jax.abstract(output).sharding.spec == PartitionSpec("data", None)
        assert len(program.specialize(rows()).graphs) == 2
