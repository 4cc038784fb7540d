"""Calls of a captured program: arguments of every kind, and signatures."""

import collections
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compax.errors import CaptureError, SignatureError
from compax.program import Program, capture

D = 8


def rows(count: int = 4, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def scaled(w: jax.Array, x: Any, factor: Any = 2.0) -> jax.Array:
    return x @ w * factor


def linear_program(*inputs: Any, **options: Any) -> Program:
    return capture(scaled, jnp.eye(D), *(inputs or (rows(),)), **options)


def names(program: Program) -> list[str]:
    return [tag.path for tag in program.graph().inputs if tag.kind == "argument"]


# -- arrays and pytrees -----------------------------------------------------------------------------------------------


class Pair(collections.namedtuple("Pair", ["left", "right"])):
    pass


@flax.struct.dataclass
class Batch:
    tokens: jax.Array
    kind: str = flax.struct.field(pytree_node=False, default="train")


def test_arguments_are_named_after_the_models_signature() -> None:
    def model(params: Any, batch: dict[str, Any], scale: Any, *, mask: Any) -> Any:
        return batch["x"] * params + batch["pair"].left + scale + mask

    batch = {"x": rows(), "pair": Pair(jnp.ones(D), None)}
    program = capture(model, jnp.ones(D), batch, 2.0, mask=rows())
    assert names(program) == ["batch.pair.left", "batch.x", "scale", "mask"]


def test_pytrees_in_and_out() -> None:
    def model(params: Any, batch: Batch, extra: tuple[Any, ...]) -> Any:
        assert batch.kind == "train"
        return {"pair": Pair(batch.tokens * params, None), "label": "done", "list": [extra[0], 3]}

    program = capture(model, jnp.ones(D), Batch(rows()), (1.0, None))
    output = program(Batch(rows()), (1.0, None))
    assert isinstance(output["pair"], Pair)
    assert output["pair"].right is None
    assert output["label"] == "done"
    np.testing.assert_array_equal(output["list"][1], 3)
    with pytest.raises(CaptureError):
        program(Batch(rows(), kind="eval"), (1.0, None))  # static data of a pytree is part of the signature


def test_numpy_arrays_and_shapes_are_examples_as_good_as_arrays() -> None:
    program = linear_program(jax.ShapeDtypeStruct((4, D), jnp.float32))
    np.testing.assert_array_equal(program(np.asarray(rows())), program(rows()))
    assert len(program.specialize(np.asarray(rows())).graphs) == 1


def test_keyword_and_positional_arguments_both_work() -> None:
    program = linear_program(rows(), factor=3.0)
    np.testing.assert_allclose(program(rows(), factor=5.0), 5 * rows(), rtol=1e-6)
    np.testing.assert_allclose(program(rows(), 5.0), 5 * rows(), rtol=1e-6)
    np.testing.assert_allclose(program(x=rows()), 2 * rows(), rtol=1e-6)


def test_arguments_that_may_be_none() -> None:
    def model(params: Any, x: jax.Array, mask: Any = None) -> jax.Array:
        return x * params if mask is None else jnp.where(mask, x, 0)

    program = capture(model, jnp.ones(D), rows(), None)
    np.testing.assert_array_equal(program(rows(), None), rows())
    np.testing.assert_array_equal(program(rows()), rows())
    np.testing.assert_array_equal(program(rows(), rows() > 0), jnp.where(rows() > 0, rows(), 0))


def test_random_keys_are_arguments() -> None:
    def model(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return x * params + jax.random.normal(key, x.shape)

    for make in (jax.random.key, jax.random.PRNGKey):
        program = capture(model, jnp.ones(D), rows(), make(0))
        expected = jax.jit(model)(jnp.ones(D), rows(), make(1))
        np.testing.assert_array_equal(program(rows(), make(1)), expected)


# -- scalars and weak types -------------------------------------------------------------------------------------------


def test_python_numbers_are_traced_and_weak() -> None:
    program = linear_program(rows(), 2.0)
    np.testing.assert_allclose(program(rows(), 7.0), 7 * rows(), rtol=1e-6)
    assert len(program.specialize(rows(), 9.0).graphs) == 1


def test_a_strong_scalar_is_another_signature() -> None:
    half = rows().astype(jnp.bfloat16)
    program = capture(scaled, jnp.eye(D, dtype=jnp.bfloat16), half, 2.0)
    assert program(half, 2.0).dtype == jnp.bfloat16
    assert program(half, jnp.float32(2.0)).dtype == jnp.float32
    assert program(half, np.float32(2.0)).dtype == jnp.float32
    assert program(half, 2).dtype == jnp.bfloat16
    assert program(half, jnp.asarray(2.0)).dtype == jnp.bfloat16, "jnp.asarray of a Python number is weak"


def test_weak_types_come_out_as_they_do_under_jit() -> None:
    def model(params: Any, x: Any) -> Any:
        return x * 2, x * params

    for x in (1.5, 3, jnp.asarray(1.5), np.float32(1.5)):
        program = capture(model, jnp.asarray(1.0, jnp.bfloat16), x)
        for left, right in zip(program(x), jax.jit(model)(jnp.asarray(1.0, jnp.bfloat16), x), strict=True):
            assert (left.dtype, left.weak_type, float(left)) == (right.dtype, right.weak_type, float(right))


def test_weakly_typed_parameters() -> None:
    params = {"scale": jnp.asarray(2.0)}  # jnp.asarray of a Python number is weak
    half = rows().astype(jnp.bfloat16)
    program = capture(lambda params, x: x * params["scale"], params, half)
    expected = jax.jit(lambda params, x: x * params["scale"])(params, half)
    assert program(half).dtype == expected.dtype


# -- static and constant arguments ------------------------------------------------------------------------------------


def test_booleans_and_strings_are_static() -> None:
    def model(params: Any, x: jax.Array, flag: bool, style: str = "plain") -> jax.Array:
        return (x if flag else -x) * (1 if style == "plain" else 10)

    program = capture(model, jnp.ones(D), rows(), True, style="plain")
    np.testing.assert_array_equal(program(rows(), True, style="plain"), rows())
    np.testing.assert_array_equal(program(rows(), False, style="plain"), -rows())
    np.testing.assert_array_equal(program(rows(), False, style="tenfold"), -10 * rows())
    assert len(program.graphs) == 1, "the program itself does not change"
    assert len(program.specialize(rows(), False, style="plain").graphs) == 2


def test_declared_static_arguments() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        power: int

    def model(params: Any, x: jax.Array, options: Options, times: int) -> jax.Array:
        for _ in range(times):
            x = x**options.power
        return x * params

    program = capture(model, jnp.ones(D), rows(), Options(2), 2, static=("times",))
    np.testing.assert_allclose(program(rows(), Options(2), 2), rows() ** 4, rtol=1e-5)
    np.testing.assert_allclose(program(rows(), Options(2), times=1), rows() ** 2, rtol=1e-5)
    np.testing.assert_allclose(program(rows(), Options(1), 2), rows(), rtol=1e-5)


def test_a_static_value_must_be_hashable() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(SignatureError, match="neither an array nor hashable: Unhashable"):
        capture(lambda params, x, options: x * params, jnp.ones(D), rows(), Unhashable())


def masked(params: jax.Array, x: jax.Array, mask: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    return jnp.where(mask, x, 0) * params


def test_constant_arguments_are_part_of_the_graph() -> None:
    mask = rows() > 0
    program = capture(masked, jnp.ones(D), rows(), mask, constant=("mask",))
    assert names(program) == ["x"]
    np.testing.assert_array_equal(program(rows(), mask), jnp.where(mask, rows(), 0))
    same = jnp.array(mask, copy=True)
    assert len(program.specialize(rows(), same).graphs) == 1, "equal values share a graph"
    np.testing.assert_array_equal(program(rows(), ~mask), jnp.where(mask, 0, rows()))
    assert len(program.specialize(rows(), ~mask).graphs) == 2
    np.testing.assert_array_equal(program(rows(), mask=mask), jnp.where(mask, rows(), 0))


def test_a_constant_argument_needs_a_value() -> None:
    mask = rows() > 0
    with pytest.raises(SignatureError, match="'mask' is declared constant, but it has no value"):
        capture(masked, jnp.ones(D), rows(), jax.ShapeDtypeStruct(mask.shape, bool), constant=("mask",))
    program = capture(masked, jnp.ones(D), rows(), mask, constant=("mask",))
    with pytest.raises(SignatureError, match="'mask' is declared constant, but it has no value"):
        jax.jit(lambda mask: program(rows(), mask))(mask)


@pytest.mark.parametrize("option", ["constant", "static"])
def test_a_declared_name_must_be_an_argument(option: str) -> None:
    with pytest.raises(SignatureError, match=r"'masks'.*mask, x"):
        capture(masked, jnp.ones(D), rows(), rows() > 0, **{option: ("masks",)})


def test_a_declared_argument_may_not_be_left_out() -> None:
    program = capture(masked, jnp.ones(D), rows(), rows() > 0, constant=("mask",))
    with pytest.raises(SignatureError, match=r"'mask' is declared constant or static.*it has: x"):
        program(rows())


# -- NNX objects among the arguments ----------------------------------------------------------------------------------


class Cache(nnx.Module):
    def __init__(self, length: int = 6):
        self.rows = nnx.Cache(jnp.zeros((length, D)))
        self.position = nnx.Cache(jnp.zeros((), jnp.int32))

    def append(self, x: jax.Array) -> None:
        self.rows[...] = jax.lax.dynamic_update_slice(self.rows[...], x, (self.position[...], 0))
        self.position[...] = self.position[...] + x.shape[0]


class Remembers(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.full(D, 2.0))

    def __call__(self, x: jax.Array, cache: Cache) -> jax.Array:
        cache.append(x * self.weight)
        return cache.rows.sum(axis=0)

    def two(self, x: jax.Array, keys: Cache, values: Cache) -> jax.Array:
        keys.append(x)
        values.append(2 * x)
        return keys.rows.sum() + values.rows.sum()


def test_a_cache_is_updated_in_place() -> None:
    cache = Cache()
    program = capture(Remembers(), rows(1), cache)
    np.testing.assert_array_equal(cache.rows[...], 0), "capture only reads it"
    assert names(program) == ["x", "cache.position", "cache.rows"]
    reference, model = Cache(), Remembers()
    for seed in range(3):
        output = program(rows(1, seed=seed), cache)
        np.testing.assert_allclose(output, model(rows(1, seed=seed), reference), rtol=1e-6)
    np.testing.assert_allclose(cache.rows[...], reference.rows[...], rtol=1e-6)
    assert int(cache.position[...]) == 3


def test_a_cache_is_updated_in_place_under_jit() -> None:
    cache = Cache()
    program = capture(Remembers(), rows(1), cache)

    @nnx.jit
    def step(params: Any, x: jax.Array, cache: Cache) -> jax.Array:
        output, _, _ = program.apply(params, {}, x, cache)
        return output

    for _ in range(2):
        step(program.params, rows(1), cache)
    assert int(cache.position[...]) == 2
    np.testing.assert_allclose(cache.rows[:2], 2 * jnp.concatenate([rows(1), rows(1)]), rtol=1e-6)


def test_one_cache_passed_twice_is_one_cache() -> None:
    model, cache, reference = Remembers(), Cache(), Cache()
    program = capture(model, rows(1), cache, cache, method="two")
    assert len(names(program)) == 3
    output = program(rows(1), cache, cache)
    np.testing.assert_allclose(output, model.two(rows(1), reference, reference), rtol=1e-6)
    np.testing.assert_allclose(cache.rows[...], reference.rows[...], rtol=1e-6)
    assert int(cache.position[...]) == 2
    apart = (Cache(), Cache())
    assert len(program.specialize(rows(1), *apart).graphs) == 2, "sharing is part of the signature"
    program(rows(1), *apart)
    assert [int(c.position[...]) for c in apart] == [1, 1]


def test_caches_inside_pytrees() -> None:
    class Layers(nnx.Module):
        def __call__(self, x: jax.Array, caches: dict[str, Any]) -> jax.Array:
            for cache in caches["layers"]:
                cache.append(x)
            return x

    caches = {"layers": [Cache(), Cache()]}
    program = capture(Layers(), rows(1), caches)
    assert names(program)[1:3] == ["caches.layers.0.position", "caches.layers.0.rows"]
    program(rows(1), caches)
    assert [int(cache.position[...]) for cache in caches["layers"]] == [1, 1]


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}], ids=["ref", "hijax"])
def test_caches_with_variables_in_newer_modes(options: dict[str, bool]) -> None:
    cache, reference = nnx.with_vars(Cache(), **options), Cache()
    program = capture(Remembers(), rows(1), cache)
    for _ in range(2):
        program(rows(1), cache)
        Remembers()(rows(1), reference)
    np.testing.assert_allclose(cache.rows[...], reference.rows[...], rtol=1e-6)
    assert int(cache.position[...]) == 2


def test_a_list_of_caches() -> None:
    class Layers(nnx.Module):
        def __call__(self, x: jax.Array, caches: nnx.List[Cache]) -> jax.Array:
            for cache in caches:
                cache.append(x)
            return x

    caches = nnx.List([Cache(), Cache()])
    capture(Layers(), rows(1), caches)(rows(1), caches)
    assert [int(cache.position[...]) for cache in caches] == [1, 1]


def test_a_cache_that_is_returned_as_well() -> None:
    class Returns(nnx.Module):
        def __call__(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            cache.append(x)
            return x, cache

    cache = Cache()
    _, returned = capture(Returns(), rows(1), cache)(rows(1), cache)
    assert isinstance(returned, Cache)
    assert (int(returned.position[...]), int(cache.position[...])) == (1, 1)


def test_another_length_of_the_cache_is_another_graph() -> None:
    program = capture(Remembers(), rows(1), Cache(6))
    longer = Cache(12)
    program(rows(1), longer)
    assert int(longer.position[...]) == 1
    assert len(program.specialize(rows(1), longer).graphs) == 2


def test_a_random_generator_as_an_argument_counts_on() -> None:
    class Noisy(nnx.Module):
        def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
            return x + jax.random.normal(rngs(), x.shape)

    rngs, reference = nnx.Rngs(3), nnx.Rngs(3)
    program = capture(Noisy(), rows(), rngs)
    for _ in range(2):
        np.testing.assert_allclose(program(rows(), rngs), Noisy()(rows(), reference), rtol=1e-6, atol=1e-6)
    assert int(rngs.default.count[...]) == 2


def test_a_bare_variable_as_an_argument() -> None:
    def model(params: jax.Array, x: jax.Array, total: nnx.Variable[jax.Array]) -> jax.Array:
        total[...] += x.sum()
        return x * params

    total = nnx.Variable(jnp.zeros(()))
    program = capture(model, jnp.ones(D), rows(), total)
    program(rows(), total)
    np.testing.assert_allclose(total[...], rows().sum(), rtol=1e-5)


def test_a_call_may_not_add_variables_to_an_argument() -> None:
    class Adds(nnx.Module):
        def __call__(self, x: jax.Array, cache: Cache) -> jax.Array:
            cache.extra = nnx.Cache(x)
            return x

    with pytest.raises(CaptureError, match="adds or removes variables of an object among its arguments"):
        capture(Adds(), rows(), Cache())


# -- signatures -------------------------------------------------------------------------------------------------------


def test_new_shapes_are_captured_by_themselves() -> None:
    program = linear_program(rows(4), 1.0)
    np.testing.assert_allclose(program(rows(9), 1.0), rows(9), rtol=1e-6)
    assert len(program.graphs) == 1
    specialized = program.specialize(rows(9), 1.0)
    assert len(specialized.graphs) == 2
    assert len(program.graphs) == 1
    np.testing.assert_array_equal(specialized(rows(4), 1.0), program(rows(4), 1.0))


def test_specialize_from_shapes() -> None:
    program = linear_program(rows(4), 1.0).specialize(jax.ShapeDtypeStruct((9, D), jnp.float32), 1.0)
    assert len(program.graphs) == 2
    assert len(program.specialize(rows(9), 1.0).graphs) == 2


def test_wrong_arguments_are_reported_as_the_model_reports_them() -> None:
    program = linear_program()
    with pytest.raises(CaptureError, match=r"traced with x: f32\[4,3\]"):
        program(jnp.ones((4, 3)))
    with pytest.raises(CaptureError, match="missing 1 required positional argument: 'x'"):
        program()
    with pytest.raises(CaptureError, match="unexpected keyword argument 'y'"):
        program(rows(), y=rows())


def test_parameters_that_do_not_fit_are_named() -> None:
    program = capture(lambda params, x: x @ params["w"] + params["b"], {"w": jnp.eye(D), "b": jnp.ones(D)}, rows())
    with pytest.raises(SignatureError, match=r"missing \['b'\], unknown \['bias'\]"):
        program.apply({"w": jnp.eye(D), "bias": jnp.ones(D)}, {}, rows())
    with pytest.raises(SignatureError, match=r"state.*unknown \['count'\]"):
        program.apply(program.params, {"count": jnp.zeros(())}, rows())
    with pytest.raises(SignatureError, match="'w'"):
        program.apply({**program.params, "w": jnp.eye(D, dtype=jnp.bfloat16)}, {}, rows())
    with pytest.raises(SignatureError, match="'w'"):
        program.apply({**program.params, "w": jnp.eye(D)[:4]}, {}, rows())
