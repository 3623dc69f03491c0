"""Ends a run that makes no progress, with the stacks of all threads in the host's log."""

import contextlib
import faulthandler
import signal
import threading
import time

from sora_jax.parallel import exits, hostlog, sentinel

GENEROUS = 10  # compiling, saving and evaluating may take so many times longer than a step
C_GRACE_S = 30  # after which a process ends whose interpreter itself is stuck


class Watchdog:
  """Fires where `beat` is not called for `timeout_s` (0 = never). Steps beat; `patience` is for other work.

  A thread looks on, so a main thread that is stuck in a collective or in Python is noticed alike. A library
  that holds the interpreter's lock stops that thread too: then stacks are dumped from C, and SIGALRM ends the
  process (code 142).
  """

  def __init__(self, timeout_s: float):
    self.timeout_s, self.factor = timeout_s, 1.0
    self.last, self.doing = time.monotonic(), "starting"
    self.closed = threading.Event()
    self.thread = None

  def start(self) -> "Watchdog":
    if self.timeout_s:
      # With SIGALRM in use by others (some test runners), do without it.
      self.alarm = (
        signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and not signal.getitimer(signal.ITIMER_REAL)[0]
      )
      self.thread = threading.Thread(target=self._look_on, daemon=True, name="watchdog")
      self.thread.start()
    return self

  def beat(self, doing: str = "a step") -> None:
    self.last, self.doing = time.monotonic(), doing

  @contextlib.contextmanager
  def patience(self, doing: str):
    """For work that is not a step."""
    self.beat(doing)
    before, self.factor = self.factor, GENEROUS
    try:
      yield
    finally:
      self.factor = before
      self.beat()

  def close(self) -> None:
    self.closed.set()
    if self.thread:
      self.thread.join(5)
      faulthandler.cancel_dump_traceback_later()
      if self.alarm:
        signal.setitimer(signal.ITIMER_REAL, 0)

  def _look_on(self) -> None:
    every = min(1.0, self.timeout_s / 10)
    while not self.closed.wait(every):
      limit = self.timeout_s * self.factor
      silent = time.monotonic() - self.last
      if silent >= limit:
        self._fire(silent)
      # For the case that this thread does not run again.
      faulthandler.dump_traceback_later(limit + C_GRACE_S, file=hostlog.file())
      if self.alarm:
        signal.setitimer(signal.ITIMER_REAL, limit + 2 * C_GRACE_S)

  def _fire(self, silent: float) -> None:
    reason = f"no progress for {silent:.0f} s in {self.doing} (train.hang_timeout_s = {self.timeout_s:g})"
    hostlog.say(f"error: {reason}; the stacks of all threads follow in the log of this host", everywhere=True)
    hostlog.event("hang", doing=self.doing, silent_s=round(silent, 1))
    faulthandler.dump_traceback(hostlog.file(), all_threads=True)
    hostlog.flush()
    sentinel.tell_peers(exits.HANG, reason)
    sentinel.end_now(exits.HANG)
