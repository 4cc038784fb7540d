"""Targets: the chip and the slice that a program is compiled for, and what work costs on them.

Times that come out of here are predicted: a roofline (Williams et al., "Roofline: An Insightful Visual Performance
Model for Multicore Architectures", 2009) and an alpha-beta model of collectives (Thakur et al., "Optimization of
Collective Communication Operations in MPICH", 2005), with peaks from `compax.chips`. They bound what a compiler can
reach; they do not say what it reached.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from compax.chips import CHIPS, Chip, Link, by_x
from compax.cpu import CPU, measured_cpu
from compax.errors import TargetError

__all__ = ["Chip", "Collective", "Link", "Rate", "Roofline", "Target", "measured_cpu"]

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute"]
Network = Literal["ici", "dcn"]
Precision = Literal["default", "high", "highest"]

KINDS: tuple[Kind, ...] = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")

_TEXT = re.compile(r"(?P<chip>[a-z][a-z0-9]*)(?::(?P<shape>\d+(?:x\d+)*))?(?:\*(?P<slices>\d+))?")
# What computes a dtype that has no unit of its own: the first of these that the chip has.
_NEAREST = {
    "int2": ("int4", "int8", "bfloat16", "float32"),
    "int4": ("int8", "bfloat16", "float32"),
    "int8": ("bfloat16", "float32"),
    "float4_e2m1fn": ("float8_e4m3fn", "bfloat16", "float32"),
    "float8_e4m3fn": ("bfloat16", "float32"),
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("float16", "float32"),
}
_SAME_RATE = {"uint2": "int2", "uint4": "int4", "uint8": "int8"}
_PASSES: dict[Precision, int] = {"default": 1, "high": 3, "highest": 6}


@dataclasses.dataclass(frozen=True)
class Rate:
    """A peak, and the unit that it is of.

    Attributes:
        flops_per_second: of one device.
        unit: dtype of the unit that computes.
        note: how it comes to compute another dtype; empty if it is its own.
    """

    flops_per_second: float
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Predicted least time of work on one device.

    Attributes:
        compute_seconds: by dtype, the time at the peak.
        memory_seconds: the time to move the bytes.
    """

    compute_seconds: Mapping[str, float]
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """Compute and memory overlap; dtypes do not, as they share one unit."""
        return max(sum(self.compute_seconds.values()), self.memory_seconds)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What the work waits for."""
        return "compute" if sum(self.compute_seconds.values()) > self.memory_seconds else "memory"

    def __str__(self) -> str:
        """In one line."""
        compute = sum(self.compute_seconds.values())
        return (
            f"{self.seconds:.3g} s predicted, bound by {self.bound} "
            f"(compute {compute:.3g} s, memory {self.memory_seconds:.3g} s)"
        )


@dataclasses.dataclass(frozen=True)
class Collective:
    """Predicted time of one collective.

    Attributes:
        latency_seconds: hops or steps times the latency of one.
        transfer_seconds: bytes over bandwidth.
        assumption: which links it was taken to use.
    """

    latency_seconds: float
    transfer_seconds: float
    assumption: str

    @property
    def seconds(self) -> float:
        """Latency and transfer together."""
        return self.latency_seconds + self.transfer_seconds


@dataclasses.dataclass(frozen=True)
class Ring:
    """Members along one dimension: each sends to its neighbours, a closed one in both directions at full rate."""

    size: int
    closed: bool
    bytes_per_second: float
    latency_seconds: float

    @property
    def bandwidth(self) -> float:
        """At which a member of the ring, or the end of a line, takes in what all others send."""
        return self.bytes_per_second * (2 if self.closed else 1)

    @property
    def hops(self) -> int:
        return self.size // 2 if self.closed else self.size - 1

    def exchange_seconds(self, num_bytes: float) -> float:
        """All-to-all: the time of the busiest link when each member sends its bytes in equal shares to all."""
        if self.closed:  # distances add up to size**2 // 4 for a member, over two directions
            return num_bytes * (self.size**2 // 4) / self.size / self.bandwidth
        near = self.size // 2  # the middle link of a line carries what one half sends the other
        return num_bytes * near * (self.size - near) / self.size / self.bytes_per_second


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip and the slices of it that a program runs on.

    As text: `v5e` is one chip, `v5e:4x4` a slice, `v5e:4x4*2` two slices over the data centre network, `h100:8` a node
    of GPUs and `h100:8*4` four of them, `cpu` the machine at hand.

    Attributes:
        chip: the chip.
        shape: sizes of one slice; `(n,)` for GPUs.
        slices: how many slices there are.

    Raises:
        TargetError: no such slice of the chip exists.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    def __post_init__(self) -> None:
        name, shapes = self.chip.name, self.chip.shapes
        if self.slices < 1 or any(size < 1 for size in self.shape):
            raise TargetError(f"target {self}: sizes and slices are at least 1")
        if len(self.shape) != shapes.dims:
            raise TargetError(
                f"target {self}: a slice of {name} has {shapes.dims} dimension(s), not {len(self.shape)}; "
                f"slices that exist: {shapes}"
            )
        if not shapes.contain(self.shape):
            remedy = f"; write several nodes as {name}:{shapes.largest[0]}*2" if self.chip.link.kind == "nvlink" else ""
            raise TargetError(f"target {self}: {name} has no such slice; those that exist: {shapes}{remedy}")
        if self.slices > 1 and self.chip.network_bandwidth is None:
            raise TargetError(f"target {self}: no network of {name} is known, so there is one slice; drop '*'")

    @staticmethod
    def parse(text: str) -> "Target":
        """The target that a text names; `str` of it gives a text back that means the same.

        Args:
            text: such as `v5p:4x4x8`, `h100:8`, `v5e:4x4*2`, `cpu`; one chip if no shape is given. Nothing is measured:
                the figures of `cpu` are, when the first of them is read.

        Raises:
            TargetError: malformed text, an unknown chip, or a slice that does not exist.
        """
        match = _TEXT.fullmatch(text.strip().lower())
        if match is None:
            raise TargetError(
                f"{text!r} is no target; write a chip, a shape after ':' and slices after '*': v5e:4x4*2, h100:8, cpu"
            )
        chip = find_chip(match["chip"])
        shape = (1,) * chip.shapes.dims if match["shape"] is None else tuple(map(int, match["shape"].split("x")))
        return Target(chip, shape, int(match["slices"] or 1))

    def __str__(self) -> str:
        """The text that names it."""
        shape = "" if all(size == 1 for size in self.shape) and len(self.shape) == self.chip.shapes.dims else "x"
        return (
            self.chip.name + (f":{by_x(self.shape)}" if shape else "") + (f"*{self.slices}" if self.slices != 1 else "")
        )

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def device_memory_bytes(self) -> int:
        """Memory of one device that a program can have: that of the chip by devices, less what the compiler keeps."""
        return self.chip.memory_bytes // self.chip.devices_per_chip - (self.chip.reserved_bytes or 0)

    @property
    def device_memory_bandwidth(self) -> float:
        """Bytes per second between one device and its memory."""
        return self.chip.memory_bandwidth / self.chip.devices_per_chip

    def rate(self, dtype: Any, precision: Precision = "default") -> Rate:
        """Peak FLOP/s of one device for products of matrices, by the unit nearest to a dtype.

        A dtype without a unit is computed by the next wider one that the chip has: int4 as int8, int8 and 8-bit floats
        as bfloat16. Products of float32 follow `jax.lax.Precision`: on a TPU their operands are split into bfloat16,
        one pass by default (which is not float32 accuracy), 3 for `high` and 6 for `highest`; on a GPU they run as
        TensorFloat32 unless `highest` is asked for.

        Args:
            dtype: of the operands, or its name.
            precision: of products of float32.

        Raises:
            TargetError: no unit of the chip computes such products, or an unknown precision.
        """
        if precision not in _PASSES:
            raise TargetError(f"unknown precision {precision!r}; known: {', '.join(_PASSES)}")
        name = _dtype_name(dtype)
        flops = {unit: rate / self.chip.devices_per_chip for unit, rate in self.chip.flops.items()}
        if name == "float32" and self.chip.platform == "tpu":
            passes = _PASSES[precision]
            return Rate(flops["bfloat16"] / passes, "bfloat16", f"float32 in {passes} pass(es) of bfloat16")
        if name == "float32" and precision != "highest" and "tensorfloat32" in flops:
            return Rate(flops["tensorfloat32"], "tensorfloat32", "float32 as TensorFloat32")
        if name in flops:
            return Rate(flops[name], name)
        family = "float8_e4m3fn" if name.startswith("float8") else _SAME_RATE.get(name, name)
        if family in flops:
            return Rate(flops[family], family, f"{name} at the rate of {family}")
        for unit in _NEAREST.get(family, ()):
            if unit in flops:
                return Rate(flops[unit], unit, f"{name} converted to {unit}: {self.chip.name} has no unit for it")
        raise TargetError(
            f"{self.chip.name} has no unit for products of {name}; it has some for {', '.join(flops)}. Count "
            "them under the dtype that they are computed in"
        )

    @property
    def vector_rate(self) -> float | None:
        """Peak float32 FLOP/s of one device outside of products of matrices; None if unknown."""
        vector = self.chip.vector_flops
        return None if vector is None else vector / self.chip.devices_per_chip

    def product_rate(self, dtype: Any) -> float:
        """FLOP/s of one device for products of any dtype: where no unit computes them, as operations on vectors.

        Infinite where no rate of those is known either: what they move counts alone.

        Raises:
            TargetError: it is no dtype.
        """
        name = _dtype_name(dtype)
        try:
            return self.rate(name).flops_per_second
        except TargetError:
            return math.inf if self.vector_rate is None else self.vector_rate

    def roofline(self, flops_by_dtype: Mapping[str, float], num_bytes: float) -> Roofline:
        """Predicted least time of work on one device.

        Args:
            flops_by_dtype: FLOPs of products of matrices that one device computes, by dtype of the operands.
            num_bytes: that one device reads from and writes to its memory.

        Raises:
            TargetError: one is no dtype.
        """
        compute = {dtype: flops / self.product_rate(dtype) for dtype, flops in flops_by_dtype.items()}
        return Roofline(MappingProxyType(compute), num_bytes / self.device_memory_bandwidth)

    def roofline_seconds(self, flops_by_dtype: Mapping[str, float], num_bytes: float) -> float:
        """The seconds of `roofline`."""
        return self.roofline(flops_by_dtype, num_bytes).seconds

    def collective_seconds(self, kind: Kind, num_bytes: float, group_size: int, over: Network = "ici") -> float:
        """The seconds of `collective`."""
        return self.collective(kind, num_bytes, group_size, over).seconds

    def collective(self, kind: Kind, num_bytes: float, group_size: int, over: Network = "ici") -> Collective:
        r"""Predicted time of a collective, all groups of the slice at once.

        With `V` bytes, `n` members, `a` the latency of a hop and `w` a link's bytes per second in one direction:

        1. A torus. The group lies along whole dimensions of it: along one of size `n` if there is one, else along the
           fewest whose sizes multiply to `n`. A dimension that closes to a ring counts with both directions, `B = 2w`
           and `n // 2` hops, an open one with `B = w` and `n - 1` hops; over several dimensions `B` and hops add up.
           A group along no whole dimensions is taken as one open line. Groups in parallel do not share links, but the
           devices of one chip share its links if they are in different groups.

               all-gather, reduce-scatter   a hops + V (n-1)/n / B
               all-reduce                   both, one after the other
               all-to-all                   a hops + max over dimensions of V d/4 / (2w) if closed, V d/4 / w if open
               permute                      a + V / w, to a neighbour

        2. A switch (NVLink), or the data centre network between slices: rings of `n - 1` steps over all of a member's
           links, `B` their bandwidth in one direction.

               all-gather, reduce-scatter   a (n-1) + V (n-1)/n / B
               all-reduce                   both, one after the other
               all-to-all                   a (n-1) + V (n-1)/n / B
               permute                      a + V / B

        A collective within and between slices is made of one over each: an all-reduce is a reduce-scatter over `ici`,
        an all-reduce of `V` by the members of a slice over `dcn`, and an all-gather over `ici`.

        Args:
            kind: which collective.
            num_bytes: `V`, of the larger of operand and result of one member: the result of an all-gather, the operand
                of a reduce-scatter.
            group_size: `n`, in devices of a slice, or over `dcn` in slices.
            over: links of a slice, or the network between slices.

        Raises:
            TargetError: an unknown kind, no such network, or more members than the target has.
        """
        if kind not in KINDS:
            raise TargetError(f"unknown collective {kind!r}; known: {', '.join(KINDS)}")
        if over not in ("ici", "dcn"):
            raise TargetError(f"unknown network {over!r}: ici joins the chips of a slice, dcn the slices")
        members = self.slices if over == "dcn" else self.num_devices // self.slices
        if not 1 <= group_size <= members:
            what = "slice(s)" if over == "dcn" else "device(s) in a slice"
            raise TargetError(f"a group of {group_size} over {over}: {self} has {members} {what}")
        if group_size == 1:
            return Collective(0.0, 0.0, "a group of one sends nothing")
        if over == "dcn":
            bandwidth = self.chip.network_bandwidth
            assert bandwidth is not None  # a target of several slices has a network
            shared = bandwidth / self.chip.devices_per_chip
            note = f"a ring of {group_size} slices, each chip over its share of the network"
            return switched(kind, num_bytes, group_size, shared, self.chip.network_latency_seconds, note)
        if self.chip.link.kind == "nvlink":
            link = self.chip.link
            note = f"a ring of {group_size} over all {link.per_chip} links of each GPU"
            bandwidth = link.bytes_per_second * link.per_chip
            return switched(kind, num_bytes, group_size, bandwidth, link.latency_seconds, note)
        rings, note = self._rings(group_size)
        return over_rings(kind, num_bytes, group_size, rings, note)

    def _rings(self, group_size: int) -> tuple[list[Ring], str]:
        """The dimensions that a group lies along, and that in words."""
        link, per_chip = self.chip.link, self.chip.devices_per_chip
        if group_size == per_chip and (rate := self.chip.device_links_bytes_per_second) is not None:
            return [Ring(per_chip, False, rate, link.latency_seconds)], "the devices of one chip"
        closes = self.chip.shapes.wraps(self.shape)
        # Whole chips first: their devices share what comes in. Else each device of a chip is in a group of its own.
        for num_chips, shared in ((group_size / per_chip, 1), (group_size, per_chip)):
            dims = _dims_of(self.shape, num_chips)
            if dims:
                rate = link.bytes_per_second / shared
                rings = [Ring(self.shape[dim], closes[dim], rate, link.latency_seconds) for dim in dims]
                words = ", ".join(f"{ring.size} ({'closed' if ring.closed else 'open'})" for ring in rings)
                sharing = f"; {shared} devices share a chip's links" if shared > 1 else ""
                return rings, f"along dimension(s) of size {words}{sharing}"
        line = Ring(group_size, False, link.bytes_per_second / per_chip, link.latency_seconds)
        return [line], f"no dimensions of {by_x(self.shape)} have {group_size} members: taken as one open line"


def find_chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
        TargetError: there is none; the message names the closest.
    """
    known = {**CHIPS, CPU.name: CPU}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise TargetError(f"unknown chip {name!r}{hint} Known: {', '.join(known)}")


def _dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    try:
        return np.dtype(dtype).name
    except TypeError as error:
        raise TargetError(f"{dtype!r} is no dtype: {error}") from error


def _dims_of(shape: tuple[int, ...], members: float) -> tuple[int, ...]:
    """The fewest dimensions, larger than one, whose sizes multiply to a number of members; none if there are none."""
    choices = [
        tuple(dim for dim in range(len(shape)) if mask >> dim & 1 and shape[dim] > 1)
        for mask in range(1, 1 << len(shape))
    ]
    fitting = [dims for dims in choices if dims and math.prod(shape[dim] for dim in dims) == members]
    return min(fitting, key=lambda dims: (len(dims), dims), default=())


def over_rings(kind: Kind, num_bytes: float, size: int, rings: Sequence[Ring], note: str) -> Collective:
    """Predicted time of a collective of some members that lie along rings and lines: case 1 of `Target.collective`."""
    hops = sum(ring.hops * ring.latency_seconds for ring in rings)
    if kind == "permute":
        first = rings[0]
        return Collective(first.latency_seconds, num_bytes / first.bytes_per_second, f"{note}; to a neighbour")
    if kind == "all-to-all":
        return Collective(hops, max(ring.exchange_seconds(num_bytes) for ring in rings), note)
    once = num_bytes * (size - 1) / size / sum(ring.bandwidth for ring in rings)
    times = 2 if kind == "all-reduce" else 1
    return Collective(times * hops, times * once, note)


def switched(kind: Kind, num_bytes: float, size: int, bandwidth: float, latency: float, note: str) -> Collective:
    """Predicted time of a collective over a switch or a network: case 2 of `Target.collective`."""
    if kind == "permute":
        return Collective(latency, num_bytes / bandwidth, note)
    times = 2 if kind == "all-reduce" else 1
    return Collective(times * (size - 1) * latency, times * num_bytes * (size - 1) / size / bandwidth, note)
