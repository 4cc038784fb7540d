"""Values that are kept as int8 for the backward pass: the same loss, to the bit, and gradients that are close."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compax
from compax import ir
from compax.analysis.liveness import liveness
from compax.analysis.training import train_step
from compax.compression import COMPRESS, compressed, encoded_shapes, is_compress
from compax.contracts import ApproximateGradients, Exact, cosine_distance, relative_output_error
from compax.errors import ContractError, LoweringError, NoCompilerError, PipelineError, SelectorError
from compax.models import decoder
from compax.passes import Remat
from compax.passes.remat.approximating import refusals
from compax.passes.remat.planning import Planner
from compax.passes.remat.solving import Item, Layers, choose, priced
from compax.rewrites.checkpoint import find_regions
from compax.target import Target
from compax.transform import Context
from oracle import assert_preserves

LINEAR = 'remat(compress="**:linear")'

SCANNED = pytest.param({"scan": True}, marks=pytest.mark.slow)
CHECKPOINTED = pytest.param({"scan": True, "remat": True}, marks=pytest.mark.slow)


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()


def network(**options: Any) -> tuple[decoder.Decoder, jax.Array]:
    config = dataclasses.replace(decoder.SIZES["tiny"], **{"num_layers": 2, **options})
    return decoder.Decoder(config, rngs=nnx.Rngs(0)), decoder.example_inputs(config, sequence=16)[0]


def program(**options: Any) -> tuple[compax.Program, jax.Array]:
    model, tokens = network(**options)
    return compax.capture(model, tokens, loss=loss), tokens


def applied(text: str, given: compax.Program) -> compax.Program:
    return compax.Pipeline.parse(text)(given)


def graph_of(found: compax.Program, tokens: jax.Array) -> ir.Graph:
    """The graph of the loss and its gradient."""
    function = jax.value_and_grad(lambda params: found.apply(params, found.state, tokens)[0])
    return ir.import_jaxpr(jax.make_jaxpr(function)(found.params))


def count(found: compax.Program, tokens: jax.Array, name: str = "dot_general") -> int:
    return sum(op.name == name for _, op in ir.walk(graph_of(found, tokens)))


def evaluated(found: compax.Program, tokens: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The loss, and the gradient as one vector."""
    function = jax.value_and_grad(lambda params: found.apply(params, found.state, tokens)[0], allow_int=True)
    value, gradients = jax.jit(function)(found.params)
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(gradients) if x.dtype != jax.dtypes.float0]
    return np.asarray(value), np.concatenate(leaves)


def assert_close(before: compax.Program, after: compax.Program, tokens: jax.Array, bound: float = 0.02) -> None:
    (loss_before, one), (loss_after, other) = evaluated(before, tokens), evaluated(after, tokens)
    np.testing.assert_array_equal(loss_before, loss_after)
    assert 0 < relative_output_error(one, other) < bound
    assert cosine_distance(one, other) < 2e-4


# -- What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.slow  # compiled and run in every setting of the oracle
@pytest.mark.parametrize("scan", [False, True])
def test_it_preserves_what_a_model_computes(scan: bool) -> None:
    model, tokens = network(scan=scan)
    assert_preserves(Remat(compress="**:linear"), model, tokens)


@pytest.mark.parametrize("options", [{}, SCANNED, CHECKPOINTED], ids=str)
def test_the_loss_stays_the_same_bits_and_gradients_are_close(options: dict[str, Any]) -> None:
    before, tokens = program(**options)
    assert_close(before, applied(LINEAR, before), tokens)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_kept_as_int8_is_not_computed_again(scan: bool) -> None:
    before, tokens = program(scan=scan)
    plain = count(before, tokens)
    layers = 1 if scan else 2
    assert count(applied("remat()", before), tokens) - plain == 8 * layers
    assert count(applied(LINEAR, before), tokens) - plain == 2 * layers  # scores and their use


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_less_is_kept_for_the_backward_pass(scan: bool) -> None:
    """Predicted, and in the scanned case against what the compiler allocates."""
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=scan, num_layers=4)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    before = compax.capture(model, jax.ShapeDtypeStruct((16, 64), jnp.int32), loss=loss)
    temporaries = []
    for text in ("remat(keep=dots)", 'remat(keep=dots, compress="**:linear")', "remat()"):
        after = applied(text, before)
        step = train_step(after, after.graph(), 2)
        predicted = liveness(step.traced(after.graph()), "tpu", donated=step.donated).temporaries
        temporaries.append(predicted)
        if scan:
            function, shapes, donated = step.plain(after.graph())
            memory = jax.jit(function, donate_argnums=donated).lower(*shapes).compile().memory_analysis()
            assert memory is not None
            on_cpu = liveness(step.traced(after.graph()), "cpu", donated=step.donated).temporaries
            assert on_cpu == pytest.approx(memory.temp_size_in_bytes, rel=0.1)
    assert temporaries == sorted(temporaries, reverse=True)
    assert len(set(temporaries)) == 3


def test_int8_and_scales_alone_are_handed_to_the_backward_pass() -> None:
    before, tokens = program(scan=True)
    (scan, *_) = (op for _, op in ir.walk(graph_of(applied(LINEAR, before), tokens)) if op.name == "scan")
    integers = [x for x in scan.outputs if x.dtype == jnp.int8]
    wide = [x for x in scan.outputs if x.dtype == jnp.float32 and x.shape[1:] in [y.shape[1:] for y in integers]]
    assert len(integers) == 6  # of seven products: nobody reads the last one
    assert len(wide) == 1  # what goes into a layer


@pytest.mark.slow
def test_new_shapes_keep_int8_too() -> None:
    before, tokens = program()
    after, longer = applied(LINEAR, before), jnp.tile(tokens, (1, 2))
    assert count(after, longer) - count(before, longer) == 4
    assert_close(before, after, longer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        "cast(compute=bfloat16)",
        "quantize(train=true)",
        "flash(implementation=plain, block_q=8, block_k=8)",
    ],
)
def test_it_follows_other_passes(others: str) -> None:
    given, tokens = program(scan=True)
    before = applied(others, given)
    after = applied('remat(keep=attention, compress="**:linear")', before)
    assert_close(before, after, tokens, bound=0.05 if "quantize" in others else 0.02)
    if "flash" in others:
        assert count(after, tokens) == count(before, tokens)


@pytest.mark.slow
def test_training_reaches_the_same_loss() -> None:
    before, tokens = program()
    losses = []
    for each in (before, applied('remat(compress="**")', before)):
        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(params: Any, state: Any, each: Any = each, optimizer: Any = optimizer) -> Any:
            value, gradients = jax.value_and_grad(lambda params: each.apply(params, each.state, tokens)[0])(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        params, state = each.params, optimizer.init(each.params)
        values = []
        for _ in range(30):
            params, state, value = step(params, state)
            values.append(float(value))
        losses.append(values[-1])
    first = float(before(tokens))
    assert losses[0] < 0.1 * first
    assert losses[1] == pytest.approx(losses[0], abs=0.01 * first)


# -- The operation ----------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, dtype)


def layer(x: jax.Array, mark: Callable[[jax.Array], jax.Array] = compressed) -> jax.Array:
    return jnp.sum(
        jax.checkpoint(lambda x: mark(3 * x) ** 3, policy=lambda primitive, *_, **__: is_compress(primitive))(x)
    )


@pytest.mark.parametrize("shape", [(4, 256), (3, 5, 72), (96,), (2, 0), (2, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_backward_pass_reads_the_nearest_of_255_values(shape: tuple[int, ...], dtype: Any) -> None:
    x = normal(*shape, dtype=dtype)
    exact = np.asarray(3 * x, np.float32)
    read = np.sqrt(np.asarray(jax.grad(layer)(x), np.float32) / 9) * np.sign(exact)
    group = 128 if shape[-1] % 128 == 0 else max(1, shape[-1])
    rows = exact.reshape(*shape[:-1], shape[-1] // group, group)
    step = np.broadcast_to(np.abs(rows).max(-1, keepdims=True, initial=0) / 127, rows.shape).reshape(shape)
    rounding = 8 * float(jnp.finfo(dtype).eps) * np.abs(exact)
    assert (np.abs(read - exact) <= step / 2 + rounding + 1e-6).all()


def test_nothing_is_approximated_without_a_checkpoint() -> None:
    x = normal(8, 16)
    np.testing.assert_array_equal(compressed(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(compressed(x) ** 2))(x), 2 * x)


def test_zeros_and_what_is_no_number() -> None:
    np.testing.assert_array_equal(jax.grad(layer)(jnp.zeros((2, 8))), 0)
    found = jax.grad(layer)(jnp.zeros((2, 8)).at[1, 3].set(jnp.nan))
    assert np.isnan(found[1]).all()
    assert not np.isnan(found[0]).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_under_vmap_scales_stay_those_of_rows(axis: int) -> None:
    x = normal(3, 4, 16)
    moved = jnp.moveaxis(x, 0, axis)
    expected = jnp.stack([jax.grad(layer)(row) for row in x])
    np.testing.assert_allclose(jax.vmap(jax.grad(layer), in_axes=axis)(moved), expected, rtol=1e-6)
    outer = jax.grad(lambda x: jnp.sum(jax.vmap(layer, in_axes=axis)(x)))
    np.testing.assert_allclose(jnp.moveaxis(outer(moved), axis, 0), expected, rtol=1e-6)


def test_within_a_checkpoint_of_the_caller_and_nested_calls() -> None:
    x = normal(4, 16)
    expected = jax.grad(layer)(x)
    np.testing.assert_allclose(jax.grad(jax.jit(lambda x: layer(x, jax.jit(compressed))))(x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(layer))(x), expected, rtol=1e-6)


def test_second_derivatives_are_refused() -> None:
    x = normal(4, 16)
    with pytest.raises(LoweringError, match="cannot be differentiated again"):
        jax.grad(lambda x: jnp.sum(jax.grad(layer)(x)))(x)
    with pytest.raises(LoweringError, match="cannot be differentiated again"):
        jax.jvp(jax.grad(layer), (x,), (x,))


def test_inside_a_shard_map_and_over_a_mesh() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x = normal(4, 512)
    expected = jax.grad(layer)(x)
    spec = PartitionSpec("data", "model")
    sharded = jax.shard_map(lambda x: jax.grad(layer)(x), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(x), expected, rtol=1e-5)
    spread = jax.device_put(x, NamedSharding(mesh, spec))
    compiled = jax.jit(jax.grad(layer)).lower(spread).compile()
    np.testing.assert_allclose(compiled(spread), expected, rtol=1e-5)
    text = str(compiled.as_text())
    assert "all-reduce" not in text
    assert "all-gather" not in text


def test_what_is_kept_in_numbers() -> None:
    integers, scales = encoded_shapes(jax.ShapeDtypeStruct((4, 256), jnp.bfloat16))
    assert (integers.shape, integers.dtype, scales.shape, scales.dtype) == ((4, 256), jnp.int8, (4, 2), jnp.float32)
    assert encoded_shapes(jax.ShapeDtypeStruct((4, 72), jnp.float32))[1].shape == (4, 1)


# -- What is chosen ---------------------------------------------------------------------------------------------------


def marked(found: compax.Program) -> int:
    return sum(op.name == COMPRESS for _, op in ir.walk(found.graph().graph))


def test_the_record_says_what_is_approximated_and_by_how_much() -> None:
    before, tokens = program()
    record = compax.Pipeline.parse('remat(compress="blocks.0.mlp.*:linear")')(before, tokens).history[-1]
    assert 0 < record.metrics["relative gradient error"] < 0.02
    assert record.metrics["relative output error"] == 0
    assert [site.reason for site in record.sites] == [
        "kept as int8: blocks.0.mlp.gate/dot_general, blocks.0.mlp.up/dot_general, blocks.0.mlp.down/dot_general",
        "nothing kept",
    ]
    assert record.notes[0].startswith("gradients are approximated: 3 values are kept as int8")
    assert "relative gradient error 0.0" in str(record)


def test_without_permission_nothing_is_approximated() -> None:
    before, _ = program()
    for text in ("remat()", "remat(keep=dots)", 'remat(save="**")', "remat(budget=2MB, target=h100)"):
        assert marked(applied(text, before)) == 0
    assert Remat(keep="dots").promise() == Exact()
    assert isinstance(Remat(budget=10, lossy="int8").promise(), ApproximateGradients)


def test_what_would_be_rounded_away_is_left_and_said() -> None:
    """Scores before an exponential, masked ones among them; other passes' kernels; short rows; integers."""
    before, _ = program()
    after = applied('remat(compress="**")', before)
    left = {site.name: site.reason for site in after.history[-1].sites if site.status == "skipped"}
    assert [name.split(".")[1] for name in left] == ["0", "1"]
    assert all("an exponential is taken of it" in reason for reason in left.values())
    regions = find_regions(before.graph(), before.meaning())
    reasons = refusals(before.graph(), regions)
    by_name: dict[str, set[str | None]] = {}
    for path, op in ir.walk(before.graph().graph):
        if any(region.holds(path) for region in regions):
            by_name.setdefault(op.name, set()).add(reasons.get(path))
    assert {reason is None for reason in by_name["dot_general"]} == {True, False}
    for name in ("exp", "logistic", "rsqrt", "reduce_sum", "reduce_max", "select_n", "iota"):
        assert None not in by_name.get(name, {"absent"}), name
    fused = applied("flash(implementation=plain, block_q=8, block_k=8)", before)
    with pytest.raises(SelectorError, match=r"kernel's backward pass reads what it keeps exactly; use save"):
        applied('remat(compress="**:attention")', fused)


def test_options_that_do_not_go_together_are_refused() -> None:
    before, _ = program()
    with pytest.raises(PipelineError, match="lossy is a permission"):
        Remat(lossy="int8")
    with pytest.raises(PipelineError, match="take keep=dots beside compress"):
        Remat(keep="everything", compress="**")
    with pytest.raises(PipelineError, match="leave out keep, save, offload and compress"):
        Remat(budget=10, compress="**")
    with pytest.raises(PipelineError, match=r"selected by save and by compress; exclude it"):
        applied('remat(save="**.up", compress="**.mlp.*:linear")', before)
    with pytest.raises(SelectorError, match="selects no result"):
        applied("remat(compress=blocks.7.mlp)", before)
    with pytest.raises(SelectorError, match="the backward pass reads none of it"):
        applied('remat(compress="**.down")', before)


def test_a_preset_keeps_exactly_what_is_not_selected() -> None:
    before, tokens = program()
    after = applied('remat(keep=dots, compress="**.mlp.*:linear")', before)
    assert sorted(after.history[-1].decisions["marks"].values()) == ["compress"] * 6 + ["save"] * 8
    assert_close(before, after, tokens)


def test_gradients_that_are_off_by_more_than_the_contract_are_an_error() -> None:
    contract, one = ApproximateGradients(0.05), np.ones(8)
    measured = contract.check_gradients(one, 1.04 * one)
    assert measured["relative gradient error"] == pytest.approx(0.04)
    assert measured["cosine distance of gradients"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ContractError, match=r"relative error of 0\.06; the contract allows 0\.05"):
        contract.check_gradients(one, 1.06 * one)
    with pytest.raises(ContractError, match="NaN"):
        contract.check_gradients(one, np.where(np.arange(8) == 3, np.nan, one))


# -- Under a budget ---------------------------------------------------------------------------------------------------


def test_the_choice_among_three_is_the_best_of_all() -> None:
    """Against every choice of keeping, keeping as int8 and computing again, for six operations in two layers."""
    numbers = [((), 3.0, 8), ((0,), 1.0, 8), ((1,), 6.0, 4), ((0, 2), 2.0, 12), ((3,), 4.0, 16), ((3, 4), 5.0, 8)]
    items = tuple(
        Item(
            sources,
            i != 1,
            keepable=True,
            seconds=seconds,
            kept_bytes=size,
            working_bytes=size // 2,
            coded_bytes=None if i == 2 else size // 4,
            coding_seconds=0.25,
        )
        for i, (sources, seconds, size) in enumerate(numbers)
    )
    layers = Layers(items, 2)
    states = np.stack(np.meshgrid(*[range(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
    every = [
        priced([layers], [frozenset(np.flatnonzero(s == 1).tolist())], [frozenset(np.flatnonzero(s == 2).tolist())])
        for s in states
        if s[2] != 2
    ]
    coded = set()
    for budget in range(10, 130, 6):
        fitting = [choice for choice in every if choice.kept_bytes + choice.working_bytes <= budget]
        found = choose([layers], budget)
        assert (found is None) == (not fitting)
        if found is not None:
            assert found.kept_bytes + found.working_bytes <= budget
            assert found.seconds == pytest.approx(min(choice.seconds for choice in fitting), rel=2e-3)
            coded.add(len(found.coded[0]))
    assert max(coded) > 1
    assert 0 in coded


@pytest.mark.slow  # some twenty integer programs
def test_a_budget_with_the_permission_takes_less_time() -> None:
    """A wide layer: its products are worth more than the time to encode them."""

    def missing(*_: Any) -> int:
        raise NoCompilerError("none for this test")

    config = dataclasses.replace(
        decoder.SIZES["tiny"],
        scan=True,
        num_layers=4,
        model_dim=2048,
        hidden_dim=8192,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        dtype="bfloat16",
    )
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    given = compax.capture(model, jax.ShapeDtypeStruct((16, 256), jnp.int32), loss=loss)
    regions = find_regions(given.graph(), given.meaning())
    exact, lossy = (
        Planner(given, given.graph(), regions, Target.parse("v5e"), 2, lossy=permitted) for permitted in (False, True)
    )
    room = exact.without.peak - exact.least.peak
    better = []
    for share in (0.02, 0.04, 0.08, 0.25):
        budget = round(exact.least.peak + share * room)
        plans = [planner.plan(budget) for planner in (exact, lossy)]
        assert all(plan is not None and plan.predicted.peak <= budget for plan in plans)
        one, other = (plan.choice for plan in plans if plan is not None)
        assert not one.approximates
        assert other.seconds <= one.seconds
        if other.approximates:
            better.append((budget, other.seconds < one.seconds))
    assert better
    assert all(less for _, less in better)
    result = Remat(budget=better[0][0], target="v5e", lossy="int8").run(given, Context(compiled_peak=missing))
    assert "compress" in result.decisions["marks"].values()
    assert "gradients are approximated" in result.notes[1]
