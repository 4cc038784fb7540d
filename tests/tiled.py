"""Small losses over a vocabulary, and what tests of their tiling do with them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compax
from compax import Program, ir, verify
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.passes import TileLoss
from compax.passes.tile_loss import OPERATION
from compax.transform import Context, SiteReport
from small import run, statuses

B, T, D, V = 2, 12, 8, 30


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


X = random(B, T, D)
LABELS = jax.random.randint(jax.random.key(1), (B, T), 0, V)
WEIGHTS = jnp.asarray(np.random.default_rng(0).random((B, T)), jnp.float32)
PARAMS = {"u": random(D, D, seed=2), "head": random(D, V, seed=3), "bias": random(V, seed=4)}
Logits = Callable[[Any, jax.Array], jax.Array]


def plain(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["u"]) @ p["head"]


def program(loss: Callable[..., Any], logits: Logits = plain, params: Any = None, x: jax.Array = X) -> Program:
    """A loss on the logits of a small network, as a program of hidden states, labels and weights of tokens."""
    given = PARAMS if params is None else params
    return compax.capture(lambda p, x, y, w: loss(logits(p, x), y, w), given, x, LABELS, WEIGHTS)


def value_and_gradients(program: Program, x: jax.Array = X) -> Any:
    """A program's outputs, and the gradients of their sum by parameter and hidden states."""

    def total(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        output = program.apply(params, program.state, x, LABELS, WEIGHTS)[0]
        floats = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.vdot(leaf, jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in floats), output

    (_, output), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(program.params, x)
    return output, gradients


def assert_alike(before: Any, after: Any, tolerance: float | None = None) -> None:
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        allowed = rounding_tolerance(one.dtype) if tolerance is None else tolerance
        error = largest_relative_error(np.asarray(one), np.asarray(other))
        assert error <= allowed, f"{jax.tree_util.keystr(path)} differs by {error:.3g}"


def looked_at(program: Program, **options: Any) -> SiteReport:
    """What the pass says of the one loss of a program, which it leaves alone."""
    result = TileLoss(**(options or {"tokens": 8})).run(program, Context())
    assert result.program is program
    (report,) = result.sites
    return report


def operations(program: Program) -> list[ir.Op]:
    return [op for _, op in ir.walk(program.graph().graph) if op.name == OPERATION]


def largest(program: Program, x: jax.Array = X) -> int:
    """Elements of the largest array with a vocabulary that a gradient computes, all bodies counted."""

    def total(params: Any) -> jax.Array:
        output = program.apply(params, program.state, x, LABELS, WEIGHTS)[0]
        return sum(map(jnp.sum, (x.astype(jnp.float32) for x in jax.tree.leaves(output))))

    graph = ir.import_jaxpr(jax.make_jaxpr(jax.grad(total))(program.params))
    shapes = [value.shape for _, op in ir.walk(graph) for value in op.outputs]
    return max(int(np.prod(shape)) for shape in shapes if V in shape and D not in shape)


def assert_tiled(before: Program, pipeline: str = "tile_loss(tokens=8)", x: jax.Array = X) -> Program:
    """Applies the pass: values and gradients stay, and logits are gone."""
    after = run(pipeline, before)
    assert set(statuses(after).values()) == {"rewritten"}, after.history[-1]
    verify(after)
    (op,) = operations(after)
    assert_alike(value_and_gradients(before, x), value_and_gradients(after, x))
    tiles = op.attributes["tiles"]
    if tiles.vocabulary is None:
        assert largest(before, x) >= B * T * V > 2 * largest(after, x)
    return after


def log_softmax_picked(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1)[..., 0]


def with_accuracy(z: jax.Array, y: jax.Array, w: jax.Array) -> Any:
    return log_softmax_picked(z, y).mean(), {
        "accuracy": (z.argmax(-1) == y).mean(),
        "perplexity": jnp.exp(log_softmax_picked(jax.lax.stop_gradient(z), y).mean()),
        "largest": z.max(-1).mean(),
    }


def biased(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["u"]) @ p["head"] + p["bias"]


def softcapped(p: Any, x: jax.Array) -> jax.Array:
    return 3 * jnp.tanh(biased(p, x) / 3)


def flattened_first(p: Any, x: jax.Array) -> jax.Array:
    return (jnp.tanh(x @ p["u"]).reshape(-1, D) @ p["head"]).reshape(*x.shape[:-1], V)
