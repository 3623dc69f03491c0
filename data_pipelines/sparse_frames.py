"""Decodes of a video only what frames at given times need: no frame that is neither shown nor referred to.

The packets up to the last time are read first; their time stamps say which frames are on display then. While
the others are decoded, the decoder is told to leave out those that no other frame refers to (most B-frames of
H.264 and HEVC). What comes out is checked against the time stamps, so whatever is odd about a file ends in
`UnsureError`, and the caller decodes all frames in order.
"""

from collections.abc import Iterator

import av
import numpy as np

CODECS = ("h264", "hevc")
SAME_TIME = 1e-4  # seconds; time stamps of some containers are rounded


class UnsureError(Exception):
  """The file is not plain enough."""


def frames_at(
  container, stream, wanted_s: np.ndarray, *, origin: float | None
) -> Iterator[tuple[slice, av.VideoFrame]]:
  """(places in `wanted_s`, the frame on display at those times) in order, from where the container stands.

  Times count from `origin`, the time stamp of the first frame of the file; None: the container stands there.
  """
  if stream.codec_context.name not in CODECS:
    raise UnsureError(stream.codec_context.name)
  packets, stamps, origin_pts, is_end = _packets(container, stream, wanted_s[-1], origin)
  unit = float(stream.time_base)
  start = origin_pts * unit if origin is None else origin
  times = stamps * unit - start
  shown = np.searchsorted(times, wanted_s + SAME_TIME, side="right") - 1
  step = 1.0 / float(stream.average_rate or 1e9)
  if shown[0] < 0 or (is_end and shown[-1] == len(times) - 1 and wanted_s[-1] >= times[-1] + step):
    raise UnsureError("times beyond the packets")
  yield from _decoded(stream.codec_context, packets, stamps, shown, must_begin=origin is None)


def _packets(container, stream, last_s: float, origin: float | None):
  """(packets in order of decoding, sorted time stamps of those on display, the first of them, file ends)."""
  packets, stamps, is_end, unit = [], [], True, float(stream.time_base)
  for packet in container.demux(stream):
    if not packet.size:
      break
    if packet.pts is None or packet.is_corrupt:
      raise UnsureError("a packet without time stamps")
    packets.append(packet)
    if not packet.is_discard:
      stamps.append(packet.pts)
    start = origin if origin is not None else min(stamps, default=0) * unit
    # No frame is shown before it is decoded: all that follow are shown later.
    if stamps and packet.dts is not None and packet.dts * unit - start > last_s + SAME_TIME:
      is_end = False
      break
  if not stamps or len(set(stamps)) < len(stamps):
    raise UnsureError("no time stamps, or the same twice")
  stamps.sort()
  return packets, np.array(stamps, np.int64), stamps[0], is_end


def _decoded(
  context, packets: list, stamps: np.ndarray, shown: np.ndarray, *, must_begin: bool
) -> Iterator[tuple[slice, av.VideoFrame]]:
  places = {int(stamps[n]): slice(*np.searchsorted(shown, (n, n + 1))) for n in np.unique(shown).tolist()}
  needed = set(places)
  if must_begin:  # else times would count from another frame
    needed.add(int(stamps[0]))
  try:
    for frame in _frames(context, packets, needed):
      if frame.is_corrupt or frame.interlaced_frame:
        raise UnsureError("a damaged or interlaced frame")
      if frame.pts in needed:
        needed.discard(frame.pts)
        if frame.pts in places:
          yield places[frame.pts], frame
        if not needed:
          return
  except (av.FFmpegError, ValueError) as e:
    raise UnsureError(str(e)) from e
  raise UnsureError("frames are missing")


def _frames(context, packets: list, needed: set[int]) -> Iterator[av.VideoFrame]:
  for packet in packets:
    context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
    yield from packet.decode()
  context.skip_frame = "DEFAULT"
  yield from context.decode(None)
