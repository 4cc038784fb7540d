"""Models as ordinary Flax NNX modules, one self-contained file each, and the weight files that fill them."""

from compax.models.decoder import SIZES, Decoder, DecoderConfig, KVCache, example_inputs, loss
from compax.models.llama2c import Llama2cTokenizer, open_llama2c_tokenizer
from compax.models.llama_tensors import Weights, build_decoder
from compax.models.safetensors_io import save_safetensors
from compax.models.weights import load_decoder, load_tokenizer, open_weights, smollm2_path

__all__ = [
    "SIZES",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Llama2cTokenizer",
    "Weights",
    "build_decoder",
    "example_inputs",
    "load_decoder",
    "load_tokenizer",
    "loss",
    "open_llama2c_tokenizer",
    "open_weights",
    "save_safetensors",
    "smollm2_path",
]
