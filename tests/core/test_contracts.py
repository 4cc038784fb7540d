"""Contracts: what each allows, and what none does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax import contracts
from compax.contracts import Contract, Exact, Lossy, Observation, Tolerance
from compax.errors import ContractError

ONES = np.ones((2, 3), np.float32)
WIDE = Lossy("relative output error", bound=1e9)
ALL = [Exact(), Tolerance(0.5), WIDE]


def seen(compiled: bool = False, **leaves: Any) -> Observation:
    return Observation.of({name.replace("_", "."): leaf for name, leaf in leaves.items()}, compiled=compiled)


def fails(contract: Contract, before: Observation, after: Observation) -> str:
    with pytest.raises(ContractError) as caught:
        contract.check(before, after)
    return str(caught.value)


@pytest.mark.parametrize("contract", ALL)
def test_equal_observations_pass(contract: Contract) -> None:
    one = seen(output=ONES, state_count=np.int32(3), aux_loss=np.float32(1))
    assert contract.check(one, one)["relative output error"] == 0


@pytest.mark.parametrize("contract", ALL)
def test_structure_is_kept(contract: Contract) -> None:
    assert "'output.1' is no longer among" in fails(contract, seen(output_0=ONES, output_1=ONES), seen(output_0=ONES))
    assert "'output.1' is new" in fails(contract, seen(output_0=ONES), seen(output_0=ONES, output_1=ONES))
    assert "has shape [3, 2], before it had [2, 3]" in fails(contract, seen(output=ONES), seen(output=ONES.T))
    contract.check(seen(output=ONES), seen(output=ONES, aux_loss=np.float32(0)))


@pytest.mark.parametrize("contract", ALL)
def test_a_new_nan_fails_and_an_old_one_does_not(contract: Contract) -> None:
    nan = ONES.copy()
    nan[1, 2] = np.nan
    assert "1 NaN of 6 values" in fails(contract, seen(output=ONES), seen(output=nan))
    assert contract.check(seen(output=nan), seen(output=nan.copy()))["relative output error"] == 0


@pytest.mark.parametrize("contract", ALL)
def test_infinities_that_stay_are_no_difference(contract: Contract) -> None:
    masked = np.where(np.eye(3) > 0, 1.0, -np.inf).astype(np.float32)
    assert contract.check(seen(output=masked), seen(output=masked.copy()))["relative output error"] == 0


@pytest.mark.parametrize("contract", ALL)
def test_integer_state_keeps_its_value(contract: Contract) -> None:
    assert "'state.count'" in fails(contract, seen(state_count=np.uint32(3)), seen(state_count=np.uint32(4)))


@pytest.mark.parametrize("contract", ALL)
def test_random_keys_are_compared_as_data(contract: Contract) -> None:
    one, other = seen(state_key=jax.random.key(0)), seen(state_key=jax.random.key(1))
    contract.check(one, one)
    assert "'state.key'" in fails(contract, one, other)


def test_exact_means_bits() -> None:
    after = ONES.copy()
    after[0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert "differs in 1 of 6 values" in fails(Exact(), seen(output=ONES), seen(output=after))
    assert "differs in 6" in fails(Exact(), seen(output=0 * ONES), seen(output=-0.0 * ONES))
    assert "is float64, before it was float32" in fails(Exact(), seen(output=ONES), seen(output=ONES.astype(float)))


def test_exact_allows_a_compiler_its_rounding() -> None:
    after = ONES * np.float32(1 + 1e-6)
    Exact().check(seen(compiled=True, output=ONES), seen(compiled=True, output=after))
    assert "allows 2e-05" in fails(Exact(), seen(True, output=ONES), seen(True, output=ONES * np.float32(1.001)))


def test_narrow_floats() -> None:
    half = jnp.ones((4,), jnp.bfloat16)
    Exact().check(seen(output=half), seen(output=half))
    assert "differs" in fails(Exact(), seen(output=half), seen(output=half * 1.5))
    eighth = jnp.ones((4,), jnp.float8_e4m3fn)
    assert Tolerance(0.6).check(seen(output=eighth), seen(output=(half * 1.5).astype(eighth.dtype)))


def test_tolerance_is_relative_to_the_largest_value() -> None:
    before = np.array([100.0, 0.0], np.float32)
    Tolerance(1e-2).check(seen(output=before), seen(output=before + np.float32(0.9)))
    assert "differs by 0.011 of its largest value; the contract allows 0.01" in fails(
        Tolerance(1e-2), seen(output=before), seen(output=before + np.float32(1.1))
    )
    assert "allows 0" in fails(Tolerance(1.0), seen(output=np.arange(3)), seen(output=np.arange(3) + 1))


def test_lossy_measures_and_holds_to_the_bound() -> None:
    after = ONES * np.float32(1.1)
    measured = Lossy("relative output error", bound=0.2).check(seen(output=ONES), seen(output=after))
    assert measured == {"relative output error": pytest.approx(0.1, rel=1e-5)}
    message = fails(Lossy("relative output error", bound=0.05), seen(output=ONES), seen(output=after))
    assert message == "'output' has a relative output error of 0.1; the contract allows 0.05"


def test_lossy_lets_floats_change_their_dtype() -> None:
    WIDE.check(seen(output=ONES), seen(output=ONES.astype(np.float16)))
    assert "is int32" in fails(WIDE, seen(output=ONES), seen(output=ONES.astype(np.int32)))


def test_lossy_counts_integers_that_differ() -> None:
    before, after = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])
    contract = Lossy("relative output error", bound=0.3)
    contract.check(seen(output=before), seen(output=after))
    assert "share of different values of 0.5" in fails(contract, seen(output=before), seen(output=after[[0, 0, 2, 3]]))


def test_something_out_of_nothing_is_infinitely_far() -> None:
    assert "of inf" in fails(WIDE, seen(output=0 * ONES), seen(output=ONES))


def test_metrics_against_their_definitions() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 7, 5))
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    cosine = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
    assert contracts.relative_output_error(before, after) == pytest.approx(error)
    assert contracts.largest_relative_error(before, after) == np.abs(after - before).max() / np.abs(before).max()
    assert contracts.cosine_distance(before, after) == pytest.approx(1 - cosine)
    assert contracts.cosine_distance(before, 3 * before) == pytest.approx(0, abs=1e-12)
    assert contracts.relative_output_error(before * 1j, after * 1j) == pytest.approx(error)
    for metric in contracts.METRICS.values():
        assert metric(before[:0], after[:0]) == 0
        assert metric(0 * before, 0 * before) == 0


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="no metric 'perplexity'; there are: relative output error"):
        Lossy("perplexity", bound=1)


def test_the_loss_of_an_observation() -> None:
    assert seen(output=np.float32(2)).loss == 2
    assert seen(output_0=np.float32(2), output_1=ONES).loss == 2
    assert seen(output=ONES).loss is None
    assert seen(output=np.int32(2)).loss is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64"])
def test_tolerances_grow_as_formats_narrow(dtype: str) -> None:
    tolerance = contracts.rounding_tolerance(dtype)
    assert float(jnp.finfo(dtype).eps) <= tolerance < 0.5
    assert contracts.rounding_tolerance(jnp.int8) == 0
