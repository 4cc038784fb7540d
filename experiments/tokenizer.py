"""Tokenizers: a byte-level BPE trained on the corpus, or one loaded from a tokenizer.json.

Byte-pair encoding: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
arXiv 1508.07909; on bytes as in GPT-2 (Radford et al., 2019), so that every text has an encoding. The work is done by
the library `tokenizers`.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compax.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_OTHER_ENDS = ("</s>", "<|end_of_text|>", "<eos>", "[SEP]")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocabulary: How many ids there are; ids are below it.
        end: The id that ends a document, or None if the vocabulary has none.
        identity: A hash of everything that decides the ids.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        # Special tokens that a post-processor adds belong to one use (a chat, a classifier), not to packed text.
        self._inner = inner
        self._inner.no_padding()
        self._inner.no_truncation()
        known = (inner.token_to_id(token) for token in (END_OF_TEXT, *_OTHER_ENDS))
        self.end: int | None = next((token for token in known if token is not None), None)
        self.vocabulary: int = inner.get_vocab_size(with_added_tokens=True)
        self.identity: str = hashlib.sha256(inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32[tokens]; nothing is added to it."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32[tokens]; texts are encoded on all cores."""
        return [
            np.asarray(encoded.ids, np.int32)
            for encoded in self._inner.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; special tokens are left out, broken UTF-8 is replaced."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json, whole or not at all."""
        path = pathlib.Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(self._inner.to_str(pretty=False), encoding="utf-8")
        partial.replace(path)


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: Documents.
        vocabulary: Tokens at most: 256 bytes, the end of text, and merges.

    Raises:
        DataError: The texts are too few or too alike for that many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    found = inner.get_vocab_size()
    if found < vocabulary:
        raise DataError(
            f"the corpus gives a vocabulary of {found} tokens only, {vocabulary} were asked for: "
            f"use more text, or --config.tokenizer.vocabulary={found}"
        )
    return Tokenizer(inner)


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer.json.

    Raises:
        DataError: The file is missing or is no tokenizer.json.
    """
    import tokenizers

    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from None
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # noqa: BLE001 - the library raises `Exception` itself for whatever is wrong
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None
