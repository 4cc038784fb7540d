"""Raising: what is found in ordinary ways to write layers, what it is called, and where nothing must be found."""

import collections
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compax
from compax import ir
from compax.experiments.benchmarks.bodies import BODIES, Body
from compax.models import decoder
from compax.raising import Site, common_prefix

D = 8


def rows(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape or (4, D)), jnp.float32)


def sites(function: Callable[..., Any], params: Any, *inputs: Any, **options: Any) -> tuple[Site, ...]:
    return compax.capture(function, params, *(inputs or (rows(),)), **options).sites()


def found(function: Callable[..., Any], params: Any, *inputs: Any) -> list[tuple[str, str]]:
    return [(site.name, site.kind) for site in sites(function, params, *inputs)]


def reduced(site: Site) -> dict[str, tuple[int, ...]]:
    return {use.parameter: use.reduced for use in site.uses}


# -- The bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_body(body: Body) -> None:
    """Every weight of every body is found, under the name of the layer that holds it."""
    program = compax.capture(body.make(), *body.inputs())
    weighted = [site for site in program.sites() if site.uses]
    assert [site.name for site in weighted] == list(body.site_names)
    assert {use.parameter for site in weighted for use in site.uses} == {
        path for path, x in program.params.items() if x.ndim > 1 and not path.endswith("bias")
    }
    for site in program.sites():
        assert ir.resolve(program.graph().graph, site.path) is site.op
        assert bool(site.opaque) == (body.name == "custom_vjp")


def test_sites_of_the_decoder() -> None:
    config = decoder.SIZES["tiny"]
    program = compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), *decoder.example_inputs(config, sequence=16))
    kinds = {site.name: site.kind for site in program.sites()}
    assert kinds["embed"] == "embedding"
    assert kinds["embed#2"] == "linear"
    assert collections.Counter(kinds.values()) == {"linear": 15, "embedding": 1, "matmul": 4}
    assert kinds["blocks.1.attn.matmul"] == "matmul"
    assert all(f"blocks.{i}.mlp.{name}" in kinds for i in range(2) for name in ("gate", "up", "down"))


# -- Names ------------------------------------------------------------------------------------------------------------


def test_a_parameter_names_its_site_where_its_module_has_several() -> None:
    params = {"mlp": {"w1": rows(D, D), "w2": rows(D, D)}, "head": {"kernel": rows(D, D), "bias": rows(D)}}

    def function(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["mlp"]["w1"] @ p["mlp"]["w2"]) @ p["head"]["kernel"] + p["head"]["bias"]

    assert found(function, params) == [("mlp.w1", "linear"), ("mlp.w2", "linear"), ("head", "linear")]


def test_a_second_use_is_numbered() -> None:
    assert found(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"] @ p["w"].T, {"w": rows(D, D)}) == [
        ("w", "linear"),
        ("w#2", "linear"),
        ("w#3", "linear"),
    ]


def test_a_parameter_alone() -> None:
    assert found(lambda p, x: x @ p, rows(D, D)) == [("params", "linear")]


def test_blocks_that_share_one_traced_function_have_their_own_names() -> None:
    """JAX caches the trace: named scopes inside would all say the first block."""
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    params = {"blocks": [{"w": rows(D, D)} for _ in range(3)]}

    def function(p: Any, x: jax.Array) -> jax.Array:
        for block in p["blocks"]:
            x = layer(block["w"], x)
        return x

    program = compax.capture(function, params, rows())
    assert [site.name for site in program.sites()] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len({id(site.op) for site in program.sites()}) == 1
    assert len({site.path for site in program.sites()}) == 3


def test_two_layers_sharing_one_weight_are_named_by_it() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(D, D, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(D, D, rngs=nnx.Rngs(1))
            self.second.kernel = self.first.kernel

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    program = compax.capture(Model(), rows())
    assert [(site.name, site.parameter) for site in program.sites()] == [
        ("first", "first.kernel"),
        ("first#2", "first.kernel"),
    ]


def test_a_product_of_computed_values_is_named_by_what_it_comes_from() -> None:
    params = {"attn": {"q": {"w": rows(D, D)}, "k": {"w": rows(D, D)}}, "out": {"w": rows(D, D)}}

    def function(p: Any, x: jax.Array) -> jax.Array:
        q, k = jax.nn.relu(x @ p["attn"]["q"]["w"]), x @ p["attn"]["k"]["w"]
        return (q @ k.T) @ x @ p["out"]["w"]

    names = found(function, params)
    assert names[:3] == [("attn.q", "linear"), ("attn.k", "linear"), ("attn.matmul", "matmul")]
    assert names[4] == ("out", "linear")


def test_a_product_of_inputs_is_named_by_its_kind() -> None:
    assert found(lambda p, x: x @ x.T + p["b"], {"b": rows(4)}) == [("matmul", "matmul")]


def test_linen_names() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(D)(nn.relu(nn.Dense(D, name="up")(x)))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(10, D)
            x = embed(tokens)
            for _ in range(2):
                x = Block()(x)
            return embed.attend(x)

    tokens = jnp.zeros((2, 3), jnp.int32)
    variables = Model().init(jax.random.key(0), tokens)
    assert [site.name for site in compax.capture(Model(), tokens, variables=variables).sites()] == [
        "Embed_0",
        "Block_0.up",
        "Block_0.Dense_0",
        "Block_1.up",
        "Block_1.Dense_0",
        "Embed_0#2",
    ]


def test_names_are_unique_and_stable() -> None:
    for body in BODIES:
        one, other = (compax.capture(body.make(), *body.inputs()).sites() for _ in range(2))
        assert [site.name for site in one] == [site.name for site in other]
        assert len({site.name for site in one}) == len(one)


@pytest.mark.parametrize(
    ("paths", "prefix"),
    [
        ([], ""),
        (["a.b.c"], "a.b.c"),
        (["a.b.c", "a.b.d"], "a.b"),
        (["a.bc", "a.bd"], "a"),
        (["a", "b"], ""),
        (["a.b", "a.b.c"], "a.b"),
    ],
)
def test_common_prefix_counts_whole_components(paths: list[str], prefix: str) -> None:
    assert common_prefix(paths) == prefix


# -- What is recognized -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape", "contracted"),
    [
        (lambda p, x: x @ p, (D, 6), (0,)),
        (lambda p, x: x @ p.T, (6, D), (1,)),
        (lambda p, x: p @ x.T, (6, D), (1,)),
        (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p), (D, 2, 3), (0,)),
        (lambda p, x: jnp.einsum("bd,hkd->bhk", x, p), (2, 3, D), (2,)),
        (lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(4, 2, 4), p), (2, 4, 5), (0, 1)),
        (lambda p, x: x @ p.reshape(D, -1), (D, 2, 3), (0,)),
        (lambda p, x: x @ p.reshape(D, -1), (2, 4, 3), (0, 1)),
        (lambda p, x: x @ p[1], (3, D, 6), (1,)),
        (lambda p, x: x @ p[:, 2:5], (D, 6), (0,)),
        (lambda p, x: x @ p.astype(jnp.bfloat16), (D, 6), (0,)),
        (lambda p, x: x @ jax.lax.stop_gradient(p), (D, 6), (0,)),
        (lambda p, x: jnp.einsum("bd,bdf->bf", x, p), (4, D, 6), (1,)),
        (lambda p, x: jax.vmap(lambda w, x: x @ w)(p, x), (4, D, 6), (1,)),
        (lambda p, x: jax.vmap(lambda w: x @ w)(p), (3, D, 6), (1,)),
        (lambda p, x: jax.vmap(lambda x: p @ x)(x), (6, D), (1,)),
        (lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p)[0], (3, D, D), (1,)),
        (lambda p, x: jax.lax.scan(lambda x, w: (x @ w.T, None), x, p)[0], (3, D, D), (2,)),
        (lambda p, x: jax.lax.scan(lambda x, _: (x @ p, None), x, None, length=3)[0], (D, D), (0,)),
        (lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: x @ p[i], x), (3, D, D), (1,)),
        (lambda p, x: jax.checkpoint(lambda x: x @ p)(x), (D, 6), (0,)),
        (lambda p, x: jax.jit(lambda x, w: x @ w)(x, p), (D, 6), (0,)),
        (lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p, lambda: x), (D, D), (0,)),
    ],
)
def test_linear(function: Any, shape: tuple[int, ...], contracted: tuple[int, ...]) -> None:
    """Weights on either side, of any rank, under casts, transposes, reshapes and slices, in any body."""
    (site,) = sites(function, rows(*shape))
    assert (site.kind, site.parameter, site.opaque) == ("linear", "params", "")
    assert reduced(site) == {"params": contracted}


def test_weights_fused_in_the_forward_pass() -> None:
    """q, k and v in one product of a concatenation: one site that uses three parameters."""
    params = {"attn": {name: {"w": rows(D, D)} for name in "qkv"}}

    def function(p: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([p["attn"][name]["w"] for name in "qkv"], axis=1)

    (site,) = sites(function, params)
    assert (site.name, site.kind, site.parameter) == ("attn", "linear", None)
    assert reduced(site) == {"attn.k.w": (0,), "attn.q.w": (0,), "attn.v.w": (0,)}


def test_a_fused_weight_that_is_split() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        q, k = jnp.split(p["qk"], 2, axis=1)
        return (x @ q) + (x @ k)

    assert found(function, {"qk": rows(D, 2 * D)}) == [("qk", "linear"), ("qk#2", "linear")]


def test_a_stack_made_in_the_forward_pass() -> None:
    params = {"blocks": [{"w": rows(D, D)} for _ in range(3)]}

    def function(p: Any, x: jax.Array) -> jax.Array:
        stack = jnp.stack([block["w"] for block in p["blocks"]])
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    (site,) = sites(function, params)
    assert site.name == "blocks"
    assert reduced(site) == {f"blocks.{i}.w": (0,) for i in range(3)}


def test_embedding() -> None:
    tokens = jnp.zeros((2, 3), jnp.int32)
    table = {"embed": {"embedding": rows(10, D)}}
    for function in (
        lambda p, t: p["embed"]["embedding"][t],
        lambda p, t: jnp.take(p["embed"]["embedding"], t, axis=0),
        lambda p, t: jnp.take(p["embed"]["embedding"].astype(jnp.bfloat16), t, axis=0, mode="clip"),
        lambda p, t: jax.vmap(lambda row: p["embed"]["embedding"][row])(t),
    ):
        (site,) = sites(function, table, tokens)
        assert (site.name, site.kind, site.weight, site.flops) == ("embed", "embedding", 0, 0)
        assert reduced(site) == {"embed.embedding": (1,)}


def test_reshards_of_explicit_meshes_are_layout() -> None:
    """A lookup and a product in a parameter that the model moves to another sharding first."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def function(p: Any, x: jax.Array) -> jax.Array:
        looked_up = jax.sharding.reshard(p["table"], PartitionSpec())[jnp.zeros(8, jnp.int32)]
        return looked_up + x @ jax.sharding.reshard(p["w"], PartitionSpec())

    with jax.set_mesh(mesh):
        params = {"table": rows(16, D), "w": rows(D, D)}
        params = {k: jax.device_put(w, NamedSharding(mesh, PartitionSpec("data"))) for k, w in params.items()}
        assert found(function, params, jnp.ones((8, D))) == [("table", "embedding"), ("w", "linear")]


def test_a_one_hot_product_is_a_linear_on_the_table() -> None:
    tokens = jnp.zeros((2, 3), jnp.int32)
    (site,) = sites(lambda p, t: jax.nn.one_hot(t, 10) @ p["table"], {"table": rows(10, D)}, tokens)
    assert (site.kind, reduced(site)) == ("linear", {"table": (0,)})


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_convolution(layout: str) -> None:
    numbers = (layout, "HWIO" if layout == "NHWC" else "OIHW", layout)
    kernel = rows(3, 3, 4, 6) if layout == "NHWC" else rows(6, 4, 3, 3)
    image = rows(2, 8, 8, 4) if layout == "NHWC" else rows(2, 4, 8, 8)

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)

    (site,) = sites(function, {"kernel": kernel}, image)
    assert site.kind == "convolution"
    assert reduced(site) == {"kernel": (0, 1, 2) if layout == "NHWC" else (1, 2, 3)}
    assert site.flops == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)


def test_a_depthwise_convolution_counts_its_groups() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    (site,) = sites(function, rows(3, 3, 1, 4), rows(2, 8, 8, 4))
    assert site.flops == 2 * (2 * 8 * 8 * 4) * 9


def test_ragged_dot() -> None:
    (site,) = sites(
        lambda p, x: jax.lax.ragged_dot(x, p["experts"], jnp.array([1, 3], jnp.int32)), {"experts": rows(2, D, 6)}
    )
    assert (site.name, site.kind, site.weight, reduced(site)) == ("experts", "linear", 1, {"experts": (1,)})


def test_shard_map() -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(None, "model"), PartitionSpec("model", None))

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda x, w: jax.lax.psum(x @ w, "model"), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
        )(x, p["w"])

    (site,) = sites(function, {"w": rows(D, 6)})
    assert (site.name, site.kind, reduced(site)) == ("w", "linear", {"w": (0,)})
    assert site.flops == 2 * 4 * D * 6  # of all devices together


def test_all_gathered_weights() -> None:
    """FSDP written by hand: shards of the weight are gathered, then used."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ jax.lax.all_gather(w, "data", tiled=True)

    def function(p: Any, x: jax.Array) -> jax.Array:
        specs = (PartitionSpec("data"), PartitionSpec("data"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])(x, p["w"])

    (site,) = sites(function, {"w": rows(D, 6)}, rows(8, D))
    assert (site.name, site.kind) == ("w", "linear")


# -- Loops, and operations that cannot be rewritten -------------------------------------------------------------------


def test_loops_count_in_full() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jax.lax.scan(lambda x, v: (x @ v, None), x, w)[0], None), x, p)[0]

    (site,) = sites(function, rows(2, 3, D, D))
    assert site.loops == (2, 3)
    assert site.flops == 2 * 3 * 2 * 4 * D * D
    assert reduced(site) == {"params": (2,)}


def test_a_while_loop_counts_once() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x @ p, x)

    (site,) = sites(function, rows(D, D))
    assert site.loops == (0,)
    assert site.flops == 2 * 4 * D * D


def test_a_weight_in_the_carry_of_a_loop() -> None:
    """Handed on unchanged it is the weight still; changed, it is a computed value."""

    def function(p: Any, x: jax.Array, change: bool) -> jax.Array:
        def turn(carry: Any, _: Any) -> Any:
            x, w = carry
            return (x @ w, w * 0.5 if change else w), None

        return jax.lax.scan(turn, (x, p), None, length=3)[0][0]

    assert [s.kind for s in sites(lambda p, x: function(p, x, False), rows(D, D))] == ["linear"]
    assert [s.kind for s in sites(lambda p, x: function(p, x, True), rows(D, D))] == ["matmul"]


def test_custom_derivatives_are_opaque() -> None:
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    before, inside, after = sites(
        lambda p, x: product(x @ p["a"], p["b"]) @ p["c"], {name: rows(D, D) for name in "abc"}
    )
    assert (before.opaque, after.opaque) == ("", "")
    assert inside.parameter == "b"
    assert "derivative rule" in inside.opaque


# -- Where nothing must be found --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "params", "inputs"),
    [
        # lookups that are no embeddings
        (lambda p, i: p[i], rows(10), (jnp.zeros(3, jnp.int32),)),
        (lambda p, i: p[i, i], rows(10, 10), (jnp.zeros(3, jnp.int32),)),
        (lambda p, i: p[i], jnp.arange(20).reshape(10, 2), (jnp.zeros(3, jnp.int32),)),
        (lambda p, x: x[jnp.array([0, 1])] + p, rows(D), (rows(),)),
        (lambda p, i: jnp.tanh(p)[i], rows(10, D), (jnp.zeros(3, jnp.int32),)),
        # products that are no contractions of floating numbers
        (lambda p, x: x @ p, jnp.ones((D, D), jnp.int32), (jnp.ones((4, D), jnp.int32),)),
        (lambda p, x: jnp.einsum("b,d->bd", x, p), rows(D), (rows(4),)),
        (lambda p, x: jax.lax.dot_general(x, p, (((), ()), ((0,), (0,)))), rows(4, D), (rows(4, 6),)),
        (lambda p, x: x * p, rows(D), (rows(),)),
        (lambda p, x: jnp.sum(x * p, -1), rows(D), (rows(),)),
    ],
    ids=[
        "a vector's elements",
        "a matrix's elements",
        "an integer table",
        "rows of the input",
        "rows of a computed table",
        "integers",
        "outer product",
        "batch dimensions alone",
        "elementwise",
        "sum of a product",
    ],
)
def test_no_site(function: Any, params: Any, inputs: tuple[Any, ...]) -> None:
    assert sites(function, params, *inputs) == ()


@pytest.mark.parametrize(
    ("function", "params"),
    [
        (lambda p, x: x @ (p["a"] @ p["b"]), {"a": rows(D, D), "b": rows(D, D)}),
        (lambda p, x: x @ jnp.tanh(p["a"]) + p["b"], {"a": rows(D, D), "b": rows(D)}),
        (lambda p, x: x @ (p["a"] * p["b"]), {"a": rows(D, D), "b": rows(D, D)}),
        (lambda p, x: x @ (p["a"] + p["b"]), {"a": rows(D, D), "b": rows(D, D)}),
        (lambda p, x: x @ jnp.broadcast_to(p["a"][:, None], (D, D)), {"a": rows(D)}),
        (lambda p, x: x @ x.T @ x + p["a"], {"a": rows(D)}),
        (lambda p, x: x @ p["a"], {"a": rows(D)}),
    ],
    ids=["two parameters", "tanh", "product", "sum", "broadcast", "input", "a vector"],
)
def test_no_linear(function: Any, params: Any) -> None:
    """A weight that is computed, or no matrix, is not stored in fewer bits: the product is a matmul."""
    assert {site.kind for site in sites(function, params)} == {"matmul"}
    assert all(site.uses == () for site in sites(function, params))


def test_a_product_of_two_parameters_is_a_matmul() -> None:
    (site,) = sites(lambda p, x: p["a"] @ p["b"] + x, {"a": rows(4, D), "b": rows(D, D)})
    assert (site.kind, site.uses) == ("matmul", ())


def test_a_scatter_ends_a_derivation() -> None:
    (site,) = sites(lambda p, x: x @ p.at[0].set(1.0), rows(D, D))
    assert site.kind == "matmul"


def test_padding_ends_a_derivation() -> None:
    (site,) = sites(lambda p, x: x @ jnp.pad(p, ((0, 0), (0, 2))), rows(D, D))
    assert site.kind == "matmul"


def test_state_is_no_parameter() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.BatchStat(rows(D, D))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.table[...]

    assert [site.kind for site in compax.capture(Model(), rows()).sites()] == ["matmul"]


def test_a_model_without_parameters_has_no_sites() -> None:
    assert sites(lambda p, x: jnp.tanh(x), {}) == ()
