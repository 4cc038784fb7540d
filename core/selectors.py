"""Selectors: which sites a pass works on.

A selector is a list of terms with commas between them, `[!]glob[:kind]`, read from left to right:

1. `*` stands for any characters inside one dotted component, `**` for any number of components, also none;
   `blocks.0` is that site alone, `blocks.0.**` that and everything below it, `**` everything.
2. `:linear` restricts a term to sites of one kind.
3. `!` leaves out what earlier terms included; a later term may include it again.

So `blocks.*.mlp.**:linear, !blocks.0.**` is every linear site of every feed-forward but those of the first block.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn, Protocol, TypeVar

from compax.errors import SelectorError
from compax.text import point

_SPECIAL = re.compile(r"[*,:!\s]+")


class Named(Protocol):
    """Anything with a name and a kind that can be selected."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a selector.

    Attributes:
        glob: the pattern of names.
        kind: the kind of site, or any.
        exclude: whether it leaves out what it matches.
        pattern: the glob as a regular expression over the name with a dot appended.
    """

    glob: str
    kind: str | None
    exclude: bool
    pattern: re.Pattern[str] = dataclasses.field(compare=False, repr=False)

    def matches(self, name: str, kind: str) -> bool:
        """Whether a site is one of those that the term is about."""
        return (self.kind is None or self.kind == kind) and self.pattern.fullmatch(name + ".") is not None


@dataclasses.dataclass(frozen=True)
class Selector:
    """A parsed selector.

    Attributes:
        text: as it was written.
        terms: its terms in order.
    """

    text: str = dataclasses.field(compare=False)
    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> "Selector":
        """Reads a selector.

        Raises:
            SelectorError: it is malformed; the message points at the character.
        """
        terms: list[Term] = []
        start = 0
        for part in text.split(","):
            terms.append(_parse_term(text, part, start, first=not terms))
            start += len(part) + 1
        return cls(text, tuple(terms))

    def matches(self, name: str, kind: str) -> bool:
        """Whether a site with this name and kind is selected."""
        last = next((term for term in reversed(self.terms) if term.matches(name, kind)), None)
        return last is not None and not last.exclude


def _parse_term(text: str, part: str, start: int, *, first: bool) -> Term:
    def fail(message: str, offset: int) -> NoReturn:
        raise SelectorError(point(text, start + offset, f"malformed selector: {message}"))

    begin = len(part) - len(part.lstrip())
    body = part.strip()
    if not body:
        fail("a term is missing", begin if first and start == 0 else 0)
    exclude = body.startswith("!")
    if exclude and first:
        fail("'!' leaves out what earlier terms included, and there is none: write '**,' before it", begin)
    begin += exclude
    glob, colon, kind = body[exclude:].partition(":")
    if colon and not re.fullmatch(r"\w+", kind):
        fail("':' is followed by the kind of site, as in '**:linear'", begin + len(glob) + 1)
    if misplaced := re.search(r"[!\s]", glob):
        fail("'!' and spaces stand between terms, never inside one", begin + misplaced.start())
    if not glob:
        fail("a name or a pattern is missing; '**' matches everything", begin)
    pattern = ""
    offset = begin
    for component in glob.split("."):
        if not component:
            fail("a component between two dots is missing", offset)
        if component == "**":
            pattern += r"(?:[^.]+\.)*"
        elif "**" in component:
            fail("'**' is a component of its own, as in 'blocks.**.up'", offset + component.index("**"))
        else:
            pattern += "[^.]*".join(map(re.escape, component.split("*"))) + r"\."
        offset += len(component) + 1
    return Term(glob, kind or None, exclude, re.compile(pattern))


def select(selector: str, sites: Iterable[AnyNamed], *, what: str) -> list[AnyNamed]:
    """Those of `sites` that a selector selects, in their order.

    Args:
        selector: the text of a selector.
        sites: what there is to select from.
        what: what they are, for the message: "linear or convolution", "parameter".

    Raises:
        SelectorError: the selector is malformed, or nothing matches; the message names the closest sites.
    """
    parsed = Selector.parse(selector)
    offered = list(sites)
    chosen = [site for site in offered if parsed.matches(site.name, site.kind)]
    if not chosen:
        raise SelectorError(explain(parsed, offered, what=what))
    return chosen


def explain(selector: Selector, sites: Sequence[Named], *, what: str, limit: int = 5) -> str:
    """Why a selector selects none of `sites`, with the names that come closest."""
    message = f"the selector '{selector.text}' matches no {what}"
    if not sites:
        return f"{message}: the program has none"
    wanted = [term for term in selector.terms if not term.exclude]
    named = [s for s in sites if any(term.pattern.fullmatch(f"{s.name}.") for term in wanted)]
    excluded = [s for s in named if any(term.matches(s.name, s.kind) for term in wanted)]
    if excluded:
        return f"{message}: it leaves out all that it includes, such as {_list(excluded[:limit])}"
    if named:
        return f"{message}: sites of that name are of another kind: {_list(named[:limit])}"
    return f"{message}; closest of {len(sites)}: {_list(_closest(wanted, sites, limit))}"


def _closest(terms: Sequence[Term], sites: Sequence[Named], limit: int) -> list[Named]:
    def likeness(site: Named) -> float:
        return max(difflib.SequenceMatcher(None, term.glob, site.name).ratio() for term in terms)

    return sorted(sites, key=likeness, reverse=True)[:limit]


def _list(sites: Sequence[Named]) -> str:
    return ", ".join(f"'{site.name}' ({site.kind})" for site in sites)


def exactly(names: Iterable[str]) -> str:
    """A selector of the sites with these names; `*` stands for characters to which selectors give a meaning."""
    return ",".join(_SPECIAL.sub("*", name) for name in dict.fromkeys(names))
