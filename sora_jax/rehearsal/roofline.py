"""The least time a step can take by stated peaks: compute, HBM, links and network, each by itself.

An upper bound on speed, not a forecast: it takes every unit at its peak. Work is counted from the program
that training traces (matrix products, loops multiplied out) and from the live tiles of attention, whose
kernel no analysis of the compiler counts.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from sora_jax.models.dit import DiTConfig
from sora_jax.rehearsal import gpu
from sora_jax.rehearsal import topology as topology_lib
from sora_jax.rehearsal.collectives import Collective
from sora_jax.rehearsal.mix import Counted
from sora_jax.rehearsal.topology import Topology

# Matrix products of attention on a tile: scores and values; backward, scores again and four gradients' worth.
_FORWARD, _BACKWARD = 2, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
  """Seconds of one step on each unit, were it alone."""

  compute: float
  hbm: float
  links: float
  network: float
  serial_links: float  # of links and network, what the schedule does not run beside compute

  @property
  def bound(self) -> float:
    """Were everything to overlap."""
    return max(self.compute, self.hbm, self.links, self.network)

  @property
  def serial(self) -> float:
    """With the transfers that the compiled schedule leaves exposed."""
    return max(self.compute, self.hbm) + self.serial_links


def tile_flops(config: DiTConfig, counted: Counted, *, train: bool) -> float:
  """FLOPs of self-attention on live tiles, over all layers and rows."""
  passes = _FORWARD
  if train:
    # These policies keep what attention put out, cuDNN's aside; the others run its forward pass again.
    keeping = ("none",) if config.attention == "gpu" else ("none", "dots", "attention")
    again = 0 if config.remat in keeping else _FORWARD
    passes = _FORWARD + _BACKWARD + again
  return 2.0 * passes * counted.live_tiles * math.prod(counted.tile) * config.width * config.depth


def matmul_flops(jaxpr) -> float:
  """FLOPs of the dot products of a jaxpr over the whole mesh, scans multiplied out.

  Loops of unknown length, kernels and what runs per device (attention) are left out.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      (contract, _), _ = equation.params["dimension_numbers"]
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      total += 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contract)
    elif name not in ("while", "pallas_call", "shard_map"):
      times = equation.params.get("length", 1) if name == "scan" else 1
      for value in equation.params.values():
        total += times * sum(matmul_flops(j) for j in _jaxprs(value))
  return total


def _jaxprs(value) -> list:
  values = value if isinstance(value, tuple | list) else [value]
  found = [getattr(v, "jaxpr", v) for v in values]
  return [j for j in found if hasattr(j, "eqns")]


def spans(topology: Topology, mesh: Mesh) -> dict[str, list[int]]:
  """Mesh axis -> how many places of each physical dim (slice, torus..., core) one of its rings visits."""
  devices = mesh.devices
  grid = np.array([topology_lib.place(topology, d) for d in devices.flat]).reshape(*devices.shape, -1)
  result = {}
  for i, axis in enumerate(mesh.axis_names):
    line = np.moveaxis(grid, i, 0)[(slice(None), *[0] * (devices.ndim - 1))]
    result[axis] = [len(set(line[:, d].tolist())) for d in range(line.shape[1])]
  return result


def collective_seconds(
  c: Collective, visits: dict[str, list[int]], topology: Topology
) -> tuple[float, float]:
  """(links, network) seconds per step of one collective, from the bytes that each device sends."""
  chip, dims = topology.chip, topology.dims
  if topology.is_gpu:
    return gpu.collective_seconds(c, visits, chip)
  sizes = np.prod([visits[axis] for axis in c.axes], axis=0)
  slices, torus = int(sizes[0]), [int(n) for n in sizes[1 : 1 + len(dims)]]
  links = sum(
    # A ring has a way round both sides; a line's bottleneck has one.
    2 if n == size and size % chip.wrap_from == 0 else 1
    for n, size in zip(torus, dims)
    if n > 1
  )
  seconds = network = 0.0
  if links and c.kind == "all-to-all":
    # Every byte crosses a quarter of a ring (a third of a line) of the longest dim on average.
    longest, both = max((n, n == size and size % chip.wrap_from == 0) for n, size in zip(torus, dims))
    seconds = c.count * c.payload * longest / ((8 if both else 4) * chip.link_rate)
  elif links:
    seconds = c.bytes_per_step / (links * chip.link_rate)
  if slices > 1:  # each device carries its share of what a slice has already joined
    network = c.bytes_per_step / max(c.group // slices, 1) / chip.network_rate
  return seconds, network


def times(
  *,
  flops_per_device: float,
  hbm_bytes: float,
  collectives: Sequence[Collective],
  topology: Topology,
  mesh: Mesh,
) -> Times:
  visits, chip = spans(topology, mesh), topology.chip
  pairs = [(c, *collective_seconds(c, visits, topology)) for c in collectives]
  return Times(
    compute=flops_per_device / chip.flops,
    hbm=hbm_bytes / chip.hbm_rate,
    links=sum(links for _, links, _ in pairs),
    network=sum(network for _, _, network in pairs),
    serial_links=sum(links + network for c, links, network in pairs if not c.overlapped),
  )


def trace_flops(step, *arguments) -> float:
  """`matmul_flops` of a jitted function on shapes alone."""
  return matmul_flops(step.trace(*arguments).jaxpr.jaxpr)
