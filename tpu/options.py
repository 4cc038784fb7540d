"""Options that programs of several devices are compiled with."""

from collections.abc import Mapping

TPU: Mapping[str, str] = {
    # Gradients that are wanted in parts are scattered as they are summed. Without it they are summed whole.
    "xla_tpu_enable_reduce_scatter_legalizer": "true",
    # Parameters are gathered, and gradients scattered, while the layers before and after are computed.
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # What is overlapped takes a little more of the vector memory than the 16 MiB that one operation has by default.
    "xla_tpu_scoped_vmem_limit_kib": "32768",
}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Options for `jax.jit(..., compiler_options=...)`, or for `compile`.

    Args:
        platform: "tpu", "gpu" or "cpu".
    """
    return dict(TPU) if platform == "tpu" else {}
