"""Keeps a data set within its folder."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.video_io import UnreadableError


def resolve(path: str | Path, root: str | Path, *, allow_outside_root: bool) -> str:
  """The path, unless it leaves `root` by "..", a symbolic link or an absolute path elsewhere."""
  try:
    real, real_root = os.path.realpath(path), os.path.realpath(root)
  except (OSError, ValueError) as e:  # a zero byte, or a name beyond what the system takes
    raise UnreadableError("missing", str(e)) from e
  if not allow_outside_root and os.path.commonpath([real, real_root]) != real_root:
    raise UnreadableError("outside_root", f"lies outside {real_root}; set data.allow_outside_root to read it")
  return os.path.abspath(path)


def find(
  named: str, folder: Path, root: Path, *, allow_outside_root: bool, within: Sequence[str] = ()
) -> str:
  """Absolute as it is; else in `folder` (of the manifest) or its sub-folders `within`; else in `root`."""
  if os.path.isabs(named):
    candidates = [(Path(named), root)]
  else:
    candidates = [(folder / sub / named, folder) for sub in ("", *within)] + [(root / named, root)]
  path, home = next((c for c in candidates if is_there(c[0])), candidates[-1])
  absolute = resolve(path, home, allow_outside_root=allow_outside_root)
  if not is_there(path):
    raise UnreadableError("missing")
  return absolute


def cache_home() -> Path:
  """Of what is kept of data sets outside of them."""
  try:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  except RuntimeError:  # a user of a container, known by number alone
    home = Path(tempfile.gettempdir())
  return home / "sora_jax" / "index"


def is_there(path: Path) -> bool:
  try:
    return path.exists()
  except (OSError, ValueError):
    return False


def relative_name(path: str, root: str | Path) -> str:
  name = os.path.relpath(path, os.path.abspath(root))
  return path if name.startswith("..") else Path(name).as_posix()


def natural_key(name: str) -> list[tuple[int, int, str]]:
  """Sorts 2 before 10."""
  parts = re.split(r"(\d+)", name)
  return [(0, int(p), p) if p.isdecimal() and len(p) < 4000 else (1, 0, p) for p in parts]


def one_line(text: object, most: int = 60) -> str:
  """For messages: whatever a damaged file made of a name."""
  line = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 10 * most]).split())
  return line if len(line) <= most else line[: most - 3] + "..."


def listed(names: Sequence[object], most: int = 30) -> str:
  shown = ", ".join(map(one_line, names[:most]))
  return shown + (f" and {len(names) - most} more" if len(names) > most else "")
