"""Models that other people wrote, imported without what their packages pull in.

`google-tunix` holds plain NNX models beside trainers and samplers, and its package `__init__` imports all of them. A
model file alone needs flax and einops. `tunix_model` therefore registers empty parent packages, whose search path is
the installed folder, and imports the one file; the file itself is what was installed, unmodified.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Generator
from typing import Any

import flax
import jax.numpy as jnp
from flax import nnx

from compax.models.decoder import Decoder

TUNIX_VERSION = "0.1.7"
TUNIX_MODELS = ("llama3", "qwen2", "qwen3", "gemma", "gemma3")


def tunix_model(name: str) -> types.ModuleType:
    """Imports `tunix.models.<name>.model` and nothing else of tunix.

    Args:
        name: One of `TUNIX_MODELS`.

    Returns:
        The model file as a module, with its `ModelConfig` and model class.

    Raises:
        ModuleNotFoundError: google-tunix is not installed, or has no such model.
    """
    specification = importlib.machinery.PathFinder.find_spec("tunix")
    if specification is None or specification.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"google-tunix is not installed: pip install google-tunix=={TUNIX_VERSION}", name="tunix"
        )
    root = specification.submodule_search_locations[0]
    for package in ("tunix", "tunix.models", "tunix.generate", "tunix.utils", f"tunix.models.{name}"):
        if package not in sys.modules:
            parent = types.ModuleType(package)
            parent.__path__ = ["/".join([root, *package.split(".")[1:]])]
            sys.modules[package] = parent
    with lazy_sharding():
        return importlib.import_module(f"tunix.models.{name}.model")


@contextlib.contextmanager
def lazy_sharding() -> Generator[None]:
    """Where tunix models are imported and built: their weights carry sharding names for a mesh that is not there.

    Importing one of them turns flax's eager sharding off for the whole process. Here it is off inside the block only.
    """
    before = flax.config.flax_always_shard_variable
    try:
        with nnx.use_eager_sharding(False):
            yield
    finally:
        flax.config.update("flax_always_shard_variable", before)


def tunix_qwen2(decoder: Decoder) -> nnx.Module:
    """The numbers of a Llama-shaped decoder in tunix's own `Qwen2`, whose additional biases become zero.

    Args:
        decoder: Unrolled, gated, with RMSNorm, a tied head and no biases.

    Raises:
        ModuleNotFoundError: google-tunix is not installed.
        ValueError: A parameter of one has no place in the other.
    """
    source = tunix_model("qwen2")
    config = decoder.config
    shape = source.ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.model_dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_epsilon,
        use_tied_embedding=True,
    )
    with lazy_sharding():
        graph, state = nnx.split(nnx.eval_shape(lambda: source.Qwen2(shape, rngs=nnx.Rngs(0))))
        ours = {_joined(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(decoder))}
        filled = []
        for path, variable in nnx.to_flat_state(state):
            name = _qwen2_source(_joined(path))
            array = jnp.zeros(variable.shape, variable.dtype) if name is None else ours.pop(name)
            filled.append((path, variable.replace(jnp.reshape(array, variable.shape))))
        if ours:
            raise ValueError(
                f"Qwen2 has no place for {', '.join(sorted(ours))}: it needs a gated decoder without biases"
            )
        return nnx.merge(graph, nnx.from_flat_state(filled))


_QWEN2_NAMES = {
    "embedder.input_embedding": "embed.embedding",
    "final_norm.w": "norm.scale",
    "input_layernorm.w": "attn_norm.scale",
    "post_attention_layernorm.w": "mlp_norm.scale",
    "attn.q_proj.w": "attn.query.kernel",
    "attn.k_proj.w": "attn.key.kernel",
    "attn.v_proj.w": "attn.value.kernel",
    "attn.o_proj.w": "attn.out.kernel",
    "mlp.gate_proj.kernel": "mlp.gate.kernel",
    "mlp.up_proj.kernel": "mlp.up.kernel",
    "mlp.down_proj.kernel": "mlp.down.kernel",
}


def _qwen2_source(path: str) -> str | None:
    """The decoder's name of a parameter of Qwen2, or None where the decoder has none."""
    if path.endswith("_bias"):
        return None
    if not path.startswith("layers."):
        return _QWEN2_NAMES[path]
    _, layer, rest = path.split(".", 2)
    return f"blocks.{layer}.{_QWEN2_NAMES[rest]}"


def _joined(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
