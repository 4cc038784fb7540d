"""Where the time of a step goes. Predicted, from what it computes, moves and exchanges."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Times:
    """Where the time of a step goes: predicted from the compiled program, or its graph, and the chip's table.

    The step takes the longest of compute, memory and the collectives that can hide behind them, and then waits for
    those that cannot: a roofline, which no program beats and most miss by some way.

    Attributes:
        compute: seconds for the matrix products at the peak of their dtypes.
        memory: seconds to move the bytes between chip and memory.
        hidden: seconds of collectives that are started and awaited apart.
        waits: seconds of the others; None if nothing is known of the links.
    """

    compute: float
    memory: float
    hidden: float | None
    waits: float | None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return max(self.compute, self.memory, self.hidden or 0.0) + (self.waits or 0.0)

    @property
    def bound(self) -> str:
        """What a step spends most of its time on."""
        parts = {"compute": self.compute, "memory": self.memory, "links": (self.hidden or 0.0) + (self.waits or 0.0)}
        return max(parts, key=lambda name: parts[name])
