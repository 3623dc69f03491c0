"""A source over media files, however they were named."""

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from data_pipelines import index, media_io
from data_pipelines.sources import paths
from data_pipelines.sources.base import Entry, SampleInfo, Sizes
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
    form: str = "",
  ):
    self.name, self.root, self.form = name, str(root), form
    self.rejects = list(rejects)
    self.notes: list[tuple[str, str]] = []
    self._entries: list[Entry] = []
    self._infos: list[MediaInfo] = []  # of what is used
    self._wholes: list[MediaInfo] = []  # of the files
    probed = index.probe_all(
      entries, root, decode_limit_s=decode_limit_s, threads=threads, cache_dir=cache_dir
    )
    for entry, whole in zip(entries, probed):
      try:
        info = _used(entry, whole, min_size, max_aspect)
      except UnreadableError as e:
        self.rejects.append((entry.sample_name, str(e)))
        continue
      self._entries.append(entry)
      self._infos.append(info)
      self._wholes.append(whole)
      if info.note:
        self.notes.append((entry.sample_name, info.note))
    if not self._entries:
      counts = collections.Counter(reason.split(":")[0] for _, reason in self.rejects)
      reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
      shown = "; ".join(
        f"{paths.one_line(sample)}: {paths.one_line(reason, 200)}" for sample, reason in self.rejects[:3]
      )
      remedy = "; --config.data.allow_outside_root=True allows it" if counts["outside_root"] else ""
      raise ValueError(f"{name}: no sample can be used ({reasons}), as {shown}{remedy}")

  def __len__(self) -> int:
    return len(self._entries)

  def info(self, i: int) -> SampleInfo:
    entry, info, rate = self._entries[i], self._infos[i], self._wholes[i].fps
    return SampleInfo(
      id=i,
      name=entry.sample_name,
      num_frames=info.num_frames,
      height=info.height,
      width=info.width,
      fps=info.fps,
      captions=entry.captions,
      label=entry.label,
      start_s=entry.cut[0] / rate if entry.cut and rate else 0.0,
    )

  def entry(self, i: int) -> Entry:
    return self._entries[i]

  def sizes(self) -> Sizes:
    rows = np.array([(i.num_frames, i.height, i.width, i.fps) for i in self._infos], np.float64)
    return Sizes(*(rows[:, k].astype(np.int32) for k in range(3)), rows[:, 3])

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    try:
      return media_io.read(self._entries[i], self._wholes[i], spec, start_s)
    except (av.FFmpegError, OSError, ValueError) as e:  # a decoder's surprise concerns one file
      raise UnreadableError("unreadable", str(e)) from e

  def fingerprint(self) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for entry, info in zip(self._entries, self._infos):
      digest.update(repr((entry.sample_name, entry.captions, entry.label, info)).encode())
    return digest.hexdigest()


def _used(entry: Entry, whole: index.Probed, min_size: int, max_aspect: float) -> MediaInfo:
  if isinstance(whole, UnreadableError):
    raise whole
  info = media_io.cut_info(whole, entry)
  media_io.check_size(info, min_size, max_aspect)
  return info
