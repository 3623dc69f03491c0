"""Plain text files of one thing a line.

- `data.txt`, `merge.txt`: a folder and a table of what it holds, "DATA_ROOT,annotations.json"
  (Open-Sora-Plan, FastVideo).
- `prompts.txt` + `videos.txt`: line i of one belongs to line i of the other (CogVideo, finetrainers).
- `train_list.txt`: media alone, "Class/a.avi 1" or "video/00001.jpg"; frames of a folder make one
  clip (Latte).
"""

import dataclasses
import os
from pathlib import Path

from data_pipelines.sources import captions, manifest, paths
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError
from data_pipelines.sources.class_folders import class_caption
from data_pipelines.sources.frame_folders import is_image
from data_pipelines.sources.records import PICKLES, read_records

TABLES = ("data.txt", "merge.txt")
TEXT_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
MEDIA_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
_TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", *PICKLES)


def pair_of(path: Path) -> tuple[Path, Path] | None:
  """(captions, media) in a folder, or with the one of them that is named."""
  folder = path if path.is_dir() else path.parent
  texts = next((folder / n for n in TEXT_LISTS if (folder / n).is_file()), None)
  media = next((folder / n for n in MEDIA_LISTS if (folder / n).is_file()), None)
  if not path.is_dir() and path.name in TEXT_LISTS:
    texts = path
  if not path.is_dir() and path.name in MEDIA_LISTS:
    media = path
  is_named = path.is_dir() or path.name in TEXT_LISTS + MEDIA_LISTS
  return (texts, media) if texts and media and is_named else None


def is_table_list(path: Path) -> bool:
  if path.name in TABLES:
    return True
  lines = _lines(path)
  return bool(lines) and all(line.lower().endswith(_TABLE_SUFFIXES) and "," in line for line in lines)


def read_tables(path: Path, options: ReadOptions) -> Found:
  root = Path(options.data_root) if options.data_root else path.parent
  allow = options.allow_outside_root
  found = Found(root, [], [])
  for number, line in enumerate(_lines(path), 1):
    where = f"{path}, line {number}"
    data_root, comma, table = (part.strip() for part in line.partition(","))
    if not comma or not table:
      raise ValueError(f"{where}: {line[:80]!r} is not DATA_ROOT,annotations.json")
    try:
      folder = Path(paths.find(data_root, path.parent, root, allow_outside_root=allow))
      annotations = Path(paths.find(table, path.parent, root, allow_outside_root=allow))
    except UnreadableError as e:
      raise ValueError(f"{where}: {line[:200]}: {e}") from e
    records = read_records(annotations)
    part = manifest.read_table(records, str(annotations), folder, folder, options)
    merge(found, part)
  if not found.entries and not found.rejects:
    raise ValueError(f"{path} has no lines DATA_ROOT,annotations.json")
  return found


def read_pair(texts: Path, media: Path, options: ReadOptions) -> Found:
  root = Path(options.data_root) if options.data_root else media.parent
  for file in (texts, media):
    if not options.data_root and texts.parent == media.parent:
      _resolved(file, root, options)
  lines, named = _lines(texts, keep_empty=True), _lines(media, keep_empty=True)
  if len(lines) != len(named):
    raise ValueError(f"{texts} has {len(lines)} lines and {media} {len(named)}: line i belongs to line i")
  records = [{"path": n, "text": t} for n, t in zip(named, lines)]
  return manifest.read_table(records, f"{texts} + {media.name}", media.parent, root, _plain(options))


def read_media_list(path: Path, options: ReadOptions) -> Found:
  root = Path(options.data_root) if options.data_root else path.parent
  allow = options.allow_outside_root
  found, frames, labels = Found(root, [], []), {}, {}
  for line in _lines(path):
    named, _, last = line.rpartition(" ")
    named, label = (named.strip(), int(last)) if named and last.isdecimal() else (line, -1)
    try:
      absolute = paths.find(named, path.parent, root, allow_outside_root=allow)
    except UnreadableError as e:
      found.rejects.append((named, str(e)))
      continue
    if is_image(named) and Path(named).parent != Path("."):
      frames.setdefault(os.path.dirname(absolute), {})[os.path.basename(absolute)] = None
      continue
    name = paths.relative_name(absolute, root)
    caption = (class_caption(Path(name).parent.name),) if Path(name).parent.name else ()
    try:
      beside = captions.beside(Path(absolute), Path(absolute).parent, allow_outside_root=allow)
    except UnreadableError as e:
      found.rejects.append((named, str(e)))
      continue
    label = label if label >= 0 or not caption else labels.setdefault(caption, len(labels))
    found.entries.append(Entry(name, absolute, beside or caption, label))
  for folder, names in frames.items():
    text = Path(folder).with_name(Path(folder).name + ".mp4")  # a caption beside the folder: video_1.txt
    try:
      caption = captions.beside(text, root, allow_outside_root=allow)
    except UnreadableError as e:
      found.rejects.append((folder, str(e)))
      continue
    name = paths.relative_name(folder, root)
    found.entries.append(
      Entry(name, folder, caption, frames=tuple(names) if len(names) > 1 else (), fps=options.frame_rate)
      if len(names) > 1
      else Entry(f"{name}/{next(iter(names))}", os.path.join(folder, next(iter(names))), caption)
    )
  remedy = "put video.txt beside the folder video"
  captions.require(found.entries, str(path), remedy, captions_optional=options.captions_optional)
  return found


def _resolved(file: Path, root: Path, options: ReadOptions) -> None:
  try:
    paths.resolve(file, root, allow_outside_root=options.allow_outside_root)
  except UnreadableError as e:
    raise ValueError(f"{file}: {e}") from e


def _plain(options: ReadOptions) -> ReadOptions:
  return dataclasses.replace(options, media_column="", caption_column="")


def merge(found: Found, part: Found) -> None:
  """Adds what a part of a set holds, named as from the root of the whole."""
  found.entries.extend(
    dataclasses.replace(entry, name=paths.relative_name(entry.path, found.root)) for entry in part.entries
  )
  found.rejects.extend(part.rejects)


def _lines(path: Path, *, keep_empty: bool = False) -> list[str]:
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
  except UnicodeDecodeError as e:
    raise ValueError(f"{path} is not UTF-8 (byte {e.start}): convert it") from e
  while lines and not lines[-1]:
    lines.pop()
  return lines if keep_empty else [line for line in lines if line]
