"""How benchmarks print: a table, the hardware, and for each figure whether it was predicted, compiled or measured."""

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Literal

Basis = Literal["predicted", "compiled", "measured"]
"""Where a figure comes from: computed from shapes, said by XLA's compiler, or observed in a run."""

PACKAGES = ("jax", "flax", "numpy")


def hardware() -> str:
    """The processor, its cores and memory, the accelerator if any, the versions that matter, and today's date."""
    import jax

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {jax.device_count()} x {device.device_kind}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{_processor()}, {cores} cores, {memory_gib:.0f} GiB{accelerator}; Python {platform.python_version()}, "
        f"{versions}; {datetime.date.today().isoformat()}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, basis: Basis, footer: Sequence[str] = ()
) -> None:
    """Prints a table whose first column is a name and whose other columns are figures.

    Args:
        title: What the table shows.
        columns: Headings.
        rows: A text for each column.
        basis: Where the figures come from.
        footer: Lines below the table.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title} ({basis})", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # A terminal wraps as it likes; a file or a pipe gets every column whole.
    console = Console(highlight=False, markup=False, width=None if os.isatty(1) else 200)
    console.print(table)
    for line in footer:
        console.print(line)
    console.print(f"Hardware: {hardware()}")


def mebibytes(num_bytes: float) -> str:
    """Bytes in MiB, with one decimal."""
    return f"{num_bytes / 2**20:,.1f}"


def seconds(samples: Sequence[float]) -> str:
    """The median of some durations, with their range where there is more than one."""
    median = statistics.median(samples)
    return f"{median:.3g}" if len(samples) == 1 else f"{median:.3g} ({min(samples):.3g}-{max(samples):.3g})"
