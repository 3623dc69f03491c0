"""A worker process that may die or hang: that costs the sample it was at, never the run."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from data_pipelines.prepare import tasks
from data_pipelines.prepare.hooks import HookError
from data_pipelines.prepare.tasks import Job, Task

_START_LIMIT_S = 600.0
_DEATHS_AT_START = 3


class WorkerDiedError(Exception):
  """`at` is the sample it was working on, "" where it had not begun."""

  def __init__(self, at: str, why: str):
    super().__init__(at, why)
    self.at, self.why = at, why


class Worker:
  def __init__(self, job: Job, limit_s: float):
    self._job, self._limit_s = job, limit_s
    self._process, self.is_stopped = None, False
    self._starting = threading.Lock()

  def run(self, task: Task, on_sample: Callable[[str], None]) -> None:
    if self.is_stopped:
      raise WorkerDiedError("", "stopped")
    if self._process is None:
      self._start()
    at = ""
    try:
      self._connection.send(task)
      while (message := self._receive(self._limit_s, at))[0] != "done":
        if message[0] == "error":
          raise ValueError(message[1])
        if message[1] != at:
          at = message[1]
          on_sample(at)
    except (EOFError, OSError) as e:
      raise WorkerDiedError(at, self._cause()) from e

  def close(self) -> None:
    process, self._process = self._process, None  # one of two threads has it
    if process is not None:
      process.kill()
      process.join()
      self._connection.close()

  def stop(self) -> None:
    """For good: its end is no death."""
    self.is_stopped = True
    with self._starting:  # a process half started would complain of its missing parent
      self.close()

  def _start(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, self._job, os.getpid()), daemon=True)
    # ^C is the parent's from the very start. The tracker's own start would let it in again.
    multiprocessing.resource_tracker.ensure_running()
    with self._starting:
      if self.is_stopped:
        raise WorkerDiedError("", "stopped")
      held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
      process.start()
      signal.pthread_sigmask(signal.SIG_SETMASK, held)
      self._process = process
    theirs.close()
    try:
      self._receive(_START_LIMIT_S, "")
    except (EOFError, OSError) as e:
      raise WorkerDiedError("", self._cause()) from e

  def _receive(self, limit_s: float, at: str) -> tuple:
    if not self._connection.poll(limit_s):
      self.close()
      raise WorkerDiedError(at, f"time_limit: nothing for {limit_s:g} s")
    return self._connection.recv()

  def _cause(self) -> str:
    process = self._process
    if process is None:
      return "crashed: the worker process was ended"
    process.join(10)
    code = process.exitcode
    self.close()
    if code is None or code >= 0:
      return f"crashed: the worker process ended with code {code}"
    name = signal.Signals(-code).name
    return f"crashed: the worker process died of {name}" + (
      ", as for lack of memory" if -code == signal.SIGKILL else ""
    )


def supervise(worker: Worker, task: Task, job: Job, on_sample: Callable[[str], None]) -> None:
  """Sees a task through; a sample that twice ends a worker is left out and counted."""
  deaths: collections.Counter[str] = collections.Counter()
  while not tasks.is_done(task, job):
    try:
      worker.run(task, on_sample)
      return
    except WorkerDiedError as e:
      if worker.is_stopped:
        return
      deaths[e.at] += 1
      print(f"prepare: {tasks.name_of(task)}: {e.why} (sample {e.at or 'not begun'})", file=sys.stderr)
      if not e.at:
        if deaths[e.at] >= _DEATHS_AT_START:
          raise ValueError(f"worker processes die before they begin: {e.why}") from e
      elif deaths[e.at] > 1 or e.why.startswith("time_limit"):
        tasks.blame(task, job, e.at, e.why)


def _serve(connection, job: Job, parent: int) -> None:
  threading.Thread(target=_follow, args=(parent,), daemon=True).start()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone, and nobody to tell
    _work(connection, job)


def _work(connection, job: Job) -> None:
  connection.send(("ready",))
  while True:
    try:
      task = connection.recv()
    except EOFError:
      return
    try:
      tasks.run(task, job, lambda sample: connection.send(("at", sample)))
    except HookError as e:
      connection.send(("error", str(e)))
    except OSError as e:  # of the output: a full disk, no permission
      connection.send(("error", f"{tasks.name_of(task)}: {e}"))
    except Exception:  # noqa: BLE001, a bug: shown whole
      connection.send(("error", f"{tasks.name_of(task)}: {traceback.format_exc()}"))
    else:
      connection.send(("done",))


def _follow(parent: int) -> None:
  """Ends with the parent, however that ends."""
  while os.getppid() == parent:
    time.sleep(0.5)
  os._exit(1)
