"""How the axes of a mesh lie on the links of a slice, and what collectives along them take. Predicted.

JAX lays a mesh over a torus so that each axis has whole dimensions of it, or parts of them where it must
(`jax.experimental.mesh_utils`). The same is asked here, of devices that need not be there; where the members of a group
stand then tells its rings and lines.
"""

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from compax.target import Kind, Ring, Target, over_rings, switched

DCN = "dcn_data"
"""The axis of a mesh that lies over the network between slices."""
_DIMS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class MeshLinks:
    """A mesh over a slice.

    Attributes:
        target: the slice.
        sizes: of the mesh's axes, in order; those between slices first.
    """

    target: Target
    sizes: Mapping[str, int]

    def seconds(self, kind: Kind, num_bytes: float, axes: Sequence[str]) -> float:
        """Predicted time of a collective of all groups along some axes at once.

        Over several axes of a slice it goes over the links of all of them together. Over slices too it goes within them
        first, and over the network with what is left.

        Args:
            kind: which collective.
            num_bytes: of the larger of operand and result of one member.
            axes: of the mesh.
        """
        inside = tuple(name for name in axes if name != DCN and self.sizes[name] > 1)
        seconds = self._inside(kind, num_bytes, inside) if inside else 0.0
        slices = self.sizes.get(DCN, 1) if DCN in axes else 1
        if slices > 1:
            share = num_bytes / math.prod(self.sizes[name] for name in inside)
            seconds += self.target.collective_seconds(kind, share, slices, over="dcn")
        return seconds

    def of_size(self, size: int) -> tuple[str, ...] | None:
        """The fewest axes of a slice whose sizes multiply to that of a group; none if no axes do."""
        names = [name for name, length in self.sizes.items() if length > 1 and name != DCN]
        choices = (some for count in range(1, len(names) + 1) for some in itertools.combinations(names, count))
        return next((some for some in choices if math.prod(self.sizes[name] for name in some) == size), None)

    def group_seconds(self, kind: Kind, num_bytes: float, size: int, *, between_slices: bool = False) -> float:
        """Predicted time of a collective of which the size of its groups is known, as that of a compiled program is."""
        if between_slices:
            return self.target.collective_seconds(kind, num_bytes, size, over="dcn")
        axes = self.of_size(size)
        if axes is None:
            return self.target.collective_seconds(kind, num_bytes, size)
        return self._inside(kind, num_bytes, axes)

    def _inside(self, kind: Kind, num_bytes: float, axes: tuple[str, ...]) -> float:
        size, link = math.prod(self.sizes[name] for name in axes), self.target.chip.link
        if link.kind == "none":
            # Devices that a machine stands for: what they exchange goes through the memory that they share.
            shared = self.target.device_memory_bandwidth / math.prod(self.sizes.values())
            return switched(kind, num_bytes, size, shared, 0.0, "").seconds
        rings = self._rings(axes) if link.kind.startswith("ici") else None
        if rings is None:
            return self.target.collective_seconds(kind, num_bytes, size)
        return over_rings(kind, num_bytes, size, rings, "").seconds

    def _rings(self, axes: tuple[str, ...]) -> list[Ring] | None:
        """The rings and lines of a group along some axes; none where it stands along no box of the torus."""
        if self._places is None:
            return None
        first = tuple(slice(None) if name in axes else 0 for name in self.sizes)
        members = self._places[first].reshape(-1, _DIMS)
        closes, link, found = self.target.chip.shapes.wraps(self.target.shape), self.target.chip.link, list[Ring]()
        for dim, size in enumerate(self.target.shape):
            along = np.unique(members[:, dim])
            if len(along) > 1:
                whole = len(along) == size
                # Groups that stand between each other's members share the links that they pass.
                stride = float(along[-1] - along[0]) / (len(along) - 1)
                rate = link.bytes_per_second / stride
                found.append(Ring(len(along), whole and closes[dim], rate, link.latency_seconds))
        return found if math.prod(ring.size for ring in found) == len(members) else None

    @functools.cached_property
    def _places(self) -> np.ndarray | None:
        """Coordinates of the chip at each place of the mesh; none where a chip shows as several devices."""
        if self.target.chip.devices_per_chip > 1:
            return None
        sizes = tuple(1 if name == DCN else size for name, size in self.sizes.items())
        devices = [_device(at) for at in np.ndindex(*self.target.shape)]
        for split in (False, True):
            try:
                laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
                return np.array([device.coords for device in laid.flat]).reshape(*sizes, _DIMS)
            except (NotImplementedError, ValueError, AssertionError):
                continue
        return None


def _device(at: tuple[int, ...]) -> Any:
    """What JAX looks at of a device to find its place."""
    place = (*at, *(0,) * (_DIMS - len(at)))
    return types.SimpleNamespace(
        platform="tpu", device_kind="", coords=place, core_on_chip=0, id=0, process_index=0, slice_index=0
    )
