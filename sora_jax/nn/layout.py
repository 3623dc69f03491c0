"""Where activations lie on the mesh."""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sora_jax.parallel.mesh import ROW_AXES
from sora_jax.types import Array


def by_rows(x: Array, *, tokens: bool = False) -> Array:
  """Says of x (B, ...) that rows lie as those of the batch do: over (replica, fsdp), `tokens` over context.

  Parameters are split over fsdp by width, and so is what is looked up in a table. Unless told, the
  partitioner lets that layout spread: every device then holds all rows of a part of the width, and each
  product ends in a sum over the mesh of activations instead of a gather of weights.
  """
  free = free_axes()
  if math.prod(free.values()) == 1:
    return x
  dims = [dividing(x.shape[0], ROW_AXES, free)]
  if tokens:
    dims.append(dividing(x.shape[1], ("context",), free))
  return jax.lax.with_sharding_constraint(x, P(*dims))


def free_axes() -> dict[str, int]:
  """Sizes of the axes of the mesh in force; those that are manual belong to a shard_map around this call."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
  return {axis: size for axis, size, kind in axes if kind == AxisType.Auto}


def dividing(size: int, axes: tuple[str, ...], free: dict[str, int]) -> tuple[str, ...]:
  """The leading `axes` whose sizes together divide `size`, skipping those that would not."""
  taken = ()
  for axis in axes:
    if axis in free and size % math.prod(free[a] for a in (*taken, axis)) == 0:
      taken += (axis,)
  return taken
