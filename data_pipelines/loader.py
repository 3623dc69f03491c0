"""Planned rows into loaded rows, and the memory of clips already decoded."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sources.base import SampleInfo, Source, UnreadableError
from sora_jax.packing.geometry import ClipSpec, Grid, grid_of, pad_frames, patchify, to_float
from sora_jax.packing.pack import PackedSample, pack_row
from sora_jax.packing.plan import PlannedRow, uniform
from sora_jax.types import BatchSpec, TokenBatch

Tokenize = Callable[[str], Sequence[int]]

# Streams of `uniform`, so that the choices for one sample are independent.
_START, _CAPTION, _GIVEN, _GIVEN_KIND, _GIVEN_COUNT = range(10, 15)


class ClipCache:
  """Keeps decoded clips until `max_bytes` are in use; nothing is evicted, for an epoch comes round to all."""

  def __init__(self, max_bytes: int):
    self.max_bytes, self.used, self.hits = max_bytes, 0, 0
    self._clips: dict[int, np.ndarray] = {}
    self._lock = threading.Lock()

  def __reduce__(self):  # each process keeps its own
    return (ClipCache, (self.max_bytes,))

  def get(self, key: int) -> np.ndarray | None:
    with self._lock:
      clip = self._clips.get(key)
      self.hits += clip is not None
      return clip

  def has_room(self, num_bytes: int) -> bool:
    """One clip may take at most a sixteenth: a long one would push out many."""
    return num_bytes <= self.max_bytes // 16 and self.used + num_bytes <= self.max_bytes

  def put(self, key: int, clip: np.ndarray) -> None:
    with self._lock:
      if key not in self._clips and self.used + clip.nbytes <= self.max_bytes:
        self._clips[key] = clip
        self.used += clip.nbytes


class RowLoader:
  """PlannedRow -> TokenBatch of one row; the same for the same (epoch, ids), in any thread or process."""

  def __init__(
    self,
    source: Source,
    infos: dict[int, SampleInfo],
    specs: dict[int, ClipSpec],
    config: DataConfig,
    spec: BatchSpec,
    tokenize: Tokenize,
    *,
    is_train: bool,
  ):
    self.source, self.infos, self.specs = source, infos, specs
    self.config, self.spec, self.tokenize, self.is_train = config, spec, tokenize, is_train
    self.cache = ClipCache(config.cache_mb * 2**20 // max(1, config.workers))
    self.failed: dict[str, str] = {}  # name -> reason, in this process

  def load(self, row: PlannedRow) -> TokenBatch:
    samples = [s for i in row.ids if (s := self._sample(i, row.epoch)) is not None]
    return pack_row(samples, self.spec, unreadable=len(row.ids) - len(samples))

  def _sample(self, i: int, epoch: int) -> PackedSample | None:
    info, spec, patch = self.infos[i], self.specs[i], self.config.patch
    try:
      clip = self._clip(i, epoch)
      if clip.shape != (spec.num_frames, spec.height, spec.width, 3) or clip.dtype != np.uint8:
        raise UnreadableError("unreadable", f"{clip.dtype}{clip.shape} was read where {spec} was planned")
    except UnreadableError as e:
      if info.name not in self.failed:
        self.failed[info.name] = str(e)
        logging.warning("%s: %s cannot be read, padding instead: %s", self.source.name, info.name, e)
      return None
    tokens = to_float(patchify(pad_frames(clip, patch[0]), patch))
    grid = grid_of(spec, patch)
    return PackedSample(
      tokens_LC=tokens,
      grid=grid,
      sample_id=info.id,
      text_ids=self.tokenize(self.caption(info, epoch)),
      fps=spec.fps,
      label=info.label,
      given_L=self._given(i, epoch, grid),
    )

  def _clip(self, i: int, epoch: int) -> np.ndarray:
    info, spec = self.infos[i], self.specs[i]
    start, total = self._start(i, epoch), total_frames(info, spec)
    whole = self.cache.get(i)
    if whole is None and self.cache.has_room(total * spec.height * spec.width * 3):
      try:
        whole = self.source.load(i, dataclasses.replace(spec, num_frames=total))
        self.cache.put(i, whole)
      except UnreadableError:
        whole = None  # the part wanted may still be sound
    if whole is not None:
      return whole[start : start + spec.num_frames]
    return self.source.load(i, spec, start / spec.fps if start else 0.0)

  def _draw(self, stream: int, epoch: int, i: int) -> float:
    return float(uniform(self.config.seed, stream, epoch, i))

  def _start(self, i: int, epoch: int) -> int:
    """First frame, counted at the rate that is read."""
    spare = total_frames(self.infos[i], self.specs[i]) - self.specs[i].num_frames
    if spare <= 0 or not (self.config.random_start and self.is_train):
      return 0
    return int(self._draw(_START, epoch, i) * (spare + 1))

  def caption(self, info: SampleInfo, epoch: int) -> str:
    """The one of its captions that a sample has in this epoch."""
    if not info.captions:
      return ""
    choice = self._draw(_CAPTION, epoch, info.id) if self.is_train else 0.0
    return info.captions[int(choice * len(info.captions))]

  def _given(self, i: int, epoch: int, grid: Grid) -> np.ndarray | None:
    """Tokens of the first frames, as a prompt; never all of them, and none of an image."""
    frames, cells = grid[0], grid[1] * grid[2]
    probability = self.config.given_probability if self.is_train and frames > 1 else 0.0
    if not probability or self._draw(_GIVEN, epoch, i) >= probability:
      return None
    count = 1
    if self._draw(_GIVEN_KIND, epoch, i) >= self.config.given_image_share:
      count += int(self._draw(_GIVEN_COUNT, epoch, i) * (frames // 2))
    return np.arange(frames * cells) < count * cells


def total_frames(info: SampleInfo, spec: ClipSpec) -> int:
  """Frames of the whole sample at the rate of `spec`."""
  if spec.num_frames == 1 or not (spec.fps and info.fps):
    return spec.num_frames
  return max(spec.num_frames, int(info.num_frames * spec.fps / info.fps + 1e-6))
