"""Token dropping: which share of a sample's tokens is left out, and which ones (NaViT, arXiv 2307.06304).

Rates are known to the plan before anything is loaded: a few levels of the distribution take turns, each
sample meeting another one every epoch.
"""

import dataclasses
import math

import numpy as np
from scipy import special

from sora_jax.packing.geometry import Grid
from sora_jax.packing.hashing import uniform

SCHEDULES, DISTRIBUTIONS, SELECTIONS = ("constant", "sigmoid"), ("fixed", "beta"), ("random", "similar")
_STREAM = 20  # of `uniform`
_SIGMOID_STAGES = 16
_SIGMOID_WIDTH = 6.0  # the schedule spans the sigmoid from -6 to 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDrop:
  rate: float = 0.0  # mean share of the tokens dropped; of "sigmoid" in the beginning
  schedule: str = "constant"  # "sigmoid": from `rate` to `final_rate` over `sigmoid_steps`
  final_rate: float = 0.0
  sigmoid_steps: int = 0
  distribution: str = (
    "fixed"  # "beta": each sample's own, Beta(mean * concentration, (1 - mean) * concentration)
  )
  concentration: float = 4.0
  levels: int = 8  # of "beta"
  most: float = 0.9  # no sample loses more
  stop_step: int = 0  # nothing is dropped from here on; 0 = dropped to the end
  select: str = (
    "random"  # "similar": those most like the same place a frame before, or their neighbour in space
  )

  def __post_init__(self):
    for key, known in (("schedule", SCHEDULES), ("distribution", DISTRIBUTIONS), ("select", SELECTIONS)):
      if getattr(self, key) not in known:
        raise ValueError(f"data.token_drop.{key}={getattr(self, key)!r} is none of {', '.join(known)}")
    for key in ("rate", "final_rate", "most"):
      if not 0 <= getattr(self, key) < 1:
        raise ValueError(f"data.token_drop.{key}={getattr(self, key)} is no share below 1")
    if self.schedule == "sigmoid" and self.sigmoid_steps < _SIGMOID_STAGES:
      raise ValueError(f"data.token_drop.sigmoid_steps={self.sigmoid_steps} is below {_SIGMOID_STAGES}")
    if self.concentration <= 0 or self.levels < 1 or self.stop_step < 0:
      raise ValueError("data.token_drop needs concentration above 0, levels from 1 and stop_step from 0 on")


def stages(config: TokenDrop) -> list[tuple[int, tuple[float, ...]]]:
  """(first step, rates that take turns) of each part of training, all of as many rates."""
  count = config.levels if config.distribution == "beta" else 1
  means = [(0, config.rate)]
  if config.schedule == "sigmoid":
    means = []
    for k in range(_SIGMOID_STAGES):
      x = _SIGMOID_WIDTH * (2 * (k + 0.5) / _SIGMOID_STAGES - 1)
      mean = config.final_rate + (config.rate - config.final_rate) / (1 + math.exp(x))
      means.append((k * config.sigmoid_steps // _SIGMOID_STAGES, mean))
    means.append((config.sigmoid_steps, config.final_rate))
  if config.stop_step:
    means = [(step, mean) for step, mean in means if step < config.stop_step] + [(config.stop_step, 0.0)]
  return [(step, _rates(mean, config, count)) for step, mean in means]


def _rates(mean: float, config: TokenDrop, count: int) -> tuple[float, ...]:
  if config.distribution == "fixed" or mean == 0:
    return (min(mean, config.most),) * count
  places = (np.arange(count) + 0.5) / count
  a, b = mean * config.concentration, (1 - mean) * config.concentration
  return tuple(np.minimum(special.betaincinv(a, b, places), config.most).tolist())


def num_kept(length: int, rate: float) -> int:
  return max(1, length - int(rate * length))


def keep(
  tokens_LC: np.ndarray,
  grid: Grid,
  count: int,
  *,
  select: str,
  key: tuple[int, ...],
  given_L: np.ndarray | None,
) -> np.ndarray:
  """Places of the `count` tokens kept, ascending: a function of the sample and `key`; at least one of them
  is not given as a prompt."""
  length = len(tokens_LC)
  order = uniform(*key, _STREAM, np.arange(length))
  if select == "similar":  # the draw only tells apart what changed as much
    order = np.argsort(np.argsort(order))
    order = np.lexsort((order, -_change(tokens_LC, grid)))
  else:
    order = np.argsort(order, kind="stable")
  kept = np.sort(order[:count])
  if given_L is not None and given_L[kept].all() and not given_L.all():
    kept[-1] = order[~given_L[order]][0]
    kept = np.sort(kept)
  return kept


def _change(tokens_LC: np.ndarray, grid: Grid) -> np.ndarray:
  """Mean squared difference to the token a frame before; in the first frame to the nearer of the left and
  upper neighbour; of the first token of all infinite."""
  tokens = tokens_LC.reshape(*grid, -1)
  change = np.full(grid, np.inf)
  left = np.square(tokens[:1, :, 1:] - tokens[:1, :, :-1]).mean(-1)
  above = np.square(tokens[:1, 1:] - tokens[:1, :-1]).mean(-1)
  change[:1, :, 1:] = left
  change[:1, 1:] = np.minimum(change[:1, 1:], above)
  change[1:] = np.square(tokens[1:] - tokens[:-1]).mean(-1)
  return change.reshape(-1)
