"""Metrics against closed forms, definitions and published figures."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax import metrics
from compax.chips import CHIPS
from compax.errors import MetricError

RNG = np.random.default_rng(0)
LOGITS = TEACHER, STUDENT = RNG.normal(size=(2, 3, 5, 7)).astype(np.float32) * 3


def test_energy_carbon_and_money_of_an_hour() -> None:
    kwh = metrics.energy_kwh(3600, 700, chips=8)
    assert kwh == pytest.approx(1.1 * 5.6)
    assert metrics.energy_kwh(3600, 700, chips=8, pue=1) == pytest.approx(5.6)
    assert metrics.carbon_kg(10, 0.5) == pytest.approx(5)
    assert metrics.carbon_kg(10, "europe-west4") == pytest.approx(2.0881)
    assert metrics.carbon_kg(10, "home", {"home": 0.1}) == pytest.approx(1)
    assert metrics.money(1800, 8, 2.5) == pytest.approx(10)
    assert metrics.money_per_parameter(100, 50) == 2


def test_carbon_intensities_are_kilograms_per_kilowatt_hour() -> None:
    assert all(0 < intensity < 1.2 for intensity in metrics.GRID_INTENSITY.values())


def test_an_unknown_region_names_the_closest() -> None:
    with pytest.raises(MetricError, match="did you mean us-central1"):
        metrics.carbon_kg(1, "us-central")
    with pytest.raises(MetricError, match=r"known: here\. A number"):
        metrics.carbon_kg(1, "moon", {"here": 0.1})


def test_rates_and_ratios() -> None:
    assert metrics.tokens_per_second(1000, 4) == 250
    assert metrics.speed_up(6, 2) == 3
    assert metrics.compression_ratio(400, 100) == 4
    # PaLM 540B in the paper: 6144 TPU v4, 238.3e3 tokens/s, 46.2 % of model FLOPs (attention included).
    parameters, layers, heads, head_size, length = 540.35e9, 118, 48, 256, 2048
    flops = 238.3e3 * (6 * parameters + 12 * layers * heads * head_size * length)
    assert metrics.mfu(flops, 1, CHIPS["v4"].flops["bfloat16"], 6144) == pytest.approx(0.462, abs=0.003)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.energy_kwh(-1, 1), "seconds is -1"),
        (lambda: metrics.energy_kwh(1, math.nan), "watts is nan"),
        (lambda: metrics.energy_kwh(1, 1, pue=0.9), "effectiveness of 0.9"),
        (lambda: metrics.carbon_kg(1, -0.1), "intensity is -0.1"),
        (lambda: metrics.money(math.inf, 1, 1), "seconds is inf"),
        (lambda: metrics.money_per_parameter(1, 0), "num_parameters is 0"),
        (lambda: metrics.tokens_per_second(1, 0), "seconds is 0; it divides"),
        (lambda: metrics.mfu(1, 1, 0), "peak_flops_per_second is 0"),
        (lambda: metrics.speed_up(1, 0), "seconds is 0"),
        (lambda: metrics.compression_ratio(1, 0), "compressed_bytes is 0"),
    ],
)
def test_figures_that_make_no_sense_are_errors(call: object, says: str) -> None:
    with pytest.raises(MetricError, match=says):
        call()


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


def test_loyalties_are_what_float64_says_by_way_of_entropies() -> None:
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in LOGITS)
    bits = (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / math.log(2)
    assert metrics.probability_loyalty(TEACHER, STUDENT) == pytest.approx((1 - np.sqrt(bits)).mean(), abs=1e-5)
    assert metrics.kl(TEACHER, STUDENT) == pytest.approx((-(p * np.log(q)).sum(-1) - entropy(p)).mean(), rel=1e-5)
    assert metrics.label_loyalty(TEACHER, STUDENT) == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_loyalty_to_oneself_is_whole() -> None:
    assert metrics.label_loyalty(TEACHER, TEACHER) == 1
    assert metrics.probability_loyalty(TEACHER, TEACHER) == pytest.approx(1, abs=1e-3)
    assert metrics.kl(TEACHER, TEACHER) == pytest.approx(0, abs=1e-6)


def test_disjoint_distributions_and_labels_that_are_ruled_out() -> None:
    one, other = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
    assert metrics.probability_loyalty(one, other) == pytest.approx(0)
    assert metrics.kl(one, other) == math.inf
    masked = jnp.array([[1.0, 2.0, -jnp.inf]])
    assert metrics.kl(masked, masked) == 0
    assert metrics.probability_loyalty(masked, masked) == pytest.approx(1, abs=1e-3)
    assert metrics.kl(masked, jnp.array([[1.0, 2.0, -30.0]])) == pytest.approx(0, abs=1e-6)


def test_half_precision_is_computed_in_float32_and_under_jit() -> None:
    logits = jnp.array([[0.0, 30000.0, 1.0]], jnp.float16)
    assert jax.jit(metrics.kl)(logits, logits) == 0
    assert jax.jit(metrics.probability_loyalty)(logits, logits).dtype == jnp.float32


@pytest.mark.parametrize("metric", [metrics.label_loyalty, metrics.probability_loyalty, metrics.kl])
def test_logits_of_two_shapes_are_an_error(metric: object) -> None:
    with pytest.raises(MetricError, match=r"\(2, 3\) and \(1, 3\)"):
        metric(jnp.zeros((2, 3)), jnp.zeros((1, 3)))
    with pytest.raises(MetricError, match="not empty"):
        metric(jnp.zeros((0, 3)), jnp.zeros((0, 3)))


def test_accuracy_after_a_perturbation() -> None:
    inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    labels = jnp.array([0, 1, 0, 0])

    def attack(inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return inputs - 1.5 * jax.nn.one_hot(labels, 2)

    assert metrics.accuracy_after(lambda inputs, _: inputs, lambda x: x, inputs, labels) == 0.75
    assert metrics.accuracy_after(attack, lambda x: x, inputs, labels) == 0.25
    with pytest.raises(MetricError, match="do not fit"):
        metrics.accuracy_after(attack, lambda x: x[:2], inputs, labels)


def test_the_pareto_set_of_a_few_points() -> None:
    points = [(1, 9), (2, 8), (2, 7), (3, 10), (1, 9), (4, 4)]  # seconds, accuracy
    assert metrics.pareto_set(points, ["min", "max"]) == (0, 3, 4)
    assert metrics.pareto_set(points, ["max", "min"]) == (5,)
    assert metrics.pareto_set([], ["min"]) == ()


POINTS = st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=8)


@hypothesis.given(points=POINTS, directions=st.tuples(*[st.sampled_from(["min", "max"])] * 3))
def test_the_pareto_set_is_what_its_definition_says(points: list, directions: tuple) -> None:
    def dominates(a: tuple, b: tuple) -> bool:
        signed = [(x - y) * (1 if way == "max" else -1) for x, y, way in zip(a, b, directions, strict=True)]
        return min(signed) >= 0 and max(signed) > 0

    expected = [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert list(metrics.pareto_set(points, directions)) == expected


@hypothesis.given(points=st.lists(st.tuples(st.integers(-2, 7), st.integers(-2, 7)), max_size=6))
def test_hypervolume_counts_the_cells_that_are_dominated(points: list) -> None:
    def cells(better: object) -> int:
        grid = itertools.product(range(-2, 5), range(-2, 5))
        return sum(any(better(point, cell) for point in points) for cell in grid)

    low = cells(lambda point, cell: point[0] <= cell[0] and point[1] <= cell[1])
    assert metrics.hypervolume(points, (5, 5), ["min", "min"]) == low
    mirrored = [(-x, y) for x, y in points]
    assert metrics.hypervolume(mirrored, (-5, 5), ["max", "min"]) == low


@pytest.mark.parametrize(
    ("points", "directions", "says"),
    [
        ([(1, 2, 3)], ["min", "min"], r"point \[1, 2, 3\]"),
        ([(1, math.nan)], ["min", "max"], "point .*nan"),
        ([(1, 2)], ["min", "up"], "'up' is neither min nor max"),
    ],
)
def test_points_that_do_not_fit(points: list, directions: list, says: str) -> None:
    with pytest.raises(MetricError, match=says):
        metrics.pareto_set(points, directions)
    with pytest.raises(MetricError, match=says):
        metrics.hypervolume(points, (5, 5), directions)


def test_hypervolume_is_of_two_objectives() -> None:
    with pytest.raises(MetricError, match="3 objective"):
        metrics.hypervolume([(1, 2, 3)], (5, 5, 5), ["min"] * 3)


def test_latency_of_requests() -> None:
    found = metrics.latency([(0.0, [1.0, 1.5, 2.0]), (1.0, [4.0]), (2.0, [4.0, 5.0])])
    assert found.ttft == metrics.Spread(2.0, 2.0, pytest.approx(2.98))
    assert found.tpot == metrics.Spread(0.75, 0.75, pytest.approx(0.995))
    assert found.total == metrics.Spread(pytest.approx(8 / 3), 3.0, 3.0)
    assert metrics.latency([(0.0, [1.0])]).tpot is None


@pytest.mark.parametrize(
    ("requests", "says"),
    [([], "no values"), ([(0.0, [])], "request 0"), ([(0.0, [1.0]), (0.0, [2.0, 1.0])], "request 1")],
)
def test_requests_without_latency(requests: list, says: str) -> None:
    with pytest.raises(MetricError, match=says):
        metrics.latency(requests)
