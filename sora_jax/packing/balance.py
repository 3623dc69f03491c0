"""Rows that cost alike, by exchange of samples: the dearest row of a step is what the others wait for."""

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.packing.fit import Row, fill_tightest, plan_window, spread

_GOOD = 1.06  # the dearest row over the mean of the fewest rows: better is not looked for
_MORE_ROWS = 0.01  # at most, where fewer do not come out even
_SHARES = (0.9, 0.75, 0.5)  # of the tokens, longest first, that are dealt out before the rest fills up
_TARGET = 1.02  # of the mean cost: what is dearer is worked on
_PARTNERS = 12  # rows, from the cheapest on, that a dear row tries to deal with
_EXCHANGES = 8  # a row, on average
_GIVEN = 2  # samples, neighbours by length, that the dear row gives away at once, at most


class _Rows(NamedTuple):
  """`members` ascending by length; what rows hold and cost."""

  members: list[np.ndarray]
  tokens: np.ndarray
  costs: np.ndarray


def costs_of(
  lengths: np.ndarray, rows: Sequence[Sequence[int] | np.ndarray], cost: tuple[float, float]
) -> np.ndarray:
  """a * sum(l) + b * sum(l^2) of each row."""
  each = cost[0] * lengths + cost[1] * np.square(lengths, dtype=np.float64)
  return np.array([each[np.asarray(row, np.int64)].sum() for row in rows])


def pack_evenly(
  lengths: np.ndarray, *, row_tokens: int, max_samples: int, cost: tuple[float, float]
) -> list[Row]:
  """Best fit, evened out; with a few rows more where the dearest row gains more by that than the step loses.

  A step lasts as long as its dearest row, an epoch as long as rows times that.
  """
  limits = {"row_tokens": row_tokens, "max_samples": max_samples}
  best = even_out(lengths, plan_window(lengths, cost=cost, **limits), cost=cost, **limits)
  total = costs_of(lengths, best, cost).sum()
  if not total or len(best) < 2:
    return best
  price = _price(lengths, best, cost)
  order = np.argsort(-lengths, kind="stable")
  done = np.cumsum(lengths[order]) / lengths.sum()
  most = int(len(best) * (1 + _MORE_ROWS))
  for num_rows, share in itertools.product(
    sorted({len(best), min(len(best) + 1, most), (len(best) + most) // 2, most}), _SHARES
  ):
    if price <= _GOOD * total:
      break
    first = int(np.searchsorted(done, share))
    dealt = spread(lengths[order[:first]], num_rows, row_tokens, max_samples, cost)
    dealt = fill_tightest(lengths[order], dealt, first, row_tokens, max_samples) if dealt else []
    rows = [tuple(order[row].tolist()) for row in dealt if row]
    if not rows or len(rows) > most:
      continue
    rows = even_out(lengths, rows, cost=cost, **limits)
    if (other := _price(lengths, rows, cost)) < price:
      best, price = rows, other
  return best


def _price(lengths: np.ndarray, rows: Sequence[Row], cost: tuple[float, float]) -> float:
  return len(rows) * float(costs_of(lengths, rows, cost).max())


def even_out(
  lengths: np.ndarray, rows: Sequence[Row], *, row_tokens: int, max_samples: int, cost: tuple[float, float]
) -> list[Row]:
  """The same samples in as many rows, none beyond its limits, the dearest row no dearer than before.

  The dearest row gives one or two samples for a run of shorter ones of a cheap row: about as many tokens, but
  fewer pairs of them.
  """
  members = [np.array(sorted(row, key=lambda i: lengths[i]), np.int64) for row in rows]
  state = _Rows(members, np.array([lengths[m].sum() for m in members]), costs_of(lengths, members, cost))
  if len(rows) < 2 or not state.costs.mean():
    return list(rows)
  target = _TARGET * state.costs.mean()
  heap = [(-c, r) for r, c in enumerate(state.costs) if c > target]
  heapq.heapify(heap)
  for _ in range(_EXCHANGES * len(rows)):
    while heap and -heap[0][0] != state.costs[heap[0][1]]:  # of before an exchange
      heapq.heappop(heap)
    if not heap:
      break
    dear = heapq.heappop(heap)[1]
    for row in _relieve(dear, lengths, state, row_tokens, max_samples, cost):
      if state.costs[row] > target:
        heapq.heappush(heap, (-state.costs[row], row))
  return [tuple(m.tolist()) for m in state.members]


def _relieve(
  dear: int, lengths: np.ndarray, state: _Rows, row_tokens: int, max_samples: int, cost: tuple[float, float]
) -> tuple[int, ...]:
  """One exchange with the first of the cheapest rows that allows one worth its while; the rows changed."""
  count = min(_PARTNERS, len(state.costs) - 1)
  partners = np.argpartition(state.costs, count)[: count + 1]
  partners = [int(p) for p in partners[np.argsort(state.costs[partners], kind="stable")] if p != dear]
  given = _runs(lengths, state.members[dear], cost, _GIVEN)
  for partner in partners:
    gap = state.costs[dear] - state.costs[partner]
    taken = _runs(lengths, state.members[partner], cost, max_samples)
    tokens = given.tokens[:, None] - taken.tokens  # that go to the partner
    counts = given.counts[:, None] - taken.counts
    moved = given.costs[:, None] - taken.costs
    fits = (state.tokens[partner] + tokens <= row_tokens) & (state.tokens[dear] - tokens <= row_tokens)
    fits &= len(state.members[partner]) + counts <= max_samples
    fits &= (len(state.members[dear]) - counts <= max_samples) & (len(state.members[dear]) > counts)
    # The dearer of the two afterwards: half of the gap is the most that an exchange can even out.
    worst = np.where(fits & (moved > 0), np.maximum(-moved, moved - gap), 0.0)
    g, t = np.unravel_index(int(worst.argmin()), worst.shape)
    if worst[g, t] >= -0.05 * gap:
      continue
    _exchange(dear, partner, given.spans[g], taken.spans[t], lengths, state)
    state.costs[dear] -= moved[g, t]
    state.costs[partner] += moved[g, t]
    return dear, partner
  return ()


class _Runs(NamedTuple):
  """Neighbours by length among the members of a row: [start, stop) of each run, none at all first."""

  spans: np.ndarray
  counts: np.ndarray
  tokens: np.ndarray
  costs: np.ndarray


def _runs(lengths: np.ndarray, members: np.ndarray, cost: tuple[float, float], longest: int) -> _Runs:
  own = lengths[members]
  tokens = np.concatenate([[0], np.cumsum(own)])
  costs = np.concatenate([[0.0], np.cumsum(cost[0] * own + cost[1] * np.square(own, dtype=np.float64))])
  start, stop = np.triu_indices(len(members) + 1, 1)
  keep = stop - start <= longest
  start, stop = np.append(0, start[keep]), np.append(0, stop[keep])
  return _Runs(
    np.stack([start, stop], 1), stop - start, tokens[stop] - tokens[start], costs[stop] - costs[start]
  )


def _exchange(
  dear: int, partner: int, given: np.ndarray, taken: np.ndarray, lengths: np.ndarray, state: _Rows
) -> None:
  a, b = state.members[dear], state.members[partner]
  out, back = a[slice(*given)], b[slice(*taken)]
  for row, rest, new in (
    (dear, np.delete(a, slice(*given)), back),
    (partner, np.delete(b, slice(*taken)), out),
  ):
    joined = np.concatenate([rest, new])
    state.members[row] = joined[np.argsort(lengths[joined], kind="stable")]
    state.tokens[row] = lengths[joined].sum()
