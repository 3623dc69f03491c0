"""Which samples share a row: a pure function of (lengths, seed, step), computed alike on every host."""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.packing.balance import costs_of, pack_evenly
from sora_jax.packing.fit import METHODS, Row, plan_window
from sora_jax.packing.hashing import bijection, hash64

_CACHED_WINDOWS = 4
_ORDERS_ANEW = 2**20  # samples of a part: up to here, those of one length change places every epoch
_TRIED_WINDOWS = 32  # sizes of a window, for the one in which weights come out best

__all__ = ["METHODS", "PlannedRow", "RowPlan", "plan_window"]


class PlannedRow(NamedTuple):
  epochs: Row  # of each sample, of its own part
  ids: Row


@dataclasses.dataclass(frozen=True)
class _Part:
  """Samples [first, first + size) of the plan, split over `windows` windows, or `passes` times in each."""

  first: int
  size: int
  windows: int
  passes: int

  @property
  def strata(self) -> int:
    return -(-self.size // self.windows)


class RowPlan:
  """An endless stream of rows over epochs; step k takes rows [k * rows_per_step, (k + 1) * rows_per_step).

  The samples of a part, longest first, are cut into strata of as many samples as the epoch has windows; a
  window draws one sample of each stratum, a shuffle of its own per stratum and epoch. So all windows have
  nearly the same lengths, and one packing, that of the longest sample of every stratum, fits them all: any
  row of any step is found without planning those before it.

  `lengths` is (samples,) or (variants, samples): in epoch e, sample i has the length of variant
  `variants(e, i)`, another one every epoch until all were seen. `parts` are the sizes of the sources that the
  samples come from, in order; `weights` how many samples each gives to a row, relative to one another, as
  nearly as whole windows allow (`shares`); None = each sample equally often. Every part has its own epochs.
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
    parts: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
  ):
    lengths = np.asarray(lengths)
    self.lengths = np.atleast_2d(lengths if lengths.dtype == np.int32 else lengths.astype(np.int32))
    if not self.lengths.size:
      raise ValueError("nothing to pack: the data set (or its split) has no sample")
    if method not in METHODS:
      raise ValueError(f"packing method {method!r} is none of {', '.join(METHODS)}")
    if (longest := int(self.lengths.max())) > row_tokens:
      i = int(self.lengths.max(axis=0).argmax())
      name = names[i] if names else f"sample {i}"
      raise ValueError(
        f"{name} has {longest} tokens but a row holds {row_tokens}: raise row_tokens or lower max_tokens"
      )
    assert self.lengths.min() > 0 and rows_per_step > 0 and max_samples > 0 and window > 0
    sizes = tuple(parts or (self.lengths.shape[1],))
    assert sum(sizes) == self.lengths.shape[1] and min(sizes) > 0, sizes
    self.rows_per_step, self.seed, self.method, self.cost = rows_per_step, seed, method, tuple(cost)
    self.row_tokens, self.max_samples = row_tokens, max_samples
    self.parts = split_windows(sizes, weights, window)
    self._templates: dict[str, list[np.ndarray]] = {}
    self._cache: collections.OrderedDict[int, tuple[np.ndarray, ...]] = collections.OrderedDict()
    self._orders: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
    self._lock = threading.RLock()

  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_orders")}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(
      state, _lock=threading.RLock(), _cache=collections.OrderedDict(), _orders=collections.OrderedDict()
    )

  @property
  def shares(self) -> list[float]:
    """Of the samples of a window, by part."""
    counts = [p.size * p.passes / p.windows for p in self.parts]
    return [c / sum(counts) for c in counts]

  @property
  def rows_per_window(self) -> int:
    return len(self._template(self.method))

  @property
  def windows_per_epoch(self) -> int:
    """Of the part that takes longest."""
    return max(p.windows for p in self.parts)

  def rows_of_step(self, step: int) -> list[PlannedRow]:
    return [self.row(r) for r in range(step * self.rows_per_step, (step + 1) * self.rows_per_step)]

  def row(self, index: int) -> PlannedRow:
    """Row `index` of the endless stream; one that drew no sample is empty."""
    with self._lock:
      template = self._template(self.method)
      w, r = divmod(index, len(template))
      epochs, ids, order = self._window(w)
    slots = template[order[r]]
    slots = slots[ids[slots] >= 0]
    return PlannedRow(tuple(epochs[slots].tolist()), tuple(ids[slots].tolist()))

  def rows_of_epoch(self, epoch: int) -> list[PlannedRow]:
    """Every row of one epoch of the part that takes longest: for held-out samples and for reports."""
    count = self.windows_per_epoch * self.rows_per_window
    rows = [self.row(r) for r in range(epoch * count, (epoch + 1) * count)]
    return [row for row in rows if row.ids]

  def variants(self, epochs: int | np.ndarray, ids: int | np.ndarray) -> np.ndarray:
    """Row of `lengths` that samples have in their epochs."""
    count = np.uint64(len(self.lengths))
    return ((np.asarray(epochs).astype(np.uint64) + hash64(self.seed, 3, ids)) % count).astype(np.int64)

  def lengths_of(self, row: PlannedRow) -> np.ndarray:
    ids = np.array(row.ids, np.int64)
    return self.lengths[self.variants(np.array(row.epochs, np.int64), ids), ids]

  def stats(self, max_ids: int = 2**18, methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """Per packing method, over (at most about `max_ids` samples of) the first epoch: rows, padding share,
    samples per row, and how much dearer than the mean the dearest row is: of all, and of the rows of a step,
    averaged over the steps."""
    with self._lock:
      result, kept = {}, (self.method, self._cache)
      slots = sum(p.strata * p.passes for p in self.parts)
      windows = max(1, min(self.windows_per_epoch, max_ids // slots))
      for method in methods:
        self.method, self._cache = method, collections.OrderedDict()
        rows = [self.row(r) for r in range(windows * self.rows_per_window)]
        result[method] = self._stats_of([self.lengths_of(row) for row in rows if row.ids])
      self.method, self._cache = kept
    return result

  def _stats_of(self, rows: list[np.ndarray]) -> dict[str, float]:
    costs = np.array([float(costs_of(row, [range(len(row))], self.cost)[0]) for row in rows])
    steps = [costs[k : k + self.rows_per_step] for k in range(0, len(costs), self.rows_per_step)]
    steps = steps[:-1] if len(steps) > 1 and len(steps[-1]) < self.rows_per_step else steps
    return {
      "rows": len(rows),
      "padding": 1 - sum(int(row.sum()) for row in rows) / (len(rows) * self.row_tokens),
      "samples_per_row": sum(map(len, rows)) / len(rows),
      "dearest_over_mean": _dearest(costs),
      "dearest_over_mean_of_step": float(np.mean([_dearest(step) for step in steps])),
    }

  def _window(self, w: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(epochs, ids or -1, order of rows) of window `w`; slots part by part, pass by pass, longest first."""
    if w not in self._cache:
      epochs, ids = zip(*(self._draw(p, k, w, n) for p, k in enumerate(self.parts) for n in range(k.passes)))
      keys = hash64(self.seed, 1, w, np.arange(len(self._template(self.method))))
      self._cache[w] = (np.concatenate(epochs), np.concatenate(ids), np.argsort(keys, kind="stable"))
      if len(self._cache) > _CACHED_WINDOWS:
        self._cache.popitem(last=False)
    self._cache.move_to_end(w)
    return self._cache[w]

  def _draw(self, p: int, part: _Part, w: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pass `n` of window `w` over a part: a sample of each stratum."""
    epoch, place = divmod(w, part.windows)
    epoch = epoch * part.passes + n
    strata = np.arange(part.strata)
    at = strata * part.windows + bijection(place, part.windows, self.seed, 0, epoch, p, strata)
    order = self._order(p, epoch)
    ids = np.where(at < part.size, part.first + order[np.minimum(at, part.size - 1)].astype(np.int64), -1)
    return np.full(len(ids), epoch, np.int64), ids

  def _order(self, p: int, epoch: int) -> np.ndarray:
    """Places in a part, longest first in that epoch."""
    part = self.parts[p]
    epoch = epoch if part.size <= _ORDERS_ANEW else epoch % len(self.lengths)
    if (p, epoch) not in self._orders:
      ids = part.first + np.arange(part.size)
      lengths = (
        self.lengths[0, ids] if len(self.lengths) == 1 else self.lengths[self.variants(epoch, ids), ids]
      )
      ties = hash64(self.seed, 2, epoch, ids) >> np.uint64(32)
      keys = (-lengths.astype(np.int64) << np.int64(32)) + ties.astype(np.int64)
      self._orders[p, epoch] = np.argsort(keys, kind="stable").astype(np.uint32)
      if len(self._orders) > 2 * len(self.parts):
        self._orders.popitem(last=False)
    self._orders.move_to_end((p, epoch))
    return self._orders[p, epoch]

  def _template(self, method: str) -> list[np.ndarray]:
    """Slots of each row of a window: packed for the longest sample that each stratum has in any variant."""
    if method not in self._templates:
      longest = []
      for p, part in enumerate(self.parts):
        first = np.arange(part.strata) * part.windows
        tops = [self.lengths_in(p, v)[first] for v in range(len(self.lengths))]
        longest += [np.max(tops, axis=0)] * part.passes
      longest = np.concatenate(longest).astype(np.int64)
      limits = {"row_tokens": self.row_tokens, "max_samples": self.max_samples}
      if method == "greedy":  # in an order of arrival
        arrival = np.argsort(hash64(self.seed, 4, np.arange(len(longest))), kind="stable")
        rows = [arrival[list(row)] for row in plan_window(longest[arrival], method=method, **limits)]
      else:
        rows = pack_evenly(longest, cost=self.cost, **limits)
      self._templates[method] = [np.asarray(row, np.int64) for row in rows]
    return self._templates[method]

  def lengths_in(self, p: int, epoch: int) -> np.ndarray:
    """Lengths of a part in that epoch, longest first."""
    ids = self.parts[p].first + self._order(p, epoch).astype(np.int64)
    return self.lengths[self.variants(epoch, ids), ids]


def split_windows(sizes: Sequence[int], weights: Sequence[float] | None, window: int) -> tuple[_Part, ...]:
  """How many windows each part is spread over. Without weights all by as many; with them, of windows of about
  that many samples or down to a quarter of it, those in which the shares come out best."""
  firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
  if weights is None or len(sizes) == 1:
    windows = max(1, round(sum(sizes) / window))
    windows = min(windows, *sizes)
    return tuple(_Part(first, size, windows, 1) for first, size in zip(firsts, sizes))
  assert len(weights) == len(sizes) and min(weights) > 0, weights
  wanted = np.array(weights, np.float64) / np.sum(weights)
  best, least = (), np.inf
  for count in dict.fromkeys(int(n) for n in np.linspace(window, max(1, window / 4), _TRIED_WINDOWS)):
    counts = wanted * count
    parts = tuple(
      _Part(
        first, size, max(1, round(size / c)) if c < size else 1, max(1, round(c / size)) if c >= size else 1
      )
      for first, size, c in zip(firsts, sizes, counts)
    )
    got = np.array([p.size * p.passes / p.windows for p in parts])
    error = float(np.abs(got / got.sum() / wanted - 1).max())
    if error < least - 1e-3:
      best, least = parts, error
  return best


def _dearest(costs: np.ndarray) -> float:
  return float(costs.max() / costs.mean()) if costs.mean() else 1.0
