"""What XLA made of a program: reads the text of a compiled module (`compiled.as_text()`).

Everything here is a pure function of that text, so it serves a CPU, a GPU and a slice of TPUs that is not there alike.
All figures are per device. What stands in a loop counts as often as the loop runs; a loop whose number of trips cannot
be read from the text counts once and is named in `Module.unknown_loops`.

Bytes of a collective are those of the whole payload: what an all-gather gives, what a reduce-scatter, an all-reduce,
an all-to-all or a permute takes. `Collective.wire_bytes` is what a ring sends over links for it (Thakur, Rabenseifner,
Gropp, "Optimization of Collective Communication Operations in MPICH", 2005).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from compax.analysis.hlo_loops import trip_count
from compax.analysis.hlo_text import Computation, Instruction, parse_computations

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "permute")
"""The kinds of collectives, as they are named here."""

_COLLECTIVES = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}
_STARTS = "async-collective-start"
_APART = ("async-start", "call-start")
"""Opcodes of what runs beside the instructions that follow, a TPU's SparseCores' calls among them."""
_WORK = ("fusion", "convolution", "dot", "while", "conditional", "call", "sort", "scatter", "reduce", "custom-call")
_NO_WORK = ("PrepareAsyncCallStart", "PrepareAsyncCallDone", "AllocateBuffer")
"""Targets of custom calls that take no time."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the compiled program.

    Attributes:
        kind: one of `KINDS`.
        bytes: payload of one execution on one device.
        group_size: how many devices take part in one group of it; 2 for a permute; of one between slices, how many
            slices.
        between_slices: whether it goes over the network between slices.
        count: how often it runs in a call of the program.
        asynchronous: whether other work runs between its start and its end, and hides it.
        name: the instruction.
        op_name: the operation of the program that asked for it, as JAX named it.
    """

    kind: str
    bytes: int
    group_size: int
    between_slices: bool
    count: int
    asynchronous: bool
    name: str
    op_name: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one execution, by a ring."""
        if self.kind == "permute":
            return float(self.bytes)
        share = (self.group_size - 1) / max(self.group_size, 1)
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module, parsed.

    Attributes:
        computations: by name.
        entry: the name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str

    @functools.cached_property
    def _runs(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """How often each computation runs, and the loops of unknown length."""
        runs: dict[str, int] = {}
        unknown: list[str] = []

        def enter(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name].instructions:
                inner = times
                if instruction.opcode == "while":
                    trips = trip_count(self.computations, self.computations[name], instruction)
                    if trips is None:
                        unknown.append(instruction.name)
                    inner = times * (1 if trips is None else trips)
                for called in _entered(instruction):
                    enter(called, inner)

        enter(self.entry, 1)
        return runs, tuple(unknown)

    @property
    def unknown_loops(self) -> tuple[str, ...]:
        """Loops whose number of trips the text does not tell; what is in them counts once."""
        return self._runs[1]

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Names of computations that run inside of one instruction: their values are no buffers."""
        found: set[str] = set()

        def enter(name: str, fused: bool) -> None:
            if fused:
                found.add(name)
            for instruction in self.computations[name].instructions:
                for called in _entered(instruction):
                    enter(called, fused or instruction.opcode in ("fusion", *_APART))

        enter(self.entry, False)
        return frozenset(found)

    def walk(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, with its computation and how often it does."""
        for name, times in self._runs[0].items():
            computation = self.computations[name]
            for instruction in computation.instructions:
                yield computation, instruction, times


def parse(text: str) -> Module:
    """Parses the text of a compiled module.

    Raises:
        ValueError: it is no text of an HLO module with an entry computation.
    """
    computations, entry = parse_computations(text)
    return Module(computations, entry)


def _entered(instruction: Instruction) -> tuple[str, ...]:
    """Computations that run when the instruction does; not the scalar functions of reductions, sorts and scatters."""
    called = instruction.called
    names = [called[key] for key in ("body",) if key in called]
    if instruction.opcode in ("fusion", "call", *_APART) or (instruction.opcode == "custom-call" and "calls" in called):
        names += [called[key] for key in ("calls", "to_apply") if key in called]
    if instruction.opcode == "conditional":
        names += instruction.branches
    return tuple(names)


# -- Collectives ------------------------------------------------------------------------------------------------------


def collectives(module: Module) -> tuple[Collective, ...]:
    """The collectives of a module, those started and awaited apart counted once.

    An all-reduce inside of a fusion that keeps one slice of the result is a reduce-scatter, as the TPU's compiler
    writes it. One that goes on in pieces while other operations run is written in every fusion that has a piece of it,
    always with the same channel: it counts where it is started.
    """
    pieces = _pieces(module)
    hidden = {
        name: _is_hidden(computation, instruction)
        for computation, instruction, _ in module.walk()
        if instruction.opcode in _APART
        for name in _entered(instruction)
    }
    found: list[Collective] = []
    for computation, instruction, times in module.walk():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "send" and (between := _between_slices(computation, instruction, times)):
            found.append(between)
        if opcode not in _COLLECTIVES:
            continue
        members = group(instruction.text, computation.devices)
        size = len(members)
        in_pieces = (channel := _channel(instruction)) in pieces and computation.name in module.fused
        if size <= 1 or (in_pieces and computation.name not in pieces[channel]):
            continue
        kind = _COLLECTIVES[opcode]
        payload = sum(computation.shape(operand).nbytes for operand in instruction.operands)
        if kind == "all-gather":
            payload *= size
        if kind == "all-reduce" and computation.name in module.fused and _keeps_a_slice(computation, instruction):
            kind = "reduce-scatter"
        starts_hidden = instruction.opcode.endswith("-start") and _is_hidden(computation, instruction)
        asynchronous = in_pieces or starts_hidden or hidden.get(computation.name, False)
        name, op_name = instruction.name, instruction.op_name
        found.append(Collective(kind, payload, size, False, times, asynchronous, name, op_name))
    return tuple(found)


def _is_hidden(computation: Computation, start: Instruction) -> bool:
    """Whether anything that takes time is scheduled between a start and its end, or the end is elsewhere."""
    names = {start.name}
    following = computation.instructions[computation.instructions.index(start) + 1 :]
    for instruction in following:
        if names.intersection(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return False
            names.add(instruction.name)
        elif instruction.opcode in _WORK and not any(f'"{target}"' in instruction.text for target in _NO_WORK):
            return True
    return True


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.text)
    return found[1] if found else ""


def _pieces(module: Module) -> dict[str, set[str]]:
    """By channel, of collectives that are started, continued and ended in fusions: the computations that start them."""
    found: dict[str, set[str]] = {}
    for _, instruction, _ in module.walk():
        if instruction.opcode == "fusion" and instruction.name.startswith(_STARTS):
            name = instruction.called.get("calls", "")
            for inner in module.computations[name].instructions if name in module.computations else ():
                if inner.opcode in _COLLECTIVES and (channel := _channel(inner)):
                    found.setdefault(channel, set()).add(name)
    return found


def _between_slices(computation: Computation, send: Instruction, times: int) -> Collective | None:
    """The part of a collective that goes between slices, which TPUs do by sending to the host's network runtime."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.text)
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', send.text)
    if kind is None or slices is None or (name := kind[1].lower().replace("_", "-")) not in _COLLECTIVES:
        return None
    size = 0
    for part in slices[1].split(","):
        first, _, last = part.partition(":")
        size += int(last or first) - int(first) + 1
    payload = computation.shape(send.operands[0]).nbytes * (size if name == "all-gather" else 1)
    return Collective(_COLLECTIVES[name], payload, size, True, times, True, send.name, send.op_name)


def _keeps_a_slice(computation: Computation, reduced: Instruction) -> bool:
    """Whether all that is used of a result is a slice of it."""
    names, sliced = {reduced.name}, False
    for instruction in computation.instructions:
        if not names.intersection(instruction.operands):
            continue
        if instruction.opcode in ("bitcast", "reshape", "copy", "transpose", "get-tuple-element"):
            names.add(instruction.name)
        elif instruction.opcode == "dynamic-slice":
            sliced = True
        else:
            return False
    return sliced


def group(text: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective, by their numbers in the module.

    XLA writes groups in three ways: all of them, as a rearranged range, or as axes of a mesh.

    Args:
        text: the instruction.
        devices: how many devices the module runs on: one group of all where no groups are written.
    """
    if found := re.search(r"replica_groups=(\[\d+,\d+\]<=\S+)", text):
        shape, source = found[1].split("<=")
        rows, size = (int(number) for number in re.findall(r"\d+", shape))
        return tuple(_range(source).reshape(rows, size)[0].tolist())
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _range(found[2] or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        return _along(ids, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    if found := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        pairs = [(int(one), int(other)) for one, other in re.findall(r"\{(\d+),(\d+)\}", found[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), (0,))
    return tuple(range(devices))


def _range(text: str) -> np.ndarray:
    """A range of device numbers as HLO writes it: `[2,4]T(1,0)`, reshaped and then transposed."""
    shape, _, order = text.partition("T")
    numbers = [int(number) for number in re.findall(r"\d+", shape)]
    ids = np.arange(math.prod(numbers)).reshape(numbers)
    return ids.transpose([int(number) for number in re.findall(r"\d+", order)]) if order else ids


def _along(ids: np.ndarray, sizes: Mapping[str, int], named: Sequence[tuple[str, str, str]]) -> tuple[int, ...]:
    """The devices along some axes of a mesh, or along parts of them (name, size before the part, size of it)."""
    places: list[np.ndarray] = []
    for place, (name, size) in enumerate(sizes.items()):
        chosen = [0]
        for axis, before, part in named:
            if axis == name:
                step = size // (int(before) * int(part)) if part else 1
                chosen = [step * number for number in range(int(part) if part else size)]
        places.append(np.asarray(chosen).reshape([-1 if dim == place else 1 for dim in range(len(sizes))]))
    return tuple(np.ravel(ids[tuple(np.broadcast_arrays(*places))]).tolist())


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of one kind together.

    Attributes:
        count: executions in a call of the program.
        bytes: payload of all of them, per device.
        wire_bytes: what one device sends for them, by rings.
        hidden_bytes: the payload of those that are asynchronous.
    """

    count: int
    bytes: int
    wire_bytes: float
    hidden_bytes: int


def by_kind(found: Sequence[Collective]) -> dict[str, Total]:
    """Sums collectives up by kind, in the order of `KINDS`."""
    totals: dict[str, Total] = {}
    for kind in KINDS:
        some = [each for each in found if each.kind == kind]
        if some:
            totals[kind] = Total(
                sum(each.count for each in some),
                sum(each.count * each.bytes for each in some),
                sum(each.count * each.wire_bytes for each in some),
                sum(each.count * each.bytes for each in some if each.asynchronous),
            )
    return totals


# -- Work -------------------------------------------------------------------------------------------------------------


def matmul_flops(module: Module) -> dict[str, int]:
    """FLOPs of matrix products and convolutions by the dtype of their operands; a multiply-add is two.

    Products that the compiler pads or dilates count what meets data, not the zeros between.
    """
    flops: dict[str, int] = {}
    for computation, instruction, times in module.walk():
        if instruction.opcode in ("dot", "convolution"):
            dtype = computation.shape(instruction.operands[0]).dtype
            one = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            flops[dtype] = flops.get(dtype, 0) + times * one(computation, instruction)
    return flops


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.shape(dot.operands[0]).dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)
    contracted = [left[int(dim)] for dim in found[1].split(",") if dim] if found else []
    return 2 * math.prod(dot.shape.dims) * math.prod(contracted)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.text)
    assert labels is not None, convolution.text
    inputs, kernel, output = labels[1], labels[2], labels[3]
    left, right = (computation.shape(name).dims for name in convolution.operands[:2])
    out = convolution.shape.dims
    flops = 2 * right[kernel.index("i")] * out[output.index("b")] * out[output.index("f")]
    spatial = sorted(label for label in output if label.isdigit())
    window = _window(convolution.text, len(spatial))
    for number, label in enumerate(spatial):
        sizes = (left[inputs.index(label)], right[kernel.index(label)], out[output.index(label)])
        flops *= _meetings(*sizes, *window[number])
    return flops


def _window(text: str, count: int) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the input, dilation of the kernel) for each spatial dimension."""
    if not count:
        return []
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}

    def of(name: str, default: str) -> list[int]:
        return [int(part.split("_")[0]) for part in fields.get(name, "x".join([default] * count)).split("x")]

    parts = [of("stride", "1"), of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1")]
    return [(parts[0][i], parts[1][i], parts[2][i], parts[3][i]) for i in range(count)]


@functools.lru_cache(maxsize=4096)
def _meetings(left: int, kernel: int, out: int, stride: int, before: int, dilation: int, kernel_dilation: int) -> int:
    """In how many pairs of output and kernel position an element of the input is met."""
    positions = np.arange(out)[:, None] * stride - before + np.arange(kernel)[None, :] * kernel_dilation
    met = (positions >= 0) & (positions <= (left - 1) * dilation) & (positions % dilation == 0)
    return int(met.sum())
