"""Lengths into rows."""

import collections
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

METHODS = ("best_fit", "greedy")
_SPREAD_SHARES = (0.9, 0.75, 0.5)  # of the tokens, tried in turn
_SUBSET_IDS = 1024  # windows up to this are small enough for an exact filling

Row = tuple[int, ...]


def plan_window(
  lengths: Sequence[int] | np.ndarray,
  *,
  row_tokens: int,
  max_samples: int,
  method: str = "best_fit",
  cost: tuple[float, float] = (1.0, 0.0),
) -> list[Row]:
  """Rows as tuples of positions in `lengths`, none over `row_tokens` tokens or `max_samples` samples.

  "best_fit": best-fit decreasing; then, in the same number of rows, the longer samples are dealt out so that
  rows cost alike by a * sum(l) + b * sum(l^2), `cost` = (a, b), and only the shorter ones are fitted tightly;
  small windows are filled row by row where that takes fewer rows.
  "greedy": first fit in the order of arrival (Patch n' Pack, arXiv 2307.06304).
  """
  lengths = np.asarray(lengths, np.int64)
  assert lengths.size == 0 or 0 < lengths.min() <= lengths.max() <= row_tokens
  if method == "best_fit":
    return _best_fit(lengths, row_tokens, max_samples, cost) if len(lengths) else []
  if method == "greedy":
    return _first_fit(lengths, row_tokens, max_samples)
  raise ValueError(f"packing method {method!r} is none of {', '.join(METHODS)}")


def _best_fit(lengths: np.ndarray, row_tokens: int, max_samples: int, cost: tuple[float, float]) -> list[Row]:
  order = np.argsort(-lengths, kind="stable")
  sorted_lengths = lengths[order]
  rows = fill_tightest(sorted_lengths, [], 0, row_tokens, max_samples)
  if cost != (0.0, 0.0) and len(rows) > 1:
    done = np.cumsum(sorted_lengths) / sorted_lengths.sum()
    fewest = max(-(-int(lengths.sum()) // row_tokens), -(-len(lengths) // max_samples))
    # Best fit heaps short samples up; where their number, not their length, ends rows, dealing saves rows.
    is_wasteful = len(rows) - fewest > 0.01 * len(rows)
    targets = sorted({fewest, fewest + 1, (fewest + len(rows)) // 2, len(rows) - 1}) if is_wasteful else ()
    for target, share in itertools.product((*targets, len(rows)), _SPREAD_SHARES):
      first = int(np.searchsorted(done, share))
      even = spread(sorted_lengths[:first], target, row_tokens, max_samples, cost)
      even = fill_tightest(sorted_lengths, even, first, row_tokens, max_samples) if even else []
      even = [row for row in even if row]  # the tightest fit may leave a row that was dealt nothing empty
      if even and len(even) <= target:  # the most even packing in the fewest rows
        rows = even
        break
  if len(lengths) <= _SUBSET_IDS and len(rows) > -(-int(lengths.sum()) // row_tokens):
    exact = _fill_exactly(sorted_lengths, row_tokens, max_samples)
    rows = exact if exact and len(exact) < len(rows) else rows
  order_list = order.tolist()
  return [tuple(order_list[i] for i in row) for row in rows]


def spread(
  lengths: np.ndarray, num_rows: int, row_tokens: int, max_samples: int, cost: tuple[float, float]
) -> list[list[int]]:
  """Deals samples, longest first, each to the row cheapest so far; nothing where that row has no room."""
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  room = [row_tokens] * num_rows
  costs = (cost[0] * lengths + cost[1] * lengths.astype(np.float64) ** 2).tolist()
  heap = [(0.0, r) for r in range(num_rows)]
  for i, length in enumerate(lengths.tolist()):
    total, r = heap[0]
    if room[r] < length:
      return []
    rows[r].append(i)
    room[r] -= length
    if len(rows[r]) < max_samples:
      heapq.heapreplace(heap, (total + costs[i], r))
    else:
      heapq.heappop(heap)
    if not heap:
      return rows if i + 1 == len(lengths) else []
  return rows


def fill_tightest(
  lengths: np.ndarray, rows: list[list[int]], start: int, row_tokens: int, max_samples: int
) -> list[list[int]]:
  """Best fit of the (descending) lengths from `start` on into `rows`, which already hold those before."""
  with_room: dict[int, list[list[int]]] = collections.defaultdict(list)  # tokens left -> rows
  mask = 0  # bit r: some open row has r tokens left, so the tightest fit is one shift and one lowest bit
  length_list = lengths.tolist()
  for row in rows:
    room = row_tokens - sum(length_list[i] for i in row)
    if room and len(row) < max_samples:
      with_room[room].append(row)
      mask |= 1 << room
  ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))
  for end in ends[np.searchsorted(ends, start, side="right") :].tolist():
    length = length_list[start]
    while start < end:
      fits = mask >> length
      if fits:
        room = length + (fits & -fits).bit_length() - 1
        row = with_room[room].pop()
        if not with_room[room]:
          mask ^= 1 << room
      else:
        room, row = row_tokens, []
        rows.append(row)
      # Items of one length go on into the same row: after the first it is the tightest.
      count = min(room // length, max_samples - len(row), end - start)
      row.extend(range(start, start + count))
      start, room = start + count, room - count * length
      if room and len(row) < max_samples:
        with_room[room].append(row)
        mask |= 1 << room
  return rows


def _fill_exactly(lengths: np.ndarray, row_tokens: int, max_samples: int) -> list[list[int]]:
  """Row by row: the longest sample left and the subset of the others that fills the row best (minimum bin
  slack, Gupta and Ho 1999), by subset sums as bits of an integer: for windows of few, similar lengths."""
  left: dict[int, list[int]] = {}
  for i, length in reversed(list(enumerate(lengths.tolist()))):
    left.setdefault(length, []).append(i)  # ascending lengths
  full, rows = (1 << (row_tokens + 1)) - 1, []
  while left:
    longest = max(left)
    row = [left[longest].pop()]
    steps, sums = [], 1 << longest  # bit s: some subset with the longest has s tokens
    for length, items in left.items():
      for _ in range(min(len(items), (row_tokens - longest) // length)):
        steps.append((length, sums))
        sums |= (sums << length) & full
    total = sums.bit_length() - 1
    for length, before in reversed(steps):  # longer samples first: fewer of them
      if total >= length and before >> (total - length) & 1:
        row.append(left[length].pop())
        total -= length
    assert total == longest
    if len(row) > max_samples:
      return []
    rows.append(row)
    left = {length: items for length, items in left.items() if items}
  return rows


def _first_fit(lengths: np.ndarray, row_tokens: int, max_samples: int) -> list[Row]:
  shortest = int(lengths.min()) if len(lengths) else 1
  rows: list[list[int]] = []
  room = np.zeros(len(lengths), np.int64)
  first_open = 0
  for i, length in enumerate(lengths.tolist()):
    fits = room[first_open : len(rows)] >= length
    r = first_open + int(fits.argmax()) if len(fits) else 0
    if r >= len(rows) or room[r] < length:
      r = len(rows)
      rows.append([])
      room[r] = row_tokens
    rows[r].append(i)
    room[r] = room[r] - length if len(rows[r]) < max_samples else 0
    while first_open < len(rows) and room[first_open] < shortest:
      first_open += 1
  return [tuple(row) for row in rows]
