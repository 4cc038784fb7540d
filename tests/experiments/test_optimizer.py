"""Optimizers and schedules: what is decayed, what the rate is, and that each one learns."""

import jax
import jax.numpy as jnp
import optax
import pytest

from compax.errors import ConfigError
from compax.experiments import config as configs
from compax.experiments.optimizer import decays, optimizer, schedule


@pytest.fixture
def params() -> dict[str, jax.Array]:
    return {
        "embed.embedding": jnp.ones((12, 4)),
        "blocks.mlp.up.kernel": jnp.ones((3, 4, 8)),
        "blocks.norm.scale": jnp.ones((3, 4)),
        "norm.scale": jnp.ones(4),
        "head.bias": jnp.ones(12),
    }


def test_vectors_are_not_decayed_also_when_stacked(params):
    assert [path for path, decayed in decays(params).items() if decayed] == ["embed.embedding", "blocks.mlp.up.kernel"]


@pytest.mark.parametrize("name", configs.FIELDS["optimizer.name"].choices)
def test_every_optimizer_descends_and_spares_vectors(name, params):
    config = configs.default()
    config.optimizer.name, config.schedule.name, config.schedule.warmup_steps = name, "constant", 0
    rule = optimizer(config)

    def loss(params):
        return sum(jnp.sum((leaf - 0.5) ** 2) for leaf in params.values())

    @jax.jit
    def step(params, state):
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    after, state = step(params, rule.init(params))
    for _ in range(3):
        after, state = step(after, state)
    assert loss(after) < loss(params)
    idle, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    moved = {path for path, update in idle.items() if jnp.any(update != 0)}
    assert moved == (set() if name == "adam" else {"embed.embedding", "blocks.mlp.up.kernel"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 1.0, 1.0, 0.55, 0.1]),
        ("cosine", [0.25, 1.0, 1.0, 0.55, 0.1]),
        ("wsd", [0.25, 1.0, 1.0, 1.0, 0.1]),
    ],
)
def test_schedules(name, expected):
    config = configs.default()
    config.steps, config.schedule.name, config.schedule.warmup_steps = 24, name, 4
    config.optimizer.learning_rate = 1.0
    rate = schedule(config)
    assert [float(rate(step)) for step in (0, 3, 4, 14, 24)] == pytest.approx(expected)


def test_schedule_that_does_not_fit():
    config = configs.default()
    config.steps, config.schedule.warmup_steps = 10, 10
    with pytest.raises(ConfigError, match="leaves nothing of steps=10"):
        schedule(config)
    config.schedule.name, config.schedule.warmup_steps = "wsd", 9
    with pytest.raises(ConfigError, match="are more than steps=10"):
        schedule(config)
