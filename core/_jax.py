"""The one place that knows JAX's internals: jaxprs, equations, and how to bind them again.

Works on jax 0.10.2 up to the newest release. What differs between them ends here: where classes live, whether a closed
jaxpr is a class of its own, how `scan` counts its operands.
"""

import contextlib
import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
from jax._src import core as _core
from jax._src import distributed as _distributed
from jax._src import source_info_util as _source_info
from jax._src.interpreters import partial_eval as _partial_eval
from jax.extend import core as _extend

AbstractValue = Any
Equation = Any
ClosedJaxpr = Any
Array = Any

Jaxpr = _core.Jaxpr
Primitive = _extend.Primitive
_Closed = _extend.ClosedJaxpr
_BODY_TYPES = (Jaxpr, _Closed)

ENTERABLE = frozenset({"jit", "pjit", "scan", "while", "cond", "remat", "remat2", "checkpoint", "shard_map"})
"""Primitives whose bodies are rebuilt with changed contents; the bodies of all others are bound as recorded."""

CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"})


def make_jaxpr(function: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """The closed jaxpr of `function` at `args` (arrays or shapes)."""
    return jax.make_jaxpr(function)(*args)


def trace(function: Callable[..., Any], *avals: AbstractValue) -> ClosedJaxpr:
    """The closed jaxpr of `function` at abstract values, weak types kept."""
    return jax.make_jaxpr(function)(*map(as_struct, avals))


def as_struct(aval: AbstractValue) -> jax.ShapeDtypeStruct:
    """A shape that `make_jaxpr` takes, with the weak type of `aval`."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def abstract(x: Any) -> AbstractValue:
    """The abstract value of an array, scalar, tracer or shape."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return _core.ShapedArray(x.shape, x.dtype, weak_type=bool(getattr(x, "weak_type", False)))
    return jax.typeof(x)


def is_literal(atom: Any) -> bool:
    """Whether a jaxpr atom is a literal."""
    return isinstance(atom, _core.Literal)


def is_tracer(x: Any) -> bool:
    """Whether an array has no value yet because a transformation is tracing it."""
    return isinstance(x, _core.Tracer)


def open_jaxpr(closed: ClosedJaxpr) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants."""
    return closed.jaxpr, closed.consts


def close(jaxpr: Any) -> ClosedJaxpr:
    """A closed jaxpr of a nested one, which may be closed already or have no constants."""
    return jaxpr if isinstance(jaxpr, _Closed) else _Closed(jaxpr, ())


def split_parameters(equation: Equation) -> tuple[dict[str, Any], list[Any]]:
    """Parameters of an equation: those without computations, and the nested jaxprs in order."""
    attributes: dict[str, Any] = {}
    nested: list[Any] = []
    for name, parameter in equation.params.items():
        if isinstance(parameter, _BODY_TYPES):
            nested.append(parameter)
        elif isinstance(parameter, tuple) and parameter and all(isinstance(p, _BODY_TYPES) for p in parameter):
            nested.extend(parameter)
        else:
            attributes[name] = parameter
    return attributes, nested


@contextlib.contextmanager
def recorded_context(equation: Equation) -> Any:
    """The settings under which an equation was recorded: mesh, compute type, metadata, source location, name stack."""
    stack = _source_info.current_name_stack() + equation.source_info.name_stack
    with (
        _source_info.user_context(equation.source_info.traceback, name_stack=stack),
        equation.ctx.manager,
    ):
        yield


def bind(equation: Equation, args: Sequence[Array]) -> list[Array]:
    """Binds a recorded equation to new operands, exactly as it was recorded."""
    with recorded_context(equation):
        outputs = equation.primitive.bind(*args, **equation.primitive.get_bind_params(equation.params))
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def scan_counts(attributes: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many are carried."""
    if "num_consts" in attributes:
        return attributes["num_consts"], attributes["num_carry"]
    constants, carry, _ = attributes["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def varying_axes(x: Array) -> frozenset[str]:
    """The manual mesh axes over which an array varies inside `shard_map`."""
    return _varying(jax.typeof(x))


def _varying(aval: AbstractValue) -> frozenset[str]:
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying) if manual is not None else frozenset()


def same_type(left: AbstractValue, right: AbstractValue) -> bool:
    """Whether shapes and dtypes agree; weak types are left aside."""
    if getattr(left, "shape", None) != getattr(right, "shape", None):
        return False
    return getattr(left, "dtype", None) == getattr(right, "dtype", None)


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def dtype_text(dtype: Any) -> str:
    """A dtype in the short form of MLIR and XLA: f32, bf16, i8, bool."""
    name = str(dtype)
    stem = name.rstrip("0123456789")
    return _SHORT[stem] + name[len(stem) :] if stem in _SHORT else name


def aval_text(aval: AbstractValue) -> str:
    """An abstract value as `f32[8,16]`."""
    shape = ",".join(map(str, getattr(aval, "shape", ())))
    return f"{dtype_text(getattr(aval, 'dtype', aval))}[{shape}]"


def is_explicit(x: Array) -> bool:
    """Whether the sharding of an array is part of its type."""
    return is_explicit_type(jax.typeof(x))


def is_explicit_type(aval: AbstractValue) -> bool:
    """Whether a type says how its values lie on a mesh."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types


def says_how_it_lies(aval: AbstractValue) -> bool:
    """Whether a type splits its values over a mesh."""
    return is_explicit_type(aval) and any(entry is not None for entry in aval.sharding.spec)


def vary(x: Array, axes: frozenset[str]) -> Array:
    """An array marked as varying over more manual mesh axes; the values stay."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def convolve(lhs: Array, rhs: Array, *, preferred_element_type: Any, **attributes: Any) -> Array:
    """`conv_general_dilated` with the parameters of a recorded equation and another accumulator."""
    return jax.lax.conv_general_dilated_p.bind(lhs, rhs, preferred_element_type=preferred_element_type, **attributes)


def name_stack(equation: Equation | None) -> str:
    """The scopes that an equation was traced in, outermost first, with the transformations that it went through."""
    return "" if equation is None else str(equation.source_info.name_stack)


def source_text(equation: Equation) -> str:
    """Where the model's code asked for an equation: `file.py:12:4 (function)`."""
    return _source_info.summarize(equation.source_info)


def retyped(
    equation: Equation, parameters: dict[str, Any], inputs: Sequence[AbstractValue], outputs: Sequence[AbstractValue]
) -> Equation:
    """A recorded equation with other parameters and types, under the settings under which it was recorded."""
    invars, outvars = list(map(_core.Var, inputs)), list(map(_core.Var, outputs))
    return equation.replace(invars=invars, outvars=outvars, params=parameters)


def conversion(beside: Equation, aval: AbstractValue, dtype: Any) -> Equation:
    """A `convert_element_type`, as it would have been recorded beside another equation."""
    return _core.new_jaxpr_eqn(
        [_core.Var(aval)],
        [_core.Var(with_dtype(aval, dtype))],
        jax.lax.convert_element_type_p,
        {"new_dtype": dtype, "weak_type": False, "sharding": None},
        _core.no_effects,
        beside.source_info,
        beside.ctx,
    )


def with_dtype(aval: AbstractValue, dtype: Any) -> AbstractValue:
    """An abstract value in another dtype: shape, sharding and varying axes stay, the type is no longer weak."""
    return aval.update(dtype=dtype, weak_type=False)


def with_shape(aval: AbstractValue, shape: Sequence[int]) -> AbstractValue:
    """An abstract value in another shape of the same rank: dtype, weak type, sharding and varying axes stay."""
    return aval.update(shape=tuple(shape))


def derivative_rule(equation: Equation) -> tuple[ClosedJaxpr, list[bool]]:
    """The rule of a `custom_jvp_call`: primals and then a tangent for each, to outputs and then their tangents.

    The operands that the rule closes over (`num_consts`, the first ones) have no place in it. A tangent that is always
    zero is left out of the results: the flags say which.
    """
    count = len(equation.invars) - equation.params["num_consts"]
    jaxpr, constants, zeros = equation.params["jvp_jaxpr_fun"].call_wrapped(*[False] * count)
    return (_Closed(jaxpr, constants) if isinstance(jaxpr, Jaxpr) else jaxpr), list(zeros)


def has_effects(equation: Equation | None) -> bool:
    """Whether an equation does something besides computing its results."""
    return equation is not None and bool(equation.effects)


def function_name(jaxpr: Any) -> str:
    """What the function that a nested jaxpr was traced from is called."""
    return open_jaxpr(close(jaxpr))[0].debug_info.func_name


def exported(function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], platform: str) -> bytes:
    """A function of arrays as StableHLO for a platform that need not be there, for `imported` of this version of JAX.

    `jax.export` has a format of its own for files, which outlives versions and needs another library.
    """
    found = jax.export.export(jax.jit(function, keep_unused=True), platforms=(platform,))(*shapes)
    return pickle.dumps(dataclasses.replace(found, _get_vjp=None))


def imported(content: bytes) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """The function that `exported` wrote, and the shapes that it takes. Of a file that somebody else wrote: never."""
    found = pickle.loads(content)  # noqa: S301 - written by `exported` in the process that asks
    return found.call, list(map(as_struct, found.in_avals))


def coordination_client() -> Any:
    """The client of the coordination service of `jax.distributed`, once that is initialized."""
    assert _distributed.global_state.client is not None
    return _distributed.global_state.client


def keep_encoded(primitive: Any, encode: Callable[..., Any], decode: Callable[..., Any]) -> None:
    """Has `jax.checkpoint` keep what `encode` makes of a value, where its policy says that the value is kept.

    The forward pass goes on with the value itself; the backward pass gets what `decode` makes of the parts.

    Args:
        primitive: one that returns its only operand.
        encode: under `jax.jit`, from a value to the same value and the parts.
        decode: under `jax.jit`, from a shape and a dtype (static), and the parts, to a value.
    """

    def rule(saveable: Callable[..., Any], unknown: Any, instantiated: Any, equation: Equation) -> Any:
        (x,), (y,) = equation.invars, equation.outvars
        missing = [] if instantiated[0] else [x]
        if unknown[0]:
            return None, equation, [True], [True], missing
        case = _partial_eval.ensure_enum(saveable(equation.primitive, x.aval, **equation.params))
        if not isinstance(case, _partial_eval.SaveableType):
            return equation, equation, [False], [True], missing
        with equation.ctx.manager:
            encoding = _single(encode, [x.aval])
            parts = [_core.Var(part.aval) for part in encoding.outvars[1:]]
            decoding = _single(functools.partial(decode, y.aval.shape, y.aval.dtype), [part.aval for part in parts])
        encoding = encoding.replace(invars=[x], outvars=[y, *parts], source_info=equation.source_info)
        decoding = decoding.replace(invars=parts, outvars=[y], source_info=equation.source_info)
        return encoding, decoding, [False], [True], parts

    _partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


def _single(function: Callable[..., Any], avals: Sequence[AbstractValue]) -> Equation:
    """The one equation that a function under `jax.jit` is, at abstract values."""

    def varying(*args: Array) -> Any:
        return function(*(vary(x, _varying(aval)) for x, aval in zip(args, avals, strict=True)))

    structs = [
        jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=aval.sharding if is_explicit_type(aval) else None
        )
        for aval in avals
    ]
    return jax.make_jaxpr(varying)(*structs).jaxpr.eqns[-1]
