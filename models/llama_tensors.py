"""Weights of the Llama family under the names that Hugging Face gave them, and the decoders they belong to.

Every format is read into one form, `Weights`: a lazy mapping from names like `model.layers.0.mlp.up_proj.weight` to
arrays. Matrices are `[outputs, inputs]`, and the rows of query and key projections are in the half-split order of
`decoder.rotate`. `tensor_names` ties these names to the decoder's parameters.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from compax.errors import ConfigError, WeightsError
from compax.models.decoder import Decoder, DecoderConfig

# What a checkpoint may hold beside parameters: rotary frequencies, which follow from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
# Fields that say how a decoder computes, and not which numbers it holds: they may differ from the file's.
_FREE_FIELDS = ("context_length", "dropout", "scan", "remat", "param_dtype", "dtype")


class Weights(Mapping[str, np.ndarray]):
    """An opened weight file: a mapping from name to array that reads a tensor whenever it is asked for one.

    `dict(weights)` reads everything. To fill another model than ours, go through the names one by one.

    Attributes:
        path: Where it was found; for messages.
        config: The decoder that it fits.
        shapes: The shape of every tensor, known without reading any.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: DecoderConfig,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self.path = path
        self.config = config
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return f"Weights({str(self.path)!r}, {len(self)} tensors)"


def tensor_names(config: DecoderConfig) -> dict[str, list[str]]:
    """The names of the tensors that each parameter of a decoder is made of: one, or one for each layer if stacked.

    Keys are dotted paths (`blocks.0.mlp.up.kernel`). A parameter called `kernel` is the transpose of its tensor.

    Raises:
        WeightsError: Llama checkpoints have no names for such a decoder (plain feed-forward network, LayerNorm).
    """
    if not config.gated or config.norm != "rmsnorm":
        raise WeightsError(
            f"a decoder with gated={config.gated} and norm={config.norm!r} has no place in a Llama checkpoint, "
            "which is gated and has RMSNorm: save the program with compax.save instead"
        )
    layer = {"attn_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight"}
    for ours, theirs, bias in (
        ("attn.query", "self_attn.q_proj", config.qkv_bias),
        ("attn.key", "self_attn.k_proj", config.qkv_bias),
        ("attn.value", "self_attn.v_proj", config.qkv_bias),
        ("attn.out", "self_attn.o_proj", config.out_bias),
        ("mlp.gate", "mlp.gate_proj", config.mlp_bias),
        ("mlp.up", "mlp.up_proj", config.mlp_bias),
        ("mlp.down", "mlp.down_proj", config.mlp_bias),
    ):
        layer[f"{ours}.kernel"] = f"{theirs}.weight"
        if bias:
            layer[f"{ours}.bias"] = f"{theirs}.bias"

    names = {"embed.embedding": ["model.embed_tokens.weight"], "norm.scale": ["model.norm.weight"]}
    if not config.tied:
        names["head.kernel"] = ["lm_head.weight"]
    for ours, theirs in layer.items():
        each = [f"model.layers.{i}.{theirs}" for i in range(config.num_layers)]
        if config.scan:
            names[f"blocks.{ours}"] = each
        else:
            names.update({f"blocks.{i}.{ours}": [name] for i, name in enumerate(each)})
    return names


def is_stacked(config: DecoderConfig, path: str) -> bool:
    """Whether the parameter at a dotted path holds all layers, in front."""
    return config.scan and path.startswith("blocks.")


def flat_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters of a module by dotted path (arrays, or `ShapeDtypeStruct`s of an abstract one)."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def build_decoder(weights: Weights, **changes: Any) -> Decoder:
    """A decoder with the numbers of a weight file.

    All names and shapes are checked before anything is read. Then one parameter is read at a time: the memory needed is
    that of the model and of its largest parameter.

    Args:
        weights: An opened file.
        changes: Fields of the config to choose: `scan`, `remat`, `dropout`, `dtype`, `param_dtype`, `context_length`.

    Raises:
        WeightsError: A tensor is missing, is not one of the model's, has another shape, or holds NaN or infinity.
        ConfigError: A field that the file decides, or an impossible value.
    """
    for field in changes:
        if field not in _FREE_FIELDS:
            raise ConfigError(f"{field!r} is decided by {weights.path}; to choose are {', '.join(_FREE_FIELDS)}")
    config = dataclasses.replace(weights.config, **changes)
    # A damaged header may call for millions of layers: look before building them.
    _check_last_layer(weights, config)
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param, ...)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(params)}
    names = tensor_names(config)

    wanted: dict[str, tuple[int, ...]] = {}
    for dotted, (_, variable) in flat.items():
        shape: tuple[int, ...] = variable.shape[1:] if is_stacked(config, dotted) else variable.shape
        wanted |= {name: shape[::-1] if dotted.endswith(".kernel") else shape for name in names[dotted]}
    _check(weights, wanted)

    filled = []
    for dotted, (path, variable) in flat.items():
        parts = (_tensor(weights, name, dotted, config.param_dtype) for name in names[dotted])
        if is_stacked(config, dotted):
            array = np.empty(variable.shape, config.param_dtype)
            for target, part in zip(array, parts, strict=True):
                target[...] = part
        else:
            (array,) = parts
        # Waited for, so that the copy on the host is gone before the next one is read.
        filled.append((path, variable.replace(jax.block_until_ready(jax.device_put(array)))))
        del array
    if jax.tree.leaves(rest):
        # Random state of dropout: compiled, so that no parameter is drawn only to be thrown away.
        rest = jax.jit(lambda: nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param, ...)[2])()
    return nnx.merge(graph, nnx.from_flat_state(filled), rest)


def _tensor(weights: Weights, name: str, parameter: str, dtype: str) -> np.ndarray:
    """One tensor as a decoder's parameter has it: transposed if that is a kernel, and in its dtype."""
    tensor = weights[name]
    if not np.isfinite(tensor).all():
        raise WeightsError(f"{weights.path}: tensor {name!r} holds NaN or infinity: damaged, get the file again")
    return np.ascontiguousarray(tensor.T if parameter.endswith(".kernel") else tensor, dtype)


def _check_last_layer(weights: Weights, config: DecoderConfig) -> None:
    prefix = f"model.layers.{config.num_layers - 1}."
    if not any(name.startswith(prefix) for name in weights.shapes):
        raise WeightsError(
            f"{weights.path}: no tensor '{prefix}*' in a model of {config.num_layers} layers: the file is incomplete, "
            "or its config is another model's; get both again from one place"
        )


def _check(weights: Weights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a file has with what the model wants, before anything is read."""
    missing = [name for name in wanted if name not in weights.shapes]
    if missing:
        raise WeightsError(
            f"{weights.path}: no tensor {_some(missing)}: the file is incomplete, or its config is another model's; "
            "get both again from one place"
        )
    for name, shape in wanted.items():
        if weights.shapes[name] != shape:
            raise WeightsError(
                f"{weights.path}: tensor {name!r} has shape {weights.shapes[name]} where the config makes it {shape}: "
                "file and config do not belong together; get both again from one place"
            )
    extra = [name for name in weights.shapes if name not in wanted and not name.endswith(_DERIVED_SUFFIX)]
    if extra == ["lm_head.weight"] and np.array_equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        return  # A tied head that was written out all the same.
    if extra:
        raise WeightsError(
            f"{weights.path}: tensor {_some(extra)} has no place in a decoder of this config: without it the model "
            "would compute something else; use a plain Llama checkpoint, or mend the config"
        )


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} (and {len(names) - 1} more)"


def rows_to_half_split(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, `[heads * K, D]`, from interleaved to half-split rotary embedding.

    Interleaved, features 2i and 2i + 1 of a head turn together; half-split, features i and i + K/2.
    """
    heads = matrix.reshape(-1, head_dim // 2, 2, *matrix.shape[1:])
    return np.swapaxes(heads, 1, 2).reshape(matrix.shape)
