"""Randomness that is a function of integers alone: the same on every host, platform and numpy version."""

import math

import numpy as np


def hash64(*parts: int | np.ndarray) -> np.ndarray:
  """Mixes integers into uint64 by splitmix64: the same on every platform and numpy version."""
  h = np.zeros(np.broadcast_shapes(*(np.shape(p) for p in parts)), np.uint64)
  with np.errstate(over="ignore"):
    for part in parts:
      h = (h ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
      h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      h = h ^ (h >> np.uint64(31))
  return h


def uniform(*parts: int | np.ndarray) -> np.ndarray:
  """Deterministic numbers in [0, 1) of the integers `parts`."""
  return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def bijection(x: int, size: int, *parts: int | np.ndarray) -> np.ndarray:
  """Where place `x` of `size` goes in a shuffle that `parts` pick: one shuffle each, in O(1) memory.

  A Feistel network over a rectangle of at least `size` cells, walked until it comes back within them
  (Black and Rogaway, CT-RSA 2002).
  """
  side = math.isqrt(size - 1) + 1 if size > 1 else 1
  other = -(-size // side)
  at = np.full(np.broadcast_shapes(*(np.shape(p) for p in parts)), x, np.int64)
  outside = np.ones(at.shape, bool)
  parts = [np.broadcast_to(p, at.shape) for p in parts]
  while outside.any():
    left, right = np.divmod(at[outside], other)
    keys = [p[outside] for p in parts]
    for turn in range(0, 6, 2):
      left = (left + _draw(side, *keys, turn, right)) % side
      right = (right + _draw(other, *keys, turn + 1, left)) % other
    at[outside] = left * other + right
    outside = at >= size
  return at


def _draw(below: int, *parts: int | np.ndarray) -> np.ndarray:
  return (hash64(*parts) % np.uint64(below)).astype(np.int64)
