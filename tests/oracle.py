"""One differential oracle for all passes: what a transformed program owes the program that it came from.

A pass's own test is a few lines on top of it:

    program = assert_preserves(Quantize(weights="int8"), model, tokens)
    assert program.params["head.kernel"].format == "int8"
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compax
from compax import Program
from compax.contracts import (
    METRICS,
    ApproximateGradients,
    Contract,
    Lossy,
    Tolerance,
    largest_relative_error,
    rounding_tolerance,
)
from compax.instruments import observe
from compax.transform import Inputs, Pass
from compax.verify import verify

Arrays = Mapping[str, Any]


def assert_preserves(
    pass_: Pass,
    model: Any,
    *inputs: Any,
    variables: Any = None,
    gradients: bool = True,
    idempotent: bool = True,
    **kwargs: Any,
) -> Program:
    """Applies a pass to a model and asserts everything that holds of every pass.

    1. The pass rewrites something, and what it leaves verifies.
    2. Outputs stay within its contract: compiled, and operation by operation where it promises the same bits.
    3. Gradients of what both programs train, and of the inputs, stay within it as well.
    4. The transformed program computes the same as an argument of `jit`, inside `scan`, under `vmap`, and with its
       batch spread over devices.
    5. Applied again, it changes nothing.
    6. The model, and the program that was given, are what they were: the same bits before and after.

    Args:
        pass_: What to apply.
        model: An NNX module; or a Linen one, with `variables`.
        *inputs: Arrays that the model is called with, the batch in front.
        variables: Those of a Linen module.
        gradients: Whether the model can be differentiated in reverse.
        idempotent: Whether a second run has nothing left to do.
        **kwargs: More arguments of the model, static ones.

    Returns:
        The transformed program.
    """
    options = kwargs if variables is None else {**kwargs, "variables": variables}
    given = compax.capture(model, *inputs, **options)
    untouched = _bits((given.params, given.state))
    output_before = _bits(_call_model(model, variables, inputs, kwargs))

    program = compax.Pipeline([pass_])(given, *inputs, **kwargs)
    assert program is not given, f"{pass_} changed nothing: {program.history}"
    assert program.history[-1].pass_ == pass_
    verify(program)

    contract = pass_.promise()
    sample = Inputs(inputs, kwargs)
    for compiled in (False, True) if contract.operation_by_operation else (True,):
        contract.check(observe(given, sample, compiled=compiled), observe(program, sample, compiled=compiled))
    if gradients:
        _check_gradients(contract, given, program, inputs, kwargs)
    _check_settings(program, inputs, kwargs)
    if idempotent:
        again = compax.Pipeline([pass_])(program, *inputs, **kwargs)
        assert again is program, f"{pass_} changed its own result: {again.history[-1]}"

    assert _bits((given.params, given.state)) == untouched, "the program that was given holds other arrays now"
    assert _bits(_call_model(model, variables, inputs, kwargs)) == output_before, (
        "the model computes something else now"
    )
    return program


def _call_model(model: Any, variables: Any, inputs: tuple[Any, ...], kwargs: Arrays) -> Any:
    if variables is not None:
        return model.apply(variables, *inputs, **kwargs)
    return nnx.merge(*nnx.split(model), copy=True)(*inputs, **kwargs)


def _bits(tree: Any) -> list[tuple[str, str, bytes]]:
    """Every array of a pytree as its path, its type and its bytes."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found.append((jax.tree_util.keystr(path), f"{leaf.dtype}{leaf.shape}", np.asarray(leaf).tobytes()))
    return found


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients_of(program: Program, inputs: tuple[Any, ...], kwargs: Arrays) -> dict[str, np.ndarray]:
    """Gradients of a fixed combination of the outputs, by name: for what the program trains and for float inputs."""
    trainable, rest = program.partition()
    positions = [i for i, x in enumerate(inputs) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

    def objective(trainable: Arrays, given: list[Any]) -> jax.Array:
        full = list(inputs)
        for position, x in zip(positions, given, strict=True):
            full[position] = x
        output = program.apply({**trainable, **rest}, program.state, *full, **kwargs)[0]
        leaves = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.vdot(x.astype(jnp.float32), _direction(x.shape)) for x in leaves)

    by_path, by_input = jax.jit(jax.grad(objective, argnums=(0, 1)))(trainable, [inputs[i] for i in positions])
    named = {f"parameter {path}": _master(gradient) for path, gradient in by_path.items()}
    return named | {f"input {i}": np.asarray(x) for i, x in zip(positions, by_input, strict=True)}


def _master(gradient: Any) -> np.ndarray:
    """The one array in the gradient of a parameter, encoded or not."""
    (leaf,) = jax.tree.leaves(gradient)
    return np.asarray(leaf)


def _direction(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def _check_gradients(
    contract: Contract, before: Program, after: Program, inputs: tuple[Any, ...], kwargs: Arrays
) -> None:
    """Holds gradients to the contract, all of a program's together as one vector: a single one may vanish."""
    expected, actual = gradients_of(before, inputs, kwargs), gradients_of(after, inputs, kwargs)
    names = sorted(actual.keys() & expected.keys())
    assert {name for name in expected if name.startswith("input")} <= set(names)
    assert all(np.isfinite(actual[name].astype(np.float32)).all() for name in names)
    if not names:
        return
    vectors = [np.concatenate([x[name].astype(np.float64).ravel() for name in names]) for x in (expected, actual)]
    metric, bound = _limit(contract, [expected[name].dtype for name in names])
    error = METRICS[metric](*vectors)
    assert error <= bound, f"gradients have a {metric} of {error:.3g}; the contract allows {bound:.3g}"


def _limit(contract: Contract, dtypes: list[Any]) -> tuple[str, float]:
    """The metric that a contract is stated in, and its bound; for the same bits, what the compiler may change."""
    if isinstance(contract, Lossy):
        return contract.metric, contract.bound
    if isinstance(contract, ApproximateGradients):
        return "relative output error", contract.bound
    freedom = max(map(rounding_tolerance, dtypes))
    return "largest relative error", max(contract.rtol, freedom) if isinstance(contract, Tolerance) else freedom


# -- settings ---------------------------------------------------------------------------------------------------------


def _check_settings(program: Program, inputs: tuple[Any, ...], kwargs: Arrays) -> None:
    """The same numbers as an argument of `jit`, inside `scan`, under `vmap`, and on several devices."""
    expected = jax.jit(_applied(program, kwargs))(program.params, program.state, *inputs)
    settings: dict[str, Callable[[], Any]] = {
        "as an argument of jit": lambda: jax.jit(lambda program, *inputs: program(*inputs, **kwargs))(program, *inputs),
        "inside scan": lambda: _in_scan(program, inputs, kwargs),
        "under vmap": lambda: _in_vmap(program, inputs, kwargs),
        "on several devices": lambda: _on_devices(program, inputs, kwargs),
    }
    for setting, run in settings.items():
        actual = run()
        assert jax.tree.structure(actual) == jax.tree.structure(expected), (
            f"{setting}, the output has another structure"
        )
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            error = largest_relative_error(np.asarray(one), np.asarray(other))
            allowed = rounding_tolerance(one.dtype)
            assert error <= allowed, f"{setting}, the output differs by {error:.3g} of its largest value: {allowed:.3g}"


def _applied(program: Program, kwargs: Arrays) -> Callable[..., Any]:
    return lambda params, state, *inputs: program.apply(params, state, *inputs, **kwargs)[0]


def _stacked(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two calls' inputs: the given ones, and the same with the batch turned around."""
    return jax.tree.map(lambda x: jnp.stack([x, jnp.flip(x, 0)]), inputs)


def _in_scan(program: Program, inputs: tuple[Any, ...], kwargs: Arrays) -> Any:
    def step(store: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        return store, _applied(program, kwargs)(*store, *inputs)

    scan = jax.jit(lambda store, inputs: jax.lax.scan(step, store, inputs)[1])
    return jax.tree.map(lambda x: x[0], scan((program.params, program.state), _stacked(inputs)))


def _in_vmap(program: Program, inputs: tuple[Any, ...], kwargs: Arrays) -> Any:
    function = lambda inputs: _applied(program, kwargs)(program.params, program.state, *inputs)  # noqa: E731
    return jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(function))(_stacked(inputs)))


def _on_devices(program: Program, inputs: tuple[Any, ...], kwargs: Arrays) -> Any:
    """With the batch over as many devices as divide it, and parameters whole on each."""
    batch = next(x.shape[0] for x in jax.tree.leaves(inputs) if x.ndim)
    count = max(n for n in range(1, jax.device_count() + 1) if batch % n == 0)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])

    def place(x: jax.Array) -> jax.Array:
        spec = PartitionSpec("data") if x.ndim and x.shape[0] == batch else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    whole = NamedSharding(mesh, PartitionSpec())
    store = jax.tree.map(lambda x: jax.device_put(x, whole), (program.params, program.state))
    return jax.jit(_applied(program, kwargs))(*store, *jax.tree.map(place, inputs))
