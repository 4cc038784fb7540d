"""A cross-entropy as one operation: statistics of each token's logits, of which everything else is computed.

The operation takes hidden states, the head's weight, labels and what joins the logits, and gives a few numbers for each
token: logsumexp, the labels' logits, the sum, the largest and where it is. Its body is the product as it was, the
elementwise operations behind it as one operation, and the statistics written plainly.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compax import ir
from compax.composites.cross_entropy import CrossEntropy
from compax.composites.logits import Use, View
from compax.composites.sides import Narrow, Spread
from compax.ir import Graph, Literal, Op, Operand, Value
from compax.rewrites.splice import emit, splice, with_body

_HANDED_ON = ("convert_element_type", "copy", "name", "compress")

CHAIN = "logits_chain"
"""An operation inside the body: what is done to logits element by element, from them and what joins them, whole."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How statistics are computed: the operation's attribute `tiles`.

    Attributes:
        weight: which operand of the product is the weight.
        dim: where the vocabulary is in the product's result.
        labels: how many arrays of labels there are.
        results: "lse", "max", "total", "best" (the index of the maximum), "pick0", "pick1", ...
        tokens: the shape that the tokens have, the sequence last.
        positions: how many positions of each sequence a chunk has.
        vocabulary: how many entries of the vocabulary it has, or all.
    """

    weight: int
    dim: int
    labels: int
    results: tuple[str, ...]
    tokens: tuple[int, ...]
    positions: int
    vocabulary: int | None


def token_shape(found: CrossEntropy) -> tuple[int, ...]:
    """The shape of the tokens, sequences apart: where the model flattens them first, as they were before."""
    head, side = found.head, 1 - found.site.weight
    tokens = tuple(size for d, size in enumerate(head.outputs[0].shape) if d != found.dim)
    producers = found.graph.producers()
    x = head.inputs[side]
    while isinstance(x, Value) and x in producers and producers[x].name in _HANDED_ON:
        x = producers[x].inputs[0]
    op = producers.get(x) if isinstance(x, Value) else None
    if len(tokens) == 1 and op is not None and op.name == "reshape" and len(op.outputs[0].shape) == 2:
        lead = op.inputs[0].shape[:-1]
        if op.inputs[0].shape[-1:] == op.outputs[0].shape[-1:] and math.prod(lead) == tokens[0] and len(lead) > 1:
            return lead
    return tokens


def with_statistics(graph: Graph, found: CrossEntropy, operation: str, positions: int, vocabulary: int | None) -> Graph:
    """A graph in which a cross-entropy is computed from statistics that one operation gives.

    Args:
        graph: the captured graph.
        found: the cross-entropy in it.
        operation: the operation's name.
        positions: how many positions of each sequence a chunk has.
        vocabulary: how many entries of the vocabulary a chunk has, or all.

    Raises:
        RewriteError: the labels are computed from the logits.
    """
    made = _Made(found)
    ops, statistics = made.operation(operation, positions, vocabulary)
    instead: dict[Value, Operand] = {}
    for use in found.uses:
        names = [name for name in statistics if name in made.needed(use)]
        narrows = made.narrows(use)
        function = made.result(use, names, len(narrows))
        new, (result,) = emit(function, *(statistics[name] for name in names), *narrows)
        ops += new
        instead[use.value] = result
    return with_body(graph, found.steps, splice(found.graph, ops, instead))


class _Made:
    """Makes the operations for one cross-entropy."""

    def __init__(self, found: CrossEntropy):
        self.found = found
        self.logits = found.head.outputs[0]
        self.tokens = tuple(size for d, size in enumerate(self.logits.shape) if d != found.dim)
        self.size = self.logits.shape[found.dim]
        self.users = found.graph.users()
        self.label_keys: list[tuple[Any, ...]] = []
        self.label_uses: list[tuple[Use, View]] = []
        for use in found.uses:
            labelled = self._labelled(use)
            if labelled is not None and labelled[0] not in self.label_keys:
                self.label_keys.append(labelled[0])
                self.label_uses.append((use, labelled[1]))

    def _labelled(self, use: Use) -> tuple[tuple[Any, ...], View] | None:
        """What tells labels from others, and how they lie to the logits."""
        if use.index is not None:
            return (use.index, use.form.view.windows, "index"), use.form.view
        if use.form.one_hot is not None:
            one_hot, view = use.form.one_hot
            return (one_hot.labels.operand, view.windows, one_hot.labels.dims), view
        return None

    def pick(self, use: Use) -> str:
        """The name of the statistic with a use's label's logit."""
        labelled = self._labelled(use)
        assert labelled is not None
        return f"pick{self.label_keys.index(labelled[0])}"

    def needed(self, use: Use) -> set[str]:
        """The names of the statistics that a use is computed from."""
        form = use.form
        if use.kind == "argmax":
            return {"best"}
        if use.kind == "max":
            return {"max"}
        if use.kind == "pick":
            return {self.pick(use)}
        if form.exponential:
            return {"lse"}
        if form.one_hot is None:
            return {"total"}
        return {self.pick(use)} | ({"total"} if form.one_hot[0].off else set())

    # -- the operation ------------------------------------------------------------------------------------------------

    def operation(self, name: str, positions: int, vocabulary: int | None) -> tuple[list[Op], dict[str, Operand]]:
        """The operation with what prepares its operands, and its results by name."""
        found, weight = self.found, self.found.site.weight
        results = set[str]().union(*map(self.needed, found.uses))
        if any(use.kind == "max" and not self._stops(use.value) for use in found.uses):
            results.add("best")
        names = tuple(sorted(results))
        ops: list[Op] = []
        labels: list[Operand] = []
        for use, view in self.label_uses:
            new, (label,) = emit(self._labels(use, view), self._label_operand(use))
            ops += new
            labels.append(label)
        sides: list[Operand] = []
        given: list[Operand] = []
        for x, side in found.sides.items():
            if isinstance(x, Literal):  # written at its use, and stays there
                continue
            spread = isinstance(side, Spread)
            new, (operand,) = emit(lambda s, spread=spread: jnp.reshape(s, (-1,) if spread else ()), side.operand)
            ops += new
            sides.append(operand)
            given.append(x)
        tiles = Tiles(weight, found.dim, len(labels), names, token_shape(found), positions, vocabulary)
        operands = (found.head.inputs[1 - weight], found.head.inputs[weight], *labels, *sides)
        body = self._body(operands, tiles, given)
        outputs = tuple(Value(x.aval) for x in body.outputs)
        ops.append(Op(name, operands, outputs, {"tiles": tiles}, (body,), None))
        return ops, dict(zip(names, outputs, strict=True))

    def _stops(self, value: Value) -> bool:
        """Whether no gradient reaches a value, because all that is computed of it is stopped."""
        waiting, seen = [value], {value}
        outputs = set(self.found.graph.outputs)
        for x in waiting:
            if x in outputs:
                return False
            for op in self.users.get(x, ()):
                if op.name in ("stop_gradient", "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "argmax"):
                    continue
                if op.name not in ("max", "select_n", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type"):
                    return False
                waiting += [y for y in op.outputs if y not in seen]
                seen.update(op.outputs)
        return True

    def _label_operand(self, use: Use) -> Operand:
        if use.index is not None:
            return use.index
        assert use.form.one_hot is not None
        return use.form.one_hot[0].labels.operand

    def _labels(self, use: Use, view: View) -> Callable[[jax.Array], jax.Array]:
        """Labels for all tokens of the product: those that a loss leaves out have some label."""

        def function(labels: jax.Array) -> jax.Array:
            if use.index is None:
                assert use.form.one_hot is not None
                labels = use.form.one_hot[0].labels.on_tokens(labels)
            else:
                labels = jnp.clip(labels, 0, self.size - 1)
            labels = jnp.reshape(labels, [stop - start for start, stop in view.windows]).astype(jnp.int32)
            margins = [(start, size - stop, 0) for (start, stop), size in zip(view.windows, self.tokens, strict=True)]
            return jax.lax.pad(labels, jnp.int32(0), margins)

        return function

    def _body(self, operands: Sequence[Operand], tiles: Tiles, given: Sequence[Operand]) -> Graph:
        """What the operation means."""
        found = self.found
        inputs = tuple(Value(x.aval) for x in operands)
        pair = (inputs[1], inputs[0]) if tiles.weight == 0 else inputs[:2]
        logits = Value(self.logits.aval)
        ops = [dataclasses.replace(found.head, inputs=pair, outputs=(logits,))]
        if found.chain:
            shape, dim = self.logits.shape, found.dim
            full: list[Operand] = []
            for side in inputs[2 + tiles.labels :]:
                dims = (dim,) if side.shape else ()
                new, (whole,) = emit(lambda s, dims=dims: jax.lax.broadcast_in_dim(s, shape, dims), side)
                ops += new
                full.append(whole)
            start = Value(self.logits.aval)
            inner = [Value(x.aval) for x in full]
            env: dict[Value, Any] = {found.head.outputs[0]: start}
            env.update({x: y for x, y in zip(given, inner, strict=True) if isinstance(x, Value)})
            steps = tuple(ir.copied(op, env) for op in found.chain)
            last = steps[-1].outputs[0]
            logits = Value(last.aval)
            chain = Graph((start, *inner), steps, (last,))
            ops.append(Op(CHAIN, (ops[0].outputs[0], *full), (logits,), {}, (chain,), None))
        new, outputs = emit(_plain(tiles), logits, *inputs[2 : 2 + tiles.labels])
        return Graph(inputs, (*ops, *new), tuple(outputs))

    # -- what is computed of it ---------------------------------------------------------------------------------------

    def narrows(self, use: Use) -> list[Operand]:
        """The values for each token that a use is computed from besides."""
        form = use.form
        factors = [*form.factors]
        if form.one_hot is not None:
            factors += [(factor, form.one_hot[1]) for factor in form.one_hot[0].factors]
        found = [narrow.operand for _, narrow, _ in form.shifts] + [narrow.operand for narrow, _ in factors]
        return [*found, use.index] if use.index is not None and use.outside is not None else found

    def result(self, use: Use, names: Sequence[str], count: int) -> Callable[..., jax.Array]:
        """The function from statistics and `count` values for each token to the value of a use."""
        form, view = use.form, use.form.view

        def aligned(narrow: Narrow, then: View, array: jax.Array) -> jax.Array:
            array = jnp.reshape(narrow.on_tokens(array), [stop - start for start, stop in then.windows])
            pairs = zip(view.windows, then.windows, strict=True)
            cut = tuple(slice(start - before, stop - before) for (start, stop), (before, _) in pairs)
            return jnp.reshape(array[cut], view.tokens)

        def function(*arrays: jax.Array) -> jax.Array:
            cut = tuple(slice(*window) for window in view.windows)
            of = {name: jnp.reshape(x[cut], view.tokens) for name, x in zip(names, arrays, strict=False)}
            rest = list(arrays[len(names) :])
            assert len(rest) == count
            shift: Any = 0.0
            for coefficient, narrow, then in form.shifts:
                shift += coefficient * aligned(narrow, then, rest.pop(0).astype(jnp.float32))
            result = self._combined(use, of, shift)
            factors = list(form.factors)
            if form.one_hot is not None:
                factors += [(factor, form.one_hot[1]) for factor in form.one_hot[0].factors]
            for narrow, then in factors:
                result = result * aligned(narrow, then, rest.pop(0).astype(jnp.float32))
            if rest and use.outside is not None:
                index = jnp.reshape(rest[0], view.tokens)
                result = jnp.where((index >= 0) & (index < self.size), result, use.outside)
            if use.tokens:
                result = jnp.sum(result, axis=use.tokens)
            if form.stopped:
                result = jax.lax.stop_gradient(result)
            return jnp.reshape(result, use.value.shape).astype(use.value.dtype)

        return function

    def _combined(self, use: Use, of: dict[str, jax.Array], shift: Any) -> jax.Array:
        form = use.form
        if use.kind == "argmax":
            return of["best"]
        if use.kind == "max":
            return form.scale * of["max"] + shift
        if use.kind == "pick":
            return form.scale * of[self.pick(use)] + shift
        if form.exponential:
            return jnp.exp(of["lse"] + shift)
        if form.one_hot is None:
            return form.scale * of["total"] + self.size * shift
        one_hot, _ = form.one_hot
        result = (one_hot.on - one_hot.off) * (form.scale * of[self.pick(use)] + shift)
        if one_hot.off:
            result += one_hot.off * (form.scale * of["total"] + self.size * shift)
        return result


def _plain(tiles: Tiles) -> Callable[..., list[jax.Array]]:
    """The statistics of whole logits, as one would write them."""

    def function(logits: jax.Array, *labels: jax.Array) -> list[jax.Array]:
        logits = jnp.moveaxis(logits, tiles.dim, -1)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        found = {
            "lse": lambda: jax.nn.logsumexp(logits, axis=-1),
            "max": lambda: jnp.max(logits, axis=-1),
            "total": lambda: jnp.sum(logits, axis=-1),
            "best": lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        }
        for i, label in enumerate(labels):
            index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
            found[f"pick{i}"] = lambda label=label, index=index: jnp.sum(
                jnp.where(index == label[..., None], logits, 0), axis=-1
            )
        return [found[name]() for name in tiles.results]

    return function
