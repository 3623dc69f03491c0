"""A cluster of GPUs that is not there: its peaks, its devices for a compiler to aim at, its links.

The compiler is that of a jaxlib for CUDA; it takes a description of the device in place of one. Without a
device it tunes nothing, and cuDNN does not plan its kernels, so their workspace is counted nowhere.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies

from sora_jax.models.dit import DiTConfig
from sora_jax.nn import attention_gpu
from sora_jax.parallel.peaks import Chip
from sora_jax.rehearsal.collectives import Collective

# Compute, HBM and NVLink (half of its 900 GB/s goes each way): the data sheets nvidia.com/en-us/data-center/
# {h100,h200}, SXM. HBM that a process may take: what frameworks report on running out. Network: one 400 Gb/s
# adapter per GPU, as in docs.nvidia.com/dgx/dgxh100-user-guide. Dims: hosts, GPUs of a host, which all reach
# each other through a switch.
GPUS = {
  chip.generation: chip
  for chip in (
    Chip(
      generation="h100", flops=989e12, hbm_bytes=int(79.1 * 2**30), hbm_rate=3.35e12, link_rate=4.5e11,
      torus_dims=2, wrap_from=1, network_rate=5e10,
    ),
    Chip(
      generation="h200", flops=989e12, hbm_bytes=int(139.8 * 2**30), hbm_rate=4.8e12, link_rate=4.5e11,
      torus_dims=2, wrap_from=1, network_rate=5e10,
    ),
  )
}  # fmt: skip
CAPABILITY = (9, 0)
# Tile of cuDNN's kernels, whose true one is not published: only the count of live tiles follows from it.
TILE = (128, 128)
# What jax takes of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
DEFAULT_MEMORY_SHARE = 0.75
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
_NO_CUDA = (
  "rehearsing a GPU topology needs a jaxlib for CUDA, no GPU: pip install '.[rehearse-gpu]' in the clone, in "
  "an environment of its own (6 GB)"
)
# Per block, per multiprocessor and in all, of a Hopper SXM5: docs.nvidia.com/cuda/hopper-tuning-guide and the
# table of compute capabilities in the CUDA programming guide.
_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA {name}"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {hbm_rate}
  device_memory_size: {hbm_bytes}
}}
dnn_version_info {{ major: {dnn_major} minor: {dnn_minor} }}
"""


def compiler() -> str | None:
  """The package that compiles for CUDA; None without one."""
  return next((p for p in _PLUGINS if importlib.util.find_spec(p.replace("-", "_"))), None)


def describe(chip: Chip, hosts: int, gpus: int) -> list[jax.Device]:
  """Devices that compile but do not run; ValueError where no compiler is there or it refuses them."""
  if compiler() is None:
    raise ValueError(_NO_CUDA)
  try:
    dnn = attention_gpu.cudnn.check_cudnn_version() if attention_gpu.cudnn else 90000
    target = _TARGET.format(
      name=chip.generation.upper(), major=CAPABILITY[0], minor=CAPABILITY[1], hbm_bytes=chip.hbm_bytes,
      hbm_rate=int(chip.hbm_rate), dnn_major=dnn // 10000, dnn_minor=dnn // 100 % 100,
    )  # fmt: skip
    described = topologies.get_topology_desc(
      platform="cuda", topology_name="", target_config=target, topology=f"1x{hosts}x{gpus}"
    )
  except Exception as error:  # of several types, by jax version
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
      f"the jaxlib for CUDA does not take topology {chip.generation}:{hosts}x{gpus}: {first}"
    ) from error
  return list(described.devices)


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
  """Inside, cuDNN's packed attention is traced for a GPU of `CAPABILITY`, which this process does not have.

  jax asks the GPU of the process for its capability, and `attention_gpu` tries the kernel on it. The target
  states the one; whether the kernel is right on it nobody knows here: training, which does not come by
  this, still tries it where it runs.
  """
  stated = {
    (attention_gpu, "_refusal_of_device"): _refusal_of_target,
    (attention_gpu.cudnn, "check_compute_capability"): lambda least: _parts(least) <= CAPABILITY,
    (attention_gpu.cudnn, "is_cuda_compute_capability_equal"): lambda exact: _parts(exact) == CAPABILITY,
  }
  kept = {(owner, name): getattr(owner, name) for owner, name in stated if owner is not None}
  try:
    for owner, name in kept:
      setattr(owner, name, stated[owner, name])
    yield
  finally:
    for (owner, name), function in kept.items():
      setattr(owner, name, function)


def _parts(capability: str) -> tuple[int, ...]:
  return tuple(int(part) for part in capability.split("."))


def _refusal_of_target() -> str | None:
  if attention_gpu.cudnn is None:
    return "this jax has no jax._src.cudnn.fused_attention_stablehlo"
  if (found := attention_gpu.cudnn.check_cudnn_version()) < attention_gpu.MIN_CUDNN:
    return f"cuDNN {found} is below {attention_gpu.MIN_CUDNN}"
  return None


def resolve_attention(config: ml_collections.ConfigDict, model: DiTConfig, num_segments: int) -> None:
  """Names what "auto" and "gpu" come to on the target, not in this process; inside `cudnn_assumed`."""
  if model.attention in ("auto", "gpu"):
    refused = attention_gpu.refusal(model.dtype, model.width // model.heads, num_segments)
    config.model.attention = "chunked" if refused else "gpu"


def notes(peak: int, limit: int) -> list[str]:
  """What the figures leave out, for the table."""
  found = ["nothing is tuned without a GPU; the workspace of cuDNN and the buffers of NCCL are not counted"]
  if peak > DEFAULT_MEMORY_SHARE * limit:
    found.append(
      f"jax takes {DEFAULT_MEMORY_SHARE:.0%} of a GPU's memory, which is less than this needs: export "
      "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    )
  return found


def collective_seconds(c: Collective, visits: Mapping[str, Sequence[int]], chip: Chip) -> tuple[float, float]:
  """(NVLink, network) seconds per step of one collective; `visits` by axis as roofline.spans says.

  Every GPU of a host has an adapter of its own, and what a host must receive comes in through those of the
  group's members on it.
  """
  hosts, local = (int(n) for n in np.prod([visits[axis] for axis in c.axes], axis=0)[1:3])
  group = hosts * local
  if c.kind == "collective-permute":
    sent = c.bytes_per_step
    return (0.0, sent / chip.network_rate) if hosts > 1 else (sent / chip.link_rate, 0.0)
  whole = c.count * c.payload * (2 if c.kind == "all-reduce" else 1)
  if c.kind == "all-to-all":
    near, far = whole * (local - 1) / group, whole * (group - local) / group
  else:
    near, far = whole * (group - 1) / group if local > 1 else 0.0, whole * (hosts - 1) / hosts / local
  return near / chip.link_rate, far / chip.network_rate
