"""A decoder in NumPy and float64, written to be obviously right: head by head, rotary embedding by complex numbers."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compax.errors import WeightsError
from compax.models import DecoderConfig

Array = np.ndarray
Logits = Callable[[DecoderConfig, Mapping[str, Any], Array], Array]

ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu2": lambda x: np.where(x > 0, x, 0) ** 2,
}


@pytest.fixture(scope="session")
def reference_logits() -> Logits:
    """Logits `[T, V]` of one sequence `[T]` from a config and parameters by path, unrolled or stacked."""
    return _logits


def _logits(config: DecoderConfig, params: Mapping[str, Any], tokens: Array) -> Array:
    def get(path: str, layer: int | None = None) -> Array | None:
        if layer is None:
            value = params.get(path)
        elif config.scan:
            value = params[f"blocks.{path}"][layer] if f"blocks.{path}" in params else None
        else:
            value = params.get(f"blocks.{layer}.{path}")
        return None if value is None else np.asarray(value, np.float64)

    def project(x: Array, path: str, layer: int) -> Array:
        kernel, bias = get(f"{path}.kernel", layer), get(f"{path}.bias", layer)
        return x @ kernel + (0 if bias is None else bias)

    def normalize(x: Array, path: str, layer: int | None = None) -> Array:
        scale, bias = get(f"{path}.scale", layer), get(f"{path}.bias", layer)
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
        return x if bias is None else x + bias

    size, half = config.head_dim, config.head_dim // 2
    frequencies = np.array([config.rope_theta ** (-2 * i / size) for i in range(half)])
    turns = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))

    def rotated(x: Array) -> Array:
        pairs = (x[:, :half] + 1j * x[:, half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    embedding = get("embed.embedding")
    x = embedding[tokens]
    for layer in range(config.num_layers):
        y = normalize(x, "attn_norm", layer)
        queries, keys, values = (project(y, f"attn.{name}", layer) for name in ("query", "key", "value"))
        outputs = []
        for head in range(config.num_heads):
            shared = head * config.num_kv_heads // config.num_heads
            query = rotated(queries[:, head * size : (head + 1) * size])
            key = rotated(keys[:, shared * size : (shared + 1) * size])
            value = values[:, shared * size : (shared + 1) * size]
            attended = []
            for t in range(len(tokens)):
                scores = key[: t + 1] @ query[t] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                attended.append(weights @ value[: t + 1] / weights.sum())
            outputs.append(np.stack(attended))
        x = x + project(np.concatenate(outputs, axis=-1), "attn.out", layer)

        y = normalize(x, "mlp_norm", layer)
        activation = ACTIVATIONS[config.activation]
        hidden = project(y, "mlp.up", layer)
        hidden = activation(project(y, "mlp.gate", layer)) * hidden if config.gated else activation(hidden)
        x = x + project(hidden, "mlp.down", layer)
    x = normalize(x, "norm")
    return x @ (embedding.T if config.tied else get("head.kernel"))


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Checks that a call raises a `WeightsError` of one readable line that names the file and has the given words."""

    def check(path: Path, call: Callable[[], Any], *words: str) -> str:
        with pytest.raises(WeightsError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        for word in (str(path), *words):
            assert word in message
        return message

    return check
