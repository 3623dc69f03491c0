"""Packed against bucketed against padded, by mix of sizes."""

import numpy as np

from data_pipelines.mixes import MIXES, Mix, draw
from sora_jax.packing.plan import METHODS, RowPlan

_SAMPLES = 200_000
_BUCKETS_AN_OCTAVE = 4


def padding(rows_per_step: int) -> list[dict]:
  """Padding, by how much the dearest row of a step costs more than the mean, and real tokens for the same
  compute, relative to padding every sample to the longest: 24 d l + 4 l^2 a sample at its padded length; a
  step of packed rows counts as its dearest row times the rows."""
  lines = []
  for name, mix in MIXES.items():
    lengths = draw(mix, _SAMPLES)
    plan = RowPlan(
      lengths,
      rows_per_step=rows_per_step,
      row_tokens=mix.row_tokens,
      max_samples=mix.max_samples,
      cost=mix.cost,
    )
    stats = plan.stats()
    tokens = float(lengths.sum(dtype=np.int64))
    base = tokens / _cost(mix, np.full(len(lengths), lengths.max()))
    for method in METHODS:
      s = stats[method]
      padded = _cost(mix, lengths) + mix.cost[0] * tokens * (1 / (1 - s["padding"]) - 1)
      lines.append(
        {
          "mix": name,
          "method": method,
          "padding_percent": round(100 * s["padding"], 2),
          "dearest_over_mean": round(s["dearest_over_mean_of_step"], 3),
          "samples_per_row": round(s["samples_per_row"], 1),
          "tokens_at_equal_compute": round(tokens / padded / s["dearest_over_mean_of_step"] / base, 2),
        }
      )
    for method, length in (("buckets", bucketed(lengths)), ("padded", np.full(len(lengths), lengths.max()))):
      lines.append(
        {
          "mix": name,
          "method": method,
          "padding_percent": round(100 * (1 - tokens / float(length.sum(dtype=np.int64))), 2),
          "tokens_at_equal_compute": round(tokens / _cost(mix, length) / base, 2),
        }
      )
  return lines


def bucketed(lengths: np.ndarray) -> np.ndarray:
  """Each padded to the next of some lengths an octave; whole batches of one bucket are taken for granted."""
  steps = np.ceil(np.log2(lengths / lengths.max()) * _BUCKETS_AN_OCTAVE - 1e-9)
  return np.ceil(lengths.max() * 2.0 ** (steps / _BUCKETS_AN_OCTAVE))


def _cost(mix: Mix, lengths: np.ndarray) -> float:
  return float((mix.cost[0] * lengths + mix.cost[1] * np.square(lengths, dtype=np.float64)).sum())
