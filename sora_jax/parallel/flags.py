"""XLA flags of libtpu by chip generation, as data. Imports nothing, so that launch scripts may read it.

Kept apart by generation because they do not carry over: the SparseCore set of tpu7x hangs a v5p.
"""

# Collectives that run beside compute: the flags that MaxText and MaxDiffusion publish for training
# (github.com/AI-Hypercomputer/maxtext, maxdiffusion). Without them none is overlapped.
_OVERLAP = {
  "xla_tpu_overlap_compute_collective_tc": "true",
  "xla_enable_async_all_gather": "true",
  "xla_enable_async_collective_permute": "true",
  "xla_tpu_enable_async_all_to_all": "true",
}
# Collectives that go on inside of fusions, on v5e alone: from libtpu 0.0.46 on the compiler refuses them
# elsewhere ("incorrect results, hang"), and on v6e, together with the overlap above, they turned exchanges
# around attention to NaN (github.com/AI-Hypercomputer/maxdiffusion/issues/429).
_FUSED = {
  "xla_tpu_enable_async_collective_fusion": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
}
_NOT_FUSED = {"xla_tpu_enable_async_collective_fusion": "false"}
# Gradients of replicas that are joined over the data-center network.
_DATA_PARALLEL = {
  "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
  "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
_SPARSE_CORE = {
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
  "xla_tpu_use_tc_device_shape_on_sc": "true",
}

# Products are not split into rings of partial products ("collective matmul"): thousands of small permutations
# and several times the compile time, where asynchronous collectives hide the same transfers.
_NO_RINGS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

# VMEM that one fused operation may take, KiB, of 128 MiB a core (v5e, v5p, v6e) and 64 MiB (tpu7x).
FLAGS: dict[str, dict[str, str]] = {
  "v5e": {**_OVERLAP, **_FUSED, **_DATA_PARALLEL, **_NO_RINGS, "xla_tpu_scoped_vmem_limit_kib": "65536"},
  "v5p": {**_OVERLAP, **_NOT_FUSED, **_DATA_PARALLEL, **_NO_RINGS, "xla_tpu_scoped_vmem_limit_kib": "65536"},
  "v6e": {**_OVERLAP, **_NOT_FUSED, **_DATA_PARALLEL, **_NO_RINGS, "xla_tpu_scoped_vmem_limit_kib": "98304"},
  "tpu7x": {
    **_OVERLAP,
    **_NOT_FUSED,
    **_DATA_PARALLEL,
    **_NO_RINGS,
    **_SPARSE_CORE,
    "xla_tpu_scoped_vmem_limit_kib": "49152",
  },
}


def flags_of(generation: str) -> dict[str, str]:
  """Flag -> value; ValueError for a generation that has no set."""
  if generation not in FLAGS:
    raise ValueError(f"no XLA flags are known for chip generation {generation!r}; known: {', '.join(FLAGS)}")
  return dict(FLAGS[generation])


def init_args(generation: str) -> str:
  """The value of LIBTPU_INIT_ARGS, on one line."""
  return " ".join(f"--{name}={value}" for name, value in flags_of(generation).items())
