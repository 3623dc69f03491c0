"""The devices of a slice, or of hosts with GPUs, that is not there, for a compiler to aim at."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from sora_jax.parallel.peaks import CHIPS, Chip
from sora_jax.rehearsal import gpu

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?")
# What libtpu reads when it is loaded.
_ENVIRONMENT = {
  # Lest it ask a metadata server, which only a TPU VM has, who it is, and complain that it does not know.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",  # of this host; what is compiled for is said by name
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so several processes may compile at a time
  "TPU_MIN_LOG_LEVEL": "2",  # errors
}
_NO_LIBTPU = "rehearsing a TPU topology needs libtpu, no TPU: pip install '.[rehearse]' in the clone (large)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """v5p:8x8x8*2 = two slices, each a torus of 8 x 8 x 8 chips; h200:8x4 = 8 hosts of 4 GPUs, no slices."""

  name: str
  chip: Chip
  dims: tuple[int, ...]
  num_slices: int

  @property
  def is_gpu(self) -> bool:
    return self.chip.generation in gpu.GPUS

  @property
  def num_devices(self) -> int:
    return self.num_slices * math.prod(self.dims)

  @property
  def compiler(self) -> str:
    """The package that compiles for it, once `describe` has found one."""
    return gpu.compiler() if self.is_gpu else "libtpu"

  @property
  def key(self) -> str:
    """In file names."""
    return f"{self.chip.generation}_{'x'.join(map(str, self.dims))}" + (
      f"_{self.num_slices}slices" if self.num_slices > 1 else ""
    )


def parse(name: str, num_slices: int = 0) -> Topology:
  """`num_slices` 0 = as the name says, without a "*N" one."""
  match = _NAME.fullmatch(name)
  if not match:
    raise ValueError(f"topology {name!r} is not GENERATION:AxBxC or GENERATION:AxBxC*SLICES, as v5p:8x8x8*2")
  known = CHIPS | gpu.GPUS
  if match[1] not in known:
    raise ValueError(f"topology {name!r}: chip generation {match[1]!r} is none of {', '.join(known)}")
  chip, dims = known[match[1]], tuple(int(n) for n in match[2].split("x"))
  if len(dims) != chip.torus_dims or min(dims) < 1:
    what = (
      f"{chip.generation} (hosts x GPUs)" if chip.generation in gpu.GPUS else f"a {chip.generation} slice"
    )
    raise ValueError(f"topology {name!r}: {what} has {chip.torus_dims} dims of at least 1")
  slices = num_slices or int(match[3] or 1)
  if slices > 1 and chip.generation in gpu.GPUS:
    raise ValueError(f"topology {name!r}: GPUs have no slices; their hosts are the first dim, as h200:8x8")
  return Topology(name=f"{match[1]}:{match[2]}", chip=chip, dims=dims, num_slices=slices)


def describe(topology: Topology) -> list[jax.Device]:
  """Its devices, which compile but do not run; ValueError where the compiler lacks or refuses it."""
  if topology.is_gpu:
    return gpu.describe(topology.chip, *topology.dims)
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(_NO_LIBTPU)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  kwargs = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **kwargs)
  except Exception as error:  # of several types, by jax version
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"libtpu does not take topology {topology.name}: {first}") from error
  return list(described.devices)


def place(topology: Topology, device: jax.Device) -> tuple[int, ...]:
  if topology.is_gpu:
    return 0, device.process_index, device.id % topology.dims[1], 0
  coords = tuple(device.coords)[: len(topology.dims)]
  return (getattr(device, "slice_index", 0) or 0, *coords, getattr(device, "core_on_chip", 0))
