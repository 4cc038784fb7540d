"""Lowering: from a graph to an ordinary JAX function.

Operations are bound as JAX recorded them. Where an operand is encoded, a rule for (operation, encoding, platform) says
how to compute without unpacking; layout operations rearrange the encoding; operations with bodies are rebuilt with the
encoding passing through. Only what is left is unpacked first, and that is logged.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax

from compax import _jax, higher_order
from compax.constraint import CONSTRAIN, constrain
from compax.encoding import Encoded
from compax.errors import LoweringError
from compax.ir import Graph, Literal, Op, Operand, Value

Rule = Callable[["Call"], "list[Any] | None"]
Observer = Callable[[Op, list[Any]], None]


@dataclasses.dataclass(frozen=True)
class Decode:
    """An encoding that was unpacked because no rule applied.

    Attributes:
        operation: what needed the dense array.
        format: the encoding's format.
        shape: the dense shape.
        nbytes: bytes of the dense array.
        loop: whether it happens in every turn of a loop.
    """

    operation: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    loop: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """One operation with its operands, as a lowering rule gets it.

    Attributes:
        op: the operation.
        operands: arrays and encodings.
        index: which operand the rule was chosen for.
        evaluator: evaluates other operations in the same context.
    """

    op: Op
    operands: tuple[Any, ...]
    index: int
    evaluator: "Evaluator"

    @property
    def encoded(self) -> Any:
        """The operand that the rule was chosen for."""
        return self.operands[self.index]

    def again(self, op: Op, operands: Sequence[Any]) -> list[Any]:
        """Evaluates an operation with other operands: how a nested encoding hands on to what it wraps."""
        return self.evaluator.apply(op, list(operands))


_RULES: dict[tuple[str, type[Encoded], str | None], Rule] = {}
_OPERATIONS: dict[str, Rule] = {}


def rule(operation: str, encoding: type[Encoded], platform: str | None = None) -> Callable[[Rule], Rule]:
    """Registers how to compute `operation` with an encoded operand; a rule may decline by returning `None`.

    Args:
        operation: a primitive's name, or one of ours.
        encoding: the operand's class; subclasses match too.
        platform: "cpu", "gpu", "tpu", or any.
    """

    def register(function: Rule) -> Rule:
        key = (operation, encoding, platform)
        assert key not in _RULES, f"a rule for {key} exists"
        _RULES[key] = function
        return function

    return register


def operation(name: str) -> Callable[[Rule], Rule]:
    """Registers how to compute an operation of ours, which a pass may put into graphs."""

    def register(function: Rule) -> Rule:
        assert name not in _OPERATIONS, f"an operation '{name}' exists"
        _OPERATIONS[name] = function
        return function

    return register


def find_rules(operation: str, encoding: type, platform: str) -> Iterator[Rule]:
    """The rules that apply, most specific first: of the nearest class, for this platform before any."""
    for owner in encoding.__mro__:
        for where in (platform, None):
            if (operation, owner, where) in _RULES:
                yield _RULES[operation, owner, where]


class Evaluator:
    """Evaluates graphs under whatever transformation JAX is tracing.

    Attributes:
        platform: the platform that rules are chosen for.
        decodes: what was unpacked for want of a rule.
        observer: called after each operation with its outputs.
        rebuild: whether bodies are entered even if nothing in them changed, so that the observer sees all.
        memo: rebuilt bodies, so that one body that serves many layers stays one function.
    """

    def __init__(self, platform: str | None = None, observer: Observer | None = None, *, rebuild: bool = False):
        self.platform = platform or jax.default_backend()
        self.decodes: list[Decode] = []
        self.observer = observer
        self.rebuild = rebuild
        self.memo: dict[Any, Any] = {}
        self._loops: list[tuple[int | None, list[Encoded]]] = []

    def whole(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of a program's graph, dense; encodings among the inputs are prepared first."""
        prepared = [x.prepared() if isinstance(x, Encoded) else x for x in inputs]
        return [self.dense(x, "output") for x in self.run(graph, prepared)]

    def run(self, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
        """The graph's outputs; some may be encoded, where a parameter is only handed on."""
        env: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True))
        env.update(graph.constants)
        remaining: dict[Value, int] = {}
        for op in graph.ops:
            for x in op.inputs:
                if isinstance(x, Value):
                    remaining[x] = remaining.get(x, 0) + 1
        for x in graph.outputs:
            if isinstance(x, Value):
                remaining[x] = remaining.get(x, 0) + 1

        def read(x: Operand) -> Any:
            return x.value if isinstance(x, Literal) else env[x]

        for op in graph.ops:
            outputs = self.apply(op, [read(x) for x in op.inputs])
            env.update(zip(op.outputs, outputs, strict=True))
            for x in op.inputs:
                if isinstance(x, Value):
                    remaining[x] -= 1
                    if not remaining[x]:
                        del env[x]
        return [read(x) for x in graph.outputs]

    def apply(self, op: Op, operands: list[Any]) -> list[Any]:
        """The outputs of one operation."""
        outputs = self._apply(op, operands)
        if self.observer is not None:
            self.observer(op, outputs)
        return outputs

    def _apply(self, op: Op, operands: list[Any]) -> list[Any]:
        encoded = [index for index, x in enumerate(operands) if isinstance(x, Encoded)]
        for index in encoded:
            for rule_ in find_rules(op.name, type(operands[index]), self.platform):
                outputs = rule_(Call(op, tuple(operands), index, self))
                if outputs is not None:
                    return outputs
        if op.equation is None:
            if op.name not in _OPERATIONS:
                raise LoweringError(
                    f"no lowering is registered for the operation '{op.name}'; import the pass that owns it"
                )
            outputs = _OPERATIONS[op.name](Call(op, tuple(operands), 0, self))
            assert outputs is not None, f"the lowering of '{op.name}' declined"
            return outputs
        if encoded:
            outputs = _layout(op, operands)
            if outputs is not None:
                return outputs
        if op.name in _jax.ENTERABLE and (encoded or not op.imported or self.rebuild):
            with _jax.recorded_context(op.equation):
                return higher_order.rebuild(self, op, operands)
        if not op.imported:
            raise LoweringError(f"a pass changed the body of '{op.name}', which can only be bound as JAX recorded it")
        return _jax.bind(op.equation, [self.dense(x, op.name) for x in operands])

    def loops_holding(self, x: Any) -> tuple[int, ...]:
        """Which of the loops around hold `x` the same in every turn."""
        return tuple(i for i, (_, held) in enumerate(self._loops) if any(x is h for h in held))

    def hold(self, x: Any, loops: Sequence[int]) -> None:
        """Says that loops hold `x` as well: the same array under another name, inside a body."""
        for i in loops:
            self._loops[i][1].append(x)

    def dense(self, x: Any, needed_by: str) -> Any:
        """An operand as a dense array; unpacking an encoding is logged.

        Raises:
            LoweringError: a stack of layers would be unpacked in every turn of a loop.
        """
        if not isinstance(x, Encoded):
            return x
        for length, held in self._loops:
            if any(x is h for h in held) and x.ndim > 2 and x.shape[0] == length:
                raise LoweringError(
                    f"'{needed_by}' inside a loop of {length} turns would unpack a whole stack of layers, "
                    f"{x.format}{list(x.shape)}, in every turn: no rule computes it from the encoding; leave the "
                    "parameter out of the pass, or slice the layer before this operation"
                )
        dense_bytes = x.size * jax.numpy.dtype(x.dtype).itemsize
        self.decodes.append(Decode(needed_by, x.format, tuple(x.shape), dense_bytes, bool(self._loops)))
        return x.decode()

    @contextlib.contextmanager
    def loop(self, length: int | None, held: Sequence[Any]) -> Generator[None]:
        """Marks that what is evaluated runs in every turn of a loop over which `held` stays the same."""
        self._loops.append((length, [x for x in held if isinstance(x, Encoded)]))
        try:
            yield
        finally:
            self._loops.pop()


def evaluate(graph: Graph, inputs: Sequence[Any], platform: str | None = None) -> list[jax.Array]:
    """The outputs of a program's graph as dense arrays."""
    return Evaluator(platform).whole(graph, inputs)


def _layout(op: Op, operands: list[Any]) -> list[Any] | None:
    """The result of a layout operation on encodings, or None."""
    first, attributes = operands[0], op.attributes
    if op.name == "concatenate":
        if (
            isinstance(first, Encoded)
            and (result := first.concatenate(operands[1:], attributes["dimension"])) is not None
        ):
            return [result]
        return None
    if op.name == "stack" and all(isinstance(x, Encoded) for x in operands):
        return _stack(operands, attributes["axis"])
    if op.name == "optimization_barrier":
        return list(jax.lax.optimization_barrier(tuple(operands)))
    if not isinstance(first, Encoded) or any(isinstance(x, Encoded) for x in operands[1:]):
        return None
    if op.name == "split":
        return _split(first, attributes["axis"], attributes["sizes"])
    if op.name == "unstack":
        axis = attributes["axis"]
        parts = _split(first, axis, (1,) * first.shape[axis])
        squeezed = [part.squeeze((axis,)) for part in parts or ()]
        return None if parts is None or any(x is None for x in squeezed) else squeezed
    result: Any = None
    if op.name == "convert_element_type":
        result = first.astype(attributes["new_dtype"])
    elif op.name == "transpose":
        result = first.transpose(attributes["permutation"])
    elif op.name == "reshape" and attributes.get("dimensions") is None:
        result = first.reshape(attributes["new_sizes"])
    elif op.name == "broadcast_in_dim" and op.outputs[0].shape != () and len(operands) == 1:
        if first.size == _size(attributes["shape"]) and _keeps_order(attributes["broadcast_dimensions"]):
            result = first.reshape(attributes["shape"])
    elif op.name == "squeeze":
        result = first.squeeze(attributes["dimensions"])
    elif op.name == "slice":
        strides = attributes["strides"] or (1,) * first.ndim
        result = first.slice(tuple(zip(attributes["start_indices"], attributes["limit_indices"], strides, strict=True)))
    elif op.name == "dynamic_slice":
        result = first.dynamic_slice(operands[1:], attributes["slice_sizes"])
    elif op.name == "gather":
        result = first.gather(operands[1], dict(attributes))
    elif op.name == "sharding_constraint":
        result = _constrain(first, attributes["sharding"], jax.lax.with_sharding_constraint)
    elif op.name == CONSTRAIN:
        result = _along(first, attributes["sharding"], attributes["gradient"])
    elif op.name == "name":
        result = first.leafwise(lambda leaf: _jax.bind(op.equation, [leaf])[0])
    elif op.name == "reshard":
        result = _constrain(first, attributes["dst_sharding"], jax.sharding.reshard)
    elif op.name in ("copy", "copy_p"):
        result = first
    elif op.name in ("pvary", "pcast"):
        result = first.leafwise(lambda leaf: _jax.bind(op.equation, [leaf])[0])
    return None if result is None else [result]


def _stack(parts: Sequence[Any], axis: int) -> list[Any] | None:
    shape = [*parts[0].shape[:axis], 1, *parts[0].shape[axis:]]
    rows = [part.reshape(shape) for part in parts]
    if any(row is None for row in rows):
        return None
    result = rows[0].concatenate(rows[1:], axis)
    return None if result is None else [result]


def _split(x: Encoded, axis: int, sizes: Sequence[int]) -> list[Any] | None:
    parts, start = [], 0
    for size in sizes:
        slices = [(0, dim, 1) for dim in x.shape]
        slices[axis] = (start, start + size, 1)
        parts.append(x.slice(tuple(slices)))
        start += size
    return None if any(part is None for part in parts) else parts


def _constrain(x: Encoded, sharding: Any, constrain: Callable[[Any, Any], Any]) -> Encoded | None:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.tree.map(
        lambda leaf, spec: constrain(leaf, jax.sharding.NamedSharding(sharding.mesh, spec)), x, x.spec(sharding.spec)
    )


def _along(x: Encoded, sharding: Any, gradient: Any) -> Encoded:
    specs = x.spec(sharding.spec), x.spec(gradient.spec)
    return jax.tree.map(lambda leaf, spec, back: constrain(leaf, sharding.mesh, spec, back), x, *specs)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def _keeps_order(dimensions: Sequence[int]) -> bool:
    return list(dimensions) == sorted(dimensions)
