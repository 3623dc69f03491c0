"""The numbers of a step on their way to the host: one array for each type of number, not one for each number.

An array costs the host some 30 us to return and to fetch, whatever it holds; a step has some thirty numbers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sora_jax.types import Array, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """What `pack` made; goes out of a jitted function as its arrays alone."""

  arrays: dict[str, Array]  # type of number -> the numbers of that type
  layout: Any = dataclasses.field(metadata={"static": True})  # (structure, (type, place) of every leaf)

  def is_ready(self) -> bool:
    return all(x.is_ready() for x in self.arrays.values())


def pack(tree: PyTree) -> Packed:
  """Of a tree of scalars; no value changes."""
  leaves, structure = jax.tree.flatten(tree)
  groups, places = {}, []
  for leaf in map(jnp.asarray, leaves):
    assert leaf.ndim == 0, leaf.shape
    group = groups.setdefault(leaf.dtype.name, [])
    places.append((leaf.dtype.name, len(group)))
    group.append(leaf)
  return Packed({name: jnp.stack(group) for name, group in groups.items()}, (structure, tuple(places)))


def unpack(packed: Packed) -> PyTree:
  """The tree, of Python's numbers; waits for the device."""
  values = {name: x.tolist() for name, x in jax.device_get(packed.arrays).items()}
  structure, places = packed.layout
  return jax.tree.unflatten(structure, [values[name][place] for name, place in places])
