"""Folders by class or of frames: UCF-101/ApplyEyeMakeup/a.avi, sky/clip_1/00001.jpg, Class/clip_1/00001.jpg.

The name of a class is the caption ("apply eye makeup"), its place in the alphabet the label.
"""

import os
import re
from pathlib import Path

from data_pipelines.sources import captions, frame_folders, paths
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError
from data_pipelines.sources.folder import is_media

# What folders are called that divide a set by kind or split: a clip in videos/ does not show "videos".
_NO_CLASSES = {
  *("video", "videos", "image", "images", "clips", "media", "data"),
  *("train", "val", "valid", "validation", "test"),
}


def class_caption(name: str) -> str:
  words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
  return " ".join(re.sub(r"[_\-.]+", " ", words).lower().split())


def detect(root: Path) -> str:
  """ "frames" or "classes" where the folder is of that kind and has no captions of its own."""
  kinds, names = set(), set()
  for path, subfolders, files in os.walk(root):
    subfolders[:] = [s for s in sorted(subfolders) if not s.startswith(".")]
    files = [f for f in files if not f.startswith(".")]
    media = [f for f in files if is_media(f)]
    if not media:
      continue
    stems = {os.path.splitext(f)[0] for f in files if f.endswith(captions.SUFFIXES)}
    depth = len(Path(path).relative_to(root).parts)
    is_captioned = any(os.path.splitext(f)[0] in stems for f in media)
    if depth == 0 or is_captioned:
      return ""
    names.add(Path(path).name)
    kinds.add("frames" if frame_folders.looks_like_frames(files) else "classes" if depth == 1 else "")
  if "" in kinds or not kinds or len(kinds) > 1:
    return ""
  kind = kinds.pop()
  return "" if kind == "classes" and not _are_classes(names) else kind


def _are_classes(names: set[str]) -> bool:
  return len(names) > 1 and not names <= _NO_CLASSES


def read_classes(root: Path, options: ReadOptions) -> Found:
  found = Found(root, [], [])
  names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  for label, name in enumerate(names):
    caption = class_caption(name)
    for path in sorted((root / name).rglob("*")):
      if path.is_dir() or path.name.startswith(".") or not is_media(path.name):
        continue
      _add(found, path, (caption,) if caption else (), label, options)
  return found


def read_frames(root: Path, options: ReadOptions) -> Found:
  """Every folder that holds images is a clip; with folders around it, several, those are its class."""
  clips = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = sorted((s for s in subfolders if not s.startswith(".")), key=paths.natural_key)
    if not any(frame_folders.is_image(f) and not f.startswith(".") for f in files):
      continue
    clips.append((Path(folder), (*Path(folder).relative_to(root).parts[:-1], "")[0]))
  found, labels = Found(root, [], []), {}
  has_classes = _are_classes({name for _, name in clips if name})
  for path, name in clips:
    is_of_class = has_classes and bool(name)
    label = labels.setdefault(name, len(labels)) if is_of_class else -1
    _add(found, path, (class_caption(name),) if is_of_class else (), label, options)
  remedy = "put clip_1.txt beside the folder clip_1, set data.format=classes where each image is a sample"
  captions.require(found.entries, str(root), remedy, captions_optional=options.captions_optional)
  return found


def _add(found: Found, path: Path, caption: tuple[str, ...], label: int, options: ReadOptions) -> None:
  """A file, or a folder of frames; a caption beside it goes before the name of its class."""
  allow, root, frames = options.allow_outside_root, found.root, ()
  name = paths.relative_name(os.path.abspath(path), root)
  try:
    absolute = paths.resolve(path, root, allow_outside_root=allow)
    if path.is_dir():
      frames = frame_folders.list_frames(absolute, root, allow_outside_root=allow)
    own = captions.beside(
      path if not frames else path.with_name(path.name + ".mp4"), root, allow_outside_root=allow
    )
  except UnreadableError as e:
    found.rejects.append((name, str(e)))
    return
  fps = options.frame_rate if frames else 0.0
  found.entries.append(Entry(name, absolute, own or caption, label, frames=frames, fps=fps))
