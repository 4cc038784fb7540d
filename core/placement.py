"""Placement: where a program's arrays live: on which devices of a mesh, and in which of their memories.

A placement says what is wanted. It is plain data that passes write and that whoever compiles the program (the train
step, a plan for a slice) turns into shardings; nothing here touches a device before `check_memory` asks one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from compax.constraint import constrain, entries_of
from compax.encoding import Encoded
from compax.errors import PlacementError

DEVICE = "device"
"""The memory that a device computes from."""

HOST = "pinned_host"
"""Memory of the host that a device reaches by itself."""

MEMORIES = (DEVICE, HOST)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a program live. The default is what JAX does by itself.

    Attributes:
        mesh: the mesh that specs name axes of.
        specs: the sharding of parameters by path; those that are not named are whole on each device. For an encoded
            parameter it is the spec of the array that the encoding stands for.
        memory: the memory of parameters by path, one of `MEMORIES`; `DEVICE` for those that are not named.
        optimizer_memory: the memory of the optimizer's state.
        optimizer: the sharding of the optimizer's state of parameters by path; as the parameter for those that are not
            named.
        gradients: the sharding of gradients by path; likewise.
        batch: the mesh axes over which the batch is spread.
    """

    mesh: Mesh | AbstractMesh | None = None
    specs: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optimizer_memory: str = DEVICE
    optimizer: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
    batch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in (self.optimizer_memory, *self.memory.values()):
            if kind not in MEMORIES:
                raise PlacementError(f"no memory is called '{kind}'; there are: {', '.join(MEMORIES)}")
        if self.mesh is None and (named := {*self.specs, *self.optimizer, *self.gradients}):
            raise PlacementError(f"'{min(named)}' has a spec, but there is no mesh whose axes it names; give one")
        axes = () if self.mesh is None else self.mesh.axis_names
        if unknown := [name for name in self.batch if name not in axes]:
            raise PlacementError(
                f"the batch is spread over '{unknown[0]}', but the mesh has: {', '.join(axes) or 'none'}"
            )

    def __hash__(self) -> int:
        memory = frozenset(self.memory.items())
        specs = frozenset(self.specs), frozenset(self.optimizer), frozenset(self.gradients)
        return hash((self.mesh, specs, memory, self.optimizer_memory, self.batch))

    def replace(self, **changes: Any) -> "Placement":
        """A placement with some attributes replaced."""
        return dataclasses.replace(self, **changes)

    @property
    def memories(self) -> frozenset[str]:
        """The memories that it asks for, besides that of the device."""
        return frozenset({self.optimizer_memory, *self.memory.values()}) - {DEVICE}

    @property
    def batch_shards(self) -> int:
        """Over how many devices the batch is spread."""
        return math.prod(self.mesh.shape[name] for name in self.batch) if self.mesh is not None else 1

    def spec(self, path: str) -> PartitionSpec:
        """The spec of a parameter."""
        return self.specs.get(path, PartitionSpec())

    def memory_kind(self, path: str) -> str:
        """The memory of a parameter."""
        return self.memory.get(path, DEVICE)

    def mesh_over(self, devices: Mesh | Sequence[Any] | None = None) -> Mesh:
        """The placement's mesh over some devices.

        Args:
            devices: a mesh, or devices to lay it over; by default all of JAX's, neighbours beside each other.

        Raises:
            PlacementError: there is no mesh, it has other axes, or there are too few devices.
        """
        if self.mesh is None:
            raise PlacementError("the program is laid over no mesh: apply the pass shard, as in shard(data=-1)")
        if isinstance(devices, Mesh):
            return devices
        if devices is None and isinstance(self.mesh, Mesh):
            return self.mesh
        given = list(jax.devices() if devices is None else devices)
        if self.mesh.size != len(given):
            raise PlacementError(
                f"the program is laid over {mesh_text(self.mesh)}, that is {self.mesh.size} devices, and there are "
                f"{len(given)}: shard it for {len(given)}, with -1 for the axis that takes what is left"
            )
        sizes, names = tuple(self.mesh.shape.values()), self.mesh.axis_names
        return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=given)

    def over(self, mesh: Mesh) -> "Placement":
        """The same over the devices of a mesh.

        Raises:
            PlacementError: the mesh has other axes, or other sizes of them.
        """
        self.check_mesh(mesh)
        return self.replace(mesh=mesh)

    def check_mesh(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises `PlacementError` for a mesh that has other axes, or other sizes of them."""
        if self.mesh is not None and dict(self.mesh.shape) != dict(mesh.shape):
            raise PlacementError(
                f"the program is laid over {mesh_text(self.mesh)}, and the mesh given is {mesh_text(mesh)}: shard it "
                "for that mesh, or give one of those axes"
            )

    def optimizer_spec(self, path: str) -> PartitionSpec:
        """The spec of the optimizer's state of a parameter."""
        return self.optimizer.get(path, self.spec(path))

    def gradient_spec(self, path: str) -> PartitionSpec:
        """The spec of the gradient of a parameter."""
        return self.gradients.get(path, self.spec(path))

    def shardings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Shardings of parameters by path, leaf by leaf for encoded ones; memory kinds included.

        Args:
            params: arrays, shapes or encodings.
        """
        found: dict[str, Any] = {}
        for path, value in params.items():
            leaves, kind = leaf_specs(value, self.spec(path)), self.memory_kind(path)
            found[path] = jax.tree.map(lambda leaf, kind=kind: self.place(leaf, kind), leaves, is_leaf=_is_spec)
        return found

    def constrained(self, params: Mapping[str, Any], specs: Mapping[str, PartitionSpec]) -> dict[str, Any]:
        """Parameters, or what has their paths, constrained to specs within a computation; whole where none is named."""
        return {
            path: jax.tree.map(self.laid, value, leaf_specs(value, specs.get(path, PartitionSpec())))
            for path, value in params.items()
        }

    def laid(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """An array constrained to a spec within a computation; the array if there is no mesh."""
        if self.mesh is None:
            return x
        return constrain(x, self.mesh if isinstance(self.mesh, AbstractMesh) else self.mesh.abstract_mesh, spec)

    def moved(self, params: Mapping[str, Any], *, home: bool) -> dict[str, Any]:
        """Parameters by path, with those that live elsewhere on the device for their use, or (`home`) back."""
        return {
            path: moved(x, kind if home else DEVICE) if (kind := self.memory_kind(path)) != DEVICE else x
            for path, x in params.items()
        }

    def placed(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters by path in the memory where they live; shardings stay."""
        return {
            path: placed(x, kind) if (kind := self.memory_kind(path)) != DEVICE else x for path, x in params.items()
        }

    def sharding(self, path: str, device: Any = None) -> NamedSharding | SingleDeviceSharding:
        """The sharding of a parameter, memory included.

        Args:
            path: the parameter's path.
            device: where it lives if there is no mesh; by default the first device.
        """
        return self.place(self.spec(path), self.memory_kind(path), device)

    def place(self, spec: PartitionSpec, memory_kind: str, device: Any = None) -> NamedSharding | SingleDeviceSharding:
        """A sharding over the mesh, or on one device if there is none."""
        if self.mesh is None:
            return SingleDeviceSharding(device or jax.local_devices()[0], memory_kind=memory_kind)
        return NamedSharding(self.mesh, spec, memory_kind=memory_kind)

    def check_memory(self, device: Any = None) -> None:
        """Asks a device whether it reaches the memories that are wanted.

        Args:
            device: the device; by default this process's first, of the mesh if there is one.

        Raises:
            PlacementError: it does not; says what it reaches.
        """
        if not self.memories:
            return
        if device is None:
            device = self.mesh.local_devices[0] if isinstance(self.mesh, Mesh) else jax.local_devices()[0]
        check_memory(device, self.memories)


def leaf_specs(value: Any, spec: PartitionSpec) -> Any:
    """The spec of each leaf of a parameter: the same pytree, or the one spec of an array.

    Raises:
        EncodingError: the encoding cannot be split so.
    """
    return value.spec(spec) if isinstance(value, Encoded) else spec


def axes_of(spec: PartitionSpec) -> list[str]:
    """The mesh axes that a spec uses."""
    return [name for names in entries_of(spec, len(spec)) for name in names]


def mesh_text(mesh: Mesh | AbstractMesh | Mapping[str, int]) -> str:
    """The axes of a mesh and their sizes, as in `data=4,tensor=2`."""
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def check_memory(device: Any, memories: frozenset[str]) -> None:
    """Raises `PlacementError` unless a device reaches some memories."""
    reached = {memory.kind for memory in device.addressable_memories()}
    if missing := sorted(memories - reached):
        raise PlacementError(
            f"the memory '{missing[0]}' is wanted, but {device.device_kind} ({device.platform}) reaches only: "
            f"{', '.join(sorted(reached))}; leave the pass that asks for it out, or run where there is such memory"
        )


_SPACES: Mapping[str, Any] = {DEVICE: jax.memory.Space.Device, HOST: jax.memory.Space.Host}


def moved(tree: Any, memory_kind: str) -> Any:
    """Arrays in another memory, sharded as they are: within a computation, under `jax.jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, _SPACES[memory_kind]), tree)


def spread(tree: Any, shardings: Any) -> Any:
    """Arrays laid over devices, which other processes may have too: each of these has the same arrays, whole.

    Args:
        tree: the arrays.
        shardings: the same tree with shardings, or a prefix of it.
    """
    wanted = jax.tree.leaves(jax.tree.broadcast(shardings, tree))
    if all(sharding.is_fully_addressable for sharding in wanted):
        return jax.device_put(tree, shardings)
    return jax.tree.map(_spread, tree, jax.tree.unflatten(jax.tree.structure(tree), wanted))


def _spread(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    # A copy in the host's memory is cut there: the device never holds more than its part.
    whole = x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])


def placed(tree: Any, memory_kind: str) -> Any:
    """Arrays in another memory, on the devices where they are and sharded as they are: outside of computations."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory_kind)), tree)
