"""The pass `flash`: what it rewrites, what it leaves and why, and where the result works."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import compax
from compax import Program, ir
from compax.contracts import Observation, largest_relative_error, rounding_tolerance
from compax.errors import ContractError, PipelineError, SelectorError
from compax.experiments.benchmarks import zoo_case
from compax.models import decoder
from compax.passes import Flash, flash
from compax.passes.flash.contract import Rounding
from compax.placement import Placement
from compax.transform import Context
from oracle import assert_preserves
from small import reasons, run, statuses

B, T, D, H, G, K = 2, 12, 16, 4, 2, 6
"""Batch, positions, model, heads, key-value heads, head size."""

RANDOM = np.random.default_rng(0)
ROWS, COLUMNS = jnp.arange(T)[:, None], jnp.arange(T)
CAUSAL = ROWS >= COLUMNS


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


PARAMS = {"q": normal(D, H, K), "k": normal(D, G, K), "v": normal(D, G, K), "o": normal(H, K, D)}
X = normal(B, T, D)
SMALL = {name: x * 0.2 for name, x in PARAMS.items()}


def layer(
    p: Any, x: jax.Array, change: Callable[[jax.Array], jax.Array] = lambda s: jnp.where(CAUSAL, s, -1e30)
) -> jax.Array:
    q = jnp.einsum("btd,dhk->bthk", x, p["q"]).reshape(*x.shape[:2], G, H // G, K)
    k, v = (jnp.einsum("bsd,dgk->bsgk", x, p[name]) for name in "kv")
    weights = jax.nn.softmax(change(jnp.einsum("btgrk,bsgk->bgrts", q, k) * K**-0.5))
    out = jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(*x.shape[:2], H, K)
    return x + jnp.einsum("bthk,hkd->btd", out, p["o"])


def fused(function: Callable[..., Any], *inputs: Any, options: str = "block_q=8, block_k=8", **more: Any) -> Program:
    """The program of a function after the pass, which held it to its contract; gradients are compared here."""
    inputs = inputs or (X,)
    before = compax.capture(function, SMALL, *inputs, **more)
    program = compax.Pipeline.parse(f"flash({options})")(before, *inputs)
    if program is not before:
        compax.verify(program)

        def gradients(program: Program) -> Any:
            def loss(params: Any) -> jax.Array:
                return jnp.sum(jnp.sin(program.apply(params, program.state, *inputs)[0]))

            return jax.jit(jax.grad(loss))(program.params)

        for one, other in zip(*(jax.tree.leaves(gradients(p)) for p in (before, program)), strict=True):
            assert largest_relative_error(np.asarray(one), np.asarray(other)) <= rounding_tolerance("float32")
    return program


def operations(program: Program) -> list[ir.Op]:
    return [
        op for captured in program.graphs.values() for _, op in ir.walk(captured.graph) if op.name == flash.OPERATION
    ]


def same(one: Any, other: Any) -> None:
    assert largest_relative_error(np.asarray(one), np.asarray(other)) <= rounding_tolerance("float32")


def tiny(**changes: Any) -> decoder.Decoder:
    return decoder.Decoder(dataclasses.replace(decoder.SIZES["tiny"], **changes), rngs=nnx.Rngs(0))


TOKENS = zoo_case.tokens(B, T, 96)


# -- models -----------------------------------------------------------------------------------------------------------


def test_decoder() -> None:
    program = assert_preserves(Flash(block_q=8, block_k=8), tiny(), TOKENS)
    assert statuses(program) == {"blocks.0.attn": "rewritten", "blocks.1.attn": "rewritten"}
    assert [op.attributes["spec"].kernel for op in operations(program)] == ["plain", "plain"]


@pytest.mark.slow
def test_decoder_scanned_with_remat() -> None:
    program = assert_preserves(Flash(block_q=8, block_k=8), tiny(scan=True, remat=True), TOKENS)
    assert statuses(program) == {"blocks.attn": "rewritten"}


def test_a_decoder_in_train_mode_drops_what_it_dropped() -> None:
    model = tiny(dropout=0.1)
    program = run("flash()", compax.capture(model, TOKENS, mode="train"))
    same(compax.capture(model, TOKENS, mode="train")(TOKENS), program(TOKENS))


def test_new_shapes_are_computed_by_the_kernel_too() -> None:
    model = tiny()
    program = run("flash()", compax.capture(model, TOKENS))
    longer = zoo_case.tokens(3, 20, 96)
    same(compax.capture(model, longer)(longer), program(longer))
    specialized = program.specialize(longer)
    assert sorted(op.attributes["spec"].lengths for op in operations(specialized)) == [(T, T)] * 2 + [(20, 20)] * 2


def test_a_step_from_a_cache_stays_as_the_model_has_it() -> None:
    model = tiny()
    program = run("flash()", compax.capture(model, TOKENS))
    step = zoo_case.tokens(B, 1, 96)
    outputs = [p(step, model.init_cache(B, T)) for p in (program, compax.capture(model, step, model.init_cache(B, T)))]
    same(*outputs)


def test_what_is_chosen_and_what_was_done_already() -> None:
    program = run("flash(at=blocks.1.attn)", compax.capture(tiny(), TOKENS))
    assert statuses(program) == {"blocks.1.attn": "rewritten"}
    program = run("flash()", program)
    assert statuses(program) == {"blocks.0.attn": "rewritten", "blocks.1.attn": "matched"}
    assert reasons(program)["blocks.1.attn"] == "a kernel computes it already"
    assert len(operations(program)) == 2
    with pytest.raises(SelectorError, match=r"blocks\.0\.attn"):
        run("flash(at=blocks.7.attn)", program)


# -- masks and scores -------------------------------------------------------------------------------------------------

MASKS = {
    "full": lambda s: s,
    "window": lambda s: jnp.where(CAUSAL & (ROWS - COLUMNS < 4), s, -1e30),
    "chunked": lambda s: jnp.where(CAUSAL & (ROWS // 4 == COLUMNS // 4), s, -1e30),
    "prefix": lambda s: jnp.where(CAUSAL | (COLUMNS < 3), s, -1e30),
    "causal, capped": lambda s: jnp.where(CAUSAL, 5 * jnp.tanh(s / 5), -1e30),
    "causal with ALiBi": lambda s: jnp.where(CAUSAL, s - 0.1 * (ROWS - COLUMNS), -1e30),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    program = fused(lambda p, x: layer(p, x, MASKS[name]))
    assert [site.status for site in program.history[-1].sites] == ["rewritten"]


def test_padding_with_queries_that_see_nothing() -> None:
    present = jnp.asarray(np.arange(T)[None] >= np.asarray([[0], [5]]), jnp.int32)

    def function(p: Any, x: jax.Array, present: jax.Array) -> jax.Array:
        seen = CAUSAL & (present[:, None, None, None, :] > 0)
        return layer(p, x, lambda s: jnp.where(seen, s, jnp.finfo(s.dtype).min))

    (op,) = operations(fused(function, X, present))
    assert len(op.attributes["spec"].padding) == 1


def test_a_mask_that_is_an_argument() -> None:
    seen = jnp.asarray(RANDOM.random((B, T, T)) < 0.6) | jnp.eye(T, dtype=bool)

    def function(p: Any, x: jax.Array, seen: jax.Array) -> jax.Array:
        return layer(p, x, lambda s: jnp.where(seen[:, None, None], s, -1e30))

    (op,) = operations(fused(function, X, seen))
    assert len(op.attributes["spec"].given) == 1


@pytest.mark.parametrize("name", ["scaled after", "capped after"])
def test_a_bias_that_is_changed_after_it_was_added_is_left(name: str) -> None:
    slopes = 0.1 * (ROWS - COLUMNS)
    changes = {"scaled after": lambda s: (s + slopes) * 0.5, "capped after": lambda s: 5 * jnp.tanh((s + slopes) / 5)}
    assert left(lambda p, x: layer(p, x, changes[name]))


def test_a_learned_bias_gets_its_gradient() -> None:
    params = {**SMALL, "bias": normal(G, H // G, T, T)}

    def loss(program: Program, params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(program.apply(params, {}, X)[0]))

    before = compax.capture(lambda p, x: layer(p, x, lambda s: s + p["bias"]), params, X)
    program = run("flash(block_q=8, block_k=8)", before)
    assert len(operations(program)) == 1
    expected, actual = (jax.jit(jax.grad(lambda q, p=p: loss(p, q)))(p.params)["bias"] for p in (before, program))
    same(expected, actual)


def test_layers_that_share_a_body_and_differ_by_their_mask() -> None:
    block = jax.jit(lambda p, x, seen: layer(p, x, lambda s: jnp.where(seen, s, -1e30)))

    def function(p: Any, x: jax.Array) -> jax.Array:
        for seen in (CAUSAL, CAUSAL & (ROWS - COLUMNS < 4), CAUSAL):
            x = block(p, x, seen)
        return x

    program = fused(function)
    kinds = [(op.attributes["spec"].pattern.before, op.attributes["spec"].pattern.after) for op in operations(program)]
    assert kinds == [(-1, 0), (3, 0), (-1, 0)]


# -- what is left -----------------------------------------------------------------------------------------------------


def left(function: Callable[..., Any], *inputs: Any, options: str = "") -> str:
    """Why the pass left the one attention of a function."""
    program = compax.capture(function, SMALL, *(inputs or (X,)))
    ((site,),) = [compax.Pipeline.parse(f"flash({options})").passes[0].run(program, Context()).sites for _ in "x"]
    assert site.status == "skipped"
    return site.reason


def test_dropout_of_weights_is_left() -> None:
    def function(p: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p["q"]) for _ in range(3))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        weights = jnp.where(jax.random.bernoulli(key, 0.9, weights.shape), weights / 0.9, 0.0)
        return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"])

    assert "a share of 0.1 of its weights is dropped at random" in left(function, X, jax.random.key(0))


def test_scores_without_a_name_are_left() -> None:
    assert "changed in a way that has no name" in left(lambda p, x: layer(p, x, lambda s: jnp.maximum(s, 0.0)))


def test_weights_that_are_returned_are_left() -> None:
    def function(p: Any, x: jax.Array) -> Any:
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p["q"]) for _ in range(3))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"]), weights

    assert "which is used outside of it" in left(function)


def test_positions_that_are_arguments_are_left() -> None:
    def function(p: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
        seen = positions[:, :, None] >= COLUMNS
        return layer(p, x, lambda s: jnp.where(seen[:, None, None], s, -1e30))

    reason = left(function, X, jnp.broadcast_to(jnp.arange(T), (B, T)))
    assert "'positions' says where its queries stand" in reason or "in a way that has no name" in reason


def test_what_a_kernel_does_not_take_is_left_with_its_reason() -> None:
    causal = lambda p, x: layer(p, x)  # noqa: E731
    assert "splash: heads of size 6, which is no multiple of 8" in left(causal, options="implementation=splash")
    assert "flash(implementation=plain)" in left(causal, options="implementation=splash")
    assert "put cast before flash" in left(causal, options="implementation=cudnn")
    assert "4 heads on 2" in left(causal, options="implementation=pallas")


def test_the_target_says_which_kernel() -> None:
    @dataclasses.dataclass(frozen=True)
    class Chip:
        platform: str

    @dataclasses.dataclass(frozen=True)
    class Target:
        chip: Chip

    program = compax.capture(lambda p, x: layer(p, x), SMALL, X)
    for platform, words in (("tpu", ["splash"]), ("gpu", ["cudnn", "pallas"])):
        (site,) = Flash().run(program, Context(target=Target(Chip(platform)))).sites
        assert all(f"{word}: " in site.reason for word in words)


# -- transformations --------------------------------------------------------------------------------------------------


def settings(program: Program) -> dict[str, Callable[[], Any]]:
    def apply(x: jax.Array) -> jax.Array:
        return program.apply(program.params, {}, x)[0]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")
    # A graph that was captured outside does not say what varies inside.
    spread = jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    gradient = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))  # noqa: E731
    return {
        "shard_map": lambda: jax.jit(gradient(spread))(X),
        "vmap": lambda: jax.jit(jax.vmap(gradient(apply)))(jnp.stack([X, -X])),
        "cond": lambda: jax.jit(gradient(lambda x: jax.lax.cond(x[0, 0, 0] > 9, lambda x: x, apply, x)))(X),
        "scan": lambda: jax.jit(gradient(lambda x: jax.lax.scan(lambda x, _: (apply(x), None), x, length=2)[0]))(X),
        "remat": lambda: jax.jit(gradient(jax.checkpoint(apply)))(X),
    }


SETTINGS = ("shard_map", "vmap", "cond", "scan", "remat")


@pytest.mark.parametrize("setting", SETTINGS)
def test_under(setting: str) -> None:
    before = compax.capture(lambda p, x: layer(p, x), SMALL, X)
    after = run("flash(block_q=8, block_k=8)", before)
    same(settings(before)[setting](), settings(after)[setting]())


def test_inside_a_shard_map_of_the_model() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")

    def function(p: Any, x: jax.Array) -> jax.Array:
        local = jax.shard_map(layer, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
        return local(p, x)

    assert len(operations(fused(function))) == 1


# -- kernels over a mesh ----------------------------------------------------------------------------------------------

LONG = 128


def placed(**specs: PartitionSpec) -> Program:
    """One layer with heads of size 8 over 128 positions, on a mesh of two by two."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    params = {"q": normal(D, H, 8) * 0.2, "k": normal(D, G, 8) * 0.2, "v": normal(D, G, 8), "o": normal(H, 8, D)}
    causal = np.tri(LONG, dtype=bool)

    def function(p: Any, x: jax.Array) -> jax.Array:
        q = jnp.einsum("btd,dhk->bthk", x, p["q"]).reshape(B, LONG, G, H // G, 8)
        k, v = (jnp.einsum("bsd,dgk->bsgk", x, p[name]) for name in "kv")
        scores = jnp.where(causal, jnp.einsum("btgrk,bsgk->bgrts", q, k) * 8**-0.5, -1e30)
        out = jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(scores), v).reshape(B, LONG, H, 8)
        return jnp.einsum("bthk,hkd->btd", out, p["o"])

    program = compax.capture(function, params, normal(B, LONG, D))
    return program.replace(placement=Placement(mesh, specs, batch=("data",)))


def spread(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    (op,) = operations(program)
    devices = op.attributes["spec"].spread
    return devices.batch, devices.heads


def test_a_pallas_kernel_runs_on_each_device_for_its_own_sequences_and_heads() -> None:
    by_heads = PartitionSpec(None, "model", None)
    before = placed(q=by_heads, k=by_heads, v=by_heads)
    program = run("flash(implementation=splash, interpret=true)", before)
    assert spread(program) == (("data",), ("model",))
    x = normal(B, LONG, D)

    def gradient(program: Program) -> Any:
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(program.apply(program.params, {}, x)[0]))))(x)

    same(gradient(before), gradient(program))


def test_heads_stay_together_where_their_projections_are_not_spread_alike() -> None:
    by_heads = PartitionSpec(None, "model", None)
    assert spread(run("flash(implementation=splash)", placed(q=by_heads))) == (("data",), ())
    assert spread(run("flash(implementation=splash)", placed(q=PartitionSpec("model")))) == (("data",), ())


def test_it_lowers_for_tpu() -> None:
    program = run("flash(implementation=splash)", placed())
    x = jax.ShapeDtypeStruct((B, LONG, D), jnp.float32)
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(program.apply(p, {}, x)[0])))
    text = gradient.trace(program.params, x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3


def test_inside_a_shard_map_that_checks_what_varies_the_kernel_is_left() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")
    params = {**SMALL, "q": normal(D, H, 8), "k": normal(D, G, 8), "v": normal(D, G, 8)}

    def local(p: Any, x: jax.Array) -> jax.Array:
        q = jnp.einsum("btd,dhk->bthk", x, p["q"]).reshape(-1, LONG, G, H // G, 8)
        k, v = (jnp.einsum("bsd,dgk->bsgk", x, p[name]) for name in "kv")
        return jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(jnp.einsum("btgrk,bsgk->bgrts", q, k)), v)

    function = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    program = compax.capture(function, params, normal(B, LONG, D))
    (site,) = Flash(implementation="splash").run(program, Context()).sites
    assert "inside of a shard_map that checks what varies" in site.reason


# -- rematerialization ------------------------------------------------------------------------------------------------


def kernels_in(jaxpr: Any) -> int:
    """How often a forward kernel runs: loops over blocks that take a maximum, and splash; what nobody reads is none."""
    count = 0
    for equation in jaxpr.eqns:
        if not equation.outvars:
            continue
        nested = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        bodies = [body for x in nested if hasattr(body := getattr(x, "jaxpr", x), "eqns")]
        name = equation.primitive.name
        if name == "pallas_call":
            count += "fwd" in str(equation.params["name"])
        elif name == "scan" and any(inner.primitive.name == "reduce_max" for inner in bodies[0].eqns):
            count += 1
        else:
            count += sum(map(kernels_in, bodies))
    return count


@pytest.mark.parametrize(("names", "kernels"), [((flash.OUT_NAME, flash.LSE_NAME), 1), ((), 2)])
def test_kept_names_spare_the_second_run_of_the_forward_kernel(names: tuple[str, ...], kernels: int) -> None:
    program = run("flash(block_q=4, block_k=4)", compax.capture(lambda p, x: layer(p, x), SMALL, X))
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    apply = jax.checkpoint(lambda p, x: program.apply(p, {}, x)[0], policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(p, X))))(program.params)
    assert kernels_in(jaxpr.jaxpr) == kernels


def test_splash_is_not_run_again_either() -> None:
    x, p = normal(1, 256, 16), {**SMALL, "q": normal(D, H, 8), "k": normal(D, G, 8), "v": normal(D, G, 8)}

    def function(p: Any, x: jax.Array) -> jax.Array:
        q = jnp.einsum("btd,dhk->bthk", x, p["q"]).reshape(1, 256, G, H // G, 8)
        k, v = (jnp.einsum("bsd,dgk->bsgk", x, p[name]) for name in "kv")
        weights = jax.nn.softmax(jnp.einsum("btgrk,bsgk->bgrts", q, k) * 8**-0.5)
        return jnp.einsum("bgrts,bsgk->btgrk", weights, v)

    program = run("flash(implementation=splash)", compax.capture(function, p, x))
    for names, kernels in (((flash.OUT_NAME, flash.LSE_NAME), 1), ((), 2)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        apply = jax.checkpoint(lambda p, x: program.apply(p, {}, x)[0], policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, apply=apply: jnp.sum(apply(p, x))))(program.params)
        assert kernels_in(jaxpr.jaxpr) == kernels


# -- the matrix of queries and keys -----------------------------------------------------------------------------------


def test_memory_of_the_gradient_grows_with_the_length_not_with_its_square() -> None:
    def temporaries(text: str, length: int) -> int:
        mask = jnp.arange(length)[:, None] >= jnp.arange(length)
        x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
        program = compax.capture(lambda p, x: layer(p, x, lambda s: jnp.where(mask, s, -1e30)), SMALL, x)
        program = compax.Pipeline.parse(text)(program)
        gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(program.apply(p, {}, x)[0])))
        return gradient.lower(program.params, x).compile().memory_analysis().temp_size_in_bytes

    own, fused = (temporaries(text, 1024) for text in ("", "flash(block_q=64, block_k=64)"))
    assert own > H * 1024 * 1024 * 4
    assert fused < own / 8


# -- the contract -----------------------------------------------------------------------------------------------------


def test_the_contract_is_the_table_by_dtype() -> None:
    one, other = np.ones(4, np.float32), np.full(4, 1.001, np.float32)
    before, after = (Observation.of({"output": x}, compiled=True) for x in (one, other))
    with pytest.raises(ContractError, match=r"differs by 0.001 .* float32 allows 2e-05.*flash\(compute=bfloat16\)"):
        Rounding(2e-5).check(before, after)
    assert Flash(compute="bfloat16").promise().check(before, after)["largest relative error"] == pytest.approx(
        1e-3, 0.1
    )


def test_after_a_cast_the_kernel_computes_in_sixteen_bits() -> None:
    program = compax.Pipeline.parse("cast() | flash(compute=bfloat16)")(compax.capture(tiny(), TOKENS), TOKENS)
    assert {op.attributes["spec"].query_dtype for op in operations(program)} == {"bfloat16"}
    with pytest.raises(PipelineError, match="phase"):
        compax.Pipeline.parse("flash() | cast()").check()


def test_text_form() -> None:
    text = "flash(at=blocks.0.attn, implementation=splash, block_q=512, block_k=1024)"
    assert str(compax.Pipeline.parse(text)) == text
