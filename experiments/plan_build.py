"""What `compax plan` compiles: the train step of a config, or its loss alone, with shapes in place of arrays.

`build` runs in the child process of `compax.tpu.compile_for`, so that capturing and tracing cost the parent nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compax
from compax.analysis.exchange import exchanged
from compax.encoding import format_of
from compax.errors import CompaxError
from compax.experiments import config as configs
from compax.experiments import programs, shardings
from compax.experiments.config import Config
from compax.experiments.optimizer import optimizer
from compax.experiments.plan_memory import predicted_peak
from compax.experiments.plan_predict import Prediction, predict
from compax.experiments.shardings import StepSpecs
from compax.experiments.step import TrainState, step_function
from compax.instruments import Journal
from compax.passes.shard.rules import spec_text
from compax.placement import axes_of
from compax.price import Price, price_json
from compax.target import Target
from compax.tpu.worker import Built

BUILDER = f"{__name__}:build"
_LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a step before it is compiled: all of it predicted, counted from shapes and the graph.

    Attributes:
        entry: "train" for the train step, "eval" for the loss alone.
        parameters: how many.
        trainable: how many of them are trained.
        tokens: that one step reads.
        model_flops: of the matrix products of one step on all devices, without recomputation: three times those of
            the forward pass, less what frozen parameters spare.
        parameter_bytes: on one device, as stored, without the padding of layouts; so are the next ones.
        optimizer_bytes: the optimizer's state.
        state_bytes: what else a step changes: random counters, statistics, step counts.
        batch_bytes: the tokens.
        gradient_bytes: gradients of the trained parameters, in their stored dtype.
        optimizer_split_bytes: the optimizer's state if it were split over the batch's axes as well.
        largest: the largest parameters: path, format, shape, spec, bytes on one device.
        exchanged: bytes of collectives that the shardings ask for at least, by kind: `compax.analysis.exchange`.
        prediction: what the train step takes; none for the loss alone.
        passes: what each pass of the pipeline changed of the price, all devices together: its text as `pass`, pairs of
            before and after as `figures`, and `notes`.
    """

    entry: str
    parameters: int
    trainable: int
    tokens: int
    model_flops: float
    parameter_bytes: int
    optimizer_bytes: int
    state_bytes: int
    batch_bytes: int
    gradient_bytes: int
    optimizer_split_bytes: int
    largest: tuple[tuple[str, str, tuple[int, ...], str, int], ...]
    exchanged: Mapping[str, int]
    prediction: Prediction | None = None
    passes: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Facts:
        """Facts that went through JSON."""
        graph = found["prediction"]
        given: dict[str, Any] = {**found, "prediction": None if graph is None else Prediction.from_json(graph)}
        return cls(**given)

    @property
    def argument_bytes(self) -> int:
        """What the step is called with, on one device."""
        return self.parameter_bytes + self.optimizer_bytes + self.state_bytes + self.batch_bytes


def build(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Traces the step of a config with abstract arguments that carry their shardings.

    Args:
        mesh: over the devices of the slice.
        arguments: `config` (its JSON) and `forward` (whether to take the loss alone).

    Raises:
        CompaxError: the config, the pipeline or the shardings are not valid.
    """
    config = configs.from_json(arguments["config"], where="the config")
    vocabulary = config.tokenizer.vocabulary
    target, journal = Target.parse(arguments["target"]), Journal()
    watching = (Price(target), journal)
    program = programs.build_program(config, vocabulary, abstract=True, target=target, instruments=watching)
    axes = dict(mesh.shape)
    specs = shardings.step_specs(config, program, axes)
    tokens_spec = shardings.batch_spec(specs.batch, axes, programs.micro_batch(config))
    shape = (config.optimizer.accumulation, programs.micro_batch(config), config.data.sequence_length + 1)
    tokens = shardings.abstract(mesh, jax.ShapeDtypeStruct(shape, jnp.int32), tokens_spec)
    if arguments["forward"]:
        traced, placed = _forward(mesh, program, specs, tokens)
    else:
        traced, placed = _train(mesh, config, program, specs, tokens)
    facts = _facts(config, program, specs, mesh, placed, tokens, forward=arguments["forward"])
    facts = dataclasses.replace(facts, passes=tuple(map(price_json, journal.records)))
    if not arguments["forward"]:
        prediction = predict(config, program, specs, axes, target)
        if prediction.peak is None and program.placement.mesh is not None:
            with contextlib.suppress(CompaxError):  # `missing` says why
                prediction = dataclasses.replace(prediction, peak=predicted_peak(config, target))
        facts = dataclasses.replace(facts, prediction=prediction)
    return Built(traced, dataclasses.asdict(facts))


def abstract_state(config: Config, program: compax.Program) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step and the parameters that are not trained, as `step.start` makes them: shapes."""
    trainable, frozen = program.partition()

    def first(params: dict[str, Any], state: dict[str, Any]) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, state, optimizer(config).init(params), zero, zero)

    return jax.eval_shape(first, trainable, program.state), frozen


def _train(
    mesh: Mesh, config: Config, program: compax.Program, specs: StepSpecs, tokens: Any
) -> tuple[jax.stages.Traced, tuple[TrainState, dict[str, Any]]]:
    state: Any
    state, frozen = abstract_state(config, program)
    params, placement = {**state.params, **frozen}, program.placement
    of_state = dataclasses.replace(
        state,
        params=shardings.follow(state.params, params, specs.params),
        state=jax.tree.map(lambda leaf: PartitionSpec(), state.state),
        optimizer=shardings.follow(state.optimizer, params, specs.optimizer),
        updates=PartitionSpec(),
        skipped=PartitionSpec(),
    )
    placed: TrainState = shardings.abstract(mesh, state, of_state)
    placed = dataclasses.replace(
        placed,
        params=shardings.in_memories(placed.params, placement.memory),
        optimizer=shardings.in_memory(placed.optimizer, placement.optimizer_memory),
    )
    kept = shardings.abstract(mesh, frozen, shardings.follow(frozen, params, specs.params))
    kept = shardings.in_memories(kept, placement.memory)
    step = step_function(config, program, specs)
    # The state goes out as it came in: the next step takes it without a move.
    out = (jax.tree.map(lambda leaf: leaf.sharding, placed), None)
    return jax.jit(step, donate_argnums=0, out_shardings=out).trace(placed, kept, tokens), (placed, kept)


def _forward(
    mesh: Mesh, program: compax.Program, specs: StepSpecs, tokens: Any
) -> tuple[jax.stages.Traced, tuple[TrainState, dict[str, Any]]]:
    params = shardings.abstract(mesh, program.params, shardings.follow(program.params, program.params, specs.params))
    params = shardings.in_memories(params, program.placement.memory)
    state = shardings.abstract(mesh, program.state, PartitionSpec())

    def forward(params: dict[str, Any], state: dict[str, Any], tokens: jax.Array) -> jax.Array:
        (loss, _), _, _ = program.apply(params, state, {"tokens": tokens[0]}, entry=programs.EVAL)
        return loss

    traced = jax.jit(forward).trace(params, state, tokens)
    nothing: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return traced, (TrainState(params, state, (), nothing, nothing), {})


def _facts(
    config: Config,
    program: compax.Program,
    specs: StepSpecs,
    mesh: Mesh,
    placed: tuple[TrainState, dict[str, Any]],
    tokens: Any,
    *,
    forward: bool,
) -> Facts:
    state, frozen = placed
    entry = programs.EVAL if forward else programs.TRAIN
    trainable, _ = program.partition()
    total, trained = (sum(value.size for value in params.values()) for params in (program.params, trainable))
    parts = 1 if forward else config.optimizer.accumulation
    passes = 1 if forward else 2 + trained / total
    whole = {**state.params, **frozen}
    sizes = {path: shardings.device_bytes(value) for path, value in whole.items()}
    trained_sizes = {path: sizes[path] for path in trainable if not forward}
    optimizer_bytes = shardings.device_bytes(state.optimizer)
    return Facts(
        entry=entry,
        parameters=total,
        trainable=trained,
        tokens=config.data.batch_size
        * config.data.sequence_length
        // (config.optimizer.accumulation if forward else 1),
        model_flops=float(program.coverage(entry).flops * parts * passes),
        parameter_bytes=sum(sizes.values()),
        optimizer_bytes=optimizer_bytes,
        state_bytes=shardings.device_bytes((state.state, state.updates, state.skipped)),
        batch_bytes=shardings.device_bytes(tokens),
        gradient_bytes=sum(trained_sizes.values()),
        optimizer_split_bytes=_split_bytes(state, specs.batch, mesh),
        largest=tuple(
            (path, format_of(whole[path]), tuple(whole[path].shape), spec_text(specs.params[path]), sizes[path])
            for path in sorted(sizes, key=lambda path: -sizes[path])[:_LARGEST]
        ),
        exchanged={
            str(kind): size
            for kind, size in exchanged(
                trained_sizes,
                specs.params,
                specs.batch,
                mesh.shape,
                gradients=specs.gradients,
                optimizer=specs.optimizer,
                parts=parts,
            ).items()
        },
    )


def _split_bytes(state: TrainState, batch: tuple[str, ...], mesh: Mesh) -> int:
    """Bytes of the optimizer's state on a device if it were split over the batch's axes that do not split it yet."""
    total = 0
    for leaf in jax.tree.leaves(state.optimizer):
        used = axes_of(leaf.sharding.spec)
        free = math.prod(mesh.shape[name] for name in batch if name not in used)
        nbytes = shardings.device_bytes(leaf)
        total += nbytes // free if leaf.ndim else nbytes
    return total
