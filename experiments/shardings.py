"""Which array of a train step has which sharding: the one place that decides it.

Rules are texts `GLOB: SPEC`. A glob is a selector of parameter paths (`compax.selectors`); a spec has one entry for
each dimension from the front, `-` for a dimension that is not split, the name of a mesh axis, or several joined by `+`:

    "blocks.**.mlp.up.kernel: -,fsdp,model"        # scanned layers in front; D over fsdp, F over model
    "embed.embedding: data+model,-"

A later rule overrides an earlier one; what no rule names is on every device whole. Gradients follow their
parameter, and so does the optimizer's state, unless `sharding.optimizer` has rules for it (Rajbhandari et al.,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2019, arXiv 1910.02054). Encoded parameters are
split leaf by leaf (`Encoded.spec`), and the batch is split over the axes of `sharding.batch`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compax.encoding import Encoded, leaf_nbytes
from compax.errors import EncodingError, SelectorError, ShardingError
from compax.placement import DEVICE
from compax.selectors import select
from compax.tpu.topology import check_axis


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule, parsed.

    Attributes:
        text: as it was written.
        glob: a selector of parameter paths.
        spec: one entry for each dimension: the mesh axes that it is split over.
    """

    text: str
    glob: str
    spec: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str, axes: Mapping[str, int], field: str) -> Rule:
        """Reads a rule.

        Raises:
            ShardingError: it is malformed, names an axis that the mesh does not have, or one twice.
        """
        glob, colon, spec = text.rpartition(":")
        where = f"{field}: '{text}'"
        if not colon or not glob.strip() or not spec.strip():
            raise ShardingError(f"{where} is not 'GLOB: SPEC', as in 'blocks.**.mlp.up.kernel: -,model'")
        entries: list[tuple[str, ...]] = []
        for part in spec.split(","):
            names = () if part.strip() == "-" else tuple(name.strip() for name in part.split("+"))
            for name in names:
                check_axis(name, axes, where)
            entries.append(names)
        used = [name for names in entries for name in names]
        if len(set(used)) < len(used):
            twice = next(name for name in used if used.count(name) > 1)
            raise ShardingError(f"{where} uses the mesh axis '{twice}' for two dimensions: an axis splits one of them")
        return cls(text, glob.strip(), tuple(entries))


@dataclasses.dataclass(frozen=True)
class _Path:
    """A parameter in the place of a site, so that selectors apply to it."""

    name: str
    kind: str = "parameter"


def parameter_specs(
    params: Mapping[str, Any],
    rules: Sequence[str],
    axes: Mapping[str, int],
    placed: Mapping[str, PartitionSpec] | None = None,
    field: str = "sharding.params",
) -> dict[str, PartitionSpec]:
    """The spec of each parameter.

    Args:
        params: by path: arrays, shapes or encodings.
        rules: texts, as the module describes them.
        axes: of the mesh: sizes by name.
        placed: specs by path that were chosen before, as by passes (`Program.placement`); rules override them.
        field: of the config that the rules are from, for messages.

    Raises:
        ShardingError: a rule is malformed, matches nothing, has more entries than a parameter has dimensions, or
            splits a dimension that does not divide.
    """
    specs = dict.fromkeys(params, PartitionSpec())
    for path, spec in (placed or {}).items():
        for name in axes_of(spec):
            check_axis(name, axes, f"the program's placement of {path}")
        specs[path] = spec
    for rule in (Rule.parse(text, axes, field) for text in rules):
        try:
            matched = [path.name for path in select(rule.glob, map(_Path, params), what="parameter")]
        except SelectorError as error:
            raise ShardingError(f"{field}: '{rule.text}': {error}") from error
        for path in matched:
            _check(f"{field}: '{rule.text}' on {path}", params[path].shape, rule, axes)
            specs[path] = PartitionSpec(*(_entry(names) for names in rule.spec))
    return specs


def _check(where: str, shape: Sequence[int], rule: Rule, axes: Mapping[str, int]) -> None:
    where = f"{where} {list(shape)}"
    if len(rule.spec) > len(shape):
        raise ShardingError(f"{where}: {len(rule.spec)} entries for {len(shape)} dimension(s)")
    for dim, names in enumerate(rule.spec):
        parts = math.prod(axes[name] for name in names)
        if shape[dim] % parts:
            raise ShardingError(
                f"{where}: dimension {dim} is {shape[dim]}, which {'+'.join(names)} ({parts}) does not divide"
            )


def _entry(names: tuple[str, ...]) -> Any:
    return None if not names else names[0] if len(names) == 1 else names


def leaf_specs(path: str, value: Any, spec: PartitionSpec) -> Any:
    """The spec of each leaf of a parameter: the same pytree, or a single spec for an array.

    Raises:
        ShardingError: the encoding cannot be split so.
    """
    if not isinstance(value, Encoded):
        return spec
    try:
        return value.spec(spec)
    except EncodingError as error:
        raise ShardingError(
            f"sharding.params: {path} is {value.format} and cannot be split by {spec}: {error}"
        ) from error


def follow(tree: Any, params: Mapping[str, Any], specs: Mapping[str, PartitionSpec]) -> Any:
    """Specs for a tree in which dictionaries are keyed by parameter paths: parameters, or an optimizer's state.

    A leaf below a parameter's path has the spec of the parameter's leaf there if it has its shape. All others, such as
    counters and factored moments, are on every device whole.

    Returns:
        The tree with a `PartitionSpec` in place of each leaf.
    """
    known: dict[tuple[str, str], tuple[tuple[int, ...], PartitionSpec]] = {}
    for path, value in params.items():
        leaves = jax.tree_util.tree_leaves_with_path(value)
        for (place, leaf), spec in zip(leaves, jax.tree.leaves(leaf_specs(path, value, specs[path])), strict=True):
            known[path, jax.tree_util.keystr(place)] = (tuple(leaf.shape), spec)

    def of(place: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        for depth, key in enumerate(place):
            if isinstance(key, jax.tree_util.DictKey) and key.key in params:
                shape, spec = known.get((str(key.key), jax.tree_util.keystr(place[depth + 1 :])), (None, None))
                return spec if spec is not None and shape == tuple(leaf.shape) else PartitionSpec()
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, tree)


def batch_spec(batch_axes: Sequence[str], axes: Mapping[str, int], batch: int) -> PartitionSpec:
    """The spec of tokens `[accumulation, batch, positions]`.

    Args:
        batch_axes: mesh axes that the batch is split over.
        axes: of the mesh: sizes by name.
        batch: sequences in a micro-batch.

    Raises:
        ShardingError: there is no such axis, or the batch does not divide.
    """
    for name in batch_axes:
        check_axis(name, axes, "sharding.batch")
    parts = math.prod(axes[name] for name in batch_axes)
    if batch % parts:
        raise ShardingError(
            f"a micro-batch of {batch} sequence(s) does not divide over {'+'.join(batch_axes)} ({parts}): make "
            f"data.batch_size a multiple of {parts} times optimizer.accumulation (--batch), "
            "or split the batch over fewer axes with sharding.batch"
        )
    return PartitionSpec(None, _entry(tuple(batch_axes)))


def abstract(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """Shapes that carry their shardings, for tracing a jitted function.

    Args:
        mesh: the mesh.
        tree: arrays or shapes.
        specs: the same tree with specs as leaves, or one spec for all leaves.
    """
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda leaf: specs, tree)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def in_memory(tree: Any, kind: str) -> Any:
    """Shapes with shardings, put into a memory of their devices."""
    if kind == DEVICE:
        return tree

    def put(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


def in_memories(params: Mapping[str, Any], memory: Mapping[str, str]) -> dict[str, Any]:
    """Parameters with shardings, each in the memory that is named for its path."""
    return {path: in_memory(value, memory.get(path, DEVICE)) for path, value in params.items()}


def axes_of(spec: PartitionSpec) -> list[str]:
    """The mesh axes that a spec uses."""
    return [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]


def device_bytes(tree: Any) -> int:
    """Bytes of shapes with shardings on one device, without the padding of a compiler's layouts."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += leaf_nbytes(jax.ShapeDtypeStruct(shape, leaf.dtype))
    return total
