"""Which frames and pixels of a file a record names."""

import json
from typing import Any

from data_pipelines.video_io import UnreadableError


def cut_of(record: dict[str, Any]) -> tuple[int, int] | None:
  """`cut` [first, stop] or `start_frame`, `end_frame`; the stop is one past the last, -1 = to the end."""
  if _is_given(record.get("cut")):
    first, stop = _integers("cut", record["cut"], 2)
  elif _is_given(record.get("start_frame")) or _is_given(record.get("end_frame")):
    first = _integer("start_frame", record.get("start_frame"), 0)
    stop = _integer("end_frame", record.get("end_frame"), -1)
  else:
    return None
  if first < 0 or (stop != -1 and stop <= first):
    raise UnreadableError("cut", f"frames {first} to {stop}")
  return None if (first, stop) == (0, -1) else (first, stop)


def crop_of(record: dict[str, Any]) -> tuple[int, int, int, int] | None:
  """`crop` [x0, x1, y0, y1] in pixels as displayed."""
  return _integers("crop", record["crop"], 4) if _is_given(record.get("crop")) else None


def _is_given(value: Any) -> bool:
  return value is not None and value != "" and value != []


def _integers(column: str, value: Any, count: int) -> tuple[int, ...]:
  if isinstance(value, str):  # a list in a cell of a CSV file
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      value = None
  if not isinstance(value, (list, tuple)) or len(value) != count:
    raise UnreadableError(column, f"column {column} holds no list of {count} numbers")
  return tuple(_integer(column, v, 0) for v in value)


def _integer(column: str, value: Any, default: int) -> int:
  if not _is_given(value):
    return default
  try:
    number = float(value)
    if number != int(number):
      raise ValueError
  except (TypeError, ValueError, OverflowError) as e:
    raise UnreadableError(column, f"column {column} holds {str(value)[:40]!r}, no whole number") from e
  return int(number)
