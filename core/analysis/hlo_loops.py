"""How often a loop of a compiled module runs, read from its condition, its body and its start."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from compax.analysis.hlo_text import Computation, Instruction

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SAME = frozenset({"copy", "bitcast", "convert", "reshape", "broadcast"})


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A whole number that the text tells: `constant`, plus element `element` of what the loop carries, if any."""

    constant: int
    element: int | None = None


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A computation, with what its parameters are.

    Attributes:
        computation: it.
        arguments: for each parameter, the scalar that it is or None.
        carried: whether its only parameter is the tuple that a loop carries.
    """

    computations: Mapping[str, Computation]
    computation: Computation
    arguments: tuple[_Scalar | None, ...] = ()
    carried: bool = False

    def scalar(self, name: str) -> _Scalar | None:
        """What a value is, or None: the text does not tell."""
        instruction = self.computation.by_name[name]
        if instruction.opcode == "constant":
            return _Scalar(int(instruction.argument)) if re.fullmatch(r"-?\d+", instruction.argument) else None
        if instruction.opcode == "parameter":
            number = instruction.number
            return self.arguments[number] if number < len(self.arguments) else None
        if instruction.opcode in _SAME:
            return self.scalar(instruction.operands[0])
        if instruction.opcode == "get-tuple-element":
            return self._element(self.computation.by_name[instruction.operands[0]], instruction)
        if instruction.opcode == "add":
            left, right = (self.scalar(operand) for operand in instruction.operands)
            if left is None or right is None or (left.element is not None and right.element is not None):
                return None
            element = right.element if left.element is None else left.element
            return _Scalar(left.constant + right.constant, element)
        if instruction.opcode in ("fusion", "call"):
            inner = self.inner(instruction)
            return inner.scalar(inner.computation.root.name)
        return None

    def _element(self, owner: Instruction, chosen: Instruction) -> _Scalar | None:
        """An element of what a loop carries, or of the results of a fusion or a barrier."""
        index = re.search(r"\bindex=(\d+)", chosen.text)
        if index is None:
            return None
        if owner.opcode == "parameter":
            return _Scalar(0, int(index[1])) if self.carried else None
        if owner.opcode == "opt-barrier":
            owner = self.computation.by_name[owner.operands[0]]
        if owner.opcode == "tuple":
            return self.scalar(owner.operands[int(index[1])])
        if owner.opcode in ("fusion", "call"):
            inner = self.inner(owner)
            root = inner.computation.root
            return inner.scalar(root.operands[int(index[1])]) if root.opcode == "tuple" else None
        return None

    def inner(self, instruction: Instruction) -> _Scope:
        """The computation that a fusion or call enters."""
        called = instruction.called
        computation = self.computations[called.get("calls") or called["to_apply"]]
        arguments = tuple(self.scalar(operand) for operand in instruction.operands)
        return _Scope(self.computations, computation, arguments)


def trip_count(computations: Mapping[str, Computation], computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, or None if the text does not tell.

    1. The compiler says so (`known_trip_count`).
    2. The condition compares a counter with a constant, the counter starts at a constant and the body adds one.

    Args:
        computations: all of the module.
        computation: the one that the loop stands in.
        loop: the loop.
    """
    if known := _KNOWN.search(loop.text):
        return int(known[1])
    compared = _compared(_Scope(computations, computations[loop.called["condition"]], carried=True))
    if compared is None:
        return None
    counter, limit, direction = compared
    if counter.element is None:
        return None
    start = _started(_Scope(computations, computation), loop, counter.element)
    step = _step(_Scope(computations, computations[loop.called["body"]], carried=True), counter.element)
    if start is None or step is None or step <= 0:
        return None
    distance = limit - counter.constant - start + (1 if direction == "LE" else 0)
    return max(math.ceil(distance / step), 0)


def _compared(scope: _Scope) -> tuple[_Scalar, int, str] | None:
    """The counter, what it is compared with, and how."""
    root = scope.computation.root
    while root.opcode in ("fusion", "call"):
        scope = scope.inner(root)
        root = scope.computation.root
    if root.opcode != "compare":
        return None
    direction = re.search(r"direction=(\w+)", root.text)
    left, right = (scope.scalar(operand) for operand in root.operands)
    if direction is None or left is None or right is None:
        return None
    way = direction[1]
    if left.element is None:
        left, right, way = right, left, {"GT": "LT", "GE": "LE"}.get(way, "")
    if right.element is not None or way not in ("LT", "LE", "NE"):
        return None
    return left, right.constant, way


def _started(scope: _Scope, loop: Instruction, element: int) -> int | None:
    """At what an element of what a loop carries starts."""
    carried = scope.computation.by_name[loop.operands[0]]
    while carried.opcode in ("copy", "bitcast", "opt-barrier"):
        carried = scope.computation.by_name[carried.operands[0]]
    if carried.opcode != "tuple":
        return None
    found = scope.scalar(carried.operands[element])
    return found.constant if found is not None and found.element is None else None


def _step(scope: _Scope, element: int) -> int | None:
    """By how much the body of a loop raises an element of what it carries."""
    if scope.computation.root.opcode != "tuple":
        return None
    found = scope.scalar(scope.computation.root.operands[element])
    return found.constant if found is not None and found.element == element else None
