"""Normalizations in the ways people write them, and what looks like one and is none."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import compax
import zoo
from compax.analysis.folding import Folder
from compax.composites.base import Normalization
from compax.composites.normalization import find_normalizations
from compax.composites.view import View

B, T, D, G = 3, 6, 20, 5
"""Batch, positions, features, groups."""
H, W = 4, 7
"""Height and width of images."""

X = jax.random.normal(jax.random.key(0), (B, T, D))
IMAGE = jax.random.normal(jax.random.key(1), (B, H, W, D))
PARAMS = {"w": jnp.linspace(0.5, 1.5, D), "b": jnp.linspace(-1.0, 1.0, D), "dense": jnp.ones((D, D)) * 0.1}


def found(function: Callable[..., Any], *args: Any, **options: Any) -> list[Normalization]:
    normalizations = find_normalizations(View(compax.capture(function, *args, **options).graph()))
    for norm in normalizations:
        check_closed(norm)
    return normalizations


def only(function: Callable[..., Any], *args: Any, **options: Any) -> Normalization:
    (norm,) = found(function, *args, **options)
    return norm


def check_closed(norm: Normalization) -> None:
    """Its nodes need nothing but its inputs, and give its output."""
    inside = {y for node in norm.nodes for y in node.outputs}
    for node in norm.nodes:
        assert all(y in inside or y in norm.inputs or y.static for y in node.inputs), node
    assert norm.output in inside
    assert norm.x not in inside
    assert norm.inputs[0] is norm.x


def check_values(norm: Normalization) -> None:
    """Its record says what it computes."""
    random = np.random.default_rng(0)
    given = {y: random.uniform(0.5, 2.0, y.shape).astype(np.float32) for y in norm.inputs}
    x = given[norm.x]
    mean = x.mean(norm.axes, keepdims=True) if norm.type != "rms" else 0.0
    scale = 1 / np.sqrt(np.square(x - mean).mean(norm.axes, keepdims=True) + norm.epsilon)
    expected = (x - mean) * scale
    expected = expected if norm.weight is None else expected * given[norm.weight]
    expected = expected if norm.bias is None else expected + given[norm.bias]
    np.testing.assert_allclose(Folder(given).full(norm.output), expected, rtol=2e-4, atol=2e-4)


def mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def mean_square(x: jax.Array) -> jax.Array:
    return mean(jnp.square(x))


# -- Root mean square -------------------------------------------------------------------------------------------------

RMS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "rsqrt": lambda p, x: x * jax.lax.rsqrt(mean_square(x) + 1e-5) * p["w"],
    "one over sqrt": lambda p, x: x * (1.0 / jnp.sqrt(mean_square(x) + 1e-5)) * p["w"],
    "division by sqrt": lambda p, x: x / jnp.sqrt(mean_square(x) + 1e-5) * p["w"],
    "reciprocal": lambda p, x: x * jnp.reciprocal(jnp.sqrt(1e-5 + mean_square(x))) * p["w"],
    "pow": lambda p, x: x * (mean_square(x) + 1e-5) ** -0.5 * p["w"],
    "integer pow": lambda p, x: x * jax.lax.integer_pow(jnp.sqrt(mean_square(x) + 1e-5), -1) * p["w"],
    "x times x": lambda p, x: x * jax.lax.rsqrt(mean(x * x) + 1e-5) * p["w"],
    "x ** 2": lambda p, x: x * jax.lax.rsqrt(mean(x**2) + 1e-5) * p["w"],
    "x ** 2.0": lambda p, x: x * jax.lax.rsqrt(mean(jnp.power(x, jnp.float32(2.0))) + 1e-5) * p["w"],
    "sum over n": lambda p, x: x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / D + 1e-5) * p["w"],
    "sum times 1 / n": lambda p, x: x * jax.lax.rsqrt((1 / D) * jnp.sum(x * x, -1, keepdims=True) + 1e-5) * p["w"],
    "divided inside": lambda p, x: x * jax.lax.rsqrt(jnp.sum(x * x / D, -1, keepdims=True) + 1e-5) * p["w"],
    "weight first": lambda p, x: p["w"] * x * jax.lax.rsqrt(mean_square(x) + 1e-5),
    "weight on the root": lambda p, x: x * (p["w"] * jax.lax.rsqrt(mean_square(x) + 1e-5)),
    "division after the weight": lambda p, x: (p["w"] * x) / jnp.sqrt(mean_square(x) + 1e-5),
    "weight over the root": lambda p, x: x * (p["w"] / jnp.sqrt(mean_square(x) + 1e-5)),
    "dimension added later": lambda p, x: x * jax.lax.rsqrt(jnp.mean(x * x, -1) + 1e-5)[..., None] * p["w"],
}


@pytest.mark.parametrize("name", RMS)
def test_root_mean_square(name: str) -> None:
    norm = only(RMS[name], PARAMS, X)
    assert (norm.type, norm.axes, norm.parameters) == ("rms", (2,), ("w",))
    assert norm.bias is None
    assert norm.weight is not None
    assert norm.epsilon == pytest.approx(1e-5)
    check_values(norm)


def test_one_plus_weight() -> None:
    norm = only(lambda p, x: x * jax.lax.rsqrt(mean_square(x) + 1e-6) * (1 + p["w"]), PARAMS, X)
    assert norm.weight is not None
    assert norm.weight.name == "add"
    assert norm.parameters == ("w",)
    check_values(norm)


def test_no_weight_no_epsilon() -> None:
    norm = only(lambda p, x: x * jax.lax.rsqrt(mean_square(x)), PARAMS, X)
    assert (norm.type, norm.weight, norm.bias, norm.epsilon) == ("rms", None, None, 0.0)


def test_epsilon_as_a_floor() -> None:
    norm = only(lambda p, x: x * jax.lax.rsqrt(jnp.maximum(mean_square(x), 1e-3)) * p["w"], PARAMS, X)
    assert norm.epsilon == pytest.approx(1e-3)


def test_scalar_weight() -> None:
    norm = only(lambda p, x: x * jax.lax.rsqrt(mean_square(x) + 1e-5) * p["g"], {"g": jnp.float32(2.0)}, X)
    assert norm.parameters == ("g",)


def test_half_precision_with_casts() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(mean_square(wide) + 1e-6)).astype(jnp.bfloat16) * p["w"]

    params = jax.tree.map(lambda y: y.astype(jnp.bfloat16), PARAMS)
    norm = only(function, params, X.astype(jnp.bfloat16))
    assert (norm.type, norm.parameters) == ("rms", ("w",))
    assert norm.x.input is not None


def test_mean_in_half_precision() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        total = jnp.sum(x * x, -1, keepdims=True, dtype=jnp.bfloat16)
        return x * jax.lax.rsqrt(total * jnp.bfloat16(1 / D) + jnp.bfloat16(1e-5)) * p["w"]

    norm = only(function, jax.tree.map(lambda y: y.astype(jnp.bfloat16), PARAMS), X.astype(jnp.bfloat16))
    assert norm.type == "rms"


# -- Layers -----------------------------------------------------------------------------------------------------------


def slow(x: jax.Array) -> jax.Array:
    return mean(jnp.square(x - mean(x)))


def fast(x: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, mean_square(x) - jnp.square(mean(x)))


def library(x: jax.Array) -> jax.Array:
    return jnp.var(x, axis=-1, keepdims=True)


def keras(p: Any, x: jax.Array) -> jax.Array:
    inverse = jax.lax.rsqrt(library(x) + 1e-5) * p["w"]
    return x * inverse + (-mean(x) * inverse + p["b"])


def folded(p: Any, x: jax.Array) -> jax.Array:
    inverse = jax.lax.rsqrt(slow(x) + 1e-5) * p["w"]
    return x * inverse + (p["b"] - mean(x) * inverse)


LAYER: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "slow": lambda p, x: (x - mean(x)) * jax.lax.rsqrt(slow(x) + 1e-5) * p["w"] + p["b"],
    "fast": lambda p, x: (x - mean(x)) * jax.lax.rsqrt(fast(x) + 1e-5) * p["w"] + p["b"],
    "fast, not clipped": lambda p, x: (
        (x - mean(x)) * jax.lax.rsqrt(mean(x * x) - mean(x) * mean(x) + 1e-5) * p["w"] + p["b"]
    ),
    "var": lambda p, x: (x - mean(x)) / jnp.sqrt(library(x) + 1e-5) * p["w"] + p["b"],
    "weight on the root": lambda p, x: (x - mean(x)) * (jax.lax.rsqrt(library(x) + 1e-5) * p["w"]) + p["b"],
    "weight first": lambda p, x: p["b"] + p["w"] * (x - mean(x)) / jnp.sqrt(slow(x) + 1e-5),
    "keras": keras,
    "folded": folded,
    "standardize": lambda p, x: jax.nn.standardize(x, epsilon=1e-5) * p["w"] + p["b"],
}


@pytest.mark.parametrize("name", LAYER)
def test_layer(name: str) -> None:
    norm = only(LAYER[name], PARAMS, X)
    assert (norm.type, norm.axes) == ("layer", (2,))
    assert sorted(norm.parameters) == ["b", "w"]
    assert norm.epsilon == pytest.approx(1e-5)
    assert norm.x.input is not None
    check_values(norm)


def test_centered_once() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        centered = x - mean(x)
        return centered * jax.lax.rsqrt(mean_square(centered) + 1e-5) * p["w"]

    norm = only(function, PARAMS, X)
    assert (norm.type, norm.bias) == ("layer", None)


def test_over_several_dimensions() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        axes = (1, 2, 3)
        return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5) * p["w"] + p["b"]

    norm = only(function, PARAMS, IMAGE)
    assert (norm.type, norm.axes) == ("layer", (1, 2, 3))


@pytest.mark.parametrize("fast_variance", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_of_flax(fast_variance: bool, dtype: Any) -> None:
    options = {"use_fast_variance": fast_variance, "dtype": dtype, "epsilon": 1e-5}
    x = X.astype(dtype)
    module = linen.LayerNorm(**options)
    for norm in (
        only(nnx.LayerNorm(D, rngs=nnx.Rngs(0), **options), x),
        only(module, x, variables=module.init(jax.random.key(0), x)),
    ):
        assert (norm.type, norm.axes) == ("layer", (2,))
        assert sorted(norm.parameters) in (["bias", "scale"], ["params.bias", "params.scale"])
        check_values(norm)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_root_mean_square_of_flax(dtype: Any) -> None:
    x = X.astype(dtype)
    module = linen.RMSNorm(dtype=dtype)
    norms = (
        only(nnx.RMSNorm(D, dtype=dtype, rngs=nnx.Rngs(0)), x),
        only(module, x, variables=module.init(jax.random.key(0), x)),
    )
    assert [norm.type for norm in norms] == ["rms", "rms"]
    for norm in norms:
        check_values(norm)


# -- Groups and batches -----------------------------------------------------------------------------------------------


def test_groups_of_flax() -> None:
    module = linen.GroupNorm(num_groups=G)
    norms = (
        only(nnx.GroupNorm(D, num_groups=G, rngs=nnx.Rngs(0)), IMAGE),
        only(module, IMAGE, variables=module.init(jax.random.key(0), IMAGE)),
    )
    for norm in norms:
        assert (norm.type, norm.axes) == ("group", (1, 2, 4))
        assert norm.x.shape == IMAGE.shape
        assert len(norm.parameters) == 2


def test_groups_without_weights() -> None:
    norm = only(nnx.GroupNorm(D, num_groups=G, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)), IMAGE)
    assert (norm.type, norm.parameters) == ("group", ())


def test_groups_of_positions_alone() -> None:
    norm = only(nnx.GroupNorm(D, num_groups=G, rngs=nnx.Rngs(0)), X[:, 0])
    assert norm.type == "group"


def test_groups_channels_first() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        grouped = x.reshape(B, G, -1)
        grouped = (grouped - mean(grouped)) * jax.lax.rsqrt(slow(grouped) + 1e-5)
        return grouped.reshape(x.shape) * p["w"][:, None, None] + p["b"][:, None, None]

    norm = only(function, PARAMS, jnp.moveaxis(IMAGE, -1, 1))
    assert (norm.type, norm.axes) == ("group", (2,))
    assert sorted(norm.parameters) == ["b", "w"]


def test_instances() -> None:
    module = linen.InstanceNorm()
    norms = (
        only(nnx.InstanceNorm(D, rngs=nnx.Rngs(0)), IMAGE),
        only(module, IMAGE, variables=module.init(jax.random.key(0), IMAGE)),
    )
    for norm in norms:
        assert (norm.type, norm.axes) == ("group", (1, 2))


@pytest.mark.parametrize("fast_variance", [True, False])
def test_batches_in_training(fast_variance: bool) -> None:
    norm = only(nnx.BatchNorm(D, use_fast_variance=fast_variance, rngs=nnx.Rngs(0)), IMAGE, mode="train")
    assert (norm.type, norm.axes) == ("batch", (0, 1, 2))
    assert sorted(norm.parameters) == ["bias", "scale"]
    check_values(norm)


def test_batches_of_vectors() -> None:
    module = nnx.BatchNorm(D, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    norm = only(module, X[:, 0], mode="train")
    assert (norm.type, norm.axes) == ("batch", (0,))


def test_batches_channels_first() -> None:
    norm = only(nnx.BatchNorm(D, axis=1, rngs=nnx.Rngs(0)), jnp.moveaxis(IMAGE, -1, 1), mode="train")
    assert (norm.type, norm.axes) == ("batch", (0, 2, 3))


def test_stored_statistics() -> None:
    norm = only(nnx.BatchNorm(D, rngs=nnx.Rngs(0)), IMAGE, mode="eval")
    assert (norm.type, norm.axes) == ("batch_running", ())
    assert sorted(norm.parameters) == ["bias", "scale"]
    assert [y.input.path for y in norm.inputs[3:] if y.input is not None] == ["mean", "var"]


def test_stored_statistics_of_linen() -> None:
    module = linen.BatchNorm(use_running_average=True)
    norm = only(module, IMAGE, variables=module.init(jax.random.key(0), IMAGE))
    assert norm.type == "batch_running"


def test_stored_statistics_among_parameters() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        inverse = p["w"] * jax.lax.rsqrt(p["var"] + 1e-5)
        return x * inverse + (p["b"] - p["mean"] * inverse)

    norm = only(function, PARAMS | {"mean": jnp.zeros(D), "var": jnp.ones(D)}, IMAGE)
    assert norm.type == "batch_running"
    assert (norm.weight is not None, norm.bias is not None) == (True, True)


# -- Transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.vmap(jax.vmap(f, (None, 0)), (None, 0)),
        lambda f: jax.vmap(f, (None, 1), 1),
    ],
)
@pytest.mark.parametrize("name", ["var", "folded"])
def test_inside_transformations(transform: Callable[..., Any], name: str) -> None:
    norm = only(transform(LAYER[name]), PARAMS, X)
    assert (norm.type, norm.axes, len(norm.parameters)) == ("layer", (2,), 2)


def test_inside_a_scan_over_layers() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            y = LAYER["fast"](p, x)
            return x + y @ p["dense"], None

        return jax.lax.scan(layer, x, p)[0]

    norm = only(function, jax.tree.map(lambda y: jnp.stack([y] * 4), PARAMS), X)
    assert (norm.type, norm.loops, sorted(norm.parameters)) == ("layer", (4,), ["b", "w"])


def test_ensemble() -> None:
    params = jax.tree.map(lambda y: jnp.stack([y, y]), PARAMS)
    norm = only(jax.vmap(lambda p, x: LAYER["var"](p, x @ p["dense"]), (0, None)), params, X)
    assert (norm.type, len(norm.parameters)) == ("layer", 2)


def test_weights_for_each_head() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        heads = (x @ p["dense"]).reshape(B, T, 4, 5)
        return heads * jax.lax.rsqrt(mean_square(heads) + 1e-5) * p["heads"]

    norm = only(function, PARAMS | {"heads": jnp.ones((4, 5))}, X)
    assert (norm.type, norm.parameters) == ("rms", ("heads",))


def test_one_of_two_weights() -> None:
    """One normalized value goes two ways, and has a weight on each."""

    def function(p: Any, x: jax.Array) -> jax.Array:
        y = x * jax.lax.rsqrt(mean_square(x) + 1e-5)
        return (y * p["w"]) @ p["dense"] + y * p["b"]

    norm = only(function, PARAMS, X)
    assert (norm.type, norm.weight) == ("rms", None)


def test_two_norms_of_one_value() -> None:
    norms = found(lambda p, x: RMS["rsqrt"](p, x) + LAYER["var"](p, x), PARAMS, X)
    assert sorted(norm.type for norm in norms) == ["layer", "rms"]


# -- Where it ends ----------------------------------------------------------------------------------------------------


def test_a_norm_that_scales_itself_ends_before() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        y = x * jax.lax.rsqrt(mean_square(x) + 1e-5)
        return y * jax.nn.sigmoid(y @ p["dense"])

    norm = only(function, PARAMS, X)
    assert (norm.type, norm.weight, norm.parameters) == ("rms", None, ())
    assert norm.nodes[-1].outputs[0] is norm.output


def test_a_factor_that_depends_on_x_is_no_weight() -> None:
    norm = only(lambda p, x: x * jax.lax.rsqrt(mean_square(x) + 1e-5) * mean(x), PARAMS, X)
    assert norm.weight is None


def test_a_modulated_norm_has_no_weight() -> None:
    """Scale and shift are computed from another input."""

    def function(p: Any, x: jax.Array, c: jax.Array) -> jax.Array:
        scale, shift = jnp.split(c @ p["modulation"], 2, axis=-1)
        return (x - mean(x)) * jax.lax.rsqrt(library(x) + 1e-5) * (1 + scale) + shift

    norm = only(function, PARAMS | {"modulation": jnp.ones((D, 2 * D))}, X, X)
    assert (norm.type, norm.weight, norm.bias) == ("layer", None, None)


def test_a_table_of_positions_is_no_bias() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return RMS["rsqrt"](p, x) + p["table"]

    norm = only(function, PARAMS | {"table": jnp.ones((T, D))}, X)
    assert (norm.bias, norm.parameters) == (None, ("w",))


def test_a_residual_is_no_bias() -> None:
    norm = only(lambda p, x: x + RMS["rsqrt"](p, x), PARAMS, X)
    assert norm.bias is None


def test_a_second_factor_is_no_weight() -> None:
    norm = only(lambda p, x: RMS["rsqrt"](p, x) * p["b"], PARAMS, X)
    assert norm.parameters == ("w",)


def test_an_output_is_not_passed() -> None:
    def function(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x * jax.lax.rsqrt(mean_square(x) + 1e-5)
        return y, y * p["w"]

    assert only(function, PARAMS, X).weight is None


# -- Models of others -------------------------------------------------------------------------------------------------

COUNTS = {
    "tunix_llama3": {"rms": 5},
    "tunix_qwen2": {"rms": 5},
    "tunix_qwen3": {"rms": 9},  # two in a layer, two on heads, one at the end
    "tunix_qwen3_experts": {"rms": 9},
    "tunix_gemma": {"rms": 9},  # four in a layer, one at the end
    "tunix_gemma3": {"rms": 37},  # six layers of six, two of them on heads, one at the end
    "flax_gpt2": {"layer": 5},
    "flax_bert": {"layer": 6},  # after the embedding, two in a layer, one in the head
    "flax_vit": {"layer": 5},
    "flax_clip": {"layer": 11},  # two towers of two layers, one behind the text, one before and behind the image
    "flax_whisper": {"layer": 12},  # two in an encoder's layer, three in a decoder's, one at each end
    "flax_llama": {"rms": 5},
}


@zoo.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_models_of_others(name: str) -> None:
    model = zoo.load(name)
    options = {} if model.variables is None else {"variables": model.variables}
    norms = found(model.module, *model.inputs, **options, **model.kwargs)
    assert collections.Counter(norm.type for norm in norms) == COUNTS[name]
    assert all(norm.weight is not None for norm in norms)
    assert all((norm.bias is not None) == (norm.type == "layer") for norm in norms)
    for norm in norms:
        check_values(norm)
