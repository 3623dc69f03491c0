"""A folder of videos and images, searched through, captions beside them: a.mp4 + a.txt or a.json."""

import os
from pathlib import Path

from data_pipelines.sources import captions, paths
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError
from data_pipelines.sources.frame_folders import IMAGE_SUFFIXES
from data_pipelines.sources.records import TABLES

# Names only choose what is looked into; what a file is, its content says.
MEDIA_SUFFIXES = IMAGE_SUFFIXES | frozenset(
  [
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".flv", ".wmv", ".ogv", ".3gp", ".mxf", ".h264", ".ivf", ".gif"),
  ]
)


def is_media(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES


def read(root: Path, options: ReadOptions, *, media: Path | None = None, texts: Path | None = None) -> Found:
  """Media files in the order of their names. `media`: the part of `root` that holds them; `texts`: where
  their captions are, in the same sub-folders."""
  allow = options.allow_outside_root
  media = media or root
  entries, rejects = [], []
  for folder, subfolders, files in os.walk(media):
    subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    for file in sorted(f for f in files if not f.startswith(".")):
      path = Path(folder, file)
      name = paths.relative_name(os.path.abspath(path), root)
      if not is_media(file):
        if path.suffix.lower() not in captions.SUFFIXES:
          rejects.append((name, "not_media"))
        continue
      try:
        absolute = paths.resolve(path, root, allow_outside_root=allow)
        beside = texts / Path(folder).relative_to(media) if texts else None
        caption = captions.beside(
          path, root, allow_outside_root=allow, folder=beside, column=options.caption_column
        )
      except UnreadableError as e:
        rejects.append((name, str(e)))
        continue
      entries.append(Entry(name, absolute, caption))
  if not entries and not any(reason != "not_media" for _, reason in rejects):
    reasons = f" ({len(rejects)} other files)" if rejects else ""
    raise ValueError(f"{root} holds no video or image{reasons}: give a folder of media files or a manifest")
  remedy = "put a.txt beside a.mp4, give a metadata.csv"
  if tables := _tables_of(root, entries):
    remedy = f"set data.source to the table there, {paths.listed(tables, 3)}, put a.txt beside a.mp4"
  captions.require(entries, str(root), remedy, captions_optional=options.captions_optional)
  return Found(root, entries, rejects)


def _tables_of(root: Path, entries: list[Entry]) -> list[str]:
  """Tables by names that none has by itself, so that they were not read."""
  stems = {Path(entry.name).stem for entry in entries}
  tables = [f for f in root.iterdir() if f.suffix.lower() in TABLES and f.stem not in stems]
  return sorted(f.name for f in tables if not f.name.startswith("."))
