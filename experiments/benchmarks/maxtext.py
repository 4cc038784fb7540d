"""Train steps of Llama 2 on slices of v5p beside what MaxText compiles to for the same work.

Claim: with the same sequence, batch, optimizer and precisions, a plain decoder with `shard`, `flash` and `remat` in its
pipeline needs at most MaxText's peak memory, sends at most its bytes, and computes no more.

Commands:
    python -m compax.experiments.benchmarks.maxtext                     the 7B rows, two minutes each on two cores
    python -m compax.experiments.benchmarks.maxtext --rows=70b          the 70B rows, two to four minutes each

No accelerator is needed: steps are compiled for slices that are not there. MaxText's figures are those of its revision
e591f30 under jax 0.10.2 and libtpu 0.0.42, compiled in the same way and counted by the same rules: products in the
optimized program times the turns of the loops around them, kernels apart; bytes over links by rings. AdamW in float32,
computing in bfloat16, sequences of 4096, scanned layers, splash attention. What differs: with MaxText's `minimal` and
`save_qkv_proj` the attention kernel runs twice forwards; here its results and statistics are kept.
"""

import argparse
import dataclasses
import json
import time

from compax.experiments import config as configs
from compax.experiments import plan
from compax.experiments.benchmarks import reporting

_QKV = '"**.attn.query, **.attn.key, **.attn.value"'


@dataclasses.dataclass(frozen=True)
class Row:
    """One step, and MaxText's figures for it.

    Attributes:
        name: what MaxText calls its settings.
        size: of the model.
        topology: the slice.
        batch: sequences.
        passes: after the cast.
        peak: gigabytes of one chip, MaxText's.
        tflop: of products of one chip, MaxText's.
        sent: gigabytes that a chip sends, MaxText's.
    """

    name: str
    size: str
    topology: str
    batch: int
    passes: str
    peak: float
    tflop: float
    sent: float


_SMALL, _LARGE = ("llama2-7b", "v5p:4x4x8"), ("llama2-70b", "v5p:8x8x8")
_FSDP, _FLASH = "shard(fsdp=-1)", "flash(compute=bfloat16)"
_TENSOR = "shard(fsdp=-1, tensor=4, sequence=tensor)"
ROWS = (
    Row("fsdp, full", *_SMALL, 128, f"{_FSDP} | {_FLASH}", 3.3, 203.6, 52),
    Row("fsdp, minimal", *_SMALL, 128, f"{_FSDP} | {_FLASH} | remat(keep=dots)", 13.0, 162.4, 52),
    Row("fsdp, save_qkv_proj", *_SMALL, 128, f"{_FSDP} | {_FLASH} | remat(save={_QKV})", 6.4, 190.4, 52),
    Row("fsdp, batch 4, full", *_SMALL, 512, f"{_FSDP} | {_FLASH}", 9.4, 814, 52),
    Row("fsdp, batch 4, minimal", *_SMALL, 512, f"{_FSDP} | {_FLASH} | remat(keep=dots)", 49.3, 650, 52),
    Row("fsdp 32 x tensor 4, full", *_SMALL, 128, f"{_TENSOR} | {_FLASH}", 3.8, 203.6, 54),
    Row("70b, fsdp, full", *_LARGE, 512, f"{_FSDP} | {_FLASH}", 11.4, 2096, 548),
    Row("70b, fsdp 128 x tensor 4, full", *_LARGE, 512, f"{_TENSOR} | {_FLASH}", 11.3, 2096, 346),
)
_DIGITS = 1.005
"""MaxText's figures have three or four digits."""


def compiled(row: Row) -> tuple[float, float, float, float]:
    """Peak, products and bytes sent of one chip, in the units of `Row`; and predicted peak."""
    config = configs.load("plan_7b", {"data.batch_size": str(row.batch), "model.size": row.size})
    config.sharding.params, config.plan.mesh = (), ""
    config.pipeline = f"cast(compute=bfloat16) | {row.passes}"
    report = plan.make_report(config, plan.Options(topology=row.topology), lambda phase, seconds: None)
    peak, prediction = report.peak_bytes, report.facts.prediction
    assert peak is not None, "the step fits"
    predicted = 0 if prediction is None or prediction.peak is None else prediction.peak
    sent = sum(total.wire_bytes for total in report.totals.values())
    return peak / 1e9, sum(report.compiled.flops.values()) / 1e12, sent / 1e9, predicted / 1e9


def main() -> None:
    """Prints rows as they come, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="fsdp", help="those whose name begins so")
    parser.add_argument("--out", help="a JSON file for the figures")
    args = parser.parse_args()
    cells, figures = list[tuple[str, ...]](), list[dict[str, object]]()
    for row in (row for row in ROWS if row.name.startswith(args.rows)):
        started = time.perf_counter()
        peak, tflop, sent, predicted = compiled(row)
        pairs = ((peak, row.peak), (tflop, row.tflop), (sent, row.sent))
        holds = "ok" if all(mine <= _DIGITS * theirs for mine, theirs in pairs) else "MISS"
        cells.append(
            (f"{holds} {row.name}", *(f"{mine:.4g} ({theirs:.4g})" for mine, theirs in pairs), f"{predicted:.3g}")
        )
        figures.append({**dataclasses.asdict(row), "ours": {"peak": peak, "tflop": tflop, "sent": sent}})
        print(f"{', '.join(cells[-1])}; {time.perf_counter() - started:.0f} s (measured)", flush=True)
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
    columns = ("step of MaxText", "peak, GB (MaxText's)", "products, TFLOP", "sent, GB", "peak predicted")
    reporting.print_table("compax beside MaxText, one chip", columns, cells, basis="compiled")


if __name__ == "__main__":
    main()
