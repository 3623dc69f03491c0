"""Worker processes that die: which sample ended them, found by trying it alone."""

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.sources.base import Source, UnreadableError
from sora_jax.packing.geometry import ClipSpec

_TRIAL_S = 300.0  # for one sample alone, start of the process included
_MOST_DEATHS = 3  # with no sample to blame, in a row
_FAILED = "failed.jsonl"
_IS_DEATH = "terminated unexpectedly"  # in the error that grain raises


class Notes:
  """What each thread of each worker is loading, and could not read, on disk, where it outlives them."""

  def __init__(self):
    self.folder = tempfile.mkdtemp(prefix="sora_jax_workers_")

  @contextlib.contextmanager
  def loading(self, i: int, spec: ClipSpec, start_s: float) -> Iterator[None]:
    path = Path(self.folder, f"{os.getpid()}-{threading.get_ident()}")
    text = f"{i} {spec.num_frames} {spec.height} {spec.width} {spec.fps!r} {start_s!r}"
    with contextlib.suppress(OSError):  # a full disk: a death then blames no one
      path.write_text(text)
    yield
    with contextlib.suppress(OSError):
      path.write_text("")

  def take(self) -> list[tuple[int, ClipSpec, float]]:
    """What was being loaded, and forgets it."""
    found = []
    for path in Path(self.folder).glob("*-*"):
      parts = path.read_text().split()
      if len(parts) == 6:
        found.append((int(parts[0]), ClipSpec(*map(int, parts[1:4]), float(parts[4])), float(parts[5])))
      path.unlink()
    return found

  def failed(self, name: str, why: str) -> None:
    with contextlib.suppress(OSError), open(Path(self.folder, _FAILED), "a", encoding="utf-8") as f:
      f.write(json.dumps([name, why]) + "\n")  # one write: lines of several processes do not mix

  def failures(self) -> dict[str, str]:
    """Name -> why, in all workers."""
    try:
      lines = Path(self.folder, _FAILED).read_text(encoding="utf-8").splitlines()
    except OSError:
      return {}
    return dict(json.loads(line) for line in lines)

  def close(self) -> None:
    shutil.rmtree(self.folder, ignore_errors=True)


class Deaths:
  """Decides after each death of a worker whether loading may go on."""

  def __init__(self, source: Source, notes: Notes, ended: dict[int, str]):
    self.source, self.notes, self.ended = source, notes, ended
    self.unexplained = 0

  def explain(self, error: RuntimeError) -> None:
    """Adds the samples that end a process to `ended`; raises where it is no death, or too many name none."""
    if _IS_DEATH not in str(error):
      raise error
    found = False
    for i, spec, start_s in self.notes.take():
      code = _try_alone(self.source, i, spec, start_s)
      if code:
        found, name = True, self.source.info(i).name
        self.ended[i] = f"it ends the process that loads it (exit code {code})"
        logging.warning("%s: a worker process died loading %s: padding instead", self.source.name, name)
    self.unexplained = 0 if found else self.unexplained + 1
    if self.unexplained >= _MOST_DEATHS:
      raise RuntimeError(
        f"worker processes that load data died {_MOST_DEATHS} times and no sample alone explains it: "
        "lower data.workers or data.cache_mb"
      ) from error
    if not found:
      logging.warning(
        "%s: a worker process died (%s); loading goes on with new ones", self.source.name, error
      )


def _try_alone(source: Source, i: int, spec: ClipSpec, start_s: float) -> int:
  """Exit code of a process that loads one sample."""
  process = multiprocessing.get_context("spawn").Process(
    target=_load, args=(source, i, spec, start_s), daemon=True
  )
  process.start()
  process.join(_TRIAL_S)
  if process.is_alive():
    process.kill()
    process.join()
  return process.exitcode or 0


def _load(source: Source, i: int, spec: ClipSpec, start_s: float) -> None:
  with contextlib.suppress(UnreadableError):
    source.load(i, spec, start_s)
