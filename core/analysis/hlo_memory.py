"""Buffers of a compiled module, and what goes between the device and its main memory. All of it per device."""

from __future__ import annotations

import dataclasses

from compax.analysis.hlo import Module
from compax.analysis.hlo_text import Computation, Instruction

# What makes no buffer of its own, or moves nothing.
_VIEWS = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "optimization-barrier",
        "partition-id",
        "replica-id",
        "iota",
        "async-start",
        "async-update",
        "async-done",
    }
)
_ASYNCHRONOUS = ("-start", "-done", "-update")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value that the compiled program keeps in the device's main memory.

    Attributes:
        bytes: its size, padded to the tiles of its layout.
        shape: dtype and dimensions, such as "bf16[4,512,1024]".
        name: the instruction that makes it.
        op_name: the operation of the program that it belongs to, as JAX named it.
        count: how many instructions make one of that shape for that operation; they need not be alive together.
    """

    bytes: int
    shape: str
    name: str
    op_name: str
    count: int


def memory_traffic(module: Module) -> int:
    """Bytes read from and written to the device's main memory in a call of the program.

    Each instruction reads its operands and writes its result; one that slices an operand reads the slice, one that
    updates in place writes the update. What stays in another memory, such as a TPU's vector memory, is not counted.
    """
    total = 0
    for computation, instruction, times in module.walk():
        if computation.name in module.fused or instruction.opcode in _VIEWS:
            continue
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        total += times * _traffic(module, computation, instruction)
    return total


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    shapes = [computation.shape(name) for name in instruction.operands]
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("dynamic-slice", "slice", "gather"):
        result = instruction.shape.elements[1] if instruction.opcode.endswith("-start") else instruction.shape
        return (result.nbytes if shapes[0].in_main_memory else 0) + result.main_memory_bytes
    if opcode == "dynamic-update-slice":
        update = shapes[1].nbytes
        return shapes[1].main_memory_bytes + (update if instruction.shape.in_main_memory else 0)
    if opcode == "copy" and instruction.opcode.endswith("-start"):
        return sum(shape.main_memory_bytes for shape in instruction.shape.elements[:2])
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called["calls"]]
        reads = sum(
            _read(module, fused, parameter.name, shapes[parameter.number].nbytes)
            for parameter in fused.parameters
            if shapes[parameter.number].in_main_memory
        )
        updated = _updated(module, fused)
        if updated is None or not instruction.shape.in_main_memory:
            return reads + instruction.shape.main_memory_bytes
        return reads + updated
    written = 0 if instruction.opcode.endswith("-start") else instruction.shape.main_memory_bytes
    return sum(shape.main_memory_bytes for shape in shapes) + written


def _read(module: Module, fused: Computation, name: str, whole: int) -> int:
    """How many of a value's bytes a fusion reads: those of the slices, if slices are all that it takes of it."""
    total = 0
    for user in fused.users(name):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.shape.nbytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            total += 0  # the rest of it stays as it is, where it is
        elif user.opcode in ("bitcast", "get-tuple-element"):
            total += _read(module, fused, user.name, whole)
        elif user.opcode == "fusion":
            inner = module.computations[user.called["calls"]]
            places = [place for place, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(module, inner, inner.parameters[place].name, whole) for place in places)
        else:
            return whole
    return min(total, whole)


def _updated(module: Module, fused: Computation) -> int | None:
    """What a fusion writes that only updates a part of an operand in place; None for others."""
    root = fused.root
    while root.opcode in ("bitcast", "copy", "convert"):
        root = fused.by_name[root.operands[0]]
    if root.opcode == "fusion":
        return _updated(module, module.computations[root.called["calls"]])
    return fused.shape(root.operands[1]).nbytes if root.opcode == "dynamic-update-slice" else None


def largest_buffers(module: Module, count: int = 10) -> tuple[Buffer, ...]:
    """The largest values in main memory, but for the program's own arguments.

    Equal shapes that belong to one operation are one entry: loops carry the same buffer through several instructions.
    """
    found: dict[tuple[str, str], Buffer] = {}
    for computation, instruction, _ in module.walk():
        if computation.name in module.fused or instruction.opcode in _VIEWS:
            continue
        if instruction.opcode.endswith(_ASYNCHRONOUS):
            continue
        for shape in instruction.shape.leaves:
            if not shape.in_main_memory:
                continue
            key = (str(shape), instruction.op_name)
            before = found.get(key)
            found[key] = Buffer(
                shape.nbytes, str(shape), instruction.name, instruction.op_name, 1 + (before.count if before else 0)
            )
    return tuple(sorted(found.values(), key=lambda buffer: (-buffer.bytes, buffer.name))[:count])
