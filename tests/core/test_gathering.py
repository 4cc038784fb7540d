"""Lines that are alike but for numbers in their names, gathered."""

import pytest

from compax.gathering import Line, gather, ranges


def names(*lines: Line | str) -> list[str]:
    return [group.name for group in gather([Line(line) if isinstance(line, str) else line for line in lines])]


def test_numbers_are_gathered_at_every_place() -> None:
    grid = [f"stages.{i}.blocks.{j}.w" for i in range(3) for j in range(4)]
    (group,) = gather([Line(name) for name in grid])
    assert group.name == "stages.{0..2}.blocks.{0..3}.w"
    assert group.members == tuple(range(12))


def test_what_differs_stays_apart() -> None:
    assert names("a.0.w", "a.1.v", "a.2.w", "b.0.w") == ["a.{0,2}.w", "a.1.v", "b.0.w"]
    assert names(Line("a.0", rest="x"), Line("a.1", rest="y"), Line("a.2", rest="x")) == ["a.{0,2}", "a.1"]
    assert names("a.0", "a.0#2", "a.1", "a.1#2") == ["a.{0,1}", "a.{0,1}#2"]


def test_numbers_of_linen_and_numbers_that_are_words() -> None:
    assert names("Dense_0", "Dense_1", "Conv_0") == ["Dense_{0,1}", "Conv_0"]
    assert names("a.00", "a.01") == ["a.00", "a.01"]


def test_paths_share_the_numbers_of_the_name() -> None:
    (group,) = gather([Line(f"h.{i}", (f"h.{i}.w", "shared.3")) for i in range(3)])
    assert group.paths == ("h.{0..2}.w", "shared.3")
    assert names(Line("h.0", ("h.0.w",)), Line("h.1", ("h.0.w",))) == ["h.0", "h.1"]


@pytest.mark.parametrize(("numbers", "text"), [([0], "0"), ([0, 1], "0,1"), ([0, 1, 2, 5], "0..2,5")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_nothing() -> None:
    assert gather([]) == []
