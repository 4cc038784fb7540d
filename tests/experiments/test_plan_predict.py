"""What the graph of a step says before it is compiled: against counts by hand, and where it says nothing."""

import dataclasses
import json

import pytest

from compax.experiments import plan_predict, programs, shardings
from compax.experiments.plan_build import Facts
from compax.experiments.plan_page import page
from compax.experiments.plan_predict import Held, Prediction, predict
from compax.experiments.plan_text import exchange_note, held_rows, memory_rows, notes
from compax.target import Target
from plans import FACTS, GB, report, short

# One layer of D 16, F 24, 4 heads of 4 over 2 of keys and values, V 260; products of weights, and of attention.
TOKENS, D, F, V = 16, 16, 24, 260
LAYER = 2 * (2 * D * 16 + 2 * D * 8 + 3 * D * F)
FORWARD = TOKENS * (LAYER + 2 * D * V + 2 * 2 * TOKENS * 16)


def predicted(config, axes, target="cpu") -> Prediction:
    program = programs.build_program(config, config.tokenizer.vocabulary, abstract=True)
    return predict(config, program, shardings.step_specs(config, program, axes), axes, Target.parse(target))


@pytest.fixture
def one(make) -> Prediction:
    return predicted(make(model__overrides__num_kv_heads=2), {"data": 4})


def test_products_of_one_device_by_phase(one):
    # Each of four devices reads one of the four sequences.
    assert one.product_flops == {"forward": FORWARD, "backward": 2 * FORWARD}
    assert one.flops == 3 * FORWARD
    assert one.update_flops == 0


def test_more_devices_compute_less_each_and_keep_less(make, one):
    whole = predicted(make(model__overrides__num_kv_heads=2), {"data": 1})
    assert whole.flops == 4 * one.flops
    assert whole.activations is not None
    assert one.activations is not None
    assert 2 * one.activations < whole.activations < 5 * one.activations


def test_memory_over_the_step(one):
    assert one.missing == ""
    assert one.peak == max(one.timeline)
    assert len(one.phases) == len(one.timeline) <= 240
    assert one.phases.index("forward") < one.phases.index("backward")
    assert {"forward", "backward", "update"} == set(one.phases)
    assert sum(held.bytes for held in one.held) == one.temporaries
    assert one.kept("forward", "recompute", "backward", "update") == one.temporaries


def test_long_steps_keep_their_peak():
    timeline = [0] * 1000
    timeline[777] = 5
    chosen = plan_predict._chosen(timeline)
    assert len(chosen) <= 240
    assert max(timeline[index] for index in chosen) == 5
    assert chosen == sorted(chosen)


def test_micro_batches_are_added_up(make):
    plain = predicted(make(data__batch_size=4), {"data": 2})
    parts = predicted(make(data__batch_size=8, optimizer__accumulation=2), {"data": 2})
    assert parts.flops == 2 * plain.flops
    assert plain.seconds < parts.seconds < 2 * plain.seconds
    assert plain.traffic < parts.traffic < 2 * plain.traffic
    # The sums of gradients lie beside.
    assert parts.peak is not None
    assert plain.peak is not None
    assert parts.peak > plain.peak


def test_recomputation_is_a_phase_and_keeps_less(make):
    layers = {"model__overrides__num_layers": 3, "model__overrides__scan": True, "data__sequence_length": 64}
    plain = predicted(make(**layers), {"data": 1})
    remat = predicted(make(**layers, model__overrides__remat=True), {"data": 1})
    assert "recompute" not in plain.product_flops
    assert 0 < remat.product_flops["recompute"] <= remat.product_flops["forward"]
    assert remat.activations is not None
    assert plain.activations is not None
    assert remat.activations < plain.activations


def test_the_optimizers_products_are_of_every_device(make):
    few = predicted(make(optimizer__name="muon"), {"data": 2})
    many = predicted(make(optimizer__name="muon"), {"data": 4})
    assert few.update_flops == few.product_flops["update"] == many.update_flops > 0
    assert few.product_flops["forward"] == 2 * many.product_flops["forward"]


def test_an_optimizer_that_is_split_does_its_share(make):
    whole = predicted(make(optimizer__name="muon"), {"data": 4})
    split = predicted(make(optimizer__name="muon", sharding__optimizer="('blocks.**.kernel: data',)"), {"data": 4})
    assert whole.update_flops / 4 < split.update_flops < whole.update_flops


def test_split_parameters_leave_memory_to_the_compiler(make):
    axes = {"data": 2, "model": 2}
    whole = predicted(make(), {"data": 1})
    found = predicted(make(sharding__params="('blocks.**.up.kernel: -,model',)"), axes)
    assert found.share == "an even share of 4 devices"
    assert found.flops == whole.flops // 4
    assert "parameters are split over the mesh, such as blocks.0.mlp.up.kernel" in found.missing
    assert (found.peak, found.temporaries, found.activations, found.timeline) == (None, None, None, ())


def test_an_axis_of_one_device_splits_nothing(make):
    found = predicted(make(sharding__params="('blocks.**.up.kernel: -,model',)"), {"data": 4, "model": 1})
    assert found.missing == ""


def test_a_program_laid_over_a_mesh_is_seen_from_one_device(make):
    config = make(pipeline="shard(data=4)")
    program = programs.build_program(config, 260, abstract=True, target=Target.parse("v5e:2x2"))
    specs = shardings.step_specs(config, program, {"data": 4})
    found = predict(config, program, specs, {"data": 4}, Target.parse("v5e:2x2"))
    assert found.missing == ""
    assert found.flops == predicted(make(), {"data": 4}).flops


def test_json_and_back(one):
    facts = dataclasses.replace(FACTS, prediction=one)
    assert Facts.from_json(json.loads(json.dumps(dataclasses.asdict(facts)))).prediction == dataclasses.replace(
        one, timeline=list(one.timeline), phases=list(one.phases), held=one.held
    )


# -- What is shown ----------------------------------------------------------------------------------------------------

SHOWN = Prediction(
    share="its part",
    product_flops={"forward": 4 * 10**12, "backward": 8 * 10**12},
    update_flops=0,
    traffic=70 * GB,
    seconds=0.1,
    peak=15 * GB,
    temporaries=3 * GB,
    activations=2 * GB,
    timeline=(12 * GB, 14 * GB, 15 * GB, 12 * GB),
    phases=("forward", "forward", "backward", "update"),
    held=(Held("blocks.*.mlp", "forward", "bfloat16[16,8192]", 12, 2 * GB), Held("", "backward", "a turn", 1, GB)),
)


def shown(found, prediction=SHOWN):
    return dataclasses.replace(found, facts=dataclasses.replace(FACTS, prediction=prediction))


def test_predicted_stands_beside_compiled():
    rows = {row[0].strip(): row[1:] for row in memory_rows(shown(report()))}
    assert rows["temporaries together"] == ("3.0 GB", "3.0 GB")
    assert rows["peak"] == ("15.0 GB", "15.0 GB")
    assert rows["activations, most of the forward pass"] == ("2.0 GB", "")
    assert held_rows(shown(report()))[1] == ("1.0 GB", "1", "of no site", "backward", "a turn")


def test_a_page_shows_memory_over_the_step_also_of_what_does_not_fit():
    for found, line in ((report(), "compiler's peak 15.0 GB (compiled)"), (short(18.9), "needed 18.9 GB (compiled)")):
        text = page([shown(found)])
        assert "Memory over the step (predicted)" in text
        assert line.replace("'", "&#x27;") in text
        assert "backward: 15.0 GB" in text
        assert "blocks.*.mlp" in text


def test_a_page_says_why_memory_is_not_predicted():
    text = page([shown(report(), dataclasses.replace(SHOWN, timeline=(), phases=(), missing="parameters are split"))])
    assert "Not predicted: parameters are split." in text


def test_products_of_the_optimizer_are_noted_and_are_no_failure_of_sharding():
    # A device computes 12.3 T of the model; 40 T of an update make more than three times that.
    heavy = dataclasses.replace(SHOWN, update_flops=40 * 10**12)
    (note,) = notes(shown(report(flops={"float32": 53 * 10**12}), heavy))
    assert "the optimizer's update has 40.0 TFLOPs of products, 3.3 times" in note
    assert any("times its share" in note for note in notes(shown(report(flops={"float32": 153 * 10**12}), heavy)))


def test_prices_of_passes_say_which_collectives_they_leave_out():
    def priced(*pair):
        passes = ({"pass": "freeze()", "figures": {"collective_bytes": pair}, "notes": []},)
        return dataclasses.replace(report(), facts=dataclasses.replace(FACTS, passes=passes))

    assert "no pass lays the program over the mesh" in (exchange_note(priced(0, 0)) or "")
    assert "no pass lays the program over the mesh" in page([priced(0, 0)])
    assert exchange_note(priced(0, GB)) is None
    assert exchange_note(priced(None, GB)) is None
    assert exchange_note(report()) is None
