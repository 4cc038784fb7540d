"""The cost of a graph as text: totals, the parts by what they belong to, by kind of operation and by phase."""

from collections.abc import Iterable, Mapping, Sequence

from compax import _jax, gathering, printing
from compax.analysis.cost import UNOWNED, Cost, Part, Time
from compax.analysis.kernels import Note
from compax.printing import bytes_text, count_text, flops_text, seconds_text, share_text

_MOST_LISTED = 16
_LEAST_SHARE = 0.001


def cost_text(cost: Cost) -> str:
    """A cost as text. Figures of owners that are alike but for a number in their names are added up."""
    time = cost.time
    lines = [f"cost of {cost.name} (predicted: counted from the graph)", *_totals(cost)]
    if time is not None:
        lines += _time_lines(cost, time)
    lines += _table("by composite and site", _gathered(cost.by_owner), cost, _owner_seconds(cost, time))
    lines += _table("by operation", [(name, (name,), part) for name, part in cost.by_operation.items()], cost, {})
    if cost.by_phase.keys() - {"forward"}:
        lines += _table("by phase", [(name, (name,), part) for name, part in cost.by_phase.items()], cost, {})
    lines += _notes("not counted", cost.unknown)
    lines += _notes("loops of unknown length, counted as one turn", cost.loops)
    lines += _notes("conditionals, counted as their largest branch", cost.branches)
    return "\n".join(lines)


def _totals(cost: Cost) -> list[str]:
    dtypes = ", ".join(f"{flops_text(n)} {_short(dtype)}" for dtype, n in _largest(cost.flops_by_dtype))
    inputs = ", ".join(f"{bytes_text(n)} {kind}" for kind, n in cost.input_bytes.items() if n)
    products = share_text(cost.product_flops / cost.flops) if cost.flops else "none"
    rows = [
        ("computes", f"{flops_text(cost.flops)} a call ({dtypes or 'nothing'}); {products} in products"),
        ("transcendentals", count_text(cost.transcendentals)),
        ("reads", inputs or "nothing"),
        ("returns", bytes_text(cost.output_bytes)),
        ("moves", f"{bytes_text(cost.bytes_fused)} after fusion, {bytes_text(cost.bytes_unfused)} without"),
        ("intensity", f"{cost.intensity:.1f} FLOPs for each byte moved after fusion"),
    ]
    return [f"  {name:<17}{value}" for name, value in rows]


def _short(dtype: str) -> str:
    return _jax.dtype_text(dtype)


def _largest(flops: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(flops.items(), key=lambda item: -item[1])


def _time_lines(cost: Cost, time: Time) -> list[str]:
    parts = f"computing {seconds_text(time.compute_seconds)}, moving {seconds_text(time.memory_seconds)}"
    rows = [
        ("at least", f"{seconds_text(time.seconds)} a call, kernel by kernel, if one device of {cost.target} does all"),
        ("  no less than", f"{seconds_text(time.bound_seconds)} ({parts})"),
    ]
    return [f"  {name:<17}{value}" for name, value in rows] + [f"    {text}" for text in time.assumptions]


_Row = tuple[str, tuple[str, ...], Part]


def _gathered(parts: Mapping[str, Part]) -> list[_Row]:
    names = [name for name in parts if name != UNOWNED]
    rows: list[_Row] = []
    for group in gathering.gather([gathering.Line(name) for name in names]):
        members = tuple(names[i] for i in group.members)
        rows.append((group.name, members, _added(parts[name] for name in members)))
    if UNOWNED in parts:
        rows.append(("(in no composite)", (UNOWNED,), parts[UNOWNED]))
    return rows


def _added(parts: Iterable[Part]) -> Part:
    flops = products = transcendentals = unfused = fused = count = 0
    by_dtype: dict[str, int] = {}
    for part in parts:
        flops, products, count = flops + part.flops, products + part.product_flops, count + part.count
        transcendentals += part.transcendentals
        unfused, fused = unfused + part.bytes_unfused, fused + part.bytes_fused
        for dtype, number in part.flops_by_dtype.items():
            by_dtype[dtype] = by_dtype.get(dtype, 0) + number
    return Part(flops, products, by_dtype, transcendentals, unfused, fused, count)


def _owner_seconds(cost: Cost, time: Time | None) -> Mapping[str, float]:
    return time.seconds_by_owner if time is not None else {}


def _table(title: str, rows: Sequence[_Row], cost: Cost, seconds: Mapping[str, float]) -> list[str]:
    if not rows or all(name == "(in no composite)" for name, _, _ in rows):
        return []

    def weight(row: _Row) -> float:
        part = row[2]
        return part.flops / max(cost.flops, 1) + part.bytes_fused / max(cost.bytes_fused, 1)

    ordered = sorted(rows, key=weight, reverse=True)
    listed = [row for row in ordered[:_MOST_LISTED] if weight(row) >= _LEAST_SHARE]
    width = max(len(name) for name, _, _ in listed) if listed else 0
    lines = [f"  {title}"]
    for name, members, part in listed:
        cells = [f"{flops_text(part.flops):>13}", f"{share_text(part.flops / max(cost.flops, 1)):>6}"]
        cells += [f"{bytes_text(part.bytes_fused):>9}", f"{share_text(part.bytes_fused / max(cost.bytes_fused, 1)):>6}"]
        if seconds:
            cells.append(f"{seconds_text(sum(seconds.get(member, 0.0) for member in members)):>8}")
        lines.append(f"    {name:<{width}}  {'  '.join(cells)}")
    rest = len(rows) - len(listed)
    if rest:
        lines.append(f"    and {printing.plural(rest, 'smaller one')}")
    return lines


def _notes(title: str, notes: Sequence[Note]) -> list[str]:
    counted: dict[tuple[str, str], int] = {}
    for note in notes:
        counted[note.operation, note.text] = counted.get((note.operation, note.text), 0) + 1
    if not counted:
        return [f"  {title}: none"]
    lines = [f"  {title}: {len(notes)}"]
    for (operation, text), times in list(counted.items())[:_MOST_LISTED]:
        lines.append(f"    {operation}{f' {times} times' if times > 1 else ''}: {text}")
    return lines
