"""What training through int8 needs besides the arithmetic of `compax.integers`: rounding that gradients pass."""

import jax

from compax.integers import from_integers, to_integers


@jax.custom_jvp
def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivative of `x` (Bengio et al., 2013, arXiv 1308.3432)."""
    del x
    return rounded


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def fake_quantize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` rounded to what int8 with `scale` can hold, in the dtype of `x`; gradients pass straight through."""
    scale = jax.lax.stop_gradient(scale)
    rounded = from_integers(to_integers(jax.lax.stop_gradient(x), scale), scale, x.dtype)
    return straight_through(x, rounded)
