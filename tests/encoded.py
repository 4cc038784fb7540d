"""Every kind of encoding that there is, one made here out of another, and functions of them lowered by themselves."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from compax import ir
from compax.encoding import Encoded
from compax.lowering import Decode, Evaluator
from compax.passes.quantize.encoding import QuantizedArray, SimulatedArray, quantize_array

SHAPE = (4, 6, 8)
Maker = Callable[..., Encoded]


@dataclasses.dataclass(frozen=True)
class Doubled(Encoded):
    """Twice what another encoding stands for: an encoding that holds an encoding."""

    format: ClassVar[str] = "doubled"
    inner: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    def _of(self, inner: Any) -> Any:
        if inner is None:
            return None
        return Doubled(inner) if isinstance(inner, Encoded) else 2 * inner

    def decode(self) -> jax.Array:
        return 2 * self.inner.decode()

    def prepared(self) -> Encoded:
        return Doubled(self.inner.prepared())

    def spec(self, spec: PartitionSpec) -> Encoded:
        return Doubled(self.inner.spec(spec))

    def manual(self, spec: PartitionSpec) -> Encoded:
        return Doubled(self.inner.manual(spec))

    def stacked(self, length: int) -> Encoded:
        return Doubled(self.inner.stacked(length))

    def astype(self, dtype: Any) -> Encoded | None:
        return self._of(self.inner.astype(dtype))

    def transpose(self, permutation: Sequence[int]) -> Encoded | None:
        return self._of(self.inner.transpose(permutation))

    def reshape(self, shape: Sequence[int]) -> Encoded | None:
        return self._of(self.inner.reshape(shape))

    def squeeze(self, dimensions: Sequence[int]) -> Encoded | None:
        return self._of(self.inner.squeeze(dimensions))

    def slice(self, slices: Any) -> Encoded | None:
        return self._of(self.inner.slice(slices))

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> Encoded | None:
        return self._of(self.inner.dynamic_slice(starts, sizes))

    def concatenate(self, others: Sequence[Any], dimension: int) -> Encoded | None:
        if not all(isinstance(x, Doubled) for x in others):
            return None
        return self._of(self.inner.concatenate([x.inner for x in others], dimension))

    def gather(self, indices: Any, attributes: dict[str, Any]) -> Any:
        return self._of(self.inner.gather(indices, attributes))


jax.tree_util.register_dataclass(Doubled, data_fields=["inner"], meta_fields=[])


def dense(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Normally distributed with magnitudes that grow, so that each scale is another."""
    values = np.random.default_rng(seed).normal(size=shape) * np.linspace(0.1, 3, math.prod(shape)).reshape(shape)
    return jnp.asarray(values, dtype)


def seen(x: jax.Array, reduced: tuple[int, ...]) -> Encoded:
    """A simulated encoding as a program runs with it."""
    return SimulatedArray(x, tuple(dim - x.ndim for dim in reduced)).prepared()


def doubled(x: jax.Array, reduced: tuple[int, ...]) -> Encoded:
    """An encoding in an encoding."""
    return Doubled(quantize_array(x, reduced))


MAKERS: dict[str, Callable[[jax.Array, tuple[int, ...]], Encoded]] = {
    "stored": quantize_array,
    "simulated": seen,
    "nested": doubled,
}
REDUCED: dict[str, tuple[int, ...]] = {
    "first": (0,),
    "middle": (1,),
    "last": (2,),
    "inside a stack": (1, 2),
    "across a stack": (0, 1),
    "all": (0, 1, 2),
    "none": (),
}
ENCODINGS: dict[str, Callable[[], Encoded]] = {
    f"{kind}, {dims}": (lambda make=make, reduced=reduced: make(dense(*SHAPE), reduced))
    for kind, make in MAKERS.items()
    for dims, reduced in REDUCED.items()
    if kind == "stored" or dims in ("middle", "across a stack")
}
every_encoding = pytest.mark.parametrize("make", ENCODINGS.values(), ids=ENCODINGS.keys())
"""Marks a test of the contract."""


def mesh() -> Mesh:
    """Eight devices in a cube."""
    return jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def decoded(x: Any) -> jax.Array:
    """An encoding or array as an array."""
    return x.decode() if isinstance(x, Encoded) else x


def assert_same_bits(left: Any, right: Any) -> None:
    """Equal shapes, dtypes and values, signs of zeros included."""
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    np.testing.assert_array_equal(np.asarray(left, np.float64), np.asarray(right, np.float64))
    np.testing.assert_array_equal(np.signbit(np.asarray(left, np.float64)), np.signbit(np.asarray(right, np.float64)))


def values(*shape: int, seed: int = 0) -> jax.Array:
    """Normally distributed: float32[shape]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """An array's or an encoding's type."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def lower(function: Callable[..., Any], *operands: Any, rebuild: bool = False) -> Callable[..., Any]:
    """A function of encodings and arrays, rebuilt from the graph of `function`."""
    graph = ir.trace(function, *map(shape_of, operands))

    def lowered(*given: Any) -> Any:
        evaluator = Evaluator(rebuild=rebuild)
        outputs = [evaluator.dense(x, "output") for x in evaluator.run(graph, given)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return lowered


def decodes(function: Callable[..., Any], *operands: Any, rebuild: bool = False) -> list[Decode]:
    """What lowering `function` on encodings unpacks."""
    graph = ir.trace(function, *map(shape_of, operands))
    evaluator = Evaluator(rebuild=rebuild)
    jax.eval_shape(lambda *given: [evaluator.dense(x, "output") for x in evaluator.run(graph, given)], *operands)
    return evaluator.decodes


def stored(*shape: int, reduced: tuple[int, ...] = (-2,), seed: int = 0) -> QuantizedArray:
    """A stored weight with a scale for all along `reduced`, counted from the end."""
    return quantize_array(values(*shape, seed=seed), [dim % len(shape) for dim in reduced])
