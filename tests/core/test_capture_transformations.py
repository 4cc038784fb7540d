"""JAX's transformations over a captured program, and the program as a pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.program import Program, capture

D = 8


def rows(count: int = 4, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def scaled(w: jax.Array, x: Any, factor: Any = 2.0) -> jax.Array:
    return x @ w * factor


def linear_program() -> Program:
    return capture(scaled, jnp.eye(D), rows())


def test_jit_grad_and_vmap_over_apply() -> None:
    params = {"w": rows(D, seed=2), "b": rows(1, seed=3)[0]}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"] + params["b"]).sum()

    program = capture(model, params, rows())

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return program.apply(params, program.state, x)[0]

    np.testing.assert_array_equal(jax.jit(apply)(params, rows()), jax.jit(model)(params, rows()))
    for left, right in zip(
        jax.tree.leaves(jax.jit(jax.grad(apply))(params, rows())),
        jax.tree.leaves(jax.jit(jax.grad(model))(params, rows())),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    several = jnp.stack([rows(), rows(seed=1)])
    np.testing.assert_allclose(
        jax.vmap(apply, in_axes=(None, 0))(params, several),
        jax.vmap(model, in_axes=(None, 0))(params, several),
        rtol=1e-5,
    )
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
    np.testing.assert_allclose(
        jax.vmap(apply, in_axes=(0, None))(ensemble, rows()),
        jax.vmap(model, in_axes=(0, None))(ensemble, rows()),
        rtol=1e-5,
    )
    tangents = jax.tree.map(jnp.ones_like, params)
    for left, right in zip(
        jax.jvp(lambda p: apply(p, rows()), (params,), (tangents,)),
        jax.jvp(lambda p: model(p, rows()), (params,), (tangents,)),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_apply_inside_scan_with_state() -> None:
    class Counts(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.full(D, 0.5))
            self.seen = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen[...] = self.seen[...] + x.shape[0]
            return x * self.weight

    program = capture(Counts(), rows())

    def turn(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
        state, x = carry
        x, state, _ = program.apply(program.params, state, x)
        return (state, x), None

    (state, x), _ = jax.lax.scan(turn, (program.state, rows()), None, length=3)
    assert int(state["seen"]) == 12
    np.testing.assert_allclose(x, rows() / 8, rtol=1e-6)


def test_a_program_is_a_pytree_of_its_arrays() -> None:
    program = linear_program()
    assert len(jax.tree.leaves(program)) == 1
    doubled = jax.tree.map(lambda x: 2 * x, program)
    np.testing.assert_allclose(doubled(rows()), 2 * program(rows()), rtol=1e-6)
    assert jax.tree.structure(doubled) == jax.tree.structure(program)
    assert hash(jax.tree.structure(doubled)) == hash(jax.tree.structure(program))


def test_jit_takes_a_programs_parameters_as_arguments() -> None:
    count = 0

    @jax.jit
    def run(program: Program, x: jax.Array) -> jax.Array:
        nonlocal count
        count += 1
        return program(x)

    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    x = jnp.ones((2, 64))
    program = capture(scaled, w, x)
    np.testing.assert_allclose(run(program, x), program(x), rtol=1e-6)
    np.testing.assert_allclose(run(program.replace(params={"params": 2 * w}), x), 2 * program(x), rtol=1e-6)
    assert count == 1, "other arrays, same structure: compiled once"
    assert len(run.lower(program, x).as_text()) < 10_000, "parameters are no constants"


def test_programs_in_containers() -> None:
    program = linear_program()
    gradients = jax.grad(lambda program: program(rows()).sum())(program)
    assert isinstance(gradients, Program)
    np.testing.assert_allclose(
        gradients.params["params"], jax.grad(lambda w: scaled(w, rows()).sum())(jnp.eye(D)), rtol=1e-6
    )
    outputs = jax.jit(lambda programs: [p(rows()) for p in programs])([program, program])
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_frozen_parameters_get_no_gradient() -> None:
    params = {"w": jnp.eye(D), "b": jnp.ones(D)}
    program = capture(lambda params, x: (x @ params["w"] + params["b"]).sum(), params, rows())
    frozen = program.replace(frozen=frozenset({"w"}))
    gradients = jax.grad(lambda params: frozen.apply(params, {}, rows())[0])(params)
    np.testing.assert_array_equal(gradients["w"], 0)
    np.testing.assert_array_equal(gradients["b"], 4)
    trainable, rest = frozen.partition()
    assert (set(trainable), set(rest)) == ({"b"}, {"w"})


def test_a_program_is_compiled_once_for_each_signature() -> None:
    traces = 0

    def model(params: jax.Array, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return x * params

    program = capture(model, jnp.ones(D), rows())
    for _ in range(3):
        program(rows())
    program.replace(params={"params": jnp.zeros(D)})(rows())
    assert traces == 1
    program(rows(5))
    program(rows(5))
    assert traces == 2


def test_capture_inside_jit() -> None:
    @jax.jit
    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        return capture(scaled, w, x)(x)

    np.testing.assert_allclose(run(jnp.eye(D), rows()), 2 * rows(), rtol=1e-6)


def test_vmap_over_random_state() -> None:
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    program = capture(model, rows(), mode="train")
    keys = jax.random.split(jax.random.key(0), 3)
    state = {**program.state, "rngs.key": keys}
    axes = {path: 0 if path == "rngs.key" else None for path in state}
    outputs = jax.vmap(lambda state: program.apply({}, state, rows())[0], in_axes=(axes,))(state)
    for output, key in zip(outputs, keys, strict=True):
        expected, _, _ = program.apply({}, {**program.state, "rngs.key": key}, rows())
        np.testing.assert_array_equal(output, expected)
    assert not np.array_equal(outputs[0], outputs[1])
