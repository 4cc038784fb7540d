"""The train step as a computation: what it takes and gives, with any optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest

import compax
from compax.analysis.cost import graph_cost
from compax.analysis.training import Optimizer, returns_loss, train_step
from compax.errors import CaptureError

B, D = 4, 8
PARAMS = {"a": {"kernel": jnp.ones((D, D))}, "b": {"kernel": jnp.ones((D, D))}}


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]) ** 2)


@pytest.fixture
def program() -> compax.Program:
    return compax.capture(loss, PARAMS, jnp.ones((B, D)))


def test_slots_are_float32_arrays_of_the_size_of_each_parameter(program):
    for slots in (0, 1, 2):
        state = train_step(program, program.graph(), slots).arguments["optimizer"]
        leaves = jax.tree.leaves(state)
        assert len(leaves) == 2 * slots
        assert all((x.shape, x.dtype) == ((D, D), jnp.float32) for x in leaves)


def test_an_optimizer_of_ones_own(program):
    made = optax.sgd(0.1)

    def update(gradients, state, params):
        updates, after = made.update(gradients, state, params)
        return optax.apply_updates(params, updates), after

    step = train_step(program, program.graph(), Optimizer(made.init, update))
    function, shapes, donated = step.plain(program.graph())
    assert donated == (0, 3)
    given = (dict(program.params), {}, {}, made.init(dict(program.params)), {})
    given = (*given[:4], {path: jnp.ones(x.shape) for path, x in shapes[4].items()})
    changed, _, value, _ = jax.jit(function)(*given)
    expected, gradients = jax.value_and_grad(loss)(PARAMS, jnp.ones((B, D)))
    assert value == pytest.approx(float(expected), rel=1e-5)
    for path, x in changed.items():
        name, _ = path.split(".")
        wanted = PARAMS[name]["kernel"] - 0.1 * gradients[name]["kernel"]
        assert jnp.allclose(x, wanted, rtol=1e-5)


def test_the_step_has_three_times_the_products_of_the_loss(program):
    step = train_step(program, program.graph(), 2).traced(program.graph())
    forward = graph_cost(program.graph().graph).product_flops
    # The first layer's input needs no gradient.
    assert graph_cost(step.graph).product_flops == 3 * forward - forward // 2


def test_only_a_loss_can_be_trained():
    program = compax.capture(lambda params, x: x @ params["a"]["kernel"], PARAMS, jnp.ones((B, D)))
    assert not returns_loss(program.graph())
    with pytest.raises(CaptureError, match="returns no loss"):
        train_step(program, program.graph(), 2)
