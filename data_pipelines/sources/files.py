"""A source over media files, however they were named."""

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from data_pipelines import index, video_io
from data_pipelines.sources.base import Entry, SampleInfo
from data_pipelines.video_io import MediaInfo, UnreadableError
from sora_jax.packing.geometry import ClipSpec


class FileSource:
  """The entries that can be used; the others are in `rejects`, and `notes` tells of files used in part."""

  def __init__(
    self,
    name: str,
    root: str | Path,
    entries: Sequence[Entry],
    rejects: Sequence[tuple[str, str]],
    *,
    min_size: int,
    max_aspect: float,
    decode_limit_s: float,
    threads: int,
    cache_dir: str,
  ):
    self.name, self.root = name, str(root)
    self.rejects = list(rejects)
    self.notes: list[tuple[str, str]] = []
    self._entries: list[Entry] = []
    self._infos: list[MediaInfo] = []
    probed = index.probe_all(
      entries, root, decode_limit_s=decode_limit_s, threads=threads, cache_dir=cache_dir
    )
    for entry, info in zip(entries, probed):
      reason = str(info) if isinstance(info, UnreadableError) else _unfit(info, min_size, max_aspect)
      if reason:
        self.rejects.append((entry.name, reason))
        continue
      self._entries.append(entry)
      self._infos.append(info)
      if info.note:
        self.notes.append((entry.name, info.note))
    if not self._entries:
      counts = collections.Counter(reason.split(":")[0] for _, reason in self.rejects)
      reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
      raise ValueError(f"{name}: no sample can be used ({reasons})")

  def __len__(self) -> int:
    return len(self._entries)

  def info(self, i: int) -> SampleInfo:
    entry, info = self._entries[i], self._infos[i]
    return SampleInfo(
      id=i,
      name=entry.name,
      num_frames=info.num_frames,
      height=info.height,
      width=info.width,
      fps=info.fps,
      captions=entry.captions,
      label=entry.label,
    )

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    try:
      return video_io.read_clip(
        self._entries[i].path,
        num_frames=spec.num_frames,
        height=spec.height,
        width=spec.width,
        fps=spec.fps,
        start_s=start_s,
      )
    except (av.FFmpegError, OSError, ValueError) as e:  # a decoder's surprise concerns one file
      raise UnreadableError("unreadable", str(e)) from e

  def fingerprint(self) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for entry, info in zip(self._entries, self._infos):
      digest.update(repr((entry.name, entry.captions, entry.label, info)).encode())
    return digest.hexdigest()


def _unfit(info: MediaInfo, min_size: int, max_aspect: float) -> str:
  size = f"{info.width}x{info.height}"
  if min(info.width, info.height) < min_size:
    return f"too_small: {size}, data.min_size={min_size}"
  if max(info.width, info.height) > max_aspect * min(info.width, info.height):
    return f"aspect: {size}, data.max_aspect={max_aspect:g}"
  return ""
