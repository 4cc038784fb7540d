"""The formats of llama2.c (Karpathy, 2023): small float32 Llamas in one file, and their vocabulary in another.

A model file, little-endian, is seven int32 (model size, hidden size, layers, heads, key-value heads, vocabulary,
context), then float32 tensors without names, each kind for all layers: embedding, attention norms, query, key, value
and output projections, feed-forward norms, gate, down, up, final norm, two tables of rotary angles that are not used,
and the head unless it is tied, which a positive vocabulary size says. Query and key rows are for interleaved rotary
embedding.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from compax.errors import ConfigError, WeightsError
from compax.models.decoder import DecoderConfig
from compax.models.llama_tensors import Weights, rows_to_half_split

BEGIN, END_OF_PIECE = 1, 2
_HEADER_BYTES = 7 * 4
# Ids 3 to 258 are single bytes, for text that has no piece.
_FIRST_BYTE = 3
_UNUSED = "rotary angles"
_AGAIN = "get the file again"
# The format says neither, and llama2.c has them in its code.
_NORM_EPSILON, _ROPE_THETA = 1e-5, 10_000.0


def open_llama2c(path: str | os.PathLike[str]) -> Weights:
    """Open a model file of llama2.c.

    Raises:
        WeightsError: The file is cut short, longer than its header says, or its header describes no model.
    """
    path = pathlib.Path(path)
    try:
        header = [int(value) for value in np.fromfile(path, "<i4", 7)]
        size_bytes = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if len(header) < 7:
        raise WeightsError(
            f"{path}: is {size_bytes} bytes long, its header alone has {_HEADER_BYTES}: cut short; {_AGAIN}"
        )
    dim, hidden, layers, heads, kv_heads, vocabulary, context = header
    try:
        config = DecoderConfig(
            vocab_size=abs(vocabulary),
            context_length=context,
            model_dim=dim,
            hidden_dim=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim // heads if heads > 0 else 0,
            norm_epsilon=_NORM_EPSILON,
            rope_theta=_ROPE_THETA,
            tied=vocabulary > 0,
        )
    except ConfigError as error:
        raise WeightsError(f"{path}: not a llama2.c model, or damaged: its header says {header}: {error}") from None

    places: dict[str, tuple[tuple[int, ...], int]] = {}
    at = _HEADER_BYTES
    for name, count, shape in _contents(config):
        one_bytes = 4 * math.prod(shape)
        if at + count * one_bytes > size_bytes:
            cut = name.format((size_bytes - at) // one_bytes)
            raise WeightsError(
                f"{path}: ends at byte {size_bytes}, in {cut!r}: cut short, or its header is damaged; {_AGAIN}"
            )
        places |= {name.format(i): (shape, at + i * one_bytes) for i in range(count)}
        at += count * one_bytes
    if at != size_bytes:
        raise WeightsError(f"{path}: goes on after its last tensor, from byte {at} to {size_bytes}: damaged; {_AGAIN}")
    del places[_UNUSED]

    def read(name: str) -> np.ndarray:
        shape, offset = places[name]
        tensor = np.fromfile(path, "<f4", math.prod(shape), offset=offset).reshape(shape)
        return (
            rows_to_half_split(tensor, config.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else tensor
        )

    return Weights(path, config, {name: shape for name, (shape, _) in places.items()}, read)


def _contents(config: DecoderConfig) -> list[tuple[str, int, tuple[int, ...]]]:
    """What a file holds, in order: the name (with `{}` for a layer's number), how many of it, and the shape of one."""
    dim, hidden, layers = config.model_dim, config.hidden_dim, config.num_layers
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    contents: list[tuple[str, int, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", 1, (config.vocab_size, dim)),
        ("model.layers.{}.input_layernorm.weight", layers, (dim,)),
        ("model.layers.{}.self_attn.q_proj.weight", layers, (query, dim)),
        ("model.layers.{}.self_attn.k_proj.weight", layers, (key, dim)),
        ("model.layers.{}.self_attn.v_proj.weight", layers, (key, dim)),
        ("model.layers.{}.self_attn.o_proj.weight", layers, (dim, query)),
        ("model.layers.{}.post_attention_layernorm.weight", layers, (dim,)),
        ("model.layers.{}.mlp.gate_proj.weight", layers, (hidden, dim)),
        ("model.layers.{}.mlp.down_proj.weight", layers, (dim, hidden)),
        ("model.layers.{}.mlp.up_proj.weight", layers, (hidden, dim)),
        ("model.norm.weight", 1, (dim,)),
        (_UNUSED, 1, (2, config.context_length, config.head_dim // 2)),
    ]
    return contents if config.tied else [*contents, ("lm_head.weight", 1, (config.vocab_size, dim))]


class Llama2cTokenizer:
    """Byte-pair encoding that merges greedily by score, as SentencePiece does, with single bytes for what has no piece.

    Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer", 2018, arXiv:1808.06226.

    Attributes:
        vocabulary: How many ids there are; ids are below it.
        begin: The id that begins a text, and that the model says after a story's end.
        end: The same id: where to stop.
    """

    def __init__(self, pieces: list[bytes], scores: list[float]):
        self._pieces = pieces
        self._scores = scores
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
        self.vocabulary = len(pieces)
        self.begin = BEGIN
        self.end = BEGIN

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[tokens]`, without the one that begins it; a space is put in front."""
        ids: list[int] = []
        for character in f" {text}" if text else "":
            piece = character.encode()
            ids.extend([self._ids[piece]] if piece in self._ids else (byte + _FIRST_BYTE for byte in piece))
        while True:
            merged = (
                (self._ids.get(self._pieces[a] + self._pieces[b]), i)
                for i, (a, b) in enumerate(itertools.pairwise(ids))
            )
            best = max(((self._scores[new], -i, new) for new, i in merged if new is not None), default=None)
            if best is None:
                return np.asarray(ids, np.int32)
            _, negative, new = best
            ids[-negative : 2 - negative] = [new]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the space that `encode` puts in front; broken UTF-8 is replaced."""
        raw = b"".join(self._bytes(int(i)) for i in ids)
        return raw.decode(errors="replace").removeprefix(" ")

    def _bytes(self, token: int) -> bytes:
        if token <= END_OF_PIECE:
            return b""
        return bytes([token - _FIRST_BYTE]) if token < _FIRST_BYTE + 256 else self._pieces[token]


def open_llama2c_tokenizer(path: str | os.PathLike[str], vocabulary: int) -> Llama2cTokenizer:
    """Open a vocabulary file of llama2.c: the longest length, then for each id a float32 score, a length and the bytes.

    Args:
        path: The file.
        vocabulary: How many ids the model has: the file itself does not say.

    Raises:
        WeightsError: The file is cut short, or longer than that many ids.
    """
    path = pathlib.Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    pieces, scores, at = [], [], 4
    for i in range(vocabulary):
        length = int.from_bytes(raw[at + 4 : at + 8], "little")
        if len(raw) < at + 8 + length:
            raise WeightsError(f"{path}: ends at id {i} of {vocabulary}: cut short, or another model's; {_AGAIN}")
        scores.append(float(np.frombuffer(raw, "<f4", 1, at)[0]))
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    if at != len(raw):
        raise WeightsError(f"{path}: goes on after {vocabulary} ids: the vocabulary of another model; {_AGAIN}")
    return Llama2cTokenizer(pieces, scores)
