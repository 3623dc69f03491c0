"""python -m data_pipelines.check SOURCE [--samples=32 ...]: what is wrong with a data set or a source.

SOURCE is what `data.source` takes: a path, a registered name or "package.module:MySource". The other keys of
`config.data` are flags. Prints a line for each problem; exit code 0 = none, 1 = some.
"""

import collections
import math
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.cli import add_arguments, new_parser, parse
from data_pipelines.config import DataConfig
from data_pipelines.sources.base import SampleInfo, Sizes, UnreadableError, faults_of
from data_pipelines.sources.registry import build_source
from sora_jax.packing.geometry import ClipSpec

_LISTED = 20  # lines of one kind
_MAX_SIDE, _MAX_FRAMES = 128, 8  # of what is read


def main(argv: Sequence[str] | None = None) -> int:
  parser = new_parser("check", __doc__)
  parser.add_argument("source", metavar="SOURCE")
  parser.add_argument("--samples", type=int, default=32, help="how many are read, spread evenly")
  add_arguments(parser, without=("source",))
  arguments = parse(parser, argv)
  samples = arguments.pop("samples")
  problems, source = [], None
  try:
    config = DataConfig(**arguments)
    source = build_source(config)
    problems = list(check_source(source, samples=samples, captions_optional=config.captions_optional))
  except ValueError as e:
    problems = [str(e)]
  except Exception as e:  # noqa: BLE001, code of others: whatever it raises is what is wrong
    problems = [f"{arguments['source']} raises {type(e).__name__}: {e}"]
  for line in problems:
    print(f"wrong: {line}")
  if not problems:
    print(f"fine: {source.name}, {len(source)} samples, {min(samples, len(source))} read")
  return 1 if problems else 0


def check_source(source: Any, *, samples: int = 32, captions_optional: bool = False) -> Iterator[str]:
  """A line for each thing wrong."""
  missing = [
    n for n in ("name", "rejects", "__len__", "info", "load", "fingerprint") if not hasattr(source, n)
  ]
  if missing:
    yield f"the source has no {', '.join(missing)}: see data_pipelines/sources/base.py"
    return
  if not isinstance(source.name, str) or not source.name:
    yield f"name is {source.name!r}, no text"
  yield from faults_of(source)
  count = len(source)
  if count < 1:
    yield "the source has no samples"
    return
  yield from _check_rejects(source.rejects)
  infos: list[Any] = []
  try:
    infos.extend(source.info(i) for i in range(count))
  except Exception as e:  # noqa: BLE001, code of others
    yield f"info({len(infos)}) raises {type(e).__name__}: {e}"
    return
  wrong = [(i, line) for i, info in enumerate(infos) for line in _info_faults(info, i)]
  yield from _listed([f"info({i}): {line}" for i, line in wrong])
  if wrong:
    return
  yield from _check_sizes(source, infos)
  names = collections.Counter(info.name for info in infos)
  yield from _listed([f"{n} samples are named {name!r}" for name, n in names.items() if n > 1])
  bare = [info.name for info in infos if not any(c.strip() for c in info.captions)]
  if bare and not captions_optional:
    shown = ", ".join(bare[:5]) + (", ..." if len(bare) > 5 else "")
    yield f"{len(bare)} of {count} samples have no caption: {shown}; fill them in or set captions_optional"
  yield from _check_copy(source)
  chosen = sorted({int(i) for i in np.linspace(0, count - 1, min(max(samples, 1), count))})
  yield from _listed(
    [f"{infos[i].name}: {line}" for i in chosen for line in _load_faults(source, infos[i], i)]
  )


def _check_rejects(rejects: Any) -> Iterator[str]:
  if not isinstance(rejects, (list, tuple)) or not all(
    isinstance(r, (list, tuple)) and len(r) == 2 and all(isinstance(part, str) for part in r) for r in rejects
  ):
    yield "rejects is no list of (name, reason)"
    return
  yield from _listed([f"{name} is left out: {why}" for name, why in rejects if why != "not_media"])


def _info_faults(info: Any, i: int) -> list[str]:
  if not isinstance(info, SampleInfo):
    return [f"is a {type(info).__name__}, no SampleInfo"]
  faults = []
  if info.id != i:
    faults.append(f"id is {info.id!r}, not {i}")
  if not isinstance(info.name, str) or not info.name:
    faults.append(f"name is {info.name!r}, no text")
  for key in ("num_frames", "height", "width"):
    value = getattr(info, key)
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
      faults.append(f"{key} is {value!r}, no whole number above 0")
  fps = info.fps
  if not isinstance(fps, (int, float, np.number)) or not math.isfinite(fps) or fps < 0:
    faults.append(f"fps is {fps!r}, no rate")
  elif not faults and (info.num_frames > 1) != (fps > 0):
    faults.append(f"fps is {fps:g} with {info.num_frames} frames: above 0 for videos, 0 for images")
  if not isinstance(info.captions, tuple) or not all(isinstance(c, str) for c in info.captions):
    faults.append(f"captions is {str(info.captions)[:60]!r}, no tuple of texts")
  if not isinstance(info.label, (int, np.integer)):
    faults.append(f"label is {info.label!r}, no whole number (-1 = none)")
  return faults


def _check_sizes(source: Any, infos: list[SampleInfo]) -> Iterator[str]:
  """Arrays that planning takes instead of `info`."""
  if not hasattr(source, "sizes"):
    return
  sizes = source.sizes()
  for key in Sizes._fields:
    told, values = np.asarray(getattr(sizes, key, ())), np.array([getattr(info, key) for info in infos])
    if told.shape != values.shape:
      yield f"sizes().{key} has shape {told.shape}, not ({len(infos)},)"
      continue
    other = np.flatnonzero(~np.isclose(told, values, rtol=1e-5))
    yield from _listed([f"sizes().{key}[{i}] is {told[i]}, that of info({i}) is {values[i]}" for i in other])


def _check_copy(source: Any) -> Iterator[str]:
  """Worker processes hold a copy."""
  mark = source.fingerprint()
  if not isinstance(mark, str) or not mark or mark != source.fingerprint():
    yield f"fingerprint() gives {str(mark)[:60]!r}: it must be a text, the same each time"
    return
  try:
    copy = pickle.loads(pickle.dumps(source))
  except Exception as e:  # noqa: BLE001, pickling raises many kinds
    yield f"the source cannot be pickled for worker processes: {type(e).__name__}: {e}"
    return
  if len(copy) != len(source) or copy.fingerprint() != mark:
    yield "a pickled copy has another length or fingerprint"


def _load_faults(source: Any, info: SampleInfo, i: int) -> list[str]:
  is_latent = bool(getattr(source, "encoder_hash", ""))  # which cannot be resized
  scale = 1.0 if is_latent else min(1.0, _MAX_SIDE / max(info.height, info.width))
  height, width = max(1, round(info.height * scale)), max(1, round(info.width * scale))
  spec = ClipSpec(min(info.num_frames, _MAX_FRAMES), height, width, info.fps)
  late = (info.num_frames - spec.num_frames) / info.fps if info.fps else 0.0
  for start in dict.fromkeys((0.0, late)):
    try:
      clip, again = source.load(i, spec, start), source.load(i, spec, start)
    except UnreadableError as e:
      return [f"cannot be read at {start:.2f} s: {e}"]
    except Exception as e:  # noqa: BLE001, anything else would end a training run
      return [f"load raises {type(e).__name__} ({e}) at {start:.2f} s: only UnreadableError is skipped"]
    channels = (getattr(source, "channels", 0) or "C") if is_latent else 3
    want = (spec.num_frames, spec.height, spec.width, channels)
    is_array = isinstance(clip, np.ndarray)
    is_kind = is_array and (clip.dtype != np.uint8 if is_latent else clip.dtype == np.uint8)
    if not is_kind or clip.ndim != 4 or any(w not in ("C", n) for w, n in zip(want, clip.shape)):
      got = f"{clip.dtype}{clip.shape}" if is_array else type(clip).__name__
      return [f"load gives {got} for {'floats' if is_latent else 'uint8'}{want}"]
    if not np.array_equal(clip, again):
      return [f"load gives other frames the second time, at {start:.2f} s"]
  return []


def _listed(lines: list[str]) -> Iterator[str]:
  yield from lines[:_LISTED]
  if len(lines) > _LISTED:
    yield f"and {len(lines) - _LISTED} more of these"


if __name__ == "__main__":
  sys.exit(main())
