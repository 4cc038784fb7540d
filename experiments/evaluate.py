"""Loss and perplexity on the text that was kept for evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
        def loss(params: Any, state: Any, tokens: jax.Array) -> jax.Array:
            return program.apply(params, state, {"tokens": tokens}, entry=EVAL)[0][0]

        self._loss = jax.jit(loss)
        self._batches = batches

    def __call__(self, params: Any, state: Any) -> Evaluation:
        """Returns the loss of these parameters."""
        losses = [self._loss(params, state, tokens) for tokens in self._batches]
        predictions = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in self._batches)
        return Evaluation(float(np.mean(np.asarray(jax.device_get(losses), np.float64))), predictions)
