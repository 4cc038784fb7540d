"""What a person sees: lines, tables, and the progress of training.

A figure is always labelled: measured (by a clock or by running the program), predicted (computed from shapes), or
compiled (said by XLA's compiler).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_PLAIN_WIDTH = 140


class Progress(Protocol):
    """Where training tells how far it is."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows a step with its measured loss and speed."""
        ...


class Console:
    """Writes to standard output: with rich's colours and bars on a terminal, as plain lines elsewhere.

    Args:
        quiet: writes nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.rich: RichConsole = RichConsole(highlight=False, markup=False, quiet=quiet)
        if not self.rich.is_terminal:
            self.rich = RichConsole(highlight=False, markup=False, width=_PLAIN_WIDTH, quiet=quiet)

    def say(self, line: str, style: str | None = None) -> None:
        """Prints one line, never wrapped."""
        self.rich.print(line, soft_wrap=True, style=style)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints a table; columns after the first are aligned to the right if all their cells are numbers."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            cells = [str(row[index]) for row in rows]
            numbers = index > 0 and all(not cell or cell.lstrip("-+")[:1].isdigit() for cell in cells)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.rich.print(table)

    @contextlib.contextmanager
    def progress(self, total: int, done: int) -> Generator[Progress]:
        """Shows the progress of training from step `done` to `total` while the block runs."""
        if not self.rich.is_terminal:
            yield _Lines(self, total)
            return
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s (measured)"),
            progress.TextColumn("ETA {task.fields[left]}"),
            console=self.rich,
        )
        with bar:
            yield _Bar(bar, bar.add_task("training", total=total, completed=done, loss="-", speed="-", left="-"))


class _Bar:
    def __init__(self, bar: Any, task: Any):
        self._bar, self._task = bar, task

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        shown = {"loss": f"{loss:.4f}", "speed": f"{tokens_per_second:,.0f}", "left": duration(seconds_left)}
        self._bar.update(self._task, completed=step, **shown)


class _Lines:
    """One line every two seconds at most, and one for the last step."""

    def __init__(self, console: Console, total: int):
        self._console, self._total = console, total
        self._told = 0.0

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        now = time.monotonic()
        if now - self._told < 2 and step < self._total:
            return
        self._told = now
        self._console.say(
            f"step {step:>6}/{self._total}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s (measured)  "
            f"ETA {duration(seconds_left)}"
        )


def duration(seconds: float) -> str:
    """Formats a time, as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def amount(number: float, unit: str = "") -> str:
    """Formats a count or a size to three figures, as 4.2M or 12.1 MB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            prefix = "B" if prefix == "G" and not unit else prefix
            return f"{number / factor:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.3g}{' ' if unit else ''}{unit}"
