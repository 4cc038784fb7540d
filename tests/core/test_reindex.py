"""Reindexing, operation by operation: what is computed stays what it has to be, derivatives included."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax import Program, ir
from compax.capture import Captured
from compax.contracts import Lossy, largest_relative_error, rounding_tolerance
from compax.errors import RewriteError, SignatureError
from compax.rewrites.reindex import decide, reindex, reindex_by, reindex_captured
from compax.transform import Context, Pass, PassResult, SiteReport
from compax.verify import verify
from reindexed import axes_of, axis_at, gradients, shuffled, two_thirds, zeroed

TOLERANCE = rounding_tolerance(jnp.float32)


def _close(one: Any, other: Any) -> None:
    assert largest_relative_error(np.asarray(one), np.asarray(other)) <= TOLERANCE


def _is_zeroed(program: Program, keep: Any, run: Any) -> Program:
    """Asserts that the narrowed program computes what the one with zeros does; returns it."""
    narrowed = reindex(program, keep)
    verify(narrowed)
    _close(run(zeroed(program, keep)), run(narrowed))
    return narrowed


# -- single operations ------------------------------------------------------------------------------------------------

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


def _weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    random = np.random.default_rng(1)
    return {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def _both(function: Any, path: str, dim: int, **shapes: tuple[int, ...]) -> Program:
    """Narrows and reorders an axis of a function of parameters; compares outputs and gradients."""
    program = compax.capture(function, _weights(**shapes), X)
    axis = axis_at(program, path, dim)
    run = lambda program: program(X)  # noqa: E731
    moved = reindex(program, {axis: shuffled(axis)})
    verify(moved)
    _close(run(program), run(moved))
    keep = {axis: two_thirds(axis)}
    narrowed = _is_zeroed(program, keep, run)
    found, expected = gradients(run, narrowed), gradients(run, zeroed(program, keep))
    taken: dict[str, jax.Array] = dict(expected)
    for (_, name, axis_dim), indices in decide(program, keep).items():
        taken[name] = jnp.take(taken[name], np.asarray(indices), axis_dim)
    for name, x in found.items():
        assert np.abs(x - taken[name]).max() <= TOLERANCE * max(1, np.abs(taken[name]).max()), name
    _close(run(narrowed), jax.jit(lambda program, x: program(x))(narrowed, X))
    _close(run(narrowed), jax.vmap(lambda x: narrowed.apply(narrowed.params, {}, x)[0])(X[None])[0])
    return narrowed


def test_relu_keeps_its_derivative_rule() -> None:
    narrowed = _both(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], "up", 1, up=(4, 9), down=(9, 4))
    (op,) = (op for _, op in ir.walk(narrowed.graph().graph) if op.name == "custom_jvp_call")
    assert op.outputs[0].shape == (3, 6)


def test_second_derivatives_of_relu() -> None:
    program = compax.capture(lambda p, x: jax.nn.relu(x @ p["up"]) ** 3, _weights(up=(4, 9)), X)
    function = lambda up, x: jnp.sum(jax.nn.relu(x @ up) ** 3 * jnp.arange(9))  # noqa: E731
    with pytest.raises(RewriteError, match="an output"):
        reindex(program, {axis_at(program, "up", 1): [0]})
    summed = compax.capture(lambda p, x: jnp.sum(jax.nn.relu(x @ p["up"]) ** 3 * jnp.arange(9)), _weights(up=(4, 9)), X)
    keep = [5, 2, 8]
    narrowed = reindex(summed, {axis_at(summed, "up", 1): keep})
    hessian = jax.hessian(lambda up: narrowed.apply({"up": up}, {}, X)[0])(narrowed.params["up"])
    expected = jax.hessian(function)(summed.params["up"], X)
    _close(expected[:, keep][:, :, :, keep], hessian)


def _softmax(p: Any, x: jax.Array) -> jax.Array:
    """Softmax with a rule of its own, over another axis than the one that is narrowed."""

    @jax.custom_jvp
    def softmax(scores: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores, axis=-1)

    @softmax.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        y = softmax(primals[0])
        mask = jnp.arange(y.shape[-1]) < y.shape[-1]
        return y, jnp.where(mask, y * (tangents[0] - jnp.sum(y * tangents[0], axis=-1, keepdims=True)), 0)

    return jnp.einsum("hbt,ht->b", softmax(jnp.einsum("bd,hdt->hbt", x, p["q"])), p["o"])


def test_softmax_with_a_rule_of_its_own() -> None:
    _both(_softmax, "q", 0, q=(6, 4, 5), o=(6, 5))


def test_softmax_over_the_axis() -> None:
    program = compax.capture(lambda p, x: jax.nn.softmax(x @ p["q"]) @ p["o"], _weights(q=(4, 9), o=(9, 2)), X)
    axis = axis_at(program, "q", 1)
    keep = np.asarray(two_thirds(axis))
    expected = jax.nn.softmax(X @ program.params["q"][:, keep]) @ program.params["o"][keep]
    _close(expected, reindex(program, {axis: keep.tolist()})(X))


def test_tables_are_gathered_where_they_are_used() -> None:
    table = np.arange(9.0, dtype=np.float32)

    def function(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["up"] * table + jnp.cos(jnp.arange(9) * 0.3)
        return (h * jnp.ones((9,))) @ p["down"]

    program = compax.capture(function, _weights(up=(4, 9), down=(9, 4)), X)
    keep = np.asarray([7, 1, 4])
    narrowed = reindex(program, {axis_at(program, "up", 1): keep.tolist()})
    verify(narrowed)
    up, down = program.params["up"][:, keep], program.params["down"][keep]
    _close((X @ up * table[keep] + jnp.cos(np.arange(9) * 0.3)[keep]) @ down, narrowed(X))


def test_scan_carry_that_starts_from_zeros_and_rows_given_out() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def turn(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(h + x @ w)
            return h, jnp.maximum(h, 0.1)

        last, rows = jax.lax.scan(turn, jnp.zeros((3, 9)), p["up"])
        return (last + rows.sum(0)) @ p["down"]

    _both(function, "down", 0, up=(2, 4, 9), down=(9, 4))


def test_while_and_cond() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["up"]
        h = jax.lax.while_loop(
            lambda c: jnp.logical_and(c[0] < 3, jnp.all(jnp.isfinite(c[1]))),
            lambda c: (c[0] + 1, jnp.sin(c[1])),
            (0, h),
        )[1]
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h * 2, lambda h: jnp.zeros((3, 9)), h)
        return h @ p["down"]

    program = compax.capture(function, _weights(up=(4, 9), down=(9, 4)), X)
    axis = axis_at(program, "down", 0)
    narrowed = _is_zeroed(program, {axis: two_thirds(axis)}, lambda program: program(X))
    found = jax.jvp(lambda x: narrowed(x), (X,), (X,))[1]
    expected = jax.jvp(lambda x: zeroed(program, {axis: two_thirds(axis)})(x), (X,), (X,))[1]
    _close(expected, found)


def test_fused_product_is_cut_at_other_borders() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(x @ p["gate_up"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    narrowed = _both(function, "down", 0, gate_up=(4, 18), down=(9, 4))
    assert narrowed.params["gate_up"].shape == (4, 12)


def test_loop_over_experts_written_out() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        outputs = [jax.nn.silu(x @ p["up"][i]) @ p["down"][i] for i in range(3)]
        return jnp.einsum("ebd,be->bd", jnp.stack(outputs), x @ p["router"])

    narrowed = _both(function, "router", 1, up=(3, 4, 5), down=(3, 5, 4), router=(4, 3))
    assert sum(op.name == "dot_general" for _, op in ir.walk(narrowed.graph().graph)) == 2 * 2 + 2


def test_equal_layers_stay_one_function() -> None:
    block = jax.jit(lambda x, up, down: x + jax.nn.silu(x @ up) @ down)

    def function(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = block(x, p[f"up{i}"], p[f"down{i}"])
        return x

    shapes: dict[str, tuple[int, ...]] = {f"up{i}": (4, 9) for i in range(3)} | {f"down{i}": (9, 4) for i in range(3)}
    program = compax.capture(function, _weights(**shapes), X)
    keep = {axis_at(program, f"up{i}", 1): [i, 4, 5, 7] for i in range(3)}
    narrowed = reindex(program, keep)
    verify(narrowed)
    assert len({id(op.bodies[0]) for op in narrowed.graph().graph.ops if op.name == "jit"}) == 1
    assert len({id(op.bodies[0]) for _, op in ir.walk(narrowed.graph().graph) if op.bodies}) == 2
    different = reindex(program, dict(zip(keep, ([1, 2, 3], [0, 1, 2], [1, 2]), strict=True)))
    verify(different)
    assert len({id(op.bodies[0]) for op in different.graph().graph.ops if op.name == "jit"}) == 2


# -- programs ---------------------------------------------------------------------------------------------------------


class _Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(4, 9, rngs=rngs), nnx.Linear(9, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(jax.nn.relu(self.up(x))))

    def hidden(self, x: jax.Array) -> jax.Array:
        return jnp.square(self.up(x)).sum(-1)

    def regrouped(self, x: jax.Array) -> jax.Array:
        return self.up(x).reshape(-1, 3, 3).sum(-1)


def test_all_entries_change_and_history_stays() -> None:
    program = compax.capture(_Network(), X, mode="train").with_entry("hidden", X, method="hidden", mode="eval")
    axis = axis_at(program, "up.kernel", 1)
    narrowed = reindex(program, {axis: [8, 0, 3]})
    verify(narrowed)
    assert narrowed.history == program.history
    up = X @ program.params["up.kernel"][:, [8, 0, 3]] + program.params["up.bias"][jnp.asarray([8, 0, 3])]
    _close(jnp.square(up).sum(-1), narrowed(X, entry="hidden"))


def test_dropout_draws_the_same_for_what_is_kept() -> None:
    program = compax.capture(_Network(), X, mode="train")
    _is_zeroed(program, {axis_at(program, "up.kernel", 1): [8, 0, 3]}, lambda program: program(X))


def test_another_entry_takes_the_dimension_apart() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    both = program.with_entry("regrouped", X, method="regrouped", mode="eval")
    axis = axis_at(both, "up.kernel", 1)
    with pytest.raises(RewriteError, match=r"product of 3 x 3 in the graph 'regrouped'"):
        reindex(both, {axis: [0, 1, 5]})


def test_gradients_remat_and_scan_over_a_narrowed_program() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    narrowed = reindex(program, {axis_at(program, "up.kernel", 1): [8, 0, 3]})

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(narrowed.apply(params, narrowed.state, x)[0] ** 2)

    plain = jax.grad(loss)(narrowed.params, X)
    twice = jnp.stack([X, X])
    again = jax.grad(jax.checkpoint(loss))(narrowed.params, X)
    scanned = jax.grad(lambda p: jax.lax.scan(lambda c, x: (c + loss(p, x) / 2, None), 0.0, twice)[0])(narrowed.params)
    mapped = jax.grad(lambda p: jax.vmap(lambda x: loss(p, x) / 2)(twice).sum())(narrowed.params)
    for path, x in plain.items():
        for other in (again, scanned, mapped):
            _close(x, other[path])


def test_shapes_only() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    params = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in program.params.items()}
    abstract = program.replace(params=params)
    narrowed = reindex(abstract, {axis_at(abstract, "up.kernel", 1): [8, 0, 3]})
    verify(narrowed)
    assert narrowed.params["down.kernel"] == jax.ShapeDtypeStruct((3, 4), jnp.float32)


def test_nothing_to_do_gives_the_same_program() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    axis = axis_at(program, "up.kernel", 1)
    assert reindex(program, {axis: list(range(9))}) is program
    assert reindex_captured(program.graph(), {}) is program.graph()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_fixed_axes_are_refused_with_the_reasons() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    fixed = next(axis for axis in axes_of(program) if axis.fixed and "up.kernel" in axis.parameters)
    with pytest.raises(RewriteError, match="must stay where they are: an input"):
        reindex(program, {fixed: [0, 1]})
    assert reindex(program, {fixed: [0, 1, 2, 3]}) is program


@pytest.mark.parametrize("indices", [[], [0, 0], [9], [-1], [0.5]])
def test_indices_that_are_none(indices: list[Any]) -> None:
    program = compax.capture(_Network(), X, mode="eval")
    with pytest.raises(RewriteError, match="what is kept of the axis"):
        reindex(program, {axis_at(program, "up.kernel", 1): indices})


def test_custom_vjp_is_refused() -> None:
    @jax.custom_vjp
    def activation(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    activation.defvjp(lambda x: (activation(x), x), lambda x, g: (g,))
    program = compax.capture(lambda p, x: activation(x @ p["up"]) @ p["down"], _weights(up=(4, 9), down=(9, 4)), X)
    with pytest.raises(RewriteError, match=r"custom_vjp_call.*test_reindex.py.*jax.custom_jvp"):
        reindex(program, {axis_at(program, "up", 1): [1, 2]})


def test_fewer_than_the_best_k() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.top_k(x @ p["router"], 3)[0]

    program = compax.capture(function, _weights(router=(4, 6)), X)
    with pytest.raises(RewriteError, match=r"takes the best 3, but only 2 are kept"):
        reindex(program, {axis_at(program, "router", 1): [1, 2]})


def test_an_axis_of_another_program() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    other = compax.capture(lambda p, x: x @ p["up"] @ p["down"], _weights(up=(4, 7), down=(7, 4)), X)
    with pytest.raises(RewriteError, match="is not found"):
        reindex(program, {axis_at(other, "up", 1): [0]})


def test_encoded_parameters() -> None:
    import compax.passes

    program = compax.capture(_Network(), X, mode="eval")
    quantized = compax.Pipeline.parse("quantize(weights=int8)")(program)
    axis = axis_at(quantized, "up.kernel", 1)
    narrowed = reindex(quantized, {axis: [8, 0, 3]})
    verify(narrowed)
    assert narrowed.params["up.kernel"].shape == (4, 3)
    exact = reindex(quantized.decode(), {axis: [8, 0, 3]})
    _close(exact(X), narrowed(X))


# -- replay -----------------------------------------------------------------------------------------------------------


def test_decisions_that_leave_a_parameter_out() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    decisions = decide(program, {axis_at(program, "up.kernel", 1): [8, 0, 3]})
    assert decisions == {
        ("parameter", "down.kernel", 0): (8, 0, 3),
        ("parameter", "up.bias", 0): (8, 0, 3),
        ("parameter", "up.kernel", 1): (8, 0, 3),
    }
    del decisions["parameter", "up.bias", 0]
    with pytest.raises(RewriteError, match=r"dimension 0 of the parameter 'up.bias' is an axis"):
        reindex_captured(program.graph(), decisions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Keep(Pass):
    """Keeps some hidden indices of the network."""

    name = "keep_some"  # not registered: tests over the registry must not meet it
    phase = "structure"
    changes_parameters = True
    contract = Lossy("relative output error", bound=10)

    def run(self, program: Program, context: Context) -> PassResult:
        decisions = decide(program, {axis_at(program, "up.kernel", 1): [8, 0, 3]})
        return PassResult(reindex_by(program, decisions), (SiteReport("up", "linear", "rewritten"),), decisions)

    def rewrite(self, captured: Captured, decisions: Mapping[str, Any]) -> Captured:
        return reindex_captured(captured, decisions)  # type: ignore[arg-type]


def test_new_signatures_and_entries_are_captured_as_the_model_is_and_replayed() -> None:
    program = compax.Pipeline([_Keep()])(compax.capture(_Network(), X, mode="eval"))
    assert program.params["up.kernel"].shape == (4, 3)
    wide = jnp.concatenate([X, X + 1])
    _close(program(wide)[:3], program(X))
    special = program.specialize(wide)
    verify(special)
    assert len(special.graphs) == 2
    _close(program(wide), special(wide))
    again = jax.jit(lambda program, x: program(x))(special, wide)
    _close(program(wide), again)
    more = program.with_entry("hidden", X, method="hidden", mode="eval")
    verify(more)
    assert more(X, entry="hidden").shape == (3,)


def test_new_signatures_without_a_pass_that_replays() -> None:
    program = compax.capture(_Network(), X, mode="eval")
    narrowed = reindex(program, {axis_at(program, "up.kernel", 1): [8, 0, 3]})
    assert narrowed(X).shape == (3, 4)
    with pytest.raises(SignatureError, match=r"'down.kernel' is float32\[3, 4\].*restructured outside of a pass"):
        narrowed(X[:2])


def test_state_that_the_model_writes_follows() -> None:
    class Normalized(_Network):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nnx.BatchNorm(9, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(jax.nn.relu(self.norm(self.up(x))))

    program = compax.capture(Normalized(), X, mode="train")
    axis = axis_at(program, "up.kernel", 1)
    assert not axis.fixed
    narrowed = _is_zeroed(program, {axis: [8, 0, 3]}, lambda program: program(X))
    assert narrowed.state["norm.mean"].shape == (3,)
    before = program.apply(program.params, program.state, X)[1]
    after = narrowed.apply(narrowed.params, narrowed.state, X)[1]
    _close(before["norm.mean"][np.asarray([8, 0, 3])], after["norm.mean"])
