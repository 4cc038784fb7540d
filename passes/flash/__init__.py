"""Attention by fused kernels."""

from compax.passes.flash.flash import Flash
from compax.passes.flash.lower import OPERATION
from compax.passes.flash.spec import LSE_NAME, OUT_NAME

__all__ = ["LSE_NAME", "OPERATION", "OUT_NAME", "Flash"]
