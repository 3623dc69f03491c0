"""A record of a shard: a msgpack map, versioned, no pickle.

{v, id, kind, shape, fps, captions, codec, frames} with kind "pixels", shape (T, H, W, 3), or
{v, id, kind, shape, fps, captions, dtype, data, encoder} with kind "latent", shape (t, h, w, C);
either may have text: one {shape, dtype, data} per caption (none of an empty one), and text_encoder. Arrays
are little-endian, in C order.
"""

import math
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from data_pipelines.clip_codec import CODECS
from data_pipelines.parts import UnreadableError

VERSION = 1
_HEAD, _BIN32 = 4096, b"\xc6"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_FIELDS = {"id": str, "kind": str, "shape": list, "fps": float, "captions": list}


def pack(record: dict[str, Any]) -> bytes:
  return msgpack.packb({"v": VERSION, **record}, use_bin_type=True)


def unpack(data: bytes | memoryview) -> dict[str, Any]:
  """The values of latents are a view of `data`."""
  try:
    record = _with_view(memoryview(data))
  except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
    raise UnreadableError("damaged", f"a record is no msgpack: {e or type(e).__name__}") from e
  if not isinstance(record, dict) or record.get("v") != VERSION:
    version = record.get("v") if isinstance(record, dict) else None
    raise UnreadableError("damaged", f"a record of version {version!r}, this reads {VERSION}")
  for name, kind in _FIELDS.items():
    if not isinstance(record.get(name), kind):
      raise UnreadableError("damaged", f"a record's {name} is no {kind.__name__}")
  shape = record["shape"]
  if len(shape) != 4 or not all(isinstance(n, int) and 0 < n < 2**31 for n in shape):
    raise UnreadableError("damaged", f"a record of shape {str(shape)[:60]}")
  if record["kind"] == "pixels":
    frames = record.get("frames")
    if record.get("codec") not in CODECS or not isinstance(frames, list) or len(frames) != shape[0]:
      raise UnreadableError("damaged", "a record's frames do not match its shape")
    if not all(isinstance(f, bytes) for f in frames):
      raise UnreadableError("damaged", "a record's frames are no bytes")
  elif record["kind"] != "latent":
    raise UnreadableError("damaged", f"a record of kind {record['kind'][:20]!r}")
  return record


def _with_view(data: memoryview) -> Any:
  """A map whose bytes under "data" are not copied, where that key comes early; else as msgpack reads it."""
  head = _fed(data[:_HEAD])
  record, left = {}, 0
  try:
    left = head.read_map_header()
    while left and (key := head.unpack()) != "data":
      record[key], left = head.unpack(), left - 1
  except (msgpack.OutOfData, ValueError, TypeError):
    left = 0
  at = head.tell()
  if not left or data[at : at + 1] != _BIN32:
    return msgpack.unpackb(data, raw=False, strict_map_key=True)
  start, size = at + 5, int.from_bytes(data[at + 1 : at + 5], "big")
  record["data"] = data[start : start + size]
  tail = _fed(data[start + size :])
  for _ in range(left - 1):
    key = tail.unpack()
    record[key] = tail.unpack()
  if tail.tell() != len(data) - start - size:
    raise ValueError("bytes follow it")
  return record


def _fed(data: memoryview) -> msgpack.Unpacker:
  unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=0)
  unpacker.feed(data)
  return unpacker


def pack_array(array: np.ndarray, dtype: str) -> dict[str, Any]:
  with np.errstate(over="ignore"):  # infinite then, which whoever packs looks for
    values = np.ascontiguousarray(array, DTYPES[dtype])
  return {"shape": list(values.shape), "dtype": dtype, "data": values.tobytes()}


def array_of(record: dict[str, Any]) -> np.ndarray:
  """A view of the bytes, read-only."""
  shape, dtype, data = record.get("shape"), record.get("dtype"), record.get("data")
  if dtype not in DTYPES or not isinstance(data, bytes | memoryview) or not isinstance(shape, list):
    raise UnreadableError("damaged", "an array without shape, dtype or data")
  kind = np.dtype(DTYPES[dtype])
  if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * kind.itemsize != len(data):
    raise UnreadableError("damaged", f"an array {str(shape)[:60]} of {dtype} in {len(data)} bytes")
  return np.frombuffer(data, kind).reshape(shape)
