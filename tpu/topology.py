"""Slices that need not be there, and the meshes laid over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compax.errors import CompileError, ShardingError
from compax.target import Target

if TYPE_CHECKING:
    from jax.sharding import Mesh

REST = -1
"""In a mesh: as many as are left."""

# JAX shows the two cores of a v4 chip as one device, but libtpu only describes them so when it is asked to.
_DESCRIBED_BY: Mapping[str, Mapping[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


def parse_mesh(text: str, target: Target | int) -> dict[str, int]:
    """Reads a mesh, such as `data=4,model=4`; `-1` for one axis stands for the devices that are left.

    Args:
        text: axes and sizes.
        target: what the mesh is laid over, or how many devices. A CPU takes any mesh: it stands for as many as are
            asked for.

    Returns:
        Sizes by axis, in order.

    Raises:
        ShardingError: it is malformed, or the sizes do not multiply to the target's devices.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not size.removeprefix("-").isdigit():
            raise ShardingError(f"mesh '{text}': '{part.strip()}' is not AXIS=SIZE; write it as in data=4,model=4")
        if name in axes:
            raise ShardingError(f"mesh '{text}': the axis '{name}' is there twice")
        if int(size) < 1 and int(size) != REST:
            raise ShardingError(f"mesh '{text}': the axis '{name}' has the size {size}; it must be at least 1, or -1")
        axes[name] = int(size)
    known = math.prod(size for size in axes.values() if size != REST)
    if isinstance(target, int):
        devices = target
    else:
        devices = known if target.chip.platform == "cpu" else target.num_devices
    open_axes = [name for name, size in axes.items() if size == REST]
    if len(open_axes) > 1:
        raise ShardingError(f"mesh '{text}': only one axis can be -1, {' and '.join(open_axes)} are")
    if open_axes and devices % known == 0:
        axes[open_axes[0]] = devices // known
    elif open_axes or known != devices:
        there = f"and there are {devices}" if isinstance(target, int) else f"{target} has {devices}"
        raise ShardingError(
            f"mesh '{text}' is of {known}{' times what is left of' if open_axes else ''} devices, {there}: make the "
            f"sizes multiply to {devices}, or give one axis as -1"
        )
    return axes


def make_mesh(target: Target, axes: Mapping[str, int]) -> Mesh:
    """Lays a mesh over the devices of a target that need not be there; all its axes are Auto.

    A TPU's devices come from its compiler (libtpu), neighbours on the torus as neighbours on the mesh where that is
    possible. Those of a CPU are the fake ones of this process.

    Args:
        target: a slice of TPUs, or CPUs.
        axes: sizes by name.

    Raises:
        CompileError: there is no compiler for the target here, or it knows no such slice.
        ShardingError: the mesh cannot be laid over that torus.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    shape = tuple(axes.values())
    if target.chip.platform == "cpu":
        devices = np.asarray(jax.devices("cpu")[: math.prod(shape)]).reshape(shape)
    elif target.chip.platform == "tpu":
        devices = _lay(target, shape, _described(target))
    else:
        raise CompileError(
            f"{target} cannot be compiled for without one: only slices of TPUs have a compiler that needs no device"
        )
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def _described(target: Target) -> list[Any]:
    """The devices of a slice, as libtpu describes them."""
    import jax
    from jax.experimental import topologies

    name = f"{target.chip.name}:{'x'.join(map(str, target.shape))}"
    more: dict[str, Any] = dict(_DESCRIBED_BY.get(target.chip.name, {}))
    if target.slices > 1:
        more["num_slices"] = target.slices
    if math.prod(target.shape) == 1:
        more["chips_per_host_bounds"] = (1, 1, 1)  # hosts have four chips, unless told otherwise
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise CompileError(f"the compiler of TPUs has no topology '{name}': {first}") from error


def _lay(target: Target, shape: tuple[int, ...], devices: list[Any]) -> Any:
    """Devices in the shape of a mesh: its axes along whole dimensions of the torus, or else along parts of them."""
    if len(devices) != target.num_devices:
        raise CompileError(
            f"the compiler of TPUs describes {target} as {len(devices)} devices, the table of chips as "
            f"{target.num_devices}: this version of libtpu and this table do not go together"
        )
    if target.slices > 1 and shape[0] % target.slices:
        raise ShardingError(
            f"the first axis of the mesh has the size {shape[0]}, which {target.slices} slices do not divide: it is "
            "the one that goes over the data centre's network"
        )
    try:
        return _arranged(target.slices, shape, devices, split=False)
    except (NotImplementedError, ValueError, AssertionError):
        pass
    try:
        return _arranged(target.slices, shape, devices, split=True)
    except (NotImplementedError, ValueError, AssertionError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ShardingError(f"a mesh of {'x'.join(map(str, shape))} cannot be laid over {target}: {first}") from error


def _arranged(slices: int, shape: tuple[int, ...], devices: list[Any], *, split: bool) -> Any:
    from jax.experimental import mesh_utils

    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    inside, outside = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=split)
