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
    found = (
        f"{what}: it needs {bytes_text(shortage.needed)} of {bytes_text(shortage.limit)} on a chip, "
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
    grows = max(shortage.needed - fixed, 0)
    limit, found = shortage.limit, list[tuple[str, float]]()
    split = math.prod(report.axes[name] for name in config.sharding.batch)
    parts = config.optimizer.accumulation

    if not config.model.overrides.get("remat", False) and facts.entry == programs.TRAIN:
        shape = programs.model_config(config, config.tokenizer.vocabulary)
        # A block's input in float32 at most, for each layer.
        kept = shape.num_layers * (facts.tokens / parts / split) * shape.model_dim * 4
        if kept < grows:
            found.append(("model.overrides.remat=true", fixed + kept + (grows - kept) / shape.num_layers))
    if fixed < limit and grows:
        sequences = report.batch_size // parts // split
        fewer = min(int(sequences * (limit - fixed) / grows), sequences - 1)
        if fewer >= 1:
            found.append((f"--batch={fewer * split * parts}", fixed + grows * fewer / sequences))
        times = 2 ** math.ceil(math.log2(max(grows / (limit - fixed), 2)))
        if times * split <= report.batch_size // parts:
            found.append((f"{times} times the chips with the batch over all of them", fixed + grows / times))
    saved = facts.optimizer_bytes - facts.optimizer_split_bytes
    if saved > facts.optimizer_bytes // 10:
        axes = "+".join(config.sharding.batch)
        found.append((f"the optimizer's state split over {axes} (sharding.optimizer)", fixed + grows - saved))
    texts = [f"{words}: {bytes_text(size)} predicted{_enough(size, limit)}" for words, size in found]
    return [f"what might help: {texts[0]}", *texts[1:]] if texts else []


def _enough(size: float, limit: int) -> str:
    return "" if size <= limit else ", not enough alone"
