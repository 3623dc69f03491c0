"""What a source of samples is."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines.video_io import UnreadableError
from sora_jax.packing.geometry import ClipSpec

__all__ = ["Entry", "Found", "ReadOptions", "SampleInfo", "Sizes", "Source", "UnreadableError"]


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
  start_s: float = 0.0  # where it begins in the file that it is a cut of


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """A media file that a folder or manifest names, not yet looked into."""

  name: str  # relative to the data root where it lies within
  path: str
  captions: tuple[str, ...] = ()
  label: int = -1
  span: tuple[int, int] | None = None  # (offset, bytes): the medium is this part of the file `path`
  frames: tuple[str, ...] = ()  # images in display order: the medium is the folder `path`
  fps: float = 0.0  # of `frames`, which do not say
  frame_bytes: tuple[int, ...] = ()  # of each, in an object store
  cut: tuple[int, int] | None = None  # first frame, one past the last (-1 = to the end)
  crop: tuple[int, int, int, int] | None = None  # left, right, top, bottom: pixels as displayed

  @property
  def sample_name(self) -> str:
    """Tells samples of one file apart."""
    cut = "" if self.cut is None else f"#{self.cut[0]}-{self.cut[1] if self.cut[1] >= 0 else 'end'}"
    return self.name + cut + ("" if self.crop is None else "#" + ",".join(map(str, self.crop)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
  """The keys of `config.data` that the readers of formats go by."""

  data_root: str = ""
  media_column: str = ""
  caption_column: str = ""
  captions_optional: bool = False
  allow_outside_root: bool = False
  frame_rate: float = 24.0


class Found(NamedTuple):
  """What a reader of a format found: nothing is opened but manifests and captions."""

  root: Path  # of the data; the index is kept here
  entries: list[Entry]
  rejects: list[tuple[str, str]]  # (name, reason)


class Sizes(NamedTuple):
  """Of every sample of a source, as arrays; rates as in SampleInfo."""

  num_frames: np.ndarray
  height: np.ndarray
  width: np.ndarray
  fps: np.ndarray


class Source(Protocol):
  """Random access to samples; must pickle, since worker processes hold it.

  A source of millions also has `sizes() -> Sizes`, memory-mapped if it likes, and `names()`, an iterator over
  those of all samples: planning then asks no `info`. One that has kept them, `places()` too: `place_of` each.
  One of latents has `encoder_hash`, not empty, and mostly `channels`; its sizes count latent cells and `load`
  gives floats.
  One with embeddings of its captions has `text_encoder_hash`, `text(i, k)`, that of caption k, and
  `text_tokens(i, k)`, its length; each may be None where that is not known.
  """

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


def require_encoder(
  name: str, held: str, wanted: str, *, what: str = "latents", instead: str = "pixels"
) -> None:
  """Those of another encoder are noise to a model: refused, as is `instead` in their place."""
  if held != wanted:
    has, wants = (f"{what} of encoder {mark}" if mark else instead for mark in (held, wanted))
    remedy = "prepare it with that encoder" if wanted else "prepare it without one"
    raise ValueError(f"{name} holds {has}, the run wants {wants}: {remedy}")


def sizes_of(source: Source) -> Sizes:
  """Arrays of a source that keeps them, else drawn from its infos."""
  if hasattr(source, "sizes"):
    return source.sizes()
  rows = np.empty((len(source), 4), np.float64)
  for i in range(len(source)):
    info = source.info(i)
    rows[i] = info.num_frames, info.height, info.width, info.fps
  return Sizes(*(rows[:, k].astype(np.int32) for k in range(3)), rows[:, 3])


def place_of(name: str) -> int:
  """In [0, 2^64), at random: what decides whether a sample is held out."""
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def places_of(source: Source) -> np.ndarray:
  if callable(getattr(source, "places", None)):
    return source.places()
  return np.fromiter(map(place_of, names_of(source)), np.uint64, len(source))


def faults_of(source: Source) -> Iterator[str]:
  """Lines on what a source finds wrong with itself where it is asked."""
  return source.faults() if callable(getattr(source, "faults", None)) else iter(())


def names_of(source: Source) -> Iterator[str]:
  """Of all samples, in their order."""
  if callable(getattr(source, "names", None)):
    return source.names()
  return (source.info(i).name for i in range(len(source)))
