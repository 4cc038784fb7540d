"""Rematerialization: by preset, by selector and under a budget."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compax
from compax import ir
from compax.analysis.buffers import tiled_bytes
from compax.errors import BudgetError, CaptureError, PipelineError, SelectorError
from compax.experiments.benchmarks import zoo
from compax.models import decoder
from compax.passes import Remat
from compax.passes.remat.planning import Planner
from compax.passes.remat.searching import search
from compax.passes.remat.solving import Item, Layers, choose, priced
from compax.rewrites.checkpoint import find_regions
from compax.target import Target
from compax.transform import Context
from oracle import assert_preserves

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()


def network(**options: Any) -> tuple[decoder.Decoder, jax.Array]:
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    return decoder.Decoder(config, rngs=nnx.Rngs(0)), decoder.example_inputs(config, sequence=16)[0]


def program(**options: Any) -> tuple[compax.Program, jax.Array]:
    model, tokens = network(**options)
    return compax.capture(model, tokens, loss=loss), tokens


def gradient(found: compax.Program, tokens: jax.Array) -> Any:
    return jax.grad(lambda params: found.apply(params, found.state, tokens)[0])


def products(found: compax.Program, tokens: jax.Array) -> int:
    graph = ir.import_jaxpr(jax.make_jaxpr(gradient(found, tokens))(found.params))
    return sum(op.name == "dot_general" for _, op in ir.walk(graph))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scan": True}, {"remat": True}, {"scan": True, "remat": True}], ids=str)
@pytest.mark.parametrize("keep", ["nothing", "dots"])
def test_it_computes_the_same(options: dict[str, Any], keep: Any) -> None:
    model, tokens = network(**options)
    assert_preserves(Remat(keep=keep), model, tokens)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_kept_is_not_computed_again(scan: bool) -> None:
    """Nine products a layer: three projections, scores, their use, the projection back, three of the feed-forward."""
    plain, tokens = program(scan=scan, num_layers=2)
    layers = 1 if scan else 2
    counts = {
        text: products(compax.Pipeline.parse(text)(plain, tokens), tokens) - products(plain, tokens)
        for text in ("remat()", "remat(keep=attention)", "remat(keep=dots)", 'remat(save="**")')
    }
    # The last product of a layer gives what goes into the next one: nobody reads it in the backward pass.
    assert counts["remat()"] == 8 * layers
    assert counts["remat(keep=attention)"] == 7 * layers
    assert counts["remat(keep=dots)"] == 2 * layers
    assert counts['remat(save="**")'] == 0


def test_layers_are_selected() -> None:
    plain, tokens = program(num_layers=3)
    found = compax.Pipeline.parse("remat(at=blocks.1)")(plain, tokens)
    assert products(found, tokens) - products(plain, tokens) == 8
    assert [site.name for site in found.history[-1].sites] == ["blocks.1"]


def test_everything_takes_rematerialization_out_of_a_model() -> None:
    plain, tokens = program(num_layers=2)
    held, _ = program(num_layers=2, remat=True)
    assert products(held, tokens) > products(plain, tokens)
    assert products(compax.Pipeline.parse("remat(keep=everything)")(held, tokens), tokens) == products(plain, tokens)


def test_new_shapes_are_rematerialized_too() -> None:
    plain, tokens = program(num_layers=2)
    found = compax.Pipeline.parse("remat(keep=dots)")(plain, tokens)
    longer = jnp.tile(tokens, (1, 2))
    assert products(found, longer) - products(plain, longer) == 4
    np.testing.assert_allclose(found(longer), plain(longer), rtol=1e-6)


def test_it_follows_other_passes() -> None:
    plain, tokens = program(num_layers=2, scan=True)
    found = compax.Pipeline.parse("cast(compute=bfloat16) | quantize(train=true) | remat(keep=dots)")(plain, tokens)
    before = compax.Pipeline.parse("cast(compute=bfloat16) | quantize(train=true)")(plain, tokens)
    np.testing.assert_array_equal(found(tokens), before(tokens))
    assert products(found, tokens) > products(before, tokens)


@foreign_warnings
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flax_gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("flax_bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("flax_whisper", [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)]),
        ("tunix_gemma3", [f"layers.{i}" for i in range(6)]),
        ("tunix_qwen3_experts", ["layers.0", "layers.1"]),
        ("flax_gptj", ["transformer.h.0", "transformer.h.1"]),
    ],
)
def test_layers_of_third_party_models(name: str, layers: list[str]) -> None:
    found = zoo.build(name).capture()
    assert [region.name for region in find_regions(found.graph(), found.meaning())] == layers


# -- The choice -------------------------------------------------------------------------------------------------------


def item(sources: tuple[int, ...], seconds: float, size: int, *, needed: bool = True) -> Item:
    return Item(sources, needed, keepable=True, seconds=seconds, kept_bytes=size, working_bytes=size)


def test_the_choice_is_the_best_of_all() -> None:
    """Against every subset of seven operations, in three layers."""
    items = (
        item((), 3.0, 5),
        item((0,), 1.0, 8, needed=False),
        item((1,), 6.0, 4),
        item((0, 2), 2.0, 7),
        item((3,), 0.5, 9),
        item((3, 4), 4.0, 3),
        item((5,), 2.5, 6),
    )
    layers = Layers(items, 3)
    subsets = [frozenset(i for i in range(7) if bits >> i & 1) for bits in range(128)]
    every = [priced([layers], [kept]) for kept in subsets]
    for budget in range(20, 140, 7):
        fitting = [choice for choice in every if choice.kept_bytes + choice.working_bytes <= budget]
        found = choose([layers], budget)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert found.kept_bytes + found.working_bytes <= budget
        assert found.seconds == pytest.approx(min(choice.seconds for choice in fitting), rel=2e-3)


def test_what_is_not_needed_is_not_computed_again() -> None:
    choice = priced([Layers((item((), 1.0, 1), item((), 5.0, 1, needed=False)), 1)], [frozenset()])
    assert (choice.seconds, choice.working_bytes) == (1.0, 1)


# -- Budgets ----------------------------------------------------------------------------------------------------------


def small() -> compax.Program:
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=True, num_layers=6)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    return compax.capture(model, jax.ShapeDtypeStruct((16, 64), jnp.int32), loss=loss)


@pytest.mark.slow
def test_a_budget_is_kept_by_what_the_compiler_says() -> None:
    """Between everything and nothing kept; with less room more is computed again."""
    kept = []
    for text in ("remat(budget=11000000, target=cpu)", "remat(budget=16000000, target=cpu)"):
        peaks: list[int] = []

        def measure(function: Any, shapes: Any, donated: Any, peaks: list[int] = peaks) -> int:
            memory = jax.jit(function, donate_argnums=donated).lower(*shapes).compile().memory_analysis()
            arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            peaks.append(arguments + memory.temp_size_in_bytes)
            return peaks[-1]

        (pass_,) = compax.Pipeline.parse(text).passes
        result = pass_.run(small(), Context(compiled_peak=measure))
        assert 1 <= len(peaks) <= 3
        assert isinstance(pass_, Remat)
        assert pass_.budget is not None
        assert min(peaks) <= pass_.budget
        assert "compiled" in result.notes[0]
        kept.append(len(result.decisions["marks"]))
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    ("share", "peaks", "chosen"),
    [
        (0.7, [0.99], 0),  # close to the budget
        (0.7, [0.9, 0.999], 1),  # room left: more is kept
        (0.7, [0.5, 1.1, 0.6], 2),
        (0.7, [1.3, 0.999], 1),
        (0.7, [1.3, 1.1, 0.9], 2),
        (0.7, [1.3, 1.2, 1.1, 0.9], 3),  # what keeps nothing is asked for last
        (0.9, [0.999, 1.2], 0),  # keeping everything is near, and too much
        (0.9, [0.999, 0.8], 1),  # the compiler does better where nothing is computed again
    ],
)
def test_the_search_is_led_by_what_the_compiler_says(share: float, peaks: list[float], chosen: int) -> None:
    given = small()
    graph, meaning = given.graph(), given.meaning()
    planner = Planner(given, graph, find_regions(graph, meaning), Target.parse("v5e"), 2)
    budget = planner.least.peak + round(share * (planner.without.peak - planner.least.peak))
    answers = iter(peaks)
    found = search(planner, budget, lambda *_: round(next(answers) * budget), meaning)
    plans = [plan for plan, _ in found.compiled]
    assert [peak for _, peak in found.compiled] == [round(peak * budget) for peak in peaks]
    assert found.plan is plans[chosen]
    predicted = [plan.predicted.peak for plan in plans]
    for before, after, peak in zip(predicted, predicted[1:], peaks, strict=False):
        assert (after > before) == (peak < 1)


def product_of_gates(graph: ir.Graph) -> ir.Path:
    """Where a feed-forward network multiplies by its gate: a product alone reads the result."""
    hidden = decoder.SIZES["tiny"].hidden_dim
    return [path for path, op in ir.walk(graph) if op.name == "mul" and op.outputs[0].shape[-1:] == (hidden,)][-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_products_alone_read_takes_two_bytes_an_element_on_a_tpu(dtype: str) -> None:
    given, _ = program(dtype=dtype, scan=True)
    graph = given.graph()
    planner = Planner(given, graph, find_regions(graph, given.meaning()), Target.parse("v5e"), 2)
    (group,) = planner.groups
    (index,) = (i for i, path in enumerate(group.paths[0]) if path == product_of_gates(graph.graph))
    (y,) = ir.resolve(graph.graph, group.paths[0][index]).outputs
    assert y.dtype == dtype
    assert group.layers.items[index].kept_bytes == tiled_bytes(y) * 2 // y.dtype.itemsize


@pytest.mark.slow  # some twenty integer programs
def test_no_budget_gives_up_for_want_of_steps() -> None:
    """Where the head makes the peak, keeping a little less in layers changes nothing at first."""
    config = dataclasses.replace(decoder.SIZES["smollm2-135m"], num_layers=4, dtype="bfloat16")
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    given = compax.capture(model, jax.ShapeDtypeStruct((8, 512), jnp.int32), loss=loss)
    planner = Planner(given, given.graph(), find_regions(given.graph(), given.meaning()), Target.parse("v5e"), 2)
    least, room = planner.least.peak, planner.without.peak - planner.least.peak
    plans = [planner.plan(round(least + share * room)) for share in (0.15, 0.5, 0.8, 0.9, 0.95)]
    seconds = [plan.choice.seconds for plan in plans if plan is not None]
    assert len(seconds) == 5
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[1] < planner.nothing.seconds / 3


def test_what_fits_anyway_is_left_alone() -> None:
    result = Remat(budget=10**9, target="cpu").run(small(), Context())
    assert not result.changed


def test_a_budget_that_cannot_be_met_says_what_holds_it_up() -> None:
    with pytest.raises(BudgetError, match=r"cannot be met: with nothing kept .* needs .* optimizer .* temporaries"):
        Remat(budget=100_000, target="v5e").run(small(), Context())


def test_without_a_compiler_for_the_target_it_says_so() -> None:
    result = Remat(budget=8_000_000, target="h100").run(small(), Context())
    assert "not compiled: there is no gpu here" in result.notes[0]


def test_a_budget_needs_a_loss() -> None:
    model, tokens = network()
    with pytest.raises(CaptureError, match="loss=function"):
        Remat(budget=10**6, target="cpu").run(compax.capture(model, tokens), Context())


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(PipelineError, match="leave out keep"):
        Remat(budget=10**6, keep="dots")
    with pytest.raises(PipelineError, match="optimizer=-1"):
        Remat(optimizer=-1)


def test_what_has_no_layers_or_selects_nothing_is_refused() -> None:
    flat = compax.capture(lambda p, x: jnp.tanh(x @ p), jnp.ones((4, 4)), jnp.ones((2, 4)))
    with pytest.raises(SelectorError, match="no residual stream"):
        Remat().run(flat, Context())
    found, _ = program()
    with pytest.raises(SelectorError, match=r"blocks\.0"):
        Remat(at="block.0").run(found, Context())
    with pytest.raises(SelectorError, match="selects no result"):
        Remat(save="nothing.here").run(found, Context())
