"""Keeps a data set within its folder."""

import os
from pathlib import Path

from data_pipelines.video_io import UnreadableError


def resolve(path: Path, root: Path, *, allow_outside_root: bool) -> str:
  """The path, unless it leaves `root` by "..", a symbolic link or an absolute path elsewhere."""
  real, real_root = os.path.realpath(path), os.path.realpath(root)
  if not allow_outside_root and os.path.commonpath([real, real_root]) != real_root:
    raise UnreadableError("outside_root", f"lies outside {real_root}; set data.allow_outside_root to read it")
  return os.path.abspath(path)


def relative_name(path: str, root: Path) -> str:
  name = os.path.relpath(path, os.path.abspath(root))
  return path if name.startswith("..") else Path(name).as_posix()
