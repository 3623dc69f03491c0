"""A part of a file, read as if it were a file: a member of a tar archive. And why a file cannot be read."""

import dataclasses
import errno
import io
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec

_T = TypeVar("_T")

UNREACHABLE = "unreachable"  # a reason: not the file's fault
_WAITS_S = (1.0, 4.0, 16.0)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_FINAL_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO)


class OutageError(Exception):
  """Where data lies cannot be reached: later it may be."""


class UnreadableError(Exception):
  """A file that cannot be used; `reason` is one word for the statistics, `detail` says more."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason, detail)  # both in args, so that it pickles
    self.reason, self.detail = reason, detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}" if self.detail else self.reason


def patiently(name: str, read: Callable[[], _T]) -> _T:
  """What a store or disk does not give is asked for again, later each time: without it a batch would not be
  the one of its step."""
  for wait in (*_WAITS_S, None):
    try:
      return read()
    except UnreadableError:
      raise
    except Exception as e:  # clients of stores raise what they like
      if isinstance(e, _FINAL) or getattr(e, "errno", None) in _FINAL_ERRNOS:
        raise UnreadableError("unreadable", f"{name}: {e}") from e
      what = f"{name}: {type(e).__name__}: {e}"
      if wait is None:
        raise UnreadableError(UNREACHABLE, what) from e
      logging.warning("%s; trying again", what)
      time.sleep(wait * (0.5 + random.random()))  # not all processes at once
  raise AssertionError


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
      stop = self.offset + self.size
      return io.BytesIO(patiently(self.path, lambda: fs.cat_file(path, start=self.offset, end=stop)))
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
