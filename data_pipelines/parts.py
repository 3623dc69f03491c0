"""A part of a file, read as if it were a file: a member of a tar archive. And why a file cannot be read."""

import dataclasses
import io
import os
from pathlib import Path
from typing import BinaryIO

import fsspec


class UnreadableError(Exception):
  """A file that cannot be used; `reason` is one word for the statistics, `detail` says more."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason, detail)  # both in args, so that it pickles
    self.reason, self.detail = reason, detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclasses.dataclass(frozen=True)
class Part:
  """Of a local file, of an object (any fsspec address) or of bytes at hand, which `path` then only names."""

  path: str
  offset: int
  size: int
  data: bytes | None = dataclasses.field(default=None, repr=False)

  def open(self) -> "PartFile | io.BytesIO":
    if self.data is not None:
      return io.BytesIO(self.data[self.offset : self.offset + self.size])
    if "://" in self.path:  # clips are small: one request, not one a seek
      fs, path = fsspec.url_to_fs(self.path)
      return io.BytesIO(fs.cat_file(path, start=self.offset, end=self.offset + self.size))
    return PartFile(self)

  def read(self) -> bytes:
    with self.open() as f:
      return f.read()


class PartFile:
  """Bytes [offset, offset + size) alone: reads never go beyond them."""

  def __init__(self, part: Part):
    self._file = open(part.path, "rb")  # noqa: SIM115, closed by close()
    self._start, self._size, self._at = part.offset, part.size, 0

  def read(self, count: int = -1) -> bytes:
    left = max(0, self._size - self._at)
    self._file.seek(self._start + self._at)
    data = self._file.read(left if count is None or count < 0 else min(count, left))
    self._at += len(data)
    return data

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    self._at = max(0, base + offset)
    return self._at

  def tell(self) -> int:
    return self._at

  def seekable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> "PartFile":
    return self

  def __exit__(self, *_) -> None:
    self.close()


Media = str | Path | Part


def open_bytes(media: Media) -> BinaryIO | PartFile | io.BytesIO:
  return media.open() if isinstance(media, Part) else open(media, "rb")
