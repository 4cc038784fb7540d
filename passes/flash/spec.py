"""What a fused kernel has to know of an attention: plain data, hashable, the same for equal layers.

Letters in shapes:
    B batch    T positions of queries    S positions of keys    H query heads    G key-value heads
    K head size    V size of values
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from compax.composites.layout import Layout
from compax.composites.masks import in_band
from compax.rewrites.checkpoint import KERNEL_RESIDUALS

Kernel = Literal["splash", "cudnn", "pallas", "plain"]
"""Which implementation computes an attention."""

OUT_NAME, LSE_NAME = KERNEL_RESIDUALS
"""What `jax.checkpoint` policies may keep: the output, and the logarithm of the sum of exponentials of each query."""

MASKED = -1e30
"""A score that is as good as none; finite, so that a row of nothing else is no NaN."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys each query may look at, as far as that is the same in every call.

    Attributes:
        kind: "full", "band" (causal and windows), "chunked" or "other".
        before: how many keys before its own position a query sees; -1 for all.
        after: how many behind; -1 for all.
        chunk: length of a chunk of "chunked", which is causal inside of a chunk.
        offset: key position of the first query.
        packed: for "other" the matrix, bit by bit, row by row.
    """

    kind: Literal["full", "band", "chunked", "other"] = "full"
    before: int = -1
    after: int = -1
    chunk: int = 0
    offset: int = 0
    packed: bytes = b""

    @property
    def is_causal(self) -> bool:
        """Whether a query sees its own position and all before, counted from the first key."""
        return (self.kind, self.before, self.after, self.offset) == ("band", -1, 0, 0)

    def matrix(self, num_queries: int, num_keys: int) -> np.ndarray:
        """The whole of it: bool[T, S]."""
        if self.kind == "other":
            bits = np.unpackbits(np.frombuffer(self.packed, np.uint8), count=num_queries * num_keys)
            return bits.reshape(num_queries, num_keys).astype(bool)
        rows, columns = np.arange(num_queries)[:, None], np.arange(num_keys)[None]
        return np.broadcast_to(np.asarray(self.seen(rows, columns)), (num_queries, num_keys))

    def seen(self, rows: jax.Array | np.ndarray, columns: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Which of some keys are seen by some queries; not for "other".

        Args:
            rows: numbers of queries, int32[T, 1].
            columns: numbers of keys, int32[1, S].
        """
        assert self.kind != "other", "a pattern without a rule is looked up"
        rows = rows + self.offset
        found = in_band(rows - columns, (self.before, self.after))
        return found & (rows // self.chunk == columns // self.chunk) if self.kind == "chunked" else found

    def leaves_some_blind(self, num_queries: int, num_keys: int) -> bool:
        """Whether some query sees no key."""
        if self.kind == "other":
            return not self.matrix(num_queries, num_keys).any(1).all()
        first, last = self.span(num_queries)
        return bool((np.minimum(last, num_keys) <= np.maximum(first, 0)).any())

    def span(self, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
        """The first key that each query sees and the one behind the last, not clipped: int[T] each. Not for "other"."""
        rows = np.arange(num_queries) + self.offset
        far = np.iinfo(np.int32).max // 2
        first = rows - self.before if self.before >= 0 else np.full_like(rows, -far)
        last = rows + self.after + 1 if self.after >= 0 else np.full_like(rows, far)
        if self.kind == "chunked":
            start = rows // self.chunk * self.chunk
            first, last = np.maximum(first, start), np.minimum(last, start + self.chunk)
        return first, last


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a mask or a bias of the model becomes [B, H, T, S], with size one for what it is the same for.

    Attributes:
        kept: its dimensions that stand for something.
        order: their order.
        shape: the shape then.
        sign: whether a bias is added (1) or subtracted (-1).
    """

    kept: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int, int]
    sign: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """The array in that form."""
        return x.reshape([x.shape[i] for i in self.kept]).transpose(self.order).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Devices:
    """How an attention is spread over a mesh: a Pallas kernel is never taken apart by the compiler.

    Attributes:
        mesh: the mesh.
        batch: its axes over which sequences are spread.
        heads: its axes over which heads are spread, those of queries and of keys alike.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """How operands and results [B, T, H, K] are spread, and what there is for keys alone, [B, S]."""
        return PartitionSpec(self.batch or None, None, self.heads or None), PartitionSpec(self.batch or None)


@dataclasses.dataclass(frozen=True)
class Spec:
    """An attention and how it is to be computed.

    Operands of the operation are query, key, value, then `padding`, `given` and `bias` in this order.

    Attributes:
        kernel: which implementation computes it.
        layout: how operands and the result are arranged.
        pattern: the static part of the mask.
        scale: what scores are multiplied with.
        softcap: `cap * tanh(scores / cap)`, or none.
        padding: for each value that says which keys are there, how it is spread.
        given: the same for values that say for each pair of query and key whether it is seen.
        bias: the same for what is added to scores.
        query_dtype: the dtype in which the model multiplies queries with keys.
        value_dtype: that in which it multiplies weights with values.
        block_q: how many queries are computed together, or what suits the kernel.
        block_k: the same of keys.
        interpret: whether a Pallas kernel is interpreted, operation by operation, on any platform.
        spread: over which devices a Pallas kernel runs; none if the program is on one, or spread in the model itself.
    """

    kernel: Kernel
    layout: Layout
    pattern: Pattern
    scale: float
    softcap: float | None
    padding: tuple[Spread, ...]
    given: tuple[Spread, ...]
    bias: tuple[Spread, ...]
    query_dtype: str
    value_dtype: str
    block_q: int | None = None
    block_k: int | None = None
    interpret: bool = False
    spread: "Devices | None" = None

    @property
    def lengths(self) -> tuple[int, int]:
        """How many queries and keys there are."""
        return self.layout.query.grouped[1], self.layout.key.grouped[1]

    @property
    def heads(self) -> tuple[int, int]:
        """How many query heads and key-value heads there are."""
        return self.layout.query.grouped[2], self.layout.key.grouped[2]

    @property
    def sizes(self) -> tuple[int, int]:
        """Size of a head, and of its values."""
        return self.layout.query.grouped[3], self.layout.value.grouped[3]

    @property
    def may_see_nothing(self) -> bool:
        """Whether there may be a query that sees no key at all."""
        return bool(self.padding or self.given or self.bias) or self.pattern.leaves_some_blind(*self.lengths)


def rows_with_nothing(pattern: Pattern, num_queries: int, present: jax.Array) -> jax.Array:
    """Which queries see no key.

    Where the pattern has a rule, by a sum over what each query may see, without a matrix of queries and keys.

    Args:
        pattern: the static part of the mask.
        num_queries: T.
        present: which keys are there: bool[B, S].

    Returns:
        bool[B, T].
    """
    num_keys = present.shape[1]
    if pattern.kind == "other":
        matrix = jnp.asarray(pattern.matrix(num_queries, num_keys), jnp.int32)
        return present.astype(jnp.int32) @ matrix.T == 0
    first, last = (np.clip(edge, 0, num_keys) for edge in pattern.span(num_queries))
    counted = jnp.pad(jnp.cumsum(present.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))
    return counted[:, np.maximum(last, first)] - counted[:, first] <= 0


def mean_where_nothing(out: jax.Array, value: jax.Array, nothing: jax.Array) -> jax.Array:
    """What a softmax over scores that are all masked comes to: every key counts the same.

    Args:
        out: [B, T, H, V].
        value: [B, S, G, V].
        nothing: which queries see no key: bool, broadcast to [B, T, H].
    """
    repeats = out.shape[2] // value.shape[2]
    mean = jnp.repeat(value.astype(jnp.float32).mean(axis=1, keepdims=True), repeats, axis=2)
    return jnp.where(nothing[..., None], mean.astype(out.dtype), out)


def combined(masks: Sequence[jax.Array]) -> jax.Array | None:
    """The conjunction of masks, or none."""
    found: jax.Array | None = None
    for mask in masks:
        found = mask if found is None else found & mask
    return found
