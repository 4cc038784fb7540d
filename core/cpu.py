"""The machine at hand as a chip: its CPU has no data sheet here, so it is measured."""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import numpy as np

from compax.chips import Chip
from compax.errors import TargetError

_MEASURED = ("flops", "memory_bytes", "memory_bandwidth")
_CPU_SOURCES = MappingProxyType(
    {
        "flops": "measured: square matrix products by XLA on this machine, median of runs at the best of a few sizes",
        "memory_bytes": "the operating system of this machine, or the limit of its control group",
        "memory_bandwidth": "measured: a copy by all threads on this machine, bytes read and written, median of runs",
    }
)
_BUDGET_SECONDS = 0.3  # of one dtype, and of the bandwidth


class _CpuAtHand(Chip):
    """The CPU at hand: its figures are measured when the first of them is read."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MEASURED:
            raise AttributeError(name)
        return getattr(measured_cpu(), name)


def _cpu_at_hand() -> Chip:
    chip = object.__new__(_CpuAtHand)
    known = {"name": "cpu", "platform": "cpu", "sources": _CPU_SOURCES}
    for field in dataclasses.fields(Chip):
        if field.name not in _MEASURED:
            object.__setattr__(chip, field.name, known.get(field.name, field.default))
    return chip


CPU = _cpu_at_hand()
"""The machine at hand. Reading `flops`, `memory_bytes` or `memory_bandwidth` measures it, once a process."""


@functools.cache
def measured_cpu() -> Chip:
    """The machine at hand, measured: peaks of matrix products as XLA computes them, bandwidth, and memory.

    It takes under two seconds, once a process. The figures hold for the moment: other work on the machine lowers them.

    Raises:
        TargetError: JAX runs without its CPU platform.
    """
    return Chip(
        name="cpu",
        platform="cpu",
        flops=MappingProxyType(_measured_flops()),
        memory_bytes=_memory_bytes(),
        memory_bandwidth=_measured_bandwidth(),
        sources=_CPU_SOURCES,
    )


def _median_seconds(run: Callable[[], Any], budget_seconds: float) -> float:
    """Median time of up to nine runs after one that does not count; fewer once the budget is spent."""
    run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 9 and (not times or time.perf_counter() - started < budget_seconds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _measured_flops() -> dict[str, float]:
    import jax

    try:
        device = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise TargetError(f"cannot measure the CPU: {error}. Add cpu to JAX_PLATFORMS, as in 'cuda,cpu'") from error
    with jax.ensure_compile_time_eval():  # also where a function is being traced
        return {dtype: _peak(dtype, device) for dtype in ("float32", "bfloat16", "float16", "int8")}


def _peak(dtype: str, device: Any) -> float:
    """FLOP/s of the fastest product among growing sizes, as far as the budget goes."""
    import jax
    import jax.numpy as jnp

    accumulate = jnp.int32 if dtype == "int8" else jnp.float32
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=accumulate))
    best, started = 0.0, time.perf_counter()
    for size in (128, 256, 512, 1024):
        left = _BUDGET_SECONDS - (time.perf_counter() - started)
        if best and 4 * 2 * size**3 / best > left:  # it would not run often enough
            break
        matrix = jax.device_put(np.ones((size, size), dtype=jnp.dtype(dtype)), device)
        seconds = _median_seconds(lambda matrix=matrix: product(matrix).block_until_ready(), left / 4)
        best = max(best, 2 * size**3 / seconds)
    return best


def _measured_bandwidth() -> float:
    num_bytes, threads = 64 * 2**20, min(os.cpu_count() or 1, 16)
    source, copy = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    parts = list(zip(np.array_split(source, threads), np.array_split(copy, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            for part in [pool.submit(np.copyto, to, origin) for origin, to in parts]:
                part.result()

        return 2 * num_bytes / _median_seconds(run, _BUDGET_SECONDS)


def _memory_bytes() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [physical]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:  # no such control group
            continue
        if text.isdigit():  # "max" is no limit
            limits.append(int(text))
    return min(limits)
