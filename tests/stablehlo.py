"""StableHLO text in a canonical form, so that two programs can be compared names and locations aside.

What is removed or renamed: source locations, the module's name, the names of private functions (JAX calls them after
Python functions and numbers them as it meets them), their order, and labels of arguments and results. All else is
compared as it stands: operations, their order, types, attributes, constants, and which calls share a function.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

_SYMBOL = re.compile(r'@(?:"[^"]*"|[\w.$-]+)')
_MODULE = re.compile(r"^module @\S+")
_FUNCTION = re.compile(r"^  func\.func (?:public |private )?(@(?:\"[^\"]*\"|[\w.$-]+))")
_LOCATION = re.compile(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)|^#loc.*$", re.MULTILINE)
_LABELS = re.compile(r'\s*jax\.(?:result_info|arg_info|name) = "[^"]*",?')
_EMPTY_ATTRIBUTES = re.compile(r"\s*\{\s*\}(?=[,)\s])")


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    """StableHLO of `jax.jit(function)` at some arguments, as JAX prints it."""
    return jax.jit(function).lower(*arguments).as_text()


def functions(text: str) -> dict[str, list[str]]:
    """Lines of each function of a module, by symbol, in the order in which they are printed."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            lines = found.setdefault(match[1], [])
        if lines is not None:
            lines.append(line)
        if line == "  }":
            lines = None
    return found


def normalize(text: str) -> str:
    """The module with `@main` first, private functions renamed and printed in the order of their first call.

    Functions that nothing calls are left out.
    """
    text = _EMPTY_ATTRIBUTES.sub("", _LABELS.sub("", _LOCATION.sub("", text)))
    bodies = functions(text)
    names = {"@main": "@main"}
    order = ["@main"]
    for symbol in order:  # grows while it is walked
        for other in _SYMBOL.findall("\n".join(bodies[symbol])):
            if other in bodies and other not in names:
                names[other] = f"@f{len(names)}"
                order.append(other)
    header = [_MODULE.sub("module", line) for line in text.splitlines() if line.startswith(("module", "  sdy.mesh"))]
    body = [
        _SYMBOL.sub(lambda match: names.get(match[0], match[0]), line) for symbol in order for line in bodies[symbol]
    ]
    return "\n".join(header + body)
