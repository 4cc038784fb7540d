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

SPARSE_CORES: Mapping[str, str] = {
    # Gathers and sums run on the SparseCores, beside whatever the TensorCores compute. As parts of other kernels, which
    # is all that a chip without SparseCores can do, a third of the bytes of an FSDP step finds nothing to run beside.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    # The SparseCores number devices as the TensorCores do, and are not split between the two cores of a chip.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}

_WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")


def compiler_options(platform: str, device_kind: str = "") -> dict[str, str | bool]:
    """Options for `jax.jit(..., compiler_options=...)`, or for `compile`.

    Args:
        platform: "tpu", "gpu" or "cpu".
        device_kind: what JAX calls the device, such as "TPU v6 lite"; without it, options that every TPU takes.
    """
    if platform != "tpu":
        return {}
    return {**TPU, **(SPARSE_CORES if device_kind in _WITH_SPARSE_CORES else {})}
