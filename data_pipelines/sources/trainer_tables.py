"""The .toml of a trainer, of folders and lists: [[datasets]] of musubi, [[directory]] of diffusion-pipe.

Only where media and captions are is taken from it. Sizes, numbers of frames and repeats are not: the keys of
`config.data` say those.
"""

import tomllib
from pathlib import Path
from typing import Any

from data_pipelines.sources import captions, folder, list_files, manifest, paths
from data_pipelines.sources.base import Found, ReadOptions, UnreadableError
from data_pipelines.sources.records import read_records

_FOLDERS = ("video_directory", "image_directory", "path")
_LISTS = ("video_jsonl_file", "image_jsonl_file")


def read(path: Path, options: ReadOptions) -> Found:
  parts, shared = _parts_of(path)
  root = Path(options.data_root) if options.data_root else path.parent
  found = Found(root, [], [])
  for number, part in enumerate(parts, 1):
    where = f"{path}, data set {number}"
    key = next((k for k in _FOLDERS + _LISTS if isinstance(part.get(k), str) and part[k]), "")
    if not key:
      known, has = ", ".join(_FOLDERS + _LISTS), paths.listed(list(part))
      raise ValueError(f"{where} has none of {known}; it has {has}")
    suffix = part.get("caption_extension") or shared.get("caption_extension") or captions.SUFFIXES[0]
    if suffix not in captions.SUFFIXES:
      known = ", ".join(captions.SUFFIXES)
      raise ValueError(f"{where}: caption_extension={paths.one_line(suffix)!r} is none of {known}")
    try:
      named = paths.find(part[key], path.parent, root, allow_outside_root=options.allow_outside_root)
    except UnreadableError as e:
      raise ValueError(f"{where}: {key}={paths.one_line(part[key], 200)!r}: {e}") from e
    read_part = _read_list if key in _LISTS else _read_folder
    list_files.merge(found, read_part(Path(named), options))
  return found


def _parts_of(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """(data sets, what they share)."""
  try:
    table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
  except (ValueError, RecursionError) as e:  # not UTF-8 either
    raise ValueError(f"{path} is not TOML: {paths.one_line(e, 200)}") from e
  except OSError as e:
    raise ValueError(f"cannot read {path}: {e.strerror}") from e
  parts, shared = table.get("datasets") or table.get("directory"), table.get("general", {})
  is_list = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
  if not is_list or not isinstance(shared, dict):
    has = paths.listed(list(table))
    raise ValueError(f"{path} has no [[datasets]] (musubi) or [[directory]] (diffusion-pipe); it has {has}")
  return parts, shared


def _read_folder(named: Path, options: ReadOptions) -> Found:
  if not named.is_dir():
    raise ValueError(f"{named} is no folder")
  return folder.read(named, options)


def _read_list(named: Path, options: ReadOptions) -> Found:
  return manifest.read_table(read_records(named), str(named), named.parent, named.parent, options)
