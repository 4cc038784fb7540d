"""By how much a fused attention may change what a program computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from compax.contracts import Tolerance, largest_relative_error, rounding_tolerance
from compax.errors import ContractError


@dataclasses.dataclass(frozen=True)
class Rounding(Tolerance):
    """What rounding may change, by the one table of tolerances: sums are taken in another order, nothing else.

    Attributes:
        rtol: for results in the finest dtype.
        dtype: the dtype that the program computes in, where it is coarser than that of its results.
    """

    dtype: str | None = None

    def _check_leaf(
        self, name: str, before: np.ndarray, after: np.ndarray, measured: dict[str, float], *, compiled: bool
    ) -> None:
        dtypes = [before.dtype] if self.dtype is None else [before.dtype, self.dtype]
        inexact = jnp.issubdtype(before.dtype, jnp.inexact)
        limit = max(map(rounding_tolerance, dtypes)) if inexact else 0.0
        error = largest_relative_error(before, after)
        if inexact:
            measured["largest relative error"] = max(measured.get("largest relative error", 0.0), error)
        if not error <= limit:
            raise ContractError(
                f"'{name}' differs by {error:.3g} of its largest value; rounding in {before.dtype} allows {limit:.3g}. "
                "Where a program computes in fewer bits than its results have, say so: flash(compute=bfloat16)"
            )
