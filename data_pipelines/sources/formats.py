"""Which form a data set has, seen from its path: the table that `data.format` names."""

from collections.abc import Callable
from pathlib import Path

from data_pipelines.sources import (
  caption_folders,
  class_folders,
  folder,
  list_files,
  manifest,
  paths,
  tar,
  trainer_tables,
)
from data_pipelines.sources.base import Found, ReadOptions, UnreadableError
from data_pipelines.sources.records import PICKLES, SUFFIXES, TABLES

Reader = Callable[[Path, ReadOptions], Found]

# Tables that a folder may hold, the first one found is read.
_INSIDE = (
  *("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.parquet", "videos2caption.json"),
  *("meta.json", "dataset.json", "dataset.jsonl", "dataset.csv", *list_files.TABLES),
)


def _read_manifest(path: Path, options: ReadOptions) -> Found:
  return manifest.read(path, options, within=("videos",) if path.name == "videos2caption.json" else ())


def _read_pair(path: Path, options: ReadOptions) -> Found:
  pair = list_files.pair_of(path)
  if pair is None:
    texts, media = "/".join(list_files.TEXT_LISTS), "/".join(list_files.MEDIA_LISTS)
    raise ValueError(f"{path} has no pair of {texts} and {media}")
  return list_files.read_pair(*pair, options)


def _read_caption_folders(path: Path, options: ReadOptions) -> Found:
  if caption_folders.folders_of(path) is None:
    raise ValueError(f"{path} has no folders videos/ and labels/ (or metas/)")
  return caption_folders.read(path, options)


READERS: dict[str, Reader] = {
  "manifest": _read_manifest,
  "tables": list_files.read_tables,
  "pair": _read_pair,
  "list": list_files.read_media_list,
  "caption_folders": _read_caption_folders,
  "classes": class_folders.read_classes,
  "frames": class_folders.read_frames,
  "tar": tar.read,
  "toml": trainer_tables.read,
  "folder": folder.read,
}


def read(path: Path, options: ReadOptions, form: str = "") -> tuple[str, Found]:
  """(name of the format, what was found); `form` = "" looks which one it is."""
  if form:
    if form not in READERS:
      raise ValueError(f"data.format={form!r} is none of {', '.join(READERS)}")
  elif path.is_dir():
    path, form = detect_folder(path, options)
  else:
    form = detect_file(path)
  return form, READERS[form](path, options)


def detect_file(path: Path) -> str:
  suffix = path.suffix.lower()
  if suffix in SUFFIXES + PICKLES:  # the reader refuses a pickle in words
    return "manifest"
  if suffix == ".tar" or path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
    return "tar"
  if suffix == ".toml":
    return "toml"
  if suffix == ".txt":
    if list_files.pair_of(path):
      return "pair"
    return "tables" if list_files.is_table_list(path) else "list"
  raise ValueError(f"data.source={str(path)!r} is no folder and no {' '.join(TABLES)} .txt .tar file")


def detect_folder(path: Path, options: ReadOptions) -> tuple[Path, str]:
  inside = next((path / name for name in _INSIDE if (path / name).is_file()), None)
  if inside is not None:
    try:
      paths.resolve(inside, path, allow_outside_root=options.allow_outside_root)
    except UnreadableError as e:
      raise ValueError(f"{inside}: {e}") from e
    return inside, detect_file(inside)
  if list_files.pair_of(path):
    return path, "pair"
  if caption_folders.folders_of(path):
    return path, "caption_folders"
  files = [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]
  if any(f.suffix == ".parquet" for f in files) and not any(folder.is_media(f.name) for f in files):
    return path, "manifest"
  if tar.archives_of(path) and not any(folder.is_media(f.name) for f in files):
    return path, "tar"
  if below := sorted(f.relative_to(path) for f in path.glob("*/metadata.*") if f.name in _INSIDE):
    raise ValueError(
      f"{path} has tables in its folders, of a split each: {paths.listed(below, 5)}: set data.source to one "
      "of them, or data.sources to several, or data.format to read the files without them"
    )
  return path, class_folders.detect(path) or "folder"
