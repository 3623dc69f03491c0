"""A stated mix of sizes, packed into the rows of a step: what a step's attention is counted from."""

import dataclasses
import math

import numpy as np

from sora_jax.packing import geometry, hashing, plan
from sora_jax.packing.geometry import ClipSpec, Patch
from sora_jax.types import BatchSpec, TokenBatch

# name -> (share of the samples, frames, height, width); clips of 16 frames per second.
MIXES = {
  "256px": ((0.5, 1, 256, 256), (0.3, 16, 256, 256), (0.2, 64, 256, 256)),
  "480p": (
    (0.3, 1, 480, 832), (0.15, 16, 256, 256), (0.15, 64, 256, 448), (0.2, 48, 480, 832), (0.2, 80, 480, 832),
  ),
  "720p": ((0.2, 1, 720, 1280), (0.3, 80, 480, 832), (0.3, 48, 720, 1280), (0.2, 80, 720, 1280)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """The step's batch by its sizes alone, and what its attention costs."""

  batch: TokenBatch  # only grids and text segments are filled
  tile: tuple[int, int]  # queries and keys of a tile
  tokens: int  # real ones
  samples: int
  live_tiles: int  # of all rows, one layer
  all_tiles: int
  row_imbalance: float  # cost of the dearest row over the mean, a = 24 d sum(l) + 4 sum(l^2)


def count(name: str, spec: BatchSpec, patch: Patch, *, width: int, tile: tuple[int, int]) -> Counted:
  """Packs samples of the mix into `spec.rows` rows; those that no row holds are left out of the mix."""
  if name not in MIXES:
    raise ValueError(f"config.rehearse.mix = {name!r} is none of {', '.join(MIXES)}")
  grids, shares = [], []
  for share, frames, height, width_px in MIXES[name]:
    ph, pw = patch[1:]
    size = ClipSpec(frames, height // ph * ph, width_px // pw * pw)
    if min(size.height, size.width) > 0 and geometry.num_tokens(size, patch) <= spec.tokens:
      grids.append(geometry.grid_of(size, patch))
      shares.append(share)
  if not grids:  # rows of a tiny config
    grids, shares = [(1, 1, spec.tokens)], [1.0]
  lengths = np.array([math.prod(g) for g in grids])
  mean = float(lengths @ np.array(shares)) / sum(shares)
  num = math.ceil(1.3 * spec.rows * min(spec.tokens / mean, spec.samples)) + 1
  drawn = np.searchsorted(np.cumsum(shares) / sum(shares), hashing.uniform(0, np.arange(num)), side="right")
  cost = (24.0 * width, 4.0)
  # As many samples as these rows hold.
  num = min(num, int(np.searchsorted(np.cumsum(lengths[drawn]), spec.rows * spec.tokens, side="right")))
  while True:
    rows = plan.plan_window(lengths[drawn[:num]], row_tokens=spec.tokens, max_samples=spec.samples, cost=cost)
    if len(rows) <= spec.rows:
      break
    num = int(0.99 * num)
  return _counted(spec, [[grids[drawn[i]] for i in row] for row in rows], cost, tile)


def _counted(spec: BatchSpec, rows: list[list], cost: tuple[float, float], tile: tuple[int, int]) -> Counted:
  grid_BN3 = np.zeros((spec.rows, spec.samples, 3), np.int32)
  text_segment_BM = np.zeros((spec.rows, spec.text_tokens), np.int32)
  live, costs = 0, []
  for b, row in enumerate(rows):
    grid_BN3[b, : len(row)] = row
    each = spec.text_tokens // len(row)
    text_segment_BM[b, : each * len(row)] = np.repeat(np.arange(1, len(row) + 1), each)
    lengths = np.prod(np.array(row, np.int64), axis=-1)
    live += live_tiles(lengths, *tile)
    costs.append(cost[0] * lengths.sum() + cost[1] * (lengths**2).sum())
  real = np.prod(grid_BN3.astype(np.int64), axis=-1)
  return Counted(
    batch=dataclasses.replace(spec.zeros(rows=0), grid_BN3=grid_BN3, text_segment_BM=text_segment_BM),
    tile=tile,
    tokens=int(real.sum()),
    samples=int((real > 0).sum()),
    live_tiles=live,
    all_tiles=spec.rows * math.prod(math.ceil(spec.tokens / n) for n in tile),
    row_imbalance=max(costs) / (sum(costs) / len(costs)),
  )


def live_tiles(lengths: np.ndarray, block_q: int, block_k: int) -> int:
  """Tiles of one row that hold a pair of tokens of one sample."""
  stops = np.cumsum(lengths)
  starts = stops - lengths
  total = 0
  for block in range(0, int(stops[-1]), block_q):
    # The samples of a block of queries are contiguous, and so are their keys.
    inside = (starts < block + block_q) & (stops > block)
    total += -(-int(stops[inside].max()) // block_k) - int(starts[inside].min()) // block_k
  return total
