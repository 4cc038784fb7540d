"""The price of passes: figures before and after against counts by hand, and why a figure is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import compax
from compax import Pipeline
from compax.analysis.exchange import exchanged
from compax.errors import SignatureError, TargetError
from compax.instruments import Journal
from compax.placement import Placement
from compax.price import PREDICTED, Price, price_pairs, price_rows, priced
from compax.target import Target
from compax.transform import PassRecord
from small import TOKENS, program_of

B, D, F = 8, 16, 32


class Layers(nnx.Module):
    """Two matrices, [D, F] and [F, D]."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def square(model: Layers, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


@pytest.fixture
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)


@pytest.fixture
def trained(x: jax.Array) -> compax.Program:
    return compax.capture(Layers(), x, loss=square)


def only(program: compax.Program) -> PassRecord:
    (record,) = program.history
    return record


def test_figures_of_a_train_step(trained: compax.Program) -> None:
    target = Target.parse("v5e:2x2")
    found = priced(trained, target)
    assert found.missing == {}
    assert set(found.figures) == set(PREDICTED)
    products = 2 * 2 * B * D * F
    assert products < found.figures["forward_flops"] < 1.2 * products
    # Backward twice the products, but for the gradient of the input, which nobody needs.
    step = trained.cost().product_flops
    assert step == products
    assert found.figures["step_flops"] > 2.5 * products
    # In tiles of 8 x 128.
    parameters = (D + F) * 128 * 4
    assert 3 * parameters < found.figures["peak_bytes"] < 6 * parameters
    assert found.figures["forward_seconds"] == pytest.approx(trained.cost(target).time.seconds)  # type: ignore[union-attr]
    assert found.figures["step_seconds"] > found.figures["forward_seconds"]
    assert found.figures["collective_bytes"] == found.figures["collective_seconds"] == 0


def test_what_is_missing_says_why() -> None:
    found = priced(program_of())
    assert "no target" in found.missing["forward_seconds"]
    assert "returns no loss" in found.missing["step_flops"]
    assert found.figures["peak_bytes"] > 0
    assert set(found.figures) | set(found.missing) == set(PREDICTED)
    with pytest.raises(SignatureError):
        priced(program_of(), entry="other")
    with pytest.raises(TargetError):
        Price("v9z:2x2")


def test_freezing_saves_gradients_though_no_graph_changes(trained: compax.Program) -> None:
    record = only(Pipeline.parse("freeze(at=up.kernel)", [Price()])(trained))
    pairs = price_pairs(record)
    assert pairs["step_flops"][1] < pairs["step_flops"][0]  # type: ignore[operator]
    assert pairs["peak_bytes"][1] < pairs["peak_bytes"][0]  # type: ignore[operator]
    assert pairs["forward_flops"][0] == pairs["forward_flops"][1]


def test_history_has_pairs_with_units_and_loyalty_to_the_first_program() -> None:
    program = program_of(mode="eval")
    journal = Journal()
    passes = "quantize(weights=int8) | cast(compute=bfloat16)"
    after = Pipeline.parse(passes, [Price("v5e:2x2"), journal])(program, TOKENS)
    first, second = after.history
    assert first.metrics["probability_loyalty"][0] == 1.0
    assert first.metrics["probability_loyalty"][1] < 1.0
    assert second.metrics["probability_loyalty"][0] == pytest.approx(first.metrics["probability_loyalty"][1])
    for name in ("forward_flops", "peak_bytes", "forward_seconds"):
        assert second.metrics[name][0] == first.metrics[name][1]
    assert first.metrics["forward_flops"][0] == program.cost("v5e:2x2").flops
    text = str(first)
    assert "kFLOPs -> " in text
    assert " us" in text
    assert "no work of a train step" in text
    assert "returns no loss" in text
    assert len(journal.records) == 2


def test_the_loss_is_compared_where_there_are_no_logits(trained: compax.Program, x: jax.Array) -> None:
    record = only(Pipeline.parse("quantize(weights=int8)", [Price()])(trained, x, check=False))
    before, after = record.metrics["loss"]
    assert before == pytest.approx(float(trained(x)), rel=1e-5)
    assert after == pytest.approx(before, rel=0.05)
    assert "label_loyalty" not in record.metrics


def test_without_inputs_there_is_no_fidelity_and_a_note(trained: compax.Program) -> None:
    record = only(Pipeline.parse("cast(compute=bfloat16)", [Price()])(trained))
    assert "no fidelity: no sample inputs were given" in record.notes


def test_donated_arrays_are_priced_before_they_go() -> None:
    program = program_of(mode="eval")
    record = only(Pipeline.parse("quantize(weights=int8)", [Price()])(program, TOKENS, donate=True))
    assert record.metrics["label_loyalty"][0] == 1.0


def test_rows_of_a_table_have_units_and_say_where_they_are_from(trained: compax.Program, x: jax.Array) -> None:
    record = only(Pipeline.parse("quantize(weights=int8)", [Price()])(trained, x))
    rows = {row[0]: row[1:] for row in price_rows(price_pairs(record))}
    assert rows["parameters"] == ("1,024", "1,024", "none", "predicted")
    assert rows["parameters as stored"][0] == "4.1 kB"
    assert rows["loss"][-1] == "measured"
    ((_, before, after, change, _),) = price_rows({"peak_bytes": (1000, None)})
    assert (before, after, change) == ("1.0 kB", "?", "unknown")


# -- Collectives ------------------------------------------------------------------------------------------------------


def over(program: compax.Program, **placement: object) -> compax.Program:
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    return program.replace(placement=Placement(mesh=mesh, batch=("data",), **placement))  # type: ignore[arg-type]


SPLIT = {"up.kernel": PartitionSpec("data"), "down.kernel": PartitionSpec("data")}
ALL = 2 * D * F * 4


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ({}, ALL),
        ({"specs": SPLIT}, 3 * ALL),
        ({"optimizer": SPLIT}, 2 * ALL),
        ({"optimizer": SPLIT, "gradients": SPLIT}, 2 * ALL),
        ({"specs": {"up.kernel": SPLIT["up.kernel"]}}, 3 * ALL // 2 + ALL // 2),
    ],
    ids=["data parallel", "parameters split", "optimizer split", "gradients split", "one split"],
)
def test_collectives_of_a_placement(trained: compax.Program, placement: dict[str, object], expected: int) -> None:
    found = priced(over(trained, **placement), Target.parse("v5e:2x2"))
    assert found.figures["collective_bytes"] == expected
    assert found.figures["collective_seconds"] > 0
    assert "compax plan" in found.missing["peak_bytes"]
    assert found.figures["step_seconds"] == pytest.approx(
        priced(trained, Target.parse("v5e:2x2")).figures["step_seconds"] / 4
    )


def test_a_pass_that_shards_is_priced(trained: compax.Program) -> None:
    record = only(Pipeline.parse("shard(data=4)", [Price("v5e:2x2")])(trained))
    assert record.metrics["collective_bytes"][0] == 0
    assert record.metrics["collective_bytes"][1] > 0
    assert record.metrics["step_seconds"][1] < record.metrics["step_seconds"][0]
    assert record.metrics["peak_bytes"][1] is None
    assert any(note.startswith("no memory at the peak: values are split over 4 devices") for note in record.notes)


def test_kinds_of_collectives() -> None:
    specs = {"a": PartitionSpec("data"), "b": PartitionSpec(None, "model")}
    mesh = {"data": 4, "model": 2}
    found = exchanged({"a": 100, "b": 400}, specs, ("data",), mesh, parts=3)
    assert found == {"all-gather": 2 * 3 * 400, "reduce-scatter": 3 * 400, "all-reduce": 3 * 400}
    assert exchanged({"a": 100}, {}, (), mesh) == {}
