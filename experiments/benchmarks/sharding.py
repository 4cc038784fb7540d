"""Meshes that `shard(auto)` chooses, against all splits into FSDP and tensor parallelism that are given by hand.

Claim: the step that `shard(auto)` chooses takes at most 1.05 times as long as the fastest of the splits, with and
without splitting positions; and predictions rank the splits as the compiler's figures do.

Commands:
    python -m compax.experiments.benchmarks.sharding                        1.24B on v5e:4x4, all splits compiled
    python -m compax.experiments.benchmarks.sharding --config=plan_7b --topology=v5p:4x4x8 --batch=128 --most=4
    python -m compax.experiments.benchmarks.sharding --config=plan_7b --size=llama2-70b --topology=v5p:8x16x16 \
        --batch=2048 --most=0                                               the search alone

No accelerator is needed: steps are compiled for slices that are not there, one to four minutes each on two cores.
The step is Adam's, donated, bfloat16 over float32 parameters, each layer computed again in the backward pass. Times are
rooflines: of what is compiled by its products, traffic and collectives (what is asynchronous hides behind the rest),
of predictions by those that the pass counts. The bound of FSDP is its parameters, gathered twice, and its gradients,
scattered once, in bfloat16 over all links of a chip.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

import compax
from compax.experiments import config as configs
from compax.experiments import programs
from compax.experiments.benchmarks import reporting
from compax.meaning import Meaning
from compax.passes import Shard
from compax.passes.shard.candidates import divisors
from compax.passes.shard.choosing import Problem, Row, compiled_row, predicted_rows
from compax.printing import bytes_text, seconds_text
from compax.target import Target
from compax.transform import Context

_GOAL = 1.05


def problem_of(name: str, size: str, batch: int, target: Target) -> tuple[Problem, int]:
    """What is chosen for, and how many parameters there are."""
    config = configs.load(name, {"data.batch_size": str(batch), **({"model.size": size} if size else {})})
    config.sharding.params = ()
    model = programs.build_model(config, config.tokenizer.vocabulary, abstract=True)
    program = compax.Pipeline.parse("cast(compute=bfloat16)")(programs.capture(config, model), check=False)
    meanings = {key: Meaning(captured, program.declared) for key, captured in program.graphs.items()}
    return Shard(auto=True).problem(program, meanings, Context(target=target)), sum(
        value.size for value in program.params.values()
    )


def splits(rows: list[Row], devices: int) -> list[Row]:
    """Those of some candidates that split devices into FSDP and tensor parallelism."""
    wanted = {
        tuple((name, n) for name, n in (("fsdp", devices // tensor), ("tensor", tensor)) if n > 1)
        for tensor in divisors(devices)
    }
    return [row for row in rows if row.candidate.sizes in wanted and row.candidate.zero is None]


def agreement(rows: list[Row]) -> float:
    """The share of pairs that predictions and compiled figures put into the same order."""
    times = [(row.predicted.times.step, row.times.step) for row in rows if row.times is not None]
    pairs = [(one, other) for i, one in enumerate(times) for other in times[:i]]
    same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    return same / len(pairs) if pairs else 1.0


def _cells(row: Row, best: float, mark: str) -> tuple[str, ...]:
    predicted, times = row.predicted.times, row.times
    text = (
        f"{mark}{row.candidate}",
        seconds_text(predicted.step),
        seconds_text(predicted.waits or 0.0),
        bytes_text(row.predicted.peak),
        bytes_text(round(row.predicted.wire_bytes)),
    )
    if row.compiled is None:
        return (*text, "", "", "", "")
    if times is None:
        return (*text, "does not fit", "", bytes_text(row.compiled.peak), "")
    peak = bytes_text(row.compiled.peak)
    return (*text, seconds_text(times.step), seconds_text(times.waits or 0.0), peak, f"{times.step / best:.2f}")


def _json(row: Row) -> dict[str, Any]:
    compiled = row.compiled and {**dataclasses.asdict(row.compiled), "collectives": len(row.compiled.collectives)}
    times = row.times and dataclasses.asdict(row.times)
    predicted = dataclasses.asdict(row.predicted)
    return {"candidate": str(row.candidate), "predicted": predicted, "compiled": compiled, "times": times}


def main() -> None:
    """Prints the table, the choice and what it amounts to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="plan_1b")
    parser.add_argument("--size", default="", help="another size of the model")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--most", type=int, default=100, help="splits to compile, the best by prediction first")
    parser.add_argument("--out", help="a JSON file for the rows")
    args = parser.parse_args()
    target = Target.parse(args.topology)
    problem, parameters = problem_of(args.config, args.size, args.batch, target)
    started = time.perf_counter()
    rows, _ = predicted_rows(problem)
    searching = time.perf_counter() - started
    every, _ = predicted_rows(problem, prune=False)
    chosen = next(row for row in rows if row.predicted.peak <= 0.9 * target.device_memory_bytes)
    hand = splits(every, target.num_devices)
    done: dict[str, Row] = {}
    for row in [chosen, *hand][: args.most + 1 if args.most else 0]:
        if str(row.candidate) not in done:
            done[str(row.candidate)] = compiled_row(problem, row)
            print(done[str(row.candidate)], flush=True)
            if args.out:
                with open(args.out, "w", encoding="utf-8") as file:
                    json.dump([_json(each) for each in done.values()], file, indent=1)
    table = [done.get(str(row.candidate), row) for row in hand]
    if str(chosen.candidate) not in {str(row.candidate) for row in hand}:
        table.insert(0, done.get(str(chosen.candidate), chosen))
    best = min((row.times.step for row in table if row.times is not None), default=1.0)
    columns = ("mesh", *(f"{name}, predicted" for name in ("step", "waits", "peak", "sent")), "step", "waits", "peak")
    cells = [_cells(row, best, "* " if row.candidate == chosen.candidate else "  ") for row in table]
    title = f"{args.config} {args.size} on {target}, batch {args.batch}; * chosen"
    reporting.print_table(title, (*columns, "of the best"), cells, basis="compiled")
    links = target.chip.link.bytes_per_second * target.chip.link.per_chip
    devices = target.num_devices
    bound = 3 * 2 * parameters * (devices - 1) / devices
    print(f"bound of FSDP: {bytes_text(round(bound))} sent, {seconds_text(bound / links)} (closed form)")
    print(f"search: {len(rows)} of {len(every)} meshes looked at in {searching:.1f} s (measured)")
    mine = done.get(str(chosen.candidate))
    if mine is not None and mine.times is not None:
        ratio = mine.times.step / best
        print(
            f"{'ok' if ratio <= _GOAL else 'MISS'}: {chosen.candidate} takes {ratio:.2f} of the best, goal {_GOAL}; "
            f"{agreement(table):.0%} of pairs are ranked alike"
        )


if __name__ == "__main__":
    main()
