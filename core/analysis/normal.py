"""The normal form: a graph with its bodies entered, as analyses want to read it.

One flat list of nodes. `jit`, `remat`, custom derivatives, loops and branches are entered, at every call path anew, so
that each value belongs to one site. Casts between floating dtypes, copies and barriers are looked through, a
`dot_general` without a contraction is a product of broadcast operands, an index that is wrapped around if negative is
the index, equal computations on constants are one, and what no output needs is gone. Every node knows the operation
that it comes from: rewrites change the graph, never this.

Where control flow joins values there are nodes of their own: `scan_slice` (a turn's row of a scanned array),
`scan_stack` (rows put together), `carry` (a value at the start of a turn, from its initial value and the one of the
turn before), `carried` (it after the last turn), `join` (the results of branches), `shard_slice` and `shard_join`.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import _jax
from compax.capture import Captured, Input, Static
from compax.ir import Graph, Literal, Op, Operand, Path, Value, forwarded


class Depends(enum.IntFlag):
    """What a value depends on."""

    NOTHING = 0
    PARAMETER = 1
    STATE = 2
    ARGUMENT = 4
    RANDOM = 8
    TURN = 16


class Val:
    """A value of the normal form.

    Attributes:
        shape: its shape.
        dtype: the dtype it was first computed in.
        depends: what it depends on; a value that depends on nothing is static.
        node: the node that computes it; none for inputs and constants.
        index: which of the node's outputs it is.
        constant: its array, for a constant.
        input: what it stands for, for an input of the program.
    """

    __slots__ = ("constant", "depends", "dtype", "index", "input", "node", "shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        depends: Depends,
        node: "Node | None" = None,
        index: int = 0,
        constant: Any = None,
        input: Input | None = None,
    ):
        self.shape = shape
        self.dtype = dtype
        self.depends = depends
        self.node = node
        self.index = index
        self.constant = constant
        self.input = input

    @property
    def static(self) -> bool:
        """Whether it is the same in every call."""
        return not self.depends

    @property
    def number(self) -> int:
        """The number of the node that computes it; -1 for inputs and constants, which come before all."""
        return -1 if self.node is None else self.node.number

    @property
    def name(self) -> str:
        """The name of the node that computes it, or of what it stands for."""
        if self.node is not None:
            return self.node.name
        return "constant" if self.input is None else self.input.kind

    def __repr__(self) -> str:
        return f"Val({self.name}, {self.dtype}{list(self.shape)})"


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """An operation of the normal form.

    Attributes:
        name: the primitive's name, or one of those that the module's docstring names.
        inputs: its operands.
        attributes: its static parameters.
        path: where the operation stands in the graph; for joins the operation with the bodies.
        op: the operation itself.
        loops: lengths of the loops around it; 0 where unknown.
        position: which operand or result of the operation a join is about.
        number: its place in the order of evaluation.
        outputs: its results.
    """

    name: str
    inputs: list[Val]
    attributes: Mapping[str, Any]
    path: Path
    op: Op
    loops: tuple[int, ...]
    position: int = 0
    number: int = 0
    outputs: list[Val] = dataclasses.field(default_factory=list)


REARRANGING = ("broadcast_in_dim", "reshape", "squeeze", "transpose")
"""Operations that rearrange or repeat, and leave nothing out."""


def rearranged(x: Val, names: Iterable[str] = REARRANGING) -> Val:
    """What a value rearranges, by some operations."""
    names = frozenset(names)
    while x.node is not None and x.node.name in names:
        x = x.node.inputs[0]
    return x


Frame = dict[Value, Val]


class Normal:
    """A graph in normal form.

    Attributes:
        captured: the graph.
        inputs: its inputs in order.
        outputs: its outputs in order.
        updated: for each output the state that it is the next value of, if it is.
        nodes: the nodes in order of evaluation, dead ones left out.
        frames: for each body, by the steps that lead to it, what its values are.
        users: the nodes that read a value.
    """

    def __init__(self, captured: Captured):
        builder = _Builder()
        self.captured = captured
        self.inputs: list[Val] = []
        for value, tag in zip(captured.graph.inputs, captured.inputs, strict=True):
            depends = {"parameter": Depends.PARAMETER, "state": Depends.STATE}.get(tag.kind, Depends.ARGUMENT)
            self.inputs.append(Val(value.shape, value.dtype, depends, input=tag))
        self.outputs = builder.enter(captured.graph, self.inputs, (), (), Depends.NOTHING)
        states = {x.input.path: x for x in self.inputs if x.input is not None and x.input.kind == "state"}
        first = sum(not isinstance(leaf, Static) for leaf in captured.output_leaves)
        updates = {first + i: states.get(path) for i, path in enumerate(captured.updates)}
        self.updated = [updates.get(i) for i in range(len(self.outputs))]
        self.frames = builder.frames
        self.nodes = _alive(builder.nodes, [*self.outputs, *builder.conditions])
        self.users: dict[Val, list[Node]] = {}
        for number, node in enumerate(self.nodes):
            node.number = number
            for x in dict.fromkeys(node.inputs):
                self.users.setdefault(x, []).append(node)

    def readers(self, x: Val) -> Sequence[Node]:
        """The nodes that read a value."""
        return self.users.get(x, ())

    def nodes_named(self, *names: str) -> Iterator[Node]:
        """All nodes of some names, in order."""
        return (node for node in self.nodes if node.name in names)


def _alive(nodes: list[Node], outputs: Sequence[Val]) -> list[Node]:
    """The nodes that some output needs. A carried value needs its next one, which comes later: hence the work list."""
    alive: set[int] = set()
    waiting = [x.node for x in outputs if x.node is not None]
    while waiting:
        node = waiting.pop()
        if id(node) in alive:
            continue
        alive.add(id(node))
        waiting.extend(x.node for x in node.inputs if x.node is not None and id(x.node) not in alive)
    return [node for node in nodes if id(node) in alive]


CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
    | {"custom_vjp_call_jaxpr"}
)
"""Operations that evaluate a body once."""
_COPIES = frozenset(
    {"copy", "copy_p", "stop_gradient", "name", "compress", "sharding_constraint", "constrain", "reshard"}
    | {"pvary", "pcast", "reduce_precision"}
)
_RANDOM = frozenset({"random_bits", "rng_uniform", "rng_bit_generator", "threefry2x32"})


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.frames: dict[Path, Frame] = {}
        self.static: dict[Any, Node] = {}
        self.constants: dict[Any, Val] = {}
        self.conditions: list[Val] = []

    def enter(
        self, graph: Graph, inputs: Sequence[Val], prefix: Path, loops: tuple[int, ...], turn: Depends
    ) -> list[Val]:
        """The outputs of a graph for given inputs; its nodes are appended."""
        frame: Frame = dict(zip(graph.inputs, inputs, strict=True))
        self.frames[prefix] = frame
        for value, array in graph.constants:
            key = id(array)
            if key not in self.constants:
                self.constants[key] = Val(value.shape, value.dtype, Depends.NOTHING, constant=array)
            frame[value] = self.constants[key]
        for position, op in enumerate(graph.ops):
            self.operation(op, [self.read(frame, x) for x in op.inputs], frame, (*prefix, (position, -1)), loops, turn)
        return [self.read(frame, x) for x in graph.outputs]

    def read(self, frame: Frame, x: Operand) -> Val:
        if isinstance(x, Literal):
            array = np.asarray(x.value)
            key = (str(x.dtype), array.item()) if array.ndim == 0 else id(x)
            if key not in self.constants:
                self.constants[key] = Val(x.shape, x.dtype, Depends.NOTHING, constant=array)
            return self.constants[key]
        return frame[x]

    def add(
        self,
        name: str,
        inputs: Sequence[Val],
        like: Sequence[tuple[tuple[int, ...], Any]],
        attributes: Mapping[str, Any],
        place: tuple[Path, Op, tuple[int, ...]],
        depends: Depends = Depends.NOTHING,
        position: int = 0,
    ) -> Node:
        for x in inputs:
            depends |= x.depends
        key = None
        if not depends:
            key = _static_key(name, inputs, attributes)
            if key is not None and key in self.static:
                return self.static[key]
        path, op, loops = place
        node = Node(name, list(inputs), attributes, path, op, loops, position)
        node.outputs = [Val(shape, dtype, depends, node, index) for index, (shape, dtype) in enumerate(like)]
        self.nodes.append(node)
        if key is not None:
            self.static[key] = node
        return node

    def operation(
        self, op: Op, operands: list[Val], frame: Frame, path: Path, loops: tuple[int, ...], turn: Depends
    ) -> None:
        alias = _alias(op, operands)
        if alias is not None:
            frame.update(zip(op.outputs, alias, strict=True))
            return
        place = (path, op, loops)
        if op.bodies and (handler := _ENTER.get(op.name)) is not None:
            outputs = handler(self, op, operands, place, turn)
        elif op.bodies and op.equation is None:
            outputs = self.call(op, operands, place, turn)
        elif op.name == "dot_general" and not op.attributes["dimension_numbers"][0][0]:
            outputs = self.product(op, operands, place)
        else:
            like = [(v.shape, v.dtype) for v in op.outputs]
            depends = Depends.RANDOM if op.name in _RANDOM else Depends.NOTHING
            outputs = self.add(op.name, operands, like, op.attributes, place, depends).outputs
        frame.update(zip(op.outputs, outputs, strict=True))

    def product(self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]]) -> list[Val]:
        """A dot that contracts nothing: operands broadcast against each other, and multiplied."""
        (_, batch), shape, dtype = op.attributes["dimension_numbers"], op.outputs[0].shape, op.outputs[0].dtype
        num_batch = len(batch[0])
        free = [[d for d in range(len(x.shape)) if d not in batch[side]] for side, x in enumerate(operands)]
        factors = []
        for side, x in enumerate(operands):
            first = num_batch if side == 0 else num_batch + len(free[0])
            target = {d: i for i, d in enumerate(batch[side])} | {d: first + i for i, d in enumerate(free[side])}
            attributes = {"shape": shape, "broadcast_dimensions": tuple(target[d] for d in range(len(x.shape)))}
            factors.append(self.add("broadcast_in_dim", [x], [(shape, x.dtype)], attributes, place, position=side))
        return self.add("mul", [f.outputs[0] for f in factors], [(shape, dtype)], {}, place).outputs

    # -- operations with bodies ---------------------------------------------------------------------------------------

    def call(self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]], turn: Depends) -> list[Val]:
        path, _, loops = place
        return self.enter(op.bodies[0], operands, _inside(path, 0), loops, turn)

    def scan(self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]], turn: Depends) -> list[Val]:
        path, _, loops = place
        body, length = op.bodies[0], op.attributes["length"]
        num_constants, num_carry = _jax.scan_counts(dict(op.attributes))
        first_row = num_constants + num_carry
        inputs = operands[:num_constants]
        inputs += self.carries(op, operands[num_constants:first_row], body, num_constants, num_constants, place)
        for i, x in enumerate(operands[first_row:], start=first_row):
            like = [(x.shape[1:], x.dtype)]
            inputs += self.add("scan_slice", [x], like, {}, place, Depends.TURN, i).outputs
        outputs = self.enter(body, inputs, _inside(path, 0), (*loops, length), Depends.TURN)
        results = self.carried(operands[num_constants:first_row], inputs[num_constants:first_row], outputs, place)
        for i, x in enumerate(outputs[num_carry:], start=num_carry):
            node = self.add("scan_stack", [x], [((length, *x.shape), x.dtype)], {"length": length}, place, position=i)
            results += node.outputs
        return results

    def loop(self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]], turn: Depends) -> list[Val]:
        path, _, loops = place
        first, second = op.attributes["cond_nconsts"], op.attributes["body_nconsts"]
        initial, inner = operands[first + second :], (*loops, 0)
        carries = self.carries(op, initial, op.bodies[1], second, first + second, place)
        given = [*operands[:first], *carries]
        self.conditions += self.enter(op.bodies[0], given, _inside(path, 0), inner, Depends.TURN)
        given = [*operands[first : first + second], *carries]
        outputs = self.enter(op.bodies[1], given, _inside(path, 1), inner, Depends.TURN)
        return self.carried(initial, carries, outputs, place)

    def carries(
        self,
        op: Op,
        initial: Sequence[Val],
        body: Graph,
        offset: int,
        first: int,
        place: tuple[Path, Op, tuple[int, ...]],
    ) -> list[Val]:
        """Carried values at the start of a turn; one that every turn hands on is its initial value."""
        result: list[Val] = []
        for i, x in enumerate(initial):
            if forwarded(body, body.outputs[i]) is body.inputs[offset + i]:
                result.append(x)
            else:
                like = [(x.shape, x.dtype)]
                # What the turn before leaves is not known yet: anything.
                anything = Depends.TURN | Depends.PARAMETER | Depends.STATE | Depends.ARGUMENT
                result += self.add("carry", [x], like, {}, place, anything, first + i).outputs
        return result

    def carried(
        self,
        initial: Sequence[Val],
        carries: Sequence[Val],
        outputs: Sequence[Val],
        place: tuple[Path, Op, tuple[int, ...]],
    ) -> list[Val]:
        results: list[Val] = []
        for i, (before, carry) in enumerate(zip(initial, carries, strict=True)):
            if carry is before:
                results.append(before)
                continue
            assert carry.node is not None
            carry.node.inputs.append(outputs[i])
            like = [(before.shape, before.dtype)]
            results += self.add("carried", [outputs[i], carry], like, {}, place, position=i).outputs
        return results

    def branches(
        self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]], turn: Depends
    ) -> list[Val]:
        path, _, loops = place
        results = [
            self.enter(body, operands[1:], _inside(path, index), loops, turn) for index, body in enumerate(op.bodies)
        ]
        outputs: list[Val] = []
        for i, (value, *each) in enumerate(zip(op.outputs, *results, strict=True)):
            like = [(value.shape, value.dtype)]
            outputs += self.add("join", [operands[0], *each], like, {}, place, position=i).outputs
        return outputs

    def shards(self, op: Op, operands: list[Val], place: tuple[Path, Op, tuple[int, ...]], turn: Depends) -> list[Val]:
        path, _, loops = place
        body = op.bodies[0]
        inner: list[Val] = []
        for i, (x, value) in enumerate(zip(operands, body.inputs, strict=True)):
            like = [(value.shape, x.dtype)]
            inner += self.add("shard_slice", [x], like, {}, place, Depends.TURN, i).outputs
        outputs = self.enter(body, inner, _inside(path, 0), loops, turn)
        results: list[Val] = []
        for i, (x, value) in enumerate(zip(outputs, op.outputs, strict=True)):
            results += self.add("shard_join", [x], [(value.shape, x.dtype)], {}, place, position=i).outputs
        return results


_Handler = Callable[[_Builder, Op, list[Val], tuple[Path, Op, tuple[int, ...]], Depends], list[Val]]
_ENTER: dict[str, _Handler] = {
    **dict.fromkeys(CALLS, _Builder.call),
    "scan": _Builder.scan,
    "while": _Builder.loop,
    "cond": _Builder.branches,
    "shard_map": _Builder.shards,
}


def _inside(path: Path, index: int) -> Path:
    return (*path[:-1], (path[-1][0], index))


def _static_key(name: str, inputs: Sequence[Val], attributes: Mapping[str, Any]) -> Any:
    key = (name, *map(id, inputs), *sorted(attributes.items(), key=lambda item: item[0]))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _alias(op: Op, operands: Sequence[Val]) -> Sequence[Val] | None:
    """What an operation's outputs are, where it computes nothing."""
    name = op.name
    if name in _COPIES:
        return operands[:1]
    if name == "optimization_barrier":
        return operands
    if name == "convert_element_type":
        return operands if _kind(op.inputs[0].dtype) == _kind(op.outputs[0].dtype) else None
    if name == "max":
        for i, x in enumerate(operands):
            if x.constant is not None and np.ndim(x.constant) == 0 and x.constant == -np.inf:
                return (operands[1 - i],)
        return None
    if name in _NEUTRAL:
        for i, x in enumerate(operands):
            other = operands[1 - i]
            if (i or name not in ("sub", "div")) and other.shape == op.outputs[0].shape and _is(x, _NEUTRAL[name]):
                return (other,)
        return None
    if name == "select_n" and len(operands) == 3:
        return _wrapped_index(operands)
    if name == "broadcast_in_dim" and len(operands) == 1 and op.attributes["shape"] == operands[0].shape:
        return operands
    if (
        name == "reshape"
        and op.attributes.get("dimensions") is None
        and op.attributes["new_sizes"] == operands[0].shape
    ):
        return operands
    return None


_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
"""What leaves the other operand as it is."""


def _is(x: Val, number: float) -> bool:
    """Whether a value is a number everywhere."""
    x = rearranged(x, ("broadcast_in_dim", "reshape"))
    return x.constant is not None and np.ndim(x.constant) == 0 and bool(np.asarray(x.constant) == number)


def _wrapped_index(operands: Sequence[Val]) -> Sequence[Val] | None:
    """`select(i < 0, i + n, i)`, which makes negative indices count from the end, is an index like `i`."""
    test, plain, wrapped = operands
    node, other = test.node, wrapped.node
    if node is None or other is None or node.name != "lt" or other.name != "add":
        return None
    zero = node.inputs[1].constant
    same = node.inputs[0] is plain and other.inputs[0] is plain
    return (plain,) if same and zero is not None and np.ndim(zero) == 0 and zero == 0 else None


def _kind(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return str(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return "floating"
    return "integer" if jnp.issubdtype(dtype, jnp.integer) else str(dtype)
