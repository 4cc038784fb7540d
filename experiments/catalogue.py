"""The catalogue of passes: `compax passes`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from compax import text
from compax.errors import PipelineError
from compax.experiments.config import closest
from compax.experiments.console import Console
from compax.transform import Pass, default, field_types, registered


def show(console: Console) -> None:
    """Prints every registered pass with its options and what it does."""
    rows = [
        (name, pass_type.phase, ", ".join(_options(pass_type)), _summary(pass_type))
        for name, pass_type in registered().items()
    ]
    console.table("passes", ("name", "phase", "options and defaults", "what it does"), rows)
    console.say("compax passes NAME explains one; every pass also takes at=SELECTOR and strict=false")


def explain(name: str, console: Console) -> None:
    """Prints all there is to know about one pass.

    Raises:
        PipelineError: There is no such pass.
    """
    known = registered()
    if name not in known:
        raise PipelineError(f"no pass '{name}'{closest(name, known)}")
    pass_type = known[name]
    console.say(f"{name}: {inspect.getdoc(pass_type) or ''}")
    console.say("")
    types = field_types(pass_type)
    rows = [
        (field.name, _type(types[field.name]), _default(pass_type, field)) for field in dataclasses.fields(pass_type)
    ]
    console.table("options", ("option", "type", "default"), rows)
    facts = {
        "phase": pass_type.phase,
        "contract": str(pass_type.contract),
        "requires": ", ".join(pass_type.requires),
        "conflicts with": ", ".join(pass_type.conflicts),
        "comes after": ", ".join(pass_type.after),
        "paper": pass_type.paper,
        "example": pass_type.example,
    }
    for key, value in facts.items():
        if value:
            console.say(f"{key}: {value}")


def _summary(pass_type: type[Pass]) -> str:
    return (inspect.getdoc(pass_type) or "").split("\n", 1)[0]


def _options(pass_type: type[Pass]) -> list[str]:
    common = {field.name for field in dataclasses.fields(Pass)}
    return [
        f"{field.name}={_default(pass_type, field)}"
        for field in dataclasses.fields(pass_type)
        if field.name not in common
    ]


def _default(pass_type: type[Pass], field: dataclasses.Field[Any]) -> str:
    value = default(field)
    return "(required)" if value is dataclasses.MISSING else text.write(value, field_types(pass_type)[field.name])


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
