"""Near-duplicates by the Hamming distance of hashes, without comparing all with all.

A hash of 64 bits has four bands of 16. Where two hashes differ in at most 7 bits, one band differs in at most
one: every pair is found by looking up each band as it is and with each of its bits turned, 68 look-ups.
A hash sees little: two takes of one speaker before one wall have the same. So the colours of 144 cells of
three frames are compared as well. The first of a group, in the order of the input, is kept.
"""

import collections
from typing import Any

import numpy as np

_BANDS, _BAND_BITS = 4, 16
_FLIPS = [0, *(1 << bit for bit in range(_BAND_BITS))]


def duplicates(clips: list[dict[str, Any]], distance: int, cell: float) -> dict[int, int]:
  """{number of a clip: number of the earlier clip it repeats}."""
  marks = [np.array([int(h, 16) for h in clip["hashes"]], np.uint64) for clip in clips]
  cells = [np.frombuffer(bytes.fromhex(clip["cells"]), np.uint8).astype(np.int16) for clip in clips]
  tables: list[dict[int, list[int]]] = [collections.defaultdict(list) for _ in range(_BANDS)]
  found = {}
  for i, mark in enumerate(marks):
    bands = _bands(int(mark[len(mark) // 2]))
    near = {
      j
      for table, band in zip(tables, bands)
      for flip in _FLIPS
      for j in table.get(band ^ flip, ())
      if len(marks[j]) == len(mark)
    }
    same = next((j for j in sorted(near) if _alike(mark, marks[j], cells[i], cells[j], distance, cell)), None)
    if same is not None:
      found[i] = same
      continue
    for table, band in zip(tables, bands):
      table[band].append(i)
  return found


def _bands(mark: int) -> list[int]:
  return [mark >> (_BAND_BITS * b) & 0xFFFF for b in range(_BANDS)]


def _alike(a: np.ndarray, b: np.ndarray, cells_a, cells_b, distance: int, cell: float) -> bool:
  if np.bitwise_count(a ^ b).max() > distance:
    return False
  return float(np.abs(cells_a - cells_b).max()) <= cell
