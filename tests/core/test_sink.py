"""Fused products taken apart and put together again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax import lowering
from compax.errors import RewriteError
from compax.experiments.benchmarks import zoo
from compax.models import decoder
from compax.rewrites.sink import fuse, sink

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
D, H, K, F = 12, 3, 4, 20
X = jax.random.normal(jax.random.key(0), (2, 5, D))


def outputs(program: compax.Program, case: zoo.Case) -> np.ndarray:
    return np.asarray(case.output(program(*case.arguments(), **case.kwargs)))


def by_operation(program: compax.Program, *inputs: Any) -> np.ndarray:
    """The first output, operation by operation: no compiler reorders anything."""
    (captured,) = program.graphs.values()
    given = iter(inputs)
    values = [program.params[t.path] if t.kind == "parameter" else next(given) for t in captured.inputs]
    return np.asarray(lowering.evaluate(captured.graph, values)[0])


def products(program: compax.Program) -> int:
    return sum(site.kind == "linear" for site in program.sites())


@foreign_warnings
@pytest.mark.parametrize("name", ["flax_gpt2", "flax_bloom"])
def test_the_fused_queries_keys_and_values_of_a_model_and_back(name: str) -> None:
    case = zoo.build(name)
    program = case.capture()
    before = outputs(program, case)
    attn = "attn.c_attn" if name == "flax_gpt2" else "self_attention.query_key_value"
    kernels = [f"transformer.h.{i}.{attn}.kernel" for i in range(2)]
    apart = program
    for kernel in kernels:
        apart = sink(apart, kernel)
    compax.verify(apart)
    assert products(apart) == products(program) + 4
    for kernel in kernels:
        assert kernel not in apart.params
        assert {f"{kernel}.{i}" for i in range(3)} <= apart.params.keys()
        assert {f"{kernel.replace('kernel', 'bias')}.{i}" for i in range(3)} <= apart.params.keys()
    assert (outputs(apart, case) == before).all()

    dim = -2 if name == "flax_gpt2" else -1
    heads = 1 if name == "flax_gpt2" else zoo.WIDTHS.num_heads
    back = apart
    for kernel in kernels:
        bias = kernel.replace("kernel", "bias")
        back = fuse(back, [f"{kernel}.{i}" for i in range(3)], kernel, dim, heads)
        back = fuse(back, [f"{bias}.{i}" for i in range(3)], bias, -1, heads)
    compax.verify(back)
    assert products(back) == products(program)
    assert back.params.keys() == program.params.keys()
    assert all((np.asarray(back.params[path]) == np.asarray(x)).all() for path, x in program.params.items())
    assert (outputs(back, case) == before).all()


def queries_keys_values(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.einsum("btd,sdhk->sbthk", x, params["w"])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)


def gate_and_up(params: Any, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ params["w"], 2, axis=-1)
    return jax.nn.silu(gate) * up


def halves_by_slices(params: Any, x: jax.Array) -> jax.Array:
    both = x @ params["w"].T
    return jax.nn.relu(both[..., :F]) * both[..., F:]


FUSED: dict[Callable[..., Any], tuple[tuple[int, ...], int]] = {
    queries_keys_values: ((3, D, H, K), 3),
    gate_and_up: ((D, 2 * F), 2),
    halves_by_slices: ((2 * F, D), 2),
}


@pytest.mark.parametrize("model", FUSED, ids=lambda model: model.__name__)
def test_every_form_of_a_fused_product(model: Callable[..., Any]) -> None:
    shape, count = FUSED[model]
    program = compax.capture(model, {"w": jax.random.normal(jax.random.key(1), shape)}, X)
    apart = sink(program, "w")
    assert set(apart.params) == {f"w.{i}" for i in range(count)}
    assert (products(program), products(apart)) == (1, count)
    compax.verify(apart)
    assert (by_operation(program, X) == by_operation(apart, X)).all()


def test_through_a_scan_over_layers() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return x + gate_and_up(layer, x) @ layer["down"], None

        return jax.lax.scan(jax.checkpoint(step), x, params)[0]

    keys = jax.random.split(jax.random.key(2))
    params = {"w": jax.random.normal(keys[0], (4, D, 2 * F)), "down": jax.random.normal(keys[1], (4, F, D)) * 0.1}
    program = compax.capture(model, params, X)
    apart = sink(program, "w")
    assert {path: x.shape for path, x in apart.params.items() if path != "down"} == dict.fromkeys(
        ("w.0", "w.1"), (4, D, F)
    )
    np.testing.assert_allclose(program(X), apart(X), rtol=1e-6)
    gradients = jax.grad(lambda p: apart.apply(p, {}, X)[0].sum())(apart.params)
    assert gradients["w.1"].shape == (4, D, F)


def test_what_is_needed_as_a_whole_is_refused() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        both = x @ params["w"]
        return jnp.split(both, 2, axis=-1)[0] + jnp.cumsum(both, axis=-1)[..., :F]

    program = compax.capture(model, {"w": jnp.ones((D, 2 * F))}, X)
    with pytest.raises(RewriteError, match="cumsum"):
        sink(program, "w")


def test_what_is_not_taken_apart_or_not_there_is_refused() -> None:
    program = compax.capture(lambda params, x: x @ params["w"], {"w": jnp.ones((D, F))}, X)
    with pytest.raises(RewriteError, match="nothing to sink"):
        sink(program, "w")
    with pytest.raises(RewriteError, match="no parameter 'v'"):
        sink(program, "v")
    with pytest.raises(RewriteError, match="not there: v"):
        fuse(program, ["w", "v"], "whole")


def test_parts_that_do_not_fit_are_refused() -> None:
    params = {"a": jnp.ones((D, F)), "b": jnp.ones((F, D))}
    program = compax.capture(lambda params, x: x @ params["a"] @ params["b"], params, X)
    with pytest.raises(RewriteError, match="do not lie in a row"):
        fuse(program, ["a", "b"], "whole")


def test_what_is_frozen_stays_frozen_apart_and_together() -> None:
    program = compax.capture(gate_and_up, {"w": jnp.ones((D, 2 * F))}, X)
    frozen = compax.Pipeline.parse("freeze()")(program)
    apart = sink(frozen, "w")
    assert apart.frozen == {"w.0", "w.1"}
    assert fuse(apart, ["w.0", "w.1"], "w").frozen == {"w"}
    with pytest.raises(RewriteError, match=r"only w\.0 are frozen"):
        fuse(apart.replace(frozen=frozenset({"w.0"})), ["w.0", "w.1"], "w")


@pytest.mark.parametrize("remat", [False, True])
def test_parts_in_a_scan_become_one_product_of_its_body(remat: bool) -> None:
    """Also below `jit` and `remat` in that body; values and gradients stay."""
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=True, remat=remat)
    inputs = decoder.example_inputs(config, sequence=8)
    program = compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *inputs)
    parts = ["blocks.mlp.gate.kernel", "blocks.mlp.up.kernel"]
    fused = fuse(program, parts, "blocks.mlp.gate_up")
    assert not set(parts) & fused.params.keys()
    assert (products(program), products(fused)) == (8, 7)
    np.testing.assert_allclose(fused(*inputs), program(*inputs), rtol=1e-5, atol=1e-5)

    def loss(program: compax.Program) -> Any:
        return jax.grad(lambda params: (program.apply(params, program.state, *inputs)[0] ** 2).mean())(program.params)

    whole, apart = loss(fused)["blocks.mlp.gate_up"], loss(program)
    np.testing.assert_allclose(whole, np.concatenate([apart[path] for path in parts], -1), rtol=1e-4, atol=1e-6)
