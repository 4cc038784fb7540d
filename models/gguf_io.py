"""GGUF files of the Llama kind: weights and the tokenizer that is embedded in them.

The container is read here, in one pass with every length checked (the reader of the package `gguf` takes seconds for a
vocabulary, and goes on past the end of a truncated file); the arithmetic of quantized tensors is that package's own.

A GGUF file (versions 2 and 3, little-endian) is a magic number, a version, how many tensors and fields there are, the
fields (name, type, value), where each tensor lies (name, dimensions with the fastest first, type, offset), and the
tensors, aligned. The rows of query and key projections are permuted for interleaved rotary embedding.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compax.errors import ConfigError, WeightsError
from compax.models.decoder import DecoderConfig
from compax.models.llama_tensors import Weights, rows_to_half_split

if TYPE_CHECKING:
    import tokenizers

_AGAIN = "get the file again"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 28: np.dtype(np.float64)}
_CONTROL_TOKEN, _USER_TOKEN = 3, 4

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies. `kind` is the number of its GGML type, `shape` has the slowest dimension first."""

    shape: tuple[int, ...]
    kind: int
    offset_bytes: int
    size_bytes: int


@dataclasses.dataclass(frozen=True)
class _File:
    """The parsed head of a GGUF file."""

    path: pathlib.Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, _Tensor]

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """A field's value, checked to be of a type; `default` where the file has none."""
        value = self.fields.get(name, default)
        if type(value) is not kind:
            found = "is missing" if value is None else f"is {value!r:.40}"
            raise WeightsError(f"{self.path}: field {name!r} {found}, expected {kind.__name__}: damaged; {_AGAIN}")
        return value


class _Cursor:
    """Reads values one after the other from a buffer and refuses to go beyond its end."""

    def __init__(self, path: pathlib.Path, buffer: mmap.mmap):
        self.path = path
        self.buffer = buffer
        self.at = 0
        self.what = "the header"

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.buffer) - self.at:
            raise WeightsError(f"{self.path}: ends in the middle of {self.what}: cut short or damaged; {_AGAIN}")
        self.at += num_bytes
        return self.buffer[self.at - num_bytes : self.at]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(f"<{code}") * count))

    def number(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise WeightsError(f"{self.path}: {self.what} is no valid text: damaged; {_AGAIN}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _SCALARS:
                return list(self.scalars(_SCALARS[item], count))
            if item == _STRING:
                return [self.string() for _ in range(count)]
            kind = item
        raise WeightsError(f"{self.path}: {self.what} has the unknown type {kind}: damaged; {_AGAIN}")


def _read_head(path: pathlib.Path) -> _File:
    """Parse everything but the tensors' values, and check that those are all there."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _parse_head(_Cursor(path, buffer))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: is empty; {_AGAIN}") from None


def _parse_head(cursor: _Cursor) -> _File:
    sizes = _block_sizes()
    path = cursor.path
    if cursor.take(4) != _MAGIC:
        raise WeightsError(f"{path}: does not begin with 'GGUF': not a GGUF file; check the path")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise WeightsError(
            f"{path}: GGUF version {version}, known are {_VERSIONS}: convert it with a current llama.cpp"
        )
    num_tensors, num_fields = cursor.scalars("Q", 2)
    fields: dict[str, Any] = {}
    for i in range(num_fields):
        cursor.what = f"the name of field {i}"
        name = cursor.string()
        cursor.what = f"field {name!r}"
        fields[name] = cursor.value(cursor.number("I"))
    found = []
    for i in range(num_tensors):
        cursor.what = f"the name of tensor {i}"
        name = cursor.string()
        cursor.what = f"the entry of tensor {name!r}"
        shape = cursor.scalars("Q", cursor.number("I"))[::-1]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in sizes:
            raise WeightsError(
                f"{path}: tensor {name!r} has the unknown type {kind}: damaged, or update the package gguf"
            )
        found.append((name, shape, kind, offset))

    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise WeightsError(f"{path}: field 'general.alignment' is {alignment!r}: damaged; {_AGAIN}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        block, block_bytes = sizes[kind]
        if not shape or shape[-1] % block:
            raise WeightsError(f"{path}: tensor {name!r} has shape {shape}, no multiple of {block}: damaged; {_AGAIN}")
        tensor = _Tensor(shape, kind, start + offset, math.prod(shape) // block * block_bytes)
        end = tensor.offset_bytes + tensor.size_bytes
        if end > len(cursor.buffer):
            raise WeightsError(
                f"{path}: tensor {name!r} ends at byte {end}, the file at {len(cursor.buffer)}: cut short; {_AGAIN}"
            )
        tensors[name] = tensor
    return _File(path, fields, tensors)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise WeightsError(
            "GGUF files are read with the package gguf, which is not installed: pip install gguf"
        ) from None
    return gguf


def _block_sizes() -> dict[int, tuple[int, int]]:
    """For each GGML type: how many values a block holds, and its bytes."""
    return {int(kind): size for kind, size in _gguf().GGML_QUANT_SIZES.items()}


def _dequantized(file: _File, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    raw = np.fromfile(file.path, np.uint8, tensor.size_bytes, offset=tensor.offset_bytes)
    if tensor.kind in _FLOATS:
        return raw.view(_FLOATS[tensor.kind]).astype(np.float32).reshape(tensor.shape)
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(tensor.kind)
    try:
        return gguf.quants.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind).reshape(tensor.shape)
    except NotImplementedError:
        raise WeightsError(
            f"{file.path}: tensor {name!r} is stored as {kind.name}, which the package gguf cannot decode: use another "
            "file"
        ) from None


def open_gguf(path: str | os.PathLike[str]) -> Weights:
    """Open a GGUF file of the llama architecture. Tensors are decoded to float32 when they are read.

    Raises:
        WeightsError: The file is damaged, cut short, or of another architecture; or the package gguf is not installed.
    """
    file = _read_head(pathlib.Path(path))
    config = _config(file)
    theirs: dict[str, str] = {}
    for name in file.tensors:
        theirs[_name(name)] = name

    def read(name: str) -> np.ndarray:
        tensor = _dequantized(file, theirs[name])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return rows_to_half_split(tensor, config.head_dim)
        return tensor

    return Weights(file.path, config, {name: file.tensors[other].shape for name, other in theirs.items()}, read)


def _name(name: str) -> str:
    """The Llama name of a GGUF tensor. An unknown one stays as it is, to be refused with all that have no place."""
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and part in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}"
    return _TOP_NAMES.get(name, name)


def _config(file: _File) -> DecoderConfig:
    architecture = file.field("general.architecture", str)
    if architecture != "llama":
        raise WeightsError(
            f"{file.path}: architecture {architecture!r} is not supported, only 'llama': use another file"
        )
    scaling = file.field("llama.rope.scaling.type", str, "none")
    if scaling != "none" or file.field("llama.expert_count", int, 0):
        raise WeightsError(f"{file.path}: scaled rotary embeddings and experts are not supported: use another file")
    model_dim = file.field("llama.embedding_length", int)
    num_heads = file.field("llama.attention.head_count", int)
    try:
        head_dim = file.field("llama.attention.key_length", int, model_dim // max(num_heads, 1))
        if file.field("llama.rope.dimension_count", int, head_dim) != head_dim:
            raise WeightsError(f"{file.path}: rotates a part of each head only: not supported; use another file")
        return DecoderConfig(
            vocab_size=file.field("llama.vocab_size", int, len(file.field("tokenizer.ggml.tokens", list, []))),
            context_length=file.field("llama.context_length", int),
            model_dim=model_dim,
            hidden_dim=file.field("llama.feed_forward_length", int),
            num_layers=file.field("llama.block_count", int),
            num_heads=num_heads,
            num_kv_heads=file.field("llama.attention.head_count_kv", int, num_heads),
            head_dim=head_dim,
            norm_epsilon=_shortest(file.field("llama.attention.layer_norm_rms_epsilon", float)),
            rope_theta=_shortest(file.field("llama.rope.freq_base", float, 10_000.0)),
            tied="output.weight" not in file.tensors,
        )
    except ConfigError as error:
        raise WeightsError(f"{file.path}: describes an impossible decoder: {error}") from None


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to a float32: 1e-05 where its exact value is 9.99999974738e-06."""
    return float(str(np.float32(value)))


def gguf_tokenizer(path: str | os.PathLike[str]) -> "tokenizers.Tokenizer":
    """The byte-level BPE tokenizer embedded in a GGUF file, ready to use.

    It gives the ids that the model was trained on: text is cut as the field `tokenizer.ggml.pre` says, control tokens
    are special, and nothing is added at the beginning or the end.

    Raises:
        WeightsError: The file is damaged, or its tokenizer is of another kind.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    file = _read_head(pathlib.Path(path))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutters = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    model, cutter = file.field("tokenizer.ggml.model", str), file.field("tokenizer.ggml.pre", str, "gpt-2")
    if model != "gpt2" or cutter not in cutters:
        raise WeightsError(
            f"{file.path}: tokenizer {model!r} with cuts {cutter!r} is not supported, only 'gpt2' with "
            f"{', '.join(cutters)}: load a tokenizer.json instead"
        )
    tokens, kinds, pairs = (file.field(f"tokenizer.ggml.{name}", list) for name in ("tokens", "token_type", "merges"))
    merges = [tuple(str(pair).split(" ", 1)) for pair in pairs]
    vocabulary = {str(token): i for i, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise WeightsError(f"{file.path}: the lists of tokens, their types and merges do not fit: damaged; {_AGAIN}")
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # noqa: BLE001 - the library raises `Exception` itself for whatever is wrong
        raise WeightsError(f"{file.path}: its tokenizer is malformed ({error}): damaged; {_AGAIN}") from None
    tokenizer.pre_tokenizer = cutters[cutter]
    tokenizer.decoder = decoders.ByteLevel()
    added = {
        kind: [
            tokenizers.AddedToken(token, special=kind == _CONTROL_TOKEN, normalized=False)
            for token, its_kind in zip(vocabulary, kinds, strict=True)
            if its_kind == kind
        ]
        for kind in (_CONTROL_TOKEN, _USER_TOKEN)
    }
    tokenizer.add_special_tokens(added[_CONTROL_TOKEN])
    tokenizer.add_tokens(added[_USER_TOKEN])
    return tokenizer
