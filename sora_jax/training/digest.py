"""A digest of arrays that does not depend on how they are laid out."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.types import Array, PyTree

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def _sums(tree: PyTree) -> list[Array]:
  """Of each leaf: sum over elements of bits * odd hash of the index, modulo 2^32.

  Integer sums that wrap around do not depend on their order, so any sharding gives the same value; an odd
  factor keeps every changed bit in the sum.
  """
  return [_leaf(x) for x in jax.tree.leaves(tree)]


def _leaf(x: Array) -> Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  for dim, size in enumerate(x.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
  h = (index + np.uint32(1)) * np.uint32(2654435761)
  h = (h ^ (h >> 15)) * np.uint32(2246822519)
  h = (h ^ (h >> 13)) | np.uint32(1)
  return (bits * h).sum(dtype=jnp.uint32)


def digest(tree: PyTree) -> str:
  """Hexadecimal digest of a tree of arrays, their paths and shapes included."""
  sums = [int(s) for s in jax.device_get(_sums(tree))]
  total = zlib.crc32(repr([*zip(shapes(tree).items(), sums)]).encode())
  return f"{total:08x}{sum(sums) & 0xFFFFFFFF:08x}"


def shapes(tree: PyTree) -> dict[str, str]:
  """Path -> shape and type of each leaf, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_path(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _path(path) -> str:
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
