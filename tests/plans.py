"""Reports of plans that nobody compiled, for tests of what follows from them."""

import dataclasses

from compax.analysis.hlo import Collective
from compax.experiments.plan_build import Facts
from compax.experiments.plan_report import Report
from compax.target import Target
from compax.tpu import Compiled, Memory, Shortage

GB = 10**9
FACTS = Facts(
    entry="train",
    parameters=1_000_000_000,
    trainable=1_000_000_000,
    tokens=16 * 2048,
    model_flops=6e9 * 16 * 2048,
    parameter_bytes=4 * GB,
    optimizer_bytes=8 * GB,
    state_bytes=8,
    batch_bytes=8192,
    gradient_bytes=4 * GB,
    optimizer_split_bytes=GB // 2,
    largest=(("embed.embedding", "float32", (128_256, 2048), "-", GB),),
    exchanged={"all-reduce": 4 * GB},
)
COMPILED = Compiled(
    facts={},
    seconds={"start": 1.0, "compile": 20.0},
    host_bytes=2 * GB,
    processor_seconds=30.0,
    memory=Memory(12 * GB + 8200, 0, 3 * GB, 20_000_000, 15 * GB, 0),
    flops={"bfloat16": 13 * 10**12},
    traffic=60 * GB,
    collectives=(
        Collective("all-reduce", 4 * GB, 16, False, 1, False, "all-reduce.1", "jit(step)/transpose"),
        Collective("all-gather", GB, 4, False, 2, True, "all-gather-start", "jit(step)/gather"),
    ),
)


def report(target: str = "v5e:4x4", **changes) -> Report:
    compiled = dataclasses.replace(COMPILED, **changes)
    return Report("one", Target.parse(target), {"data": 16}, "", 16, 2048, FACTS, compiled, 20e9)


def short(needed: float) -> Report:
    shortage = Shortage("RESOURCE_EXHAUSTED", int(needed * GB), 17 * GB)
    return report(memory=None, flops={}, traffic=0, collectives=(), shortage=shortage)
