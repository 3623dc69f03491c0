"""`data.source="my_package.my_module:MySource"`: a source of one's own, or a plain list of samples."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipelines import video_io
from data_pipelines.config import DataConfig
from data_pipelines.named import named
from data_pipelines.parts import Part
from data_pipelines.sources import captions, manifest
from data_pipelines.sources.base import Found, ReadOptions, SampleInfo, Source, UnreadableError
from sora_jax.packing.geometry import ClipSpec

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PARTS = ("__len__", "info", "load", "fingerprint")


def is_custom(name: str) -> bool:
  return bool(_NAME.fullmatch(name))


def make(name: str, config: DataConfig) -> Any:
  """Calls the class or function with `data.source_kwargs`."""
  factory = named(name, f"data.source={name!r}")
  try:
    return factory(**config.source_kwargs)
  except TypeError as e:
    attribute = name.partition(":")[2]
    raise ValueError(f"data.source={name!r}: {attribute}(**data.source_kwargs): {e}") from e


def is_source(made: Any) -> bool:
  return all(hasattr(made, part) for part in _PARTS)


def adapt(made: Any, name: str, options: ReadOptions) -> Source | Found:
  """A source as it is; of a list of dicts, the files that they name, or the arrays that they hold."""
  if is_source(made):
    return made
  if not (hasattr(made, "__getitem__") and hasattr(made, "__len__")):
    missing = [part for part in _PARTS if not hasattr(made, part)]
    raise ValueError(f"{name} is no source: it has no {', '.join(missing)}, nor is it a list of dicts")
  if not len(made):
    raise ValueError(f"{name} has no samples")
  first = made[0]
  if not isinstance(first, Mapping):
    raise ValueError(f"{name}[0] is a {type(first).__name__}, no dict like {{'path': ..., 'caption': ...}}")
  if isinstance(first.get("video"), (np.ndarray, bytes)):
    return ArraySource(made, name, caption_column=options.caption_column)
  records = [dict(made[i]) for i in range(len(made))]
  folder = Path(options.data_root or os.getcwd())
  return manifest.read_table(records, name, folder, folder, options)


class ArraySource:
  """Over a list of {"video": uint8 (T, H, W, 3) or the bytes of a file, "caption", "fps"}; each is drawn once
  for its size. What cannot be used of bytes is in `rejects`."""

  def __init__(self, items: Any, name: str, *, caption_column: str = ""):
    self.name, self._items, self._column = name, items, caption_column
    self.rejects: list[tuple[str, str]] = []
    self._places: list[int] = []
    self._infos: list[SampleInfo] = []
    for place in range(len(items)):
      try:
        info = self._info(place)
      except UnreadableError as e:
        self.rejects.append((f"{place:08d}", str(e)))
        continue
      self._places.append(place)
      self._infos.append(info)
    if not self._infos:
      raise ValueError(f"{name}: no sample can be used, as {self.rejects[0][0]}: {self.rejects[0][1]}")

  def __len__(self) -> int:
    return len(self._infos)

  def info(self, i: int) -> SampleInfo:
    return self._infos[i]

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    video = self._items[self._places[i]]["video"]
    if isinstance(video, bytes):
      return _decode(video, spec, start_s)
    rate = self._infos[i].fps
    clip = np.empty((spec.num_frames, spec.height, spec.width, 3), np.uint8)
    for t in range(spec.num_frames):
      wanted = math.floor((start_s + t / (spec.fps or 1.0)) * rate + 1e-3)
      if wanted >= len(video):
        raise UnreadableError("truncated", f"frame {wanted} of {len(video)}")
      image = Image.fromarray(video[wanted])
      if image.size != (spec.width, spec.height):
        image = image.resize((spec.width, spec.height), Image.Resampling.BICUBIC, reducing_gap=3.0)
      clip[t] = np.asarray(image)
    return clip

  def fingerprint(self) -> str:
    return repr([dataclasses.astuple(info) for info in self._infos])

  def _info(self, place: int) -> SampleInfo:
    item = self._items[place]
    frames, height, width, fps = _size_of(item.get("video"), item, f"{self.name}[{place}]")
    return SampleInfo(
      id=len(self._infos),
      name=str(item.get("name", f"{place:08d}")),
      num_frames=frames,
      height=height,
      width=width,
      fps=fps if frames > 1 else 0.0,
      captions=captions.of_columns(dict(item), self._column),
      label=int(item.get("label", -1)),
    )


def _size_of(video: Any, item: Mapping[str, Any], where: str) -> tuple[int, int, int, float]:
  if isinstance(video, bytes):
    try:
      info = video_io.probe(Part(where, 0, len(video), video))
    except (av.FFmpegError, OSError, ValueError) as e:
      raise UnreadableError("unreadable", str(e)) from e
    return info.num_frames, info.height, info.width, info.fps
  if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
    got = f"{video.dtype}{video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
    raise ValueError(f"{where}['video'] is {got}, not a uint8 array (T, H, W, 3)")
  fps = float(item.get("fps") or 0.0)
  if len(video) > 1 and fps <= 0:
    raise ValueError(f"{where} has {len(video)} frames and no 'fps'")
  return *video.shape[:3], fps


def _decode(video: bytes, spec: ClipSpec, start_s: float) -> np.ndarray:
  try:
    return video_io.read_clip(
      Part("bytes", 0, len(video), video),
      num_frames=spec.num_frames,
      height=spec.height,
      width=spec.width,
      fps=spec.fps,
      start_s=start_s,
    )
  except (av.FFmpegError, OSError, ValueError) as e:
    raise UnreadableError("unreadable", str(e)) from e
