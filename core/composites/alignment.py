"""Alignment: where in the dimensions of some chosen values each dimension of what is computed from them stands.

The axes of a graph say which dimensions belong together: where two dimensions meet they become one, also where a model
mixes two of the same size. Here nothing becomes one. A dimension is a row of *digits*, each a stretch of a dimension of
a root, as in a number of mixed radix, and where two meet they have to be the same.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from compax.analysis.normal import Node, Val
from compax.analysis.provenance import reshape_groups

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh convert_element_type div eq erf
    erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg not
    or pow rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
"""Operations that take each element by itself."""


class Misaligned(Exception):
    """Dimensions meet that are not the same, or an operation is none that can be followed."""


class Digit(NamedTuple):
    """A stretch of a dimension: its index is `index of the root's dimension // stride % size`.

    Attributes:
        root: the name of the root; none for a repetition.
        dim: the root's dimension.
        stride: how far apart in it neighbours are.
        size: how many there are.
    """

    root: str | None
    dim: int
    stride: int
    size: int

    def overlaps(self, other: "Digit") -> bool:
        """Whether two digits are of one dimension and share a part of it."""
        first, last = max(self.stride, other.stride), min(self.stride * self.size, other.stride * other.size)
        return self.root is not None and self[:2] == other[:2] and first < last


Row = tuple[Digit, ...]
"""One dimension: its digits, the major one first; empty for size one."""


class Alignment:
    """Follows dimensions through operations, forward from roots.

    Attributes:
        rigid: roots of which different dimensions may not meet each other; those of others meet anything.
        partners: pairs of rigid roots whose dimensions may meet each other.
        dims: the dimensions of each value.
        met: for each root that is not rigid, the digits of rigid ones that it met.
    """

    def __init__(self, rigid: Collection[str], partners: Collection[frozenset[str]] = ()):
        self.rigid = frozenset(rigid)
        self.partners = frozenset(partners)
        self.dims: dict[Val, tuple[Row, ...]] = {}
        self.met: dict[str, list[Digit]] = {}

    def place(self, x: Val, root: str) -> None:
        """Makes a value a root."""
        self.dims[x] = tuple((Digit(root, dim, 1, size),) if size > 1 else () for dim, size in enumerate(x.shape))

    def of(self, x: Val) -> tuple[Row, ...]:
        """The dimensions of a value; static ones repeat.

        Raises:
            Misaligned: it is computed from no root.
        """
        if x not in self.dims:
            if not x.static:
                raise Misaligned(f"{x} comes from elsewhere")
            self.dims[x] = tuple(_repeated(size) for size in x.shape)
        return self.dims[x]

    def follow(self, nodes: Iterable[Node]) -> None:
        """Visits nodes in order.

        Raises:
            Misaligned: some do not line up.
        """
        for node in nodes:
            self.visit(node)

    def visit(self, node: Node) -> None:
        """Finds the dimensions of a node's results.

        Raises:
            Misaligned: they do not line up, or the operation is none that can be followed.
        """
        if node.name in ELEMENTWISE:
            found = self._elementwise(node)
        elif node.name in _RULES:
            found = _RULES[node.name](self.of(node.inputs[0]), node)
        elif node.name == "reduce_sum":
            gone = node.attributes["axes"]
            found = tuple(row for dim, row in enumerate(self.of(node.inputs[0])) if dim not in gone)
        else:
            raise Misaligned(f"{node.name} is not followed")
        self.dims[node.outputs[0]] = found

    def _elementwise(self, node: Node) -> tuple[Row, ...]:
        rank = len(node.outputs[0].shape)
        rows: list[Row] = [()] * rank
        for x in node.inputs:
            if len(x.shape) == rank:
                rows = [self.meet(one, other) for one, other in zip(rows, self.of(x), strict=True)]
        return tuple(rows)

    def meet(self, one: Row, other: Row) -> Row:
        """What two dimensions are that meet element by element.

        Raises:
            Misaligned: they are different ones.
        """
        if not one or not other or one == other:
            return one or other
        pairs = _in_step(one, other)
        return _merged([self._meet(a, b) for a, b in pairs])

    def _meet(self, a: Digit, b: Digit) -> Digit:
        if a == b or b.root is None:
            return a
        if a.root is None:
            return b
        if a.root in self.rigid and b.root in self.rigid:
            if frozenset((a.root, b.root)) in self.partners:
                return a
            raise Misaligned(f"{a} meets {b}")
        if b.root in self.rigid:
            a, b = b, a
        if a.root in self.rigid and b.root is not None:
            self.met.setdefault(b.root, []).append(a)
        return a


def region(output: Val, inputs: Iterable[Val]) -> tuple[Node, ...]:
    """The nodes that compute a value from others, in order; static ones left out."""
    found: set[Node] = set()
    seen = set(inputs)
    waiting = [output]
    while waiting:
        x = waiting.pop()
        if x in seen or x.node is None or x.static:
            continue
        seen.add(x)
        found.add(x.node)
        waiting.extend(x.node.inputs)
    return tuple(sorted(found, key=lambda node: node.number))


def _repeated(size: int) -> Row:
    return (Digit(None, 0, 1, size),) if size > 1 else ()


def _cut(digit: Digit, inner: int) -> tuple[Digit, Digit]:
    """A digit as a major and a minor one of size `inner`."""
    if inner < 1 or digit.size % inner:
        raise Misaligned(f"{digit} is not a multiple of {inner}")
    return digit._replace(stride=digit.stride * inner, size=digit.size // inner), digit._replace(size=inner)


def _merged(digits: Sequence[Digit]) -> Row:
    """Neighbours that are one stretch made one."""
    row: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        if row and row[-1][:2] == digit[:2] and (digit.root is None or row[-1].stride == digit.stride * digit.size):
            digit = digit._replace(size=row.pop().size * digit.size)
        row.append(digit._replace(dim=0, stride=1) if digit.root is None else digit)
    return tuple(row)


def _in_step(one: Row, other: Row) -> list[tuple[Digit, Digit]]:
    """Two dimensions of one size in digits of the same sizes."""
    left, right, pairs = list(one), list(other), []
    while left and right:
        a, b = left.pop(), right.pop()
        if a.size > b.size:
            outer, a = _cut(a, b.size)
            left.append(outer)
        elif b.size > a.size:
            outer, b = _cut(b, a.size)
            right.append(outer)
        pairs.append((a, b))
    if left or right:
        raise Misaligned("dimensions of different sizes meet")
    return pairs[::-1]


def _broadcast(rows: tuple[Row, ...], node: Node) -> tuple[Row, ...]:
    source, sizes = node.inputs[0].shape, node.outputs[0].shape
    result = [_repeated(size) for size in sizes]
    for dim, out in enumerate(node.attributes["broadcast_dimensions"]):
        if source[dim] == sizes[out]:
            result[out] = rows[dim]
    return tuple(result)


def _reshape(rows: tuple[Row, ...], node: Node) -> tuple[Row, ...]:
    source, sizes = node.inputs[0].shape, node.outputs[0].shape
    if node.attributes.get("dimensions") is not None or 0 in source:
        raise Misaligned("a reshape in another order")
    result: list[Row] = [()] * len(sizes)
    for before, after in reshape_groups(source, sizes):
        rest = [digit for dim in before for digit in rows[dim]]
        for dim in reversed(after):
            taken: list[Digit] = []
            missing = sizes[dim]
            while missing > 1:
                digit = rest.pop()
                if digit.size > missing:
                    outer, digit = _cut(digit, missing)
                    rest.append(outer)
                elif missing % digit.size:
                    raise Misaligned(f"{digit} lies across a border")
                taken.append(digit)
                missing //= digit.size
            result[dim] = _merged(taken[::-1])
    return tuple(result)


def _squeeze(rows: tuple[Row, ...], node: Node) -> tuple[Row, ...]:
    gone = {dim % len(rows) for dim in node.attributes["dimensions"]}
    return tuple(row for dim, row in enumerate(rows) if dim not in gone)


def _transpose(rows: tuple[Row, ...], node: Node) -> tuple[Row, ...]:
    return tuple(rows[dim] for dim in node.attributes["permutation"])


_RULES = {"broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _squeeze, "transpose": _transpose}
