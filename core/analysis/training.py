"""The train step over a program: the loss, its gradients, and an optimizer's update, as one traced computation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from compax.analysis.tracing import Scoped, Traced, argument_shapes, evaluated, traced
from compax.errors import CaptureError

if TYPE_CHECKING:
    from compax.capture import Captured
    from compax.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A train step over one graph of a program, as a function and the shapes that it takes.

    Attributes:
        function: from a `Scoped` evaluator and the arguments by name to what the step returns.
        arguments: shapes by the kind of argument.
        donated: kinds of arguments whose memory the results take.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    donated: tuple[str, ...] = ("parameter", "optimizer")

    def traced(self, captured: "Captured", platform: str | None = None) -> Traced:
        """The step with a graph of the program in it, lowered for a platform; by default JAX's."""
        return traced(self.function, captured, platform=platform, **self.arguments)

    def plain(self, captured: "Captured") -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """The step as a function of its arguments in order, their shapes, and which of them are donated."""
        names = tuple(self.arguments)

        def step(*given: Any) -> Any:
            return self.function(Scoped(captured), **dict(zip(names, given, strict=True)))

        donated = tuple(i for i, name in enumerate(names) if name in self.donated)
        return step, tuple(self.arguments.values()), donated


def returns_loss(captured: "Captured") -> bool:
    """Whether the first output of a graph is a number to differentiate."""
    outputs = captured.graph.outputs
    return bool(outputs) and outputs[0].shape == () and jnp.issubdtype(outputs[0].dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer as a train step sees it.

    Attributes:
        init: from the trained parameters to the optimizer's state.
        update: from gradients, state and parameters to the new parameters and the new state.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def keeping(slots: int) -> Optimizer:
    """An optimizer that keeps some float32 arrays of the size of each parameter, as Adam keeps two."""

    def init(params: Any) -> Any:
        return [jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params) for _ in range(slots)]

    def update(gradients: Any, moments: Any, params: Any) -> tuple[Any, Any]:
        after = [jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g.astype(m.dtype), moment, gradients) for moment in moments]
        updates = after[0] if after else gradients
        for other in after[1:]:
            updates = jax.tree.map(lambda u, v: u / (jnp.sqrt(jnp.abs(v)) + 1e-8), updates, other)
        return jax.tree.map(lambda p, u: (p - 1e-3 * u).astype(p.dtype), params, updates), after

    return Optimizer(init, update)


def train_step(program: "Program", captured: "Captured", optimizer: int | Optimizer) -> TrainStep:
    """The train step over a graph of a program.

    Args:
        program: the program; its parameters may be shapes.
        captured: one of its graphs.
        optimizer: the optimizer; or how many float32 arrays of the size of each parameter it keeps.

    Raises:
        CaptureError: the first output of the graph is no loss.
    """
    if not returns_loss(captured):
        raise CaptureError(
            f"the entry '{captured.entry.name}' returns no loss, so there is no backward pass whose memory could be "
            "planned; capture the model with its loss: compax.capture(model, batch, loss=function)"
        )
    rule = keeping(optimizer) if isinstance(optimizer, int) else optimizer
    trainable, frozen = program.partition()
    shapes = jax.tree.map(_struct, (trainable, frozen, program.state))

    def step(evaluator: Scoped, parameter: Any, frozen: Any, state: Any, optimizer: Any, argument: Any) -> Any:
        def loss_of(trainable: Any) -> tuple[Any, list[Any]]:
            first, *rest = evaluated(evaluator, {**frozen, **trainable}, state, argument)
            return first, rest

        (value, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameter)
        changed, after = rule.update(gradients, optimizer, parameter)
        return changed, after, value, rest

    return TrainStep(
        step,
        {
            "parameter": shapes[0],
            "frozen": shapes[1],
            "state": shapes[2],
            "optimizer": jax.eval_shape(rule.init, shapes[0]),
            "argument": argument_shapes(captured),
        },
    )


def _struct(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
