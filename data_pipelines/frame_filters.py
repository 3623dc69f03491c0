"""Decoded frames made ready to be shown: alpha that a decoder leaves out, pictures woven of two fields."""

from collections.abc import Iterator

import av
from av.filter import Graph

# The decoders of FFmpeg's own drop the second stream in which WebM keeps alpha; those of libvpx read it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def decode(container, stream) -> Iterator[av.VideoFrame]:
  """Frames of a stream from where the container stands, with their alpha."""
  name = _ALPHA_DECODERS.get(stream.codec_context.name)
  tags = {key.lower(): value for key, value in stream.metadata.items()}
  if name is None or tags.get("alpha_mode") != "1" or name not in av.codecs_available:
    yield from container.decode(stream)
    return
  context = av.CodecContext.create(name, "r")
  context.thread_count = 1
  for packet in container.demux(stream):
    # The empty packet at the end of a file takes out what is left.
    yield from context.decode(packet if packet.size else None)


def progressive(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
  """One whole picture per frame, at its time; frames that are whole pass as they are."""
  graph = None
  for frame in frames:
    if graph is None and frame.interlaced_frame:
      graph = _deinterlacer(frame)
    if graph is None:
      yield frame
      continue
    graph.vpush(frame)
    yield from _pull(graph)
  if graph is not None:
    graph.vpush(None)
    yield from _pull(graph)


def _deinterlacer(frame: av.VideoFrame) -> Graph:
  """Motion-adaptive, from the frames before and after: it holds one frame back."""
  graph = Graph()
  graph.threads = 1
  source = graph.add_buffer(
    width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
  )
  weave = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
  source.link_to(weave)
  weave.link_to(graph.add("buffersink"))
  graph.configure()
  return graph


def _pull(graph: Graph) -> Iterator[av.VideoFrame]:
  while True:
    try:
      yield graph.vpull()
    except (av.BlockingIOError, av.EOFError):
      return
