"""The train step: one jitted function with donated buffers, over the trainable parameters of a program alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import compax
from compax.errors import ConfigError
from compax.experiments import shardings
from compax.experiments.config import Config
from compax.experiments.optimizer import optimizer, schedule
from compax.experiments.programs import TRAIN
from compax.experiments.shardings import StepSpecs, placement_specs
from compax.placement import DEVICE, Placement, moved, placed, spread
from compax.tpu.options import compiler_options

Step = Callable[["TrainState", dict[str, Any], "jax.Array | np.ndarray"], tuple["TrainState", dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint has to hold.

    Attributes:
        params: Trainable parameters by path: arrays, or encodings with a float master.
        state: The program's state by path: random counters, statistics.
        optimizer: The optimizer's state.
        updates: int32[], updates applied so far: steps but for the skipped ones. The schedule counts these.
        skipped: int32[], steps in a row that were skipped just now.
    """

    params: dict[str, Any]
    state: dict[str, Any]
    optimizer: Any
    updates: jax.Array
    skipped: jax.Array


def start(config: Config, program: compax.Program) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state before the first step, and the parameters that are not trained.

    Raises:
        ConfigError: No parameter is trainable.
        PlacementError: The device does not reach a memory in which the program's placement keeps something.
    """
    placement = program.placement
    placement.check_memory()
    trainable, frozen = program.partition()
    if not trainable:
        raise ConfigError(
            f"pipeline '{config.pipeline}' leaves nothing to train: every parameter is frozen, or stored without a "
            "float master; use train=true in quantize, or move it to `compress`"
        )
    # Fresh buffers: the step's are donated, the program's stay.
    trainable, state = jax.tree.map(jnp.copy, (trainable, program.state))
    zero = jnp.zeros((), jnp.int32)

    init = optimizer(config).init
    if isinstance(placement.mesh, Mesh):
        specs = placement_specs(placement).optimizer
        of_moments = shardings.follow(jax.eval_shape(init, trainable), program.params, specs)
        # Zeros and counters come from no array, so nothing but this says where they are to be.
        init = jax.jit(init, out_shardings=jax.tree.map(lambda spec: placement.place(spec, DEVICE), of_moments))
        zero, state = spread((zero, state), placement.place(PartitionSpec(), DEVICE))
    moments = init(trainable)
    if placement.optimizer_memory != DEVICE:
        moments = placed(moments, placement.optimizer_memory)
    trainable, frozen = placement.placed(trainable), placement.placed(frozen)
    return TrainState(trainable, state, moments, zero, jnp.copy(zero)), frozen


def laid_out(state: TrainState, params: Mapping[str, Any], placement: Placement, specs: StepSpecs) -> TrainState:
    """A state constrained to its specs, within a computation; what belongs to no parameter is on every device whole."""
    of_optimizer = shardings.follow(state.optimizer, params, specs.optimizer)
    return dataclasses.replace(
        state,
        params=placement.constrained(state.params, specs.params),
        optimizer=jax.tree.map(placement.laid, state.optimizer, of_optimizer),
    )


def make_step(config: Config, program: compax.Program) -> Step:
    """Returns `step_function`, jitted with the compiler's options; it donates the buffers of `state`.

    Raises:
        ConfigError: the compiler does not take an option of the config.
    """
    device = jax.devices()[0]
    options = compiler_options(device.platform, device.device_kind) if program.placement.mesh is not None else {}
    if given := given_options(config):
        try:
            jax.jit(lambda: 0, compiler_options=given)()
        except jax.errors.JaxRuntimeError as error:
            raise ConfigError(f"compiler.options: {str(error).splitlines()[0]}") from error
        options |= given
    return jax.jit(step_function(config, program), donate_argnums=0, compiler_options=options or None)


def step_function(config: Config, program: compax.Program, specs: StepSpecs | None = None) -> Step:
    """Returns the step `(state, frozen, tokens) -> (state, metrics)`.

    `tokens` is int32[accumulation, batch, sequence_length + 1]; gradients are the mean over the first dimension. An
    update whose loss or gradient is not finite is left out: parameters, program state and optimizer stay as they were.
    What the program's placement keeps in host memory is on the device for the step alone. Where it is laid over a mesh,
    parameters, gradients and the optimizer's state are constrained to their specs: by default the placement's.

    Metrics are float32 scalars: `loss` (nats per token, before the update), `grad_norm` (before clipping),
    `learning_rate`; and int32 `skipped` (steps in a row).
    """
    import optax

    update_rule, rate = optimizer(config), schedule(config)
    placement = program.placement
    specs = specs or placement_specs(placement)

    def laid(state: TrainState) -> TrainState:
        """The state after a step lies as it did before."""
        return state if placement.mesh is None else laid_out(state, program.params, placement, specs)

    def loss_of(
        trainable: dict[str, Any], frozen: dict[str, Any], state: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        (loss, _), state, _ = program.apply({**frozen, **trainable}, state, {"tokens": tokens}, entry=TRAIN)
        return loss, state

    differentiate = jax.value_and_grad(loss_of, has_aux=True)

    def gradients(
        before: TrainState, frozen: dict[str, Any], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
        count = tokens.shape[0]
        if count == 1:
            (loss, state), grads = differentiate(before.params, frozen, before.state, tokens[0])
            return loss, state, grads

        def add(carry: Any, part: jax.Array) -> tuple[Any, None]:
            total, state, sums = carry
            (loss, state), grads = differentiate(before.params, frozen, state, part)
            sums = placement.constrained(jax.tree.map(jnp.add, sums, grads), specs.gradients)
            return (total + loss, state, sums), None

        zeros = placement.constrained(jax.tree.map(jnp.zeros_like, before.params), specs.gradients)
        (total, state, sums), _ = jax.lax.scan(add, (jnp.zeros((), jnp.float32), before.state, zeros), tokens)
        return total / count, state, jax.tree.map(lambda leaf: leaf / count, sums)

    def train_step(before: TrainState, frozen: dict[str, Any], tokens: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        before = dataclasses.replace(before, params=placement.moved(before.params, home=False))
        loss, state, grads = gradients(before, placement.moved(frozen, home=False), tokens)
        if placement.optimizer_memory != DEVICE:
            # Not before the gradients are there: activations and the optimizer's state never need memory together.
            grads, waiting = jax.lax.optimization_barrier((grads, before.optimizer))
            before = dataclasses.replace(before, optimizer=moved(waiting, DEVICE))
        grads = placement.constrained(grads, specs.gradients)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer_state = update_rule.update(grads, before.optimizer, before.params)
        params = optax.apply_updates(before.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731 - used once, below
        after = TrainState(
            *jax.tree.map(keep, (params, state, optimizer_state), (before.params, before.state, before.optimizer)),
            updates=before.updates + finite.astype(jnp.int32),
            skipped=jnp.where(finite, 0, before.skipped + 1),
        )
        after = laid(after)
        after = dataclasses.replace(after, params=placement.moved(after.params, home=True))
        if placement.optimizer_memory != DEVICE:
            after = dataclasses.replace(after, optimizer=moved(after.optimizer, placement.optimizer_memory))
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": rate(before.updates), "skipped": after.skipped}
        return after, metrics

    return train_step


def given_options(config: Config) -> dict[str, str | bool]:
    """The options of the compiler that a config gives.

    Raises:
        ConfigError: one is no NAME=VALUE.
    """
    found: dict[str, str | bool] = {}
    for text in config.compiler.options:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"compiler.options: '{text}' is no NAME=VALUE, such as xla_cpu_enable_fast_math=true")
        found[name.removeprefix("--")] = value == "true" if value in ("true", "false") else value
    return found
