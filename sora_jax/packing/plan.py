"""Which samples share a row: a pure function of (lengths, seed, step), computed alike on every host."""

import collections
import heapq
import itertools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

METHODS = ("best_fit", "greedy")
_CYCLE_IDS = 2**20  # groupings are planned afresh for about this many samples, then reused in a new order
_CACHED_WINDOWS = 8
_SPREAD_SHARES = (0.9, 0.75, 0.5)  # of the tokens, tried in turn
_SUBSET_IDS = 1024  # windows up to this are small enough for an exact filling

Row = tuple[int, ...]


class PlannedRow(NamedTuple):
  epoch: int
  ids: Row


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
  rows = _fill_tightest(sorted_lengths, [], 0, row_tokens, max_samples)
  if cost != (0.0, 0.0) and len(rows) > 1:
    done = np.cumsum(sorted_lengths) / sorted_lengths.sum()
    fewest = max(-(-int(lengths.sum()) // row_tokens), -(-len(lengths) // max_samples))
    # Best fit heaps short samples up; where their number, not their length, ends rows, dealing saves rows.
    is_wasteful = len(rows) - fewest > 0.01 * len(rows)
    targets = sorted({fewest, fewest + 1, (fewest + len(rows)) // 2, len(rows) - 1}) if is_wasteful else ()
    for target, share in itertools.product((*targets, len(rows)), _SPREAD_SHARES):
      first = int(np.searchsorted(done, share))
      even = _spread(sorted_lengths[:first], target, row_tokens, max_samples, cost)
      even = _fill_tightest(sorted_lengths, even, first, row_tokens, max_samples) if even else []
      even = [row for row in even if row]  # the tightest fit may leave a row that was dealt nothing empty
      if even and len(even) <= target:  # the most even packing in the fewest rows
        rows = even
        break
  if len(lengths) <= _SUBSET_IDS and len(rows) > -(-int(lengths.sum()) // row_tokens):
    exact = _fill_exactly(sorted_lengths, row_tokens, max_samples)
    rows = exact if exact and len(exact) < len(rows) else rows
  order_list = order.tolist()
  return [tuple(order_list[i] for i in row) for row in rows]


def _spread(
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


def _fill_tightest(
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


class RowPlan:
  """An endless stream of rows over epochs; step k takes rows [k * rows_per_step, (k + 1) * rows_per_step).

  Each epoch holds every sample exactly once, in a fresh shuffle cut into windows that are packed one by one.
  After about a million samples the groupings recur, windows and rows in a new order: finding the rows of any
  step so costs at most that much planning (or two epochs of it, for larger sets).
  """

  def __init__(
    self,
    lengths: Sequence[int] | np.ndarray,
    *,
    rows_per_step: int,
    row_tokens: int,
    max_samples: int,
    seed: int = 0,
    method: str = "best_fit",
    window: int = 4096,
    cost: tuple[float, float] = (1.0, 0.0),
    names: Sequence[str] | None = None,
  ):
    self.lengths = np.asarray(lengths, np.int64)
    if not len(self.lengths):
      raise ValueError("nothing to pack: the data set (or its split) has no sample")
    if method not in METHODS:
      raise ValueError(f"packing method {method!r} is none of {', '.join(METHODS)}")
    if self.lengths.max() > row_tokens:
      i = int(self.lengths.argmax())
      name = names[i] if names else f"sample {i}"
      raise ValueError(
        f"{name} has {self.lengths[i]} tokens but a row holds {row_tokens}: "
        "raise row_tokens or lower max_tokens"
      )
    assert self.lengths.min() > 0 and rows_per_step > 0 and max_samples > 0 and window > 0
    self.rows_per_step, self.seed, self.method = rows_per_step, seed, method
    self._fit = {"row_tokens": row_tokens, "max_samples": max_samples, "cost": tuple(cost)}
    self._windows = -(-len(self.lengths) // window)
    self._cycle = max(2, min(64, -(-_CYCLE_IDS // len(self.lengths))))  # epochs until groupings recur
    self._ends = np.zeros(1, np.int64)  # rows before each window of the cycle, as far as planned
    self._cache: collections.OrderedDict[tuple[int, int], list[Row]] = collections.OrderedDict()
    self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
    self._lock = threading.Lock()

  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def rows_of_step(self, step: int) -> list[PlannedRow]:
    return [self.row(r) for r in range(step * self.rows_per_step, (step + 1) * self.rows_per_step)]

  def row(self, index: int) -> PlannedRow:
    """Row `index` of the endless stream."""
    with self._lock:
      cycles, index = self._locate(index)
      slot = int(np.searchsorted(self._ends, index, side="right")) - 1
      base_epoch = slot // self._windows
      epoch = cycles * self._cycle + base_epoch
      w, index = slot % self._windows, index - int(self._ends[slot])
      if cycles:  # all windows are known: take them in a new order
        w, index = self._reorder(base_epoch, epoch, index + int(self._ends[slot] - self._ends[slot - w]))
      rows = self._window(base_epoch, w)
    order = np.argsort(hash64(self.seed, 1, epoch, w, np.arange(len(rows))), kind="stable")
    return PlannedRow(epoch, rows[order[index]])

  def rows_of_epoch(self, epoch: int) -> list[PlannedRow]:
    """Every row of one epoch, for a pass over held-out samples and for reports."""
    base = epoch % self._cycle
    with self._lock:
      return [PlannedRow(epoch, row) for w in range(self._windows) for row in self._window(base, w)]

  def stats(self, max_ids: int = 2**18, methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """Per packing method, over (at most `max_ids` samples of) the first epoch: rows, padding share, samples
    per row, and how much dearer than the mean the dearest row is."""
    windows = max(1, min(self._windows, max_ids * self._windows // len(self.lengths)))
    result = {}
    for method in methods:
      rows = [self.lengths[np.array(row)] for w in range(windows) for row in self._pack_window(0, w, method)]
      tokens = sum(int(row.sum()) for row in rows)
      a, b = self._fit["cost"]
      costs = np.array([a * row.sum() + b * (row.astype(float) ** 2).sum() for row in rows])
      result[method] = {
        "rows": len(rows),
        "padding": 1 - tokens / (len(rows) * self._fit["row_tokens"]),
        "samples_per_row": sum(map(len, rows)) / len(rows),
        "dearest_over_mean": float(costs.max() / costs.mean()) if costs.mean() else 1.0,
      }
    return result

  def _locate(self, index: int) -> tuple[int, int]:
    """(whole cycles before the row, row within the cycle); plans windows until the row is covered."""
    slots = self._cycle * self._windows
    ends = [int(self._ends[-1])]
    while len(self._ends) + len(ends) - 2 < slots and ends[-1] <= index:
      slot = len(self._ends) + len(ends) - 2
      ends.append(ends[-1] + len(self._window(*divmod(slot, self._windows))))
    if len(ends) > 1:
      self._ends = np.concatenate([self._ends, ends[1:]])
    if index < self._ends[-1]:
      return 0, index
    return divmod(index, int(self._ends[-1]))

  def _reorder(self, base_epoch: int, epoch: int, index: int) -> tuple[int, int]:
    first = base_epoch * self._windows
    counts = np.diff(self._ends[first : first + self._windows + 1])
    order = np.argsort(hash64(self.seed, 2, epoch, np.arange(self._windows)), kind="stable")
    ends = np.cumsum(counts[order])
    k = int(np.searchsorted(ends, index, side="right"))
    return int(order[k]), index - int(ends[k] - counts[order[k]])

  def _window(self, base_epoch: int, w: int) -> list[Row]:
    key = (base_epoch, w)
    if key not in self._cache:
      self._cache[key] = self._pack_window(base_epoch, w, self.method)
      if len(self._cache) > _CACHED_WINDOWS:
        self._cache.popitem(last=False)
    self._cache.move_to_end(key)
    return self._cache[key]

  def _pack_window(self, base_epoch: int, w: int, method: str) -> list[Row]:
    if self._order[0] != base_epoch:
      keys = hash64(self.seed, 0, base_epoch, np.arange(len(self.lengths)))
      self._order = (base_epoch, np.argsort(keys, kind="stable"))
    # Windows of nearly equal size: a small last one would pack badly.
    first, last = (math.floor(len(self.lengths) * k / self._windows) for k in (w, w + 1))
    ids = self._order[1][first:last]
    rows = plan_window(self.lengths[ids], method=method, **self._fit)
    id_list = ids.tolist()
    return [tuple(id_list[i] for i in row) for row in rows]
