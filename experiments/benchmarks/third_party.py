"""Models that other people wrote, imported without what their packages pull in.

`google-tunix` holds plain NNX models beside trainers and samplers, and its package `__init__` imports all of them. A
model file alone needs flax and einops. `tunix_model` therefore registers empty parent packages, whose search path is
the installed folder, and imports the one file; the file itself is what was installed, unmodified.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator

import flax
from flax import nnx

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
def lazy_sharding() -> Iterator[None]:
    """Where tunix models are imported and built: their weights carry sharding names for a mesh that is not there.

    Importing one of them turns flax's eager sharding off for the whole process. Here it is off inside the block only.
    """
    before = flax.config.flax_always_shard_variable
    try:
        with nnx.use_eager_sharding(False):
            yield
    finally:
        flax.config.update("flax_always_shard_variable", before)
