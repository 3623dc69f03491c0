"""What each process notes of itself: WORKDIR/logs/host_00003.log for people, .jsonl for programs."""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from sora_jax.parallel import cluster

FOLDER = "logs"


class _Log:
  """The log of this process; before `open_in` lines go to stderr alone."""

  def __init__(self):
    self.lock = threading.Lock()
    self.text: TextIO | None = None
    self.events: TextIO | None = None
    self.folder: Path | None = None


_log = _Log()


def path(workdir: str | Path, process: int, suffix: str = ".log") -> Path:
  return Path(workdir) / FOLDER / f"host_{process:05d}{suffix}"


def open_in(workdir: str | Path, process: int) -> None:
  """Lines of this process go to the logs of `workdir` from now on; those of process 0 to stderr too."""
  close()
  (Path(workdir) / FOLDER).mkdir(parents=True, exist_ok=True)
  _log.folder = Path(workdir).absolute()
  _log.text = path(workdir, process).open("a", buffering=1)
  _log.events = path(workdir, process, ".jsonl").open("a", buffering=1)


def is_open_in(workdir: str | Path) -> bool:
  return _log.folder == Path(workdir).absolute() and _log.text is not None


def close() -> None:
  for file in (_log.text, _log.events):
    if file:
      with contextlib.suppress(OSError):
        file.close()
  _log.text = _log.events = _log.folder = None


def say(text: str, *, everywhere: bool = False) -> None:
  """A line in the log, and on stderr for process 0 (`everywhere`: for any)."""
  if cluster.size()[0] == 0 or everywhere:
    print(text, file=sys.stderr, flush=True)
  _write(_log.text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def event(name: str, **facts) -> None:
  """A line of the JSONL."""
  _write(_log.events, json.dumps({"time": round(time.time(), 3), "event": name, **facts}) + "\n")


def file() -> TextIO:
  """Where stack dumps go."""
  return _log.text or sys.stderr


def flush() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  for stream in (_log.text, _log.events):
    if stream:
      with contextlib.suppress(OSError):  # a full disk
        stream.flush()
        os.fsync(stream.fileno())


def _write(stream: TextIO | None, line: str) -> None:
  # A full disk must not end a run over a log line.
  if stream:
    with _log.lock, contextlib.suppress(OSError, ValueError):
      stream.write(line)
