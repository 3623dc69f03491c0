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
  found: dict[int, int] = {}
  for count in sorted({len(clip["hashes"]) for clip in clips}):  # images, then videos
    group = [i for i, clip in enumerate(clips) if len(clip["hashes"]) == count]
    marks = np.array([[int(h, 16) for h in clips[i]["hashes"]] for i in group], np.uint64)
    cells = np.stack([np.frombuffer(bytes.fromhex(clips[i]["cells"]), np.uint8) for i in group])
    found |= {group[i]: group[j] for i, j in _repeats(marks, cells, distance, cell).items()}
  return found


def _repeats(marks: np.ndarray, cells: np.ndarray, distance: int, cell: float) -> dict[int, int]:
  tables: list[dict[int, list[int]]] = [collections.defaultdict(list) for _ in range(_BANDS)]
  found = {}
  for i, mark in enumerate(marks):
    bands = _bands(int(mark[len(mark) // 2]))
    near = {
      j
      for table, band in zip(tables, bands)
      for flip in _FLIPS
      for j in table.get(band ^ flip, ())
    }  # fmt: skip
    same = _first_alike(i, np.array(sorted(near), np.int64), marks, cells, distance, cell)
    if same is not None:
      found[i] = same
      continue
    for table, band in zip(tables, bands):
      table[band].append(i)
  return found


def _bands(mark: int) -> list[int]:
  return [mark >> (_BAND_BITS * b) & 0xFFFF for b in range(_BANDS)]


def _first_alike(i: int, near: np.ndarray, marks, cells, distance: int, cell: float) -> int | None:
  near = near[np.bitwise_count(marks[near] ^ marks[i]).max(axis=1, initial=0) <= distance]
  for j in near:
    if np.abs(cells[i].astype(np.int16) - cells[j]).max() <= cell:
      return int(j)
  return None
