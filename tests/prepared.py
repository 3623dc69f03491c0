"""Small sets to prepare, and the work done in this process, for tests."""

from pathlib import Path

import av
import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.prepare import tasks
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.run import prepare
from sora_jax.packing.geometry import ClipSpec

SMALL = {"resolutions": (32,), "multiple": 16, "durations": (1, 9), "shard_samples": 2, "min_duration": 0.4}
STAGES = ("probe", "cut", "filter", "dedup", "resize", "write")


def moving(seed: int, frames: int = 24, size: tuple[int, int] = (64, 48), speed: int = 2) -> np.ndarray:
  """uint8 (T, H, W, 3): coarse noise of many colours that slides by."""
  width, height = size
  rng = np.random.default_rng(seed)
  coarse = rng.integers(30, 220, (height // 8 + 1, (width + frames * speed) // 8 + 2, 3), np.uint8)
  wide = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
  return np.stack([wide[:height, speed * t : speed * t + width] for t in range(frames)])


def write_clip(path: Path, frames_THWC: np.ndarray, *, fps: int = 12, size: tuple[int, int] = ()) -> Path:
  """Nearly as it is; `size` (width, height) resizes."""
  width, height = size or frames_THWC.shape[2:0:-1]
  with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=fps, options={"crf": "10"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
    for image in frames_THWC:
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
      out.mux(stream.encode(frame.reformat(width=width, height=height)))
    out.mux(stream.encode())
  return path


def make_set(folder: Path, clips: int = 6) -> Path:
  folder.mkdir(parents=True)
  for k in range(clips):
    write_clip(folder / f"{k}.mp4", moving(k, 12 + 2 * k))
    (folder / f"{k}.txt").write_text(f"noise number {k}")
  return folder


def inline(todo, job, label) -> None:
  """A runner without processes."""
  for task in todo:
    tasks.run(task, job, lambda sample: None)


def run_inline(source, out: Path, data: dict | None = None, **changes):
  config = PrepareConfig(**{"stages": STAGES, **SMALL, **changes})
  return prepare(DataConfig(source=str(source), **{"min_size": 16, **(data or {})}), config, out, inline)


def contents(out: Path) -> dict[str, bytes]:
  """What a preparation is judged by: shards, index, description."""
  files = sorted(p for p in out.rglob("*") if p.is_file() and ".prepare" not in p.parts)
  return {str(p.relative_to(out)): p.read_bytes() for p in files if p.name != "report.html"}


def whole(source, i):
  info = source.info(i)
  return source.load(i, ClipSpec(info.num_frames, info.height, info.width, info.fps))
