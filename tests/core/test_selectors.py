"""Selectors: what they match, and what their errors say."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from compax.errors import SelectorError
from compax.selectors import Selector, exactly, select


@dataclasses.dataclass(frozen=True)
class Site:
    name: str
    kind: str = "linear"


SITES = [
    Site("embed", "embedding"),
    Site("blocks.0.attn.qkv"),
    Site("blocks.0.attn", "attention"),
    Site("blocks.0.mlp.up"),
    Site("blocks.0.mlp.down"),
    Site("blocks.1.mlp.up"),
    Site("blocks.10.mlp.up"),
    Site("head"),
]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("**", [site.name for site in SITES]),
        ("head", ["head"]),
        ("*", ["embed", "head"]),
        ("blocks.*.mlp.up", ["blocks.0.mlp.up", "blocks.1.mlp.up", "blocks.10.mlp.up"]),
        ("blocks.1.**", ["blocks.1.mlp.up"]),
        ("blocks.1*.**", ["blocks.1.mlp.up", "blocks.10.mlp.up"]),
        ("blocks.0.attn", ["blocks.0.attn"]),
        ("blocks.0.attn.**", ["blocks.0.attn.qkv", "blocks.0.attn"]),
        ("**.up", ["blocks.0.mlp.up", "blocks.1.mlp.up", "blocks.10.mlp.up"]),
        ("blocks.**.qkv", ["blocks.0.attn.qkv"]),
        ("**:embedding", ["embed"]),
        ("blocks.0.**:linear, !**.down", ["blocks.0.attn.qkv", "blocks.0.mlp.up"]),
        ("**, !blocks.**, blocks.1.**", ["embed", "blocks.1.mlp.up", "head"]),
        ("**.*w*", ["blocks.0.mlp.down"]),
        ("head,embed", ["embed", "head"]),
    ],
)
def test_matches(selector: str, names: list[str]) -> None:
    assert [site.name for site in select(selector, SITES, what="site")] == names


def test_a_bare_name_is_not_what_lies_below_it() -> None:
    assert not Selector.parse("blocks").matches("blocks.0", "linear")
    assert not Selector.parse("blocks.*").matches("blocks.0.mlp", "linear")
    assert not Selector.parse("blocks.*").matches("blocks", "linear")


def test_dots_and_brackets_are_no_patterns() -> None:
    assert not Selector.parse("a.b").matches("axb", "linear")
    assert Selector.parse("a[0].*").matches("a[0].b", "linear")


@pytest.mark.parametrize(
    ("selector", "position", "says"),
    [
        ("", 0, "a term is missing"),
        ("a,,b", 2, "a term is missing"),
        ("a,", 2, "a term is missing"),
        ("!a", 0, "write '**,' before it"),
        ("a, !!b", 4, "between terms"),
        ("a,!", 3, "a name or a pattern is missing"),
        (":linear", 0, "a name or a pattern is missing"),
        ("a:", 2, "the kind of site"),
        ("a:b:c", 2, "the kind of site"),
        ("a..b", 2, "a component between two dots"),
        ("b.a.", 4, "a component between two dots"),
        ("blocks.**up", 7, "a component of its own"),
        ("a b", 1, "between terms"),
    ],
)
def test_malformed(selector: str, position: int, says: str) -> None:
    with pytest.raises(SelectorError, match="malformed selector") as caught:
        Selector.parse(selector)
    message, line, caret = str(caught.value).split("\n")
    assert says in message
    assert line == f"  {selector}"
    assert caret == " " * (position + 2) + "^"


def test_nothing_matched_names_the_closest() -> None:
    with pytest.raises(SelectorError, match=r"matches no linear; closest of 8: 'blocks\.1\.mlp\.up'") as caught:
        select("block.1.mlp.up", SITES, what="linear")
    assert "'head'" not in str(caught.value)


def test_nothing_matched_because_of_the_kind() -> None:
    with pytest.raises(SelectorError, match=r"of another kind: 'embed' \(embedding\)"):
        select("embed:linear", SITES, what="site")


def test_nothing_matched_because_all_is_left_out() -> None:
    with pytest.raises(SelectorError, match=r"leaves out all that it includes, such as 'head' \(linear\)"):
        select("head, !**", SITES, what="site")


def test_nothing_to_match() -> None:
    with pytest.raises(SelectorError, match="matches no convolution: the program has none"):
        select("**", [], what="convolution")


names = st.lists(st.text("abc01_#", min_size=1, max_size=4), min_size=1, max_size=4).map(".".join)


@hypothesis.given(st.lists(names, min_size=1, unique=True), st.data())
def test_exactly_selects_these_and_no_others(everything: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    selector = Selector.parse(exactly(chosen))
    assert {name for name in everything if selector.matches(name, "linear")} == set(chosen)


def test_exactly_with_characters_that_mean_something() -> None:
    assert Selector.parse(exactly(["a:b, !c"])).matches("a:b, !c", "linear")


@hypothesis.given(names)
def test_everything_and_itself(name: str) -> None:
    assert Selector.parse("**").matches(name, "linear")
    assert Selector.parse(name).matches(name, "linear")
    assert Selector.parse(f"{name}.**").matches(name, "linear")
    assert Selector.parse(f"**.{name}").matches(f"a.b.{name}", "linear")
