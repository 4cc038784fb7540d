"""Axes of third-party models against what was written by hand, and of small programs built to confuse them."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import compax
from compax.analysis.axes import Engine
from compax.analysis.normal import Normal
from compax.experiments.benchmarks import zoo
from compax.meaning import Meaning
from compax.meaning_text import axes_text

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def engine(function: Any, *args: Any) -> tuple[Engine, dict[str, tuple[Any, ...]]]:
    """The axes of a function of a dictionary of parameters and more, and the dimensions of its inputs by name."""
    found = Engine(Normal(compax.capture(function, *args).graph()))
    found.run()
    dims = {x.input.path: tuple(map(found.atoms.expand, found.dims[x])) for x in found.normal.inputs if x.input}
    return found, dims


def heads(name: str, *, repeats: bool = True) -> str:
    return f"{name}.groups*{name}.repeats" if repeats else f"{name}.heads"


def llama3() -> dict[str, tuple[str, ...]]:
    expected = {
        "embedder.input_embedding": ("vocabulary", "model"),
        "final_norm.w": ("model",),
        "lm_head.w": ("model", "lm_head.vocabulary"),
    }
    for i in range(2):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        expected |= {
            f"{attn}.q_proj.w": ("model", heads(attn), f"{attn}.head_size"),
            f"{attn}.k_proj.w": ("model", f"{attn}.groups", f"{attn}.head_size"),
            f"{attn}.v_proj.w": ("model", f"{attn}.groups", f"{attn}.value_size"),
            f"{attn}.o_proj.w": (heads(attn), f"{attn}.value_size", "model"),
            f"{mlp}.gate_proj.kernel": ("model", f"{mlp}.hidden"),
            f"{mlp}.up_proj.kernel": ("model", f"{mlp}.hidden"),
            f"{mlp}.down_proj.kernel": (f"{mlp}.hidden", "model"),
            f"layers.{i}.input_layernorm.w": ("model",),
            f"layers.{i}.post_attention_layernorm.w": ("model",),
        }
    return expected


def gpt2() -> dict[str, tuple[str, ...]]:
    expected = {
        "transformer.wte.embedding": ("vocabulary", "model"),
        "transformer.wpe.embedding": ("transformer.wpe.rows", "model"),
        "transformer.ln_f.scale": ("model",),
        "transformer.ln_f.bias": ("model",),
    }
    for i in range(2):
        block = f"transformer.h.{i}"
        attn, mlp = f"{block}.attn", f"{block}.mlp"
        expected |= {
            f"{attn}.c_attn.kernel": (f"{attn}.fused", "model"),
            f"{attn}.c_attn.bias": (f"{attn}.fused",),
            f"{attn}.c_proj.kernel": ("model", f"{attn}.heads*{attn}.value_size"),
            f"{attn}.c_proj.bias": ("model",),
            f"{mlp}.c_fc.kernel": (f"{mlp}.hidden", "model"),
            f"{mlp}.c_fc.bias": (f"{mlp}.hidden",),
            f"{mlp}.c_proj.kernel": ("model", f"{mlp}.hidden"),
            f"{mlp}.c_proj.bias": ("model",),
        }
        expected |= {f"{block}.ln_{n}.{kind}": ("model",) for n in (1, 2) for kind in ("scale", "bias")}
    return expected


def qwen3_experts() -> dict[str, tuple[str, ...]]:
    expected = {path: dims for path, dims in llama3().items() if ".mlp." not in path}
    for i in range(2):
        mlp, attn = f"layers.{i}.mlp", f"layers.{i}.attn"
        expected |= {
            f"{mlp}.router.kernel": ("model", f"{mlp}.experts"),
            f"{mlp}.gate_proj": (f"{mlp}.experts", "model", f"{mlp}.hidden"),
            f"{mlp}.up_proj": (f"{mlp}.experts", "model", f"{mlp}.hidden"),
            f"{mlp}.down_proj": (f"{mlp}.experts", f"{mlp}.hidden", "model"),
            f"{attn}.q_norm.w": (f"{attn}.head_size",),
            f"{attn}.k_norm.w": (f"{attn}.head_size",),
        }
    return expected


def decoder_scanned() -> dict[str, tuple[str, ...]]:
    attn, mlp = "blocks.attn", "blocks.mlp"
    return {
        "embed.embedding": ("vocabulary", "model"),
        "norm.scale": ("model",),
        "blocks.attn_norm.scale": ("layers", "model"),
        "blocks.mlp_norm.scale": ("layers", "model"),
        f"{attn}.query.kernel": ("layers", "model", f"{heads(attn)}*{attn}.head_size"),
        f"{attn}.key.kernel": ("layers", "model", f"{attn}.groups*{attn}.head_size"),
        f"{attn}.value.kernel": ("layers", "model", f"{attn}.groups*{attn}.value_size"),
        f"{attn}.out.kernel": ("layers", f"{heads(attn)}*{attn}.value_size", "model"),
        f"{mlp}.gate.kernel": ("layers", "model", f"{mlp}.hidden"),
        f"{mlp}.up.kernel": ("layers", "model", f"{mlp}.hidden"),
        f"{mlp}.down.kernel": ("layers", f"{mlp}.hidden", "model"),
    }


def vit() -> dict[str, tuple[str, ...]]:
    patches = "vit.embeddings.patch_embeddings.projection"
    expected = {
        "vit.embeddings.cls_token": ("1", "1", "model"),
        "vit.embeddings.position_embeddings": ("1", "sequence", "model"),
        f"{patches}.kernel": (*(f"{patches}.kernel.{i}" for i in range(3)), "model"),
        f"{patches}.bias": ("model",),
        "vit.layernorm.scale": ("model",),
        "vit.layernorm.bias": ("model",),
        "classifier.kernel": ("model", "classifier.bias.0"),
        "classifier.bias": ("classifier.bias.0",),
    }
    for i in range(2):
        block = f"vit.encoder.layer.{i}"
        attn = f"{block}.attention"
        for name, size in (("query", "head_size"), ("key", "head_size"), ("value", "value_size")):
            expected[f"{attn}.attention.{name}.kernel"] = ("model", f"{attn}.heads*{attn}.{size}")
            expected[f"{attn}.attention.{name}.bias"] = (f"{attn}.heads*{attn}.{size}",)
        expected |= {
            f"{attn}.output.dense.kernel": (f"{attn}.heads*{attn}.value_size", "model"),
            f"{attn}.output.dense.bias": ("model",),
            f"{block}.intermediate.dense.kernel": ("model", f"{block}.hidden"),
            f"{block}.intermediate.dense.bias": (f"{block}.hidden",),
            f"{block}.output.dense.kernel": (f"{block}.hidden", "model"),
            f"{block}.output.dense.bias": ("model",),
        }
        for norm in ("layernorm_before", "layernorm_after"):
            expected |= {f"{block}.{norm}.{kind}": ("model",) for kind in ("scale", "bias")}
    return expected


EXPECTED = {
    "tunix_llama3": llama3,
    "tunix_qwen3_experts": qwen3_experts,
    "flax_gpt2": gpt2,
    "flax_vit": vit,
    "compax_decoder_scanned": decoder_scanned,
}


@foreign_warnings
@pytest.mark.parametrize("name", EXPECTED)
def test_axes_of_every_parameter(name: str) -> None:
    program = zoo.build(name).capture()
    meaning = program.meaning()
    found = {
        x.input.path: meaning.dims(x) for x in meaning.view.normal.inputs if x.input and x.input.kind == "parameter"
    }
    assert found == EXPECTED[name]()


@foreign_warnings
@pytest.mark.parametrize("name", [name for name in zoo.ENTRIES if name not in EXPECTED])
def test_no_conflicts_and_nothing_frozen_for_want_of_a_rule(name: str) -> None:
    meaning = Meaning(zoo.build(name).capture().graph())
    assert meaning.view.engine.conflicts == []
    assert meaning.view.engine.frozen == {}


# -- Built to confuse -------------------------------------------------------------------------------------------------


def test_equal_sizes_stay_apart() -> None:
    n = 8

    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    _, dims = engine(model, {"up": jnp.ones((n, n)), "down": jnp.ones((n, n))}, jnp.ones((n, n)))
    (model_axis, hidden), (hidden_too, output) = dims["up"], dims["down"]
    assert hidden == hidden_too
    assert len({model_axis, hidden, output, dims["x"][0]}) == 4
    assert dims["x"][1] == model_axis


def test_a_shared_constant_connects_nothing() -> None:
    table = jnp.arange(6.0)

    def model(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["a"] * table).sum(-1) + (x @ params["b"] * table).sum(-1)

    _, dims = engine(model, {"a": jnp.ones((4, 6)), "b": jnp.ones((4, 6))}, jnp.ones((2, 4)))
    assert dims["a"][1] != dims["b"][1]


def test_an_operation_without_a_rule_freezes_and_is_reported() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(params["a"]) @ x

    found, dims = engine(model, {"a": jnp.eye(4)}, jnp.ones((4, 2)))
    assert "cholesky" in found.frozen
    assert dims["a"][0][0].reasons


def test_order_matters_to_a_running_sum() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jnp.cumsum(x @ params["a"], axis=-1) @ params["b"]

    _, dims = engine(model, {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 2))}, jnp.ones((2, 3)))
    assert dims["a"][1] == dims["b"][0]
    assert dims["a"][1][0].reasons


def test_slices_of_stacked_experts_cover_their_dimension() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        shares = jax.nn.softmax(x @ params["router"])
        outputs = [jax.nn.relu(x @ params["up"][i]) @ params["down"][i] for i in range(3)]
        return jnp.einsum("be,bed->bd", shares, jnp.stack(outputs, axis=1))

    shapes = {"router": (4, 3), "up": (3, 4, 6), "down": (3, 6, 4)}
    _, dims = engine(model, {name: jnp.ones(shape) for name, shape in shapes.items()}, jnp.ones((2, 4)))
    assert dims["up"][0] == dims["down"][0] == dims["router"][1]
    assert not dims["up"][0][0].reasons


def test_experts_that_are_added_up_cover_their_dimension_if_none_is_missing() -> None:
    def model(params: Any, x: jax.Array, count: int) -> jax.Array:
        return sum(jnp.tanh(x @ params["up"][i]) @ params["down"][i] for i in range(count))

    arrays = {"up": jnp.ones((3, 4, 6)), "down": jnp.ones((3, 6, 4))}
    for count, free in ((3, True), (2, False)):
        _, dims = engine(lambda params, x, count=count: model(params, x, count), arrays, jnp.ones((2, 4)))
        assert dims["up"][0] == dims["down"][0]
        assert bool(dims["up"][0][0].reasons) != free


def test_members_that_are_returned_keep_their_order() -> None:
    _, dims = engine(
        lambda params, x: (x @ params["w"][0], x @ params["w"][1]), {"w": jnp.ones((2, 4, 5))}, jnp.ones((2, 4))
    )
    assert dims["w"][0][0].reasons


def test_layers_taken_one_by_one_keep_their_order() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i]) * params["s"][i]
        return x

    _, dims = engine(model, {"w": jnp.ones((3, 4, 4)), "s": jnp.ones((3, 4))}, jnp.ones((2, 4)))
    assert dims["w"][0][0].reasons


def test_experts_that_compute_different_things_keep_their_order() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jnp.stack([jnp.tanh(x @ params["w"][0]), jax.nn.relu(x @ params["w"][1])], axis=1).sum(1)

    _, dims = engine(model, {"w": jnp.ones((2, 4, 5))}, jnp.ones((2, 4)))
    assert dims["w"][0][0].reasons


def test_a_scan_has_an_axis_of_layers_that_stays() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    found, dims = engine(model, {"w": jnp.ones((3, 4, 4))}, jnp.ones((2, 4)))
    assert dims["w"][0] == found.atoms.expand(found.loops[0])
    assert dims["w"][1] == dims["w"][2] == dims["x"][1]


def test_a_loop_carries_real_dimensions_out_of_zeros() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, total: total + x @ params["w"], jnp.zeros((2, 5)))

    _, dims = engine(model, {"w": jnp.ones((4, 5))}, jnp.ones((2, 4)))
    assert not dims["w"][1][0].table


def test_branches_and_derivative_rules_are_entered() -> None:
    def model(params: Any, x: jax.Array, which: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ params["a"])
        return jax.lax.cond(which, lambda h: h @ params["b"], lambda h: -(h @ params["c"]), h)

    shapes = {"a": (4, 5), "b": (5, 3), "c": (5, 3)}
    _, dims = engine(model, {k: jnp.ones(s) for k, s in shapes.items()}, jnp.ones((2, 4)), jnp.asarray(True))
    assert dims["a"][1] == dims["b"][0] == dims["c"][0]
    assert dims["b"][1] == dims["c"][1]


def test_indices_of_experts_are_understood_and_indices_from_outside_fix_an_axis() -> None:
    def model(params: Any, x: jax.Array, token: jax.Array) -> jax.Array:
        best = jnp.argmax(x @ params["router"], axis=-1)
        return params["bias"][best] + params["table"][token]

    shapes = {"router": (4, 3), "bias": (3, 6), "table": (9, 6)}
    arrays = {name: jnp.ones(shape) for name, shape in shapes.items()}
    _, dims = engine(model, arrays, jnp.ones((2, 4)), jnp.zeros((2,), jnp.int32))
    assert dims["router"][1] == dims["bias"][0]
    assert not dims["router"][1][0].reasons
    assert any("addressed" in reason for reason in dims["table"][0][0].reasons)


# -- What the model's author calls axes -------------------------------------------------------------------------------


class Logical(linen.Module):
    """Dense layers with logical names; `swapped` names the second kernel's dimensions the wrong way round."""

    swapped: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(features: int, *names: str) -> linen.Dense:
            init = linen.with_logical_partitioning(linen.initializers.lecun_normal(), names)
            return linen.Dense(features, kernel_init=init, use_bias=False)

        second = ("embed", "wide") if self.swapped else ("wide", "embed")
        x = dense(8, "features", "embed")(x)
        return dense(8, *second)(dense(12, "embed", "wide")(x))


def logical(**options: Any) -> compax.Program:
    model, x = Logical(**options), jnp.ones((2, 6))
    return compax.capture(model, x, variables=model.init(jax.random.key(0), x))


def test_an_axis_without_a_name_is_called_as_its_author_calls_it() -> None:
    program = logical()
    axes = {axis.name: axis for axis in program.axes()}
    assert axes["features"].parameters == {"Dense_0.kernel": (0,)}
    assert axes["wide"].parameters == {"Dense_1.kernel": (0,), "Dense_2.kernel": (1,)}
    assert axes["wide"].annotated == ("wide",)
    assert not program.meaning().questions
    assert "annotated" in axes_text(program)


def test_names_of_dimensions_of_several_sizes_are_no_names_of_axes() -> None:
    """As those of a mesh are not."""
    meaning = logical(swapped=True).meaning()
    assert {axis.name: axis.annotated for axis in meaning.axes if axis.annotated} == {"features": ("features",)}
    assert not meaning.questions


def test_one_axis_with_two_logical_names_is_a_question() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.ones((4, 6)), out_sharding=("x", "wide"), eager_sharding=False)
            self.b = nnx.Param(jnp.ones((6, 4)), out_sharding=("narrow", "y"), eager_sharding=False)
            self.c = nnx.Param(jnp.ones((4, 4)), out_sharding=(("data", "model"),), eager_sharding=False)

        def __call__(self, x: jax.Array) -> jax.Array:
            return jnp.tanh(x @ self.a) @ self.b @ self.c

    questions = compax.capture(Model(), jnp.ones((3, 4))).meaning().questions
    (metadata, wide) = sorted(questions, key=lambda question: question.where)
    assert "names 1 dimensions, and it has 2" in metadata.what
    assert "'wide' at a.1, 'narrow' at b.0" in wide.what
