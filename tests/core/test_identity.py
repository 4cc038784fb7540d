"""With no pass applied, a captured program lowers to the StableHLO of the model itself, names and locations aside.

The reference is written with JAX and Flax alone, over the same flat dictionaries of parameters and state.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
import stablehlo
import zoo
from compax.experiments.benchmarks.bodies import BODIES, Body
from compax.models import decoder

Arrays = dict[str, Any]

DECODERS: dict[str, dict[str, Any]] = {
    "unrolled": {},
    "scanned": {"scan": True},
    "unrolled with remat": {"remat": True},
    "scanned with remat": {"scan": True, "remat": True},
    "bfloat16": {"dtype": "bfloat16"},
    "layernorm, plain, biased, own head": {
        "norm": "layernorm",
        "gated": False,
        "activation": "gelu",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied": False,
    },
}


def nnx_reference(model: nnx.Module, **kwargs: Any) -> tuple[Callable[..., Any], Arrays, Arrays]:
    """The model as `function(params, state, *inputs)`, its parameters and its state by path."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    templates = [
        {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)} for state in states
    ]

    def function(params: Arrays, state: Arrays, *inputs: Any) -> Any:
        refilled = [
            nnx.from_flat_state([(path, leaf.replace(arrays[name])) for name, (path, leaf) in template.items()])
            for template, arrays in zip(templates, (params, state), strict=True)
        ]
        return nnx.merge(graphdef, *refilled, copy=True)(*inputs, **kwargs)

    params, state = ({name: leaf[...] for name, (_, leaf) in template.items()} for template in templates)
    return function, params, state


def linen_reference(module: Any, variables: Any, **kwargs: Any) -> tuple[Callable[..., Any], Arrays, Arrays]:
    """The same for a Linen module whose only collection is `params`."""

    def function(params: Arrays, state: Arrays, *inputs: Any) -> Any:
        return module.apply({"params": flax.traverse_util.unflatten_dict(params, sep=".")}, *inputs, **kwargs)

    return function, flax.traverse_util.flatten_dict(variables["params"], sep="."), {}


def assert_identical(model: zoo.Model) -> None:
    """Compares the lowered text of a captured model with that of its reference, and says where they part."""
    if model.variables is None:
        function, params, state = nnx_reference(model.module, **model.kwargs)
    else:
        function, params, state = linen_reference(model.module, model.variables, **model.kwargs)
    options = {} if model.variables is None else {"variables": model.variables}
    program = compax.capture(model.module, *model.inputs, **options, **model.kwargs)
    assert set(program.params) == set(params)
    assert set(program.state) == set(state)
    ours = stablehlo.lower(
        lambda params, state, *inputs: program.apply(params, state, *inputs, **model.kwargs)[0],
        *(params, state, *model.inputs),
    )
    theirs = stablehlo.lower(function, params, state, *model.inputs)
    assert len(stablehlo.functions(ours)) == len(stablehlo.functions(theirs))
    ours, theirs = stablehlo.normalize(ours), stablehlo.normalize(theirs)
    difference = difflib.unified_diff(theirs.splitlines(), ours.splitlines(), "model", "program", lineterm="", n=1)
    assert ours == theirs, "\n".join([line[:200] for line in difference][:40])


@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS.keys())
def test_decoder(options: dict[str, Any]) -> None:
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    assert_identical(zoo.Model(model, None, decoder.example_inputs(config, sequence=16), {}, lambda output: output))


@zoo.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_third_party_model(name: str) -> None:
    assert_identical(zoo.load(name))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_body(body: Body) -> None:
    assert_identical(zoo.Model(body.make(), None, body.inputs(), {}, lambda output: output))


def test_module_with_random_state_and_statistics() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.norm(self.linear(x)))

    assert_identical(zoo.Model(Model(), None, (jnp.ones((4, 8)),), {}, lambda output: output))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_gradient_of_the_decoder(scan: bool) -> None:
    """What JAX differentiates is the same as well."""
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=scan, remat=True)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    tokens = decoder.example_inputs(config, sequence=17)[0]
    function, params, state = nnx_reference(model)
    program = compax.capture(model, tokens)

    def objective(call: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, state, tokens: call(params, state, tokens).astype(jnp.float32).mean())

    ours = stablehlo.lower(objective(lambda *arguments: program.apply(*arguments)[0]), params, state, tokens)
    theirs = stablehlo.lower(objective(function), params, state, tokens)
    assert stablehlo.normalize(ours) == stablehlo.normalize(theirs)


def test_equal_layers_stay_one_function() -> None:
    """Rebuilding must not turn a body that many layers share into one for each."""
    counts = []
    for num_layers in (2, 8):
        config = dataclasses.replace(decoder.SIZES["tiny"], num_layers=num_layers)
        program = compax.capture(
            decoder.Decoder(config, rngs=nnx.Rngs(0)), *decoder.example_inputs(config, sequence=16)
        )
        text = stablehlo.lower(
            lambda params, state, tokens, program=program: program.apply(params, state, tokens)[0],
            *(program.params, program.state, *decoder.example_inputs(config, sequence=16)),
        )
        counts.append(len(stablehlo.functions(text)))
    assert counts[0] == counts[1]


def test_the_comparison_sees_a_difference() -> None:
    """The normal form hides names, not computations."""
    x = jnp.ones((4, 4))
    tanh = stablehlo.normalize(stablehlo.lower(lambda x: jax.jit(jnp.tanh)(x), x))
    assert tanh == stablehlo.normalize(stablehlo.lower(lambda y: jax.jit(lambda z: jnp.tanh(z))(y), x))
    assert tanh != stablehlo.normalize(stablehlo.lower(lambda x: jax.jit(jnp.sin)(x), x))
    assert tanh != stablehlo.normalize(stablehlo.lower(lambda x: jax.jit(jnp.tanh)(x), x.astype(jnp.bfloat16)))
    assert tanh != stablehlo.normalize(stablehlo.lower(lambda x: jnp.tanh(x), x))
