"""The text of a compiled HLO module as objects: computations, instructions, shapes with their layouts."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SCALARS = re.compile(r"(?:bf|f|s|u)(\d+)")
_DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "pred": "bool",
    "c64": "complex64",
    "c128": "complex128",
    **{f"s{bits}": f"int{bits}" for bits in (2, 4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (2, 4, 8, 16, 32, 64)},
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# The metadata of kernels is JSON over several lines, one of which may start with a brace as well.
_END = re.compile(r"^\}(?!\})\s*(,\s*execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}|\b(?:true|false)_computation=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a value: an array, or a tuple of shapes.

    Attributes:
        primitive: XLA's name of the dtype, such as "bf16"; "tuple" for a tuple.
        dims: sizes.
        minor_to_major: dimensions, the one that lies closest together first.
        tile: the first tile of the layout: the minor dimensions are padded to multiples of it.
        memory: the memory space. 0 is the device's main memory; on a TPU 1 is vector memory, 5 the host's.
        elements: of a tuple.
    """

    primitive: str
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = 0
    elements: tuple[Shape, ...] = ()

    @property
    def dtype(self) -> str:
        """The dtype as NumPy names it, or XLA's name if there is none."""
        return _DTYPES.get(self.primitive, self.primitive)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes, padded to the tiles of the layout; of a tuple, those of its elements."""
        if self.primitive == "tuple":
            return sum(element.nbytes for element in self.elements)
        sizes = [self.dims[dim] for dim in reversed(self.minor_to_major)] or list(self.dims)
        if self.tile and len(self.tile) <= len(sizes):
            for place, tile in enumerate(self.tile, start=len(sizes) - len(self.tile)):
                sizes[place] = -(-sizes[place] // tile) * tile
        return (math.prod(sizes) * bits(self.primitive) + 7) // 8

    @property
    def leaves(self) -> tuple[Shape, ...]:
        """The arrays of a tuple, or the array itself."""
        if self.primitive == "tuple":
            return tuple(leaf for element in self.elements for leaf in element.leaves)
        return (self,)

    @property
    def in_main_memory(self) -> bool:
        """Whether it is an array in the device's main memory."""
        return self.primitive != "tuple" and self.memory == 0

    @property
    def main_memory_bytes(self) -> int:
        """Bytes of the arrays that are in main memory."""
        return sum(leaf.nbytes for leaf in self.leaves if leaf.memory == 0)

    def __str__(self) -> str:
        if self.primitive == "tuple":
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.primitive}[{','.join(map(str, self.dims))}]"


def bits(primitive: str) -> int:
    """Bits of an element, such as 16 for "bf16", 8 for "f8e4m3fn" and 4 for "s4".

    Raises:
        ValueError: there is no such type.
    """
    if primitive in _BITS:
        return _BITS[primitive]
    found = _SCALARS.match(primitive)
    if found is None:
        raise ValueError(f"HLO text has the element type '{primitive}', of which the size is not known")
    return int(found[1])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        name: without the percent sign.
        shape: of its result.
        opcode: such as "fusion".
        operands: names of its operands.
        text: what stands behind the operands: attributes, metadata, configuration.
        argument: what stands between the brackets, for parameters and constants.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    text: str
    argument: str = ""

    @functools.cached_property
    def called(self) -> Mapping[str, str]:
        """Names of computations by the attribute that names them: calls, to_apply, body, condition."""
        return dict(_CALLED.findall(self.text))

    @functools.cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of the computations that a conditional chooses from."""
        found: list[str] = []
        for several, one in _BRANCHES.findall(self.text):
            found += [name.strip().lstrip("%") for name in several.split(",")] if several else [one]
        return tuple(found)

    @property
    def op_name(self) -> str:
        """The operation that it comes from, as JAX named it, or an empty string."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def number(self) -> int:
        """Which parameter it is."""
        assert self.opcode == "parameter"
        return int(self.argument)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation.

    Attributes:
        name: without the percent sign.
        instructions: in the order in which they run, if the module is scheduled.
        root: the one that gives the result.
        devices: how many devices the module runs on.
    """

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction
    devices: int

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters, in order."""
        found = [instruction for instruction in self.instructions if instruction.opcode == "parameter"]
        return tuple(sorted(found, key=lambda instruction: instruction.number))

    @functools.cached_property
    def _users(self) -> Mapping[str, tuple[Instruction, ...]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    def users(self, name: str) -> tuple[Instruction, ...]:
        """The instructions that read a value."""
        return self._users.get(name, ())

    def shape(self, name: str) -> Shape:
        """The shape of an instruction's result."""
        return self.by_name[name].shape


def parse_computations(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of the one that runs.

    Raises:
        ValueError: the text is no HLO module, or has no entry.
    """
    if not text.startswith("HloModule"):
        raise ValueError("this is no text of an HLO module: it has to start with 'HloModule'")
    head = text[: text.find("\n")]
    devices = max((int(count) for count in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)), default=1)
    found: dict[str, Computation] = {}
    entry = name = None
    instructions: list[Instruction] = []
    root: Instruction | None = None
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, instructions, root = header[2], [], None
                entry = name if header[1] else entry
        elif _END.match(line):
            if instructions:
                found[name] = Computation(name, tuple(instructions), root or instructions[-1], devices)
            name = None
        elif start := _INSTRUCTION.match(line):
            instruction = _instruction(start[2], line[start.end() :])
            instructions.append(instruction)
            root = instruction if start[1] else root
    if entry is None or entry not in found:
        raise ValueError("this HLO module has no ENTRY computation")
    return found, entry


def _instruction(name: str, text: str) -> Instruction:
    """Parses what stands behind `name = `."""
    shape, end = parse_shape(text, 0)
    opening = text.index("(", end)
    opcode = text[end:opening].strip()
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    operands: tuple[str, ...] = ()
    if opcode not in ("parameter", "constant", "iota"):
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, opcode, operands, text[closing + 1 :], inside if not operands else "")


def _closing(text: str, opening: int) -> int:
    """The place of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if not depth:
                return place
    raise ValueError(f"HLO text has an instruction without a closing bracket: {text[:80]}")


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse_shape(text: str, start: int) -> tuple[Shape, int]:
    """Parses a shape, such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`.

    Returns:
        The shape, and the place behind it.

    Raises:
        ValueError: there is none at `start`.
    """
    place = start
    if text[place] == "(":
        elements: list[Shape] = []
        place += 1
        while True:
            while text[place] in ", ":
                place += 1
            if comment := _COMMENT.match(text, place):
                place = comment.end()
            elif text[place] == ")":
                return Shape("tuple", elements=tuple(elements)), place + 1
            else:
                element, place = parse_shape(text, place)
                elements.append(element)
    found = _ARRAY.match(text, place)
    if found is None:
        raise ValueError(f"HLO text has no shape at '{text[place : place + 40]}'")
    return _array(found[1], found[2], found[3] or ""), found.end()


@functools.lru_cache(maxsize=65536)
def _array(primitive: str, sizes: str, layout: str) -> Shape:
    dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    order, _, tiling = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    memory = re.search(r"S\((\d+)\)", tiling)
    return Shape(
        primitive,
        dims,
        tuple(int(dim) for dim in order.split(",") if dim),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(memory[1]) if memory else 0,
    )
