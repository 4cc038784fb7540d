"""What is computed of logits: values that have the vocabulary, followed through a graph until they lose it.

Every such value is one of a few forms: a chain of elementwise operations on a product (bias, scale, softcap, mask);
that, scaled and less something for each token; its exponential; its product with a one-hot. Where the vocabulary is
summed over, maximized or picked from, a few statistics of each token say the result. Any other operation declines.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.composites.alignment import ELEMENTWISE
from compax.composites.sides import CALLS, CONSTRAINTS, COPIES, Inline, Narrow, OneHot, Scalar, Side, Sides, Spread
from compax.ir import Graph, Op, Operand, Value
from compax.rewrites.splice import live


class Declined(Exception):
    """Logits are used in a way that statistics of tokens cannot say."""


class Escapes(Exception):
    """Logits leave the body."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """How a value with the vocabulary lies to the logits: the tokens in the same order, some left out at the ends.

    Attributes:
        windows: for each dimension of the logits' tokens where it starts and stops.
        tokens: the shape of the tokens, as it is now.
        dim: where the vocabulary is among the value's dimensions.
    """

    windows: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    dim: int


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What a value is that has the vocabulary: `factors * one_hot * f(scale * chain(logits) + shifts)`.

    Attributes:
        view: how it lies to the logits.
        chain: the elementwise operations that come first.
        scale: a number.
        shifts: for each token, with a coefficient each, and how the tokens lay to the logits there.
        exponential: whether `f` is the exponential; or nothing.
        one_hot: or nothing; with how the tokens lay there.
        factors: for each token; likewise.
        stopped: whether no gradient goes through it.
    """

    view: View
    chain: tuple[Op, ...] = ()
    scale: float = 1.0
    shifts: tuple[tuple[float, Narrow, View], ...] = ()
    exponential: bool = False
    one_hot: tuple[OneHot, View] | None = None
    factors: tuple[tuple[Narrow, View], ...] = ()
    stopped: bool = False

    @property
    def affine(self) -> bool:
        """Whether it is the logits, scaled and shifted, and nothing more."""
        return not self.exponential and self.one_hot is None and not self.factors

    @property
    def plain(self) -> bool:
        """Whether it is a chain of the logits and nothing more."""
        return self.affine and self.scale == 1 and not self.shifts and not self.stopped

    @property
    def settled(self) -> tuple[Op, ...]:
        """The chain without conversions at its end."""
        chain = list(self.chain)
        while chain and chain[-1].name == "convert_element_type":
            chain.pop()
        return tuple(chain)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A value that is computed from logits and does not have the vocabulary any more.

    Attributes:
        value: the value.
        kind: "max", "argmax", or "sum": over the vocabulary, and for a sum over some dimensions of tokens as well.
        form: what is summed, or maximized.
        tokens: which dimensions of the form's tokens are summed too.
        index: for a value picked by index, the labels, and how they make an index for each token.
        outside: what an index out of bounds gives, or none if it is brought within bounds.
    """

    value: Value
    kind: Literal["max", "argmax", "sum", "pick"]
    form: Form
    tokens: tuple[int, ...] = ()
    index: Operand | None = None
    outside: float | None = None


class Walk:
    """Follows logits through a graph.

    Attributes:
        head: the product.
        dim: where the vocabulary is in its result.
        uses: what is computed of the logits without having their vocabulary.
        sides: what joins the chains, by operand.
    """

    def __init__(self, graph: Graph, logits: Value, weight: int):
        self.graph = graph
        self.reader = Sides(graph)
        self.head = self.reader.producers[logits]
        rank = len(logits.shape)
        self.dim = rank - 1 if weight == 1 else 0
        tokens = tuple(size for d, size in enumerate(logits.shape) if d != self.dim)
        self.size = logits.shape[self.dim]
        self.forms = {logits: Form(View(tuple((0, size) for size in tokens), tokens, self.dim))}
        self.uses: list[Use] = []
        self.sides: dict[Operand, Scalar | Spread] = {}

    def run(self) -> None:
        """Visits every operation that an output needs.

        Raises:
            Declined: one does something else with the logits.
            Inline: a call has to be inlined first.
            Escapes: they are an output of the graph.
        """
        needed = live(self.graph)
        for op in self.graph.ops:
            wide = [i for i, x in enumerate(op.inputs) if isinstance(x, Value) and x in self.forms]
            if wide and op in needed:
                self.visit(op, wide)
        if any(isinstance(x, Value) and x in self.forms for x in self.graph.outputs):
            raise Escapes

    def common_chain(self) -> tuple[Op, ...]:
        """The chain that all uses start with.

        Raises:
            Declined: they start with different ones, or no label is picked.
        """
        chains: dict[tuple[Op, ...], tuple[Op, ...]] = {}
        for chain in sorted({use.form.settled for use in self.uses}, key=len):
            chains[tuple(op for op in chain if op.name not in CONSTRAINTS)] = chain
        if len(chains) > 1:
            names = sorted({op.name for chain in chains for op in chain})
            raise Declined(f"logits are used before and after some operations on them: {', '.join(names)}")
        if not any(use.form.exponential and use.kind == "sum" for use in self.uses):
            raise Declined("there is no logsumexp over the outputs of the layer")
        if not any(use.kind == "pick" or use.form.one_hot for use in self.uses):
            raise Declined("no label is picked from the logits: it is no cross-entropy")
        return next(iter(chains.values()))

    def visit(self, op: Op, wide: Sequence[int]) -> None:
        if op.name in CALLS:
            raise Inline(op)
        if len(wide) > 1:
            self.decline(op, "meet themselves in")
        (index,) = wide
        form, operand = self._form(op, index), op.inputs[index]
        if op.name in CONSTRAINTS and form.plain and op.outputs[0].shape == self.head.outputs[0].shape:
            new: Form | None = dataclasses.replace(form, chain=(*form.chain, op))
        elif op.name in COPIES:
            new = form
        elif op.name == "stop_gradient":
            new = dataclasses.replace(form, stopped=True)
        elif (rule := _RULES.get(op.name)) is not None:
            new = rule(self, op, form, index)
        elif op.name in ELEMENTWISE and op.outputs[0].shape == operand.shape:
            new = self.elementwise(op, form, index)
        else:
            self.decline(op)
        if new is not None:
            self.forms[op.outputs[0]] = new

    def _form(self, op: Op, index: int) -> Form:
        x = op.inputs[index]
        assert isinstance(x, Value)
        return self.forms[x]

    def decline(self, op: Op, how: str = "are needed whole by") -> NoReturn:
        place = "" if op.equation is None else _jax.source_text(op.equation)
        where = f" ({place})" if place else ""
        raise Declined(f"the logits, or what is computed of them, {how} '{op.name}'{where}")

    # -- elementwise --------------------------------------------------------------------------------------------------

    def elementwise(self, op: Op, form: Form, index: int) -> Form:
        shape, dim = op.outputs[0].shape, form.view.dim
        joined: list[Side] = []
        for i, x in enumerate(op.inputs):
            if i != index:
                side = self.reader.side(x, shape, dim)
                if side is None:
                    self.decline(op, "meet something of their own size in")
                joined.append(side)
        if len(joined) == 1 and op.name in ("add", "sub", "mul", "div", "add_any"):
            (side,) = joined
            found = self._arithmetic(op, form, index, side)
            if found is not None:
                return found
        if op.name == "select_n" and index == 2 and len(joined) == 2 and isinstance(joined[0], OneHot):
            zero = isinstance(joined[1], Scalar) and self.reader.number(joined[1].operand) == 0
            if zero and form.affine and (joined[0].on, joined[0].off) == (1, 0):
                return dataclasses.replace(form, one_hot=(joined[0], form.view))
        if not joined and (found := self._unary(op, form)) is not None:
            return found
        if not form.plain or not all(isinstance(side, Scalar | Spread) for side in joined):
            self.decline(op)
        given = [x for i, x in enumerate(op.inputs) if i != index]
        for x, side in zip(given, joined, strict=True):
            assert isinstance(side, Scalar | Spread)
            self.sides[x] = side
        if dim != self.dim or len(shape) != len(self.head.outputs[0].shape):
            self.decline(op, "are rearranged before")
        return dataclasses.replace(form, chain=(*form.chain, op))

    def _unary(self, op: Op, form: Form) -> Form | None:
        if op.name == "convert_element_type":
            if not jnp.issubdtype(op.outputs[0].dtype, jnp.floating):
                self.decline(op)
            same_rank = form.view.dim == self.dim and len(form.view.tokens) + 1 == len(self.head.outputs[0].shape)
            return dataclasses.replace(form, chain=(*form.chain, op)) if form.plain and same_rank else form
        if op.name == "neg" and not form.exponential:
            return self._times(form, -1.0)
        if op.name == "exp" and form.affine and form.scale == 1:
            return dataclasses.replace(form, exponential=True)
        return None

    @staticmethod
    def _times(form: Form, number: float) -> Form:
        shifts = tuple((number * coefficient, *rest) for coefficient, *rest in form.shifts)
        return dataclasses.replace(form, scale=number * form.scale, shifts=shifts)

    def _arithmetic(self, op: Op, form: Form, index: int, side: Side) -> Form | None:
        """Sums and products with what is not part of a chain."""
        if isinstance(side, OneHot) and op.name == "mul" and form.one_hot is None and not form.exponential:
            return dataclasses.replace(form, one_hot=(side, form.view))
        if isinstance(side, Narrow):
            if op.name == "mul" and not form.exponential:
                return dataclasses.replace(form, factors=(*form.factors, (side, form.view)))
            if op.name in ("add", "add_any", "sub") and form.affine:
                if op.name == "sub" and index == 1:
                    form = self._times(form, -1.0)
                    return dataclasses.replace(form, shifts=(*form.shifts, (1.0, side, form.view)))
                sign = -1.0 if op.name == "sub" else 1.0
                return dataclasses.replace(form, shifts=(*form.shifts, (sign, side, form.view)))
        if isinstance(side, Scalar) and not form.plain and not form.exponential:
            number = self.reader.number(side.operand)
            if number is not None and op.name == "mul":
                return self._times(form, number)
            if number and op.name == "div" and index == 0:
                return self._times(form, 1 / number)
        return None

    # -- layout -------------------------------------------------------------------------------------------------------

    def slice(self, op: Op, form: Form, index: int) -> Form:
        starts, limits = op.attributes["start_indices"], op.attributes["limit_indices"]
        windows, view = list(form.view.windows), form.view
        plain = view.tokens == tuple(stop - start for start, stop in windows)
        if any(stride != 1 for stride in op.attributes["strides"] or ()) or not plain:
            self.decline(op)
        if (starts[view.dim], limits[view.dim]) != (0, self.size):
            self.decline(op, "lose a part of the vocabulary in")
        kept = [(s, t) for d, (s, t) in enumerate(zip(starts, limits, strict=True)) if d != view.dim]
        windows = [(first + s, first + t) for (first, _), (s, t) in zip(windows, kept, strict=True)]
        tokens = tuple(stop - start for start, stop in windows)
        return dataclasses.replace(form, view=View(tuple(windows), tokens, view.dim))

    def reshape(self, op: Op, form: Form, index: int) -> Form:
        before, after, dim = op.inputs[index].shape, op.outputs[0].shape, form.view.dim
        ahead = np.prod(before[:dim], dtype=np.int64)
        places = [d for d, size in enumerate(after) if size == self.size and np.prod(after[:d]) == ahead]
        if op.attributes.get("dimensions") is not None or not places:
            self.decline(op, "lose the vocabulary as a dimension in")
        return self._moved(form, after[: places[0]] + after[places[0] + 1 :], places[0])

    def squeeze(self, op: Op, form: Form, index: int) -> Form:
        gone = {d % len(op.inputs[index].shape) for d in op.attributes["dimensions"]}
        return self._moved(form, None, form.view.dim - sum(d < form.view.dim for d in gone), op)

    def transpose(self, op: Op, form: Form, index: int) -> Form:
        order = [d for d in op.attributes["permutation"] if d != form.view.dim]
        if order != sorted(order):
            self.decline(op, "are in another order of tokens after")
        return self._moved(form, form.view.tokens, op.attributes["permutation"].index(form.view.dim))

    def broadcast(self, op: Op, form: Form, index: int) -> Form:
        x, dims = op.inputs[index], op.attributes["broadcast_dimensions"]
        if np.prod(x.shape) != np.prod(op.outputs[0].shape) or list(dims) != sorted(dims):
            self.decline(op, "are repeated by")
        return self._moved(form, None, dims[form.view.dim], op)

    @staticmethod
    def _moved(form: Form, tokens: tuple[int, ...] | None, dim: int, op: Op | None = None) -> Form:
        if tokens is None:
            assert op is not None
            tokens = tuple(size for d, size in enumerate(op.outputs[0].shape) if d != dim)
        return dataclasses.replace(form, view=View(form.view.windows, tokens, dim))

    # -- what leaves the vocabulary -----------------------------------------------------------------------------------

    def reduce_sum(self, op: Op, form: Form, index: int) -> None:
        axes, dim = op.attributes["axes"], form.view.dim
        if dim not in axes:
            self.decline(op, "are summed over tokens, not over the vocabulary, by")
        tokens = tuple(d - (d > dim) for d in axes if d != dim)
        self.uses.append(Use(op.outputs[0], "sum", form, tokens))

    def maximum(self, op: Op, form: Form, index: int) -> None:
        if tuple(op.attributes["axes"]) != (form.view.dim,) or not form.affine or form.scale <= 0:
            self.decline(op)
        self.uses.append(Use(op.outputs[0], "argmax" if op.name == "argmax" else "max", form))

    def dot(self, op: Op, form: Form, index: int) -> None:
        """A product with a one-hot, summed over the vocabulary."""
        contract, batch = op.attributes["dimension_numbers"]
        x, view, dim = op.inputs[index], form.view, form.view.dim
        same = contract[0] == contract[1] and batch[0] == batch[1] and op.inputs[0].shape == op.inputs[1].shape
        covered = sorted((*contract[0], *batch[0])) == list(range(len(x.shape))) and list(batch[0]) == sorted(batch[0])
        side = self.reader.side(op.inputs[1 - index], x.shape, dim) if same and covered else None
        if not isinstance(side, OneHot) or not form.affine or dim not in contract[0]:
            self.decline(op)
        tokens = tuple(d - (d > dim) for d in contract[0] if d != dim)
        self.uses.append(Use(op.outputs[0], "sum", dataclasses.replace(form, one_hot=(side, view)), tokens))

    def gather(self, op: Op, form: Form, index: int) -> None:
        """One index for each token."""
        numbers, view = op.attributes["dimension_numbers"], form.view
        picked = op.outputs[0]
        count = int(np.prod(view.tokens))
        one_each = set(op.attributes["slice_sizes"]) == {1} and np.prod(picked.shape) == count and not index
        if not form.affine or not one_each:
            self.decline(op)
        indices, sizes = op.inputs[1], op.inputs[0].shape
        batching, places = numbers.operand_batching_dims, numbers.start_indices_batching_dims
        in_order = list(batching) == sorted(batching) and list(places) == sorted(places)
        alone = all(d in batching or sizes[d] == 1 for d in range(len(sizes)) if d != view.dim)
        labels: Operand | None = None
        if tuple(numbers.start_index_map) == (view.dim,) and in_order and alone:
            labels = indices
        elif not batching and sorted(numbers.start_index_map) == list(range(len(sizes))) and not numbers.offset_dims:
            labels = self._beside_positions(indices, tuple(numbers.start_index_map), view)
        if labels is None:
            self.decline(op)
        fill = op.attributes["fill_value"]
        mode = str(op.attributes["mode"]).upper()
        outside = (float("nan") if fill is None else float(fill)) if "FILL" in mode else None
        self.uses.append(Use(picked, "pick", form, index=labels, outside=outside))

    def _beside_positions(self, indices: Operand, order: tuple[int, ...], view: View) -> Operand | None:
        """The labels among indices whose other parts are each token's own position."""
        op = self.reader.producers.get(indices) if isinstance(indices, Value) else None
        if op is not None and op.name in CALLS:
            raise Inline(op)
        if op is None or op.name != "concatenate" or len(op.inputs) != len(order):
            return None
        labels: Operand | None = None
        for part, dim in zip(op.inputs, order, strict=True):
            if dim == view.dim:
                labels = part
                continue
            known = self.reader.known(part)
            token_dim = dim - (dim > view.dim)
            expected = np.indices(view.tokens)[token_dim]
            if known is None or not np.array_equal(known.reshape(known.shape[:-1]), expected):
                return None
        return labels


_RULES: dict[str, Callable[[Walk, Op, Form, int], Any]] = {
    "slice": Walk.slice,
    "reshape": Walk.reshape,
    "squeeze": Walk.squeeze,
    "transpose": Walk.transpose,
    "broadcast_in_dim": Walk.broadcast,
    "reduce_sum": Walk.reduce_sum,
    "reduce_max": Walk.maximum,
    "argmax": Walk.maximum,
    "dot_general": Walk.dot,
    "gather": Walk.gather,
}
