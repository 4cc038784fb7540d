"""Training text: found, split by file, tokenized once, packed, and fed in an order that a seed decides.

1. `documents` finds files: the library source of the running CPython, or globs.
2. `split` keeps whole files apart for evaluation.
3. `prepare` trains or loads the tokenizer and writes the tokens of both parts as memory-mapped files, all cached under
   a hash of the text and the settings.
4. `Batches` cuts the tokens into sequences and feeds shuffled batches through Grain. Its state is a small dict that
   goes into checkpoints; with it, another process goes on with the same batches.
"""

from __future__ import annotations

import bisect
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import shutil
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from compax.errors import DataError
from compax.experiments import tokenizer as tokenizers
from compax.experiments.config import Config
from compax.experiments.tokenizer import Tokenizer

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Changes when the files under a cache key would hold something else.
_CACHE_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of text, under a name that does not depend on the machine."""

    name: str
    text: str

    @property
    def nbytes(self) -> int:
        """Length of its UTF-8, in bytes."""
        return len(self.text.encode())


def documents(data: Config) -> list[Document]:
    """Reads the corpus that the config's section `data` names, sorted by name.

    Raises:
        DataError: Nothing is found, or a file cannot be read as text.
    """
    found = _cpython() if data.corpus == "cpython" else _globs(data.files)
    if data.max_bytes:
        found = _spread(found, data.max_bytes)
    return found


def _cpython() -> list[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = pathlib.Path(folder, file)
                found.append(Document(path.relative_to(root).as_posix(), _read(path, source=True)))
    if not found:
        raise DataError(
            f"no Python source under {root}: this Python came without it; "
            "train on other text with --config.data.corpus=files --config.data.files=GLOB"
        )
    return sorted(found, key=lambda document: document.name)


def _globs(patterns: Sequence[str]) -> list[Document]:
    found: dict[str, pathlib.Path] = {}
    for pattern in patterns:
        paths = [pathlib.Path(path) for path in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            reason = "only folders match: end it with /**/*" if paths else "nothing matches"
            raise DataError(f"data.files: no file for '{pattern}' in {os.getcwd()}: {reason}")
        found |= {path.as_posix(): path for path in files}
    return [Document(name, _read(found[name])) for name in sorted(found)]


def _read(path: pathlib.Path, *, source: bool = False) -> str:
    """Reads a file as UTF-8; Python source may declare another encoding."""
    try:
        if source:
            with tokenize.open(path) as file:
                return file.read()
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): leave it out of data.files or convert it") from None


def _rank(document: Document) -> bytes:
    """Orders documents like a shuffle that only their names decide."""
    return hashlib.sha256(document.name.encode()).digest()


def _spread(found: list[Document], max_bytes: int) -> list[Document]:
    kept, total = [], 0
    for document in sorted(found, key=_rank):
        if kept and total + document.nbytes > max_bytes:
            continue
        kept.append(document)
        total += document.nbytes
    return sorted(kept, key=lambda document: document.name)


def split(found: Sequence[Document], eval_fraction: float) -> tuple[list[Document], list[Document]]:
    """Keeps text for evaluation: whole files that together are at most that fraction, chosen by a hash of their names.

    Where no file is small enough (one big file), the tail of the last one is cut off at a line.

    Returns:
        Training and evaluation documents, each sorted by name.
    """
    budget = eval_fraction * sum(document.nbytes for document in found)
    held: list[Document] = []
    for document in sorted(found, key=_rank):
        if 0 < document.nbytes <= budget:
            held.append(document)
            budget -= document.nbytes
    if held:
        names = {document.name for document in held}
        return [d for d in found if d.name not in names], sorted(held, key=lambda document: document.name)
    *others, last = found
    cut = last.text.rfind("\n", 0, max(len(last.text) - int(eval_fraction * len(last.text)), 0)) + 1
    return [*others, Document(last.name, last.text[:cut])], [Document(last.name, last.text[cut:])]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One part of the corpus as token ids, documents one after the other, each closed by the end-of-text token.

    Attributes:
        ids: uint16 or uint32 [tokens], memory-mapped.
        names: The documents.
        starts: Where each document starts in `ids`.
    """

    ids: np.ndarray
    names: tuple[str, ...]
    starts: tuple[int, ...]

    def files(self, start: int, stop: int) -> list[str]:
        """Names the documents that the tokens from `start` to `stop` come from."""
        first = bisect.bisect_right(self.starts, start) - 1
        last = bisect.bisect_left(self.starts, stop)
        return list(self.names[first:last])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What training needs of the text.

    Attributes:
        train: The tokens to train on.
        eval: The tokens kept for evaluation.
        tokenizer: What made them.
        nbytes: Bytes of text in both.
        identity: A hash of the text and the tokenizer.
    """

    train: Tokens
    eval: Tokens
    tokenizer: Tokenizer
    nbytes: int
    identity: str


def prepare(config: Config, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """Returns the tokenized corpus of a config, from the cache if it was made before.

    Args:
        config: The experiment's config; its sections `data` and `tokenizer` matter.
        report: Takes a line to print about each piece of work that takes a while.

    Raises:
        DataError: No text, unreadable text, a bad tokenizer file, or a cache folder that cannot be written.
    """
    found = documents(config.data)
    train, held = split(found, config.data.eval_fraction)
    cache = cache_folder(config.data.cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(config.tokenizer, train, cache, report)
        key = _key("tokens", tokenizer.identity, _digest(train), _digest(held))
        parts = _cached_tokens(cache / f"tokens-{key}", tokenizer, {"train": train, "eval": held}, report)
    except OSError as error:
        raise DataError(
            f"cannot use the cache folder {cache}: {error.strerror or error}; "
            "choose another with --config.data.cache=FOLDER"
        ) from None
    return Corpus(parts["train"], parts["eval"], tokenizer, sum(document.nbytes for document in found), key)


def cache_folder(configured: str) -> pathlib.Path:
    """Returns where tokenizers and tokens are kept: as configured, or under the user's cache folder."""
    if configured:
        return pathlib.Path(configured).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compax"


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, *parts]).encode()).hexdigest()[:20]


def _digest(found: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode())
        digest.update(document.text.encode())
    return digest.hexdigest()


def _tokenizer(
    config: Config, train: Sequence[Document], cache: pathlib.Path, report: Callable[[str], None]
) -> Tokenizer:
    if config.file:
        return tokenizers.load(pathlib.Path(config.file).expanduser())
    path = cache / f"tokenizer-{_key('byte-level BPE', config.vocabulary, _digest(train))}.json"
    if path.is_file():
        return tokenizers.load(path)
    report(f"training a byte-level BPE tokenizer of {config.vocabulary} tokens on {len(train)} files")
    tokenizer = tokenizers.train((document.text for document in train), config.vocabulary)
    tokenizer.save(path)
    return tokenizer


def _cached_tokens(
    folder: pathlib.Path, tokenizer: Tokenizer, parts: dict[str, list[Document]], report: Callable[[str], None]
) -> dict[str, Tokens]:
    if folder.is_dir():
        try:
            return {part: _open(folder, part) for part in parts}
        except (OSError, ValueError, KeyError):
            # A damaged cache is made again.
            shutil.rmtree(folder, ignore_errors=True)
    report(f"tokenizing {sum(len(part) for part in parts.values())} files")
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        for part, found in parts.items():
            _write(partial, part, tokenizer, found)
        try:
            partial.rename(folder)
        except OSError:
            # Another process made the same folder in the meantime.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {part: _open(folder, part) for part in parts}


def _write(folder: pathlib.Path, part: str, tokenizer: Tokenizer, found: Sequence[Document]) -> None:
    end = [] if tokenizer.end is None else [tokenizer.end]
    pieces = [np.append(ids, end) for ids in tokenizer.encode_all([document.text for document in found])]
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]
    dtype = np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32
    np.save(folder / f"{part}.npy", np.concatenate(pieces).astype(dtype) if pieces else np.zeros(0, dtype))
    index = {"names": [document.name for document in found], "starts": starts.tolist()}
    (folder / f"{part}.json").write_text(json.dumps(index), encoding="utf-8")


def _open(folder: pathlib.Path, part: str) -> Tokens:
    index = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    ids = np.load(folder / f"{part}.npy", mmap_mode="r")
    return Tokens(ids, tuple(index["names"]), tuple(index["starts"]))


class Sequences:
    """The tokens cut into sequences, as a random-access source for Grain.

    Sequence `i` is `{"tokens": int32[sequence_length + 1], "sequence": i}`: the model reads all tokens but the last and
    predicts all but the first. Neighbours share one token, so that each token but the very first is predicted once.
    """

    def __init__(self, tokens: Tokens, sequence_length: int):
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(len(self.tokens.ids) - 1, 0) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = int(index) * self.sequence_length
        ids = self.tokens.ids[start : start + self.sequence_length + 1]
        return {"tokens": np.asarray(ids, np.int32), "sequence": np.int32(index)}

    def __repr__(self) -> str:
        return f"Sequences({len(self)} x {self.sequence_length} tokens)"

    def describe(self, indices: Iterable[int]) -> str:
        """Names sequences and the files that they come from, in a few words for a message."""
        names: dict[str, None] = {}
        indices = [int(index) for index in indices]
        for index in indices:
            start = index * self.sequence_length
            names |= dict.fromkeys(self.tokens.files(start, start + self.sequence_length))
        files = ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")
        shown = ", ".join(str(index) for index in indices[:8]) + (", ..." if len(indices) > 8 else "")
        return f"sequences {shown} (from {files})"


class Batches:
    """Endless shuffled batches: `{"tokens": int32[rows, sequence_length + 1], "sequence": int32[batch]}`.

    The order is decided by the seed alone and differs from epoch to epoch. `state` says where the iterator stands;
    setting it on another `Batches` over the same source makes that one go on from there, whatever rows it reads.

    Args:
        source: The sequences.
        batch_size: How many make a batch.
        seed: Of the order.
        rows: Which rows of each batch are read, in this order; by default all. `sequence` names those of all rows.
    """

    def __init__(self, source: Sequences, batch_size: int, seed: int, rows: Sequence[int] | None = None):
        import grain

        if len(source) < batch_size:
            raise DataError(
                f"the training text is too small: {len(source.tokens.ids)} tokens make {len(source)} sequences of "
                f"{source.sequence_length}, one batch takes {batch_size}; use more text, a smaller data.batch_size or "
                "data.sequence_length"
            )
        chosen = range(batch_size) if rows is None else rows

        def read(indices: np.ndarray) -> dict[str, np.ndarray]:
            tokens = np.stack([source[indices[row]]["tokens"] for row in chosen])
            return {"tokens": tokens, "sequence": indices.astype(np.int32)}

        # Indices are shuffled, not sequences: a row that is not asked for is not read.
        order = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat()
        dataset = order.batch(batch_size, drop_remainder=True).map(read)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    @property
    def state(self) -> dict[str, Any]:
        """Where the iterator stands: a small dict that JSON can hold."""
        return dict(self._iterator.get_state())

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        self._iterator.set_state(value)


def evaluation_batches(source: Sequences, batch_size: int, limit: int) -> list[np.ndarray]:
    """Returns the batches of an evaluation, always the same: int32[batch, sequence_length + 1] each.

    Args:
        source: The evaluation part.
        batch_size: Sequences in a batch; a last, smaller batch is left out.
        limit: Batches at most, spread evenly over the text. 0: all.

    Raises:
        DataError: The evaluation text does not fill one batch.
    """
    count = len(source) // batch_size
    if not count:
        raise DataError(
            f"the evaluation text is too small: {len(source)} sequences of {source.sequence_length} tokens, one batch "
            f"takes {batch_size}; use more text, a larger data.eval_fraction or a smaller data.batch_size"
        )
    chosen = (
        range(count)
        if not limit or limit >= count
        else [round(k * (count - 1) / max(limit - 1, 1)) for k in range(limit)]
    )
    return [np.stack([source[batch * batch_size + row]["tokens"] for row in range(batch_size)]) for batch in chosen]
