"""A program as an `nnx.Module` again, for everything that works on modules: `nnx.Optimizer`, `nnx.jit`, `nnx.grad`.

The module holds the program's arrays in variables at the program's paths, and calls the program's graphs:

1. parameters that get gradients, and the trainable leaves of an encoding, are `nnx.Param`
2. parameters that get none (frozen, or of integers) are `Frozen`; such leaves of an encoding are `Stored`
3. state keeps the kind of variable that the model had, and a call updates it in place
4. values that first appear in a call (sown intermediates, auxiliary losses) become `nnx.Intermediate` variables
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from compax.encoding import Encoded
from compax.errors import CaptureError, SignatureError
from compax.sources import LinenSource, NnxSource, join

if TYPE_CHECKING:
    from compax.program import Program

Keys = tuple[str | int, ...]
"""Attributes and positions from the module to a variable."""


class Frozen(nnx.Variable[Any]):
    """A parameter that gets no gradient: frozen by a pass, or of integers."""


class Stored(nnx.Variable[Any]):
    """An array of an encoded parameter that gets no gradient, such as integer codes or their scale."""


class Branch(nnx.Module):
    """What groups the variables below a path: `module.blocks[0].mlp`."""

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, str(key))


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """What is static in a `ProgramModule`.

    Attributes:
        program: the program with shapes in place of arrays.
        keys: where the variables of each parameter and state path are.
    """

    program: "Program"
    keys: Mapping[str, Keys]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Definition":
        return self  # immutable, and modules that share it share what was compiled


class ProgramModule(nnx.Module):
    """A program as a module: `module(tokens)` runs the graph of an entry with the module's own variables."""

    def __init__(self, program: "Program", entry: str | None = None):
        """Takes over a program's arrays.

        Args:
            program: what the module computes. Its arrays are not copied.
            entry: the entry that a call runs; the first one by default.

        Raises:
            SignatureError: the program has no such entry.
            CaptureError: one path is a variable and the beginning of another.
        """
        self._entry = program.entry(entry).name
        keys, origins = _origins(program)
        self._definition = Definition(
            program.replace(
                params=jax.tree.map(_shape, program.params),
                state=jax.tree.map(_shape, program.state),
            ),
            keys,
        )
        tree: dict[Any, Any] = {}
        trainable, _ = program.partition()
        for path, value in program.params.items():
            for below, leaf, trained in _leaves(value, path in trainable):
                kind = nnx.Param if trained else Stored if below else Frozen
                _insert(tree, (*keys[path], *below), _variable(kind, leaf, None if below else origins.get(path)))
        for path, value in program.state.items():
            _insert(tree, keys[path], _variable(nnx.Variable, value, origins.get(path)))
        for key, child in tree.items():
            setattr(self, str(key), _node(child))

    def __call__(self, *args: Any, entry: str | None = None, **kwargs: Any) -> Any:
        """The output for given inputs; state among the variables is updated in place.

        Args:
            *args: the inputs of the entry.
            entry: which entry; the module's own by default.
            **kwargs: inputs by name.

        Raises:
            SignatureError: the inputs do not fit.
        """
        program = self._definition.program
        params = {path: self._parameter(path, like) for path, like in program.params.items()}
        state = {path: _read(self._variable(self._definition.keys[path])) for path in program.state}
        output, after, aux = program.apply(params, state, *args, entry=entry or self._entry, **kwargs)
        for path, value in after.items():
            if value is not state[path]:
                _write(self._variable(self._definition.keys[path]), value)
        for path, value in aux.items():
            self._note(path.split("."), value)
        return output

    def train(self, **attributes: Any) -> None:
        """Makes calls run the first entry that was captured in mode "train".

        Raises:
            SignatureError: the program has none.
        """
        self._switch("train", attributes)

    def eval(self, **attributes: Any) -> None:
        """Makes calls run the first entry that was captured in mode "eval".

        Raises:
            SignatureError: the program has none.
        """
        self._switch("eval", attributes)

    def _switch(self, mode: str, attributes: dict[str, Any]) -> None:
        entries = self._definition.program.entries
        if attributes:
            raise SignatureError(
                f"a captured program has no attributes to set, such as '{next(iter(attributes))}'; capture an entry "
                "for each way to call the model: program.with_entry(...)"
            )
        if entries[self._entry].mode == mode:
            return
        name = next((name for name, entry in entries.items() if entry.mode == mode), None)
        if name is None:
            raise SignatureError(
                f"the program '{self._definition.program.name}' has no entry in mode '{mode}'; add one: "
                f"program.with_entry('{mode}', *inputs, mode='{mode}')"
            )
        self._entry = name

    def _parameter(self, path: str, like: Any) -> Any:
        keys = self._definition.keys[path]
        if not isinstance(like, Encoded):
            return _read(self._variable(keys))
        arrays = [_read(self._variable((*keys, *below))) for below, _, _ in _leaves(like, False)]
        return jax.tree.unflatten(jax.tree.structure(like), arrays)

    def _variable(self, keys: Keys) -> Any:
        node: Any = self
        for key in keys:
            node = getattr(node, str(key))
        return node

    def _note(self, keys: Sequence[str], value: Any) -> None:
        """Writes an intermediate, below modules that had no variables of their own if need be."""
        node: Any = self
        for key in keys[:-1]:
            if isinstance(node, nnx.List):
                node.extend(Branch() for _ in range(len(node), int(key) + 1))
            elif not hasattr(node, key):
                setattr(node, key, Branch())
            node = getattr(node, key)
        if hasattr(node, keys[-1]):
            _write(getattr(node, keys[-1]), value)
        else:
            setattr(node, keys[-1], nnx.Intermediate(value))


Origin = tuple[type[nnx.Variable[Any]], dict[str, Any]]
"""Kind and metadata of the variable that a model held an array in."""


def _origins(program: "Program") -> tuple[dict[str, Keys], dict[str, Origin]]:
    """Where each path's variable goes, and by path what it was in the model that was captured, as far as is known."""
    source = next(iter(program.entries.values())).source
    paths = [*program.params, *program.state]
    keys: dict[str, Keys] = {path: tuple(int(k) if k.isdecimal() else k for k in path.split(".")) for path in paths}
    origins: dict[str, Origin] = {}
    if isinstance(source, NnxSource):
        for original, variable in (*source.params, *source.rest):
            path = join(original)
            if path in keys:
                keys[path] = original
            if isinstance(variable, nnx.Variable):
                origins[path] = (type(variable), variable.get_metadata())
    elif isinstance(source, LinenSource):
        for path in program.state:
            origins[path] = (nnx.variable_type_from_name(path.partition(".")[0], allow_register=True), {})
    return keys, origins


def _leaves(value: Any, trainable: bool) -> Iterator[tuple[Keys, Any, bool]]:
    """The arrays of a parameter: their keys below its path, and whether they get gradients."""
    if not isinstance(value, Encoded):
        yield (), value, trainable
        return
    flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value and isinstance(x, Encoded))
    for path, leaf in flat:
        here = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if isinstance(leaf, Encoded):
            for below, inner, trained in _leaves(leaf, trainable and leaf.trainable):
                yield (*here, *below), inner, trained
        else:
            yield here, leaf, trainable and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _variable(kind: type[nnx.Variable[Any]], value: Any, origin: Origin | None) -> nnx.Variable[Any]:
    """A variable of the kind that the model had, where that is a `kind`, with its metadata."""
    if origin is None:
        return kind(value)
    original, metadata = origin
    if issubclass(original, kind):
        kind = original
    return kind.from_metadata(value, metadata) if metadata else kind(value)


def _insert(tree: dict[Any, Any], keys: Keys, variable: nnx.Variable[Any]) -> None:
    for position, key in enumerate(keys[:-1]):
        child: Any = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise CaptureError(
                f"'{join(keys[: position + 1])}' is a variable and the beginning of '{join(keys)}', so a module cannot "
                "hold both; rename one in the model"
            )
        tree = child
    if keys[-1] in tree:
        raise CaptureError(
            f"'{join(keys)}' is a variable and the beginning of another, or both a parameter and state, so a module "
            "cannot hold both; rename one in the model"
        )
    tree[keys[-1]] = variable


def _node(tree: Any) -> Any:
    """Modules in place of dictionaries; a list where the keys are positions, empty where the model had none."""
    if not isinstance(tree, dict):
        return tree
    children = {key: _node(child) for key, child in tree.items()}
    if all(isinstance(key, int) for key in children) and max(children) < 16 * len(children):
        return nnx.List([children.get(index, Branch()) for index in range(max(children) + 1)])
    branch = Branch()
    for key, child in children.items():
        setattr(branch, str(key), child)
    return branch


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _read(variable: Any) -> Any:
    value = variable.get_raw_value()
    return value[...] if variable.ref else value


def _write(variable: Any, value: Any) -> None:
    if variable.ref:
        variable.get_raw_value()[...] = value
    else:
        variable.set_raw_value(value)


def to_module(program: "Program", entry: str | None = None) -> ProgramModule:
    """A program as an `nnx.Module`; see `ProgramModule`.

    Args:
        program: what the module computes. Its arrays are not copied.
        entry: the entry that a call runs; the first one by default.

    Raises:
        SignatureError: the program has no such entry.
        CaptureError: one path is a variable and the beginning of another.
    """
    return ProgramModule(program, entry)
