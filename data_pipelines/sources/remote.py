"""Data sets in object stores, at any fsspec address: gs://, s3://, memory://, ...

Tables and captions are fetched once into a temporary folder, media are left where they are: an empty file of
the same size stands for each, so that every reader of a format works as on a local folder. A medium is
fetched whole when it is read. Not read so: tar files and folders of frames; prepare those into shards.
"""

import dataclasses
import os
import posixpath
import tempfile
from pathlib import Path

import fsspec

from data_pipelines.sources import formats
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError

_FETCHED = (".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".toml")
_MAX_FETCHED = 2**30  # bytes of one table


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
    sizes = {name: info["size"] or 0 for name, info in fs.find(root, detail=True).items()}
  except OSError as e:
    raise ValueError(f"data.source={address!r} cannot be read: {e}") from e
  rejects: list[tuple[str, str]] = []
  with tempfile.TemporaryDirectory(prefix="sora_jax_remote_") as folder:
    mirror = Path(folder, "set")
    mirror.mkdir()
    for name, size in sizes.items():
      relative = posixpath.relpath("/" + name.lstrip("/"), "/" + root.strip("/"))
      if relative.startswith("..") or "\0" in relative or relative.split("/")[-1].startswith("."):
        continue
      _stand_in(fs, name, size, mirror / relative)
    inside = mirror if is_folder else mirror / posixpath.basename(path)
    if inside.suffix == ".tar":
      raise ValueError(f"{address}: a tar file in an object store is not read; prepare it into shards")
    try:
      form, found = formats.read(inside, options, form)
    except ValueError as e:
      raise ValueError(
        str(e).replace(str(mirror), address if is_folder else posixpath.dirname(address))
      ) from e
    base = fs.unstrip_protocol("/" + root.strip("/") if root.startswith("/") else root)
    entries = []
    for entry in found.entries:
      try:
        entries.append(_remote(entry, mirror, base))
      except UnreadableError as e:
        rejects.append((entry.name, str(e)))
    return form, Found(Path(address), entries, [*found.rejects, *rejects])


def _stand_in(fs, name: str, size: int, at: Path) -> None:
  at.parent.mkdir(parents=True, exist_ok=True)
  if at.suffix.lower() in _FETCHED and size <= _MAX_FETCHED:
    at.write_bytes(fs.cat_file(name))
  else:
    at.touch()
    os.truncate(at, size)


def _remote(entry: Entry, mirror: Path, base: str) -> Entry:
  if entry.frames:
    raise UnreadableError("no_frames", "a folder of frames in an object store is not read")
  if entry.span:
    raise UnreadableError("no_tar", "a tar file in an object store is not read")
  relative = os.path.relpath(os.path.realpath(entry.path), os.path.realpath(mirror))
  size = os.path.getsize(entry.path)
  return dataclasses.replace(entry, path=f"{base}/{Path(relative).as_posix()}", span=(0, size))
