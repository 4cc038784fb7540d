"""Loss tiling: the head and the cross-entropy after it in chunks, so that logits never exist whole."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax, lowering
from compax.capture import Captured
from compax.composites.cross_entropy import CrossEntropy, NoCrossEntropy, find_cross_entropies
from compax.contracts import Contract, largest_relative_error, rounding_tolerance
from compax.encoding import Encoded
from compax.errors import ContractError, LoweringError, PipelineError, RewriteError
from compax.ir import Graph, Op
from compax.program import Program
from compax.rewrites.statistics import CHAIN, Tiles, token_shape, with_statistics
from compax.transform import Context, Pass, PassResult, SiteReport, Status, register

__all__ = ["TileLoss"]

OPERATION = "tiled_statistics"
"""An operation of ours: statistics of each token's logits, from hidden states, weight and labels."""

# -- arithmetic -------------------------------------------------------------------------------------------------------

Statistics = dict[str, jax.Array]


def statistics(logits: jax.Array, labels: Sequence[jax.Array], results: Sequence[str]) -> Statistics:
    """Statistics of logits `[..., V]` and labels `[...]`, by name: float32[...], and int32[...] for "best"."""
    return finished(updated(None, logits, labels, 0, results), results)


def updated(
    before: Statistics | None, logits: jax.Array, labels: Sequence[jax.Array], start: Any, results: Sequence[str]
) -> Statistics:
    """Statistics so far with those of a further chunk of the vocabulary, which begins at `start`.

    The sum of exponentials is kept relative to the maximum so far (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018, arXiv 1805.02867).
    """
    index = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    top = jnp.max(logits, axis=-1)
    shift = _finite(top if before is None else jnp.maximum(top, before["max"]))
    new: Statistics = {"sum": jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1)}
    for i, label in enumerate(labels):
        new[f"pick{i}"] = jnp.sum(jnp.where(index == label[..., None], logits, 0), axis=-1)
    if "total" in results:
        new["total"] = jnp.sum(logits, axis=-1)
    if before is not None:
        before = {**before, "sum": before["sum"] * jnp.exp(before["max"] - shift)}
        new = {name: x + before[name] for name, x in new.items()}
    if "best" in results:
        best = start + jnp.argmax(logits, axis=-1).astype(jnp.int32)
        new["best"] = best if before is None else jnp.where(top > before["max"], best, before["best"])
    new["max"] = top if before is None else jnp.maximum(top, before["max"])
    return new


def finished(so_far: Statistics, results: Sequence[str]) -> Statistics:
    """Statistics after the last chunk of the vocabulary."""
    return {
        name: _finite(so_far["max"]) + jnp.log(so_far["sum"]) if name == "lse" else so_far[name] for name in results
    }


def logits_gradient(
    logits: jax.Array, labels: Sequence[jax.Array], start: Any, saved: Statistics, gradients: Statistics
) -> jax.Array:
    """The gradient of a chunk of logits, `[..., V]`, from those of the statistics and what the forward pass found."""
    index = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    result = jnp.zeros_like(logits)
    if "lse" in gradients:
        shifted = logits - _finite(saved["lse"])[..., None]
        result += gradients["lse"][..., None] * jnp.exp(shifted)
    for i, label in enumerate(labels):
        result += jnp.where(index == label[..., None], gradients[f"pick{i}"][..., None], 0)
    if "total" in gradients:
        result += gradients["total"][..., None]
    if "max" in gradients and "best" in saved:
        result += jnp.where(index == saved["best"][..., None], gradients["max"][..., None], 0)
    return result


def nothing_yet(tokens: Sequence[int], results: Sequence[str]) -> Statistics:
    """Statistics before the first chunk of the vocabulary."""
    found = {name: jnp.zeros(tokens, jnp.float32) for name in (*results, "sum") if name not in ("lse", "best")}
    if "best" in results:
        found["best"] = jnp.zeros(tokens, jnp.int32)
    return {**found, "max": jnp.full(tokens, -jnp.inf, jnp.float32)}


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def chunked(run: Callable[[Any, int, Any], tuple[Any, Any]], length: int, size: int, carry: Any) -> tuple[Any, Any]:
    """Runs over a length in chunks, the last of which may be shorter.

    Args:
        run: from where a chunk starts, how long it is and the carry to the carry and results; these have the chunk's
            stretch last.
        length: the whole.
        size: of a chunk.
        carry: what goes from chunk to chunk.

    Returns:
        The carry after the last chunk, and the results put together along their last dimension.
    """
    count, rest = divmod(length, size)
    parts: list[Any] = []
    if count == 1:
        carry, part = run(0, size, carry)
        parts.append(part)
    elif count:
        starts = jnp.arange(count, dtype=jnp.int32) * size
        carry, stacked = jax.lax.scan(lambda held, start: run(start, size, held), carry, starts)
        parts.append(jax.tree.map(_row, stacked))
    if rest:
        carry, part = run(count * size, rest, carry)
        parts.append(part)
    return carry, parts[0] if len(parts) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *parts)


def _row(stacked: jax.Array) -> jax.Array:
    """`[chunks, ..., size]` as `[..., chunks * size]`."""
    moved = jnp.moveaxis(stacked, 0, -2)
    return jnp.reshape(moved, (*moved.shape[:-2], -1))


# -- lowering ---------------------------------------------------------------------------------------------------------


@lowering.operation(CHAIN)
def _whole_chain(call: lowering.Call) -> list[Any]:
    return call.evaluator.run(call.op.bodies[0], call.operands)


@lowering.operation(OPERATION)
def _tiled(call: lowering.Call) -> list[Any]:
    """Statistics of the tokens in chunks; nothing but the operands and `lse` is kept for the backward pass."""
    tiles: Tiles = call.op.attributes["tiles"]
    evaluator = lowering.Evaluator(call.evaluator.platform)
    x, weight, *rest = call.operands
    labels = [jnp.reshape(label, tiles.tokens) for label in rest[: tiles.labels]]
    leaves, tree = jax.tree.flatten([weight, *rest[tiles.labels :]])
    varying = frozenset[str]().union(*(_jax.varying_axes(leaf) for leaf in (x, *leaves, *labels)))
    x, leaves = _jax.vary(evaluator.dense(x, OPERATION), varying), [_jax.vary(leaf, varying) for leaf in leaves]
    head = _Head(call.op, tiles, evaluator, tree, tuple(map(_floating, leaves)), varying)
    floats, fixed = ([leaf for leaf in leaves if _floating(leaf) is kind] for kind in (True, False))

    @jax.custom_vjp
    def run(x: jax.Array, floats: list[Any], fixed: list[Any], labels: list[Any]) -> Statistics:
        return head.forward(x, floats, fixed, labels)

    def forward(x: jax.Array, floats: list[Any], fixed: list[Any], labels: list[Any]) -> tuple[Statistics, Any]:
        found = head.forward(x, floats, fixed, labels)
        saved = {name: found[name] for name in ("lse", "best") if name in found}
        return found, (x, floats, fixed, labels, saved)

    def backward(kept: Any, gradients: Statistics) -> tuple[Any, ...]:
        x, floats, fixed, labels, saved = kept
        given = {name: g for name, g in gradients.items() if name != "best"}
        return (*head.backward(x, floats, fixed, labels, saved, given), None, None)

    run.defvjp(forward, backward)
    found = run(x, floats, fixed, labels)
    call.evaluator.decodes.extend(evaluator.decodes)
    return [
        jnp.reshape(found[name], value.shape).astype(value.dtype)
        for name, value in zip(tiles.results, call.op.outputs, strict=True)
    ]


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


class _Head:
    """The head in chunks of positions, or of the vocabulary, forward and backward.

    Args:
        op: the operation, whose body has the product and the chain.
        tiles: how it is cut.
        evaluator: evaluates the product, with the weight as it is encoded.
        tree: structure of the product's weight and what joins the logits.
        floating: which of its leaves get gradients.
        varying: mesh axes over which operands vary inside of `shard_map`.
    """

    def __init__(
        self,
        op: Op,
        tiles: Tiles,
        evaluator: lowering.Evaluator,
        tree: Any,
        floating: tuple[bool, ...],
        varying: frozenset[str],
    ):
        body = op.bodies[0]
        self.product = body.ops[0]
        self.chain = next((inner.bodies[0] for inner in body.ops if inner.name == CHAIN), None)
        self.tiles, self.evaluator, self.tree, self.floating, self.varying = tiles, evaluator, tree, floating, varying
        primitive = self.product if self.product.equation is not None else self.product.bodies[0].ops[0]
        contract = primitive.attributes["dimension_numbers"][0]
        x, weight = body.inputs[:2]
        self.free = [d for d in range(len(x.shape)) if d not in contract[1 - tiles.weight]]
        (self.weight_axis,) = (d for d in range(len(weight.shape)) if d not in contract[tiles.weight])
        self.size = weight.shape[self.weight_axis]
        self.flat = len(tiles.tokens) != len(self.free)
        self.axis = self.free[-1] + (len(tiles.tokens) - 1 if self.flat else 0)

    # Sequences apart, so that a chunk takes some positions of each and stays on the devices that have the sequences.

    def _by_sequence(self, x: jax.Array) -> jax.Array:
        if not self.flat:
            return x
        (d,) = self.free
        return jnp.reshape(x, (*x.shape[:d], *self.tiles.tokens, *x.shape[d + 1 :]))

    def _logits(self, x: jax.Array, leaves: Sequence[Any], start: Any, size: int) -> jax.Array:
        """Float32 logits of a chunk of hidden states, for leaves that are cut already where they are dense."""
        lead: tuple[int, ...] = ()
        if self.flat:
            (d,) = self.free
            lead = x.shape[d : d + len(self.tiles.tokens)]
            x = jnp.reshape(x, (*x.shape[:d], -1, *x.shape[d + len(lead) :]))
        weight, *sides = jax.tree.unflatten(self.tree, leaves)
        if isinstance(weight, Encoded) and size != self.size:
            weight = self._cut_encoded(weight, start, size)
        (raw,) = self.evaluator.apply(self.product, [weight, x] if self.tiles.weight == 0 else [x, weight])
        if self.chain is not None:
            full = [jax.lax.broadcast_in_dim(s, raw.shape, (self.tiles.dim,) if s.ndim else ()) for s in sides]
            (raw,) = self.evaluator.run(self.chain, [raw, *full])
        logits = jnp.moveaxis(raw, self.tiles.dim, -1).astype(jnp.promote_types(raw.dtype, jnp.float32))
        return jnp.reshape(logits, (*lead, logits.shape[-1])) if self.flat else logits

    def _cut_encoded(self, weight: Encoded, start: Any, size: int) -> Encoded:
        starts = [jnp.int32(0)] * weight.ndim
        sizes = list(weight.shape)
        starts[self.weight_axis], sizes[self.weight_axis] = jnp.int32(start), size
        cut = weight.dynamic_slice(starts, sizes)
        if cut is None:
            raise LoweringError(
                f"a head stored as {weight.format}{list(weight.shape)} cannot be cut along its vocabulary; use "
                "tile_loss(tokens=...), which leaves it whole"
            )
        return cut

    def _axes(self) -> list[int | None]:
        """For each leaf where its vocabulary is, if it is a dense operand that has one."""
        operands = jax.tree.unflatten(self.tree, range(len(self.floating)))
        dense = {x: self.weight_axis if i == 0 else 0 for i, x in enumerate(operands) if isinstance(x, int)}
        return [dense.get(i) for i in range(len(self.floating))]

    def _pieces(self, leaves: Sequence[Any], start: Any, size: int) -> list[Any]:
        """Leaves with the dense ones cut."""
        return [
            leaf if axis is None or not leaf.ndim else jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)
            for leaf, axis in zip(leaves, self._axes(), strict=True)
        ]

    def _joined(self, floats: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        given, others = iter(floats), iter(fixed)
        return [next(given) if floating else next(others) for floating in self.floating]

    def _apart(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        pairs = list(zip(leaves, self.floating, strict=True))
        return [x for x, floating in pairs if floating], [x for x, floating in pairs if not floating]

    def _part(self, x: jax.Array, start: Any, size: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, self.axis)

    def forward(self, x: jax.Array, floats: list[Any], fixed: list[Any], labels: list[Any]) -> Statistics:
        """The statistics of all tokens."""
        x, leaves, results = self._by_sequence(x), self._joined(floats, fixed), self.tiles.results

        def tokens(start: Any, size: int, carry: None) -> tuple[None, Statistics]:
            logits = self._logits(self._part(x, start, size), leaves, 0, self.size)
            return None, statistics(logits, _stretch(labels, start, size), results)

        def vocabulary(start: Any, size: int, so_far: Statistics) -> tuple[Statistics, None]:
            logits = self._logits(x, self._pieces(leaves, start, size), start, size)
            return updated(so_far, logits, labels, start, results), None

        if self.tiles.vocabulary is None:
            return chunked(tokens, self.tiles.tokens[-1], self.tiles.positions, None)[1]
        start = jax.tree.map(self._varying, nothing_yet(self.tiles.tokens, results))
        return finished(chunked(vocabulary, self.size, self.tiles.vocabulary, start)[0], results)

    def backward(
        self,
        x: jax.Array,
        floats: list[Any],
        fixed: list[Any],
        labels: list[Any],
        saved: Statistics,
        gradients: Statistics,
    ) -> tuple[jax.Array, list[Any]]:
        """The gradients of hidden states and of the floating leaves, which are added up in float32."""
        shape, x = x.shape, self._by_sequence(x)
        sums = [self._varying(jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))) for leaf in floats]

        def pulled(part: Any, pieces: list[Any], labels: Any, start: Any, size: int, of_tokens: Any) -> tuple[Any, Any]:
            given, others = self._apart(pieces)
            logits, pull = jax.vjp(
                lambda x, given: self._logits(x, self._joined(given, others), start, size), part, given
            )
            return pull(logits_gradient(logits, labels, start, *of_tokens))

        def tokens(start: Any, size: int, sums: list[Any]) -> tuple[list[Any], jax.Array]:
            of_tokens = jax.tree.map(lambda s: _stretch([s], start, size)[0], (saved, gradients))
            whole, stretched = self._joined(floats, fixed), _stretch(labels, start, size)
            dx, leaves = pulled(self._part(x, start, size), whole, stretched, 0, self.size, of_tokens)
            return [s + g.astype(s.dtype) for s, g in zip(sums, leaves, strict=True)], jnp.moveaxis(dx, self.axis, -1)

        axes = self._apart(self._axes())[0]

        def vocabulary(start: Any, size: int, carry: tuple[Any, list[Any]]) -> tuple[tuple[Any, list[Any]], None]:
            total, sums = carry
            pieces = self._pieces(self._joined(floats, fixed), start, size)
            dx, leaves = pulled(x, pieces, labels, start, size, (saved, gradients))
            sums = [_added(s, g, axis, start) for s, g, axis in zip(sums, leaves, axes, strict=True)]
            return (total + dx.astype(total.dtype), sums), None

        if self.tiles.vocabulary is None:
            sums, dx = chunked(tokens, self.tiles.tokens[-1], self.tiles.positions, sums)
            dx = jnp.moveaxis(dx, -1, self.axis)
        else:
            zero = self._varying(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)))
            (dx, sums), _ = chunked(vocabulary, self.size, self.tiles.vocabulary, (zero, sums))
        result = [s.astype(leaf.dtype) for s, leaf in zip(sums, floats, strict=True)]
        return jnp.reshape(dx, shape).astype(x.dtype), result

    def _varying(self, x: jax.Array) -> jax.Array:
        return _jax.vary(x, self.varying)


def _stretch(arrays: Sequence[jax.Array], start: Any, size: int) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1) for x in arrays]


def _added(total: jax.Array, gradient: jax.Array, axis: int | None, start: Any) -> jax.Array:
    """A sum of gradients with one more: of the whole, or of the stretch that begins at `start`."""
    gradient = gradient.astype(total.dtype)
    if axis is None or not total.ndim:
        return total + gradient
    return jax.lax.dynamic_update_slice_in_dim(total, gradient, start, axis)


# -- the pass ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rounding(Contract):
    """What the order of sums may change in each dtype, relative to the largest value of an array."""

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        error, limit = largest_relative_error(before, after), rounding_tolerance(before.dtype)
        if not error <= limit:
            raise ContractError(f"'{name}' differs by {error:.3g} of its largest value; rounding allows {limit:.3g}")


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A cross-entropy in the place of a site, so that selectors apply to it."""

    name: str
    parameter: str | None
    kind: str = "cross_entropy"


@register("tile_loss")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TileLoss(Pass):
    """Computes the head and the cross-entropy after it in chunks, forward and backward: logits never exist whole.

    The layer that makes the logits, what is done to them one by one (bias, scale, softcap, mask) and the loss on them
    become one operation that keeps hidden states, labels and each token's logsumexp. The backward pass computes a
    chunk's logits again: one product with the head more than without the pass. Gradients of the head are added up in
    float32. As in Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv 2411.09009, and
    Hsu et al., "Liger Kernel", 2024, arXiv 2410.10989; here by XLA alone, on every platform, found in the program.

    The loss is recognized by what it computes: a logsumexp over the outputs of a linear layer and a label picked from
    them, by index or by one-hot; with label smoothing, z-loss, weights of tokens, and accuracy by argmax beside it.
    Whatever else needs the logits, above all returning them, is named as the reason to skip the layer.

    1. `tokens`: chunks of tokens. A chunk takes the same positions of every sequence, so that nothing moves between
       devices over which the sequences are spread; it has about this many tokens on each device that the placement
       spreads them over.
    2. `vocabulary`: chunks of the vocabulary, with the logsumexp kept up from chunk to chunk (Milakov and Gimelshein,
       2018, arXiv 1805.02867). For heads that are whole on each device; a stored head has to be one that can be cut.

    Args:
        tokens: how many tokens a chunk has, 1024 if neither is given.
        vocabulary: how many entries of the vocabulary a chunk has.

    Raises:
        PipelineError: both are given, or one is not positive.
        SelectorError: `at` matches no linear layer whose outputs enter a logsumexp.
    """

    tokens: int | None = None
    vocabulary: int | None = None

    phase: ClassVar[str] = "memory"
    contract: ClassVar[Contract] = Rounding()
    paper: ClassVar[str] = "Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024, arXiv 2410.10989"
    example: ClassVar[str] = "tile_loss(tokens=1024)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.vocabulary is not None:
            raise PipelineError(f"{self}: give tokens or vocabulary, not both")
        for name in ("tokens", "vocabulary"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise PipelineError(f"tile_loss: '{name}' is {value}; a chunk has at least 1")

    def run(self, program: Program, context: Context) -> PassResult:
        shards = program.placement.batch_shards
        names = self.select(
            [
                _Loss(found.site.name, found.site.parameter)
                for captured in program.graphs.values()
                for found in find_cross_entropies(captured)
            ],
            "cross-entropy",
        )
        decisions = {"names": sorted({loss.name for loss in names}), "shards": shards}
        reports: dict[str, SiteReport] = {}
        graphs: dict[Any, Captured] = {}
        for key, captured in program.graphs.items():
            graphs[key], made = self._tiled(captured, decisions)
            for report in made:
                known = reports.get(report.name)
                reports[report.name] = report if known is None or report.status == "rewritten" else known
        changed = any(report.status == "rewritten" for report in reports.values())
        return PassResult(program.replace(graphs=graphs) if changed else program, tuple(reports.values()), decisions)

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        return self._tiled(captured, decisions)[0]

    def _tiled(self, captured: Captured, decisions: Mapping[str, Any]) -> tuple[Captured, list[SiteReport]]:
        """A graph with the chosen losses in chunks, and what was done with each."""
        reports: dict[str, SiteReport] = {}
        while True:
            for found in find_cross_entropies(captured):
                loss = _Loss(found.site.name, found.site.parameter)
                if loss.name not in decisions["names"] or loss.name in reports:
                    continue
                outcome = self._outcome(captured, found, decisions["shards"])
                if isinstance(outcome, Graph):
                    captured = dataclasses.replace(captured, graph=outcome)
                    reports[loss.name] = SiteReport.of(loss, "rewritten")
                    break
                reports[loss.name] = SiteReport.of(loss, *outcome)
            else:
                return captured, list(reports.values())

    def _outcome(
        self, captured: Captured, found: CrossEntropy | NoCrossEntropy, shards: int
    ) -> Graph | tuple[Status, str]:
        """The new graph, or why there is none."""
        if isinstance(found, NoCrossEntropy):
            if found.within == OPERATION:
                return "matched", "computed in chunks already"
            return "skipped", found.reason
        mesh = captured.signature.mesh
        if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
            return "skipped", "shardings are part of types here; capture under a mesh of Auto axes"
        tokens, size = token_shape(found), found.head.outputs[0].shape[found.dim]
        if self.vocabulary is not None:
            if size <= self.vocabulary:
                return "matched", f"its vocabulary of {size} is one chunk"
            if axes := found.split_over:
                return "skipped", f"its vocabulary is split over {'+'.join(axes)}; use tile_loss(tokens=...)"
            vocabulary, positions = self.vocabulary, tokens[-1]
        else:
            vocabulary, positions = None, stretch(tokens, (self.tokens or 1024) * shards)
            if positions == tokens[-1]:
                return "matched", f"its {math.prod(tokens)} tokens are one chunk"
        try:
            return with_statistics(captured.graph, found, OPERATION, positions, vocabulary)
        except RewriteError as error:
            return "skipped", str(error)


def stretch(tokens: Sequence[int], wanted: int) -> int:
    """How many positions of each sequence make a chunk of about so many tokens, evenly if that is near."""
    *lead, length = tokens
    most = max(1, wanted // math.prod(lead))
    count = -(-length // most)
    even = next((n for n in range(count, 2 * count) if length % n == 0), None)
    return -(-length // count) if even is None else length // even
