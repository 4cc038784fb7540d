"""A plan as a person reads it on a terminal of 100 columns."""

from __future__ import annotations

from compax.experiments.console import Console, amount
from compax.experiments.plan_report import PUE, Report
from compax.placement import mesh_text
from compax.price import COLUMNS, price_rows
from compax.printing import bytes_text, count_text, flops_text

_OPERATION = 46
_BUFFERS = 6
# Beyond these, what was compiled is not what was meant. Recomputing all of the forward pass gives 4/3.
_MUCH_WORK, _MUCH_TRAFFIC, _SMALL = 1.6, 3.0, 0.05


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    for line in head(report):
        console.say(line, style="bold")
    console.table("memory of a device", ("", "predicted", "compiled"), memory_rows(report))
    if rows := held_rows(report):
        columns = ("size", "number", "site", "phase", "largest")
        console.table("beside arguments at the peak, by site (predicted)", columns, rows[:_BUFFERS])
    if report.compiled.buffers:
        console.table("largest buffers (compiled)", ("size", "shape", "operation"), buffer_rows(report))
    if report.totals:
        columns = ("kind", "count", "payload", "predicted", "on links", "seconds (predicted)")
        console.table("collectives of a device, one step (compiled)", columns, collective_rows(report))
    if report.fits:
        console.table("one step", ("", "predicted", "compiled"), step_rows(report))
        console.table(f"training on {amount(report.tokens)} tokens (predicted)", ("", ""), training_rows(report))
    for each in report.facts.passes:
        console.table(f"price of {each['pass']} (all devices)", COLUMNS, price_rows(each["figures"]))
        for note in each["notes"]:
            console.say(f"  note: {note}")
    if (words := exchange_note(report)) is not None:
        console.say(f"  note: {words}")
    for note in notes(report):
        console.say(f"note: {note}")
    seconds = report.compiled.seconds
    console.say(
        f"took {sum(seconds.values()):.0f} s ({report.compiled.processor_seconds:.0f} s of processors) and "
        f"{bytes_text(report.compiled.host_bytes)} of this machine's memory (measured)"
    )


def head(report: Report) -> list[str]:
    """What was planned, and whether it fits."""
    facts, target = report.facts, report.target
    chips = f"{target.num_chips} chip{'s' * (target.num_chips != 1)}"
    what = "train step" if facts.entry == "train" else "loss without gradients"
    tokens = f"{report.batch_size} x {report.sequence_length} tokens"
    lines = [
        f"{report.name}: {count_text(facts.parameters)} parameters, {what} of {tokens}",
        f"on {target} ({chips}), mesh {mesh_text(report.axes)}",
    ]
    if report.pipeline:
        lines.append(f"pipeline: {report.pipeline}")
    lines += report.chosen
    lines.append(f"fits: {fits_text(report)}")
    return lines


def notes(report: Report) -> list[str]:
    """What is far from what the shardings ask for."""
    found: list[str] = []
    done, share = sum(report.compiled.flops.values()), report.facts.model_flops / report.devices
    prediction = report.facts.prediction
    update = 0 if prediction is None else prediction.update_flops
    if update > share / 3:
        found.append(
            f"the optimizer's update has {flops_text(update)} of products, {update / share:.1f} times what the model "
            "asks of a device, and no more devices make it less: a larger batch makes it matter less"
        )
    if done > _MUCH_WORK * share + update > update:
        beside = " and the whole update" if update else ""
        found.append(
            f"a device computes {done / (share + update):.1f} times its share of the model's products{beside} "
            "(compiled): recomputation is a third at most, so batch or parameters are not split as was meant"
        )
    for kind, total in report.totals.items():
        asked = report.facts.exchanged.get(kind, 0)
        # Of a kind that parameters hardly need, most belongs to values in between, and is meant.
        if asked > _SMALL * max(report.facts.exchanged.values(), default=0) and total.bytes > _MUCH_TRAFFIC * asked:
            found.append(
                f"{kind} moves {total.bytes / asked:.1f} times what the shardings ask for (compiled by predicted): the "
                "compiler splits values in between otherwise than the parameters"
            )
    if report.quick:
        found.append(
            "compiled with the least of the compiler's effort: more collectives are awaited than will be, with tensor "
            "parallelism more is sent too, and memory differs by some percent"
        )
    if report.compiled.unknown_loops:
        found.append(f"{len(report.compiled.unknown_loops)} loop(s) of unknown length are counted once")
    return found


def exchange_note(report: Report) -> str | None:
    """What collectives the prices of passes leave out, if they do."""
    if report.devices == 1 or not report.facts.passes:
        return None
    if any(
        pair for each in report.facts.passes for pair in [each["figures"].get("collective_bytes")] if any(pair or ())
    ):
        return None
    return "no pass lays the program over the mesh, so what it exchanges is with the collectives of the step alone"


def fits_text(report: Report) -> str:
    """Whether it fits, and how closely."""
    limit, peak, shortage = report.limit_bytes, report.peak_bytes, report.compiled.shortage
    if shortage is not None:
        if shortage.needed is None or shortage.limit is None:
            return "no (compiled)"
        return f"no, {bytes_text(shortage.needed)} of {bytes_text(shortage.limit)} a device (compiled)"
    assert peak is not None
    if limit is None:
        return f"yes, {bytes_text(peak)} a device (compiled); no limit is known"
    return f"yes, {bytes_text(peak)} at the peak (compiled) of {bytes_text(limit)} a device"


def memory_rows(report: Report) -> list[tuple[str, str, str]]:
    """Memory of a device by kind: predicted from shapes, and as the compiler says."""
    facts, memory = report.facts, report.compiled.memory
    rows = [
        ("parameters", bytes_text(facts.parameter_bytes), ""),
        ("optimizer state", bytes_text(facts.optimizer_bytes), ""),
        ("other state and the batch", bytes_text(facts.state_bytes + facts.batch_bytes), ""),
        ("arguments together", bytes_text(facts.argument_bytes), bytes_text(memory.arguments) if memory else ""),
    ]
    prediction, temporaries, peak = facts.prediction, "", ""
    if prediction is not None and prediction.peak is not None:
        peak = bytes_text(prediction.peak)
    if prediction is not None and prediction.temporaries is not None:
        temporaries = bytes_text(prediction.temporaries)
        rows += [
            ("activations, most of the forward pass", bytes_text(prediction.activations or 0), ""),
            ("at the peak, of the forward pass", bytes_text(prediction.kept("forward")), ""),
            ("  of the backward pass, gradients too", bytes_text(prediction.kept("recompute", "backward")), ""),
            ("  of the optimizer's update", bytes_text(prediction.kept("update")), ""),
        ]
    if memory is None:
        rows += [("temporaries together", temporaries, ""), ("peak", peak, "")] if peak else []
    else:
        rows += [
            ("temporaries together", temporaries, bytes_text(memory.temporaries)),
            ("outputs that reuse no argument", "", bytes_text(memory.outputs)),
            ("program code", "", bytes_text(memory.code)),
            ("peak", peak, bytes_text(report.peak_bytes or memory.peak)),
        ]
        if memory.host:
            rows.append(("in the host's memory", "", bytes_text(memory.host)))
    if report.limit_bytes is not None:
        rows.append(("what a program can have", bytes_text(report.limit_bytes), ""))
    return rows


def held_rows(report: Report) -> list[tuple[str, ...]]:
    """What is in memory at the predicted peak beside arguments, by site."""
    prediction = report.facts.prediction
    return [
        (bytes_text(held.bytes), str(held.count), held.site or "of no site", held.phase, held.what)
        for held in (() if prediction is None else prediction.held)
    ]


def buffer_rows(report: Report) -> list[tuple[str, str, str]]:
    """The largest buffers with the operation that each belongs to."""
    return [
        (bytes_text(buffer.bytes), buffer.shape, operation_text(buffer.op_name or buffer.name))
        for buffer in report.compiled.buffers[:_BUFFERS]
    ]


def operation_text(name: str, most: int = _OPERATION) -> str:
    """The end of an operation's name, which says most."""
    name = name.replace("jit(train_step)/", "").replace("closed_call/", "")
    return name if len(name) <= most else "..." + name[3 - most :]


def collective_rows(report: Report) -> list[tuple[str, ...]]:
    """Collectives by kind."""
    asked = report.facts.exchanged
    rows: list[tuple[str, ...]] = []
    for kind, total in report.totals.items():
        predicted = bytes_text(asked[kind]) if kind in asked else ""
        seconds = seconds_text(report.kind_seconds(kind))
        rows.append((kind, str(total.count), bytes_text(total.bytes), predicted, bytes_text(total.wire_bytes), seconds))
    rows += [(kind, "", "", bytes_text(size), "", "") for kind, size in asked.items() if kind not in report.totals]
    return rows


def step_rows(report: Report) -> list[tuple[str, str, str]]:
    """Work and time of a step."""
    times, facts = report.times, report.facts
    assert times is not None
    devices, prediction = report.devices, facts.prediction
    compiled = sum(report.compiled.flops.values())
    flops = facts.model_flops / devices if prediction is None else prediction.flops
    rows = [
        ("the model's products, all devices", flops_text(facts.model_flops), ""),
        ("matrix products of a device", flops_text(flops), flops_text(compiled)),
    ]
    if prediction is not None:
        rows += [(f"  {phase}", flops_text(done), "") for phase, done in prediction.product_flops.items()]
    traffic = "" if prediction is None else bytes_text(prediction.traffic)
    graph = "" if report.graph_seconds is None else seconds_text(report.graph_seconds)
    rows += [
        ("bytes to and from memory, a device", traffic, bytes_text(report.compiled.traffic)),
        ("time by the graph, kernel by kernel", graph, ""),
        ("time to compute", seconds_text(times.compute), ""),
        ("time to move bytes", seconds_text(times.memory), ""),
        ("time of collectives that hide", seconds_text(times.hidden), ""),
        ("time of collectives that wait", seconds_text(times.waits), ""),
        (f"time of a step at least, bound by {times.bound}", seconds_text(times.step), ""),
    ]
    return rows


def training_rows(report: Report) -> list[tuple[str, str]]:
    """What training takes at that speed."""
    economy, chip = report.economy(), report.target.chip
    if economy is None:
        return []
    price = f"{chip.price_per_hour} a chip and hour"
    power = f"{chip.power_watts} W a chip, PUE {PUE}"
    return [
        ("tokens a second", amount(economy.tokens_per_second)),
        ("MFU (model FLOPs), at most", f"{economy.mfu:.1%}"),
        ("days", f"{economy.days:,.2f}"),
        ("US dollars", "no public price" if economy.money is None else f"{economy.money:,.0f} ({price})"),
        ("energy", "unknown" if economy.kwh is None else f"{economy.kwh:,.0f} kWh ({power})"),
    ]


def seconds_text(seconds: float | None) -> str:
    """A time to three figures, or that it is unknown."""
    if seconds is None:
        return "unknown"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0 s"
