"""Which array of a train step has which sharding: the one place that decides it.

Specs come from the program's placement, where a pass put them, and from rules of the config that override them (texts
of `compax.passes.shard.rules.ParameterRule`); what neither names is on every device whole. Gradients follow their
parameter, and so does the optimizer's state, unless `sharding.optimizer` has rules for it (Rajbhandari et al.,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2019, arXiv 1910.02054). Encoded parameters are
split leaf by leaf (`Encoded.spec`), and the batch is split over the axes of `sharding.batch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import compax
from compax import placement
from compax.encoding import leaf_nbytes
from compax.errors import EncodingError, ShardingError
from compax.experiments.config import Config
from compax.passes.shard.rules import check_axis, entry, parameter_specs
from compax.placement import DEVICE, Placement
from compax.tpu.topology import parse_mesh


def leaf_specs(path: str, value: Any, spec: PartitionSpec) -> Any:
    """The spec of each leaf of a parameter: the same pytree, or a single spec for an array.

    Raises:
        ShardingError: the encoding cannot be split so.
    """
    try:
        return placement.leaf_specs(value, spec)
    except EncodingError as error:
        raise ShardingError(
            f"sharding.params: {path} is {value.format} and cannot be split by {spec}: {error}"
        ) from error


def follow(tree: Any, params: Mapping[str, Any], specs: Mapping[str, PartitionSpec]) -> Any:
    """Specs for a tree in which dictionaries are keyed by parameter paths: parameters, or an optimizer's state.

    A leaf below a parameter's path has the spec of the parameter's leaf there if it has its shape. All others, such as
    counters and factored moments, are on every device whole.

    Returns:
        The tree with a `PartitionSpec` in place of each leaf.
    """
    known: dict[tuple[str, str], tuple[tuple[int, ...], PartitionSpec]] = {}
    for path, value in params.items():
        leaves = jax.tree_util.tree_leaves_with_path(value)
        for (place, leaf), spec in zip(
            leaves, jax.tree.leaves(leaf_specs(path, value, specs.get(path, PartitionSpec()))), strict=True
        ):
            known[path, jax.tree_util.keystr(place)] = (tuple(leaf.shape), spec)

    def of(place: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        for depth, key in enumerate(place):
            if isinstance(key, jax.tree_util.DictKey) and key.key in params:
                shape, spec = known.get((str(key.key), jax.tree_util.keystr(place[depth + 1 :])), (None, None))
                return spec if spec is not None and shape == tuple(leaf.shape) else PartitionSpec()
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_spec(batch_axes: Sequence[str], axes: Mapping[str, int], batch: int) -> PartitionSpec:
    """The spec of tokens `[accumulation, batch, positions]`.

    Args:
        batch_axes: mesh axes that the batch is split over.
        axes: of the mesh: sizes by name.
        batch: sequences in a micro-batch.

    Raises:
        ShardingError: there is no such axis, or the batch does not divide.
    """
    for name in batch_axes:
        check_axis(name, axes, "sharding.batch")
    parts = math.prod(axes[name] for name in batch_axes)
    if batch % parts:
        raise ShardingError(
            f"a micro-batch of {batch} sequence(s) does not divide over {'+'.join(batch_axes)} ({parts}): make "
            f"data.batch_size a multiple of {parts} times optimizer.accumulation (--batch), "
            "or split the batch over fewer axes with sharding.batch"
        )
    return PartitionSpec(None, entry(tuple(batch_axes)))


@dataclasses.dataclass(frozen=True)
class StepSpecs:
    """Specs of everything in a train step.

    Attributes:
        params: of each parameter.
        gradients: of each gradient.
        optimizer: of what the optimizer keeps of each parameter.
        batch: mesh axes that the batch is split over.
    """

    params: Mapping[str, PartitionSpec]
    gradients: Mapping[str, PartitionSpec]
    optimizer: Mapping[str, PartitionSpec]
    batch: tuple[str, ...]


def placement_specs(placed: Placement) -> StepSpecs:
    """The specs that a program's placement asks for."""
    return StepSpecs(
        params=placed.specs,
        gradients={**placed.specs, **placed.gradients},
        optimizer={**placed.specs, **placed.optimizer},
        batch=placed.batch,
    )


def over_all_devices(config: Config, program: compax.Program) -> Placement:
    """Where a program's arrays lie over the devices of all processes, as in `compax plan`.

    The mesh is that of the pass `shard`; without it, `plan.mesh`, or one axis `data`.

    Raises:
        CompaxError: the mesh is not of as many devices, or a rule does not fit.
    """
    placed = program.placement
    if placed.mesh is None:
        axes = parse_mesh(config.plan.mesh or "data=-1", jax.device_count())
    else:
        axes = dict(placed.mesh.shape)
    specs = step_specs(config, program, axes)
    placed = placed.replace(
        mesh=AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)),
        specs=specs.params,
        gradients=specs.gradients,
        optimizer=specs.optimizer,
        batch=specs.batch,
    )
    return placed.over(placed.mesh_over())


@dataclasses.dataclass(frozen=True)
class Feed:
    """How tokens `[accumulation, batch, positions]` come to the devices: each process reads the rows of its own.

    Attributes:
        shape: of the tokens of a step.
        sharding: over the mesh.
        rows: of each micro-batch that this process reads, ascending.
    """

    shape: tuple[int, int, int]
    sharding: NamedSharding
    rows: tuple[int, ...]

    @classmethod
    def of(cls, placed: Placement, shape: tuple[int, int, int]) -> Feed:
        """The feed of a placement.

        Raises:
            ShardingError: the batch does not divide.
        """
        assert isinstance(placed.mesh, Mesh)
        sharding = NamedSharding(placed.mesh, batch_spec(placed.batch, dict(placed.mesh.shape), shape[1]))
        indices = sharding.addressable_devices_indices_map(shape).values()
        parts = {index[1].indices(shape[1]) for index in indices if index is not None}
        return cls(shape, sharding, tuple(row for part in sorted(parts) for row in range(*part)))

    @property
    def batch_rows(self) -> list[int]:
        """Of the whole batch, its micro-batches one after the other: the rows that this process reads."""
        return [part * self.shape[1] + row for part in range(self.shape[0]) for row in self.rows]

    def put(self, tokens: np.ndarray) -> jax.Array:
        """The tokens of all processes as one array.

        Args:
            tokens: int32[rows, positions], those of `batch_rows`.
        """
        own = tokens.reshape(self.shape[0], len(self.rows), self.shape[2])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(self.shape[1])
            first = self.rows.index(start)
            return own[:, first : first + stop - start]

        return jax.make_array_from_callback(self.shape, self.sharding, part)


def step_specs(config: Config, program: compax.Program, axes: Mapping[str, int]) -> StepSpecs:
    """The specs of a config's train step: the program's placement, and the config's rules over it.

    Raises:
        ShardingError: a rule is wrong, or does not fit.
    """
    placed, rules = program.placement, config.sharding
    params = parameter_specs(program.params, rules.params, axes, placed.specs, "sharding.params")
    # Gradients and the optimizer's state follow what rules say of their parameters.
    gradients, moments = ({}, {}) if rules.params else (placed.gradients, placed.optimizer)
    return StepSpecs(
        params=params,
        gradients={**params, **gradients},
        optimizer=parameter_specs(program.params, rules.optimizer, axes, {**params, **moments}, "sharding.optimizer"),
        batch=placed.batch or tuple(rules.batch),
    )


def abstract(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Shapes that carry their shardings, for tracing a jitted function.

    Args:
        mesh: the mesh.
        tree: arrays or shapes.
        specs: the same tree with specs as leaves, or one spec for all leaves.
    """
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda leaf: specs, tree)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def in_memory(tree: Any, kind: str) -> Any:
    """Shapes with shardings, put into a memory of their devices."""
    if kind == DEVICE:
        return tree

    def put(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


def in_memories(params: Mapping[str, Any], memory: Mapping[str, str]) -> dict[str, Any]:
    """Parameters with shardings, each in the memory that is named for its path."""
    return {path: in_memory(value, memory.get(path, DEVICE)) for path, value in params.items()}


def device_bytes(tree: Any) -> int:
    """Bytes of shapes with shardings on one device, without the padding of a compiler's layouts."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf_nbytes(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return total
