"""What might make a step fit that does not: each proposal with the memory that is predicted for it."""

from __future__ import annotations

import math

from compax.experiments import programs
from compax.experiments.config import Config
from compax.experiments.plan_report import Report
from compax.printing import bytes_text


def shortage_text(report: Report, config: Config) -> str:
    """Says in one line by how much a step does not fit, and what might make it.

    Args:
        report: of a step with a shortage.
        config: what it was made of.
    """
    shortage = report.compiled.shortage
    assert shortage is not None
    what = f"a step of {report.name} on {report.target} does not fit"
    if shortage.needed is None or shortage.limit is None:
        lines = [line for line in shortage.message.splitlines() if line.strip()]
        return f"{what}: {lines[0] if lines else 'the compiler ran out of memory'}"
    over = shortage.needed - shortage.limit
    parts = "temporaries alone need" if shortage.temporaries_only else "it needs"
    found = (
        f"{what}: {parts} {bytes_text(shortage.needed)} of {bytes_text(shortage.limit)} on a chip, "
        f"{bytes_text(over)} too much (compiled)"
    )
    return "; ".join([found, *proposals(report, config)])


def proposals(report: Report, config: Config) -> list[str]:
    """What might make a step fit: more chips, recomputation, a smaller batch, a split optimizer.

    The predictions are simple ones: temporaries beyond the gradients grow with the sequences of a device, and with
    recomputation only one layer's are alive together.
    """
    shortage, facts = report.compiled.shortage, report.facts
    assert shortage is not None
    if shortage.needed is None or shortage.limit is None:
        return []
    fixed = facts.argument_bytes + facts.gradient_bytes
    # What grows with the batch, on one device.
    grows = max(shortage.needed - (0 if shortage.temporaries_only else facts.argument_bytes) - facts.gradient_bytes, 0)
    limit, found = shortage.limit, list[str]()
    split = math.prod(report.axes[name] for name in config.sharding.batch)
    parts = config.optimizer.accumulation

    if not config.model.overrides.get("remat", False) and facts.entry == programs.TRAIN:
        shape = programs.model_config(config, config.tokenizer.vocabulary)
        tokens = facts.tokens / parts / split
        kept = shape.num_layers * tokens * shape.model_dim * 4
        less = kept + max(grows - kept, 0) / shape.num_layers
        found.append(f"model.overrides.remat=true ({bytes_text(fixed + less)} predicted)")
    if fixed < limit and grows:
        sequences = report.batch_size // parts // split
        fewer = min(int(sequences * (limit - fixed) / grows), sequences - 1)
        if fewer >= 1:
            size = fewer * split * parts
            found.append(f"--batch={size} ({bytes_text(fixed + grows * fewer / sequences)} predicted)")
        times = 2 ** math.ceil(math.log2(max(grows / (limit - fixed), 2)))
        if times * split <= report.batch_size // parts:
            found.append(f"{times} times the chips, batch over all ({bytes_text(fixed + grows / times)} predicted)")
    saved = facts.optimizer_bytes - facts.optimizer_split_bytes
    if saved > facts.optimizer_bytes // 10:
        found.append(
            f"the optimizer's state split over {'+'.join(config.sharding.batch)} "
            f"({bytes_text(fixed + grows - saved)} predicted), parameters with it by sharding.params"
        )
    return [f"what might help: {found[0]}", *found[1:]] if found else []
