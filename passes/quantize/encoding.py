"""Encodings of int8 quantization: stored, and simulated for training."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from compax import integers
from compax.analysis.provenance import reshape_groups
from compax.encoding import Encoded, Slices
from compax.errors import EncodingError
from compax.passes.quantize import arithmetic

Axes = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class ScaledArray(Encoded):
    """Values with a scale that is constant along some dimensions: what quantized formats share.

    Attributes:
        values: what is stored, in the shape of the parameter.
        scale: float32, of the same rank; 1 along dimensions that share a scale.
        logical_dtype: dtype of the array that this stands for.
        axes: inside `shard_map`, the mesh axes that split each dimension, aligned with the last one.
        order: a transposition that is not carried out yet: which dimension of the leaves each dimension is. Products
            read the leaves as they lie; anything else settles it first.
        through: the narrowest dtype that casts have led through, where `logical_dtype` is wider again.
    """

    values: Any
    scale: Any
    logical_dtype: Any
    axes: Axes = ()
    order: tuple[int, ...] = ()
    through: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.values.shape)
        return tuple(shape[dim] for dim in self.order) if self.order else shape

    def as_it_lies(self) -> Self:
        """The array before the pending transposition."""
        return dataclasses.replace(self, order=())

    def settled(self) -> Self:
        """The same array with the pending transposition carried out."""
        if not self.order:
            return self
        axes = [self.axes_of(dim) for dim in self.order]
        return dataclasses.replace(self, order=())._with(
            jnp.transpose(self.values, self.order), jnp.transpose(self.scale, self.order), axes
        )

    @property
    def dtype(self) -> Any:
        return self.logical_dtype

    def axes_of(self, dim: int) -> tuple[str, ...]:
        """The manual mesh axes that split a dimension."""
        place = dim - self.ndim
        return self.axes[place] if -place <= len(self.axes) else ()

    def _shared(self, dim: int) -> bool:
        """Whether the values along `dim` share a scale."""
        return self.scale.shape[dim] == 1 and self.values.shape[dim] != 1

    def _with(self, values: Any, scale: Any, axes: Sequence[tuple[str, ...]]) -> Self:
        kept = tuple(axes) if any(axes) else ()
        return dataclasses.replace(self, values=values, scale=scale, axes=kept)

    def _all_axes(self) -> list[tuple[str, ...]]:
        return [self.axes_of(dim) for dim in range(self.ndim)]

    def spec(self, spec: PartitionSpec) -> Self:
        if self.order:
            return self.settled().spec(spec)
        parts = (*spec, *(None,) * (self.ndim - len(spec)))
        if len(parts) != self.ndim:
            raise EncodingError(f"{spec} names {len(spec)} dimensions, but the parameter has {self.ndim}: {self.shape}")
        scale = [None if self.scale.shape[dim] == 1 else part for dim, part in enumerate(parts)]
        return dataclasses.replace(self, values=PartitionSpec(*parts), scale=PartitionSpec(*scale))

    def manual(self, spec: PartitionSpec) -> Self:
        if self.order:
            return self.settled().manual(spec)
        parts = (*spec, *(None,) * (self.ndim - len(spec)))
        names = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in parts]
        return self._with(self.values, self.scale, names)

    def stacked(self, length: int) -> Self:
        if self.order:
            return self.settled().stacked(length)
        scale = self.scale
        if self._shared(0):
            scale = jnp.broadcast_to(scale, (length, *scale.shape[1:]))
        return dataclasses.replace(self, scale=scale)

    def astype(self, dtype: Any) -> Self | None:
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        new, old = jnp.dtype(dtype), jnp.dtype(self.logical_dtype)
        narrowest = self.through if self.through is not None else old
        widens = jnp.finfo(new).nmant > jnp.finfo(narrowest).nmant
        return dataclasses.replace(self, logical_dtype=new, through=narrowest if widens else None)

    def transpose(self, permutation: Sequence[int]) -> Self:
        order = tuple(self.order[dim] for dim in permutation) if self.order else tuple(permutation)
        return dataclasses.replace(self, order=() if order == tuple(range(self.ndim)) else order)

    def reshape(self, shape: Sequence[int]) -> Self | None:
        if self.order:
            return self.settled().reshape(shape)
        if 0 in self.shape:
            return None
        scale_before: list[int] = []
        scale_after = [0] * len(shape)
        axes: list[tuple[str, ...]] = [()] * len(shape)
        for before, after in reshape_groups(self.shape, shape):
            shared = [self._shared(dim) for dim in before]
            if all(shared) or all(self.values.shape[dim] == 1 for dim in before):
                scale_before += [1] * len(before)
                sizes = [1] * len(after)
            else:
                scale_before += [self.values.shape[dim] for dim in before]
                sizes = [shape[dim] for dim in after]
            split = tuple(dict.fromkeys(name for dim in before for name in self.axes_of(dim)))
            for dim, size in zip(after, sizes, strict=True):
                scale_after[dim] = size
                axes[dim] = split
        scale = jnp.broadcast_to(self.scale, scale_before)
        return self._with(jnp.reshape(self.values, shape), jnp.reshape(scale, scale_after), axes)

    def squeeze(self, dimensions: Sequence[int]) -> Self:
        if self.order:
            return self.settled().squeeze(dimensions)
        gone = {dim % self.ndim for dim in dimensions}
        axes = [names for dim, names in enumerate(self._all_axes()) if dim not in gone]
        dims = tuple(gone)
        return self._with(jnp.squeeze(self.values, dims), jnp.squeeze(self.scale, dims), axes)

    def slice(self, slices: Slices) -> Self:
        if self.order:
            return self.settled().slice(slices)
        scale = [(0, 1, 1) if self._shared(dim) else part for dim, part in enumerate(slices)]
        return self._with(
            jax.lax.slice(self.values, *zip(*slices, strict=True)),
            jax.lax.slice(self.scale, *zip(*scale, strict=True)),
            self._all_axes(),
        )

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> Self:
        if self.order:
            return self.settled().dynamic_slice(starts, sizes)
        scale_starts = [jnp.zeros_like(s) if self._shared(dim) else s for dim, s in enumerate(starts)]
        scale_sizes = [1 if self._shared(dim) else size for dim, size in enumerate(sizes)]
        return self._with(
            jax.lax.dynamic_slice(self.values, starts, sizes),
            jax.lax.dynamic_slice(self.scale, scale_starts, scale_sizes),
            self._all_axes(),
        )

    def concatenate(self, others: Sequence[Any], dimension: int) -> Self | None:
        first = self.settled()
        parts = [first]
        for other in others:
            if not isinstance(other, type(self)):
                return None
            part = other.settled()
            if (part.dtype, part.through, part.axes) != (first.dtype, first.through, first.axes):
                return None
            parts.append(part)
        full = [dim == dimension or any(not p._shared(dim) for p in parts) for dim in range(self.ndim)]
        scales = []
        for part in parts:
            shape = [size if keep else 1 for size, keep in zip(part.values.shape, full, strict=True)]
            scales.append(jnp.broadcast_to(part.scale, shape))
        values = jnp.concatenate([p.values for p in parts], dimension)
        return first._with(values, jnp.concatenate(scales, dimension), first._all_axes())

    def gather(self, indices: Any, attributes: dict[str, Any]) -> jax.Array | None:
        if self.order:
            return self.settled().gather(indices, attributes)
        numbers = attributes["dimension_numbers"]
        mode, fill = attributes["mode"], attributes.get("fill_value")
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
        if any(self._shared(dim) for dim in indexed) or (fills and fill is not None and fill == fill):
            return None
        options = {
            "dimension_numbers": numbers,
            "unique_indices": attributes["unique_indices"],
            "indices_are_sorted": attributes["indices_are_sorted"],
        }
        sizes = attributes["slice_sizes"]
        scale_sizes = [1 if self._shared(dim) else size for dim, size in enumerate(sizes)]
        value_mode = jax.lax.GatherScatterMode.CLIP if fills else mode
        values = jax.lax.gather(self.values, indices, slice_sizes=sizes, mode=value_mode, **options)
        # Out-of-range rows are NaN: int8 has no NaN, the scale has.
        scale = jax.lax.gather(self.scale, indices, slice_sizes=scale_sizes, mode=mode, fill_value=fill, **options)
        return dataclasses.replace(self, values=values, scale=scale, axes=()).decode()

    @abc.abstractmethod
    def _unpack(self, values: Any, scale: Any) -> jax.Array:
        """The dense array of values and scales that fit each other."""

    def decode(self) -> jax.Array:
        dense = self._unpack(self.values, self.scale)
        if self.through is not None:
            dense = dense.astype(self.through).astype(self.logical_dtype)
        return jnp.transpose(dense, self.order) if self.order else dense


@dataclasses.dataclass(frozen=True)
class QuantizedArray(ScaledArray):
    """Stored int8: `values` are integers, and gets no gradient."""

    format: ClassVar[str] = "int8"

    def _unpack(self, values: Any, scale: Any) -> jax.Array:
        return integers.from_integers(values, scale, self.logical_dtype)


@dataclasses.dataclass(frozen=True)
class SeenArray(ScaledArray):
    """A float master seen through int8 with scales that are computed already; how `SimulatedArray` runs."""

    format: ClassVar[str] = "simulated int8"

    @property
    def trainable(self) -> bool:
        return True

    def _unpack(self, values: Any, scale: Any) -> jax.Array:
        return arithmetic.fake_quantize(values, scale).astype(self.logical_dtype)


@dataclasses.dataclass(frozen=True)
class SimulatedArray(Encoded):
    """A float master that runs as int8 would; gradients reach it straight through.

    Attributes:
        master: the parameter, in the dtype that it is trained in.
        reduced: dimensions that share a scale, counted from the end.
    """

    format: ClassVar[str] = "simulated int8"
    master: Any
    reduced: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.master.shape)

    @property
    def dtype(self) -> Any:
        return self.master.dtype

    @property
    def trainable(self) -> bool:
        return True

    def prepared(self) -> SeenArray:
        scale = jax.lax.stop_gradient(integers.absmax_scale(self.master, self.reduced))
        return SeenArray(self.master, scale, jnp.dtype(self.master.dtype))

    def decode(self) -> jax.Array:
        return self.prepared().decode()

    def spec(self, spec: PartitionSpec) -> "SimulatedArray":
        if len(spec) > len(self.shape):
            raise EncodingError(f"{spec} names {len(spec)} dimensions, but the parameter has {len(self.shape)}")
        return dataclasses.replace(self, master=spec)

    def manual(self, spec: PartitionSpec) -> SeenArray:
        return self.prepared().manual(spec)

    def stacked(self, length: int) -> SeenArray:
        return self.prepared().stacked(length)


for _cls in (QuantizedArray, SeenArray):
    jax.tree_util.register_dataclass(
        _cls, data_fields=["values", "scale"], meta_fields=["logical_dtype", "axes", "order", "through"]
    )
jax.tree_util.register_dataclass(SimulatedArray, data_fields=["master"], meta_fields=["reduced"])


def quantize_array(x: Any, reduced: Sequence[int]) -> QuantizedArray:
    """A dense array as int8 with one scale for all elements along `reduced`; shapes give shapes."""
    dtype = jnp.dtype(x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
        scale = tuple(1 if dim in reduced else size for dim, size in enumerate(x.shape))
        return QuantizedArray(jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct(scale, jnp.float32), dtype)
    scale = integers.absmax_scale(x, reduced)
    return QuantizedArray(integers.to_integers(x, scale), scale, dtype)
