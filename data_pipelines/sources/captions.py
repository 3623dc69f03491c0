"""Where a caption stands, in a record or beside a file."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.sources import paths
from data_pipelines.sources.base import NoCaptionsError
from data_pipelines.video_io import UnreadableError

COLUMNS = (
  *("text", "cap", "caption", "prompt", "vila_caption", "captions", "prompts", "txt"),
  *("long_caption", "short_caption", "description", "descriptions", "alt_text", "internvl", "usr"),
)

SUFFIXES = (".txt", ".caption", ".json")  # of a file beside a medium, in order of preference


def clean(value: Any) -> tuple[str, ...]:
  """One text or several, by name too ({"long": ..., "short": ...}), white space evened out, no empty ones."""
  if isinstance(value, Mapping):
    value = list(value.values())
  values = value if isinstance(value, (list, tuple)) else [value]
  texts = (" ".join(str(v).split()) for v in values if not _is_none(v))
  return tuple(t for t in texts if t)


def _is_none(value: Any) -> bool:
  """NaN is how tables say that there is none."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def of_record(record: dict[str, Any], columns: tuple[str, ...] | list[str] = COLUMNS) -> tuple[str, ...]:
  return next((texts for c in columns if (texts := clean(record.get(c)))), ())


def split_columns(chosen: str, columns: Sequence[str]) -> tuple[str, ...]:
  """`data.caption_column`: one, or several with commas between."""
  if not chosen or chosen in columns:
    return (chosen,) if chosen else ()
  return tuple(part.strip() for part in chosen.split(",") if part.strip())


def of_columns(record: dict[str, Any], chosen: str) -> tuple[str, ...]:
  """The captions of the first column that has any; of several chosen ones one caption each, in their order,
  "" where a column has none, so that `data.caption_weights` finds its place."""
  columns = split_columns(chosen, list(record))
  if len(columns) < 2:
    return of_record(record, columns or COLUMNS)
  texts = tuple(next(iter(clean(record.get(c))), "") for c in columns)
  return texts if any(texts) else ()


def of_json(text: str, where: str, column: str = "") -> tuple[str, ...]:
  """Of a file about one sample: an object with a caption column, or a plain text."""
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UnreadableError("caption_unreadable", f"{where} is not JSON: {e}") from e
  if isinstance(record, str):
    return clean(record)
  known = split_columns(column, list(record) if isinstance(record, dict) else ()) or COLUMNS
  if not isinstance(record, dict) or not any(c in record for c in known):
    found = paths.listed(list(record)) if isinstance(record, dict) else "no columns"
    raise UnreadableError(
      "caption_unreadable", f"{where} has no caption column (one of {', '.join(known)}); it has {found}"
    )
  return of_columns(record, column)


def beside(
  path: Path, root: Path, *, allow_outside_root: bool, folder: Path | None = None, column: str = ""
) -> tuple[str, ...]:
  """Of a.txt, a.caption or a.json beside a.mp4 or in another folder; none where none is there."""
  for suffix in SUFFIXES:
    text = (folder or path.parent) / (path.stem + suffix)
    if not text.exists() and not text.is_symlink():
      continue
    resolved = paths.resolve(text, root, allow_outside_root=allow_outside_root)
    try:
      content = Path(resolved).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as e:
      raise UnreadableError("caption_unreadable", e.strerror or "") from e
    return of_json(content, text.name, column) if suffix == ".json" else clean(content)
  return ()


def require(entries: list, where: str, remedy: str, *, captions_optional: bool) -> None:
  if entries and not captions_optional and not any(e.captions for e in entries):
    raise NoCaptionsError(
      f"none of the {len(entries)} media files in {where} has a caption: {remedy}, or set "
      "--captions_optional=True (in training: --config.data.captions_optional=True)"
    )
