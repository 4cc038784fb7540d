"""Hugging Face checkpoints of the Llama family: safetensors, in one file or sharded, with their config.json.

The format is read and written here, and not with the package `safetensors`, for two reasons: a model is written tensor
by tensor, never held twice in memory; and a damaged file is refused with the name of the tensor that suffers.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its dtype,
shape, and where its bytes begin and end), and the bytes.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax.errors import ConfigError, WeightsError
from compax.models.decoder import Decoder, DecoderConfig
from compax.models.llama_tensors import Weights, flat_parameters, is_stacked, tensor_names

CONFIG_NAME = "config.json"
FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_MODEL_TYPES = ("llama", "mistral", "qwen2")
_AGAIN = "get the file again"
# The package safetensors refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: its file, and the offset from that file's beginning, in bytes."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    def read(self) -> np.ndarray:
        flat = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset_bytes)
        return flat.reshape(self.shape)


def open_safetensors(path: str | os.PathLike[str], config: DecoderConfig | None = None) -> Weights:
    """Open a checkpoint in the format of Hugging Face.

    Args:
        path: A folder with `config.json` and `model.safetensors` (or `model.safetensors.index.json` and the files that
            it names), or one `.safetensors` file with `config.json` beside it.
        config: The decoder's config, instead of `config.json`.

    Raises:
        WeightsError: A file is missing, damaged or cut short, or describes a model that the decoder cannot be.
    """
    path = pathlib.Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / FILE_NAME).exists() and (path / INDEX_NAME).exists():
        tensors = _read_index(path / INDEX_NAME)
    else:
        tensors = _read_header(path / FILE_NAME if path.is_dir() else path)
    if config is None:
        config = _read_config(folder / CONFIG_NAME)
    return Weights(path, config, {n: t.shape for n, t in tensors.items()}, lambda name: tensors[name].read())


def _read_header(file: pathlib.Path) -> dict[str, _Tensor]:
    """Where the tensors of one file lie; that all of their bytes are there is checked."""
    try:
        size_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{file}: header of {header_bytes} bytes in a file of {size_bytes}: cut short, or no safetensors "
                    f"file; {_AGAIN}"
                )
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file}: its header is no JSON: damaged, or no safetensors file; {_AGAIN}") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: its header is no JSON object: damaged, or no safetensors file; {_AGAIN}")

    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        parsed = _parse_entry(entry)
        if parsed is None:
            raise WeightsError(f"{file}: tensor {name!r} has a malformed header entry: damaged; {_AGAIN}")
        dtype_name, shape, begin, end = parsed
        if dtype_name not in _DTYPES:
            raise WeightsError(
                f"{file}: tensor {name!r} is stored as {dtype_name}; what can be read is {', '.join(_DTYPES)}: "
                "use a checkpoint that is not quantized"
            )
        dtype = _DTYPES[dtype_name]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise WeightsError(
                f"{file}: tensor {name!r} {shape} {dtype_name} has {end - begin} bytes: damaged; {_AGAIN}"
            )
        if 8 + header_bytes + end > size_bytes:
            raise WeightsError(
                f"{file}: tensor {name!r} ends at byte {8 + header_bytes + end}, the file at {size_bytes}: cut short; "
                f"{_AGAIN}"
            )
        tensors[name] = _Tensor(file, dtype, shape, 8 + header_bytes + begin)
    return tensors


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """Dtype, shape and extent of a tensor as its file's header has them, or None if they are malformed."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        return None
    return dtype, shape, begin, end


def _read_index(index: pathlib.Path) -> dict[str, _Tensor]:
    """Where the tensors of a sharded checkpoint lie."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightsError(f"{index}: 'weight_map' (tensor name to file name) is missing or malformed; {_AGAIN}")
    shards = {}
    for file in sorted(set(weight_map.values())):
        if pathlib.PurePath(file).name != file:
            raise WeightsError(f"{index}: names {file!r}, which is not a file beside it: refused; {_AGAIN}")
        shards[file] = _read_header(index.parent / file)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise WeightsError(f"{index.parent / file}: no tensor {name!r}, which {index.name} says is there; {_AGAIN}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}): check the path") from None
    except ValueError:
        raise WeightsError(f"{file}: is no JSON: damaged; {_AGAIN}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: is no JSON object: damaged; {_AGAIN}")
    return content


def _read_config(file: pathlib.Path) -> DecoderConfig:
    if not file.exists():
        raise WeightsError(
            f"{file}: is missing: put the checkpoint's config.json there, or pass config=DecoderConfig(...)"
        )
    return config_from_hugging_face(_read_json(file), str(file))


def config_from_hugging_face(content: Mapping[str, Any], where: str) -> DecoderConfig:
    """The decoder that a Hugging Face config describes.

    Args:
        content: The parsed `config.json`.
        where: What to call it in messages.

    Raises:
        WeightsError: A field is missing, has a wrong type, or asks for what the decoder does not have.
    """
    # Newer configs keep the base of the rotary frequencies among the parameters of the rotary embedding.
    rotary = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rotary, Mapping) or rotary.get("rope_type", rotary.get("type", "default")) != "default":
        raise WeightsError(f"{where}: scaled rotary embeddings ({rotary}) are not supported: use another checkpoint")
    content = {**content, **{name: rotary[name] for name in ("rope_theta",) if name in rotary}}

    def get(name: str, kind: type, default: Any = None) -> Any:
        value = content.get(name)
        value = default if value is None else value
        # bool is an int in Python, and JSON writes 10000.0 as 10000 at times.
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is int and value < 1):
            expected = "a positive integer" if kind is int else kind.__name__
            raise WeightsError(f"{where}: {name!r} is {value!r}, expected {expected}: mend it, or {_AGAIN}")
        return value

    model_type = get("model_type", str)
    if model_type not in _MODEL_TYPES:
        raise WeightsError(f"{where}: model_type {model_type!r} is none of {', '.join(_MODEL_TYPES)}: not supported")
    context_length = get("max_position_embeddings", int)
    windowed = get("use_sliding_window", bool, model_type == "mistral")
    if windowed and get("sliding_window", int, context_length) < context_length:
        raise WeightsError(f"{where}: attention in a sliding window is not supported: use another checkpoint")
    activation = get("hidden_act", str, "silu")
    if activation not in _ACTIVATIONS:
        raise WeightsError(f"{where}: hidden_act {activation!r} is none of {', '.join(_ACTIVATIONS)}: not supported")

    model_dim, num_heads = get("hidden_size", int), get("num_attention_heads", int)
    attention_bias = get("attention_bias", bool, False)
    try:
        return DecoderConfig(
            vocab_size=get("vocab_size", int),
            context_length=context_length,
            model_dim=model_dim,
            hidden_dim=get("intermediate_size", int),
            num_layers=get("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=get("num_key_value_heads", int, num_heads),
            head_dim=get("head_dim", int, model_dim // num_heads),
            activation=_ACTIVATIONS[activation],
            norm_epsilon=get("rms_norm_eps", float, 1e-6),
            rope_theta=get("rope_theta", float, 10_000.0),
            tied=get("tie_word_embeddings", bool, False),
            qkv_bias=attention_bias or model_type == "qwen2",
            out_bias=attention_bias,
            mlp_bias=get("mlp_bias", bool, False),
        )
    except ConfigError as error:
        raise WeightsError(f"{where}: describes an impossible decoder: {error}") from None


def config_to_hugging_face(config: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The Hugging Face config of a decoder: `config_from_hugging_face` of it gives the same numbers back.

    Args:
        config: The decoder's.
        dtype: How the checkpoint's tensors are stored.

    Raises:
        WeightsError: No Llama, and no Qwen2, has these biases.
    """
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    qwen2 = biases == (True, False, False)
    if config.qkv_bias != config.out_bias and not qwen2:
        raise WeightsError(
            f"a decoder with qkv_bias={config.qkv_bias}, out_bias={config.out_bias}, mlp_bias={config.mlp_bias} is "
            "neither a Llama nor a Qwen2: save the program with compax.save instead"
        )
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen2 else "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.model_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activations[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": dtype,
    }


def save_safetensors(
    model: Decoder | Mapping[str, Any], directory: str | os.PathLike[str], config: DecoderConfig | None = None
) -> None:
    """Write a decoder as a Hugging Face checkpoint: `model.safetensors` and `config.json`.

    Tensors keep the dtype of their parameters. Both files are written under temporary names and renamed when they are
    complete: whatever goes wrong, a checkpoint that was there before stays as it was.

    Args:
        model: A decoder, or its parameters by dotted path (`program.decode().params`).
        directory: Where to; made if need be.
        config: The decoder's config, where only parameters are given.

    Raises:
        WeightsError: The decoder is no Llama, parameters are missing or abstract, or the folder cannot be written.
    """
    if isinstance(model, Decoder):
        config, params = model.config, flat_parameters(model)
    elif config is None:
        raise WeightsError("parameters alone do not say which decoder they are of: pass config=")
    else:
        params = dict(model)
    names = tensor_names(config)
    if params.keys() != names.keys():
        different = sorted(params.keys() ^ names.keys())[0]
        raise WeightsError(
            f"parameter {different!r} is {'not one of' if different in params else 'missing for'} this decoder: pass "
            "the decoder's own parameters, decoded"
        )
    tensors: dict[str, tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]] = {}
    for path, array in params.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise WeightsError(
                f"parameter {path!r} is {type(array).__name__}, not an array: decode the program, or load it"
            )
        stacked, transposed = is_stacked(config, path), path.endswith(".kernel")
        shape = array.shape[1:] if stacked else array.shape
        for i, name in enumerate(names[path]):
            read = _slice(array, i if stacked else None, transposed)
            tensors[name] = (np.dtype(array.dtype), shape[::-1] if transposed else shape, read)
    dtype = params["embed.embedding"].dtype.name
    content = json.dumps(config_to_hugging_face(config, dtype), indent=2) + "\n"

    directory = pathlib.Path(directory)
    partial = {file: directory / f".{file}.{os.getpid()}.partial" for file in (FILE_NAME, CONFIG_NAME)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            write_safetensors(partial[FILE_NAME], tensors)
            partial[CONFIG_NAME].write_text(content, encoding="utf-8")
            for file, temporary in partial.items():
                temporary.replace(directory / file)
        finally:
            for temporary in partial.values():
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(
            f"{directory}: cannot be written ({error.strerror}): what was there is unchanged; choose another folder"
        ) from None


def _slice(array: Any, index: int | None, transposed: bool) -> Callable[[], np.ndarray]:
    """Reads one tensor of a parameter, when called."""

    def read() -> np.ndarray:
        tensor = np.asarray(array if index is None else array[index])
        return tensor.T if transposed else tensor

    return read


def write_safetensors(
    file: pathlib.Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]
) -> None:
    """Write tensors one by one: name to (dtype, shape, function that gives the values).

    Raises:
        WeightsError: A dtype that the format cannot hold.
        OSError: The file cannot be written.
    """
    dtype_names = {dtype: name for name, dtype in _DTYPES.items()}
    # Wide dtypes first, so that every tensor is aligned to its item size; the header is padded for the first.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        if dtype not in dtype_names:
            raise WeightsError(
                f"tensor {name!r} is {dtype}; a checkpoint holds {', '.join(map(str, dtype_names))}: cast it"
            )
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name in order:
            np.ascontiguousarray(tensors[name][2]()).tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
