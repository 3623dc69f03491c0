"""Where a record lies in an ArrayRecord file, so that it can be read by its range of bytes, from anywhere.

ArrayRecord files are Riegeli files (github.com/google/riegeli, doc/riegeli_records_file_format.md): blocks of
64 KiB, each opened by a header of 24 bytes, and chunks that run across them. Written uncompressed in groups
of one, a record is a chunk: a header of 40 bytes, a byte 0 (no compression), the sizes, the record.
"""

import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_pipelines.parts import UnreadableError

WRITER_OPTIONS = "group_size:1,uncompressed"
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 65536, 24, 40
_SIMPLE = ord("r")
_READ = 2**24
_MOST_PARTS = 512  # of one call; systems take 1024


def record_spans(path: str | Path, count: int) -> list[tuple[int, int]]:
  """(offset, bytes) of the chunks of the first `count` records."""
  spans, at = [], 0
  if not count:
    return spans
  with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
    while len(spans) < count:
      header = _payload(data[at : at + _CHUNK_HEADER + _BLOCK_HEADER], at)
      if len(header) < _CHUNK_HEADER:
        raise ValueError(f"{path} holds {len(spans)} records, not {count}")
      size = int.from_bytes(header[8:16], "little")
      records = int.from_bytes(header[25:32], "little")
      end = _advance(at, _CHUNK_HEADER + size)
      if header[24] == _SIMPLE and records == 1:
        spans.append((at, end - at))
      at = end
  return spans


def record_of(chunk: bytes, offset: int) -> memoryview:
  """The record in the bytes of a chunk that starts at `offset` of its file."""
  return _record(memoryview(_payload(chunk, offset)), offset)


def read_record(handle: int, offset: int, size: int) -> memoryview:
  """The same of an open file, read past the headers of blocks into one piece of memory: each copy of a record
  of megabytes costs as much as its checksum."""
  pieces = list(_pieces(offset, size))
  data = memoryview(bytearray(sum(stop - start for start, stop in pieces)))
  skipped, parts, filled, end = bytearray(_BLOCK_HEADER), [], 0, 0
  for start, stop in pieces:
    if start > end:
      parts.append(memoryview(skipped)[: start - end])
    parts.append(data[filled : filled + stop - start])
    filled, end = filled + stop - start, stop
  at = offset
  for first in range(0, len(parts), _MOST_PARTS):
    some = parts[first : first + _MOST_PARTS]
    count = os.preadv(handle, some, at)
    if count != sum(map(len, some)):
      raise UnreadableError("truncated", f"the file ends before byte {offset + size}")
    at += count
  return _record(data.toreadonly(), offset)


def _record(data: memoryview, offset: int) -> memoryview:
  if len(data) < _CHUNK_HEADER + 2 or data[24] != _SIMPLE or data[_CHUNK_HEADER] != 0:
    raise UnreadableError("damaged", f"no uncompressed record at byte {offset}")
  size, at = _varint(data, _CHUNK_HEADER + 1)
  length, _ = _varint(data, at)
  start = at + size
  stop = _CHUNK_HEADER + int.from_bytes(data[8:16], "little")
  if start + length != stop or stop > len(data):
    raise UnreadableError("damaged", f"a record of {length} bytes at byte {offset} is cut off")
  return data[start:stop]


def digest(data: bytes) -> str:
  return digest_file(io.BytesIO(data))


def digest_file(file: BinaryIO) -> str:
  made = hashlib.blake2b(digest_size=16)
  while data := file.read(_READ):
    made.update(data)
  return made.hexdigest()


def fsync_folder(folder: str | Path) -> None:
  """A renamed file survives a power cut only once its folder is on disk."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _payload(data: bytes, offset: int) -> bytes:
  """Without the headers of blocks."""
  view = memoryview(data)
  return b"".join(view[start:stop] for start, stop in _pieces(offset, len(data)))


def _pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
  """(first byte, one past the last) of the payload within `size` bytes from `offset` on."""
  at = 0
  while at < size:
    inside = (offset + at) % _BLOCK
    if inside < _BLOCK_HEADER:
      at += _BLOCK_HEADER - inside
      continue
    stop = min(size, at + _BLOCK - inside)
    yield at, stop
    at = stop


def _advance(at: int, count: int) -> int:
  """The position after `count` bytes of payload."""
  while count:
    inside = at % _BLOCK
    if inside < _BLOCK_HEADER:
      at += _BLOCK_HEADER - inside
      continue
    step = min(count, _BLOCK - inside)
    at, count = at + step, count - step
  return at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while at < len(data) and shift < 64:
    byte = data[at]
    value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
    if byte < 128:
      return value, at
  raise UnreadableError("damaged", "a number without an end")
