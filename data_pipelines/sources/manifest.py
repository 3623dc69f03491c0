"""A table that names media files and captions: metadata.csv and its many relatives.

Read so: Open-Sora (path, text), Hugging Face folders (file_name, text), DiffSynth (video, prompt),
VideoX-Fun (file_path, text), LTX (media_path, caption), musubi (video_path, caption; a folder of frames will
do), VideoTuna ("path, caption"), NeMo (file_name, vila_caption, start_frame, end_frame), Open-Sora-Plan
(path, cap, cut, crop).
Sizes and rates are not trusted: the files say.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.sources import captions, paths, ranges
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError
from data_pipelines.sources.frame_folders import list_frames
from data_pipelines.sources.records import Record, parquet_parts, read_records

MEDIA_COLUMNS = (
  "path", "file_path", "video_path", "media_path", "file_name", "video", "image_path", "image", "file"
)  # fmt: skip


def read(manifest: Path, options: ReadOptions, *, within: Sequence[str] = ()) -> Found:
  """`within`: sub-folders of the manifest's in which media may also lie."""
  folder = manifest if manifest.is_dir() else manifest.parent
  root = Path(options.data_root) if options.data_root else folder
  if manifest.suffix.lower() != ".parquet" and not manifest.is_dir():
    return read_table(read_records(manifest), str(manifest), folder, root, options, within=within)
  parts = parquet_parts(manifest)
  for file, records in parts:  # one without a caption column, say, would else pass for one without captions
    if records:
      _columns_of(records, str(file), options)
  records = [record for _, records in parts for record in records]
  return read_table(records, str(manifest), folder, root, options, within=within)


def read_table(
  records: list[Record],
  where: str,
  folder: Path,
  root: Path,
  options: ReadOptions,
  *,
  within: Sequence[str] = (),
) -> Found:
  """Media files in the order of the records."""
  if not records:
    raise ValueError(f"{where} has no records")
  media, texts = _columns_of(records, where, options)
  entries, rejects = [], []
  for number, record in enumerate(records, 1):
    named = next((str(record[c]).strip() for c in media if record.get(c)), "")
    if not named:
      rejects.append((f"record {number}", "no_path"))
      continue
    try:
      entries.append(_entry(named, record, texts, folder, root, options, within))
    except UnreadableError as e:
      rejects.append((named, str(e)))
  if entries and not options.captions_optional and not any(e.captions for e in entries):
    raise ValueError(
      f"every caption in {where} (column {', '.join(texts)}) is empty: fill them in or set "
      "--captions_optional=True (in training: --config.data.captions_optional=True)"
    )
  return Found(root, entries, rejects)


def _columns_of(records: list[Record], where: str, options: ReadOptions) -> tuple[list[str], list[str]]:
  """(media, caption) columns."""
  columns, is_optional = list(dict.fromkeys(k for r in records for k in r)), options.captions_optional
  media = _columns(where, columns, options.media_column, MEDIA_COLUMNS, "media")
  texts = _columns(where, columns, options.caption_column, captions.COLUMNS, "caption", is_optional)
  return media, texts


def _entry(
  named: str,
  record: Record,
  texts: list[str],
  folder: Path,
  root: Path,
  options: ReadOptions,
  within: Sequence[str],
) -> Entry:
  allow = options.allow_outside_root
  path = paths.find(named, folder, root, allow_outside_root=allow, within=within)
  frames, fps = (), 0.0
  if os.path.isdir(path):
    home = root if os.path.isabs(named) else Path(path)
    frames = list_frames(path, home, allow_outside_root=allow)
    fps = _number(record.get("fps")) or options.frame_rate
  return Entry(
    name=paths.relative_name(path, root),
    path=path,
    captions=captions.of_columns(record, options.caption_column) or captions.of_record(record, texts),
    label=_label(record),
    frames=frames,
    fps=fps,
    cut=ranges.cut_of(record),
    crop=ranges.crop_of(record),
  )


def _columns(
  where: str, columns: list[str], chosen: str, known: Sequence[str], what: str, is_optional: bool = False
) -> list[str]:
  """Columns to look into, in order of preference."""
  wanted = captions.split_columns(chosen, columns)
  if missing := [c for c in wanted if c not in columns and len(wanted) > 1]:
    raise ValueError(f"{where} has no column {', '.join(missing)}; it has {paths.listed(columns)}")
  found = [c for c in wanted or known if c in columns]
  if found or (is_optional and not chosen):
    return found
  wanted = f"column {chosen!r}" if chosen else f"{what} column (one of {', '.join(known)})"
  raise ValueError(f"{where} has no {wanted}; it has {paths.listed(columns)}: set data.{what}_column")


def _number(value: object) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError):
    return 0.0
  return number if 0 < number < 1000 else 0.0


def _label(record: Record) -> int:
  try:
    return int(record.get("label", -1))
  except (TypeError, ValueError, OverflowError):
    return -1
