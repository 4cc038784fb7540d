"""Rematerialization: what the backward pass computes again instead of keeping it."""

from compax.passes.remat.remat import Remat

__all__ = ["Remat"]
