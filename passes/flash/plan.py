"""From a recognized attention to what a kernel has to know of it, or to the reason why none can compute it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compax.analysis.atoms import Atom, Factors, size_of
from compax.analysis.normal import Val, rearranged
from compax.composites.base import Attention, Mask
from compax.composites.layout import arrange
from compax.composites.view import LAYOUT, View
from compax.ir import Graph, Op
from compax.passes.flash import gpu, splash
from compax.passes.flash.spec import Devices, Kernel, Pattern, Spec, Spread
from compax.placement import Placement

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "tpu": ("splash",),
    "gpu": ("cudnn", "pallas"),
    "cpu": ("plain",),
}
"""What `auto` tries on each platform, best first."""
PALLAS: tuple[Kernel, ...] = ("splash", "pallas")
"""Kernels that the compiler cannot spread over devices by itself."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a person asked for.

    Attributes:
        kernels: which implementations may be used, best first.
        block_q: how many queries are computed together, or what suits the kernel.
        block_k: the same of keys.
        interpret: whether Pallas kernels are interpreted.
        placement: where the program's arrays live.
    """

    kernels: tuple[Kernel, ...]
    block_q: int | None
    block_k: int | None
    interpret: bool
    placement: Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """How an attention is computed.

    Attributes:
        spec: for the kernel.
        operands: queries, keys and values.
        others: masks and biases, in the order that the spec says.
    """

    spec: Spec
    operands: tuple[Val, Val, Val]
    others: tuple[Val, ...]


def plan(view: View, attention: Attention, options: Options) -> Planned | str:
    """How an attention is computed, or why none of the kernels can."""
    if reason := _unknown(attention):
        return reason
    layout = arrange(view, attention)
    if layout is None:
        return "its axes do not tell how its operands are arranged"
    if layout.output.dropped:
        return "its result repeats along a dimension"
    mask = attention.mask
    spread = {x: _spread(view, attention, x) for x in (*mask.padding, *mask.given, *attention.bias)}
    for x, found in spread.items():
        if found is None:
            return f"{_name(x)} has a dimension that is none of the attention's"
    signs = {x: _sign(view, attention, x) for x in attention.bias}
    for x, sign in signs.items():
        if not sign:
            return f"{_name(x)} enters its scores in another way than by addition"
    given = [[found for x in values if (found := spread[x])] for values in (mask.padding, mask.given, attention.bias)]
    padding, pairs, bias = map(tuple, given)
    bias = tuple(dataclasses.replace(found, sign=signs[x]) for x, found in zip(attention.bias, bias, strict=True))
    spec = Spec(
        kernel=options.kernels[0],
        layout=layout,
        pattern=_pattern(mask),
        scale=_scale(attention),
        softcap=attention.softcap,
        padding=padding,
        given=pairs,
        bias=bias,
        query_dtype=str(_dtype(attention.qk.op.inputs)),
        value_dtype=str(_dtype(attention.pv.op.inputs[attention.value_side :][:1])),
        block_q=options.block_q,
        block_k=options.block_k,
        interpret=options.interpret,
    )
    mapped = _shard_map_around(view.normal.captured.graph, attention)
    if mapped is None:
        spec = dataclasses.replace(spec, spread=_devices(view, attention, spec, options.placement))
    reasons: list[str] = []
    for kernel in options.kernels:
        wanted = dataclasses.replace(spec, kernel=kernel)
        reason = _DECLINES[kernel](wanted)
        if kernel in PALLAS and mapped is not None and mapped.attributes["check_vma"]:
            reason = reason or "it is inside of a shard_map that checks what varies, which the kernel does not say"
        if not reason:
            return Planned(
                wanted,
                (attention.query, attention.key, attention.value),
                (*mask.padding, *mask.given, *attention.bias),
            )
        reasons.append(f"{kernel}: {reason}")
    if "plain" not in options.kernels:
        reasons.append("flash(implementation=plain) computes it in blocks on any platform")
    return "; ".join(reasons)


def _nothing(spec: Spec) -> str:
    """The plain form takes everything."""
    return ""


_DECLINES = {"plain": _nothing, "splash": splash.why_not, "cudnn": gpu.why_not_cudnn, "pallas": gpu.why_not_pallas}


def _unknown(attention: Attention) -> str:
    """What is not known of an attention, or known and computed by no kernel."""
    mask = attention.mask
    if attention.dropout is not None:
        return f"a share of {attention.dropout:g} of its weights is dropped at random; no kernel here draws the same"
    if attention.score != "dot":
        return "its scores are changed in a way that has no name"
    if mask.unknown or mask.kind == "unknown":
        return f"its mask is not known: {mask.unknown}; program.declare(at='{attention.name}', mask=...) says it"
    if attention.cached:
        return "its keys come out of a cache, of which a part is read"
    if mask.position is not None:
        return f"{_name(mask.position)} says where its queries stand; capture(..., constant=...) if they always do"
    return ""


def _shard_map_around(graph: Graph, attention: Attention) -> Op | None:
    """The `shard_map` that an attention is in, if any."""
    for position, index in attention.pv.path:
        op = graph.ops[position]
        if op.name == "shard_map":
            return op
        if index >= 0:
            graph = op.bodies[index]
    return None


def _devices(view: View, attention: Attention, spec: Spec, placement: Placement) -> Devices | None:
    """How an attention is spread, from the placement of the batch and of the parameters that make queries and keys."""
    mesh = placement.mesh
    if mesh is None or mesh.size == 1:
        return None
    batch = placement.batch if spec.layout.query.grouped[0] % placement.batch_shards == 0 else ()
    atoms = view.engine.atoms
    groups = set(atoms.leaves(attention.groups))
    found = [
        _axes_of(view, placement, linear.weight, groups)
        for x in (attention.query, attention.key)
        for linear in view.sources(x)
    ]
    # Where parameters are stored in more parts than they are used in, the others are those of the batch.
    split = set(placement.batch)
    heads = (
        tuple(name for name in found[0] if name not in split and all(name in axes for axes in found)) if found else ()
    )
    shards = math.prod(mesh.shape[name] for name in heads)
    return Devices(mesh, batch, heads if not spec.heads[1] % shards else ())


def _axes_of(view: View, placement: Placement, weight: Val, groups: set[Atom]) -> tuple[str, ...]:
    """The mesh axes over which a parameter's heads are spread."""
    paths = view.parameters(weight)
    for x in view.normal.inputs:
        if x.input is None or x.input.kind != "parameter" or x.input.path not in paths:
            continue
        for dim, names in enumerate(placement.spec(x.input.path)):
            if names is not None and groups & set(view.engine.atoms.leaves(view.engine.dims[x][dim])):
                return (names,) if isinstance(names, str) else tuple(names)
    return ()


def _pattern(mask: Mask) -> Pattern:
    if mask.kind == "full":
        return Pattern()
    if mask.kind == "other":
        assert mask.allowed is not None
        return Pattern("other", packed=np.packbits(mask.allowed).tobytes())
    if mask.kind == "chunked":
        return Pattern("chunked", *mask.window, chunk=mask.chunk, offset=mask.offset)
    return Pattern("band", *mask.window, offset=mask.offset)


def _scale(attention: Attention) -> float:
    """The scale; recognition evaluates it, and the usual one is known more exactly than that."""
    usual = size_of(attention.head_size) ** -0.5
    return usual if abs(attention.scale - usual) <= 1e-4 * usual else attention.scale


def _dtype(operands: Sequence[object]) -> jnp.dtype:
    return jnp.dtype(jnp.result_type(*(getattr(x, "dtype", None) for x in operands)))


def _name(x: Val) -> str:
    return f"'{x.input.path}'" if x.input is not None else "a value that is computed"


def _spread(view: View, attention: Attention, x: Val) -> Spread | None:
    """How a mask or a bias becomes [B, H, T, S]; among equal dimensions the last one is that of the keys."""
    expand = view.engine.atoms.expand
    heads = (*attention.groups, *attention.repeats)
    left = [expand(part) for part in (attention.batch, heads, attention.queries, attention.keys)]
    taken: dict[int, int] = {}
    for dim in reversed(range(len(x.shape))):
        factors = view.factors(x, dim)
        if not factors or x.shape[dim] == 1:
            continue
        fits = [(slot, rest) for slot in (3, 2, 1, 0) if (rest := _without(left[slot], factors)) is not None]
        if not fits:
            return None
        taken[dim], left[fits[0][0]] = fits[0]
    if any(left[slot] for slot in taken.values()):
        return None
    sizes = [1, 1, 1, 1]
    for dim, slot in taken.items():
        sizes[slot] *= x.shape[dim]
    batch, num_heads, queries, keys = sizes
    kept = sorted(taken)
    order = tuple(sorted(range(len(kept)), key=lambda i: (taken[kept[i]], kept[i])))
    return Spread(tuple(kept), order, (batch, num_heads, queries, keys))


def _without(whole: Factors, last: Factors) -> Factors | None:
    """What is left of a dimension if its last factors are those of another one; none if they are not."""
    for count in range(1, len(whole) + 1):
        tail = whole[-count:]
        if size_of(tail) == size_of(last):
            return whole[:-count] if all(atom in tail for atom in last if not atom.table) else None
    return None


def _sign(view: View, attention: Attention, x: Val) -> int:
    """Whether a bias is added to the scores that the softmax takes (1), subtracted (-1), or neither (0)."""
    inside = set(attention.nodes)
    for node in attention.nodes:
        sides = [i for i, y in enumerate(node.inputs) if y is x or rearranged(y) is rearranged(x)]
        if node.name in LAYOUT or not sides or node.outputs[0].shape != attention.scores.shape:
            continue
        if node.name not in ("add", "add_any", "sub") or len(sides) != 1:
            return 0
        value = node.outputs[0]
        while value is not attention.scores:
            readers = [reader for reader in view.normal.readers(value) if reader in inside]
            if len(readers) != 1 or readers[0].name not in ("add", "add_any", "select_n", *LAYOUT):
                return 0
            value = readers[0].outputs[0]
        return -1 if node.name == "sub" and sides[0] == 1 else 1
    return 0


def platform_of(target: object) -> str:
    """The platform that a program is meant for: that of the target's chip, or where JAX runs."""
    platform = getattr(getattr(target, "chip", None), "platform", None)
    return platform if isinstance(platform, str) else jax.default_backend()
