"""What a run leaves behind so that the next one goes on: small JSON files below OUT/.prepare."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines import shard_bytes
from data_pipelines.sources import shards

FOLDER = shards.STATE


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
  """One run at a time; the system lets go of the lock however a run ends."""
  folder = out / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "lock", "w") as f:
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      raise ValueError(f"another run is writing to {out}: wait for it or give another --output") from e
    yield


def write_json(path: Path, value: Any, *, flush: bool = False) -> None:
  """A file that exists is whole, after a power cut too where `flush`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  with open(part, "w", encoding="utf-8") as f:
    json.dump(value, f, sort_keys=True)
    if flush:
      f.flush()
      os.fsync(f.fileno())
  os.replace(part, path)
  if flush:
    shard_bytes.fsync_folder(path.parent)


def read_json(path: Path) -> Any | None:
  """None where there is none, or a damaged one."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None


def remove_parts(out: Path) -> None:
  """What a killed run was writing."""
  for part in out.rglob(".*.part"):
    part.unlink(missing_ok=True)
