"""Loss and perplexity on the text that was kept for evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import compax
from compax.experiments.programs import EVAL


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A measured evaluation.

    Attributes:
        loss: Mean cross-entropy in nats per token.
        tokens: How many predictions that is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Evaluator:
    """Evaluates a program on fixed batches, with whatever parameters it is given.

    Args:
        program: Has an entry `eval` that returns `(loss, metrics)`.
        batches: int32[batch, sequence_length + 1] each.
    """

    def __init__(self, program: compax.Program, batches: Sequence[np.ndarray]):
        self._batches = batches
        self._loss = self._compiled(program)

    @staticmethod
    def _compiled(program: compax.Program) -> Callable[[Any, Any, np.ndarray], jax.Array]:
        def loss(params: Any, state: Any, tokens: jax.Array) -> jax.Array:
            return program.apply(params, state, {"tokens": tokens}, entry=EVAL)[0][0]

        return jax.jit(loss)

    def __call__(self, params: Any, state: Any) -> Evaluation:
        """Returns the loss of the program with other parameters and state."""
        return self._mean(self._loss, params, state)

    def of(self, program: compax.Program) -> Evaluation:
        """Returns the loss of another program, with its own parameters and state, on the same batches."""
        return self._mean(self._compiled(program), program.params, program.state)

    def _mean(self, loss: Callable[[Any, Any, np.ndarray], jax.Array], params: Any, state: Any) -> Evaluation:
        # One after the other, for the reason that `checkpoint.digests` has.
        losses = [jax.device_get(loss(params, state, tokens)) for tokens in self._batches]
        predictions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in self._batches)
        return Evaluation(float(np.mean(np.asarray(losses, np.float64))), predictions)
