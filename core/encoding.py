"""Encodings: how a parameter is stored.

An encoding is a pytree that stands for a dense array of the same shape. Its leaves may be arrays, shapes, or encodings
again, so encodings nest. The contract that every encoding keeps (one test checks it for all of them):

1. Leaves keep the leading dimensions of the parameter, so that `scan` and slices of a stack work; a leaf may hold 1 in
   place of a dimension over which it is constant.
2. Static data counts dimensions from the end.
3. A layout method gives the encoding of the rearranged array without unpacking it, or `None`: it cannot.
4. `decode` after a layout method equals the layout operation after `decode`, bit for bit.
5. `nbytes` is what the leaves occupy.

Two kinds: stored encodings hold integers and get no gradient; simulated ones hold a float master that is seen through
the format, and gradients reach the master unchanged (Bengio, Leonard, Courville, "Estimating or Propagating Gradients
Through Stochastic Neurons for Conditional Computation", 2013, arXiv 1308.3432).
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Slices = tuple[tuple[int, int, int], ...]
"""(start, limit, stride) for each dimension."""


class Encoded(abc.ABC):
    """Base of all encodings. Subclasses are pytrees (`jax.tree_util.register_dataclass`).

    Attributes:
        format: the name of the format in print, such as "int8".
    """

    format: ClassVar[str] = "encoded"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype of the array that this stands for."""

    @property
    def trainable(self) -> bool:
        """Whether gradients reach the leaves."""
        return False

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """The dense array."""

    def prepared(self) -> "Encoded":
        """The encoding as a program runs with it.

        Statistics of the whole parameter are computed here, once, before any body slices or shards it.
        """
        return self

    @abc.abstractmethod
    def spec(self, spec: PartitionSpec) -> "Encoded":
        """The same pytree with a `PartitionSpec` in place of each leaf, for a parameter sharded by `spec`.

        Raises:
            EncodingError: the leaves cannot be sharded so; says why.
        """

    @abc.abstractmethod
    def manual(self, spec: PartitionSpec) -> "Encoded":
        """Notes over which manual mesh axes each dimension is split, inside `shard_map`."""

    @abc.abstractmethod
    def stacked(self, length: int) -> "Encoded":
        """An equal encoding of which every leaf leads with `length`, so that a scan can slice it."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the array that this stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the leaves occupy."""
        return sum(leaf_nbytes(leaf) for leaf in jax.tree.leaves(self))

    # Layout methods: an encoding, or None where the format cannot express the result.

    def astype(self, dtype: Any) -> "Encoded | None":
        """The array in another floating dtype."""
        return None

    def transpose(self, permutation: Sequence[int]) -> "Encoded | None":
        """Dimensions in another order."""
        return None

    def reshape(self, shape: Sequence[int]) -> "Encoded | None":
        """Another shape of the same size."""
        return None

    def squeeze(self, dimensions: Sequence[int]) -> "Encoded | None":
        """Without some dimensions of size 1."""
        return None

    def slice(self, slices: Slices) -> "Encoded | None":
        """A static slice."""
        return None

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> "Encoded | None":
        """A slice whose start is computed."""
        return None

    def concatenate(self, others: Sequence[Any], dimension: int) -> "Encoded | None":
        """Several arrays in a row along `dimension`, this one first."""
        return None

    def gather(self, indices: Any, attributes: dict[str, Any]) -> Any:
        """`jax.lax.gather` from the array: an encoding or a dense array, or None."""
        return None

    def leafwise(self, function: Any) -> "Encoded":
        """A function that acts alike on any array, such as a barrier, applied to each leaf."""
        return jax.tree.map(function, self)


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of an array or shape, to the byte: types narrower than a byte are packed."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return math.prod(leaf.shape) * 8
    name = np.dtype(dtype).name
    bits = jnp.iinfo(dtype).bits if name in ("int2", "uint2", "int4", "uint4") else np.dtype(dtype).itemsize * 8
    return (math.prod(leaf.shape) * bits + 7) // 8


def nbytes(x: Any) -> int:
    """Bytes that a parameter occupies, encoded or not."""
    return x.nbytes if isinstance(x, Encoded) else leaf_nbytes(x)


def format_of(x: Any) -> str:
    """The name of a parameter's format: an encoding's own, or the dtype."""
    return x.format if isinstance(x, Encoded) else str(x.dtype)
