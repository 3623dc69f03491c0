"""Planned rows into loaded rows, and the memory of clips already decoded."""

import contextlib
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.latents import rounded
from data_pipelines.parts import UNREACHABLE, OutageError
from data_pipelines.sizes import Fitted
from data_pipelines.sources.base import SampleInfo, Source, UnreadableError
from data_pipelines.texts import held_by
from data_pipelines.workers import Notes
from sora_jax.packing import token_drop
from sora_jax.packing.geometry import ClipSpec, Grid, grid_of, pad_frames, patchify, positions, to_float
from sora_jax.packing.hashing import uniform
from sora_jax.packing.pack import PackedSample, pack_row, text_of
from sora_jax.packing.plan import PlannedRow
from sora_jax.types import NO_SAMPLE, BatchSpec, TokenBatch

Tokenize = Callable[[str], Sequence[int] | np.ndarray]  # caption -> ids, or an embedding: an `Embedder`

# Streams of `uniform`, so that the choices for one sample are independent.
_START, _CAPTION, _GIVEN, _GIVEN_KIND, _GIVEN_COUNT = range(10, 15)

_MANY, _RECENT = 32, 1024  # samples


class ClipCache:
  """Keeps decoded clips until `max_bytes` are in use. Nothing is evicted, as an epoch comes round to all, but
  when another stage of the run begins, with clips of other sizes."""

  def __init__(self, max_bytes: int):
    self.max_bytes, self.used, self.hits, self.stage = max_bytes, 0, 0, 0
    self._clips: dict[Hashable, np.ndarray] = {}
    self._lock = threading.Lock()

  def __reduce__(self):  # each process keeps its own
    return (ClipCache, (self.max_bytes,))

  def __len__(self) -> int:
    return len(self._clips)

  def get(self, key: Hashable) -> np.ndarray | None:
    with self._lock:
      clip = self._clips.get(key)
      self.hits += clip is not None
      return clip

  def enter(self, stage: int) -> None:
    with self._lock:
      if stage > self.stage:
        self.stage, self.used = stage, 0
        self._clips.clear()

  def has_room(self, num_bytes: int) -> bool:
    """One clip may take at most a sixteenth: a long one would push out many."""
    return num_bytes <= self.max_bytes // 16 and self.used + num_bytes <= self.max_bytes

  def put(self, key: Hashable, clip: np.ndarray) -> None:
    with self._lock:
      if key not in self._clips and self.used + clip.nbytes <= self.max_bytes:
        self._clips[key] = clip
        self.used += clip.nbytes


class Planned(NamedTuple):
  """A sample as a row of the plan has it."""

  epoch: int
  info: SampleInfo
  spec: ClipSpec
  kept: int  # tokens
  stage: int


class RowLoader:
  """PlannedRow -> TokenBatch of one row; the same for the same row, in any thread or process."""

  def __init__(
    self,
    source: Source,
    fitted: Fitted,
    config: DataConfig,
    spec: BatchSpec,
    tokenize: Tokenize,
    *,
    is_train: bool,
  ):
    self.source, self.fitted = source, fitted
    self.config, self.spec, self.tokenize, self.is_train = config, spec, tokenize, is_train
    self._has_texts = bool(config.text) and any(held_by(source))
    self._channels = config.latent_channels if config.latents else 3
    self._cell_bytes = 4 * self._channels if config.latents else 3
    self.cache = ClipCache(config.cache_mb * 2**20 // max(1, config.workers))
    self.failed: dict[str, str] = {}  # name -> reason, in this process
    self.ended: dict[int, str] = {}  # samples that end the process which loads them
    self.notes: Notes | None = None  # kept by worker processes

  def load(self, row: PlannedRow) -> TokenBatch:
    self.cache.enter(row.phase)
    samples = [s for p in self.planned(row) if (s := self._sample(p)) is not None]
    return pack_row(samples, self.spec, unreadable=len(row.ids) - len(samples))

  def planned(self, row: PlannedRow) -> Iterator[Planned]:
    """The samples of a row; nothing is read."""
    fitted = self.fitted
    for epoch, n, variant in zip(row.epochs, row.ids, row.variants):
      kind = fitted.kinds[n]
      yield Planned(
        epoch,
        self.source.info(int(fitted.ids[n])),
        fitted.specs[row.phase][variant][kind],
        int(fitted.phases[row.phase].table[variant, kind]),
        row.phase,
      )

  def _sample(self, p: Planned) -> PackedSample | None:
    info, spec, patch = p.info, p.spec, self.config.patch
    try:
      clip = self._clip(p)
      want = (spec.num_frames, spec.height, spec.width, self._channels)
      if clip.shape != want or (clip.dtype != np.uint8) != bool(self.config.latents):
        raise UnreadableError("unreadable", f"{clip.dtype}{clip.shape} was read where {spec} was planned")
      text = text_of(self.text(info, self.caption(info, p.epoch)))
    except UnreadableError as e:
      if info.name not in self.failed:
        self.failed[info.name] = str(e)
        if self.notes:
          self.notes.failed(info.name, str(e))
        logging.warning("%s: %s cannot be read, padding instead: %s", self.source.name, info.name, e)
      return None
    if self.config.latents:
      clip = rounded(clip, info.name)
    grid = grid_of(spec, patch)
    tokens = patchify(pad_frames(clip, patch[0]), patch)
    sample = PackedSample(
      tokens_LC=tokens.astype(np.float32) if self.config.latents else to_float(tokens),
      grid=grid,
      sample_id=info.id,
      **text,
      fps=spec.fps,
      label=info.label,
      given_L=self._given(info.id, p.epoch, grid),
    )
    return self._dropped(sample, p)

  def _dropped(self, sample: PackedSample, p: Planned) -> PackedSample:
    """Without the tokens that the plan has no room for; those that stay keep their positions."""
    if p.kept == len(sample.tokens_LC):
      return sample
    places = token_drop.keep(
      sample.tokens_LC,
      sample.grid,
      p.kept,
      select=self.config.token_drop.select,
      key=(self.config.seed, p.epoch, sample.sample_id),
      given_L=sample.given_L,
    )
    return dataclasses.replace(
      sample,
      tokens_LC=sample.tokens_LC[places],
      given_L=None if sample.given_L is None else sample.given_L[places],
      position_L3=positions(sample.grid)[places],
    )

  def _clip(self, p: Planned) -> np.ndarray:
    info, spec = p.info, p.spec
    start, total = self._start(p), total_frames(info, spec)
    key = (info.id, spec)
    whole = self.cache.get(key)
    if whole is None and self.cache.has_room(total * spec.height * spec.width * self._cell_bytes):
      try:
        whole = self._read(info.id, dataclasses.replace(spec, num_frames=total), 0.0)
        self.cache.put(key, whole)
      except UnreadableError as e:
        if e.reason == UNREACHABLE:  # asked for often enough
          raise
        whole = None  # the part wanted may still be sound
    if whole is not None:
      return whole[start : start + spec.num_frames]
    return self._read(info.id, spec, start / spec.fps if start else 0.0)

  def _read(self, i: int, spec: ClipSpec, start_s: float) -> np.ndarray:
    if i in self.ended:
      raise UnreadableError("ends_process", self.ended[i])
    with self.notes.loading(i, spec, start_s) if self.notes else contextlib.nullcontext():
      return self.source.load(i, spec, start_s)

  def _draw(self, stream: int, epoch: int, i: int) -> float:
    return float(uniform(self.config.seed, stream, epoch, i))

  def _start(self, p: Planned) -> int:
    """First frame, counted at the rate that is read."""
    spare = total_frames(p.info, p.spec) - p.spec.num_frames
    if spare <= 0 or not (self.config.random_start and self.is_train):
      return 0
    return int(self._draw(_START, p.epoch, p.info.id) * (spare + 1))

  def caption(self, info: SampleInfo, epoch: int) -> str:
    """The first one of held-out samples; else drawn by `caption_weights` among those that are not empty."""
    captions = [c for c in info.captions if c] if not self.config.caption_weights else info.captions
    if not any(captions):
      return ""
    if not self.is_train:
      return next(c for c in captions if c)
    weights = self.config.caption_weights or (1.0,) * len(captions)
    weights = np.array(
      [w if c else 0.0 for c, w in itertools.zip_longest(captions, weights, fillvalue=0)][: len(captions)]
    )
    if not weights.sum():  # none that the weights speak of
      weights = np.array([float(bool(c)) for c in captions])
    shares = np.cumsum(weights) / weights.sum()
    return captions[int(np.searchsorted(shares, self._draw(_CAPTION, epoch, info.id), side="right"))]

  def text(self, info: SampleInfo, caption: str) -> Sequence[int] | np.ndarray:
    """Ids or the embedding of one of the sample's captions: that which is stored, else made now."""
    if not self.config.text:
      return self.tokenize(caption)
    key = ("text", info.id if self._has_texts else -1, caption)
    made = self.cache.get(key)
    if made is None:
      made = self._stored(info, caption)
      made = self.tokenize(caption) if made is None else self.tokenize.fitted(made, info.name)
      self.cache.put(key, made)
    return made

  def _stored(self, info: SampleInfo, caption: str) -> np.ndarray | None:
    return self.source.text(info.id, info.captions.index(caption)) if self._has_texts and caption else None

  def count_text(self, info: SampleInfo) -> int:
    """Tokens of the first caption."""
    caption = next((c for c in info.captions if c), "")
    count = None
    if self._has_texts and caption:
      count = self.source.text_tokens(info.id, info.captions.index(caption))
      count = min(count, self.tokenize.max_tokens or count) if count else None
    return len(text_of(self.text(info, caption))["text_ids"]) if count is None else count

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


class Unread:
  """Ends a run that has hardly anything left to learn from; a few samples that cannot be read are padding."""

  def __init__(self, loader: RowLoader):
    self._loader, self._read, self._lost = loader, 0, 0

  def add(self, batch: TokenBatch) -> None:
    self._read += int((batch.sample_id_BN != NO_SAMPLE).sum())
    self._lost += int(batch.unreadable_B.sum())
    if self._lost >= _MANY and self._lost > self._read:
      failed = self._loader.notes.failures() if self._loader.notes else self._loader.failed
      told = [f"as {name}: {why}" for name, why in failed.items()]
      is_outage = failed and all(why.startswith(UNREACHABLE) for why in failed.values())
      raise (OutageError if is_outage else ValueError)(
        f"{self._loader.source.name}: {self._lost} of the last {self._lost + self._read} samples could not "
        f"be read, {(told or ['their log says why'])[0]}"
      )
    if self._lost + self._read >= _RECENT:
      self._read, self._lost = self._read // 2, self._lost // 2


def total_frames(info: SampleInfo, spec: ClipSpec) -> int:
  """Frames of the whole sample at the rate of `spec`."""
  if spec.num_frames == 1 or not (spec.fps and info.fps):
    return spec.num_frames
  return max(spec.num_frames, int(info.num_frames * spec.fps / info.fps + 1e-6))
