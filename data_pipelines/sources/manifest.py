"""A metadata.csv, .jsonl or .json that names media files and captions."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from data_pipelines.sources import paths
from data_pipelines.sources.base import Entry, UnreadableError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
MEDIA_COLUMNS = (
  "path", "file_path", "video_path", "media_path", "file_name", "video", "image_path", "image", "file"
)  # fmt: skip
CAPTION_COLUMNS = ("text", "cap", "caption", "prompt", "vila_caption")


def read_manifest(
  manifest: str | Path,
  *,
  data_root: str = "",
  media_column: str = "",
  caption_column: str = "",
  captions_optional: bool,
  allow_outside_root: bool,
) -> tuple[list[Entry], list[tuple[str, str]]]:
  """(media files in the order of the manifest, (name, reason) of the records left out)."""
  manifest = Path(manifest)
  records = _read_records(manifest)
  if not records:
    raise ValueError(f"{manifest} has no records")
  columns = list(dict.fromkeys(key for record in records for key in record))
  media_columns = _columns(manifest, columns, media_column, MEDIA_COLUMNS, "media")
  caption_columns = _columns(
    manifest, columns, caption_column, CAPTION_COLUMNS, "caption", is_optional=captions_optional
  )
  root = Path(data_root) if data_root else manifest.parent
  entries, rejects = [], []
  for number, record in enumerate(records, 1):
    media = next((str(record[c]).strip() for c in media_columns if record.get(c)), "")
    if not media:
      rejects.append((f"record {number}", "no_path"))
      continue
    try:
      path = _find(media, manifest.parent, root, allow_outside_root)
    except UnreadableError as e:
      rejects.append((media, str(e)))
      continue
    caption = next((record[c] for c in caption_columns if record.get(c)), ())
    entries.append(Entry(paths.relative_name(path, root), path, _captions(caption), _label(record)))
  if entries and not captions_optional and not any(e.captions for e in entries):
    raise ValueError(
      f"every caption in {manifest} (column {', '.join(caption_columns)}) is empty: fill them in or set "
      "--config.data.captions_optional=True"
    )
  return entries, rejects


def _read_records(manifest: Path) -> list[dict[str, Any]]:
  try:
    text = manifest.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{manifest} is not UTF-8 (byte {e.start}): convert it") from e
  except OSError as e:
    raise ValueError(f"cannot read {manifest}: {e.strerror}") from e
  suffix = manifest.suffix.lower()
  if suffix in (".csv", ".tsv"):
    csv.field_size_limit(2**24)
    delimiter = "\t" if suffix == ".tsv" else ","
    try:
      rows = list(csv.DictReader(text.splitlines(True), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as e:
      raise ValueError(f"{manifest} is not a CSV file: {e}") from e
    return [{(k or "").strip(): v for k, v in row.items()} for row in rows]
  try:
    if suffix == ".jsonl":
      number = 0
      records = []
      for number, line in enumerate(text.split("\n"), 1):  # noqa: B007, named in the error
        if line.strip():
          records.append(json.loads(line))
    else:
      number = 1
      records = json.loads(text)
      records = records.get("data") if isinstance(records, dict) else records
  except json.JSONDecodeError as e:
    raise ValueError(f"{manifest}, line {number + e.lineno - 1}: {e.msg}") from e
  if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
    raise ValueError(f'{manifest} holds no list of records like {{"path": "a.mp4", "caption": "..."}}')
  return records


def _columns(
  manifest: Path,
  columns: list[str],
  chosen: str,
  known: tuple[str, ...],
  what: str,
  is_optional: bool = False,
) -> list[str]:
  """Columns to look into, in order of preference."""
  found = [c for c in ((chosen,) if chosen else known) if c in columns]
  if found or (is_optional and not chosen):
    return found
  wanted = f"column {chosen!r}" if chosen else f"{what} column (one of {', '.join(known)})"
  raise ValueError(f"{manifest} has no {wanted}; it has {', '.join(columns)}: set data.{what}_column")


def _find(media: str, folder: Path, root: Path, allow_outside_root: bool) -> str:
  """Absolute as it is; else beside the manifest; else in the data root."""
  candidates = [Path(media)] if os.path.isabs(media) else [folder / media, root / media]
  path = next((c for c in candidates if c.exists()), candidates[-1])
  home = folder if path == candidates[0] and not os.path.isabs(media) else root
  absolute = paths.resolve(path, home, allow_outside_root=allow_outside_root)
  if not path.exists():
    raise UnreadableError("missing")
  return absolute


def _captions(value: Any) -> tuple[str, ...]:
  values = value if isinstance(value, (list, tuple)) else [value]
  texts = (" ".join(str(v).split()) for v in values if v is not None)
  return tuple(t for t in texts if t)


def _label(record: dict[str, Any]) -> int:
  try:
    return int(record.get("label", -1))
  except (TypeError, ValueError):
    return -1
