"""What a rehearsal refuses: each finding names the figure and the remedy."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from sora_jax.rehearsal.collectives import Collective
from sora_jax.rehearsal.topology import Topology

HBM_SHARE = 0.9  # of the chip's; the rest is for fragmentation, prefetched batches and what the run adds
LARGE = 1_000_000  # elements of a tensor that must not be whole on every device
TILE_ROWS = 16  # rows of a bf16 tile
OVERLAP_FROM = 1e9  # bytes per step and device, below which exposed transfers do not matter


@dataclasses.dataclass(frozen=True)
class Lint:
  name: str
  message: str


def replicated(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[Lint]:
  return [
    Lint(
      "replicated",
      f"{name} of shape {shape} ({math.prod(shape):,} elements) lies whole on every device; give one of its "
      "dims a size that mesh.fsdp divides, or name its logical axes",
    )
    for name, shape in tensors
  ]


def shard_rows(
  shards: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]], *, mesh_shape: Mapping[str, int]
) -> list[Lint]:
  """Matrices whose split dim leaves a device a fraction of a tile: gathers become padded all-reduces."""
  bad = [
    (name, shape, n)
    for name, shape, shard in shards
    if math.prod(shape) > LARGE
    for whole, n in zip(shape, shard)
    if n < whole and n % TILE_ROWS
  ]
  if not bad:
    return []
  name, shape, rows = bad[0]
  return [
    Lint(
      "shard_rows",
      f"{len(bad)} tensors have shards of rows that are no multiple of {TILE_ROWS}, the bf16 tile: {name} of "
      f"shape {shape} leaves {rows}; lower mesh.fsdp (= {mesh_shape['fsdp']}), raising mesh.replica, or make "
      f"model.width a multiple of {TILE_ROWS} times it",
    )
  ]


def torus(
  topology: Topology, visits: Mapping[str, Sequence[int]], mesh_shape: Mapping[str, int]
) -> list[Lint]:
  """Mesh axes of which a ring visits part of a torus dim: rings then share links or do not close."""
  if topology.is_gpu:
    return hosts(topology, visits, mesh_shape)
  found = []
  dims = (topology.num_slices, *topology.dims)
  sizes = sorted(
    {math.prod(c) for n in range(len(dims)) for c in itertools.combinations(topology.dims, n + 1)}
  )
  for axis, visited in visits.items():
    split = [f"{n} of {size}" for n, size in zip(visited, dims) if 1 < n < size]
    if split and mesh_shape[axis] > 1:
      found.append(
        Lint(
          "torus",
          f"mesh.{axis} = {mesh_shape[axis]} spans {' and '.join(split)} chips of a torus dim of "
          f"{topology.name}; make every axis a product of whole dims: {', '.join(map(str, sizes))}",
        )
      )
  return found


def hosts(
  topology: Topology, visits: Mapping[str, Sequence[int]], mesh_shape: Mapping[str, int]
) -> list[Lint]:
  """Mesh axes whose exchanges, several a layer, would leave the links of a host for the network."""
  chip, gpus = topology.chip, topology.dims[1]
  return [
    Lint(
      "hosts",
      f"mesh.{axis} = {mesh_shape[axis]} spans {visits[axis][1]} hosts of {topology.name}: exchanges take "
      f"the network ({chip.network_rate / 1e9:.0f} GB/s) and not NVLink ({chip.link_rate / 1e9:.0f} GB/s); "
      f"keep context x tensor a divisor of the {gpus} GPUs of a host",
    )
    for axis in ("context", "tensor")
    if visits[axis][1] > 1
  ]


def overlap(collectives: Sequence[Collective]) -> list[Lint]:
  total = sum(c.bytes_per_step for c in collectives)
  hidden = sum(c.bytes_per_step for c in collectives if c.overlapped)
  if total < OVERLAP_FROM or hidden > 0:
    return []
  return [
    Lint(
      "overlap",
      f"none of {total / 1e9:.1f} GB of collectives per step and device runs beside compute; set "
      "LIBTPU_INIT_ARGS to what python -m sora_jax.xla_flags --generation=... prints",
    )
  ]


def memory(peak: float, limit: float, *, at_least: bool = False) -> list[Lint]:
  """`at_least`: the compiler gave up at temporaries of this size, to which the arguments come."""
  if peak <= HBM_SHARE * limit:
    return []
  return [
    Lint(
      "memory",
      f"needs {'at least ' * at_least}{peak / 2**30:.1f} GiB of HBM per chip, {peak / limit:.0%} of its "
      f"{limit / 2**30:.1f} GiB, where {HBM_SHARE:.0%} is the most; {MEMORY_REMEDY}",
    )
  ]


MEMORY_REMEDY = (
  'set model.remat to "full", raise mesh.context or mesh.fsdp, lower data.rows or data.row_tokens, raise '
  "train.accumulate, or take a larger slice"
)


def batch(rows: int, accumulate: int, mesh_shape: Mapping[str, int]) -> list[Lint]:
  data = mesh_shape["replica"] * mesh_shape["fsdp"]
  if rows % accumulate == 0 and rows // accumulate % data == 0:
    return []
  step = data * accumulate
  nearest = " or ".join(str(n) for n in (rows // step * step, -(-rows // step) * step) if n)
  return [
    Lint(
      "batch",
      f"data.rows = {rows} in train.accumulate = {accumulate} parts does not divide over replica x fsdp = "
      f"{data} devices; make data.rows {nearest}",
    )
  ]


def tokens(row_tokens: int, mesh_shape: Mapping[str, int]) -> list[Lint]:
  context = mesh_shape["context"]
  if row_tokens % context == 0:
    return []
  return [
    Lint(
      "batch",
      f"data.row_tokens = {row_tokens} does not divide over mesh.context = {context}: every device would "
      f"hold whole rows; make it a multiple of {context}",
    )
  ]


def heads(num_heads: int, mesh_shape: Mapping[str, int]) -> list[Lint]:
  split = mesh_shape["context"] * mesh_shape["tensor"]
  if num_heads % split == 0:
    return []
  return [
    Lint(
      "heads",
      f"model.heads = {num_heads} does not divide over context x tensor = {split}: attention would be "
      "computed more than once; lower mesh.context or mesh.tensor, or change model.heads",
    )
  ]
