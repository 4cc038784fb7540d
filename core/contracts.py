"""Numerics contracts: by how much a pass may change what a program computes.

A contract compares two observations of one program, before and after a pass, on equal inputs and equal explicit state.
Whatever the contract: outputs keep their structure and shapes, integers in the state (random number counters, cache
positions) keep their values, and a NaN where there was none is a failure.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from compax.errors import ContractError

_ROUNDING = {
    "float64": 1e-11,
    "float32": 2e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "complex64": 2e-5,
    "complex128": 1e-11,
}


def rounding_tolerance(dtype: Any) -> float:
    """What a compiler's own freedom (fusion, order of sums) may change, relative to the largest value.

    The one table of tolerances by dtype; formats narrower than 16 bits get what their spacing is.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return _ROUNDING.get(dtype.name) or float(jnp.finfo(dtype).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What a program returned for some inputs.

    Attributes:
        leaves: arrays by name: `output...`, `state...` (after the call), `argument...` (objects updated in place) and
            `aux...` (values that first appear in the call).
        compiled: whether it was computed under `jax.jit`, where XLA chooses fusions, or operation by operation.
    """

    leaves: Mapping[str, np.ndarray]
    compiled: bool

    @classmethod
    def of(cls, leaves: Mapping[str, Any], *, compiled: bool) -> "Observation":
        """An observation of arrays by name; random keys are seen as their data."""
        return cls({name: _as_numpy(leaf) for name, leaf in leaves.items()}, compiled)

    @property
    def loss(self) -> float | None:
        """The output that is a floating scalar, or the first of several outputs, if it is one."""
        first = next((leaf for name, leaf in self.leaves.items() if name.startswith("output")), None)
        return float(first) if first is not None and first.shape == () and _inexact(first) else None

    @property
    def has_nan(self) -> bool:
        """Whether any value is NaN."""
        return any(_nan(leaf).any() for leaf in self.leaves.values())


def _as_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _inexact(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _nan(array: np.ndarray) -> np.ndarray:
    return np.isnan(_wide(array)) if _inexact(array) else np.zeros(array.shape, bool)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float64)


def _difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Absolute differences; nothing where both are the same infinity or both are NaN."""
    before, after = _wide(before), _wide(after)
    with np.errstate(invalid="ignore"):
        difference = np.abs(after - before)
    return np.where((before == after) | (np.isnan(before) & np.isnan(after)), 0.0, difference)


def _same_bits(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype hold the same bits; every NaN counts as the same."""
    views = [np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.dtype.itemsize) for x in (before, after)]
    return (views[0] == views[1]).all(axis=-1) | (_nan(before) & _nan(after))


def relative_output_error(before: np.ndarray, after: np.ndarray) -> float:
    """Norm of the difference over the norm of the values before."""
    return _ratio(float(np.linalg.norm(_difference(before, after))), _norm(before))


def largest_relative_error(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference over the largest value before."""
    return _ratio(float(_difference(before, after).max(initial=0.0)), _largest(before))


def cosine_distance(before: np.ndarray, after: np.ndarray) -> float:
    """One minus the cosine of the angle between the values before and after."""
    one, other = _finite(before).ravel(), _finite(after).ravel()
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    if norms == 0:
        return 0.0 if np.array_equal(one, other) else 1.0
    return max(0.0, 1.0 - float(np.vdot(one, other).real) / norms)


def _finite(array: np.ndarray) -> np.ndarray:
    wide = _wide(array)
    return np.where(np.isfinite(wide), wide, 0.0)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(_finite(array)))


def _largest(array: np.ndarray) -> float:
    return float(np.abs(_finite(array)).max(initial=0.0))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else float("inf")


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "relative output error": relative_output_error,
    "largest relative error": largest_relative_error,
    "cosine distance": cosine_distance,
}
"""What a lossy contract may be stated in."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """Base of all contracts."""

    operation_by_operation: ClassVar[bool] = False
    """Whether programs are evaluated operation by operation to check it, instead of compiled."""

    def check(self, before: Observation, after: Observation) -> dict[str, float]:
        """Compares two observations.

        Returns:
            What was measured, by name: for every contract `relative output error`, the largest over all leaves.

        Raises:
            ContractError: the pass changed more than the contract allows; names the leaf and the figures.
        """
        if missing := sorted(before.leaves.keys() - after.leaves.keys()):
            raise ContractError(f"'{missing[0]}' is no longer among the results ({len(missing)} missing)")
        extra = sorted(name for name in after.leaves.keys() - before.leaves.keys() if not name.startswith("aux"))
        if extra:
            raise ContractError(f"'{extra[0]}' is new among the results ({len(extra)} more than before)")
        measured = {"relative output error": 0.0}
        for name, one, other in _pairs(before, after):
            if one.shape != other.shape:
                raise ContractError(f"'{name}' has shape {list(other.shape)}, before it had {list(one.shape)}")
            self._check_dtype(name, one, other)
            appeared = _nan(other) & ~_nan(one)
            if appeared.any():
                raise ContractError(
                    f"'{name}' has {int(appeared.sum())} NaN of {appeared.size} values where there was none"
                )
            if name.startswith("state") and not _inexact(one):
                if not np.array_equal(one, other):
                    raise ContractError(f"'{name}' is another integer after the call than before the pass")
                continue
            if _inexact(one):
                key = "relative output error"
                measured[key] = max(measured[key], relative_output_error(one, other))
            self._check_leaf(name, one, other, measured, compiled=before.compiled or after.compiled)
        return measured

    def _check_dtype(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        if before.dtype != after.dtype:
            raise ContractError(f"'{name}' is {after.dtype}, before it was {before.dtype}")

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        raise NotImplementedError


def _pairs(before: Observation, after: Observation) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    return ((name, leaf, after.leaves[name]) for name, leaf in before.leaves.items())


@dataclasses.dataclass(frozen=True)
class Exact(Contract):
    """The same bits, evaluated operation by operation; compiled, what `rounding_tolerance` allows the compiler."""

    operation_by_operation = True

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        if compiled and _inexact(before):
            _check_largest(name, before, after, rounding_tolerance(before.dtype))
            return
        different = ~_same_bits(before, after)
        if different.any():
            raise ContractError(
                f"'{name}' differs in {int(different.sum())} of {different.size} values (by up to "
                f"{_difference(before, after).max():.3g}); the contract is the same bits"
            )


@dataclasses.dataclass(frozen=True)
class Tolerance(Contract):
    """No value differs by more than `rtol` times the largest value of its array; integers do not differ.

    Attributes:
        rtol: the share of the largest value.
    """

    rtol: float

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        _check_largest(name, before, after, self.rtol)


def _check_largest(name: str, before: np.ndarray, after: np.ndarray, rtol: float) -> None:
    error = largest_relative_error(before, after)
    limit = rtol if _inexact(before) else 0.0
    if not error <= limit:
        raise ContractError(f"'{name}' differs by {error:.3g} of its largest value; the contract allows {limit:.3g}")


@dataclasses.dataclass(frozen=True)
class Lossy(Contract):
    """A metric stays within a bound, for each floating array; for integers and booleans the share that differs does.

    The dtype of a floating result may change to another floating one.

    Attributes:
        metric: a name in `METRICS`.
        bound: the largest value that is allowed.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"no metric '{self.metric}'; there are: {', '.join(METRICS)}")

    def _check_dtype(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        if not (jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)):
            super()._check_dtype(name, before, after)

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        if _inexact(before):
            what, error = self.metric, METRICS[self.metric](before, after)
            measured[self.metric] = max(measured.get(self.metric, 0.0), error)
        else:
            what, error = "share of different values", float(np.mean(before != after)) if before.size else 0.0
        if not error <= self.bound:
            raise ContractError(f"'{name}' has a {what} of {error:.3g}; the contract allows {self.bound:.3g}")


@dataclasses.dataclass(frozen=True)
class ApproximateGradients(Exact):
    """The same bits of what a program returns, as `Exact`; its gradients, all as one vector, within a relative error.

    Attributes:
        bound: the norm of the difference over the norm before.
    """

    bound: float

    def check_gradients(self, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """Compares two gradients.

        Returns:
            What was measured, by name.

        Raises:
            ContractError: the error is larger than allowed, or there is a NaN where there was none.
        """
        if (_nan(after) & ~_nan(before)).any():
            raise ContractError("gradients have NaN where there was none")
        error = relative_output_error(before, after)
        if not error <= self.bound:
            raise ContractError(f"gradients have a relative error of {error:.3g}; the contract allows {self.bound:.3g}")
        return {"relative gradient error": error, "cosine distance of gradients": cosine_distance(before, after)}
