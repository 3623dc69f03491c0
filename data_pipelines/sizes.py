"""The size at which each sample is read, in every stage of a run: by kind, not by sample."""

import dataclasses
import functools

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.latents import cut_to_size
from data_pipelines.phases import Stage, stages_of
from data_pipelines.sources.base import Sizes, Source, sizes_of
from sora_jax.packing.fit import plan_window
from sora_jax.packing.geometry import ClipSpec, Patch, fit_size, num_tokens
from sora_jax.packing.plan import Phase
from sora_jax.packing.token_drop import num_kept
from sora_jax.types import BatchSpec

_TRIED = 64  # values of max_tokens
_TRIED_SAMPLES = 4096
_CHUNK = 2**20  # samples looked at at once
MUCH_PADDING = 0.02  # a report names what would pad less than this
_GAIN = 0.005

Native = tuple[int, int, int, float]  # frames, height, width, rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
  """Samples `ids` of the source, the n-th of kind `kinds[n]`: those that had the same native size."""

  ids: np.ndarray
  kinds: np.ndarray
  natives: tuple[Native, ...]
  stages: tuple[Stage, ...]
  specs: tuple[tuple[tuple[ClipSpec, ...], ...], ...]  # by stage, variant, kind
  phases: tuple[Phase, ...]  # for the plan: tokens kept
  max_tokens: int  # of the last stage
  patch: Patch
  rejects: tuple[tuple[int, str], ...]  # (sample of the source, why): those that fit no size

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def last(self) -> tuple[ClipSpec, ...]:
    """By kind: the largest size in the last stage."""
    return max(self.specs[-1], key=lambda specs: sum(s.num_frames * s.height * s.width for s in specs if s))


def fit(
  source: Source,
  ids: np.ndarray,
  config: DataConfig,
  spec: BatchSpec,
  *,
  is_train: bool,
  train_ids: np.ndarray | None = None,
) -> Fitted:
  """`train_ids` are the samples trained on, by which `max_padding` goes on both sides of the split."""
  sizes = sizes_of(source)
  natives, kinds = _kinds_of(sizes, ids)
  tried = ids if train_ids is None else train_ids
  tried = _kinds_of(sizes, _as_seen(source, tried)) if config.max_padding else ((), kinds)
  stages = tuple(
    dataclasses.replace(stage, max_tokens=_budget(stage, *tried, config, spec))
    for stage in stages_of(config, is_train=is_train)
  )
  resolutions = config.resolutions if is_train else (1.0,)
  unfit: dict[int, str] = {}
  specs, phases, order = [], [], 0
  for s, stage in enumerate(stages):
    sized = [
      tuple(_fit_kind(k, n, stage, r, config, unfit) for k, n in enumerate(natives)) for r in resolutions
    ]
    variants = [(rate, row) for rate in stage.drop_rates for row in sized]
    specs.append(tuple(row for _, row in variants))
    table = [[num_kept(num_tokens(c, config.patch), rate) if c else 1 for c in row] for rate, row in variants]
    # Rates that differ by sample sort samples anew; one rate, or another cap, leaves their order.
    order += s > 0 and _is_mixed(stage) != _is_mixed(stages[s - 1])
    phases.append(Phase(stage.step, np.array(table, np.int32), int(order)))
  rejects = ()
  if unfit:
    is_unfit = np.isin(kinds, list(unfit))
    rejects = tuple((int(ids[n]), unfit[int(kinds[n])]) for n in np.flatnonzero(is_unfit))
    ids, kinds = ids[~is_unfit], kinds[~is_unfit]
  return Fitted(
    ids=ids,
    kinds=kinds,
    natives=natives,
    stages=stages,
    specs=tuple(specs),
    phases=tuple(phases),
    max_tokens=stages[-1].max_tokens,
    patch=config.patch,
    rejects=rejects,
  )


def _as_seen(source: Source, ids: np.ndarray) -> np.ndarray:
  """Some of the samples; of a mixture with weights each source as often as a run sees it."""
  parts = getattr(source, "parts", ())
  ends = np.searchsorted(ids, np.cumsum([size for _, size, _ in parts], dtype=np.int64))
  own = [ids[a:b] for a, b in zip([0, *ends], ends)]
  weighted = [(part, weight) for part, (*_, weight) in zip(own, parts) if len(part)]
  if len(weighted) < 2 or any(weight is None for _, weight in weighted):
    return ids[:: -(-len(ids) // _TRIED_SAMPLES) or 1]
  total = sum(weight for _, weight in weighted)
  counts = [max(1, round(_TRIED_SAMPLES * weight / total)) for _, weight in weighted]
  return np.concatenate([
    part[np.linspace(0, len(part) - 1, count).astype(np.int64)] for (part, _), count in zip(weighted, counts)
  ])  # fmt: skip


def _is_mixed(stage: Stage) -> bool:
  return len(set(stage.drop_rates)) > 1


def _kinds_of(sizes: Sizes, ids: np.ndarray) -> tuple[tuple[Native, ...], np.ndarray]:
  """(native sizes, the one of each sample), by chunks: the memory of one besides the result."""
  natives: dict[Native, int] = {}
  kinds = np.empty(len(ids), np.int32)
  for start in range(0, len(ids), _CHUNK):
    chunk = ids[start : start + _CHUNK]
    columns = [np.asarray(c[chunk]) for c in sizes]
    place = np.zeros(len(chunk), np.int64)
    for column in columns:  # column by column, renumbered each time: exact, and no overflow
      values, inverse = np.unique(column, return_inverse=True)
      _, place = np.unique(place * len(values) + inverse, return_inverse=True)
    _, first = np.unique(place, return_index=True)
    numbers = [
      natives.setdefault(
        (int(columns[0][n]), int(columns[1][n]), int(columns[2][n]), float(columns[3][n])), len(natives)
      )
      for n in first
    ]
    kinds[start : start + _CHUNK] = np.array(numbers, np.int32)[place]
  return tuple(natives), kinds


def _fit_kind(
  kind: int, native: Native, stage: Stage, resolution: float, config: DataConfig, unfit: dict[int, str]
) -> ClipSpec | None:
  if config.latents:
    try:
      return cut_to_size(native, config.patch, stage.max_tokens, stage.max_frames)
    except ValueError as e:
      unfit[kind] = f"unfit: {e}"
      return None
  shape = functools.partial(
    fit_size, *native, patch=config.patch, max_frames=stage.max_frames, target_fps=config.target_fps
  )
  try:
    spec = shape(max_tokens=stage.max_tokens)
    if resolution < 1:
      spec = shape(max_tokens=max(1, int(resolution**2 * num_tokens(spec, config.patch))))
    return spec
  except ValueError as e:
    unfit[kind] = f"unfit: {e}"
    return None


def _budget(
  stage: Stage, natives: tuple[Native, ...], kinds: np.ndarray, config: DataConfig, spec: BatchSpec
) -> int:
  """The largest budget of a sample, between max_tokens and its half, at which rows pad at most `max_padding`;
  where none does, the one that pads least. Alike sizes that do not divide a row waste its end."""
  most = stage.max_tokens or spec.tokens
  if not config.max_padding or not len(kinds):
    return most
  best, least = most, np.inf
  for budget in dict.fromkeys(int(b) for b in np.linspace(most, max(1, most / 2), _TRIED)):
    lengths = _lengths(natives, kinds, dataclasses.replace(stage, max_tokens=budget), config)
    padding = _padding(lengths, config, spec)
    if padding < least:
      best, least = budget, padding
    if padding <= config.max_padding:
      break
  return best


def _lengths(natives: tuple[Native, ...], kinds: np.ndarray, stage: Stage, config: DataConfig) -> np.ndarray:
  """Tokens of the samples that fit."""
  specs = {k: _fit_kind(k, natives[k], stage, 1.0, config, {}) for k in sorted(set(kinds.tolist()))}
  tokens = {k: num_tokens(s, config.patch) if s else 0 for k, s in specs.items()}
  return np.array([tokens[k] for k in kinds.tolist() if tokens[k]], np.int64)


def remedies(
  source: Source, fitted: Fitted, config: DataConfig, spec: BatchSpec, padding: float
) -> list[str]:
  """What would pad less, where rows pad much: longer rows, or samples that fill those there are."""
  if padding <= MUCH_PADDING or not len(fitted):
    return []
  kinds = fitted.kinds[np.searchsorted(fitted.ids, _as_seen(source, fitted.ids))]
  stage, found = fitted.stages[-1], []

  def tried(config: DataConfig, spec: BatchSpec) -> tuple[float, int]:
    budget = _budget(stage, fitted.natives, kinds, config, spec)
    lengths = _lengths(fitted.natives, kinds, dataclasses.replace(stage, max_tokens=budget), config)
    return _padding(lengths, config, spec), budget

  for times in (1, 2, 4):
    longer = dataclasses.replace(spec, tokens=times * spec.tokens, samples=times * spec.samples)
    rows = f"data.row_tokens={longer.tokens}, data.row_samples={longer.samples}" if times > 1 else ""
    for limit in (0.0,) if config.latents else (0.0, MUCH_PADDING):
      if times == 1 and not limit:
        continue  # as it is
      least, budget = tried(dataclasses.replace(config, max_padding=limit), longer)
      if limit and found and found[-1][0] == least:
        continue  # nothing to lower
      lower = f"data.max_padding={limit} (at most {budget} tokens a sample)" if limit else ""
      found.append((least, " and ".join(filter(None, (rows, lower)))))
  better = [(p, what) for p, what in found if p < padding - _GAIN]
  enough = [(p, what) for p, what in better if p <= MUCH_PADDING]
  return [f"about {100 * p:.2f} % with {what}" for p, what in enough[:2] or sorted(better)[:1]]


def _padding(lengths: np.ndarray, config: DataConfig, spec: BatchSpec) -> float:
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
