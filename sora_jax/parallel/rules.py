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
  """Which mesh axis each logical axis is split over; absent names and dims that do not divide are not."""

  table: tuple[tuple[str, str | None], ...] = (
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", None),
    (LAYERS, None),
  )
  small: int = 2**14  # elements below which a tensor without an fsdp dim may stay whole
  large: int = 1_000_000  # elements above which a tensor that stays whole is an error

  def spec(self, shape: tuple[int, ...], names: tuple[str | None, ...] | None, mesh: Mesh, path: str) -> P:
    names = (None,) * len(shape) if names is None else names
    table, dims = dict(self.table), [None] * len(shape)
    if len(shape) - (LAYERS in names) >= 2:  # vectors are cheaper whole than gathered
      for i, name in enumerate(names):
        axis = table.get(name)
        if name != LAYERS and axis and axis not in dims and shape[i] % mesh.shape[axis] == 0:
          dims[i] = axis
    size, fsdp = math.prod(shape), mesh.shape["fsdp"]
    if "fsdp" not in dims and size >= self.small:
      free = [i for i, d in enumerate(dims) if d is None and names[i] != LAYERS and shape[i] % fsdp == 0]
      if free:
        dims[max(free, key=lambda i: shape[i])] = "fsdp"
    if fsdp > 1 and "fsdp" not in dims and size > self.large:
      raise ValueError(
        f"parameter {path} of shape {shape} ({size:,} elements, logical axes {names}) has no dim that "
        f"fsdp={fsdp} divides and would be copied whole to every device; change its size or the mesh"
      )
    return P(*dims)

  def shardings(self, abstract: nnx.State, mesh: Mesh) -> PyTree:
    """A pure dict of NamedShardings for a State of (abstract) variables."""

    def one(path, variable) -> NamedSharding:
      name = "/".join(str(getattr(k, "key", k)) for k in path)
      return NamedSharding(mesh, self.spec(variable.get_value().shape, logical_names(variable), mesh, name))

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_variable)
    return nnx.to_pure_dict(tree)
