"""Looks into and reads an entry: a file, a part of a file, a folder of frames, or a cut or crop of these."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines import image_io, video_io
from data_pipelines.parts import Media, Part
from data_pipelines.sources.base import Entry
from data_pipelines.video_io import MediaInfo, UnreadableError
from sora_jax.packing.geometry import ClipSpec


def probe(entry: Entry, decode_limit_s: float) -> MediaInfo:
  """Of the whole medium; `cut_info` says what is left of it."""
  if entry.frames:
    return _probe_frames(entry)
  return video_io.probe(_media(entry), decode_limit_s=decode_limit_s)


def cut_info(info: MediaInfo, entry: Entry) -> MediaInfo:
  """What an entry's cut and crop leave; raises where that is nothing."""
  if entry.cut is not None:
    first, stop = entry.cut
    stop = info.num_frames if stop < 0 else min(stop, info.num_frames)
    if not 0 <= first < stop:
      raise UnreadableError("cut", f"frames {entry.cut} of a medium of {info.num_frames}")
    num_frames = stop - first
    note = info.note
    if entry.cut[1] > info.num_frames:
      note = f"cut to frame {entry.cut[1]}, the file has {info.num_frames}" + (f"; {note}" if note else "")
    fps = info.fps if num_frames > 1 else 0.0
    info = dataclasses.replace(info, num_frames=num_frames, fps=fps, note=note)
  if entry.crop is not None:
    left, right, top, bottom = entry.crop
    if not (0 <= left < right <= info.width and 0 <= top < bottom <= info.height):
      raise UnreadableError("crop", f"{entry.crop} (x0, x1, y0, y1) of {info.width}x{info.height} pixels")
    info = dataclasses.replace(info, width=right - left, height=bottom - top)
  return info


def check_size(info: MediaInfo, min_size: int, max_aspect: float) -> None:
  size = f"{info.width}x{info.height}"
  if min(info.width, info.height) < min_size:
    raise UnreadableError("too_small", f"{size}, data.min_size={min_size}")
  if max(info.width, info.height) > max_aspect * min(info.width, info.height):
    raise UnreadableError("aspect", f"{size}, data.max_aspect={max_aspect:g}")


def read(entry: Entry, whole: MediaInfo, spec: ClipSpec, start_s: float) -> np.ndarray:
  """uint8 (T, H, W, 3); `whole` is what `probe` said, `start_s` counts from the cut."""
  if entry.cut is not None and whole.fps:
    start_s += entry.cut[0] / whole.fps
  return read_cropped(lambda spec, start_s: _read(entry, spec, start_s), whole, entry.crop, spec, start_s)


def read_cropped(
  load: Callable[[ClipSpec, float], np.ndarray],
  whole: MediaInfo,
  crop: tuple[int, int, int, int] | None,
  spec: ClipSpec,
  start_s: float,
) -> np.ndarray:
  """The part `crop` (left, right, top, bottom in pixels of `whole`), at the size of `spec`."""
  if crop is None:
    return load(spec, start_s)
  left, right, top, bottom = crop
  across, down = spec.width / (right - left), spec.height / (bottom - top)
  full = dataclasses.replace(
    spec,
    width=max(spec.width, round(whole.width * across)),
    height=max(spec.height, round(whole.height * down)),
  )
  x = min(round(left * across), full.width - spec.width)
  y = min(round(top * down), full.height - spec.height)
  clip = load(full, start_s)
  return np.ascontiguousarray(clip[:, y : y + spec.height, x : x + spec.width])


def _media(entry: Entry) -> Media:
  return entry.path if entry.span is None else Part(entry.path, *entry.span)


def _frame(entry: Entry, k: int) -> Media:
  if not entry.frame_bytes:
    return Path(entry.path, entry.frames[k])
  return Part(f"{entry.path}/{entry.frames[k]}", 0, entry.frame_bytes[k])


def _read(entry: Entry, spec: ClipSpec, start_s: float) -> np.ndarray:
  if not entry.frames:
    return video_io.read_clip(
      _media(entry),
      num_frames=spec.num_frames,
      height=spec.height,
      width=spec.width,
      fps=spec.fps,
      start_s=start_s,
    )
  clip = np.empty((spec.num_frames, spec.height, spec.width, 3), np.uint8)
  at = -1
  for t, wanted in enumerate(frame_numbers(spec, start_s, entry.fps)):
    if wanted >= len(entry.frames):
      raise UnreadableError("truncated", f"frame {wanted} of {len(entry.frames)}")
    if wanted == at:
      clip[t] = clip[t - 1]
    else:
      clip[t] = image_io.read_image(_frame(entry, wanted), spec.height, spec.width)[0]
    at = wanted
  return clip


def frame_numbers(spec: ClipSpec, start_s: float, fps: float) -> list[int]:
  """Frames on display at start_s + i / spec.fps in a medium of constant rate."""
  return [math.floor((start_s + i / (spec.fps or 1.0)) * fps + 1e-3) for i in range(spec.num_frames)]


def _probe_frames(entry: Entry) -> MediaInfo:
  """Of an object store the first alone is fetched: the others are, whole, when they are read."""
  names, size = entry.frames, None
  for k, name in enumerate(names[:1] if entry.frame_bytes else names):
    info = image_io.probe_image_header(_frame(entry, k))
    if size not in (None, info):
      raise UnreadableError("frames_differ", f"{name} is {info[0]}x{info[1]}, the first {size[0]}x{size[1]}")
    size = info
  fps = entry.fps if len(names) > 1 else 0.0
  return MediaInfo(num_frames=len(names), height=size[1], width=size[0], fps=fps)
