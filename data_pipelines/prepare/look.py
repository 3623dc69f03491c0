"""Looks through one file: its shots, its clips, what is wrong with them. A pure function of the file.

A clip is a dict: start_s, duration_s, native (T, H, W, fps as displayed), crop, scores, hashes, cells, thumb.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.parts import UnreadableError
from data_pipelines.prepare import hooks, shots, signals
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.inputs import Crop, Item, Limits, Medium, open_item
from data_pipelines.prepare.signals import Signals
from sora_jax.packing.geometry import ClipSpec

_WINDOW_BYTES = 2**26  # of small frames in memory at once
_LOST = (0, 1, 2, 4, 8, 16, 32)  # frames given up where a file ends before its stated end
_THUMB = 112
_SCORED_FRAMES, _SCORED_SIDE = 8, 256

Beat = Callable[[], None]  # says that the file is still being worked on


class Dropped(Exception):
  def __init__(self, rule: str, detail: str):
    super().__init__(rule, detail)
    self.rule, self.detail = rule, detail


def look(
  item: Item, source: Any, config: PrepareConfig, limits: Limits, *, thumbs: bool, beat: Beat
) -> dict[str, Any]:
  result = {
    "name": item.name,
    "whole": None,
    "info": None,
    "note": "",
    "shots": 0,
    "clips": [],
    "dropped": [],
  }
  try:
    medium = open_item(item, source, limits)
    beat()
    result["whole"], result["info"] = dataclasses.asdict(medium.whole), dataclasses.asdict(medium.info)
    result["note"] = medium.info.note
    if config.has("filter"):
      _check_file(item, medium, config)
    seen, spans, fps = _see(medium, config, beat)
  except UnreadableError as e:
    result["dropped"].append({"rule": e.reason, "detail": e.detail, "start_s": 0.0, "thumb": ""})
    return result
  except Dropped as e:
    result["dropped"].append({"rule": e.rule, "detail": e.detail, "start_s": 0.0, "thumb": ""})
    return result
  result["shots"] = len(spans)
  for first, stop in _cut(spans, len(seen.luma), fps, config):
    beat()
    clip = _clip(medium, seen, first, stop, fps)
    try:
      _filter(item, medium, clip, signals.cut(seen, first, stop), config)
    except Dropped as e:
      result["dropped"].append(
        {
          "rule": e.rule,
          "detail": e.detail,
          "start_s": clip["start_s"],
          "thumb": _thumb(medium, clip) if thumbs else "",
        }
      )
      continue
    except UnreadableError as e:
      result["dropped"].append(
        {"rule": e.reason, "detail": e.detail, "start_s": clip["start_s"], "thumb": ""}
      )
      continue
    clip["thumb"] = _thumb(medium, clip) if thumbs else ""
    result["clips"].append(clip)
  return result


def _check_file(item: Item, medium: Medium, config: PrepareConfig) -> None:
  info = medium.info
  if info.num_frames > 1 and info.fps < config.min_fps:
    raise Dropped("fps", f"{info.fps:.2f} frames a second, --min_fps={config.min_fps:g}")
  words = max((len(c.split()) for c in item.captions), default=0)
  if words < config.min_caption_words:
    raise Dropped("caption", f"{words} words, --min_caption_words={config.min_caption_words}")
  if config.max_caption_words and words > config.max_caption_words:
    raise Dropped("caption", f"{words} words, --max_caption_words={config.max_caption_words}")


def _see(medium: Medium, config: PrepareConfig, beat: Beat) -> tuple[Signals, list[tuple[int, int]], float]:
  """(signals, shots, their frames a second) of the whole medium, window by window."""
  info = medium.info
  fps = min(info.fps, config.look_fps) if info.num_frames > 1 else 0.0
  collector, finder = signals.Collector(), None
  if fps and config.has("shots"):
    finder = shots.ShotFinder(config.shot_detector, config.shot_threshold, fps, config.min_duration)
  for frames in _windows(medium, fps, config.look_size):
    beat()
    for frame in frames:
      collector.add(frame)
      if finder is not None:
        finder.add(frame)
  spans = finder.shots() if finder is not None else [(0, len(collector))]
  return collector.signals(), spans, fps


def _windows(medium: Medium, fps: float, side: int) -> Iterator[np.ndarray]:
  info = medium.info
  scale = min(1.0, side / max(info.height, info.width))
  height, width = max(9, round(info.height * scale)), max(9, round(info.width * scale))
  if not fps:
    yield medium.read(ClipSpec(1, height, width), 0.0)
    return
  total = max(1, int(info.num_frames * fps / info.fps + 1e-6))
  most = max(1, _WINDOW_BYTES // (height * width * 3))
  at = 0
  while at < total:
    count = min(most, total - at)
    yield _all_there(medium, ClipSpec(count, height, width, fps), at, is_last=at + count == total)
    at += count


def _all_there(medium: Medium, spec: ClipSpec, at: int, *, is_last: bool) -> np.ndarray:
  """The frames; of the last window those that are there: a mean rate may promise a few too many."""
  for lost in _LOST if is_last else _LOST[:1]:
    if spec.num_frames - lost < 1:
      break
    try:
      return medium.read(dataclasses.replace(spec, num_frames=spec.num_frames - lost), at / spec.fps)
    except UnreadableError as e:
      error = e
  raise error


def _cut(
  spans: list[tuple[int, int]], count: int, fps: float, config: PrepareConfig
) -> Iterator[tuple[int, int]]:
  """Parts of shots; what is too short is left to the filter."""
  if not fps:
    yield 0, 1
    return
  trim = round(config.trim * fps)
  for first, stop in spans:
    if config.has("cut"):
      first += trim if first else 0
      stop -= trim if stop < count else 0
    if stop <= first:
      continue
    most = config.max_duration * fps if config.has("cut") else math.inf
    parts = max(1, math.ceil((stop - first) / most - 1e-9))
    edges = [first + (stop - first) * k // parts for k in range(parts + 1)]
    yield from zip(edges, edges[1:])


def _clip(medium: Medium, seen: Signals, first: int, stop: int, fps: float) -> dict[str, Any]:
  info, part = medium.info, signals.cut(seen, first, stop)
  marks, cells = signals.hashes(part)
  return {
    "start_s": round(first / fps, 6) if fps else 0.0,
    "duration_s": round((stop - first) / fps, 6) if fps else 0.0,
    "native": [stop - first, info.height, info.width, fps],
    "source_fps": info.fps,
    "crop": None,
    "scores": signals.scores(part),
    "hashes": marks,
    "cells": cells,
  }


def _filter(item: Item, medium: Medium, clip: dict[str, Any], part: Signals, config: PrepareConfig) -> None:
  """Raises Dropped; crops black bars."""
  info, values = medium.info, clip["scores"]
  if info.num_frames > 1 and config.has("cut") and clip["duration_s"] < config.min_duration - 1e-6:
    raise Dropped("too_short", f"{clip['duration_s']:.2f} s, --min_duration={config.min_duration:g}")
  if not config.has("filter"):
    return
  if values["luma"] < config.min_luma:
    raise Dropped("black", f"mean {values['luma']:.1f} of 255, --min_luma={config.min_luma:g}")
  if values["contrast"] < config.min_contrast:
    raise Dropped(
      "flat", f"deviation {values['contrast']:.1f} of 255, --min_contrast={config.min_contrast:g}"
    )
  if info.num_frames > 1:
    if values["motion"] < config.min_motion:
      raise Dropped("static", f"motion {values['motion']:.3f}, --min_motion={config.min_motion:g}")
    if config.max_motion and values["motion"] > config.max_motion:
      raise Dropped("motion", f"motion {values['motion']:.1f}, --max_motion={config.max_motion:g}")
  if config.borders != "keep":
    _borders(info.height, info.width, clip, part, config)
  if config.score:
    frames = _few_frames(medium, clip)
    value = hooks.score(config.score, item.name, frames, item.captions)
    values["score"] = round(value, 6)
    if not value >= config.min_score:  # a NaN is dropped too
      raise Dropped("score", f"{value:.3f}, --min_score={config.min_score:g}")


def _borders(height: int, width: int, clip: dict[str, Any], part: Signals, config: PrepareConfig) -> None:
  left, right, top, bottom = signals.bars(part)
  share = 1 - (1 - left - right) * (1 - top - bottom)
  if not share:
    return
  clip["scores"]["borders"] = round(share, 4)
  if config.borders == "drop" or share > config.max_borders:
    limit = "--borders=drop" if config.borders == "drop" else f"--max_borders={config.max_borders:g}"
    raise Dropped("borders", f"{100 * share:.0f} % of the picture, {limit}")
  clip["crop"] = [
    math.ceil(left * width),
    math.floor((1 - right) * width),
    math.ceil(top * height),
    math.floor((1 - bottom) * height),
  ]


def _few_frames(medium: Medium, clip: dict[str, Any]) -> np.ndarray:
  """Up to 8 frames spread over a clip, small."""
  count = min(_SCORED_FRAMES, clip["native"][0])
  return _frames(medium, clip, count, _SCORED_SIDE)


def _frames(medium: Medium, clip: dict[str, Any], count: int, side: int) -> np.ndarray:
  crop: Crop | None = tuple(clip["crop"]) if clip["crop"] else None
  height = crop[3] - crop[2] if crop else medium.info.height
  width = crop[1] - crop[0] if crop else medium.info.width
  scale = min(1.0, side / max(height, width))
  size = max(1, round(height * scale)), max(1, round(width * scale))
  fps = clip["native"][3]
  step = clip["native"][0] // count
  return medium.read(ClipSpec(count, *size, fps / step if fps else 0.0), clip["start_s"], crop)


def _thumb(medium: Medium, clip: dict[str, Any]) -> str:
  """A frame of the middle as base64 JPEG; none where it cannot be read."""
  middle = dict(clip, start_s=clip["start_s"] + clip["duration_s"] / 2)
  try:
    frame = _frames(medium, middle, 1, _THUMB)[0]
  except UnreadableError:
    return ""
  out = io.BytesIO()
  Image.fromarray(frame).save(out, "JPEG", quality=70)
  return base64.b64encode(out.getvalue()).decode()
