"""Worker processes of this machine."""

import sys
import threading
import time
from collections.abc import Sequence

from data_pipelines.prepare import tasks
from data_pipelines.prepare.tasks import Job, Task
from data_pipelines.prepare.worker import Worker, supervise

_SHOW_EVERY_S = 5.0


def run(todo: Sequence[Task], job: Job, *, workers: int, limit_s: float, label: str) -> None:
  """Sees every task through; raises what ended one."""
  if not todo:
    return
  progress = Progress(label, sum(map(tasks.num_samples, todo)))
  pending, lock = iter(todo), threading.Lock()
  errors: list[BaseException] = []
  crew = [Worker(job, limit_s) for _ in range(max(1, min(workers, len(todo))))]

  def work(worker: Worker) -> None:
    try:
      while not errors:
        with lock:
          task = next(pending, None)
        if task is None:
          return
        supervise(worker, task, job, progress.step)
    except BaseException as e:  # noqa: BLE001, raised again below
      errors.append(e)

  threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in crew]
  try:
    for thread in threads:
      thread.start()
    while any(thread.is_alive() for thread in threads) and not errors:
      threads[0].join(0.1) if threads[0].is_alive() else time.sleep(0.1)
      progress.show()
  finally:
    for worker in crew:
      worker.stop()
  if errors:
    raise errors[0]
  progress.show(is_last=True)


class Progress:
  def __init__(self, label: str, total: int):
    self._label, self._total, self._done = label, total, 0
    self._began = self._shown = time.monotonic()
    self._lock = threading.Lock()

  def step(self, sample: str) -> None:
    del sample
    with self._lock:
      self._done = min(self._done + 1, self._total)  # a sample begun again counts once at most

  def show(self, is_last: bool = False) -> None:
    now = time.monotonic()
    if not is_last and now - self._shown < _SHOW_EVERY_S:
      return
    self._shown = now
    done = self._total if is_last else self._done
    rate = done / max(now - self._began, 1e-9)
    left = "" if is_last else f", {_clock((self._total - done) / rate)} left" if rate else ""
    print(f"{self._label}: {done}/{self._total}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
