"""A program: graphs over one store of parameters and state, and the history of passes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from compax import explicit, lowering, module, program_text, raising
from compax.analysis import coverage as covering
from compax.analysis.axes import Axis
from compax.capture import (
    Arguments,
    Captured,
    Entry,
    Signature,
    Static,
    check_mode,
    check_store,
    make_source,
    take_apart,
    trace_entry,
    update_objects,
)
from compax.composites.base import Composite
from compax.encoding import Encoded
from compax.errors import CaptureError, DeclarationError, SignatureError, VerificationError
from compax.placement import DEVICE, Placement, spread
from compax.sources import Arrays

if TYPE_CHECKING:
    from compax.analysis.cost import Cost
    from compax.drawing import Drawing
    from compax.meaning import Declaration, Meaning
    from compax.target import Target
    from compax.transform import PassRecord

GraphKey = tuple[str, Signature]
Result = tuple[Any, Arrays, Arrays]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What passes transform. Immutable, and a pytree whose leaves are the parameters and the state.

    Attributes:
        params: parameters by path: arrays, shapes (`jax.ShapeDtypeStruct`), or encodings.
        state: other variables by path: statistics, random number counters, caches that the model owns.
        graphs: a graph for each entry and signature.
        entries: ways to call the model; the first is the default.
        frozen: paths of parameters that get no gradient and no optimizer state.
        history: what each pass did, in order.
        name: what the program is called in print.
        declared: what a person said of it, beyond what the analyses find.
        origin: shapes of the parameters and the state that the model has, where a pass stores others in their place.
        placement: where parameters and the optimizer's state live.
    """

    params: Arrays
    state: Arrays
    graphs: Mapping[GraphKey, Captured]
    entries: Mapping[str, Entry]
    frozen: frozenset[str] = frozenset()
    history: tuple["PassRecord", ...] = ()
    name: str = "program"
    declared: tuple["Declaration", ...] = ()
    origin: tuple[Arrays, Arrays] | None = None
    placement: Placement = dataclasses.field(default_factory=Placement)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def replace(self, **changes: Any) -> "Program":
        """A program with some attributes replaced. What was compiled stays valid when only arrays change."""
        if set(changes) - {"params", "state"}:
            changes.setdefault("memo", {})
        return dataclasses.replace(self, **changes)

    def restructured(self, **changes: Any) -> "Program":
        """A program that stores other parameters or state than the model has: new signatures are captured with those.

        A pass that does so replays its graph half (`Pass.rewrite`) on what is captured.
        """
        own = (dict(map(_logical, self.params.items())), dict(map(_logical, self.state.items())))
        return self.replace(origin=self.origin or own, **changes)

    def place(self, devices: "Mesh | Sequence[Any] | None" = None) -> "Program":
        """The program with its arrays where its placement wants them.

        Args:
            devices: a mesh, or devices to lay the placement's mesh over; by default all of JAX's.

        Raises:
            PlacementError: the program is laid over no mesh or another one, or there are too few devices.
        """
        placement = self.placement.over(self.placement.mesh_over(devices))
        wanted = placement.shardings(self.params), placement.place(PartitionSpec(), DEVICE)
        params, state = spread((dict(self.params), dict(self.state)), wanted)
        return self.replace(params=params, state=state, placement=placement)

    # -- calling ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, entry: str | None = None, **kwargs: Any) -> Any:
        """The output for given inputs with the program's own parameters and state; changes of state are not kept.

        Compiled once for each signature. NNX objects among the inputs are updated in place.
        """
        chosen, arguments = self._arguments(entry, args, kwargs)
        captured = self.graph(chosen.name, arguments)
        function = lambda params, state, arrays: self._flat(captured, params, state, arrays)  # noqa: E731
        compiled = self._once(("jit", chosen.name, arguments.signature), lambda: jax.jit(function))
        return self._finish(captured, arguments, compiled(self.params, self.state, arguments.arrays))[0]

    def apply(self, params: Arrays, state: Arrays, *args: Any, entry: str | None = None, **kwargs: Any) -> Result:
        """The program as a pure function, for `jax.jit`, `jax.grad`, `jax.vmap` and the rest.

        Args:
            params: parameters by path, as in `Program.params`.
            state: state by path.
            *args: the inputs of the entry.
            entry: which entry; the first one by default.
            **kwargs: inputs by name.

        Returns:
            The output, the state after the call, and values that first appear in the call (`aux`), by path.

        Raises:
            SignatureError: the inputs, or the parameters, do not fit.
        """
        chosen, arguments = self._arguments(entry, args, kwargs)
        captured = self.graph(chosen.name, arguments)
        check_store(self.name, "parameters", params, self.params)
        check_store(self.name, "state", state, self.state)
        output, updates, aux = self._finish(captured, arguments, self._flat(captured, params, state, arguments.arrays))
        return output, {**state, **updates}, aux

    def _flat(self, captured: Captured, params: Arrays, state: Arrays, arrays: Sequence[Any]) -> list[Any]:
        return explicit.on_auto_axes(self._evaluated, captured, self.placement, params, state, tuple(arrays))

    def _evaluated(self, captured: Captured, params: Arrays, state: Arrays, arrays: Sequence[Any]) -> list[Any]:
        names, params = iter(arrays), self.placement.moved(params, home=False)
        values = []
        for tag in captured.inputs:
            if tag.kind == "parameter":
                value = params[tag.path]
                values.append(jax.lax.stop_gradient(value) if tag.path in self.frozen else value)
            else:
                values.append(state[tag.path] if tag.kind == "state" else next(names))
        return lowering.evaluate(captured.graph, values)

    @staticmethod
    def _finish(captured: Captured, arguments: Arguments, flat: Sequence[Any]) -> Result:
        count = sum(not isinstance(leaf, Static) for leaf in captured.output_leaves)
        leaves = [leaf.value if isinstance(leaf, Static) else flat[leaf] for leaf in captured.output_leaves]
        rest = iter(flat[count:])
        updates = {path: next(rest) for path in captured.updates}
        aux = {
            path: jax.tree.unflatten(tree, [next(rest) for _ in range(tree.num_leaves)]) for path, tree in captured.aux
        }
        if arguments.objects:
            update_objects(arguments.objects, list(rest))
        return jax.tree.unflatten(captured.output_tree, leaves), updates, aux

    def _arguments(self, entry: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Entry, Arguments]:
        chosen = self.entry(entry)
        return chosen, explicit.untyped(take_apart(chosen, args, kwargs), self.placement)

    def entry(self, name: str | None = None) -> Entry:
        """An entry by name; the first one by default."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            raise SignatureError(f"no entry '{name}'; this program has: {', '.join(self.entries)}")
        return self.entries[name]

    # -- graphs -------------------------------------------------------------------------------------------------

    def graph(self, entry: str | None = None, arguments: Arguments | None = None) -> Captured:
        """The graph of an entry: for given arguments, or the first one captured.

        A signature that was not met before is captured then, and the passes in the history are replayed on it.
        """
        name = self.entry(entry).name
        if arguments is None:
            return next(captured for (owner, _), captured in self.graphs.items() if owner == name)
        key = (name, arguments.signature)
        if (found := self.graphs.get(key)) is not None:
            return found
        with explicit.tracing(arguments.signature.mesh):
            return self._once(key, lambda: self._replay(self._trace(self.entry(name), arguments)))

    def _trace(self, entry: Entry, arguments: Arguments) -> Captured:
        params, state = self.origin or (dict(map(_logical, self.params.items())), self.state)
        captured, closed_over = trace_entry(entry, arguments, params, state)
        if unknown := closed_over.keys() - params.keys():
            raise CaptureError(
                f"with these inputs the function closes over another array than before ({min(unknown)}); pass it among "
                "the parameters"
            )
        return captured

    def _replay(self, captured: Captured) -> Captured:
        for record in self.history:
            captured = record.pass_.rewrite(captured, record.decisions)
        if self.origin is not None and (misfit := self._misfit(captured)):
            raise SignatureError(
                f"these inputs need a new graph, and {misfit}: the program was restructured outside of a pass; capture "
                "the model with all inputs that it has to take first, or restructure it by a pass, which is replayed"
            )
        return captured

    def specialize(self, *args: Any, entry: str | None = None, **kwargs: Any) -> "Program":
        """A program with a graph for these inputs too, made by capturing again and replaying every pass."""
        chosen, arguments = self._arguments(entry, args, kwargs)
        captured = self.graph(chosen.name, arguments)
        return self.replace(graphs={**self.graphs, (chosen.name, arguments.signature): captured})

    def with_entry(
        self,
        name: str,
        *args: Any,
        method: Any = None,
        mode: str | None = None,
        loss: Callable[..., Any] | None = None,
        constant: Sequence[str] = (),
        static: Sequence[str] = (),
        mutable: Any = False,
        **kwargs: Any,
    ) -> "Program":
        """A program with one more way to call the same model, over the same parameters and state.

        Args:
            name: the entry's name.
            *args: example inputs.
            method: the method to capture.
            mode: "train" or "eval" for NNX modules; by default as the model was given.
            loss: captured in place of the call.
            constant: names of arguments whose values become part of the graph.
            static: names of arguments that are passed on as they are.
            mutable: collections that a Linen module may write.
            **kwargs: example inputs by name.

        Raises:
            CaptureError: the name is taken, or the model cannot be called so.
        """
        if name in self.entries:
            raise CaptureError(f"the program has an entry '{name}' already")
        first = self.entry()
        check_mode(mode)
        source = first.source.variant(method=method, mode=mode, loss=loss, mutable=mutable)
        entry = Entry(name, source, mode, tuple(constant), tuple(static))
        arguments = take_apart(entry, args, kwargs)
        captured = self._replay(self._trace(entry, arguments))
        return self.replace(
            entries={**self.entries, name: entry}, graphs={**self.graphs, (name, arguments.signature): captured}
        )

    # -- parameters ---------------------------------------------------------------------------------------------

    def partition(self) -> tuple[Arrays, Arrays]:
        """Parameters that get gradients (floating arrays and simulated encodings, unless frozen), and the rest."""
        trainable = {path: x for path, x in self.params.items() if path not in self.frozen and _differentiable(x)}
        return trainable, {path: x for path, x in self.params.items() if path not in trainable}

    def decode(self, paths: str | Iterable[str] | None = None) -> "Program":
        """A program whose encoded parameters (or those at `paths`) are dense arrays again."""
        chosen = set(self.params) if paths is None else {paths} if isinstance(paths, str) else set(paths)
        if unknown := chosen - self.params.keys():
            raise SignatureError(f"no parameter '{sorted(unknown)[0]}' in the program '{self.name}'")
        return self.replace(
            params={p: x.decode() if p in chosen and isinstance(x, Encoded) else x for p, x in self.params.items()}
        )

    def sites(self, entry: str | None = None) -> tuple["raising.Site", ...]:
        """The composites of an entry's graph, by call path."""
        captured = self.graph(entry)
        return self._once(("sites", id(captured)), lambda: raising.find_sites(captured))

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def meaning(self, entry: str | None = None) -> "Meaning":
        """What an entry's graph means: attentions, norms, feed-forwards, experts, axes, and what remains open."""
        from compax.meaning import Meaning

        captured = self.graph(entry)
        return self._once(("meaning", id(captured)), lambda: Meaning(captured, self.declared))

    def composites(self, entry: str | None = None) -> tuple[Composite, ...]:
        """The composites of several operations in an entry's graph, in order of evaluation."""
        return self.meaning(entry).composites

    def axes(self, entry: str | None = None) -> tuple[Axis, ...]:
        """The axes that the parameters and arguments of an entry have, with their names."""
        return self.meaning(entry).axes

    def draw(self, entry: str | None = None) -> "Drawing":
        """An entry as a picture: composites on their residual streams. Shows itself in a notebook; `save` writes it."""
        from compax.drawing import draw

        return draw(self, entry)

    def declare(
        self, *, at: str | None = None, axis: str | None = None, kind: str | None = None, mask: str | None = None
    ) -> "Program":
        """A program of which a person says what its graph does not tell, or tells wrongly.

        `program.meaning().questions` lists where that is needed.

        Args:
            at: a selector of composites, with `mask` or `kind`.
            axis: the name of an axis, with `kind`.
            kind: for composites "none": they are not what they were taken for. For an axis a name such as "batch", or
                "fixed" (its indices stay where they are), or "free" (they may move).
            mask: for attentions "full", "causal" or "window N", in place of what the analysis found or did not find.
                Padding stays as it was found.

        Raises:
            DeclarationError: there is no such composite or axis, or the words are none that are known.
        """
        from compax.meaning import Declaration

        given = Declaration(at, axis, kind, mask)
        if (at is None) == (axis is None):
            raise DeclarationError("declare either at=... (composites) or axis=..., not both")
        if at is not None and (kind is None) == (mask is None):
            raise DeclarationError(f"declare(at='{at}'): say either mask=... or kind='none'")
        if at is not None and kind not in (None, "none"):
            raise DeclarationError(
                f"declare(at='{at}', kind='{kind}'): the one kind to declare of composites is 'none'"
            )
        if axis is not None and (kind is None or mask is not None):
            raise DeclarationError(f"declare(axis='{axis}'): say kind=..., such as 'batch', 'fixed' or 'free'")
        program = self.replace(declared=(*self.declared, given))
        program.meaning()
        return program

    def coverage(self, entry: str | None = None) -> covering.Coverage:
        """What share of the work and of the parameters is in composites, and what is unpacked on the way."""
        return covering.coverage(self, entry)

    def cost(self, target: "Target | str | None" = None, entry: str | None = None) -> "Cost":
        """What one call of an entry computes and moves as it is lowered, and the least time it takes on a target."""
        from compax.analysis.program_cost import program_cost

        return program_cost(self, target, entry)

    def to_module(self, entry: str | None = None) -> module.ProgramModule:
        """An `nnx.Module` that runs an entry, for `nnx.Optimizer`, `nnx.jit` and what else takes modules.

        Trainable parameters are `nnx.Param`; frozen and stored ones are other kinds of variables. State is updated in
        place by each call.
        """
        return module.to_module(self, entry)

    def __str__(self) -> str:
        return program_text.program_text(self)

    def check(self) -> None:
        """Raises `VerificationError` if a graph needs a parameter that the store lacks or holds in another shape."""
        for captured in self.graphs.values():
            if misfit := self._misfit(captured):
                raise VerificationError(misfit)

    def _misfit(self, captured: Captured) -> str:
        """What a graph needs and the store does not hold so, or an empty string."""
        for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True):
            store = {"parameter": self.params, "state": self.state}.get(tag.kind)
            if store is None:
                continue
            what, graph = f"the {tag.kind} '{tag.path}'", f"the graph '{captured.entry.name}'"
            if tag.path not in store:
                return f"{graph} reads {what}, which the program does not have"
            x = store[tag.path]
            if tuple(x.shape) != value.shape or x.dtype != value.dtype:
                return f"{what} is {x.dtype}{list(x.shape)}, but {graph} takes {value.dtype}{list(value.shape)}"
        return ""


def _logical(item: tuple[str, Any]) -> tuple[str, Any]:
    path, x = item
    return path, jax.ShapeDtypeStruct(x.shape, x.dtype)


def _differentiable(x: Any) -> bool:
    if isinstance(x, Encoded):
        return x.trainable
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.complexfloating)


def _flatten(program: Program) -> tuple[tuple[Arrays, Arrays], Any]:
    skeleton = _Skeleton(
        program.graphs,
        program.entries,
        program.frozen,
        program.history,
        program.name,
        program.declared,
        program.origin,
        program.placement,
        program.memo,
    )
    return (program.params, program.state), skeleton


@dataclasses.dataclass(frozen=True, eq=False)
class _Skeleton:
    """Everything of a program but its arrays; equal when the graphs, frozen paths and history are the same objects."""

    graphs: Mapping[GraphKey, Captured]
    entries: Mapping[str, Entry]
    frozen: frozenset[str]
    history: tuple["PassRecord", ...]
    name: str
    declared: tuple["Declaration", ...]
    origin: tuple[Arrays, Arrays] | None
    placement: Placement
    memo: dict[Any, Any]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Skeleton)
            and self.graphs is other.graphs
            and self.entries is other.entries
            and self.frozen == other.frozen
            and self.history is other.history
            and self.declared == other.declared
            and self.origin is other.origin
            and self.placement == other.placement
        )

    def __hash__(self) -> int:
        return hash((id(self.graphs), id(self.history), self.frozen))


def _unflatten(skeleton: _Skeleton, children: tuple[Arrays, Arrays]) -> Program:
    params, state = children
    return Program(params=params, state=state, **vars(skeleton))


jax.tree_util.register_pytree_node(Program, _flatten, _unflatten)


def capture(
    model: Any,
    *args: Any,
    method: Any = None,
    mode: str | None = None,
    loss: Callable[..., Any] | None = None,
    constant: Sequence[str] = (),
    static: Sequence[str] = (),
    variables: Any = None,
    mutable: Any = False,
    name: str | None = None,
    entry: str = "call",
    **kwargs: Any,
) -> Program:
    """Captures a model as a program. The model is read, never changed.

    Args:
        model: an `nnx.Module`, a Linen module (with `variables`), or a function `fn(params, *inputs)`.
        *args: example inputs: arrays, `jax.ShapeDtypeStruct`, any pytrees of them, NNX objects (a cache that the call
            updates in place), and static values. Python numbers are traced, as in `jax.jit`; booleans, strings and
            other values that are no arrays are static.
        method: the method to capture; by default the module is called.
        mode: "train" or "eval" for NNX modules: a copy is switched.
        loss: `loss(model, *inputs)`, captured in place of the call; may return `(loss, metrics)`.
        constant: names of arguments whose values become part of the graph.
        static: names of arguments that are passed on as they are.
        variables: a Linen module's variables; `params` and all other collections.
        mutable: collections that a Linen module may write, as in `module.apply`.
        name: what the program is called in print.
        entry: the name of this entry.
        **kwargs: example inputs by name; for Linen also `rngs`. Arguments of the model that are called like an option
            above are passed by position.

    Returns:
        The program. Parameters that are `jax.ShapeDtypeStruct` stay so: nothing needs memory.

    Raises:
        CaptureError: the model cannot be captured; says why.
    """
    source, params, state, rest = make_source(
        model, args, method=method, mode=mode, loss=loss, variables=variables, mutable=mutable
    )
    chosen = Entry(entry, source, mode, tuple(constant), tuple(static))
    arguments = take_apart(chosen, rest, kwargs)
    captured, closed_over = trace_entry(chosen, arguments, params, state)
    store = {path: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x) for path, x in params.items()}
    title = name or getattr(getattr(model, "func", model), "__name__", None) or type(model).__name__
    return Program(
        params={**store, **closed_over},
        state=state,
        graphs={(entry, arguments.signature): captured},
        entries={entry: chosen},
        name=title.lower() if title.isidentifier() else "program",
    )
