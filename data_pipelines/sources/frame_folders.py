"""Folders of frames: video_001/00001.jpg, 00002.jpg, ..."""

import os
import re
from pathlib import Path

from data_pipelines.sources import paths
from data_pipelines.video_io import UnreadableError

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"])


def list_frames(folder: str | Path, root: str | Path, *, allow_outside_root: bool) -> tuple[str, ...]:
  """Images of a folder, 2 before 10; raises where there is none or one leads out of the data folder."""
  try:
    names = [n for n in os.listdir(folder) if not n.startswith(".")]
  except OSError as e:
    raise UnreadableError("unreadable", e.strerror or "") from e
  names = sorted((n for n in names if is_image(n)), key=paths.natural_key)
  if not names:
    raise UnreadableError("no_frames", "a folder without images")
  for name in names:
    paths.resolve(Path(folder, name), root, allow_outside_root=allow_outside_root)
  return tuple(names)


def is_image(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def looks_like_frames(names: list[str]) -> bool:
  """Images numbered without a gap after the same prefix, alone but for hidden files and texts."""
  images = sorted((n for n in names if is_image(n)), key=paths.natural_key)
  if len(images) < 2 or any(not is_image(n) and not n.endswith((".txt", ".json")) for n in names):
    return False
  parts = [re.fullmatch(r"(.*?)(\d+)", os.path.splitext(n)[0]) for n in images]
  if not all(parts) or len({p[1] for p in parts}) != 1:
    return False
  numbers = [int(p[2]) for p in parts if len(p[2]) < 19]
  return len(numbers) == len(images) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
