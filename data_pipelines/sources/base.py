"""What a source of samples is."""

import dataclasses
from typing import Protocol

import numpy as np

from data_pipelines.video_io import UnreadableError
from sora_jax.packing.geometry import ClipSpec

__all__ = ["Entry", "SampleInfo", "Source", "UnreadableError"]


class NoCaptionsError(ValueError):
  """A folder in which no file has a caption, where captions are asked for."""


@dataclasses.dataclass(frozen=True)
class SampleInfo:
  """What the index knows of a sample; sizes as displayed (rotation and sample aspect ratio applied)."""

  id: int
  name: str
  num_frames: int
  height: int
  width: int
  fps: float  # 0 for an image
  captions: tuple[str, ...]
  label: int = -1


@dataclasses.dataclass(frozen=True)
class Entry:
  """A media file that a folder or manifest names, not yet looked into."""

  name: str  # relative to the data root where it lies within
  path: str
  captions: tuple[str, ...] = ()
  label: int = -1


class Source(Protocol):
  """Random access to samples; must pickle, since worker processes hold it."""

  name: str
  rejects: list[tuple[str, str]]  # (name, reason)

  def __len__(self) -> int: ...

  def info(self, i: int) -> SampleInfo: ...

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    """uint8 (T, H, W, 3) of exactly `spec`'s size, or UnreadableError."""
    ...

  def fingerprint(self) -> str:
    """Changes when the samples do."""
    ...
