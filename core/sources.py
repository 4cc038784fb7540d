"""What a program was captured from: an NNX module, a Linen module, or a plain function, each as one pure function.

A `Source` turns parameters and state, as flat dictionaries, and the call's arguments into the outputs, the state that
changed, and values that first appear during the call (`aux`). It keeps the model's structure, never its arrays.
"""

import abc
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax import nnx, traverse_util

from compax.errors import CaptureError

Arrays = dict[str, Any]
CallResult = tuple[Any, Arrays, dict[str, Any]]
"""Output, changed state by path, pytrees that first appear in the call by path."""

Annotations = dict[str, tuple[str | None, ...]]


def join(path: Sequence[Any]) -> str:
    """A path of keys as `blocks.0.mlp.up.kernel`."""
    return ".".join(str(key) for key in path)


def unwrap(x: Any) -> Any:
    """The array in an NNX variable; anything else as it is."""
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x


@dataclasses.dataclass(frozen=True, eq=False)
class Source(abc.ABC):
    """Base of the three kinds.

    Attributes:
        arguments: names of the positional arguments that a call takes, as far as the signature tells.
    """

    arguments: tuple[str, ...]
    hoists: ClassVar[bool] = False
    """Whether large arrays that the model closes over are parameters too."""

    def select(self, params: Arrays) -> Sequence[str]:
        """Which of a program's parameters the call takes."""
        return list(params)

    @abc.abstractmethod
    def call(self, params: Arrays, state: Arrays, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallResult:
        """Runs the model once, purely; a parameter that the model assigns again is among the changes."""

    def annotations(self) -> Annotations:
        """Names that the model's author gave to dimensions of parameters (Flax partitioning metadata), by path."""
        return {}

    @abc.abstractmethod
    def variant(self, *, method: Any, mode: str | None, loss: Callable[..., Any] | None, mutable: Any) -> "Source":
        """The same model, called in another way."""


def argument_names(function: Callable[..., Any], skip: int) -> tuple[str, ...]:
    """Names of the positional parameters of `function` after the first `skip`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)[skip:]


def plain(node: Any) -> Any:
    """The same graph with plain variables; they may be references, or JAX types of their own, which cannot be split."""
    return nnx.with_vars(node, hijax=False, ref=False, allow_duplicates=True)


def leaves(flat: Iterable[tuple[Sequence[Any], Any]]) -> Arrays:
    """The arrays of a flat NNX state by joined path; a variable that holds a pytree gives one for each leaf."""
    result = {}
    for path, variable in flat:
        for inner, leaf in jax.tree_util.tree_flatten_with_path(unwrap(variable))[0]:
            suffix = jax.tree_util.keystr(inner, simple=True, separator=".")
            result[join((*path, suffix) if suffix else path)] = leaf
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class NnxSource(Source):
    """An NNX module: its graph definition and, by path, templates of its variables (shapes in place of arrays)."""

    graphdef: Any
    params: tuple[tuple[tuple[Any, ...], Any], ...]
    rest: tuple[tuple[tuple[Any, ...], Any], ...]
    method: str | None
    loss: Callable[..., Any] | None

    def restore(self, params: Arrays, state: Arrays) -> nnx.Module:
        """The module with given arrays: a copy that shares nothing with any other."""
        flat = [(path, _fill(path, template, params)) for path, template in self.params]
        rest = [(path, _fill(path, template, state)) for path, template in self.rest]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), nnx.from_flat_state(rest), copy=True)

    def annotations(self) -> Annotations:
        found = ((join(path), x.get_metadata()) for path, x in self.params if isinstance(x, nnx.Variable))
        named = ((path, metadata.get("out_sharding") or metadata.get("sharding_names")) for path, metadata in found)
        return {path: _dimension_names(names) for path, names in named if names}

    def variant(self, *, method: Any, mode: str | None, loss: Callable[..., Any] | None, mutable: Any) -> "NnxSource":
        model = self.restore(leaves(self.params), leaves(self.rest))
        return nnx_source(model, method=method, mode=mode, loss=loss)[0]

    def call(self, params: Arrays, state: Arrays, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallResult:
        model = self.restore(params, state)
        if self.loss is not None:
            output = self.loss(model, *args, **kwargs)
        else:
            output = getattr(model, self.method or "__call__")(*args, **kwargs)
        known = {path for path, _ in (*self.params, *self.rest)}
        after = list(nnx.to_flat_state(nnx.state(model)))
        aux = {join(path): unwrap(variable) for path, variable in after if path not in known}
        held = leaves(item for item in after if item[0] in known)
        before = {**params, **state}
        if held.keys() != before.keys():
            changed = sorted(held.keys() ^ before.keys())
            raise CaptureError(f"the call changes the structure of the variable that holds '{changed[0]}'")
        return output, {path: x for path, x in held.items() if x is not before[path]}, aux


def _dimension_names(names: Iterable[Any]) -> tuple[str | None, ...]:
    """Names of logical or mesh axes, several for one dimension joined."""
    return tuple(name if name is None or isinstance(name, str) else "+".join(map(str, name)) or None for name in names)


def _fill(path: Sequence[Any], template: Any, arrays: Arrays) -> Any:
    value = jax.tree.unflatten(
        jax.tree.structure(unwrap(template)), [arrays[name] for name in leaves([(path, template)])]
    )
    return template.replace(value) if isinstance(template, nnx.Variable) else value


def _shape(variable: Any) -> Any:
    """A variable, or a bare array, with arrays replaced by their shapes, so that a source holds no memory."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), unwrap(variable))
    return variable.replace(shapes) if isinstance(variable, nnx.Variable) else shapes


def nnx_source(
    model: nnx.Module, *, method: str | None, mode: str | None, loss: Callable[..., Any] | None
) -> tuple[NnxSource, Arrays, Arrays]:
    """The source, parameters and state of an NNX module, which stays untouched.

    Raises:
        CaptureError: the mode is unknown or the method is missing.
    """
    model = plain(model)
    if mode is not None:
        model = nnx.merge(*nnx.split(model), copy=True)
        if mode == "train":
            model.train()
        else:
            model.eval()
    if loss is None and not callable(getattr(model, method or "__call__", None)):
        raise CaptureError(f"{type(model).__name__} has no method '{method or '__call__'}' to capture")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    flat_params, flat_rest = list(nnx.to_flat_state(params)), list(nnx.to_flat_state(rest))
    names = (
        argument_names(loss, 1) if loss is not None else argument_names(getattr(type(model), method or "__call__"), 1)
    )
    source = NnxSource(
        arguments=names,
        graphdef=graphdef,
        params=tuple((path, _shape(v)) for path, v in flat_params),
        rest=tuple((path, _shape(v)) for path, v in flat_rest),
        method=method,
        loss=loss,
    )
    return source, leaves(flat_params), leaves(flat_rest)


@dataclasses.dataclass(frozen=True, eq=False)
class LinenSource(Source):
    """A Linen module with the structure of its variables."""

    module: nn.Module
    params: tuple[tuple[str, ...], ...]
    rest: tuple[tuple[str, ...], ...]
    method: str | Callable[..., Any] | None
    mutable: bool | str | Sequence[str]
    loss: Callable[..., Any] | None
    names: Annotations

    def annotations(self) -> Annotations:
        return self.names

    def variant(self, *, method: Any, mode: str | None, loss: Callable[..., Any] | None, mutable: Any) -> "LinenSource":
        names = linen_arguments(self.module, method, loss)
        return dataclasses.replace(self, arguments=names, method=method, mutable=mutable, loss=loss)

    def call(self, params: Arrays, state: Arrays, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallResult:
        flat = {("params", *path): params[join(path)] for path in self.params}
        flat |= {path: state[join(path)] for path in self.rest}
        variables = traverse_util.unflatten_dict(flat)
        rngs = kwargs.pop("rngs", None)
        if self.loss is not None:
            call = nn.apply(self.loss, self.module, mutable=self.mutable)
            result = call(variables, *args, rngs=rngs, **kwargs)
        else:
            result = self.module.apply(variables, *args, rngs=rngs, method=self.method, mutable=self.mutable, **kwargs)
        if self.mutable is False:
            return result, {}, {}
        output, changed = result
        flat = {
            join(path): value
            for path, value in traverse_util.flatten_dict(dict(changed)).items()
            if path[0] != "params"
        }
        updates = {path: value for path, value in flat.items() if path in state and value is not state[path]}
        return output, updates, {path: value for path, value in flat.items() if path not in state}


def linen_source(
    module: nn.Module,
    variables: Mapping[str, Any] | None,
    *,
    method: str | Callable[..., Any] | None,
    mutable: bool | str | Sequence[str],
    loss: Callable[..., Any] | None,
) -> tuple[LinenSource, Arrays, Arrays]:
    """The source, parameters and state of a Linen module and its variables.

    Raises:
        CaptureError: the variables are missing or have no `params`.
    """
    if variables is None or "params" not in variables:
        raise CaptureError(
            f"a Linen module comes with its variables: capture({type(module).__name__}(...), *inputs, "
            "variables={'params': ...})"
        )
    flat = traverse_util.flatten_dict(_plain(variables))
    boxed = traverse_util.flatten_dict(_plain(variables["params"], boxes=True))
    annotations = {join(path): _dimension_names(x.names) for path, x in boxed.items() if isinstance(x, nn.Partitioned)}
    params = {path[1:]: x for path, x in flat.items() if path[0] == "params"}
    rest = {path: x for path, x in flat.items() if path[0] != "params"}
    names = linen_arguments(module, method, loss)
    source = LinenSource(names, module, tuple(params), tuple(rest), method, mutable, loss, annotations)
    return source, {join(p): x for p, x in params.items()}, {join(p): x for p, x in rest.items()}


def linen_arguments(
    module: nn.Module, method: str | Callable[..., Any] | None, loss: Callable[..., Any] | None
) -> tuple[str, ...]:
    """Names of the positional arguments that a call of a Linen module takes."""
    if loss is not None:
        return argument_names(loss, 1)
    return argument_names(method if callable(method) else getattr(type(module), method or "__call__"), 1)


def _plain(tree: Any, *, boxes: bool = False) -> Any:
    """Mappings of any kind as dictionaries; boxed values (`nn.Partitioned`) unboxed, unless the boxes are wanted."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value, boxes=boxes) for key, value in tree.items()}
    return tree.unbox() if isinstance(tree, nn.meta.AxisMetadata) and not boxes else tree


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionSource(Source):
    """A plain function `fn(params, *inputs)`; `params` is any pytree."""

    function: Callable[..., Any]
    paths: tuple[str, ...]
    tree: Any
    hoists: ClassVar[bool] = True

    def select(self, params: Arrays) -> Sequence[str]:
        return self.paths

    def variant(
        self, *, method: Any, mode: str | None, loss: Callable[..., Any] | None, mutable: Any
    ) -> "FunctionSource":
        if loss is None:
            raise CaptureError("a plain function has one way to be called; give another function as `loss`")
        return dataclasses.replace(self, arguments=argument_names(loss, 1), function=loss)

    def call(self, params: Arrays, state: Arrays, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallResult:
        tree = jax.tree.unflatten(self.tree, [params[path] for path in self.paths])
        return self.function(tree, *args, **kwargs), {}, {}


def function_source(function: Callable[..., Any], params: Any) -> tuple[FunctionSource, Arrays]:
    """The source and parameters of a plain function."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path, _ in leaves)
    return FunctionSource(argument_names(function, 1), function, paths, tree), {
        path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)
    }
