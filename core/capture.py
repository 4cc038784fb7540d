"""Capture: from a model and example inputs to a graph.

A call's arguments are taken apart into arrays, NNX objects (whose variables are read and updated in place), declared
constants and static values. Shapes, dtypes, static values, tree structure and the mesh in context make the signature.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax import _jax, ir
from compax.errors import CaptureError, SignatureError
from compax.sources import Arrays, Source, function_source, join, linen_source, nnx_source, plain, unwrap

LARGE_CONSTANT_BYTES = 4096
"""From this size on, a floating array that a plain function closes over is a parameter."""
_OBJECTS = (nnx.Pytree, nnx.Variable)


@dataclasses.dataclass(frozen=True)
class Constant:
    """An argument declared constant: its array and a digest of it."""

    value: Any = dataclasses.field(compare=False)
    digest: str


@dataclasses.dataclass(frozen=True)
class Static:
    """An argument that is no array and is passed to the model as it is."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Where an array goes: its place among the call's arrays."""

    index: int


@dataclasses.dataclass(frozen=True)
class Object:
    """Where an NNX object goes: its place among the call's objects."""

    index: int


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a graph is specialized to. Hashable; equal signatures share a graph.

    Attributes:
        avals: shapes, dtypes and weak types of the arrays.
        tree: structure of the arguments.
        leaves: what stands at each leaf of the structure.
        objects: graph definition and variables' types of the NNX objects.
        mesh: the mesh in context.
    """

    avals: tuple[Any, ...]
    tree: Any
    leaves: tuple[Any, ...]
    objects: Any
    mesh: Any


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A call's arguments, taken apart.

    Attributes:
        signature: the static part.
        arrays: the arrays, those of objects last.
        names: a name for each array, such as `tokens` or `cache.layers.0.key`.
        objects: the NNX objects, to be updated after the call.
    """

    signature: Signature
    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    objects: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Input:
    """What a graph input stands for.

    Attributes:
        kind: "parameter", "state" or "argument".
        path: its path in the store, or the argument's name.
    """

    kind: str
    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One way to call the model.

    Attributes:
        name: its name in the program.
        source: the model as a pure function.
        mode: "train", "eval" or none.
        constant: names of arguments declared constant.
        static: names of arguments declared static.
    """

    name: str
    source: Source
    mode: str | None
    constant: tuple[str, ...]
    static: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """A graph of one entry at one signature.

    Attributes:
        entry: what was captured.
        signature: what the graph is specialized to.
        graph: the computation.
        inputs: what each graph input stands for.
        output_tree: structure of the output.
        output_leaves: for each leaf of it the graph output's position, or a static value.
        updates: state paths that the graph writes; their values follow the outputs.
        aux: paths and structures of values that first appear in the call; their leaves follow the updates.
        object_updates: how many variables of argument objects are returned; they come last.
    """

    entry: Entry
    signature: Signature
    graph: ir.Graph
    inputs: tuple[Input, ...]
    output_tree: Any
    output_leaves: tuple[Any, ...]
    updates: tuple[str, ...]
    aux: tuple[tuple[str, Any], ...]
    object_updates: int

    def under_mesh(self) -> AbstractContextManager[Any]:
        """The mesh in whose context the graph was captured, for evaluating it again."""
        return jax.sharding.use_abstract_mesh(self.signature.mesh or jax.sharding.get_abstract_mesh())

    def input_value(self, kind: str, path: str) -> ir.Value | None:
        """The graph input that stands for a parameter, state or argument."""
        for value, tag in zip(self.graph.inputs, self.inputs, strict=True):
            if tag == Input(kind, path):
                return value
        return None


def _is_object(x: Any) -> bool:
    return isinstance(x, _OBJECTS)


def _is_array(x: Any) -> bool:
    if isinstance(x, (bool, str)) or x is None:
        return False
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, int, float, complex))


def _digest(value: Any) -> str:
    array = np.asarray(value)
    text = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()


def take_apart(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Separates a call's arguments into arrays and the static part.

    Raises:
        SignatureError: a name declared constant or static is no argument, a constant is traced or abstract, or a static
            value cannot be hashed.
    """
    names = entry.source.arguments
    present = {*names[: len(args)], *kwargs}
    for declared in (*entry.constant, *entry.static):
        if declared not in present:
            raise SignatureError(
                f"'{declared}' is declared constant or static, but the call of '{entry.name}' has no such argument; "
                f"it has: {', '.join(sorted(present)) or 'none'}"
            )
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_object)
    leaves: list[Any] = []
    arrays: list[Any] = []
    array_names: list[str] = []
    objects: list[Any] = []
    object_names: list[str] = []
    for path, leaf in flat:
        top, name = _argument_name(path, names)
        if top in entry.static:
            leaves.append(Static(leaf))
        elif top in entry.constant:
            if _jax.is_tracer(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
                raise SignatureError(f"the argument '{top}' is declared constant, but it has no value here")
            leaves.append(Constant(leaf, _digest(leaf)))
        elif _is_object(leaf):
            leaves.append(Object(len(objects)))
            objects.append(leaf)
            object_names.append(name)
        elif _is_array(leaf):
            leaves.append(Dynamic(len(arrays)))
            arrays.append(leaf)
            array_names.append(name)
        else:
            leaves.append(Static(leaf))
    for leaf in leaves:
        try:
            hash(leaf)
        except TypeError as error:
            raise SignatureError(
                f"an argument of '{entry.name}' is neither an array nor hashable: {type(leaf.value).__name__}; pass "
                "arrays, NNX objects, or hashable values"
            ) from error
    definition = None
    if objects:
        definition, state = nnx.split(plain(tuple(objects)))
        for path, variable in nnx.to_flat_state(state):
            arrays.append(unwrap(variable))
            array_names.append(join((object_names[int(str(path[0]))], *path[1:])))
    signature = Signature(
        avals=tuple(map(_aval_key, arrays)),
        tree=tree,
        leaves=tuple(leaves),
        objects=definition,
        mesh=_context_mesh(),
    )
    return Arguments(signature, tuple(arrays), tuple(array_names), tuple(objects))


def _context_mesh() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _aval_key(x: Any) -> tuple[Any, ...]:
    aval = _jax.abstract(x)
    sharding = getattr(aval, "sharding", None)
    explicit = sharding is not None and any(axis is not None for axis in getattr(sharding, "spec", ()))
    return (
        tuple(aval.shape),
        str(aval.dtype),
        bool(getattr(aval, "weak_type", False)),
        sharding if explicit else None,
    )


def _argument_name(path: tuple[Any, ...], names: tuple[str, ...]) -> tuple[str, str]:
    kind, key, *rest = path
    if kind.idx == 0:
        top = names[key.idx] if key.idx < len(names) else f"argument{key.idx}"
    else:
        top = str(key.key)
    inner = jax.tree_util.keystr(tuple(rest), simple=True, separator=".")
    return top, f"{top}.{inner}" if inner else top


def put_together(signature: Signature, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of a call from its arrays, with fresh copies of its objects: (args, kwargs, objects)."""
    objects: Any = ()
    count = sum(isinstance(leaf, Dynamic) for leaf in signature.leaves)
    if signature.objects is not None:
        objects = _merge_objects(signature.objects, arrays[count:])

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Dynamic):
            return arrays[leaf.index]
        if isinstance(leaf, Object):
            return objects[leaf.index]
        return leaf.value

    args, kwargs = jax.tree.unflatten(signature.tree, list(map(fill, signature.leaves)))
    return args, kwargs, objects


def _merge_objects(definition: Any, arrays: Sequence[Any]) -> Any:
    return nnx.merge(definition, list(arrays), copy=True)


def update_objects(objects: tuple[Any, ...], values: Sequence[Any]) -> None:
    """Writes the variables that a call returned into the caller's objects."""
    flat = list(nnx.to_flat_state(nnx.state(plain(objects))))
    new = [(path, _refill(variable, value)) for (path, variable), value in zip(flat, values, strict=True)]
    nnx.update(objects, nnx.from_flat_state(new))


def _refill(variable: Any, value: Any) -> Any:
    return variable.replace(value) if isinstance(variable, nnx.Variable) else value


def trace_entry(entry: Entry, arguments: Arguments, params: Arrays, state: Arrays) -> tuple[Captured, Arrays]:
    """Traces one entry to a graph.

    Args:
        entry: what to call.
        arguments: example arguments; arrays or shapes.
        params: parameters by path; their shapes and dtypes are used.
        state: likewise.

    Returns:
        The graph, and the arrays that it closes over as parameters by path.

    Raises:
        CaptureError: the model fails while it is traced; the model's own error is the cause.
    """
    signature = arguments.signature
    record: dict[str, Any] = {}

    params = {path: params[path] for path in entry.source.select(params)}

    def function(flat: list[Any]) -> list[Any]:
        given = dict(zip(params, flat, strict=False))
        held = dict(zip(state, flat[len(params) :], strict=False))
        args, kwargs, objects = put_together(signature, flat[len(params) + len(state) :])
        output, updates, aux = entry.source.call(given, held, args, kwargs)
        written = {path: updates.pop(path) for path in tuple(updates) if path in given}
        leaves, tree = jax.tree.flatten(output)
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        positions = iter(range(len(arrays)))
        record["tree"] = tree
        record["leaves"] = tuple(next(positions) if _is_array(leaf) else Static(leaf) for leaf in leaves)
        record["updates"] = tuple(updates)
        record["aux"] = tuple((path, jax.tree.structure(value)) for path, value in aux.items())
        returned = []
        if signature.objects is not None:
            flat_after = list(nnx.to_flat_state(nnx.state(objects)))
            if len(flat_after) != len(flat) - len(params) - len(state) - _count_dynamic(signature):
                raise CaptureError(
                    f"the call of '{entry.name}' adds or removes variables of an object among its arguments; give the "
                    "object all its variables before the call"
                )
            returned = [unwrap(variable) for _, variable in flat_after]
        record["returned"] = len(returned)
        record["written"] = tuple(written)
        return [jnp.asarray(a) if not isinstance(a, jax.Array) else a for a in arrays] + [
            *updates.values(),
            *jax.tree.leaves(list(aux.values())),
            *returned,
            *written.values(),
        ]

    flat = [*map(_struct, params.values()), *map(_struct, state.values()), *map(_struct, arguments.arrays)]
    try:
        closed = _jax.make_jaxpr(function, flat)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model fails while '{entry.name}' is traced with {_describe(arguments)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    tags = (
        *(Input("parameter", path) for path in params),
        *(Input("state", path) for path in state),
        *(Input("argument", name) for name in arguments.names),
    )
    graph = ir.import_jaxpr(closed)
    _refuse_writes(entry, graph, dict(zip(tags, graph.inputs, strict=True)), record["written"])
    graph = dataclasses.replace(graph, outputs=graph.outputs[: len(graph.outputs) - len(record["written"])])
    hoisted = {}
    if entry.source.hoists:
        graph, hoisted = _hoist(graph)
        tags = (*tags, *(Input("parameter", path) for path in hoisted))
    captured = Captured(
        entry=entry,
        signature=signature,
        graph=graph,
        inputs=tags,
        output_tree=record["tree"],
        output_leaves=record["leaves"],
        updates=record["updates"],
        aux=record["aux"],
        object_updates=record["returned"],
    )
    return captured, hoisted


def _hoist(graph: ir.Graph) -> tuple[ir.Graph, Arrays]:
    """Large floating arrays that a function closes over, as inputs of its graph and parameters `constants.N`."""
    large = [
        (value, array)
        for value, array in graph.constants
        if jnp.issubdtype(value.dtype, jnp.floating) and array.nbytes >= LARGE_CONSTANT_BYTES
    ]
    if not large:
        return graph, {}
    moved = {value for value, _ in large}
    graph = dataclasses.replace(
        graph,
        inputs=(*graph.inputs, *(value for value, _ in large)),
        constants=tuple(item for item in graph.constants if item[0] not in moved),
    )
    return graph, {f"constants.{i}": jnp.asarray(array) for i, (_, array) in enumerate(large)}


def _refuse_writes(entry: Entry, graph: ir.Graph, inputs: dict[Input, ir.Value], written: tuple[str, ...]) -> None:
    for path, value in zip(reversed(written), reversed(graph.outputs), strict=False):
        if ir.forwarded(graph, value) is not inputs[Input("parameter", path)]:
            raise CaptureError(
                f"the call of '{entry.name}' writes the parameter '{path}'; make it another kind of nnx.Variable, such "
                "as nnx.BatchStat, so that it is state"
            )


def _count_dynamic(signature: Signature) -> int:
    return sum(isinstance(leaf, Dynamic) for leaf in signature.leaves)


def _struct(x: Any) -> Any:
    return _jax.as_struct(_jax.abstract(x))


def _describe(arguments: Arguments) -> str:
    pairs = zip(arguments.names, arguments.arrays, strict=True)
    return ", ".join(f"{name}: {_jax.aval_text(_jax.abstract(a))}" for name, a in pairs) or "no arrays"


def check_mode(mode: str | None) -> None:
    """Raises `CaptureError` unless the mode is one of those that there are."""
    if mode not in (None, "train", "eval"):
        raise CaptureError(f"mode is 'train', 'eval' or None, not {mode!r}")


def make_source(
    model: Any,
    inputs: tuple[Any, ...],
    *,
    method: Any,
    mode: str | None,
    loss: Callable[..., Any] | None,
    variables: Any,
    mutable: Any,
) -> tuple[Source, Arrays, Arrays, tuple[Any, ...]]:
    """The source of any model, its parameters and state, and the inputs that remain.

    Raises:
        CaptureError: the model is of no kind that can be captured, or an option does not fit its kind.
    """
    check_mode(mode)
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise CaptureError("variables belong to Linen modules; an NNX module holds its own")
        source, params, state = nnx_source(model, method=method, mode=mode, loss=loss)
        return source, params, state, inputs
    if isinstance(model, nn.Module):
        source, params, state = linen_source(model, variables, method=method, mutable=mutable, loss=loss)
        return source, params, state, inputs
    if callable(model):
        if not inputs:
            raise CaptureError("a plain function is captured as fn(params, *inputs): give its parameters first")
        function = model if loss is None else loss
        source, params = function_source(function, inputs[0])
        return source, params, {}, inputs[1:]
    raise CaptureError(
        f"cannot capture a {type(model).__name__}: give an nnx.Module, a linen Module with its variables, or a "
        "function fn(params, *inputs)"
    )


def check_store(name: str, what: str, given: Arrays, own: Arrays) -> None:
    """Raises `SignatureError` unless arrays by path have the paths, shapes and dtypes of a program's own.

    Args:
        name: the program's.
        what: what the arrays are, for the message.
        given: what a caller gives.
        own: what the program has.
    """
    if given.keys() != own.keys():
        missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise SignatureError(
            f"the {what} do not fit the program '{name}': missing {missing[:3]}, unknown {extra[:3]}; pass a "
            "dictionary with the paths of program.params and program.state"
        )
    for path, x in given.items():
        if tuple(x.shape) != tuple(own[path].shape) or x.dtype != own[path].dtype:
            raise SignatureError(
                f"'{path}' is {x.dtype}{list(x.shape)}, but the program '{name}' was captured with "
                f"{own[path].dtype}{list(own[path].shape)}; capture the model with parameters of that type, or change "
                "the type with a pass"
            )
