"""What collectives the shardings of a train step ask for, counted from specs alone."""

import math
from collections.abc import Collection, Mapping

from jax.sharding import PartitionSpec

from compax.placement import axes_of
from compax.target import Kind, Target


def exchanged(
    sizes: Mapping[str, int],
    specs: Mapping[str, PartitionSpec],
    batch: Collection[str],
    mesh: Mapping[str, int],
    *,
    gradients: Mapping[str, PartitionSpec] | None = None,
    optimizer: Mapping[str, PartitionSpec] | None = None,
    parts: int = 1,
) -> dict[Kind, int]:
    """Bytes of the collectives that one train step needs at least, by kind. Predicted.

    Gradients of parameters that the batch's axes do not split are all-reduced; parameters that they do split are
    gathered twice, for the forward and the backward pass, and their gradients scattered once. Where gradients are split
    and parameters are not, they are scattered; where the optimizer's state is, what it updated is gathered once.
    Exchanges of activations, as tensor parallelism needs them, are not in it.

    Args:
        sizes: of the trained parameters, by path: bytes on one device.
        specs: of parameters by path; those that are not named are whole on each device.
        batch: the mesh axes over which the batch is spread.
        mesh: sizes of the mesh's axes.
        gradients: specs of gradients; as the parameters' for those that are not named.
        optimizer: specs of the optimizer's state; likewise.
        parts: how many gradients one step adds up.

    Returns:
        Bytes of one device: of the result of an all-gather, of the operand of the others.
    """
    found: dict[Kind, int] = {}

    def ways(path: str, *named: Mapping[str, PartitionSpec] | None) -> int:
        """Into how many parts the batch's axes split it."""
        spec = next((some[path] for some in named if some is not None and path in some), PartitionSpec())
        return math.prod(mesh[name] for name in set(axes_of(spec)).intersection(batch))

    def add(kind: Kind, size: int) -> None:
        found[kind] = found.get(kind, 0) + size

    everywhere = math.prod(mesh[name] for name in batch)
    for path, size in sizes.items():
        stored, gradient, update = ways(path, specs), ways(path, gradients, specs), ways(path, optimizer, specs)
        if stored > 1:
            add("all-gather", 2 * parts * size * stored)
        if gradient > 1:
            add("reduce-scatter", parts * size * stored)
        if everywhere > gradient:
            add("all-reduce", parts * size * stored // gradient)
        if update > stored:
            add("all-gather", size)
    return found


def exchange_seconds(target: Target, found: Mapping[Kind, int], group_size: int) -> float:
    """Predicted seconds of these collectives one after another, each in groups of one size, as single messages.

    Raises:
        TargetError: nothing is known of the target's links, or it has fewer devices than a group.
    """
    return sum(target.collective_seconds(kind, size, group_size) for kind, size in found.items())
