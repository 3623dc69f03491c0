"""Tiny clips and images for tests, and the place of the optional real ones."""

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


def real_data(name: str) -> Path:
  """A folder of the optional test data, or a skip that says how to get at it."""
  default = Path(__file__).resolve().parents[2] / "shared" / "data"
  path = Path(os.environ.get("SORA_JAX_TEST_DATA", default)) / name
  if not path.exists():
    pytest.skip(f"no {name} data: set SORA_JAX_TEST_DATA to the folder that holds it")
  return path


def level(i: int) -> int:
  """Grey of frame i of `make_clip`: far enough apart to survive compression."""
  return 20 + 8 * (i % 26)


def make_clip(
  path: Path,
  num_frames: int = 12,
  *,
  size: tuple[int, int] = (64, 48),
  fps: int = 12,
  times: Sequence[float] | None = None,
  container: str = "",
  codec: str = "libx264",
  pix_fmt: str = "yuv420p",
  sar: Fraction | None = None,
  gop: int = 12,
  corner: bool = False,
) -> Path:
  """Frame i is of grey `level(i)` (`corner`: top left quarter white), shown from times[i] seconds on."""
  width, height = size
  with av.open(str(path), "w", format=container or None) as out:
    stream = out.add_stream(codec, rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.codec_context.gop_size = gop
    stream.codec_context.time_base = stream.time_base = Fraction(1, 600)
    if sar:
      stream.codec_context.sample_aspect_ratio = sar
    for i in range(num_frames):
      image = np.full((height, width, 3), level(i), np.uint8)
      if corner:
        image[: height // 2, : width // 2] = 255
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.pts = round(600 * (times[i] if times is not None else i / fps))
      frame.time_base = Fraction(1, 600)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return path


def make_image(path: Path, size: tuple[int, int] = (64, 48), value: int = 100) -> Path:
  Image.new("RGB", size, (value, 0, 255 - value)).save(path)
  return path


def grey(clip: np.ndarray) -> list[int]:
  """Index of the frame of `make_clip` that each frame of a clip shows."""
  return [round((float(frame.mean()) - 20) / 8) for frame in clip]
