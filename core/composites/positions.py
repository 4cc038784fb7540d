"""Rotary position encodings, told by evaluating what lies between a projection and its use.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864. Features turn in
pairs; which ones are pairs, how many turn, and the base of the frequencies come out of three evaluations of the region
at unit vectors, whatever operations it is written in.
"""

import numpy as np

from compax.analysis.atoms import Atom, Factors
from compax.analysis.folding import Folder, TooLarge, Unknown
from compax.analysis.normal import Node, Val
from compax.composites.base import Rotation
from compax.composites.view import LAYOUT, View, scalar

_MOST_NODES = 96
_PASSED = LAYOUT | {
    "mul",
    "add",
    "sub",
    "neg",
    "add_any",
    "select_n",
    "complex",
    "real",
    "imag",
    "copy",
    "div",
    "gather",
}


def query_rotation(view: View, query: Val, head_size: Factors) -> tuple[Rotation | None, float]:
    """The rotary encoding that queries went through, and what constant they were multiplied with after the projection.

    Args:
        view: the graph.
        query: queries as the product takes them.
        head_size: the dimension of their features.
    """
    scale, x = 1.0, query
    passed = [query]
    while x.node is not None and (step := _single(view, x.node)) is not None:
        factor, x = step
        scale *= factor
        passed.append(x)
    source = None if x.node is None else _common_source(view, x)
    if source is None:
        return None, scale
    sources = [source]
    while sources[-1].node is not None and (step := _single(view, sources[-1].node)) is not None:
        scale *= step[0]
        sources.append(step[1])
    features = set(view.engine.atoms.leaves(head_size))
    # Pairs that were taken apart have their features in two dimensions; what they come from and become, in one.
    turned, dim = next(
        ((y, d) for y in reversed(passed) if (d := _feature_dim(view, y, features)) is not None), (x, -1)
    )
    size = turned.shape[dim]
    source, source_dim = next(
        ((y, d) for y in sources if (d := _feature_dim(view, y, features)) is not None and y.shape[d] == size),
        (source, None),
    )
    if dim < 0 or source_dim is None:
        return None, scale
    key = ("rotation", view.key(turned, {source: "source"}), dim, source_dim)
    if key not in view.memo:
        view.memo[key] = _evaluate(turned, source, dim, source_dim)
    return view.memo[key], scale


def _single(view: View, node: Node) -> tuple[float, Val] | None:
    """A node that rearranges one value or multiplies it with a number: the number, and the value."""
    moving = [x for x in node.inputs if view.follows_product(x)]
    if node in view.linears or len(moving) != 1:
        return None
    if node.name in LAYOUT - {"concatenate", "pad", "stack"}:
        return 1.0, moving[0]
    if node.name in ("mul", "div") and len(node.inputs) == 2:
        other = node.inputs[1] if node.inputs[0] is moving[0] else node.inputs[0]
        number = _number(other)
        if number is not None and (node.name == "mul" or other is node.inputs[1]) and number != 0.0:
            return (number if node.name == "mul" else 1.0 / number), moving[0]
    return None


def _number(x: Val) -> float | None:
    """The number that a static value is everywhere."""
    direct = scalar(x)
    if direct is not None or not x.static:
        return direct
    try:
        array = Folder(budget=1 << 12)(x)
    except (Unknown, TooLarge):
        return None
    return float(array.reshape(-1)[0]) if array.size == 1 else None


def _common_source(view: View, x: Val) -> Val | None:
    """The one value that all of `x` is computed from by rearranging, multiplying and adding."""
    frontier, count = {x}, 0
    while True:
        last = max(frontier, key=lambda y: y.number)
        node = last.node
        if len(frontier) == 1 and count:
            return last
        if node is None or node in view.linears or node.name not in _PASSED or count > _MOST_NODES:
            return None
        moving = [y for y in node.inputs if view.follows_product(y)]
        if not moving or (not count and len(moving) == 1 and len(set(moving)) == 1):
            return None
        frontier.discard(last)
        frontier.update(moving)
        count += 1


def _feature_dim(view: View, x: Val, features: set[Atom]) -> int | None:
    """The dimension of a value that has the features of a head."""
    atoms = view.engine.atoms
    found = [dim for dim, factors in enumerate(view.engine.dims[x]) if features & set(atoms.leaves(factors))]
    return found[0] if len(found) == 1 else None


def _evaluate(x: Val, source: Val, dim: int, source_dim: int) -> Rotation | None:
    size = source.shape[source_dim]
    if size != x.shape[dim] or size < 4:
        return None
    leaves: dict[Val, np.ndarray] = {}
    shape = [size if d == source_dim else 1 for d in range(len(source.shape))]

    def turned(vector: np.ndarray, position: int = 1) -> np.ndarray:
        first = [min(position, n - 1) for n in x.shape]
        window = tuple((0, n) if d == dim else (first[d], first[d] + 1) for d, n in enumerate(x.shape))
        for _ in range(4):
            try:
                given = {leaf: array * position for leaf, array in leaves.items()}
                return Folder({**given, source: vector.astype(np.float32).reshape(shape)}).full(x, window).reshape(-1)
            except Unknown as unknown:
                leaf = unknown.val
                if leaf.input is None or leaf.input.kind == "parameter" or not np.issubdtype(leaf.dtype, np.integer):
                    raise
                leaves[leaf] = np.ones([1] * len(leaf.shape), leaf.dtype)
        raise Unknown(x)

    try:
        first = turned(np.eye(size)[0])
        others = np.flatnonzero(np.abs(first) > 1e-9)
        partners = others[others != 0]
        if len(partners) != 1:
            return None
        partner = int(partners[0])
        form, members = ("interleaved", np.arange(0, size, 2)) if partner == 1 else ("half", np.arange(partner))
        vector = np.zeros(size)
        vector[members] = 1.0
        result = turned(vector)
        seconds = members + (1 if form == "interleaved" else partner)
        if seconds[-1] >= size:
            return None
        sines, cosines = result[seconds], result[members]
        turning = np.flatnonzero(np.abs(sines) > 0)
        if not np.allclose(turned(vector, 0), vector, atol=1e-6):  # nothing turns at position zero
            return None
        if not np.allclose(sines[turning] ** 2 + cosines[turning] ** 2, 1.0, atol=1e-3):
            return None
        count = len(turning) * 2
        return Rotation(form, count, _base(np.arctan2(np.abs(sines[turning]), cosines[turning]), count))
    except (Unknown, TooLarge):
        return None


def _base(angles: np.ndarray, size: int) -> float | None:
    """The base `b` of angles that are `angle * b ** (-2 i / size)`."""
    if len(angles) < 2 or (angles <= 0).any():
        return None
    exponents = -2.0 * np.arange(len(angles)) / size
    logarithms = np.log(angles / angles[0])
    base = float(np.exp(logarithms[1] / exponents[1]))
    if not np.allclose(logarithms, exponents * np.log(base), rtol=2e-2, atol=1e-3):
        return None
    return float(f"{base:.3g}")
