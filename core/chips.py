"""Chips that programs are compiled for: what they compute, hold, move and cost.

Every figure carries where it is from and of when (`Chip.sources`). A source that begins with "estimate" is not the
vendor's word. Peaks are dense (no sparsity) and of products of matrices; what a program gets of them is measured, never
read off this table.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

GB = 10**9
GIB = 2**30

Platform = Literal["tpu", "gpu", "cpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """The links between neighbouring chips of one slice.

    Attributes:
        kind: a torus of two or three dimensions, a switch that joins all chips of a node, or none.
        bytes_per_second: of one link, in one direction.
        per_chip: links a chip; a torus has two for each dimension.
        latency_seconds: of one hop.
    """

    kind: Literal["ici-torus2d", "ici-torus3d", "nvlink", "none"]
    bytes_per_second: float = 0.0
    per_chip: int = 0
    latency_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The slices that exist of a chip.

    Attributes:
        dims: how many dimensions a slice has.
        listed: slices by their sizes, in any order of the dimensions.
        multiple: beyond those, all whose sizes are multiples of this one; 0 if there are none.
        largest: the largest slice.
        wraps_at: a dimension of this size, or of a multiple of it in a slice in which all are, closes to a ring;
            0 if none does.
    """

    dims: int
    listed: tuple[tuple[int, ...], ...] = ()
    multiple: int = 0
    largest: tuple[int, ...] = ()
    wraps_at: int = 0

    def contain(self, shape: tuple[int, ...]) -> bool:
        """Whether a slice of this shape exists."""
        sizes = tuple(sorted(shape))
        if len(shape) != self.dims:
            return False
        if sizes in {tuple(sorted(listed)) for listed in self.listed}:
            return True
        limits = zip(sizes, sorted(self.largest), strict=True) if self.multiple else ()
        return bool(self.multiple) and all(size % self.multiple == 0 and size <= limit for size, limit in limits)

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which dimensions of a slice close to a ring."""
        if not self.wraps_at or (self.multiple and any(size % self.wraps_at for size in shape)):
            return (False,) * len(shape)
        return tuple(size % self.wraps_at == 0 for size in shape)

    def __str__(self) -> str:
        """The slices in words."""
        listed = ", ".join(by_x(shape) for shape in self.listed)
        return f"{listed}, and multiples of {self.multiple} up to {by_x(self.largest)}" if self.multiple else listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip as its maker and its sellers describe it.

    Attributes:
        name: how a target names it.
        platform: as JAX does.
        flops: peak FLOP/s of a chip by dtype of the operands; a dtype is absent where no unit computes it.
        memory_bytes: of a chip; in GiB or GB, as the vendor means it.
        memory_bandwidth: bytes per second between a chip and its memory.
        link: to its neighbours.
        shapes: the slices that exist.
        sources: where each figure is from, by the name of the attribute.
        vector_flops: peak float32 FLOP/s of a chip outside of products of matrices; `None` if unknown.
        network_bandwidth: bytes per second of a chip's share of the data centre network, in one direction.
        network_latency_seconds: of one message over it.
        host_bandwidth: bytes per second between host and a chip, in one direction; `None` if unknown.
        power_watts: the most that a chip draws; `None` if unknown.
        price_per_hour: US dollars for a chip on demand; `None` without a public price.
        devices_per_chip: JAX devices that a chip shows as.
        device_links_bytes_per_second: between devices of one chip, in one direction.
        reserved_bytes: of a device's memory, what the compiler keeps for itself; `None` if unknown.
    """

    name: str
    platform: Platform
    flops: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth: float
    sources: Mapping[str, str]
    link: Link = Link(kind="none")
    shapes: Shapes = Shapes(dims=1, listed=((1,),))
    vector_flops: float | None = None
    network_bandwidth: float | None = None
    network_latency_seconds: float = 0.0
    host_bandwidth: float | None = None
    power_watts: float | None = None
    price_per_hour: float | None = None
    devices_per_chip: int = 1
    device_links_bytes_per_second: float | None = None
    reserved_bytes: int | None = None

    def __hash__(self) -> int:
        """By name, because mappings have no hash."""
        return hash(self.name)

    def __repr__(self) -> str:
        """The name: figures of a chip that is measured when they are read are not read for this."""
        return f"Chip({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Mappings are rebuilt: a read-only view cannot be pickled."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuild, ({**fields, "flops": dict(self.flops), "sources": dict(self.sources)},)


def _rebuild(fields: dict[str, Any]) -> Chip:
    frozen: dict[str, Any] = {name: MappingProxyType(fields[name]) for name in ("flops", "sources")}
    return Chip(**{**fields, **frozen})


def by_x(shape: tuple[int, ...]) -> str:
    """A shape as it is written in names of topologies."""
    return "x".join(map(str, shape))


def _tpu(
    name: str,
    link: Link,
    shapes: Shapes,
    *,
    flops: dict[str, float],
    memory: tuple[int, int],
    bandwidths: tuple[float, float, float],
    power: float,
    price: float,
    sources: dict[str, str],
    **rest: Any,
) -> Chip:
    """A TPU. `memory`: bytes, and what the compiler keeps; `bandwidths`: memory, network, host."""
    return Chip(
        name=name,
        platform="tpu",
        flops=MappingProxyType(flops),
        memory_bytes=memory[0],
        reserved_bytes=memory[1],
        memory_bandwidth=bandwidths[0],
        network_bandwidth=bandwidths[1],
        network_latency_seconds=1e-5,
        host_bandwidth=bandwidths[2],
        link=link,
        shapes=shapes,
        power_watts=power,
        price_per_hour=price,
        sources=MappingProxyType({**_TPU_SOURCES, **sources}),
        **rest,
    )


_LATENCIES = "estimate: about 1 us a hop over ICI (Austin et al., How To Scale Your Model, 2025), 10 us over a network"
_LIST_PRICE = (
    "estimate: Google Cloud's list price on demand in its cheapest US region, 2025; from memory, not looked up"
)
_TPU_SOURCES = {
    "devices_per_chip": "libtpu 0.0.42.1, topologies without devices, 2026-11",
    "reserved_bytes": "compiled: memory less what libtpu 0.0.42.1 says is available, 2026-11",
    "network_latency_seconds": _LATENCIES,
    "price_per_hour": _LIST_PRICE,
}
_TORUS_2D = Shapes(
    dims=2,
    listed=((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    largest=(16, 16),
    wraps_at=16,
)
_SMALL_3D = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def _torus_3d(*largest: int) -> Shapes:
    return Shapes(dims=3, listed=_SMALL_3D, multiple=4, largest=largest, wraps_at=4)


_V4 = _tpu(
    "v4",
    Link(kind="ici-torus3d", bytes_per_second=50e9, per_chip=6, latency_seconds=1e-6),
    _torus_3d(16, 16, 16),
    flops={"bfloat16": 275e12, "int8": 275e12},
    memory=(32 * GIB, 5 * GIB // 4),
    bandwidths=(1200e9, 6.25e9, 16e9),
    power=192.0,
    price=3.22,
    sources={
        "flops": "Google Cloud, TPU v4 (275 teraflops, bf16 or int8), 2025",
        "memory_bytes": "Google Cloud, TPU v4 (32 GiB), 2025",
        "memory_bandwidth": "Google Cloud, TPU v4 (1200 GBps), 2025",
        "link": f"Jouppi et al., TPU v4, 2023, arXiv:2304.01433 (6 links of 50 GB/s); {_LATENCIES}",
        "shapes": "Google Cloud, TPU v4 (pod of 4096 chips; a torus if all sizes are multiples of 4), 2025",
        "network_bandwidth": "estimate: 25 GB/s a host of 4 chips (How To Scale Your Model, 2025)",
        "host_bandwidth": "How To Scale Your Model, 2025 (PCIe of v4: 16 GB/s each way)",
        "power_watts": "Google Cloud, TPU v4 (measured minimum, mean and maximum: 90, 170, 192 W), 2025",
        "devices_per_chip": "Google Cloud: one device (megacore). libtpu 0.0.42.1 shows two without devices, unless it "
        'is asked for chip_config_name="megacore", 2026-11',
    },
)
_V5E = _tpu(
    "v5e",
    Link(kind="ici-torus2d", bytes_per_second=50e9, per_chip=4, latency_seconds=1e-6),
    _TORUS_2D,
    flops={"bfloat16": 197e12, "int8": 393e12, "int4": 788e12},
    memory=(16 * GIB, GIB // 4),
    bandwidths=(819e9, 3.125e9, 15e9),
    power=140.0,
    price=1.20,
    vector_flops=6.1e12,
    sources={
        "flops": "Google Cloud, TPU v5e (197 bf16, 393 int8), 2025; int4: JAX 0.10.2, Pallas' table of TPUs",
        "vector_flops": "estimate: 8 x 128 lanes of 4 units at 1.5 GHz (How To Scale Your Model, 2025)",
        "memory_bytes": "Google Cloud, TPU v5e (16 GB, meant as GiB: JAX 0.10.2 has 17.2e9), 2025",
        "memory_bandwidth": "Google Cloud, TPU v5e (819 GBps), 2025",
        "link": f"Google Cloud, TPU v5e (400 GBps both ways a chip, 4 ports), 2025; {_LATENCIES}",
        "shapes": "Google Cloud, TPU v5e (table of slices), 2025; rings at 16: How To Scale Your Model, 2025",
        "network_bandwidth": "Google Cloud, TPU v5e (2 x 100 Gbps a host of 8 chips), 2025",
        "host_bandwidth": "How To Scale Your Model, 2025 (PCIe: about 15 GB/s a chip)",
        "power_watts": "estimate: as many peak bf16 FLOPs a joule as v4 at its measured maximum; Google publishes none",
    },
)
_V5P = _tpu(
    "v5p",
    Link(kind="ici-torus3d", bytes_per_second=100e9, per_chip=6, latency_seconds=1e-6),
    _torus_3d(16, 20, 28),
    flops={"bfloat16": 459e12, "int8": 918e12, "int4": 1840e12},
    memory=(96 * GIB, 26 * GIB // 100),
    bandwidths=(2765e9, 6.25e9, 15e9),
    power=320.0,
    price=4.20,
    vector_flops=1.4e13,
    sources={
        "flops": "Google Cloud, TPU v5p (459 bf16; 459 fp8, which is computed as bf16), 2025; int8 (918) and int4: JAX "
        "0.10.2, Pallas' table of TPUs",
        "vector_flops": "estimate: two cores of 8 x 128 lanes with 4 units at 1.75 GHz (How To Scale Your Model, 2025)",
        "memory_bytes": "JAX 0.10.2, Pallas' table of TPUs (103e9), and How To Scale Your Model, 2025 (96 GB); Google "
        "Cloud says 95 GiB, 2025",
        "memory_bandwidth": "Google Cloud, TPU v5p (2765 GB/s), 2025",
        "link": f"Google Cloud, TPU v5p (1200 GBps both ways a chip, 6 links), 2025; {_LATENCIES}",
        "shapes": "Google Cloud, TPU v5p, 2025 (pod of 16x20x28; the largest slice on sale is 16x16x24)",
        "network_bandwidth": "Google Cloud, TPU v5p (50 Gbps a chip), 2025",
        "host_bandwidth": "How To Scale Your Model, 2025 (PCIe: about 15 GB/s a chip)",
        "power_watts": "estimate: as many peak bf16 FLOPs a joule as v4 at its measured maximum; Google publishes none",
    },
)
_V6E = _tpu(
    "v6e",
    Link(kind="ici-torus2d", bytes_per_second=100e9, per_chip=4, latency_seconds=1e-6),
    _TORUS_2D,
    flops={"bfloat16": 918e12, "int8": 1836e12, "int4": 3680e12},
    memory=(32 * GIB, 3 * GIB // 4),
    bandwidths=(1638e9, 12.5e9, 32e9),
    power=385.0,
    price=2.70,
    sources={
        "flops": "Google Cloud, TPU v6e (918 bf16, 1836 int8; fp8 is computed at the rate of bf16), 2025; int4: JAX "
        "0.10.2, Pallas' table of TPUs",
        "memory_bytes": "Google Cloud, TPU v6e (32 GB, meant as GiB: JAX 0.10.2 has 34.4e9), 2025",
        "memory_bandwidth": "Google Cloud, TPU v6e (1638 GBps), 2025",
        "link": f"Google Cloud, TPU v6e (800 GBps both ways a chip, 4 ports), 2025; {_LATENCIES}",
        "shapes": "Google Cloud, TPU v6e, 2025 (as v5e); rings at 16: How To Scale Your Model, 2025",
        "network_bandwidth": "Google Cloud, TPU v6e (4 x 200 Gbps a host of 8 chips), 2025",
        "host_bandwidth": "How To Scale Your Model, 2025 (PCIe of v6e: 32 GB/s)",
        "power_watts": "estimate: v5e's estimate and Google's word of May 2024 that v6e is 67 % more energy-efficient",
    },
)
_TPU7X = _tpu(
    "tpu7x",
    Link(kind="ici-torus3d", bytes_per_second=100e9, per_chip=6, latency_seconds=1e-6),
    _torus_3d(16, 16, 36),
    flops={"bfloat16": 2307e12, "float8_e4m3fn": 4614e12},
    memory=(192 * GIB, 5 * GIB // 4),
    bandwidths=(7380e9, 12.5e9, 32e9),
    power=965.0,
    price=12.0,
    devices_per_chip=2,
    device_links_bytes_per_second=600e9,
    sources={
        "flops": "Google Cloud, TPU7x (2307 bf16, 4614 fp8), 2025; no int8 unit: JAX 0.10.2, Pallas' table of TPUs",
        "memory_bytes": "Google Cloud, TPU7x (192 GiB), 2025",
        "memory_bandwidth": "Google Cloud, TPU7x (7380 GB/s), 2025",
        "link": f"Google Cloud, TPU7x (1200 GB/s both ways a chip), 2025, over 6 links; {_LATENCIES}",
        "shapes": "Google Cloud, TPU7x (pod of 9216 chips), 2025; that this is 16x16x36 is an estimate",
        "network_bandwidth": "Google Cloud, TPU7x (100 Gb/s a chip), 2025",
        "host_bandwidth": "estimate: as v6e",
        "power_watts": "estimate: v6e's estimate and Google's word of April 2025 that Ironwood does twice as many "
        "FLOPs a joule, taken at its fp8 peak",
        "device_links_bytes_per_second": "estimate: six times an ICI link, as Google Cloud describes the two chiplets",
    },
)


def _gpu(
    name: str,
    links: tuple[int, float],
    *,
    flops: dict[str, float],
    vector_flops: float,
    memory: tuple[int, float],
    network: float,
    host: float,
    power: float,
    price: float,
    sources: dict[str, str],
) -> Chip:
    """A GPU of a node of eight. `links`: how many and bytes per second of one; `memory`: bytes, bytes per second."""
    return Chip(
        name=name,
        platform="gpu",
        flops=MappingProxyType(flops),
        vector_flops=vector_flops,
        memory_bytes=memory[0],
        memory_bandwidth=memory[1],
        link=Link(kind="nvlink", bytes_per_second=links[1], per_chip=links[0], latency_seconds=2e-6),
        shapes=Shapes(dims=1, listed=tuple((size,) for size in range(1, 9)), largest=(8,)),
        network_bandwidth=network,
        network_latency_seconds=5e-6,
        host_bandwidth=host,
        power_watts=power,
        price_per_hour=price,
        sources=MappingProxyType({**_GPU_SOURCES, **sources}),
    )


_GPU_SOURCES = {
    "shapes": "a node of eight GPUs on one NVLink switch, as in NVIDIA's DGX and HGX",
    "network_latency_seconds": "estimate: 5 us a message over InfiniBand",
    "devices_per_chip": "JAX shows a GPU as one device",
}


def _sheet(name: str, figures: str) -> str:
    return f"NVIDIA, data sheet of {name} ({figures}); from memory, dense figures are half of those with sparsity"


_NVLINK_LATENCY = "latency is an estimate: 2 us a step of a ring"

_A100 = _gpu(
    "a100",
    (12, 25e9),
    flops={
        "float64": 19.5e12,
        "float32": 19.5e12,
        "tensorfloat32": 156e12,
        "bfloat16": 312e12,
        "float16": 312e12,
        "int8": 624e12,
    },
    vector_flops=19.5e12,
    memory=(80 * GIB, 2039e9),
    network=25e9,
    host=32e9,
    power=400.0,
    price=3.43,
    sources={
        "flops": _sheet("A100 80GB SXM, 2021", "624 int8, 312 bf16, 156 TF32, 19.5 fp32")
        + "; its int4 units are left out, because XLA emits no int4 products for them",
        "vector_flops": _sheet("A100 80GB SXM, 2021", "19.5 fp32"),
        "memory_bytes": "NVIDIA (80 GB, meant as GiB: nvidia-smi shows 81920 MiB), 2021",
        "memory_bandwidth": _sheet("A100 80GB SXM, 2021", "2039 GB/s"),
        "link": _sheet("A100 80GB SXM, 2021", "600 GB/s both ways, 12 links") + f"; {_NVLINK_LATENCY}",
        "network_bandwidth": "NVIDIA, DGX A100 (200 Gb/s a GPU), 2020",
        "host_bandwidth": "PCIe 4.0 x16, one way",
        "power_watts": _sheet("A100 80GB SXM, 2021", "400 W"),
        "price_per_hour": "estimate: AWS p4de.24xlarge, on demand, US, 27.45 USD for 8 after June 2025; from memory",
    },
)
_HOPPER = {
    "float64": 67e12,
    "float32": 67e12,
    "tensorfloat32": 494.5e12,
    "bfloat16": 989.5e12,
    "float16": 989.5e12,
    "float8_e4m3fn": 1979e12,
    "int8": 1979e12,
}
_H100 = _gpu(
    "h100",
    (18, 25e9),
    flops=_HOPPER,
    vector_flops=67e12,
    memory=(80 * GIB, 3350e9),
    network=50e9,
    host=64e9,
    power=700.0,
    price=6.88,
    sources={
        "flops": _sheet("H100 SXM, 2023", "1979 fp8 and int8, 989.5 bf16, 494.5 TF32, 67 fp32"),
        "vector_flops": _sheet("H100 SXM, 2023", "67 fp32"),
        "memory_bytes": "NVIDIA (80 GB, meant as GiB; nvidia-smi shows 81559 MiB), 2023",
        "memory_bandwidth": _sheet("H100 SXM, 2023", "3.35 TB/s"),
        "link": _sheet("H100 SXM, 2023", "900 GB/s both ways, 18 links") + f"; {_NVLINK_LATENCY}",
        "network_bandwidth": "NVIDIA, DGX H100 (400 Gb/s a GPU), 2022",
        "host_bandwidth": "PCIe 5.0 x16, one way",
        "power_watts": _sheet("H100 SXM, 2023", "700 W"),
        "price_per_hour": "estimate: AWS p5.48xlarge, on demand, US, 55.04 USD for 8 after June 2025; from memory",
    },
)
_H200 = _gpu(
    "h200",
    (18, 25e9),
    flops=_HOPPER,
    vector_flops=67e12,
    memory=(141 * GIB, 4800e9),
    network=50e9,
    host=64e9,
    power=700.0,
    price=7.91,
    sources={
        "flops": _sheet("H200 SXM, 2024", "1979 fp8 and int8, 989.5 bf16, 494.5 TF32, 67 fp32"),
        "vector_flops": _sheet("H200 SXM, 2024", "67 fp32"),
        "memory_bytes": "NVIDIA (141 GB, meant as GiB; nvidia-smi shows 143771 MiB, some 140.4 GiB), 2024",
        "memory_bandwidth": _sheet("H200 SXM, 2024", "4.8 TB/s"),
        "link": _sheet("H200 SXM, 2024", "900 GB/s both ways, 18 links") + f"; {_NVLINK_LATENCY}",
        "network_bandwidth": "NVIDIA, DGX H200 (400 Gb/s a GPU), 2024",
        "host_bandwidth": "PCIe 5.0 x16, one way",
        "power_watts": _sheet("H200 SXM, 2024", "700 W"),
        "price_per_hour": "estimate: AWS p5en.48xlarge, on demand, US, 63.30 USD for 8 after June 2025; from memory",
    },
)
_B200 = _gpu(
    "b200",
    (18, 50e9),
    flops={
        "float64": 40e12,
        "float32": 80e12,
        "tensorfloat32": 1100e12,
        "bfloat16": 2250e12,
        "float16": 2250e12,
        "float8_e4m3fn": 4500e12,
        "int8": 4500e12,
        "float4_e2m1fn": 9000e12,
    },
    vector_flops=80e12,
    memory=(180 * GIB, 8000e9),
    network=50e9,
    host=64e9,
    power=1000.0,
    price=14.24,
    sources={
        "flops": "NVIDIA, HGX B200 at 1000 W (9000 fp4, 4500 fp8 and int8, 2250 bf16, 1100 TF32, 80 fp32, dense), 2024",
        "vector_flops": "NVIDIA, HGX B200 at 1000 W (80 fp32), 2024",
        "memory_bytes": "NVIDIA, HGX B200 (180 GB of 192 GB on the package; nvidia-smi shows about 179 GiB), 2025",
        "memory_bandwidth": "NVIDIA, HGX B200 (8 TB/s), 2025; some sellers state 7.7 TB/s",
        "link": f"NVIDIA, HGX B200 (1.8 TB/s both ways, 18 links), 2024; {_NVLINK_LATENCY}",
        "network_bandwidth": "NVIDIA, DGX B200 (400 Gb/s a GPU), 2024",
        "host_bandwidth": "PCIe 5.0 x16, one way: what hosts of HGX B200 offer",
        "power_watts": "NVIDIA, HGX B200 (1000 W), 2024",
        "price_per_hour": "AWS p6-b200.48xlarge, on demand, US, 113.93 USD for 8, 2025",
    },
)

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {chip.name: chip for chip in (_V4, _V5E, _V5P, _V6E, _TPU7X, _A100, _H100, _H200, _B200)}
)
"""All chips that have a data sheet, by name."""
