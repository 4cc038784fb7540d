"""Options that programs of several devices are compiled with."""

from collections.abc import Mapping

TPU: Mapping[str, str] = {
    # Gradients that are wanted in parts are scattered as they are summed. Without it they are summed whole.
    "xla_tpu_enable_reduce_scatter_legalizer": "true",
    "xla_enable_async_all_gather": "true",
    # As parts of other kernels: newer compilers (libtpu 0.0.50) refuse it but for v5e, for fear of wrong results.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    # What is overlapped takes a little more of the vector memory than the 16 MiB that one operation has by default.
    "xla_tpu_scoped_vmem_limit_kib": "32768",
}

IN_KERNELS: Mapping[str, str] = {
    # Parameters are gathered, and gradients scattered, piece by piece inside of the kernels before and after.
    "xla_enable_async_reduce_scatter_fusion": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

SPARSE_CORES: Mapping[str, str] = {
    # Gathers, scatters and sums run on the SparseCores, beside whatever the TensorCores compute.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    # The SparseCores number devices as the TensorCores do, and are not split between the two cores of a chip.
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}

_BY_KIND: Mapping[str, Mapping[str, str]] = {
    "TPU v5 lite": IN_KERNELS,
    "TPU v5e": IN_KERNELS,
    "TPU v5": SPARSE_CORES,
    "TPU v5p": SPARSE_CORES,
    "TPU v6 lite": SPARSE_CORES,
    "TPU v6e": SPARSE_CORES,
    "TPU7x": SPARSE_CORES,
}


def compiler_options(platform: str, device_kind: str = "") -> dict[str, str | bool]:
    """Options for `jax.jit(..., compiler_options=...)`, or for `compile`.

    Args:
        platform: "tpu", "gpu" or "cpu".
        device_kind: what JAX calls the device, such as "TPU v6 lite"; without it, options that every TPU takes.
    """
    return {**TPU, **_BY_KIND.get(device_kind, {})} if platform == "tpu" else {}
