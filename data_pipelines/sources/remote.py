"""Data sets in object stores, at any fsspec address: gs://, s3://, memory://, ...

Tables and captions are fetched once into a temporary folder, media are left where they are: an empty file of
the same size stands for each, so that every reader of a format works as on a local folder. Of tar files
headers and captions are fetched, to their places in a file of holes. A medium is fetched whole when it is
read; of a folder of frames the first one alone is looked into before.
"""

import contextlib
import dataclasses
import os
import posixpath
import tempfile
from pathlib import Path

import fsspec

from data_pipelines.sources import captions, folder, formats, tar
from data_pipelines.sources.base import Entry, Found, ReadOptions
from data_pipelines.sources.records import TABLES

_FETCHED = (*captions.SUFFIXES, *TABLES)
_MAX_FETCHED = 2**30  # bytes of one table
_TAR_BLOCK = 2**16  # bytes of one request, while headers are looked for


def is_address(name: str) -> bool:
  return "://" in name


def read(address: str, options: ReadOptions, form: str = "") -> tuple[str, Found]:
  """As `formats.read`, of entries whose paths are addresses."""
  if options.data_root:
    raise ValueError(f"data.source={address!r}: leave data.data_root empty, media are looked for beside it")
  try:
    fs, path = fsspec.url_to_fs(address)
  except (ImportError, ValueError) as e:
    raise ValueError(f"data.source={address!r} cannot be read: {e}") from e
  try:
    is_folder = fs.isdir(path)
    if not is_folder and not fs.exists(path):
      raise ValueError(f"data.source={address!r} is not there")
    root = path.rstrip("/") if is_folder else posixpath.dirname(path)
    is_tar = not is_folder and path.endswith(".tar")
    listed = {path: fs.info(path)} if is_tar else fs.find(root, detail=True)
    sizes = {name: info["size"] or 0 for name, info in listed.items()}
  except OSError as e:
    raise ValueError(f"data.source={address!r} cannot be read: {e}") from e
  with tempfile.TemporaryDirectory(prefix="sora_jax_remote_") as scratch:
    mirror = Path(scratch, "set")
    mirror.mkdir()
    inside = mirror if is_folder else mirror / posixpath.basename(path)
    try:
      _put_stand_ins(fs, root, sizes, mirror, with_tars=is_folder or is_tar)
    except OSError as e:
      raise ValueError(f"data.source={address!r} cannot be read: {e}") from e
    try:
      form, found = formats.read(inside, options, form)
    except ValueError as e:
      raise ValueError(
        str(e).replace(str(mirror), address if is_folder else posixpath.dirname(address))
      ) from e
    base = fs.unstrip_protocol("/" + root.strip("/") if root.startswith("/") else root)
    return form, Found(Path(address), [_remote(e, mirror, base) for e in found.entries], found.rejects)


def _put_stand_ins(fs, root: str, sizes: dict[str, int], mirror: Path, *, with_tars: bool) -> None:
  for name, size in sizes.items():
    relative = posixpath.relpath("/" + name.lstrip("/"), "/" + root.strip("/"))
    if relative.startswith("..") or "\0" in relative or relative.split("/")[-1].startswith("."):
      continue
    _stand_in(fs, name, size, mirror / relative)
  if with_tars and not any(folder.is_media(f.name) for f in mirror.iterdir()):
    for archive in tar.archives_of(mirror):
      _fill_tar(fs, f"{root}/{archive.name}", archive)


def _stand_in(fs, name: str, size: int, at: Path) -> None:
  at.parent.mkdir(parents=True, exist_ok=True)
  if at.suffix.lower() in _FETCHED and size <= _MAX_FETCHED:
    at.write_bytes(fs.cat_file(name))
  else:
    at.touch()
    os.truncate(at, size)


def _fill_tar(fs, name: str, at: Path) -> None:
  """Headers and texts, all that is looked at before a medium is read."""
  size = os.path.getsize(at)
  with fs.open(name, "rb", block_size=_TAR_BLOCK) as far, open(at, "rb+") as near:
    both = _Copied(far, near)
    with contextlib.suppress(ValueError):  # damaged: the reader comes to the same place
      for member in tar.walk(both, size, name):
        if member.size <= tar.MAX_TEXT and not folder.is_media(member.name):
          both.seek(member.offset)
          both.read(member.size)


class _Copied:
  """What is read of one file is put in the same place of another."""

  def __init__(self, far, near):
    self._far, self._near = far, near

  def seek(self, at: int) -> None:
    self._far.seek(at)
    self._near.seek(at)

  def read(self, count: int) -> bytes:
    data = self._far.read(count)
    self._near.write(data)
    return data


def _remote(entry: Entry, mirror: Path, base: str) -> Entry:
  relative = os.path.relpath(os.path.realpath(entry.path), os.path.realpath(mirror))
  address = f"{base}/{Path(relative).as_posix()}"
  if entry.frames:
    sizes = tuple(os.path.getsize(os.path.join(entry.path, name)) for name in entry.frames)
    return dataclasses.replace(entry, path=address, frame_bytes=sizes)
  return dataclasses.replace(entry, path=address, span=entry.span or (0, os.path.getsize(entry.path)))
