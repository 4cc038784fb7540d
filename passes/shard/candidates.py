"""Ways to lay a program over a mesh, among which `shard(auto)` chooses."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

_STAGES = (3, 2, 1, 0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way.

    Attributes:
        sizes: of the mesh's axes, by name; those of one device are left out.
        zero: the stage of ZeRO; none for the one that goes with the axes.
        sequence: whether positions are split over `tensor`.
    """

    sizes: tuple[tuple[str, int], ...]
    zero: int | None = None
    sequence: bool = False

    def size(self, name: str) -> int:
        """The size of an axis; 1 if there is none."""
        return dict(self.sizes).get(name, 1)

    @property
    def batch_shards(self) -> int:
        """Over how many devices the batch is split."""
        return self.size("dcn_data") * self.size("data") * self.size("fsdp") * self.size("expert")

    def options(self) -> dict[str, Any]:
        """The same as options of the pass."""
        found: dict[str, Any] = dict(self.sizes) or {"data": 1}
        found |= {} if self.zero is None else {"zero": self.zero}
        return found | ({"sequence": "tensor"} if self.sequence else {})

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


def candidates(devices: int, slices: int, experts: int) -> Iterator[Candidate]:
    """All ways to lay a program over devices, whether or not its axes divide so.

    Args:
        devices: of all slices.
        slices: that a slower network connects; the batch alone is split over it.
        experts: of the program; 1 if it has none.
    """
    inside = devices // slices
    for tensor in divisors(inside):
        for expert in (n for n in divisors(inside // tensor) if experts % n == 0):
            rest = inside // tensor // expert
            for fsdp in divisors(rest):
                found = {"dcn_data": slices, "data": rest // fsdp, "fsdp": fsdp, "expert": expert, "tensor": tensor}
                yield from _variants({name: size for name, size in found.items() if size > 1})


def variants(sizes: Mapping[str, int]) -> Iterator[Candidate]:
    """The ways that a given mesh leaves open."""
    yield from _variants(dict(sizes), tuple(n for n in _STAGES if n or "fsdp" not in sizes))


def _variants(sizes: dict[str, int], stages: tuple[int, ...] | None = None) -> Iterator[Candidate]:
    if stages is None:
        stages = (3,) if "fsdp" in sizes else (2, 1, 0)
    default = 3 if "fsdp" in sizes else 0
    for stage in stages if "fsdp" in sizes or sizes.get("data", 1) > 1 else (0,):
        for sequence in (False, True) if sizes.get("tensor", 1) > 1 else (False,):
            yield Candidate(tuple(sizes.items()), None if stage == default else stage, sequence)


def divisors(number: int) -> list[int]:
    """What divides a number, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]
