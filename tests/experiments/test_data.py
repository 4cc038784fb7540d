"""The corpus, the tokenizer, and batches that a seed and a state decide."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from compax.errors import DataError
from compax.experiments import config as configs
from compax.experiments import data
from compax.experiments import tokenizer as tokenizers
from compax.experiments.data import Batches, Document, Sequences, Tokens


@pytest.fixture
def sequences() -> Sequences:
    ids = np.arange(0, 100, dtype=np.uint16)
    return Sequences(Tokens(ids, ("a.txt", "b.txt"), (0, 50)), 5)


def test_standard_library_is_found_without_tests():
    section = configs.default().data
    section.max_bytes = 200_000
    found = data.documents(section)
    names = [document.name for document in found]
    assert names == sorted(names)
    assert all(name.endswith(".py") and "test/" not in name and "site-packages" not in name for name in names)
    assert 100_000 < sum(document.nbytes for document in found) <= 200_000


def test_globs(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "folder" / "a.txt").write_text("é")
    section = configs.default().data
    section.corpus, section.files = "files", (f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt")
    assert [document.text for document in data.documents(section)] == ["b", "é"]


@pytest.mark.parametrize(
    ("name", "contents", "pattern", "message"),
    [
        ("a.txt", b"a", "*.md", "nothing matches"),
        ("folder/a.txt", b"a", "folder", "only folders match"),
        ("a.txt", b"\xff\xfe", "*.txt", "a.txt is not UTF-8"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name, contents, pattern, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(contents)
    section = configs.default().data
    section.corpus, section.files = "files", (f"{tmp_path}/{pattern}",)
    with pytest.raises(DataError, match=message):
        data.documents(section)


def test_split_keeps_whole_files_whatever_else_there_is():
    found = [Document(f"{number}.txt", "x" * 100) for number in range(40)]
    train, held = data.split(found, 0.1)
    assert len(held) == 4
    assert {d.name for d in train}.isdisjoint(d.name for d in held)
    # Another file does not move those that are there from one part to the other at random.
    again = data.split([*found, Document("new.txt", "x" * 100)], 0.1)[1]
    assert len({d.name for d in held} & {d.name for d in again}) >= 3


def test_split_cuts_a_single_file_at_a_line():
    text = "".join(f"line {number}\n" for number in range(100))
    (train,), (held,) = data.split([Document("all.txt", text)], 0.1)
    assert train.text + held.text == text
    assert train.text.endswith("\n")
    assert 0.08 < len(held.text) / len(text) < 0.12


def test_tokenizer_and_tokens_are_cached_and_equal(config: ConfigDict):
    told: list[str] = []
    first = data.prepare(config, told.append)
    assert len(told) == 2
    second = data.prepare(config, told.append)
    assert len(told) == 2
    assert first.identity == second.identity
    assert np.array_equal(first.train.ids, second.train.ids)
    config.tokenizer.vocabulary = 261
    assert data.prepare(config, told.append).identity != first.identity
    assert len(told) == 4
    assert not list(Path(config.data.cache).glob("*.partial"))


def test_damaged_token_cache_is_made_again(config: ConfigDict):
    first = data.prepare(config)
    (path,) = Path(config.data.cache).glob("tokens-*/train.npy")
    expected = np.array(first.train.ids)
    path.write_bytes(path.read_bytes()[:40])
    assert np.array_equal(data.prepare(config).train.ids, expected)


def test_tokenizer_round_trip_and_errors(tmp_path: Path):
    words = tokenizers.train(["def f(x):\n    return x  # é\n" * 3], 260)
    text = "def g(é):\n\treturn 1\n"
    assert words.decode(words.encode(text)) == text
    words.save(tmp_path / "tokenizer.json")
    again = tokenizers.load(tmp_path / "tokenizer.json")
    assert again.identity == words.identity
    assert again.end == words.end == 0
    with pytest.raises(DataError, match="cannot read"):
        tokenizers.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is not a tokenizer"):
        tokenizers.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"vocabulary of .* tokens only"):
        tokenizers.train(["aa"], 5000)


def test_sequences_predict_each_token_once(sequences: Sequences):
    assert len(sequences) == 19
    targets = np.concatenate([sequences[index]["tokens"][1:] for index in range(len(sequences))])
    assert np.array_equal(targets, np.arange(1, 96))
    assert sequences.describe([9, 12]) == "sequences 9, 12 (from a.txt, b.txt)"
    assert sequences.describe([9]) == "sequences 9 (from a.txt)"


def test_batches_are_decided_by_the_seed_and_visit_all(sequences: Sequences):
    first, second, other = (Batches(sequences, 4, seed) for seed in (0, 0, 1))
    orders = [[next(batches)["sequence"].tolist() for _ in range(9)] for batches in (first, second, other)]
    assert orders[0] == orders[1] != orders[2]
    flat = [index for batch in orders[0] for index in batch]
    assert sorted(flat[:19]) == list(range(19))
    assert flat[:17] != flat[19:36]


def test_batches_go_on_from_a_state(sequences: Sequences):
    batches = Batches(sequences, 4, 0)
    for _ in range(7):
        next(batches)
    state = batches.state
    expected = [next(batches)["sequence"].tolist() for _ in range(4)]
    again = Batches(sequences, 4, 0)
    again.state = state
    assert [next(again)["sequence"].tolist() for _ in range(4)] == expected


def test_batches_of_some_rows_are_parts_of_the_whole_ones(sequences: Sequences):
    whole, part = Batches(sequences, 4, seed=1), Batches(sequences, 4, seed=1, rows=[3, 0])
    next(whole), next(part)
    moved = Batches(sequences, 4, seed=1, rows=[1])
    moved.state = whole.state
    for _ in range(12):
        expected, found = next(whole), next(part)
        np.testing.assert_array_equal(found["tokens"], expected["tokens"][[3, 0]])
        np.testing.assert_array_equal(found["sequence"], expected["sequence"])
        np.testing.assert_array_equal(next(moved)["tokens"], expected["tokens"][[1]])


def test_too_little_text(sequences: Sequences):
    with pytest.raises(DataError, match="one batch takes 20"):
        Batches(sequences, 20, 0)
    with pytest.raises(DataError, match="evaluation text is too small"):
        data.evaluation_batches(sequences, 20, 0)


def test_evaluation_batches_are_spread(sequences: Sequences):
    everything = data.evaluation_batches(sequences, 3, 0)
    assert len(everything) == 6
    few = data.evaluation_batches(sequences, 3, 2)
    assert np.array_equal(few[0], everything[0])
    assert np.array_equal(few[1], everything[-1])
