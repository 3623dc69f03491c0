"""Which samples a window of the plan holds: every sample once an epoch, windows of alike lengths."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sora_jax.packing.hashing import bijection, hash64

_ORDERS_ANEW = 2**20  # samples of a part: up to here, those of one length change places every epoch
_CHUNK = 2**20  # samples looked at at once
_TRIED_WINDOWS = 32  # sizes of a window, for the one in which weights come out best


@dataclasses.dataclass(frozen=True)
class Part:
  """Samples [first, first + size) of the plan, split over `windows` windows, or `passes` times in each."""

  first: int
  size: int
  windows: int
  passes: int

  @property
  def strata(self) -> int:
    return -(-self.size // self.windows)


def split_windows(sizes: Sequence[int], weights: Sequence[float] | None, window: int) -> tuple[Part, ...]:
  """How many windows each part is spread over. Without weights all by as many; with them, of windows of about
  that many samples or down to a quarter of it, those in which the shares come out best."""
  firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
  if weights is None or len(sizes) == 1:
    windows = min(max(1, round(sum(sizes) / window)), *sizes)
    return tuple(Part(first, size, windows, 1) for first, size in zip(firsts, sizes))
  assert len(weights) == len(sizes) and min(weights) > 0, weights
  wanted = np.array(weights, np.float64) / np.sum(weights)
  best, least = (), np.inf
  for count in dict.fromkeys(int(n) for n in np.linspace(window, max(1, window / 4), _TRIED_WINDOWS)):
    parts = tuple(_part(*args) for args in zip(firsts, sizes, (wanted * count).tolist()))
    got = np.array([p.size * p.passes / p.windows for p in parts])
    error = float(np.abs(got / got.sum() / wanted - 1).max())
    if error < least - 1e-3:
      best, least = parts, error
  return best


def _part(first: int, size: int, count: float) -> Part:
  """About `count` samples a window."""
  if count < size:
    return Part(first, size, round(size / count), 1)
  return Part(first, size, 1, round(count / size))


class Draws:
  """The samples of each part, longest first, are cut into strata of as many samples as the epoch has windows;
  a window draws one of each stratum, a shuffle of its own per stratum and epoch.

  Sample i is of kind `kinds[i]`; in epoch e it is of the variant `variants(e, i)`, another one every epoch
  until all were seen, and sorted by `ranks[variant, kind]` (see `rank`).
  """

  def __init__(self, ranks: np.ndarray, kinds: np.ndarray, parts: tuple[Part, ...], seed: int):
    self.ranks, self.kinds, self.parts, self.seed = ranks, kinds, parts, seed
    self._orders: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
    self._turns = None  # where in the round of variants each sample begins
    if len(ranks) > 1 and len(kinds) <= _ORDERS_ANEW:  # neighbours by length differ: epochs are alike
      order = np.lexsort((hash64(seed, 3, np.arange(len(kinds))), ranks.mean(axis=0)[kinds]))
      self._turns = np.empty(len(kinds), np.int64)
      self._turns[order] = np.arange(len(kinds)) % len(ranks)

  def __getstate__(self) -> dict:
    return {**self.__dict__, "_orders": collections.OrderedDict()}

  def variants(self, epochs: int | np.ndarray, ids: int | np.ndarray) -> np.ndarray:
    if len(self.ranks) == 1:
      return np.zeros(np.shape(ids), np.int64)
    turns = (
      hash64(self.seed, 3, ids) % np.uint64(len(self.ranks)) if self._turns is None else self._turns[ids]
    )
    return (np.asarray(epochs) + turns.astype(np.int64)) % len(self.ranks)

  def window(self, w: int, first_epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, ids) of each slot, -1 where it drew none; part by part, pass by pass, longest first."""
    drawn = [
      self._draw(p, w, n, first_epoch) for p, part in enumerate(self.parts) for n in range(part.passes)
    ]
    return np.concatenate([epochs for epochs, _ in drawn]), np.concatenate([ids for _, ids in drawn])

  def longest(self, table: np.ndarray) -> np.ndarray:
    """The longest sample that each slot can draw, by a table (variants, kinds) that the ranks are of."""
    result = []
    for p, part in enumerate(self.parts):
      first = np.arange(part.strata) * part.windows
      tops = []
      for v in range(len(table)):
        ids = part.first + self._order(p, v).astype(np.int64)
        tops.append(np.maximum.reduceat(table[self.variants(v, ids), self.kinds[ids]], first))
      result += [np.max(tops, axis=0)] * part.passes
    return np.concatenate(result).astype(np.int64)

  def _draw(self, p: int, w: int, n: int, first_epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pass `n` of window `w` over a part: a sample of each stratum."""
    part = self.parts[p]
    epoch, place = divmod(w, part.windows)
    epoch = first_epoch + epoch * part.passes + n
    strata = np.arange(part.strata)
    at = strata * part.windows + bijection(place, part.windows, self.seed, 0, epoch, p, strata)
    order = self._order(p, epoch)
    ids = np.where(at < part.size, part.first + order[np.minimum(at, part.size - 1)].astype(np.int64), -1)
    return np.full(len(ids), epoch, np.int64), ids

  def _order(self, p: int, epoch: int) -> np.ndarray:
    """Places in a part, longest first in that epoch."""
    part = self.parts[p]
    epoch = epoch if part.size <= _ORDERS_ANEW else epoch % len(self.ranks)
    if (p, epoch) not in self._orders:

      def ranks_of(ids: np.ndarray) -> np.ndarray:
        ids = part.first + ids
        return self.ranks[self.variants(epoch, ids), self.kinds[ids]]

      if part.size <= _ORDERS_ANEW:
        ids = np.arange(part.size)
        ties = (hash64(self.seed, 2, epoch, part.first + ids) >> np.uint64(32)).astype(np.int64)
        keys = (-ranks_of(ids).astype(np.int64) << np.int64(32)) + ties
        order = np.argsort(keys, kind="stable").astype(np.uint32)
      else:
        order = longest_first(ranks_of, part.size, int(self.ranks.max()))
      while len(self._orders) >= 2 * len(self.parts):
        self._orders.popitem(last=False)
      self._orders[p, epoch] = order
    self._orders.move_to_end((p, epoch))
    return self._orders[p, epoch]


def rank(tables: Sequence[np.ndarray]) -> np.ndarray:
  """Order of all (variant, kind) by their lengths in the last table, then in the others: of one rank are
  those alike in every table, so that what a slot can draw does not depend on how they are told apart."""
  flat = np.stack([t.reshape(-1) for t in reversed(tables)])
  if len(flat) == 1:
    return tables[0]
  return np.unique(flat, axis=1, return_inverse=True)[1].reshape(tables[0].shape).astype(np.int32)


def longest_first(lengths_of: Callable[[np.ndarray], np.ndarray], count: int, most: int) -> np.ndarray:
  """Stable order of `count` lengths up to `most`, by counting: beyond the result, the memory of a chunk."""
  chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
  counts = np.zeros(most + 1, np.int64)
  for start, stop in chunks:
    counts += np.bincount(lengths_of(np.arange(start, stop)), minlength=most + 1)
  at = counts[::-1].cumsum()[::-1] - counts  # where each length begins
  order = np.empty(count, np.uint32)
  for start, stop in chunks:
    lengths = lengths_of(np.arange(start, stop))
    local = np.argsort(lengths, kind="stable")
    ordered = lengths[local]
    begins = np.searchsorted(ordered, ordered, side="left")
    order[at[ordered] + np.arange(stop - start) - begins] = start + local
    at += np.bincount(lengths, minlength=most + 1)
  return order
