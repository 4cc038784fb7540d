"""Costs of whole graphs: closed formulas, gradients, what XLA counts, rooflines, and how long the count takes."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
import zoo
from compax import ir, lowering
from compax.analysis.cost import UNOWNED, Cost, function_cost, graph_cost
from compax.ir import Op, Path
from compax.models import decoder
from compax.target import Target

X = jnp.ones((8, 8))


def abstract(size: str, tokens: tuple[int, int], **changes: Any) -> compax.Program:
    """A decoder without parameters in memory."""
    config = dataclasses.replace(decoder.SIZES[size], **changes)
    return compax.capture(
        nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))), jax.ShapeDtypeStruct(tokens, jnp.int32)
    )


def gradient_cost(program: compax.Program) -> Cost:
    """A call of a program, the sum of its output's squares, and the gradient of all parameters."""
    captured = program.graph()
    inputs = dict(zip((tag.path for tag in captured.inputs), captured.graph.inputs, strict=True))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in inputs.items()}
    trained = [path for path, x in shapes.items() if jnp.issubdtype(x.dtype, jnp.floating) and path in program.params]

    def loss(params: dict[str, Any], rest: dict[str, Any]) -> jax.Array:
        outputs = lowering.evaluate(captured.graph, [{**rest, **params}[path] for path in inputs])
        return sum((jnp.square(x).mean() for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)), jnp.float32(0))

    params = {path: shapes[path] for path in trained}
    rest = {path: x for path, x in shapes.items() if path not in params}
    return function_cost(jax.value_and_grad(loss), params, rest)


# -- Closed formulas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_a_7b_model_by_its_closed_formula(scan: bool) -> None:
    """Twice the matrices' parameters for each token, and two products of queries and keys in each layer."""
    batch, length = 2, 48
    layers = {} if scan else {"num_layers": 3}
    config = dataclasses.replace(decoder.SIZES["llama2-7b"], **layers)
    program = abstract("llama2-7b", (batch, length), scan=scan, **layers)
    parameters = sum(x.size for path, x in program.params.items() if x.ndim > 1 and "norm" not in path)
    matrices = parameters - config.vocab_size * config.model_dim  # rows of the embedding are looked up
    attention = 2 * 2 * length * config.num_heads * config.head_dim * config.num_layers
    forward = batch * length * (2 * matrices + attention)
    if scan:
        assert parameters == 6_738_149_376
    assert graph_cost(program.graph().graph).product_flops == forward
    assert gradient_cost(program).product_flops == 3 * forward


def test_grouped_queries_by_their_closed_formula() -> None:
    config = dataclasses.replace(decoder.SIZES["llama2-70b"], num_layers=2)
    program = abstract("llama2-70b", (1, 16), num_layers=2)
    matrices = sum(x.size for path, x in program.params.items() if x.ndim > 1 and not path.startswith("embed"))
    attention = 4 * 16 * config.num_heads * config.head_dim * config.num_layers
    assert program.cost().product_flops == 16 * (2 * matrices + attention)


# -- Against the compiler ---------------------------------------------------------------------------------------------


@zoo.foreign_warnings
@pytest.mark.parametrize("name", ["tunix_llama3", "tunix_gemma3", "flax_gpt2", "flax_bert", "flax_vit", "flax_whisper"])
def test_models_of_others_count_as_xla_counts(name: str) -> None:
    graph = zoo.load(name).capture().graph().graph
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in graph.inputs]
    lowered = jax.jit(lambda *given: lowering.evaluate(graph, given)).lower(*inputs).cost_analysis()
    cost = graph_cost(graph)
    assert cost.unknown == cost.loops == ()
    assert cost.flops == pytest.approx(lowered["flops"], rel=0.002)
    assert cost.transcendentals == pytest.approx(lowered["transcendentals"], rel=0.002)


def test_products_are_those_of_the_compiled_gradient() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(x @ w) @ w.T).sum()

    w, x = jnp.ones((256, 128)), jnp.ones((512, 256))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile().cost_analysis()
    assert function_cost(jax.grad(loss), w, x).flops == pytest.approx(compiled["flops"], rel=0.01)


# -- Parts ------------------------------------------------------------------------------------------------------------


def test_parts_add_up_to_the_whole() -> None:
    cost = abstract("tiny", (2, 8)).cost()
    for parts in (cost.by_owner, cost.by_operation, cost.by_phase):
        for field in ("flops", "product_flops", "transcendentals", "bytes_unfused", "bytes_fused", "count"):
            assert sum(getattr(part, field) for part in parts.values()) == getattr(cost.total, field)
        assert sum(sum(part.flops_by_dtype.values()) for part in parts.values()) == cost.flops


def test_an_owner_is_asked_by_place() -> None:
    def owner(op: Op, path: Path) -> str:
        return "product" if op.name == "dot_general" else UNOWNED

    graph = compax.capture(lambda p, x: jnp.tanh(x @ p), X, X).graph().graph
    cost = graph_cost(graph, owner)
    assert cost.by_owner["product"].flops == 2 * 8**3
    assert cost.by_owner[UNOWNED].transcendentals == 64
    assert cost.by_owner[UNOWNED].flops == 0


def test_inputs_are_arguments_unless_said_otherwise() -> None:
    cost = function_cost(lambda x, y: (x + y, y), X, X)
    assert cost.input_bytes == {"argument": 2 * 256}
    assert cost.output_bytes == 2 * 256


def test_intensity_of_nothing() -> None:
    cost = function_cost(lambda x: x, X)
    assert (cost.flops, cost.bytes_fused, cost.intensity) == (0, 0, 0.0)
    assert "computes         0 FLOPs a call (nothing); none in products" in str(cost)


# -- Time -------------------------------------------------------------------------------------------------------------


def two_kernels() -> Cost:
    """A product that computes for long, and a sum that does not: 1024 and 64 operations; 512 bytes each."""
    return function_cost(lambda x, y: (x @ x, y + y), X, jnp.ones((64,)))


def test_a_roofline_by_hand() -> None:
    time = two_kernels().roofline(1024.0, 256.0, vector_rate=6400.0)
    assert time.compute_seconds == pytest.approx(1.0 + 0.01)
    assert time.memory_seconds == time.seconds == 2.0 + 2.0
    fast_memory = two_kernels().roofline({"float32": 1024.0}, 512e3, vector_rate=6400.0)
    assert fast_memory.seconds == pytest.approx(1.0 + 0.01)
    mixed = two_kernels().roofline(1024.0, 1024.0)
    assert mixed.seconds == 1.0 + 0.5  # the product computes, the sum moves
    assert mixed.bound_seconds == 1.0


def test_time_on_a_chip() -> None:
    chip = Target.parse("v5e")
    cost = function_cost(lambda x: x @ x, jnp.ones((4096, 4096), jnp.bfloat16))
    time = cost.on(chip)
    assert time.seconds == time.compute_seconds == 2 * 4096**3 / chip.rate("bfloat16").flops_per_second
    assert cost.time is None


def test_what_a_chip_has_no_unit_for_is_said() -> None:
    cost = function_cost(lambda x: x @ x, jnp.ones((64, 64), jnp.int32))
    assert any(
        "products of int32 as operations on vectors" in text for text in cost.on(Target.parse("v5e")).assumptions
    )


def test_counting_is_fast() -> None:
    """Under half a second for 80 unrolled layers on one idle core; the bound leaves room for others."""
    two_layers = abstract("tiny", (1, 16)).graph().graph
    *shapes, tokens = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in two_layers.inputs)
    assert tokens.dtype == jnp.int32

    def eighty_layers(params: list[Any], tokens: jax.Array) -> jax.Array:
        for _ in range(40):
            (logits,) = lowering.evaluate(two_layers, [*params, tokens])
            tokens = logits.argmax(-1).astype(jnp.int32)
        return tokens

    graph = ir.import_jaxpr(jax.make_jaxpr(eighty_layers)(shapes, tokens))
    start = time.process_time()
    cost = graph_cost(graph)
    assert time.process_time() - start < 2.0
    assert cost.by_operation["dot_general"].count == 40 * (2 * 9 + 1)
