"""A graph at other sizes: every operation again, on what is kept of its operands.

Operations are taken over in order, bodies included. Most compute whatever shapes they get; those whose parameters carry
sizes get new ones by the rules of `compax.rewrites.resizing_rules`. A table (constants, repetitions, random draws)
stays whole until an operation reads it as something of which indices are kept: they are gathered there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax, ir
from compax.analysis.normal import Node, Val
from compax.errors import RewriteError
from compax.ir import Graph, Literal, Op, Operand, Path, Value
from compax.rewrites.narrowing import Dims, Narrowing, new_shape, same, signature, spelled


@dataclasses.dataclass(eq=False)
class Held:
    """An operand of the new graph.

    Attributes:
        dims: what it has of each dimension.
        operand: the value or literal; none if nothing needs it, or it is dropped.
        array: its array, for a constant.
        repeat: makes it again in another shape, and the dimensions that may change so: it is repeated along them.
        dropped: whether it belongs to an index that is not kept.
    """

    dims: Dims
    operand: Operand | None = None
    array: np.ndarray | None = None
    repeat: tuple[Callable[[tuple[int, ...]], Value], frozenset[int]] | None = None
    dropped: bool = False

    @property
    def changed(self) -> bool:
        """Whether it is not what it was."""
        return self.operand is None or any(kept is not None for kept in self.dims)


def whole(x: Operand) -> Dims:
    """All of every dimension."""
    return (None,) * len(x.shape)


class Resizer:
    """Takes graphs over; a body that serves several operations, and changes alike for them, stays one.

    Attributes:
        narrowing: what is kept.
        depth: how many derivative rules the graph is inside of.
        graphs: graphs that were made, by the graph they come from and all that changed in it.
        functions: operations with a derivative rule that were made, as graphs.
    """

    def __init__(self, narrowing: Narrowing, depth: int = 0):
        self.narrowing = narrowing
        self.depth = depth
        self.graphs: dict[Any, tuple[Graph, Graph]] = {}
        self.functions: dict[Any, tuple[Any, ...]] = {}

    def run(self, given: Sequence[Dims] | None = None, wanted: Sequence[Dims] | None = None) -> Graph:
        """The whole graph.

        Args:
            given: what inputs have of their dimensions; by default what is kept of them.
            wanted: what outputs have to have, likewise.
        """
        normal = self.narrowing.normal
        kept = [self.narrowing.dims(x) for x in normal.inputs]
        outputs = wanted or [
            self.narrowing.dims(x if state is None else state)
            for x, state in zip(normal.outputs, normal.updated, strict=True)
        ]
        frame = Frame(self, self.narrowing.captured.graph, (), None)
        return frame.run(given or kept, outputs, kept)[0]


class Frame:
    """Takes over one graph at one call path.

    Attributes:
        resizer: what all frames share.
        narrowing: what is kept.
        graph: the graph as it was.
        vals: what its values are in the normal form.
        beside: a recorded equation, for the settings of operations that are new.
        ops: the new operations.
        log: what was done, equal for frames that made the same of a graph.
    """

    def __init__(self, resizer: Resizer, graph: Graph, prefix: Path, beside: _jax.Equation | None):
        self.resizer = resizer
        self.narrowing = resizer.narrowing
        self.graph = graph
        self.prefix = prefix
        self.vals = self.narrowing.normal.frames[prefix]
        self.beside = beside
        self.ops: list[Op] = []
        self.log: list[Any] = []
        self._env: dict[Value, Held] = {}
        self._constants: dict[Value, Any] = {}
        self._numbers: dict[Value, int] = {}
        self._adapted: dict[Any, tuple[Held, Held]] = {}
        self._spare: set[int] = set()

    def run(
        self, given: Sequence[Dims], wanted: Sequence[Dims | None], kept: Sequence[Dims] | None = None
    ) -> tuple[Graph, list[Held]]:
        """The graph at other sizes.

        Args:
            given: what each input has of its dimensions.
            wanted: what each output has to have; `None`: whatever comes out.
            kept: what the graph is to go on with, if inputs have more.

        Returns:
            The new graph, the one that was given if nothing changes; and what each output is. One that nothing needs is
            zeros.
        """
        graph = self.graph
        values = [self.resized(value, dims) for value, dims in zip(graph.inputs, given, strict=True)]
        for new in values:
            self._number(new)
        for i, (old, new) in enumerate(zip(graph.inputs, values, strict=True)):
            held = Held(given[i], new)
            self._env[old] = held if kept is None else self.adapt(held, kept[i], old)
        for value, array in graph.constants:
            concrete = not jnp.issubdtype(value.dtype, jax.dtypes.extended)
            self._env[value] = Held(whole(value), value, np.asarray(array) if concrete else None)
            self._constants[value] = array
            self._number(value)
        for position, op in enumerate(graph.ops):
            self.beside = op.equation or self.beside
            self._operation(op, (*self.prefix, (position, -1)))
        held = [self._leave(x, dims) for x, dims in zip(graph.outputs, wanted, strict=True)]
        outputs = [x.operand for x in held]
        self.log.append(("out", *map(self._mark, outputs), *(x.dropped for x in held)))
        self.log.append(("in", *(v.shape for v in values)))
        return self._finish(values, [x for x in outputs if x is not None]), held

    def _leave(self, x: Operand, wanted: Dims | None) -> Held:
        """An output: zeros where nothing needs it, since callers expect some value."""
        held = self.read(x)
        alive = isinstance(x, Literal) or self.narrowing.alive(self.vals[x])
        if held.operand is not None and (wanted is None or all(map(same, held.dims, wanted))):
            return held
        if held.operand is not None and alive:
            assert wanted is not None
            return self.adapt(held, wanted, x)
        dims = wanted or whole(x)
        return dataclasses.replace(self.zeros(x, dims), dropped=held.dropped)

    def _finish(self, values: list[Value], outputs: list[Operand]) -> Graph:
        graph = self.graph
        if self._spare:
            read = {x for op in self.ops for x in op.inputs} | set(outputs)
            self.ops = [op for op in self.ops if id(op) not in self._spare or any(v in read for v in op.outputs)]
        new, old = (*values, *self.ops, *outputs), (*graph.inputs, *graph.ops, *graph.outputs)
        if len(new) == len(old) and all(x is y for x, y in zip(new, old, strict=True)):
            return graph
        key = (id(graph), tuple(self.log))
        if key not in self.resizer.graphs:
            read = {x for op in self.ops for x in op.inputs} | set(outputs)
            constants = tuple((value, array) for value, array in self._constants.items() if value in read)
            result = Graph(tuple(values), tuple(self.ops), tuple(outputs), constants)
            self.resizer.graphs[key] = (result, graph)
        return self.resizer.graphs[key][0]

    # -- one operation ------------------------------------------------------------------------------------------------

    def read(self, x: Operand) -> Held:
        """What stands for an operand of the old graph."""
        return Held(whole(x), x, np.asarray(x.value)) if isinstance(x, Literal) else self._env[x]

    def val(self, x: Operand) -> Val | None:
        """What an operand is in the normal form."""
        return None if isinstance(x, Literal) else self.vals[x]

    def _operation(self, op: Op, path: Path) -> None:
        from compax.rewrites import resizing_bodies

        operands = [self.read(x) for x in op.inputs]
        outputs = [self.vals[value] for value in op.outputs]
        inputs = list(map(self.val, op.inputs))
        if self._is_dropped(op, operands):
            results = [Held(whole(value), dropped=True) for value in op.outputs]
        elif not any(map(self.narrowing.alive, outputs)):
            results = self._unneeded(op, operands)
        elif not op.bodies and all(x in inputs for x in outputs):
            results = self._copied(op, operands, [inputs.index(x) for x in outputs])
        elif op.bodies and (handler := resizing_bodies.handler(op)) is not None:
            results = handler(self, op, operands, path)
        elif op.name == "dot_general" and not op.attributes["dimension_numbers"][0][0]:
            results = self._plain(op, self._factors(op, operands))
        else:
            node = outputs[0].node
            assert node is not None
            assert len(node.inputs) == len(operands), f"'{op.name}' has no node of its own"
            results = self._plain(op, [self._used(node, i, x, op.inputs[i]) for i, x in enumerate(operands)])
        self._env.update(zip(op.outputs, results, strict=True))

    def _is_dropped(self, op: Op, operands: Sequence[Held]) -> bool:
        """Whether an operation computes something for an index that is not kept. A sum loses such terms."""
        if op.outputs and op.name != "unstack" and not op.bodies and self.is_dropped(op.outputs[0]):
            return True
        dropped = [x.dropped for x in operands]
        if not any(dropped) or op.name in ("stack", "concatenate"):
            return False
        return all(dropped) or op.name not in ("add", "add_any")

    def is_dropped(self, x: Value) -> bool:
        """Whether a value belongs to an index that is not kept."""
        member = self.narrowing.engine.members.get(self.vals[x])
        kept = None if member is None else self.narrowing.kept(member[0])
        return member is not None and kept is not None and member[1] not in kept

    def _unneeded(self, op: Op, operands: Sequence[Held]) -> list[Held]:
        """What no output needs stays if its operands do; if not, it goes."""
        if not any(x.changed for x in operands):
            return self.emit(op, [self.there(op, x) for x in operands], list(map(whole, op.outputs)))
        if _jax.has_effects(op.equation):
            raise RewriteError(f"{self.place(op)} has effects and reads an axis that changes; capture without it")
        return [Held(whole(value)) for value in op.outputs]

    def _copied(self, op: Op, operands: Sequence[Held], sources: Sequence[int]) -> list[Held]:
        """An operation that hands some of its operands on: as it was, or only that where other operands do not fit."""
        if op.name == "optimization_barrier":
            given = [
                self.zeros(old, whole(old)) if x.operand is None else x
                for x, old in zip(operands, op.inputs, strict=True)
            ]
            return self.emit(op, [self.there(op, x) for x in given], [x.dims for x in given])
        if len(operands) == 1 or not any(x.changed for x in operands):
            return self._plain(op, operands)
        held, (output,) = operands[sources[0]], op.outputs
        if held.operand is None or held.operand.dtype == output.dtype:
            return [held]
        (value,) = self.trace(lambda x: jax.lax.convert_element_type(x, output.dtype), held.operand)
        return [Held(held.dims, value)]

    def _plain(self, op: Op, operands: Sequence[Held]) -> list[Held]:
        """An operation without bodies of its own."""
        from compax.rewrites.resizing_rules import RULES

        wanted = [self.narrowing.dims(self.vals[value]) for value in op.outputs]
        rule = RULES.get(op.name)
        results = None if rule is None else rule(self, op, operands, wanted)
        if results is None:
            results = self.emit(op, [self.there(op, x) for x in operands], wanted)
        return [
            x if x.dropped else self.adapt(x, dims, value)
            for x, dims, value in zip(results, wanted, op.outputs, strict=True)
        ]

    def there(self, op: Op, x: Held) -> Operand:
        """The operand, which has to be there."""
        if x.operand is None:
            raise RewriteError(f"{self.place(op)} needs what belongs to indices that are not kept; keep them")
        return x.operand

    def place(self, op: Op) -> str:
        """An operation and where the model's code asked for it."""
        equation = op.equation or self.beside
        return f"'{op.name}'" if equation is None else f"'{op.name}' ({_jax.source_text(equation)})"

    def _used(self, node: Node, position: int, x: Held, old: Operand) -> Held:
        """An operand as its operation reads it."""
        use = self.narrowing.engine.uses.get((node.number, position))
        if use is None or x.operand is None:
            return x
        positional = (node.number, position) in self.narrowing.engine.positional
        return self.adapt(x, self._use_dims(use, x, old), old, positional=positional)

    def _use_dims(self, use: Sequence[Any], x: Held, old: Operand) -> Dims:
        dims = zip(use, old.shape, x.dims, strict=True)
        return tuple(self.narrowing.kept(factors) if factors or size == 1 else kept for factors, size, kept in dims)

    def _factors(self, op: Op, operands: Sequence[Held]) -> list[Held]:
        """Operands of a product without a contraction, which the normal form broadcasts first."""
        product = self.vals[op.outputs[0]].node
        assert product is not None
        assert product.name == "mul"
        results: list[Held] = []
        for side, x in enumerate(operands):
            use = self.narrowing.engine.uses.get((product.number, side))
            broadcast = product.inputs[side].node
            if use is not None and broadcast is not None and x.operand is not None:
                own = [use[dim] for dim in broadcast.attributes["broadcast_dimensions"]]
                x = self.adapt(x, self._use_dims(own, x, op.inputs[side]), op.inputs[side])
            results.append(x)
        return results

    # -- making operations --------------------------------------------------------------------------------------------

    def resized(self, value: Value, dims: Dims) -> Value:
        """A value of which some indices are kept; the very same one if its shape does not change."""
        shape = new_shape(value.shape, dims)
        return value if shape == value.shape else Value(_jax.with_shape(value.aval, shape))

    def emit(
        self,
        op: Op,
        inputs: Sequence[Operand],
        dims: Sequence[Dims],
        parameters: Mapping[str, Any] | None = None,
        *,
        values: Sequence[Value] | None = None,
        bodies: tuple[Graph, ...] | None = None,
    ) -> list[Held]:
        """Appends an operation with other operands; the very same one if nothing differs.

        Args:
            op: the operation as it was.
            inputs: its operands now.
            dims: what its outputs have of their dimensions.
            parameters: its parameters that may differ.
            values: the outputs that it has now, if not all.
            bodies: its bodies, if they may differ.
        """
        old = op.outputs if values is None else values
        outputs = [self.resized(value, each) for value, each in zip(old, dims, strict=True)]
        recorded = {} if op.equation is None else op.equation.params
        changed = {k: v for k, v in (parameters or {}).items() if recorded[k] != v}
        bodies = op.bodies if bodies is None else bodies
        again = any(x is not y for x, y in zip(bodies, op.bodies, strict=True))
        if again and op.equation is not None and op.name not in _jax.ENTERABLE:
            raise RewriteError(f"{self.place(op)} reads an axis that changes, and can only run as it was recorded")
        before = [x.shape for x in (*op.inputs, *op.outputs)]
        if changed or [x.shape for x in (*inputs, *outputs)] != before:
            op = self._retyped(op, changed, inputs, outputs) if op.imported and not again else op
        elif not again and all(x is y for x, y in zip((*inputs, *outputs), (*op.inputs, *op.outputs), strict=True)):
            self._append(op, ())
            return [Held(each, value) for each, value in zip(dims, outputs, strict=True)]
        self._append(
            dataclasses.replace(op, inputs=tuple(inputs), outputs=tuple(outputs), bodies=bodies),
            (repr(changed), *map(id, bodies)),
        )
        return [Held(each, value) for each, value in zip(dims, outputs, strict=True)]

    @staticmethod
    def _retyped(op: Op, changed: Mapping[str, Any], inputs: Sequence[Operand], outputs: Sequence[Value]) -> Op:
        assert op.equation is not None
        parameters = {**op.equation.params, **changed}
        equation = _jax.retyped(op.equation, parameters, [x.aval for x in inputs], [v.aval for v in outputs])
        return dataclasses.replace(op, equation=equation, attributes=_jax.split_parameters(equation)[0])

    def _append(self, op: Op, note: tuple[Any, ...]) -> None:
        self.ops.append(op)
        self.log.append((op.name, *map(self._mark, op.inputs), *note, *(v.shape for v in op.outputs)))
        for value in op.outputs:
            self._number(value)

    def _number(self, value: Value) -> None:
        self._numbers[value] = len(self._numbers)

    def _mark(self, x: Operand | None) -> Any:
        """What stands for an operand in the log."""
        if isinstance(x, Literal):
            return (str(x.dtype), np.asarray(x.value).tobytes())
        return None if x is None else self._numbers[x]

    def trace(self, function: Callable[..., Any], *operands: Operand) -> list[Value]:
        """Appends what a JAX function does; as if it was written beside the operation that is being taken over."""
        avals = [x.aval for x in operands]
        if self.beside is None:
            return self.splice(ir.trace(function, *avals), operands)
        with _jax.recorded_context(self.beside):
            graph = ir.trace(function, *avals)
        return self.splice(graph, operands)

    def again(self, op: Op, inputs: Sequence[Operand], value: Value, shape: Sequence[int]) -> Value:
        """Appends a repetition once more, to another shape; the first one goes if nothing reads it."""
        self._spare.add(id(op))
        output = Value(_jax.with_shape(value.aval, shape))
        made = self._retyped(op, {"shape": tuple(shape)}, inputs, [output])
        self._append(dataclasses.replace(made, inputs=tuple(inputs), outputs=(output,)), ())
        return output

    def splice(self, graph: Graph, operands: Sequence[Operand]) -> list[Value]:
        """Appends the operations of a graph."""
        env: dict[Value, Operand] = dict(zip(graph.inputs, operands, strict=True))
        for value, array in graph.constants:
            env[value] = self._constant(array, value.aval)
        for op in graph.ops:
            outputs = [Value(value.aval) for value in op.outputs]
            env.update(zip(op.outputs, outputs, strict=True))
            inputs = tuple(env[x] if isinstance(x, Value) else x for x in op.inputs)
            self._append(
                dataclasses.replace(op, inputs=inputs, outputs=tuple(outputs)),
                (id(op.equation) if op.bodies else repr(op.attributes),),
            )
        results = [env[x] for x in graph.outputs if isinstance(x, Value)]
        assert len(results) == len(graph.outputs)
        return [x for x in results if isinstance(x, Value)]

    def _constant(self, array: Any, aval: _jax.AbstractValue) -> Value:
        value = Value(aval)
        self._constants[value] = array
        self.log.append((str(array.dtype), np.asarray(array).tobytes()))
        self._number(value)
        return value

    def zeros(self, like: Operand, dims: Dims) -> Held:
        """Zeros in place of what nothing needs."""
        shape, dtype = new_shape(like.shape, dims), like.dtype
        (value,) = self.trace(lambda: jax.lax.full(shape, 0, dtype))
        return Held(dims, value)

    # -- what operands have of their dimensions -----------------------------------------------------------------------

    def adapt(self, x: Held, dims: Dims, old: Operand, *, positional: bool = False) -> Held:
        """An operand that has other indices of its dimensions.

        Args:
            x: the operand.
            dims: what it has to have.
            old: the operand as it was.
            positional: whether a dimension that counts positions counts fewer now.
        """
        if x.operand is None or all(map(same, x.dims, dims)):
            return x
        key = (id(x), signature(dims), positional)
        if key not in self._adapted:
            self._adapted[key] = (self._adapt(x, dims, old, positional), x)
        return self._adapted[key][0]

    def _adapt(self, x: Held, dims: Dims, old: Operand, positional: bool) -> Held:
        if x.repeat is not None:
            make, repeated = x.repeat
            chosen = tuple(dims[i] if i in repeated else kept for i, kept in enumerate(x.dims))
            if not all(map(same, chosen, x.dims)):
                x = Held(chosen, make(new_shape(old.shape, chosen)))
        positions: dict[int, np.ndarray] = {}
        for i, (has, wants) in enumerate(zip(x.dims, dims, strict=True)):
            if same(has, wants):
                continue
            target = spelled(wants, old.shape[i])
            if positional and has is None:
                positions[i] = np.arange(len(target))
            else:
                positions[i] = self.positions(spelled(has, old.shape[i]), target, old.shape[i])
        if not positions:
            return x
        operand = x.operand
        assert operand is not None
        if x.array is not None:
            array = x.array
            for axis, chosen in positions.items():
                array = np.take(array, chosen, axis)
            return Held(dims, self._constant(array, _jax.with_shape(operand.aval, array.shape)), array)
        (value,) = self.trace(lambda y: take(y, positions), operand)
        return Held(dims, value)

    def positions(self, has: np.ndarray, wants: np.ndarray, size: int) -> np.ndarray:
        """Where indices are among those that there are."""
        where = np.full(size, -1)
        where[has] = np.arange(len(has))
        found = where[wants]
        if (found < 0).any():
            beside = "" if self.beside is None else f" ({_jax.source_text(self.beside)})"
            raise RewriteError(
                f"a dimension of size {size}{beside} keeps {len(has)} indices, and is read there at others; the axis "
                "cannot be followed through this operation: keep all of its indices"
            )
        return found


def take(x: jax.Array, positions: Mapping[int, np.ndarray]) -> jax.Array:
    """Some indices of some dimensions; a slice, where they are in a row."""
    for axis, chosen in positions.items():
        if (np.diff(chosen) == 1).all():
            x = jax.lax.slice_in_dim(x, int(chosen[0]), int(chosen[-1]) + 1, axis=axis)
            continue
        others = tuple(i for i in range(x.ndim) if i != axis)
        sizes = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
        numbers = jax.lax.GatherDimensionNumbers(others, (axis,), (axis,))
        indices = np.asarray(chosen, np.int32)[:, None]
        x = jax.lax.gather(x, indices, numbers, sizes, unique_indices=True, mode="promise_in_bounds")
    return x
