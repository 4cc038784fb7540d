"""The pass `shard`: a program over a mesh, by the meaning of its axes."""

from compax.passes.shard.shard import Shard

__all__ = ["Shard"]
