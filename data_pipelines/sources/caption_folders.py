"""Captions in a folder of their own: videos/1.mp4 + labels/1.txt (CogVideo SAT) or metas/1.txt (Cosmos)."""

from pathlib import Path

from data_pipelines.sources import folder
from data_pipelines.sources.base import Found, ReadOptions

_MEDIA = ("videos", "images")
_TEXTS = ("labels", "metas", "captions")


def folders_of(root: Path) -> tuple[Path, Path] | None:
  media = next((root / n for n in _MEDIA if (root / n).is_dir()), None)
  texts = next((root / n for n in _TEXTS if (root / n).is_dir()), None)
  return (media, texts) if media and texts else None


def read(root: Path, options: ReadOptions) -> Found:
  media, texts = folders_of(root)
  return folder.read(root, options, media=media, texts=texts)
