"""The device mesh and how a batch lies on it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("replica", "fsdp", "context", "tensor")
ROW_AXES = ("replica", "fsdp")
# Fields of a TokenBatch whose second dim is the tokens of a row.
TOKEN_FIELDS = ("tokens_BLC", "segment_BL", "position_BL3", "given_BL")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 = all the rest."""

  replica: int = 1  # whole copies of the parameters
  fsdp: int = -1  # parameters split, rows split
  context: int = 1  # tokens of a row split
  tensor: int = 1  # heads and mlp split

  def sizes(self, num_devices: int, num_slices: int = 1) -> tuple[int, int, int, int]:
    sizes = [getattr(self, axis) for axis in AXES]
    shown = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, sizes))
    if any(n == 0 or n < -1 for n in sizes) or sizes.count(-1) > 1:
      raise ValueError(f"mesh ({shown}): every axis must be >= 1, and at most one may be -1 (= the rest)")
    fixed = math.prod(n for n in sizes if n != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
      raise ValueError(
        f"mesh ({shown}) needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, but there are "
        f"{num_devices}; change config.mesh, or set one axis to -1 to take the rest"
      )
    sizes = tuple(num_devices // fixed if n == -1 else n for n in sizes)
    _check_slices(sizes, num_slices)
    return sizes


def _check_slices(sizes: tuple[int, ...], num_slices: int) -> None:
  if sizes[0] % num_slices:
    raise ValueError(
      f"mesh axis replica={sizes[0]} is not a multiple of the {num_slices} slices, which only it may span; "
      "set config.mesh.replica to -1 and the other axes to the devices of one slice"
    )


def make_mesh(config: MeshConfig | Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with Auto axes over all devices (or those given)."""
  if isinstance(config, Mesh):
    return config
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes(len(devices))
  return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  """Devices ordered so that each axis lies on torus dims of its own where sizes allow, inner axes nearest.

  Slices are joined by a network far slower than their links: only the replica axis may cross it. Of GPUs jax
  calls every host a slice; any axis may cross their network, outer ones first.
  """
  num_slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
  if num_slices == 1 or devices[0].platform == "gpu":
    return _torus(sizes, devices)
  _check_slices(sizes, num_slices)
  slices = [
    [d for d in devices if (getattr(d, "slice_index", 0) or 0) == i]
    for i in sorted({getattr(d, "slice_index", 0) or 0 for d in devices})
  ]
  inner = (sizes[0] // num_slices, *sizes[1:])
  return np.concatenate([_torus(inner, part) for part in slices])


def _torus(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # an axis is no product of torus dims: works, but its rings share links
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def data_devices(mesh: Mesh) -> int:
  """Devices that rows are split over."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def batch_sharding(mesh: Mesh, batch, *, leading: int = 0):
  """Shardings of a TokenBatch (of arrays or shapes): rows over (replica, fsdp), tokens over context.

  `leading` unsharded dims come before the rows (micro-batches).
  """
  data = data_devices(mesh)

  def one(name: str, x) -> NamedSharding:
    rows = x.shape[leading]
    if rows % data:
      raise ValueError(
        f"{rows} rows per (micro-)batch do not divide over the {data} devices of mesh axes {ROW_AXES}; make "
        f"data.rows a multiple of {data} times the accumulation, or give devices to context or tensor"
      )
    dims = [None] * leading + [ROW_AXES]
    if name in TOKEN_FIELDS and x.shape[leading + 1] % mesh.shape["context"] == 0:
      dims.append("context")
    return NamedSharding(mesh, P(*dims))

  arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  return type(batch)(**{name: None if x is None else one(name, x) for name, x in arrays.items()})


def local_rows(mesh: Mesh, rows: int) -> slice:
  """The global rows that this process must load."""
  sharding = NamedSharding(mesh, P(ROW_AXES))
  data = data_devices(mesh)
  if rows % data:
    raise ValueError(f"data.rows = {rows} is not a multiple of the {data} devices of mesh axes {ROW_AXES}")
  held = np.zeros(rows, bool)
  for (index,) in sharding.addressable_devices_indices_map((rows,)).values():
    held[index] = True
  start, stop = int(held.argmax()), rows - int(held[::-1].argmax())
  assert held[start:stop].all(), "the rows of one process are not contiguous in this mesh"
  return slice(start, stop)
