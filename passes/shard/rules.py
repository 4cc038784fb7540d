"""Rules of sharding: by axis, by selector of parameters, by regular expression on their paths.

    hidden->tensor                                  every axis of the kind `hidden` over the mesh axis `tensor`
    blocks.0.mlp.hidden->-                          this one over none
    blocks.**.mlp.up.kernel: -,fsdp,tensor          a selector; an entry for each dimension from the front
    re:.*/(up|gate)/kernel: -,tensor                a regular expression, searched for in the path; `.` or `/` between
                                                    its parts

An entry of a spec is `-` for a dimension that is not split, the name of a mesh axis, or several joined by `+`.
"""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from compax.errors import SelectorError, ShardingError
from compax.placement import axes_of, entries_of
from compax.selectors import select

REGEX = "re:"
ARROW = "->"
WHOLE = "-"


def check_axis(axis: str, axes: Mapping[str, int], where: str) -> None:
    """Raises `ShardingError` if a mesh has no such axis; the message names the closest one."""
    if axis not in axes:
        near = difflib.get_close_matches(axis, axes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ShardingError(f"{where} names the mesh axis '{axis}', the mesh has {', '.join(axes)}{hint}")


@dataclasses.dataclass(frozen=True)
class AxisRule:
    """An axis of the program over axes of the mesh.

    Attributes:
        text: as it was written.
        axis: a pattern of names of axes, or the last word of one.
        mesh_axes: what it is split over; nothing to leave it whole.
    """

    text: str
    axis: str
    mesh_axes: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, axes: Mapping[str, int]) -> "AxisRule":
        """Reads a rule.

        Raises:
            ShardingError: it is malformed, or names an axis that the mesh does not have.
        """
        axis, _, names = (part.strip() for part in text.partition(ARROW))
        if not axis or not names:
            raise ShardingError(
                f"'{text}' is not AXIS->MESH_AXIS, as in hidden->tensor, or hidden->- to leave it whole"
            )
        return cls(text, axis, _entry(names, axes, f"the rule '{text}'"))

    def matches(self, name: str) -> bool:
        """Whether an axis is meant: `hidden` is `blocks.0.mlp.hidden` as well."""
        plain = name.partition("#")[0]
        return fnmatch.fnmatchcase(name, self.axis) or self.axis in (plain, plain.rpartition(".")[2])


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """Parameters with the spec that they get.

    Attributes:
        text: as it was written.
        pattern: a selector of parameter paths, or a regular expression after `re:`.
        spec: one entry for each dimension: the mesh axes that it is split over.
    """

    text: str
    pattern: str
    spec: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str, axes: Mapping[str, int], field: str) -> "ParameterRule":
        """Reads a rule.

        Args:
            text: what is written.
            axes: of the mesh: sizes by name.
            field: where it is written, for messages.

        Raises:
            ShardingError: it is malformed, names an axis that the mesh does not have, or one twice.
        """
        pattern, colon, spec = text.rpartition(":")
        where = f"{field}: '{text}'"
        if not colon or not pattern.strip() or not spec.strip():
            raise ShardingError(f"{where} is not 'GLOB: SPEC', as in 'blocks.**.mlp.up.kernel: -,model'")
        entries = tuple(_entry(part.strip(), axes, where) for part in spec.split(","))
        used = [name for names in entries for name in names]
        if len(set(used)) < len(used):
            twice = next(name for name in used if used.count(name) > 1)
            raise ShardingError(f"{where} uses the mesh axis '{twice}' for two dimensions: an axis splits one of them")
        return cls(text, pattern.strip(), entries)

    def matched(self, paths: Iterable[str]) -> list[str]:
        """The paths that are meant.

        Raises:
            SelectorError: none is, or the regular expression is not one.
        """
        if not self.pattern.startswith(REGEX):
            return [path.name for path in select(self.pattern, map(ParameterPath, paths), what="parameter")]
        try:
            expression = re.compile(self.pattern.removeprefix(REGEX))
        except re.error as error:
            raise SelectorError(f"'{self.pattern}' is no regular expression: {error}") from error
        paths = list(paths)
        found = [path for path in paths if expression.search(path) or expression.search(path.replace(".", "/"))]
        if not found:
            raise SelectorError(f"'{self.pattern}' matches no parameter; there are: {', '.join(paths[:6])}, ...")
        return found


@dataclasses.dataclass(frozen=True)
class ParameterPath:
    """A parameter in the place of a site, so that selectors apply to it."""

    name: str
    kind: str = "parameter"


def _entry(text: str, axes: Mapping[str, int], where: str) -> tuple[str, ...]:
    names = () if text == WHOLE else tuple(name.strip() for name in text.split("+"))
    for name in names:
        check_axis(name, axes, where)
    return names


def parameter_specs(
    params: Mapping[str, Any],
    rules: Sequence[str],
    axes: Mapping[str, int],
    placed: Mapping[str, PartitionSpec] | None = None,
    field: str = "shard(rules=...)",
) -> dict[str, PartitionSpec]:
    """The spec of each parameter.

    Args:
        params: by path: arrays, shapes or encodings.
        rules: texts of `ParameterRule`; a later one overrides an earlier one.
        axes: of the mesh: sizes by name.
        placed: specs by path that were chosen before; rules override them.
        field: where the rules are written, for messages.

    Raises:
        ShardingError: a rule is malformed, matches nothing, has more entries than a parameter has dimensions, or
            splits a dimension that does not divide.
    """
    specs = dict.fromkeys(params, PartitionSpec())
    for path, spec in (placed or {}).items():
        for name in axes_of(spec):
            check_axis(name, axes, f"the program's placement of {path}")
        specs[path] = spec
    for rule in (ParameterRule.parse(text, axes, field) for text in rules):
        try:
            matched = rule.matched(params)
        except SelectorError as error:
            raise ShardingError(f"{field}: '{rule.text}': {error}") from error
        for path in matched:
            _check(f"{field}: '{rule.text}' on {path}", params[path].shape, rule, axes)
            specs[path] = spec_of(rule.spec)
    return specs


def _check(where: str, shape: Sequence[int], rule: ParameterRule, axes: Mapping[str, int]) -> None:
    where = f"{where} {list(shape)}"
    if len(rule.spec) > len(shape):
        raise ShardingError(f"{where}: {len(rule.spec)} entries for {len(shape)} dimension(s)")
    for dim, names in enumerate(rule.spec):
        parts = math.prod(axes[name] for name in names)
        if shape[dim] % parts:
            raise ShardingError(
                f"{where}: dimension {dim} is {shape[dim]}, which {'+'.join(names)} ({parts}) does not divide"
            )


def spec_of(entries: Iterable[Sequence[str]]) -> PartitionSpec:
    """A spec from the mesh axes of each dimension; nothing for trailing dimensions that are whole."""
    found = [entry(names) for names in entries]
    while found and found[-1] is None:
        found.pop()
    return PartitionSpec(*found)


def entry(names: Sequence[str]) -> Any:
    """The entry of a spec for a dimension that is split over some mesh axes."""
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def parse_spec(text: str) -> PartitionSpec:
    """Reads what `spec_text` writes."""
    return spec_of(() if part == WHOLE else part.split("+") for part in text.split(","))


def spec_text(spec: PartitionSpec) -> str:
    """A spec as `ParameterRule` reads it."""
    return ",".join("+".join(names) or WHOLE for names in entries_of(spec, len(spec))) or WHOLE
