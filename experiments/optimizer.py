"""Optimizers and learning-rate schedules of a config, from optax.

- adam: Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980
- adamw: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv 1711.05101
- lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, arXiv 2302.06675
- adafactor: Shazeer, Stern, "Adafactor", 2018, arXiv 1804.04235
- muon: Jordan et al., "Muon", 2024 (no paper). Matrices only; embeddings, heads and vectors take adamw
- wsd: Hu et al., "MiniCPM", 2024, arXiv 2404.06395
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from compax.errors import ConfigError
from compax.experiments.config import Config

if TYPE_CHECKING:
    import optax
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
_VECTORS = ("scale", "bias")
_NOT_FOR_MUON = frozenset({"embed", "head"})


def schedule(config: Config) -> Schedule:
    """Returns the learning rate of a config as a function of the step, counted from 0.

    Raises:
        ConfigError: Warm-up and decay do not fit into the steps.
    """
    import optax

    peak, options = config.optimizer.learning_rate, config.schedule
    warmup, total = options.warmup_steps, config.steps
    if options.name != "constant" and total and warmup >= total:
        raise ConfigError(f"schedule.warmup_steps={warmup} leaves nothing of steps={total} to {options.name}")
    rest, final = max(total - warmup, 1), peak * options.final_fraction
    if options.name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=options.final_fraction)
    elif options.name == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif options.name == "wsd":
        decay = round(options.decay_fraction * total)
        if decay > rest:
            raise ConfigError(f"schedule: {warmup} steps of warm-up and {decay} of decay are more than steps={total}")
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [rest - decay]
        )
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return lambda step: jnp.asarray(after(step), jnp.float32)
    # The first step already moves: a rate of zero would waste its batch.
    rising = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    joined = optax.join_schedules([rising, after], [warmup])
    return lambda step: jnp.asarray(joined(step), jnp.float32)


def decays(params: dict[str, Any]) -> dict[str, Any]:
    """Says which parameters weight decay applies to: a bool for each leaf of `params`.

    Matrices and higher; not vectors, and nothing called `scale` or `bias`, which under a scan over layers has a
    dimension more than a vector.
    """

    def of(path: str, value: Any) -> Any:
        vector = path.rsplit(".", 1)[-1] in _VECTORS
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2 and not vector, value)

    return {path: of(path, value) for path, value in params.items()}


def optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer of a config: clipping, the update rule with its schedule, and decoupled weight decay.

    Its `init` and `update` take the trainable parameters of a program: a flat dict from path to array or encoding.
    """
    import optax

    options = config.optimizer
    clip = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    return optax.chain(*clip, _rule(config))


def _rule(config: Config) -> optax.GradientTransformation:
    import optax

    options, rate = config.optimizer, schedule(config)
    b1, b2, eps, decay = options.b1, options.b2, options.eps, options.weight_decay
    if options.name == "adam":
        return optax.adam(rate, b1=b1, b2=b2, eps=eps)
    if options.name == "lion":
        return optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mask=decays)
    if options.name == "sgd":
        return optax.chain(optax.add_decayed_weights(decay, decays), optax.sgd(rate, momentum=b1 or None))
    if options.name == "adafactor":
        # optax decays after the rate was applied: here the decay follows the schedule, as in the others.
        return optax.adafactor(rate, weight_decay_rate=lambda step: decay * rate(step), weight_decay_mask=decays)
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=decays)
    if options.name == "adamw":
        return adamw
    muon = optax.contrib.muon(
        rate,
        beta=b1,
        eps=eps,
        weight_decay=decay,
        muon_weight_dimension_numbers=_as_matrices,
        # Updates as large as adamw's, so that both share one learning rate.
        consistent_rms=0.2,
    )
    return optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)


def _muon_or_adamw(params: dict[str, Any]) -> dict[str, Any]:
    """Names the rule of each leaf: muon for matrices inside the network, adamw for the rest."""

    def of(path: str, value: Any) -> Any:
        outside = bool(_NOT_FOR_MUON.intersection(path.split(".")))
        return jax.tree.map(lambda matrix: "muon" if matrix and not outside else "adamw", value)

    return {path: of(path, value) for path, value in decays(params).items()}


def _as_matrices(params: Any) -> Any:
    """Says how muon sees its leaves: (input, output), and under a scan a stack of those."""
    import optax

    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda leaf: matrix, params)
