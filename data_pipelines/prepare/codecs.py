"""python -m data_pipelines.prepare.codecs --input=PATH [--clips=12 --side=256 --frames=48]: which --codec?

Codes clips of a data set in each way; prints size, error and frames per CPU second, and those of its own
files for the same pixels. The ways take turns, so that a busy machine slows all alike.
"""

import argparse
import collections
import dataclasses
import math
import sys
import time
from collections.abc import Sequence

import numpy as np

from data_pipelines import clip_codec
from data_pipelines.config import DataConfig
from data_pipelines.sources.registry import build_source
from sora_jax.packing.geometry import ClipSpec

CODECS = ("jpeg", "h264", "raw")


@dataclasses.dataclass
class Tally:
  frames: int = 0
  coded: int = 0  # bytes
  pixels: int = 0
  squares: float = 0.0
  worst: int = 0
  encode_s: float = 0.0
  decode_s: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m data_pipelines.prepare.codecs")
  parser.add_argument("--input", required=True)
  parser.add_argument("--clips", type=int, default=12)
  parser.add_argument("--side", type=int, default=256, help="longer side in pixels")
  parser.add_argument("--frames", type=int, default=48, help="of each clip, at most")
  arguments = parser.parse_args(argv)
  try:
    source = build_source(DataConfig(source=arguments.input, captions_optional=True))
    tallies = compare(source, arguments.clips, arguments.side, arguments.frames)
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  print(table(tallies))
  return 0


def compare(source, clips: int, side: int, frames: int) -> dict[str, Tally]:
  videos = [i for i in range(len(source)) if source.info(i).num_frames > 1]
  if not videos:
    raise ValueError(f"{source.name} has no video")
  tallies: dict[str, Tally] = collections.defaultdict(Tally)
  for i in sorted({videos[k] for k in np.linspace(0, len(videos) - 1, clips).astype(int)}):
    info = source.info(i)
    scale = side / max(info.height, info.width)
    height, width = (max(16, round(n * scale / 16) * 16) for n in (info.height, info.width))
    spec = ClipSpec(min(frames, info.num_frames), height, width, info.fps)
    began = time.process_time()
    clip = source.load(i, spec)
    tallies["files"].decode_s += time.process_time() - began
    tallies["files"].frames += len(clip)
    for codec in CODECS:
      _add(tallies[codec], clip, codec)
  return dict(tallies)


def _add(tally: Tally, clip: np.ndarray, codec: str) -> None:
  size = clip.shape[1:3]
  began = time.process_time()
  coded = clip_codec.encode(clip, codec)
  middle = time.process_time()
  back = clip_codec.decode(coded, codec, list(range(len(clip))), size=size, height=size[0], width=size[1])
  tally.decode_s += time.process_time() - middle
  tally.encode_s += middle - began
  error = back.astype(np.int32) - clip
  tally.frames += len(clip)
  tally.coded += sum(map(len, coded))
  tally.pixels += clip.size
  tally.squares += float((error**2).sum())
  tally.worst = max(tally.worst, int(np.abs(error).max()))


def table(tallies: dict[str, Tally]) -> str:
  lines = [f"{'':6} {'smaller by':>10} {'PSNR':>7} {'worst':>6} {'encode f/s':>11} {'decode f/s':>11}"]
  for name, t in tallies.items():
    rate = t.frames / t.decode_s
    if name == "files":
      lines.append(f"{name:6} {'':>10} {'':>7} {'':>6} {'':>11} {rate:11.0f}")
      continue
    psnr = 10 * math.log10(255**2 * t.pixels / t.squares) if t.squares else math.inf
    smaller, encoded = t.pixels / t.coded, t.frames / t.encode_s
    lines.append(f"{name:6} {smaller:9.1f}x {psnr:7.1f} {t.worst:6d} {encoded:11.0f} {rate:11.0f}")
  return "\n".join([*lines, "f/s: frames per CPU second of one core; files: the same pixels from the source"])


if __name__ == "__main__":
  sys.exit(main())
