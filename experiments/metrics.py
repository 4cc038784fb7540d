"""What a run measures, on disk: JSON lines, TensorBoard events, a plot.

`metrics.jsonl` holds numbers that every repetition of the run gives to the bit, `timing.jsonl` what the clock said.
When a run goes on from a checkpoint, what was written after it is cut off first: a run that was killed leaves the same
`metrics.jsonl` as one that was not.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from compax.experiments.checkpoint import read_lines, write_whole

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


class Metrics:
    """Writes the metrics of a run.

    Args:
        directory: The run directory.
        step: Steps already done; lines of later steps are cut off.
        tensorboard: Whether to write TensorBoard events.
        report: Takes a line to print.
        writes: Whether to write anything: of several processes one does.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        step: int,
        *,
        tensorboard: bool,
        report: Callable[[str], None],
        writes: bool = True,
    ):
        self._files = {}
        for name in (METRICS, TIMING) if writes else ():
            kept = [line for line in read_lines(directory / name) if line.get("step", 0) <= step]
            write_whole(directory / name, "".join(json.dumps(line) + "\n" for line in kept))
            self._files[name] = open(directory / name, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = _event_writer(directory / "tensorboard", step, report) if tensorboard and writes else None

    def write(self, step: int, values: dict[str, float], *, file: str = METRICS) -> None:
        """Appends one line, `{"step": step, **values}`, and the same numbers as TensorBoard scalars.

        What is not finite becomes null: JSON has no word for it.
        """
        if not values or not self._files:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._files[file].write(json.dumps({"step": step, **finite}) + "\n")
        self._files[file].flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        if self._events is not None:
            self._events.close()


def _event_writer(folder: pathlib.Path, step: int, report: Callable[[str], None]) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        report("no TensorBoard events: tensorboardX is not installed (pip install 'compax[viz]')")
        return None
    # Events of steps that are about to be done again are hidden.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None, write_to_disk=True)


def plot(directory: pathlib.Path, report: Callable[[str], None]) -> pathlib.Path | None:
    """Draws `loss.png` from a run's `metrics.jsonl`: training and evaluation loss over steps.

    Returns:
        The file, or None if matplotlib is not installed or there is nothing to draw.
    """
    lines = read_lines(directory / METRICS)
    curves = {
        "training loss": [(line["step"], line["loss"]) for line in lines if line.get("loss")],
        "evaluation loss": [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss")],
    }
    if not any(curves.values()):
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        report("no plot of the loss: matplotlib is not installed (pip install 'compax[viz]')")
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, points), marker in zip(curves.items(), ("", "o"), strict=True):
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=name, linewidth=1.2, marker=marker, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token (measured)")
    axes.set_title(directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=120)
    return path
