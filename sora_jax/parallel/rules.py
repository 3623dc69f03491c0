"""Logical axis names of parameters -> mesh axes.

A module names the dims of a parameter in our own metadata, which needs no mesh:

  self.w = nnx.Param(init(key, (D, F)), logical=("embed", "mlp"))
  nnx.Linear(D, F, rngs=rngs, kernel_init=nnx.with_metadata(init, logical=("embed", "mlp")))

A parameter with one dim more than names is a stack over layers, and gets "layers" in front.
"""

import dataclasses
import math

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = dict
LAYERS = "layers"


def logical_names(variable: nnx.Variable) -> tuple[str | None, ...] | None:
  """The names of a variable's dims, "layers" put before those of a stack; None where it bears no names."""
  names, ndim = variable.get_metadata().get("logical"), len(variable.get_value().shape)
  if names is None:
    return None
  if len(names) + 1 == ndim:
    return (LAYERS, *names)
  if len(names) != ndim:
    raise ValueError(f"logical names {names} do not fit a parameter of shape {variable.get_value().shape}")
  return tuple(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Which mesh axes each logical axis is split over; absent names and dims that do not divide are not.

  Of several axes all are taken where that leaves every device `tile` rows, else the first alone: parameters
  split over context too need less memory, and their gradients are scattered at once where they would first be
  summed over context.
  """

  table: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("embed", ("fsdp", "context")),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", None),
    (LAYERS, None),
  )
  small: int = 2**14  # elements below which a tensor without an fsdp dim may stay whole
  large: int = 1_000_000  # elements above which a tensor that stays whole is an error
  # Rows of a shard below which libtpu gathers by all-reduce, at twice the bytes (0.0.42: so of 16 and 48, not
  # of 64 and 96; docs/results.md).
  tile: int = 64

  def spec(self, shape: tuple[int, ...], names: tuple[str | None, ...] | None, mesh: Mesh, path: str) -> P:
    names = (None,) * len(shape) if names is None else names
    table, dims, split = dict(self.table), [None] * len(shape), set()
    if len(shape) - (LAYERS in names) >= 2:  # vectors are cheaper whole than gathered
      for i, name in enumerate(names):
        axes = self._axes(shape[i], table.get(name), mesh)
        new = {axes} if isinstance(axes, str) else set(axes or ())
        if name != LAYERS and new and not new & split:
          dims[i] = axes
          split |= new
    size, fsdp = math.prod(shape), mesh.shape["fsdp"]
    if "fsdp" not in split and size >= self.small:
      free = [i for i, d in enumerate(dims) if d is None and names[i] != LAYERS and shape[i] % fsdp == 0]
      if free:
        dims[max(free, key=lambda i: shape[i])] = "fsdp"
        split.add("fsdp")
    if fsdp > 1 and "fsdp" not in split and size > self.large:
      raise ValueError(
        f"parameter {path} of shape {shape} ({size:,} elements, logical axes {names}) has no dim that "
        f"fsdp={fsdp} divides and would be copied whole to every device; change its size or the mesh"
      )
    return P(*dims)

  def _axes(self, size: int, axes: str | tuple[str, ...] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    """What of `axes` splits a dim of `size`."""
    if isinstance(axes, tuple):
      wide = tuple(axis for axis in axes if mesh.shape[axis] > 1)
      if len(wide) > 1 and size % (self.tile * math.prod(mesh.shape[axis] for axis in wide)) == 0:
        return wide
      axes = axes[0]
    return axes if axes and size % mesh.shape[axes] == 0 else None

  def shardings(self, abstract: nnx.State, mesh: Mesh) -> PyTree:
    """A pure dict of NamedShardings for a State of (abstract) variables."""

    def one(path, variable) -> NamedSharding:
      name = "/".join(str(getattr(k, "key", k)) for k in path)
      return NamedSharding(mesh, self.spec(variable.get_value().shape, logical_names(variable), mesh, name))

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_variable)
    return nnx.to_pure_dict(tree)
