"""A folder of videos and images, searched through, captions beside them: a.mp4 + a.txt."""

import os
from pathlib import Path

from data_pipelines.sources import paths
from data_pipelines.sources.base import Entry, NoCaptionsError, UnreadableError

# Names only choose what is looked into; what a file is, its content says.
MEDIA_SUFFIXES = frozenset(
  [
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".flv", ".wmv", ".ogv", ".3gp", ".mxf", ".h264", ".ivf", ".gif"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
  ]
)


def read_folder(
  root: str | Path, *, captions_optional: bool, allow_outside_root: bool
) -> tuple[list[Entry], list[tuple[str, str]]]:
  """(media files in the order of their names, (name, reason) of the files left out)."""
  root = Path(root)
  entries, rejects, sidecars = [], [], set()
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    sidecars.update(os.path.join(folder, f) for f in files if f.lower().endswith(".txt"))
    for file in sorted(f for f in files if not f.startswith(".")):
      path = Path(folder, file)
      name = paths.relative_name(os.path.abspath(path), root)
      if path.suffix.lower() not in MEDIA_SUFFIXES:
        if path.suffix.lower() != ".txt":
          rejects.append((name, "not_media"))
        continue
      try:
        absolute = paths.resolve(path, root, allow_outside_root=allow_outside_root)
        captions = _sidecar(path, root, sidecars, allow_outside_root)
      except UnreadableError as e:
        rejects.append((name, str(e)))
        continue
      entries.append(Entry(name, absolute, captions))
  if not entries:
    reasons = f" ({len(rejects)} other files)" if rejects else ""
    raise ValueError(f"{root} holds no video or image{reasons}: give a folder of media files or a manifest")
  if not captions_optional and not any(e.captions for e in entries):
    raise NoCaptionsError(
      f"none of the {len(entries)} media files in {root} has a caption: put a.txt beside a.mp4, give a "
      "metadata.csv, or set --config.data.captions_optional=True"
    )
  return entries, rejects


def _sidecar(path: Path, root: Path, sidecars: set[str], allow_outside_root: bool) -> tuple[str, ...]:
  text = path.with_suffix(".txt")
  if str(text) not in sidecars:
    return ()
  resolved = paths.resolve(text, root, allow_outside_root=allow_outside_root)
  try:
    caption = " ".join(Path(resolved).read_text(encoding="utf-8-sig", errors="replace").split())
  except OSError as e:
    raise UnreadableError("caption_unreadable", e.strerror or "") from e
  return (caption,) if caption else ()
