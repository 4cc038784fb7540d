"""What recognition returns: one record for each composite, with everything that later passes ask of it."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from compax.analysis.atoms import Factors, size_of
from compax.analysis.normal import Node, Val

KINDS = ("attention", "normalization", "feed_forward", "experts")
"""Composites of several operations."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Composite:
    """Several operations with one meaning, at one call path.

    Attributes:
        name: such as `blocks.0.attn`; unique in its graph.
        kind: one of `KINDS`.
        inputs: the values that it is computed from: activations first, then parameters.
        output: its result.
        nodes: its nodes in order; those of its inputs are not among them.
        parameters: paths of the parameters that it consumes.
        loops: lengths of the loops around it; 0 where unknown.
    """

    name: str = ""
    kind: str
    inputs: tuple[Val, ...]
    output: Val
    nodes: tuple[Node, ...]
    parameters: tuple[str, ...]
    loops: tuple[int, ...]

    def facts(self) -> Mapping[str, str]:
        """All there is to say of it, by name."""
        return {}

    def summary(self) -> tuple[str, ...]:
        """The most important of it, in few words."""
        return tuple(f"{name} {text}" for name, text in self.facts().items())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Normalization(Composite):
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias`, or parts of it.

    Attributes:
        type: "layer" (mean and variance of some dimensions), "rms" (no mean), "group" (over groups of channels),
            "batch" (over the batch), "batch_running" (by stored statistics).
        x: what is normalized.
        weight: what it is multiplied with (`1 + w` as a whole, if so), or none.
        bias: what is added, or none.
        epsilon: what is added under the root.
        axes: the dimensions of `x` that statistics are taken over.
    """

    kind: str = "normalization"
    type: str
    x: Val
    weight: Val | None
    bias: Val | None
    epsilon: float
    axes: tuple[int, ...]

    def facts(self) -> Mapping[str, str]:
        parts = [name for name, x in (("weight", self.weight), ("bias", self.bias)) if x is not None]
        return {"type": self.type, "affine": "+".join(parts) or "none", "epsilon": f"{self.epsilon:.3g}"}

    def summary(self) -> tuple[str, ...]:
        facts = self.facts()
        return (f"{facts['type']}, {facts['affine']}",)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FeedForward(Composite):
    """`down(activation(up(x)))`, or gated: `down(activation(gate(x)) * up(x))`.

    Attributes:
        x: the source.
        up: the product whose result goes in (plain), or is multiplied in (gated).
        gate: the product whose result the activation takes, if gated.
        down: the last product.
        activation: its name; "custom" where it is none that is known.
        hidden: the dimension between.
        dropout: the share that is dropped in between, or none.
    """

    kind: str = "feed_forward"
    x: Val
    up: Node
    gate: Node | None
    down: Node
    activation: str
    hidden: Factors
    dropout: float | None = None

    @property
    def gated(self) -> bool:
        """Whether a second product gates the activation."""
        return self.gate is not None

    def facts(self) -> Mapping[str, str]:
        return {"form": "gated" if self.gated else "plain", "activation": self.activation}

    def summary(self) -> tuple[str, ...]:
        facts = self.facts()
        return (f"{facts['form']}, {facts['activation']}, hidden {size_of(self.hidden)}",)


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may look at.

    Attributes:
        kind: the static part, for the lengths that the graph was captured for: "full", "causal", "window", "chunked",
            "other" (static, of another shape), or "unknown".
        window: how many keys (before, after) a query sees beside its own; -1 for all. Of "causal" (-1, 0).
        chunk: the length of a chunk of "chunked".
        offset: key position of the first query, where it is static.
        position: where queries stand: how many keys came before the first one, as caches have it, or a number for
            each; none if it is static.
        by_keys: whether keys stand where `position` says as well.
        padding: values that say which keys are there: nonzero where they are.
        given: values that say for each pair of query and key whether it is seen.
        unknown: why the mask, or a part of it, is not known.
        allowed: for "other": what is allowed, bool[queries, keys].
    """

    kind: str
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    offset: int = 0
    position: Val | None = None
    by_keys: bool = False
    padding: tuple[Val, ...] = ()
    given: tuple[Val, ...] = ()
    unknown: str = ""
    allowed: np.ndarray | None = None

    def __str__(self) -> str:
        parts = [self.kind]
        if self.kind == "window":
            before, after = self.window
            span = f"{-before if before >= 0 else ''}..{after if after >= 0 else ''}"
            parts = [f"window {before + 1}" if after == 0 else f"window {span}"]
        if self.kind == "chunked":
            parts = [f"chunked {self.chunk}"]
        if self.position is not None:
            parts.append("after a cache" if not self.position.shape else f"by {_name(self.position)}")
        parts += [f"padding {_name(x)}" for x in self.padding]
        parts += [f"given {_name(x)}" for x in self.given]
        return " + ".join(parts) if not self.unknown else f"{' + '.join(parts)} ({self.unknown})"


def _name(x: Val) -> str:
    return x.input.path if x.input is not None else "computed"


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """How positions enter queries and keys.

    Attributes:
        form: "half" (feature i turns with i + size / 2), "interleaved" (2i with 2i + 1).
        size: how many features of a head turn.
        base: base of the frequencies, or none if they do not follow a power law.
    """

    form: str
    size: int
    base: float | None

    def __str__(self) -> str:
        base = "" if self.base is None else f", base {self.base:g}"
        return f"rope {self.form} {self.size}{base}"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Composite):
    """`softmax(scale * query . key + mask) . value`, heads and groups told by the axes.

    Attributes:
        query: the operand of the first product that gives queries.
        key: its other operand.
        value: the other operand of the second product.
        scores: what the softmax takes.
        weights: what it gives.
        qk: the node of the first product.
        pv: the node of the second.
        key_side: which operand of `qk` the keys are.
        value_side: which operand of `pv` the values are.
        batch: dimensions that queries, keys and values share, heads left out.
        groups: key-value heads.
        repeats: query heads of a group, if keys are shared by several.
        queries: positions of queries.
        keys: positions of keys.
        head_size: what the first product contracts.
        value_size: features of the values.
        mask: which keys are seen.
        scale: what scores are multiplied with, after the product.
        query_scale: what queries were multiplied with before, by a constant.
        softcap: `cap * tanh(scores / cap)`, or none.
        score: "dot", or "custom" where scores are changed in a way that has no name.
        bias: what is added to scores: static, learned or computed values; none if nothing but masks.
        alibi: whether the bias grows linearly with the position of the key.
        dropout: the share of weights that is dropped, or none.
        rotation: the rotary encoding of queries and keys, if any.
        cross: whether keys come from another source than queries.
        cached: whether keys come out of a cache.
    """

    kind: str = "attention"
    query: Val
    key: Val
    value: Val
    scores: Val
    weights: Val
    qk: Node
    pv: Node
    key_side: int
    value_side: int
    batch: Factors
    groups: Factors
    repeats: Factors
    queries: Factors
    keys: Factors
    head_size: Factors
    value_size: Factors
    mask: Mask
    scale: float
    query_scale: float
    softcap: float | None
    score: str
    bias: tuple[Val, ...]
    alibi: bool
    dropout: float | None
    rotation: Rotation | None
    cross: bool
    cached: bool

    @property
    def num_groups(self) -> int:
        """Number of key-value heads."""
        return size_of(self.groups)

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return size_of(self.groups) * size_of(self.repeats)

    def facts(self) -> Mapping[str, str]:
        heads, groups = self.num_heads, self.num_groups
        facts = {
            "mask": str(self.mask),
            "heads": f"{heads}" if heads == groups else f"{heads} on {groups}",
            "head size": str(size_of(self.head_size)),
            "scale": f"{self.scale * self.query_scale:.4g}",
        }
        if self.softcap is not None:
            facts["softcap"] = f"{self.softcap:g}"
        if self.bias:
            facts["bias"] = "alibi" if self.alibi else "yes"
        if self.dropout is not None:
            facts["dropout"] = f"{self.dropout:g}"
        if self.rotation is not None:
            facts["positions"] = str(self.rotation)
        if self.cross:
            facts["source"] = "cross"
        if self.cached:
            facts["cache"] = "yes"
        if self.score != "dot":
            facts["score"] = self.score
        return facts

    def summary(self) -> tuple[str, ...]:
        facts = dict(self.facts())
        del facts["scale"]
        lines = [facts.pop("mask"), f"{facts.pop('heads')} heads of {facts.pop('head size')}"]
        if self.rotation is not None:
            facts["positions"] = f"rope {self.rotation.form} {self.rotation.size}"
        return (*lines, *(text if name == "positions" else f"{name} {text}" for name, text in facts.items()))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Experts(Composite):
    """A router, and feed-forwards of which each token uses some.

    Attributes:
        x: what is routed.
        router: the product that gives the logits of experts.
        experts: the dimension of experts.
        top_k: how many experts a token uses; none if all, weighted.
        form: "dense" (every expert computes every token), "dispatch" (tokens are picked for each expert), "grouped"
            (tokens sorted by expert, grouped products).
        capacity: how many tokens an expert takes at most; none if any number.
        activation: of the experts' feed-forwards.
        gated: whether they are gated.
        hidden: their dimension between.
    """

    kind: str = "experts"
    x: Val
    router: Node
    experts: Factors
    top_k: int | None
    form: str
    capacity: int | None
    activation: str
    gated: bool
    hidden: Factors

    def facts(self) -> Mapping[str, str]:
        routed = "all" if self.top_k is None else f"top {self.top_k}"
        facts = {"experts": str(size_of(self.experts)), "router": routed, "form": self.form}
        if self.capacity is not None:
            facts["capacity"] = str(self.capacity)
        return facts | {"inside": "gated" if self.gated else "plain", "activation": self.activation}

    def summary(self) -> tuple[str, ...]:
        facts = self.facts()
        first = f"{facts['experts']} experts, {facts['router']}, {facts['form']}"
        return (first, f"{facts['inside']}, {facts['activation']}, hidden {size_of(self.hidden)}")
