"""Leaving out frames that nobody needs gives the same pixels as decoding all of them."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines import sparse_frames, video_io
from data_pipelines.parts import UnreadableError
from tests.prepared import moving

FRAMES, FPS = 90, 30


def make(path, codec="libx264", gaps=None, **options):
  """B-frames that refer to each other and one keyframe in 48 frames; `gaps` are between time stamps."""
  if codec not in av.codecs_available:
    pytest.skip(f"no {codec}")
  with av.open(str(path), "w") as out:
    stream = out.add_stream(codec, rate=FPS, options={"preset": "veryfast", **options})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    times = np.cumsum([0, *(gaps or [1] * (FRAMES - 1))]).tolist()
    for time, image in zip(times, moving(3, FRAMES)):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
      frame.pts, frame.time_base = time, Fraction(1, FPS)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return path


@pytest.fixture
def log(monkeypatch):
  """{"sure": clips read sparsely, "decoded": frames that took, "why": what was unsure}."""
  kept = {"sure": 0, "decoded": 0, "why": []}
  read, frames = video_io._sparse, sparse_frames._frames

  def counted(*args):
    for frame in frames(*args):
      kept["decoded"] += 1
      yield frame

  def logged(*args):
    try:
      yield from read(*args)
      kept["sure"] += 1
    except sparse_frames.UnsureError as e:
      kept["why"].append(str(e))
      raise

  monkeypatch.setattr(sparse_frames, "_frames", counted)
  monkeypatch.setattr(video_io, "_sparse", logged)
  return kept


def both(path, monkeypatch, **request):
  """What is read by leaving out frames, and by decoding them all."""
  clips = []
  for codecs in (("h264", "hevc"), ()):
    with monkeypatch.context() as patch:
      patch.setattr(sparse_frames, "CODECS", codecs)
      try:
        clips.append(video_io.read_clip(path, height=24, width=32, **request))
      except UnreadableError as e:
        clips.append(str(e))
  return clips


@pytest.mark.parametrize(
  "codec,options",
  [
    ("libx264", {"bf": "3", "g": "48", "x264-params": "b-pyramid=normal:scenecut=0"}),
    ("libx264", {"bf": "0", "g": "48"}),
    ("libx264", {"bf": "3", "g": "24", "x264-params": "open-gop=1:scenecut=0"}),
    ("libx265", {"x265-params": "bframes=3:keyint=48:log-level=error"}),
  ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_the_same_frames(tmp_path, monkeypatch, log, codec, options, suffix):
  path = make(tmp_path / f"a.{suffix}", codec, **options)
  for start in (0.0, 0.4, 1.0, 1.37, 2.1):
    for fps in (8.0, 11.3, 30.0):
      count = int((FRAMES / FPS - start) * fps)
      sparse, whole = both(path, monkeypatch, num_frames=count, fps=fps, start_s=start)
      assert isinstance(sparse, np.ndarray)
      np.testing.assert_array_equal(sparse, whole, err_msg=f"{start} {fps}")
  assert log["sure"] >= (15 if suffix != "ts" else 6), log["why"]  # seeks in .ts land late


def test_frames_are_left_out(tmp_path, log):
  path = make(tmp_path / "a.mp4", bf="3", **{"x264-params": "b-pyramid=normal:b-adapt=0"})
  video_io.read_clip(path, num_frames=16, height=24, width=32, fps=8.0)
  assert log["sure"] == 1 and 16 <= log["decoded"] < 50  # of 57 frames up to the last


def test_a_variable_rate(tmp_path, monkeypatch, log):
  gaps = np.random.default_rng(0).integers(1, 5, FRAMES - 1).tolist()
  path = make(tmp_path / "a.mp4", bf="2", gaps=gaps)
  for start in (0.0, 0.5, 2.0):
    np.testing.assert_array_equal(*both(path, monkeypatch, num_frames=30, fps=12.0, start_s=start))
  assert log["sure"] == 3


def test_beyond_the_end_and_damaged(tmp_path, monkeypatch):
  path = make(tmp_path / "a.mp4", bf="2")
  sparse, whole = both(path, monkeypatch, num_frames=30, fps=8.0)
  assert sparse == whole and "truncated" in whole
  data = bytearray(path.read_bytes())
  data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
  path.write_bytes(data)
  for count in (4, 12, 23):
    sparse, whole = both(path, monkeypatch, num_frames=count, fps=8.0)
    assert type(sparse) is type(whole)
    if isinstance(whole, np.ndarray):
      np.testing.assert_array_equal(sparse, whole)
