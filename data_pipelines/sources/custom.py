"""`data.source="my_package.my_module:MySource"`: a source of one's own, or a plain list of samples."""

import dataclasses
import importlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.sources import captions, manifest
from data_pipelines.sources.base import Found, ReadOptions, SampleInfo, Source, UnreadableError
from sora_jax.packing.geometry import ClipSpec

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PARTS = ("__len__", "info", "load", "fingerprint")


def is_custom(name: str) -> bool:
  return bool(_NAME.fullmatch(name))


def make(name: str, config: DataConfig) -> Any:
  """Calls the class or function with `data.source_kwargs`."""
  module_name, _, attribute = name.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise ValueError(f"data.source={name!r}: cannot import {module_name}: {e}") from e
  factory = getattr(module, attribute, None)
  if factory is None:
    raise ValueError(f"data.source={name!r}: {module_name} has no {attribute}")
  try:
    return factory(**config.source_kwargs)
  except TypeError as e:
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
  if isinstance(first.get("video"), np.ndarray):
    return ArraySource(made, name)
  records = [dict(made[i]) for i in range(len(made))]
  folder = Path(options.data_root or os.getcwd())
  return manifest.read_table(records, name, folder, folder, options)


class ArraySource:
  """Over a list of {"video": uint8 (T, H, W, 3), "caption", "fps"}; each is drawn once for its size."""

  def __init__(self, items: Any, name: str):
    self.name, self._items = name, items
    self.rejects: list[tuple[str, str]] = []
    self._infos = [self._info(i) for i in range(len(items))]

  def __len__(self) -> int:
    return len(self._infos)

  def info(self, i: int) -> SampleInfo:
    return self._infos[i]

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    video = self._items[i]["video"]
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

  def _info(self, i: int) -> SampleInfo:
    item = self._items[i]
    video = item.get("video")
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
      got = f"{video.dtype}{video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
      raise ValueError(f"{self.name}[{i}]['video'] is {got}, not a uint8 array (T, H, W, 3)")
    frames, height, width, _ = video.shape
    fps = float(item.get("fps") or 0.0)
    if frames > 1 and fps <= 0:
      raise ValueError(f"{self.name}[{i}] has {frames} frames and no 'fps'")
    return SampleInfo(
      id=i,
      name=str(item.get("name", f"{i:08d}")),
      num_frames=frames,
      height=height,
      width=width,
      fps=fps if frames > 1 else 0.0,
      captions=captions.of_record(dict(item)),
      label=int(item.get("label", -1)),
    )
