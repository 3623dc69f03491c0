"""Which samples share a row: a pure function of (lengths, seed, step), computed alike on every host."""

import collections
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.packing.balance import costs_of, pack_evenly
from sora_jax.packing.draws import Draws, rank, split_windows
from sora_jax.packing.fit import METHODS, Row, plan_window
from sora_jax.packing.hashing import hash64

_CACHED_WINDOWS = 4

__all__ = ["METHODS", "Phase", "PlannedRow", "RowPlan", "plan_window"]


class PlannedRow(NamedTuple):
  epochs: Row  # of each sample, of its own part
  ids: Row
  variants: Row
  phase: int


class Phase(NamedTuple):
  """Lengths (variants, kinds) that hold from a step on. Phases of one `order` sort samples about alike, and
  an epoch goes on from one to the next; a new order begins a new epoch."""

  step: int
  table: np.ndarray
  order: int = 0


class RowPlan:
  """An endless stream of rows over epochs; step k takes rows [k * rows_per_step, (k + 1) * rows_per_step).

  All windows of a plan have nearly the same lengths (see `Draws`), and one packing, that of the longest
  sample each slot can draw, fits them all: any row of any step is found without planning those before it.

  `lengths` are those of the samples, or `phases` with `kinds`, the kind of each sample. A phase takes over
  with the first window that begins at or after its step. `parts` are the sizes of the sources that samples
  come from, in order; `weights` how many samples each gives, relative to one another, as nearly as whole
  windows allow (`shares`); None = each sample equally often.
  """

  def __init__(
    self,
    lengths: Sequence[int] | np.ndarray = (),
    *,
    rows_per_step: int,
    row_tokens: int,
    max_samples: int,
    seed: int = 0,
    method: str = "best_fit",
    window: int = 4096,
    cost: tuple[float, float] = (1.0, 0.0),
    kinds: np.ndarray | None = None,
    phases: Sequence[Phase] = (),
    parts: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
  ):
    if kinds is None:
      table, kinds = np.unique(np.asarray(lengths, np.int32), return_inverse=True)
      phases = (Phase(0, table[None]),)
    self.phases = tuple(Phase(p.step, np.asarray(p.table, np.int32), p.order) for p in phases)
    kinds = np.asarray(kinds, np.int32)
    if not len(kinds):
      raise ValueError("nothing to pack: the data set (or its split) has no sample")
    if method not in METHODS:
      raise ValueError(f"packing method {method!r} is none of {', '.join(METHODS)}")
    assert self.phases[0].step == 0 and all(a.step < b.step for a, b in zip(self.phases, self.phases[1:]))
    assert len({p.table.shape for p in self.phases}) == 1, "tables of several sizes"
    assert min(int(p.table.min()) for p in self.phases) > 0
    if (longest := max(int(p.table.max()) for p in self.phases)) > row_tokens:
      kind = int(max(self.phases, key=lambda p: p.table.max()).table.max(axis=0).argmax())
      raise ValueError(
        f"sample {int((kinds == kind).argmax())} has {longest} tokens but a row holds {row_tokens}: "
        "raise row_tokens or lower max_tokens"
      )
    assert rows_per_step > 0 and max_samples > 0 and window > 0
    sizes = tuple(parts or (len(kinds),))
    assert sum(sizes) == len(kinds) and min(sizes) > 0, sizes
    self.rows_per_step, self.seed, self.method, self.cost = rows_per_step, seed, method, tuple(cost)
    self.row_tokens, self.max_samples, self.kinds = row_tokens, max_samples, kinds
    self.parts = split_windows(sizes, weights, window)
    self._draws = {
      order: Draws(rank([p.table for p in self.phases if p.order == order]), kinds, self.parts, seed)
      for order in {p.order for p in self.phases}
    }
    self._templates: dict[tuple[int, str], list[np.ndarray]] = {}
    self._cache: collections.OrderedDict[tuple, tuple[np.ndarray, ...]] = collections.OrderedDict()
    self._lock = threading.RLock()

  def __getstate__(self) -> dict:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache")}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state, _lock=threading.RLock(), _cache=collections.OrderedDict())

  def __len__(self) -> int:
    return len(self.kinds)

  @property
  def lengths(self) -> np.ndarray:
    """Of each sample in the last phase, in its first variant."""
    return self.phases[-1].table[0][self.kinds]

  @property
  def shares(self) -> list[float]:
    """Of the samples of a window, by part."""
    counts = [p.size * p.passes / p.windows for p in self.parts]
    return [c / sum(counts) for c in counts]

  @property
  def rows_per_window(self) -> int:
    """In the last phase."""
    return len(self._template(len(self.phases) - 1, self.method))

  @property
  def windows_per_epoch(self) -> int:
    """Of the part that takes longest."""
    return max(p.windows for p in self.parts)

  def rows_of_step(self, step: int) -> list[PlannedRow]:
    return [self.row(r) for r in range(step * self.rows_per_step, (step + 1) * self.rows_per_step)]

  def row(self, index: int) -> PlannedRow:
    """Row `index` of the endless stream; one that drew no sample is empty."""
    with self._lock:
      at, r = self._locate(index)
      return self._row(at, self.method, r)

  def rows_of_epoch(self, epoch: int) -> list[PlannedRow]:
    """Every row of one epoch of the part that takes longest, as the last phase packs them: for held-out
    samples and for reports."""
    first = epoch * self.windows_per_epoch
    return self._rows_of(self.method, range(first, first + self.windows_per_epoch))

  def lengths_of(self, row: PlannedRow) -> np.ndarray:
    return self.phases[row.phase].table[list(row.variants), self.kinds[list(row.ids)]]

  def stats(self, max_ids: int = 2**18, methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """Per packing method, over (at most about `max_ids` samples of) the first epoch in the last phase: rows,
    padding share, samples per row, and how much dearer than the mean the dearest row is: of all, and of the
    rows of a step, averaged over the steps."""
    slots = sum(p.strata * p.passes for p in self.parts)
    windows = max(1, min(self.windows_per_epoch, max_ids // slots))
    result = {}
    for method in methods:
      rows = [self.lengths_of(row) for row in self._rows_of(method, range(windows))]
      costs = np.array([costs_of(row, [range(len(row))], self.cost)[0] for row in rows])
      steps = [costs[k : k + self.rows_per_step] for k in range(0, len(costs), self.rows_per_step)]
      steps = steps[:-1] if len(steps) > 1 and len(steps[-1]) < self.rows_per_step else steps
      result[method] = {
        "rows": len(rows),
        "padding": 1 - sum(int(row.sum()) for row in rows) / (len(rows) * self.row_tokens),
        "samples_per_row": sum(map(len, rows)) / len(rows),
        "dearest_over_mean": _dearest(costs),
        "dearest_over_mean_of_step": float(np.mean([_dearest(step) for step in steps])),
      }
    return result

  def _locate(self, index: int) -> tuple["_Place", int]:
    """The window of a row, and its number in there."""
    phase = row = window = first_epoch = 0
    while phase + 1 < len(self.phases):
      per_window, after = len(self._template(phase, self.method)), self.phases[phase + 1]
      windows = max(0, -(-(after.step * self.rows_per_step - row) // per_window))
      if index < row + windows * per_window:
        break
      row, window = row + windows * per_window, window + windows
      if after.order != self.phases[phase].order:
        first_epoch += max(-(-window // p.windows) * p.passes for p in self.parts)
        window = 0
      phase += 1
    w, r = divmod(index - row, len(self._template(phase, self.method)))
    return _Place(phase, first_epoch, window + w), r

  def _rows_of(self, method: str, windows: range) -> list[PlannedRow]:
    phase = len(self.phases) - 1
    with self._lock:
      count = len(self._template(phase, method))
      rows = [self._row(_Place(phase, 0, w), method, r) for w in windows for r in range(count)]
    return [row for row in rows if row.ids]

  def _row(self, at: "_Place", method: str, r: int) -> PlannedRow:
    epochs, ids, variants, order = self._window(at, method)
    slots = self._template(at.phase, method)[order[r]]
    slots = slots[ids[slots] >= 0]
    return PlannedRow(*(tuple(a[slots].tolist()) for a in (epochs, ids, variants)), at.phase)

  def _window(self, at: "_Place", method: str) -> tuple[np.ndarray, ...]:
    """(epochs, ids, variants of the slots, order of the rows)."""
    if (at, method) not in self._cache:
      rows = np.arange(len(self._template(at.phase, method)))
      keys = hash64(self.seed, 1, at.first_epoch, at.window, rows)
      draws = self._draws[self.phases[at.phase].order]
      epochs, ids = draws.window(at.window, at.first_epoch)
      drawn = (epochs, ids, draws.variants(epochs, ids), np.argsort(keys, kind="stable"))
      self._cache[at, method] = drawn
      if len(self._cache) > _CACHED_WINDOWS:
        self._cache.popitem(last=False)
    self._cache.move_to_end((at, method))
    return self._cache[at, method]

  def _template(self, phase: int, method: str) -> list[np.ndarray]:
    """Slots of each row of a window."""
    if (phase, method) not in self._templates:
      longest = self._draws[self.phases[phase].order].longest(self.phases[phase].table)
      limits = {"row_tokens": self.row_tokens, "max_samples": self.max_samples}
      if method == "greedy":  # in an order of arrival
        arrival = np.argsort(hash64(self.seed, 4, np.arange(len(longest))), kind="stable")
        rows = [arrival[list(row)] for row in plan_window(longest[arrival], method=method, **limits)]
      else:
        rows = pack_evenly(longest, cost=self.cost, **limits)
      self._templates[phase, method] = [np.asarray(row, np.int64) for row in rows]
    return self._templates[phase, method]


class _Place(NamedTuple):
  phase: int
  first_epoch: int  # since samples were put in another order
  window: int  # since then


def _dearest(costs: np.ndarray) -> float:
  return float(costs.max() / costs.mean()) if costs.mean() else 1.0
