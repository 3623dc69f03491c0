"""Reads clips and images exactly, by time stamps, and writes MP4 and PNG.

What a decoder leaves to its caller is done here: rotation and mirroring of the display matrix, the sample
aspect ratio, EXIF orientation, cover art (skipped), a start time other than zero, edit lists, 10-bit and HDR
to 8 bits (a simple tone map), alpha (composited on white), interlaced frames (made whole by bwdif).
The kind of file is read from its content, never from its name.
"""

import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from data_pipelines import color, frame_filters, image_io, sparse_frames
from data_pipelines.parts import Media, Part, UnreadableError
from data_pipelines.sparse_frames import SAME_TIME, UnsureError

# Playlists and other formats that name further files or addresses are refused: a data file reads only itself.
_OPEN_OPTIONS = {
  "protocol_whitelist": "file",
  "format_whitelist": (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,gif,asf,h264,hevc,m4v,ivf,obu,mxf,nut,dv,rm"
  ),
}
_HD_HEIGHT = 720  # untagged video of this height or more is BT.709, as players assume


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MediaInfo:
  """Size as displayed; a video of one frame counts as an image (fps 0). `note` tells of frames lost."""

  num_frames: int
  height: int
  width: int
  fps: float
  note: str = ""


def probe(path: Media, *, decode_limit_s: float = 120.0) -> MediaInfo:
  """Frames, size and rate of a file.

  Videos up to `decode_limit_s` are decoded (not converted), so that the count is that of the frames which do
  decode before any error; longer ones, or all at 0, are counted by the container's packets.
  """
  kind = image_io.sniff(path)
  if kind == "image":
    with image_io.open_image(path) as image:
      try:
        image.load()
      except (OSError, ValueError, SyntaxError) as e:
        raise UnreadableError("truncated", str(e)) from e
    width, height = image_io.probe_image_header(path)
    return MediaInfo(num_frames=1, height=height, width=width, fps=0.0)
  with _open_video(path) as (container, stream):
    seconds = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
    times, error = [], ""
    first = None
    if seconds <= decode_limit_s:
      for time, frame in (frames := _Frames(container, stream, is_shown=False)):
        first = first or frame
        times.append(time)
      error = frames.error
    else:
      first = next((frame for _, frame in _Frames(container, stream, is_shown=False)), None)
      container.seek(0)
      packets = [p for p in container.demux(stream) if p.pts is not None]
      times = sorted(float(p.pts * p.time_base) for p in packets if not (p.is_corrupt or p.is_discard))
    if first is None or not times:
      raise UnreadableError("unreadable", error or "no frame decodes")
    height, width = _display_size(first, stream)
    fps = _rate(times, stream.average_rate)
  note = f"truncated: {len(times)} frames, then {error}" if error else ""
  return MediaInfo(num_frames=len(times), height=height, width=width, fps=fps, note=note)


def read_clip(
  path: Media, *, num_frames: int, height: int, width: int, fps: float = 0.0, start_s: float = 0.0
) -> np.ndarray:
  """uint8 (T, H, W, 3): for each time start_s + i / fps the frame on display then, resized."""
  if image_io.sniff(path) == "image":
    if num_frames != 1:
      raise UnreadableError("too_short", f"an image was asked for {num_frames} frames")
    return image_io.read_image(path, height, width)
  wanted = start_s + np.arange(num_frames) / (fps or 1.0)
  out = np.empty((num_frames, height, width, 3), np.uint8)
  reformatter = VideoReformatter()
  try:
    with _open_video(path) as (container, stream):
      for places, frame in _sparse(container, stream, wanted):
        out[places] = _to_rgb(frame, height, width, reformatter)
    return out
  except UnsureError:
    pass
  done, held, held_time, error = 0, None, 0.0, ""
  with _open_video(path) as (container, stream):
    frames = _frames_from(container, stream, start_s)
    for time, frame in frames:
      until = np.searchsorted(wanted, time - SAME_TIME) if held is not None else 0
      if until > done:  # the frame held so far is on display for these times
        out[done:until] = _to_rgb(held, height, width, reformatter)
        done = int(until)
      if done == num_frames:
        break
      held, held_time = frame, time
    if done < num_frames and held is not None:
      error = frames.error
      lasts = max(float((held.duration or 0) * held.time_base), 1.0 / float(stream.average_rate or 1e9))
      if wanted[-1] < held_time + lasts + SAME_TIME or num_frames == 1:
        out[done:] = _to_rgb(held, height, width, reformatter)
        done = num_frames
  if done < num_frames:  # never filled up with repeats
    raise UnreadableError(
      "truncated", f"{done} of {num_frames} frames at {start_s:.2f} s; {error or 'file ends'}"
    )
  return out


class _Frames:
  """Iterates over (seconds since the first frame, frame) up to the first damaged one; `error` says what."""

  def __init__(self, container, stream, origin: float | None = None, *, is_shown: bool = True):
    self.error, self.origin = "", origin
    self._container, self._stream, self._is_shown = container, stream, is_shown

  def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
    step = 1.0 / float(self._stream.average_rate or self._stream.guessed_rate or 25)
    time = -step
    try:
      for frame in self._decoded():
        # Raw streams carry no time stamps: count frames instead.
        stamp = time + step + (self.origin or 0.0) if frame.time is None else float(frame.time)
        if self.origin is None:
          self.origin = stamp
        time = stamp - self.origin
        yield time, frame
    except (av.FFmpegError, ValueError) as e:
      self.error = getattr(e, "strerror", None) or str(e)

  def _decoded(self) -> Iterator[av.VideoFrame]:
    """Up to a damaged frame; counting frames takes neither alpha nor whole pictures."""
    if self._is_shown:
      return frame_filters.progressive(self._sound(frame_filters.decode(self._container, self._stream)))
    return self._sound(self._container.decode(self._stream))

  def _sound(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in frames:
      if frame.is_corrupt:
        self.error = "a damaged frame"
        return
      yield frame


class _Chained:
  """Frames whose first was already taken."""

  def __init__(self, first, rest: Iterator, frames: _Frames):
    self._items, self._frames = itertools.chain([first], rest), frames

  def __iter__(self):
    return self._items

  @property
  def error(self) -> str:
    return self._frames.error


def _sparse(container, stream, wanted: np.ndarray) -> Iterator[tuple[slice, av.VideoFrame]]:
  """Frames at these times, of a file that is plain and in which a seek does not land late."""
  if wanted[0] < 1.0:
    return sparse_frames.frames_at(container, stream, wanted, origin=None)
  frames = _Frames(container, stream)
  if stream.codec_context.name not in sparse_frames.CODECS or next(iter(frames), None) is None:
    raise UnsureError("no first frame")
  try:
    container.seek(int((frames.origin + wanted[0]) / stream.time_base), stream=stream, backward=True)
  except av.FFmpegError as e:
    raise UnsureError(str(e)) from e
  return sparse_frames.frames_at(container, stream, wanted, origin=frames.origin)


def _frames_from(container, stream, start_s: float) -> _Frames | _Chained:
  """Frames from the last one at or before `start_s`, or from earlier on; linear where a seek lands late."""
  frames = _Frames(container, stream)
  if start_s < 1.0:
    return frames
  if next(iter(frames), None) is None:
    return frames
  for back in (0.0, 2.0, 10.0):
    if start_s - back <= 0:
      break
    try:
      container.seek(int((frames.origin + start_s - back) / stream.time_base), stream=stream, backward=True)
    except av.FFmpegError:
      break
    later = _Frames(container, stream, frames.origin)
    rest = iter(later)
    first = next(rest, None)
    if first is not None and first[0] <= start_s + SAME_TIME:
      return _Chained(first, rest, later)
  start = stream.start_time if stream.start_time is not None else 0
  container.seek(min(0, start), stream=stream, backward=True)
  return _Frames(container, stream, frames.origin)


class _open_video:  # noqa: N801, a context manager used as a function
  """Opens the first real video stream of a file, cover art aside."""

  def __init__(self, path: Media):
    try:
      self._file = path.open() if isinstance(path, Part) else None
      self._container = av.open(self._file or str(path), "r", options=dict(_OPEN_OPTIONS))
    except (av.FFmpegError, OSError, ValueError) as e:
      raise UnreadableError("unreadable", getattr(e, "strerror", None) or str(e)) from e
    streams = [
      s for s in self._container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    best = self._container.streams.best("video")
    stream = best if best in streams else next(iter(streams), None)
    if stream is None:
      self._container.close()
      raise UnreadableError("no_video", "the file has no video stream")
    if stream.codec_context is None or not 0 < stream.width * stream.height <= image_io.MAX_PIXELS:
      size = f"{stream.width}x{stream.height}" if stream.codec_context else "unknown codec"
      self._container.close()
      raise UnreadableError("unreadable", f"cannot decode a stream of {size}")
    stream.codec_context.thread_count = 1  # samples are read by several threads already
    self._stream = stream

  def __enter__(self):
    return self._container, self._stream

  def __exit__(self, *_):
    self._container.close()
    if self._file is not None:
      self._file.close()


def _rate(times: list[float], stated: Fraction | None) -> float:
  """Frames over duration, the last frame lasting as long as most; the stated rate where it agrees."""
  if len(times) < 2:
    return 0.0
  gaps = np.diff(times)
  duration = times[-1] - times[0] + statistics.median(gaps.tolist())
  rate = len(times) / duration if duration > 0 else float(stated or 25)
  return float(stated) if stated and abs(float(stated) / rate - 1) < 0.005 else float(rate)


def _matrix(frame: av.VideoFrame) -> np.ndarray | None:
  data = frame.side_data.get("DISPLAYMATRIX")
  return None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)


def _is_transposed(matrix: np.ndarray | None) -> bool:
  return matrix is not None and abs(int(matrix[0, 1])) > abs(int(matrix[0, 0]))


def _display_size(frame: av.VideoFrame, stream) -> tuple[int, int]:
  sar = stream.sample_aspect_ratio or Fraction(1)
  height, width = frame.height, frame.width
  if sar > 0:  # stretched, never shrunk, as players do
    height, width = (height, round(width * sar)) if sar >= 1 else (round(height / sar), width)
  return (width, height) if _is_transposed(_matrix(frame)) else (height, width)


def _to_rgb(frame: av.VideoFrame, height: int, width: int, reformatter: VideoReformatter) -> np.ndarray:
  """The frame as displayed at height x width, uint8 RGB."""
  matrix = _matrix(frame)
  is_transposed = _is_transposed(matrix)
  size = {"height": width, "width": height} if is_transposed else {"height": height, "width": width}
  if frame.colorspace == 2 and frame.height >= _HD_HEIGHT:
    frame.colorspace = 1
  is_smaller = size["height"] < frame.height and size["width"] < frame.width
  how = Interpolation.AREA if is_smaller else Interpolation.BICUBIC
  is_hdr = frame.color_trc in color.HDR_TRANSFERS
  has_alpha = any(c.is_alpha for c in frame.format.components)
  form = "rgb48le" if is_hdr else "rgba" if has_alpha else "rgb24"
  trc = frame.color_trc
  image = reformatter.reformat(frame, **size, format=form, interpolation=how, threads=1).to_ndarray()
  image = color.tone_map(image, trc) if is_hdr else color.on_white(image) if has_alpha else image
  if matrix is None:
    return image
  if is_transposed:
    image = image.transpose(1, 0, 2)
    x_sign, y_sign = matrix[1, 0], matrix[0, 1]
  else:
    x_sign, y_sign = matrix[0, 0], matrix[1, 1]
  return image[:: -1 if y_sign < 0 else 1, :: -1 if x_sign < 0 else 1]


def write_mp4(path: str | Path, frames_THWC: np.ndarray, fps: float, *, crf: int = 18) -> None:
  """H.264, BT.709. Odd sizes are kept by storing full chroma (yuv444p), which some players refuse."""
  _, height, width, channels = frames_THWC.shape
  assert frames_THWC.dtype == np.uint8 and channels == 3 and len(frames_THWC), frames_THWC.shape
  if fps <= 0:
    raise ValueError(f"cannot write {path} at {fps} frames per second")
  part = Path(path).with_name(f".{Path(path).name}.part")  # a file that exists is complete
  with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.width, stream.height = width, height
    stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
    stream.options = {"crf": str(crf), "preset": "veryfast"}
    stream.codec_context.colorspace = stream.codec_context.color_primaries = 1
    stream.codec_context.color_trc = stream.codec_context.color_range = 1
    for image in frames_THWC:
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
      frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  os.replace(part, path)


def write_png(path: str | Path, image_HWC: np.ndarray) -> None:
  assert image_HWC.dtype == np.uint8, image_HWC.dtype
  part = Path(path).with_name(f".{Path(path).name}.part")
  Image.fromarray(image_HWC).save(part, format="PNG")
  os.replace(part, path)
