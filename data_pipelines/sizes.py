"""The size at which each sample is read."""

import functools
from collections.abc import Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sources.base import SampleInfo
from sora_jax.packing.fit import plan_window
from sora_jax.packing.geometry import ClipSpec, fit_size, num_tokens
from sora_jax.packing.plan import RowPlan
from sora_jax.types import BatchSpec

_TRIED = 64  # values of max_tokens
_TRIED_SAMPLES = 4096


def fit_all(
  infos: dict[int, SampleInfo], config: DataConfig, max_tokens: int
) -> tuple[dict[int, SampleInfo], dict[int, ClipSpec], list[tuple[str, str]]]:
  """(infos that fit, their specs, (name, reason) of the others)."""
  fit = functools.lru_cache(maxsize=65536)(
    functools.partial(
      fit_size,
      patch=config.patch,
      max_tokens=max_tokens,
      max_frames=config.max_frames,
      target_fps=config.target_fps,
    )
  )
  fitted, specs, rejects = {}, {}, []
  for i, info in infos.items():
    try:
      specs[i] = fit(info.num_frames, info.height, info.width, info.fps)
    except ValueError as e:
      rejects.append((info.name, f"unfit: {e}"))
      continue
    fitted[i] = info
  return fitted, specs, rejects


def lower_max_tokens(infos: Sequence[SampleInfo], config: DataConfig, spec: BatchSpec) -> int:
  """The largest budget of a sample, between max_tokens and its half, at which rows pad at most `max_padding`;
  where none does, the one that pads least. Alike sizes that do not divide a row waste its end."""
  most = config.max_tokens or spec.tokens
  if not config.max_padding or not infos:
    return most
  infos = {i: info for i, info in enumerate(infos[:: -(-len(infos) // _TRIED_SAMPLES)])}
  best, least = most, np.inf
  for budget in dict.fromkeys(int(b) for b in np.linspace(most, max(1, most / 2), _TRIED)):
    _, specs, _ = fit_all(infos, config, budget)
    padding = _padding(specs, config, spec)
    if padding < least:
      best, least = budget, padding
    if padding <= config.max_padding:
      break
  return best


def plan_rows(
  lengths: Sequence[int] | np.ndarray, config: DataConfig, spec: BatchSpec, names: Sequence[str] | None = None
) -> RowPlan:
  """The rows that samples of these lengths are packed into."""
  return RowPlan(
    lengths,
    rows_per_step=spec.rows,
    row_tokens=spec.tokens,
    max_samples=spec.samples,
    seed=config.seed,
    method=config.packing,
    window=config.packing_window,
    cost=config.packing_cost,
    names=names,
  )


def _padding(specs: dict[int, ClipSpec], config: DataConfig, spec: BatchSpec) -> float:
  lengths = np.array([num_tokens(s, config.patch) for s in specs.values()], np.int64)
  if not len(lengths):
    return np.inf
  rows = plan_window(
    lengths,
    row_tokens=spec.tokens,
    max_samples=spec.samples,
    method=config.packing,
    cost=config.packing_cost,
  )
  return 1 - lengths.sum() / (len(rows) * spec.tokens)
