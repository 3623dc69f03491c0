"""What is prepared: media files that nothing has opened yet, or the samples of any other source."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipelines import media_io
from data_pipelines.parts import UnreadableError
from data_pipelines.prepare.config import mark_of
from data_pipelines.sources.base import Entry, Source
from data_pipelines.video_io import MediaInfo
from sora_jax.packing.geometry import ClipSpec

Crop = tuple[int, int, int, int]  # left, right, top, bottom


@dataclasses.dataclass(frozen=True)
class Item:
  """One file, or one sample of a source."""

  number: int
  name: str
  key: str  # changes when the file does
  captions: tuple[str, ...]
  label: int
  entry: Entry | None  # None: sample `number` of the source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What DataConfig says of usable files."""

  min_size: int
  max_aspect: float
  decode_limit_s: float


@dataclasses.dataclass(frozen=True)
class Medium:
  whole: MediaInfo  # of the file
  info: MediaInfo  # of the part that the entry names
  load: Callable[[ClipSpec, float], np.ndarray]

  def read(self, spec: ClipSpec, start_s: float, crop: Crop | None = None) -> np.ndarray:
    """uint8 (T, H, W, 3); raises UnreadableError alone."""
    try:
      return media_io.read_cropped(self.load, self.info, crop, spec, start_s)
    except (av.FFmpegError, OSError, ValueError) as e:  # a decoder's surprise concerns one file
      raise UnreadableError("unreadable", str(e)) from e


def items_of_entries(entries: list[Entry]) -> list[Item]:
  items = []
  for number, entry in enumerate(entries):
    key = mark_of((entry, _state(entry)))
    items.append(Item(number, entry.sample_name, key, entry.captions, entry.label, entry))
  return items


def items_of_source(source: Source) -> list[Item]:
  items, mark = [], source.fingerprint()
  for number in range(len(source)):
    info = source.info(number)
    items.append(Item(number, info.name, mark_of((mark, info)), info.captions, info.label, None))
  return items


def open_item(item: Item, source: Any, limits: Limits) -> Medium:
  """Looks into the medium; raises UnreadableError where it cannot be used."""
  if item.entry is None:
    sample = source.info(item.number)
    info = MediaInfo(num_frames=sample.num_frames, height=sample.height, width=sample.width, fps=sample.fps)
    whole = info
  else:
    try:
      whole = media_io.probe(item.entry, limits.decode_limit_s)
    except (av.FFmpegError, OSError, ValueError) as e:
      raise UnreadableError("unreadable", str(e)) from e
    info = media_io.cut_info(whole, item.entry)
  media_io.check_size(info, limits.min_size, limits.max_aspect)
  return known_medium(item, source, whole, info)


def known_medium(item: Item, source: Any, whole: MediaInfo, info: MediaInfo) -> Medium:
  """Of what was looked into before: nothing is opened until it is read."""
  if item.entry is None:
    return Medium(whole, info, lambda spec, start_s: source.load(item.number, spec, start_s))
  return Medium(whole, info, lambda spec, start_s: media_io.read(item.entry, whole, spec, start_s))


def _state(entry: Entry) -> list[tuple[int, int]]:
  names = [str(Path(entry.path, name)) for name in entry.frames] or [entry.path]
  try:
    return [(s.st_size, s.st_mtime_ns) for s in map(os.stat, names)]
  except OSError:
    return []
