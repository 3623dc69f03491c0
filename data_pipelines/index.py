"""What every file of a data set holds: looked into once, kept beside the data."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipelines import media_io
from data_pipelines.parts import UNREACHABLE
from data_pipelines.sources import paths
from data_pipelines.sources.base import Entry
from data_pipelines.video_io import MediaInfo, UnreadableError

_VERSION = 1  # of what `probe` reports; a change makes every kept record stale
_FILE = ".sora_jax_index.jsonl"
_SAVE_EVERY_S = 30.0

Probed = MediaInfo | UnreadableError


def probe_all(
  entries: Sequence[Entry], root: str | Path, *, decode_limit_s: float, threads: int, cache_dir: str = ""
) -> list[Probed]:
  """Probes each entry, or takes what is kept of a file of the same size and time of change."""
  kept = _read(_places(root, cache_dir))
  keys = [_key(e, decode_limit_s) for e in entries]
  todo = {key: e for key, e in zip(keys, entries) if key not in kept}
  if todo:
    fresh, last_save = 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count()) as pool:
      futures = {pool.submit(_probe, e, decode_limit_s): key for key, e in todo.items()}
      for future in concurrent.futures.as_completed(futures):
        kept[futures[future]] = future.result()
        fresh += 1
        _show_progress(fresh, len(todo))
        if time.monotonic() - last_save > _SAVE_EVERY_S:
          _write(_places(root, cache_dir), kept)
          last_save = time.monotonic()
    _write(_places(root, cache_dir), kept)
  return [kept[key] for key in keys]


def _probe(entry: Entry, decode_limit_s: float) -> Probed:
  try:
    return media_io.probe(entry, decode_limit_s)
  except UnreadableError as e:
    return e
  except (OSError, ValueError) as e:  # a decoder's surprise concerns one file
    return UnreadableError("unreadable", str(e))


def _key(entry: Entry, decode_limit_s: float) -> str:
  if "://" in entry.path:  # an object: its size is in the span
    what = entry.span or _marked(entry.frames, entry.frame_bytes, entry.fps)
    return f"{_VERSION}:{decode_limit_s:g}:{what}:{entry.path}"
  try:
    names = [os.path.join(entry.path, name) for name in entry.frames] or [entry.path]
    files = [os.stat(name) for name in names]
    state = ":".join(f"{s.st_size}:{s.st_mtime_ns}" for s in files)
  except OSError:
    state = "gone"
  if entry.frames:
    state = _marked(state, entry.frames, entry.fps)
  elif entry.span is not None:
    state += f":{entry.span}"
  return f"{_VERSION}:{decode_limit_s:g}:{state}:{entry.name}"


def _marked(*what: object) -> str:
  return hashlib.blake2b("".join(map(str, what)).encode(), digest_size=16).hexdigest()


def _places(root: str | Path, cache_dir: str) -> list[Path]:
  """Files the index may be in, the preferred one first."""
  digest = hashlib.blake2b(os.path.realpath(root).encode(), digest_size=8).hexdigest()
  if cache_dir:
    return [Path(cache_dir) / f"{digest}.jsonl"]
  places = [Path(root) / _FILE, paths.cache_home() / f"{digest}.jsonl"]
  return places if _is_writable(root) else places[1:]


def _is_writable(folder: str | Path) -> bool:
  """Goes by the mode too: a folder marked read-only is left alone also by root, whom nothing would stop."""
  try:
    return bool(os.stat(folder).st_mode & 0o222) and os.access(folder, os.W_OK)
  except OSError:
    return False


def _read(places: list[Path]) -> dict[str, Probed]:
  kept: dict[str, Probed] = {}
  for place in reversed(places):
    try:
      lines = place.read_text(encoding="utf-8").splitlines()
    except OSError:
      continue
    for line in lines:
      try:
        record = json.loads(line)
        info = record.get("info")
        kept[record["key"]] = (
          MediaInfo(**info) if info else UnreadableError(record["reason"], record["detail"])
        )
      except (ValueError, KeyError, TypeError):
        continue  # a damaged line costs one more probe
  return kept


def _write(places: list[Path], kept: dict[str, Probed]) -> None:
  lines = []
  for key, value in kept.items():
    if ":gone:" in key or getattr(value, "reason", "") == UNREACHABLE:
      continue
    if isinstance(value, MediaInfo):
      lines.append(json.dumps({"key": key, "info": dataclasses.asdict(value)}))
    else:
      lines.append(json.dumps({"key": key, "reason": value.reason, "detail": value.detail}))
  for place in places:
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      part.write_text("\n".join(lines) + "\n", encoding="utf-8")
      os.replace(part, place)
      return
    except OSError:  # a data folder that cannot be written: the next place
      continue


def _show_progress(done: int, total: int) -> None:
  if sys.stderr.isatty():
    print(f"\rindex: {done}/{total} files", end="\n" if done == total else "", file=sys.stderr, flush=True)
  elif done == total or done % 500 == 0:
    print(f"index: {done}/{total} files", file=sys.stderr, flush=True)
