"""Frames of a clip as bytes and back, each frame (or short run of frames) on its own.

jpeg  each frame a JPEG of quality 95, full chroma: any frame at once, small errors
h264  a stream without B-frames and a key frame every GOP: smallest, decodes its run up to the frame
raw   each frame as zstd of its bytes: exact
png   of one frame: exact
"""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_pipelines.parts import UnreadableError

CODECS = ("jpeg", "h264", "raw", "png")
GOP = 16
_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
_CRF = 12
_MAX_FRAME_BYTES = 2**30


def encode(frames_THWC: np.ndarray, codec: str) -> list[bytes]:
  """One bytes per frame; the same for the same frames."""
  assert codec in CODECS and frames_THWC.dtype == np.uint8, (codec, frames_THWC.dtype)
  if codec == "h264":
    return _encode_h264(frames_THWC)
  if codec == "raw":
    zstd = pa.Codec("zstd", compression_level=1)
    return [zstd.compress(np.ascontiguousarray(f).tobytes(), asbytes=True) for f in frames_THWC]
  coded = []
  for frame in frames_THWC:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, **(_JPEG if codec == "jpeg" else {"format": "PNG"}))
    coded.append(out.getvalue())
  return coded


def decode(
  coded: Sequence[bytes],
  codec: str,
  wanted: Sequence[int],
  *,
  size: tuple[int, int],
  height: int,
  width: int,
) -> np.ndarray:
  """uint8 (T, height, width, 3) of the frames `wanted`, which do not descend; `size` is (H, W) as coded."""
  if not wanted or not 0 <= wanted[0] <= wanted[-1] < len(coded):
    raise UnreadableError("truncated", f"frames {list(wanted)[:1]} to {list(wanted)[-1:]} of {len(coded)}")
  out = np.empty((len(wanted), height, width, 3), np.uint8)
  try:
    frames = _decode_h264(coded, wanted) if codec == "h264" else _decode_each(coded, codec, wanted, size)
    at, image = -1, None
    reformatter = VideoReformatter()
    for t, number in enumerate(wanted):
      while at < number:
        at, frame = next(frames)
        image = None
      if image is None:
        image = _sized(frame, size, height, width, reformatter)
      out[t] = image
  except UnreadableError:
    raise
  except (av.FFmpegError, OSError, ValueError, SyntaxError, pa.ArrowException, StopIteration) as e:
    raise UnreadableError("damaged", f"frame of a shard: {e or type(e).__name__}") from e
  return out


def _sized(
  frame, size: tuple[int, int], height: int, width: int, reformatter: VideoReformatter
) -> np.ndarray:
  if isinstance(frame, av.VideoFrame):
    if (frame.height, frame.width) != size:
      raise UnreadableError("damaged", f"a frame of {frame.width}x{frame.height}, not {size[1]}x{size[0]}")
    if size == (height, width):
      return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    frame = Image.fromarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
  elif frame.size[::-1] != size or frame.mode != "RGB":
    raise UnreadableError("damaged", f"a frame of {frame.width}x{frame.height}, not {size[1]}x{size[0]}")
  if frame.size != (width, height):
    frame = frame.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
  return np.asarray(frame)


def _decode_each(coded, codec: str, wanted: Sequence[int], size: tuple[int, int]):
  for number in dict.fromkeys(wanted):
    if codec == "raw":
      height, width = size
      count = height * width * 3
      if count > _MAX_FRAME_BYTES:
        raise UnreadableError("damaged", f"a frame of {width}x{height}")
      pixels = pa.decompress(coded[number], count, codec="zstd", asbytes=True)
      yield number, Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    else:
      image = Image.open(io.BytesIO(coded[number]), formats=["JPEG" if codec == "jpeg" else "PNG"])
      if image.size[::-1] == size:  # else refused before any pixel is decoded
        image.load()
      yield number, image


def _encode_h264(frames_THWC: np.ndarray) -> list[bytes]:
  context = av.CodecContext.create("libx264", "w")
  _, context.height, context.width, _ = frames_THWC.shape
  context.pix_fmt = "yuv444p"  # better than 4:2:0 at equal size, and takes odd sizes
  context.time_base, context.framerate = Fraction(1, 24), Fraction(24)  # time is the record's
  context.gop_size, context.thread_count = GOP, 1
  context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
  context.options = {
    "crf": str(_CRF),
    "preset": "veryfast",
    "tune": "fastdecode",
    "x264-params": f"bframes=0:scenecut=0:keyint={GOP}:min-keyint={GOP}:threads=1",
  }
  packets = []
  for i, image in enumerate(frames_THWC):
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace="ITU709", dst_color_range="MPEG")
    frame.pts, frame.time_base = i, context.time_base
    packets += context.encode(frame)
  packets += context.encode()
  assert len(packets) == len(frames_THWC), f"{len(packets)} packets of {len(frames_THWC)} frames"
  return [bytes(p) for p in packets]


def _decode_h264(coded, wanted: Sequence[int]):
  context = av.CodecContext.create("h264", "r")
  context.thread_count = 1
  number = wanted[0] // GOP * GOP
  for packet in [*(av.Packet(b) for b in coded[number : wanted[-1] + 1]), None]:
    for frame in context.decode(packet):
      yield number, frame
      number += 1
