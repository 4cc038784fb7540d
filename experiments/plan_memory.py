"""The memory of a config's train step, predicted without compiling: for what is proposed where a step does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import compax
from compax.encoding import nbytes
from compax.errors import ConfigError
from compax.experiments import programs, shardings
from compax.experiments.config import Config
from compax.experiments.plan_predict import predict, update_rule
from compax.passes.offload import Offload
from compax.passes.shard.shard import Shard
from compax.passes.shard.step_figures import predicted_step
from compax.placement import axes_of
from compax.target import Target
from compax.tpu import parse_mesh


def predicted_peak(config: Config, target: Target) -> int:
    """Bytes of one device at the peak of a train step.

    Raises:
        CompaxError: the config or its pipeline are not valid, the mesh does not fit, or nothing is predicted of how
            the step's values are split.
    """
    passes = compax.Pipeline.parse(config.pipeline).passes
    place = next((index for index, pass_ in enumerate(passes) if isinstance(pass_, Shard)), None)
    if place is None:
        program = programs.build_program(config, config.tokenizer.vocabulary, abstract=True, target=target)
        axes = parse_mesh(config.plan.mesh or "data=-1", target)
        specs = shardings.step_specs(config, program, axes)
        shardings.batch_spec(specs.batch, axes, programs.micro_batch(config))
        found = predict(config, program, specs, axes, target)
        if found.peak is None:
            raise ConfigError(f"memory is not predicted: {found.missing}")
        return found.peak
    shard, rules = passes[place], config.sharding
    assert isinstance(shard, Shard)
    if rules.params or rules.optimizer or any(isinstance(pass_, Offload) for pass_ in passes):
        raise ConfigError("memory is not predicted: rules of the config or the pass offload move what shard lays")
    dense = programs.capture(config, programs.build_model(config, config.tokenizer.vocabulary, abstract=True))
    before = compax.Pipeline(passes[:place])(dense, target=target)
    step = predicted_step(shard, before, target, passes[place + 1 :], update_rule(config))
    if config.optimizer.accumulation == 1:
        return step.peak
    laid = compax.Pipeline((shard,))(before, target=target)
    assert laid.placement.mesh is not None
    sizes: Mapping[str, int] = laid.placement.mesh.shape
    sums = sum(
        nbytes(value) // math.prod(sizes[name] for name in axes_of(laid.placement.gradient_spec(path)))
        for path, value in laid.partition()[0].items()
    )
    return step.peak + sums
