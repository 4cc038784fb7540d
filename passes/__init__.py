"""The passes. Importing this registers them; each line below is one pass."""

from compax.passes.cast import Cast
from compax.passes.flash import Flash
from compax.passes.freeze import Freeze
from compax.passes.offload import Offload
from compax.passes.quantize import Quantize
from compax.passes.remat import Remat
from compax.passes.shard import Shard
from compax.passes.tile_loss import TileLoss

__all__ = ["Cast", "Flash", "Freeze", "Offload", "Quantize", "Remat", "Shard", "TileLoss"]
