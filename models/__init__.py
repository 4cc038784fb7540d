"""Models as ordinary Flax NNX modules, one self-contained file each, and the weight files that fill them."""

from compax.models.decoder import SIZES, Decoder, DecoderConfig, KVCache, example_inputs, loss

__all__ = ["SIZES", "Decoder", "DecoderConfig", "KVCache", "example_inputs", "loss"]
