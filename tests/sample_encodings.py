"""Encodings for tests of what handles encodings without knowing them: integers, four bits, and an adapter over any."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from compax.encoding import Encoded


class Fixed(Encoded):
    """An encoding that is only held, decoded and placed: no test slices or shards it inside a program."""

    def spec(self, spec: PartitionSpec) -> Encoded:
        return jax.tree.map(lambda _: PartitionSpec(), self)

    def manual(self, spec: PartitionSpec) -> Encoded:
        return self

    def stacked(self, length: int) -> Encoded:
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Integers(Fixed):
    """Stored integers with one scale."""

    codes: Any
    scale: Any
    format = "integers"

    @classmethod
    def of(cls, x: jax.Array) -> "Integers":
        scale = jnp.max(jnp.abs(x)) / 127
        return cls(jnp.round(x / scale).astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def decode(self) -> jax.Array:
        return self.codes.astype(self.scale.dtype) * self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(Fixed):
    """Four bits, with a scale in eight bits for each row."""

    codes: Any
    scale: Any
    group: int = dataclasses.field(metadata={"static": True})
    format = "packed"

    @classmethod
    def random(cls, shape: tuple[int, int], group: int = 8) -> "Packed":
        generator = np.random.default_rng(1)
        codes = jnp.asarray(generator.integers(-7, 8, shape)).astype(jnp.int4)
        return cls(codes, jnp.asarray(generator.uniform(size=shape[0])).astype(jnp.float8_e4m3fn), group)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    def spec(self, spec: PartitionSpec) -> "Packed":
        return Packed(spec, PartitionSpec(spec[0]), self.group)

    def decode(self) -> jax.Array:
        return self.codes.astype(jnp.float32) * self.scale.astype(jnp.float32)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Fixed):
    """A trainable product of two factors over any other encoding."""

    base: Any
    factors: tuple[Any, Any]
    format = "adapted"

    @classmethod
    def over(cls, base: Encoded, rank: int = 2) -> "Adapted":
        rows, columns = base.shape
        return cls(base, (jnp.ones((rows, rank), base.dtype), jnp.zeros((rank, columns), base.dtype)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def trainable(self) -> bool:
        return True

    def decode(self) -> jax.Array:
        return self.base.decode() + self.factors[0] @ self.factors[1]
