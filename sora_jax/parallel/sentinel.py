"""A thread that hears of signals and of the other processes while the main thread is busy or stuck.

SIGTERM to one process stops all of them at one step. Each process that hears of it promises the first step it
has not begun; the largest promise is where all stop, and none has passed it. A process that has begun no step
promises BEFORE: when all did, nothing is lost and all end at once, be it amid compilation.
A process that ends by a fault leaves a note with its exit code, and the others end with the same.
"""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from sora_jax.parallel import cluster, exits, hostlog

BEFORE = -1
AGREE_S = 120  # for the promises of all
LINGER_S = 3  # process 0, which holds the notes, stays so long for the others to read them
_PREEMPT, _STOP = "sora_jax_note/preempt/", "sora_jax_note/stop/"


class Sentinel:
  """Listens from `start` to `close`; in the main thread SIGTERM and SIGUSR1 are taken over for so long."""

  def __init__(self):
    self.index, self.count = cluster.size()
    self.client = cluster.client() if self.count > 1 else None
    self.lock, self.agreed, self.closed = threading.Lock(), threading.Event(), threading.Event()
    self.step, self.promise, self.stop_at = BEFORE, None, None
    self.on_request: Callable[[], None] = lambda: None  # of SIGUSR1
    self.old_handlers: dict[int, object] = {}
    self.interval = min(max(0.2, self.count / 64), 5.0)
    self.threads: list[threading.Thread] = []

  def start(self) -> "Sentinel":
    self._take_signals()
    if self.client is not None:
      self._spawn(self._watch)
    return self

  def close(self) -> None:
    self.closed.set()
    if self.old_handlers:
      signal.set_wakeup_fd(self.old_fd)
      for number, handler in self.old_handlers.items():
        signal.signal(number, handler)
      self.ours.close()
      self.theirs.close()
    for thread in self.threads:
      if thread is not threading.current_thread():
        thread.join(10)

  # --- the main thread's side

  def must_stop(self, step: int) -> bool:
    """Whether all stop now, before `step`; called at every step by every process."""
    with self.lock:
      self.step, promise = step, self.promise
    if promise is None or step < promise:
      return False
    if not self.agreed.wait(AGREE_S):
      raise exits.PeerLostError(f"told to stop, but not all processes answered within {AGREE_S} s")
    return step >= self.stop_at

  # --- the thread's side

  def _spawn(self, target: Callable[[], None]) -> None:
    thread = threading.Thread(target=target, daemon=True, name=f"sentinel{target.__name__}")
    self.threads.append(thread)
    thread.start()

  def _take_signals(self) -> None:
    if threading.current_thread() is not threading.main_thread():
      return
    # The wake-up descriptor is written by the handler in C, even while the main thread is in a library.
    self.ours, self.theirs = socket.socketpair()
    self.theirs.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGUSR1):
      self.old_handlers[number] = signal.signal(number, lambda number, frame: None)
    self.old_fd = signal.set_wakeup_fd(self.theirs.fileno(), warn_on_full_buffer=False)
    self._spawn(self._hear)

  def _hear(self) -> None:
    while not self.closed.is_set():
      try:
        self.ours.settimeout(1.0)
        numbers = self.ours.recv(64)
      except TimeoutError:
        continue
      except OSError:
        return
      if signal.SIGTERM in numbers:
        hostlog.event("sigterm", step=self.step)
        self._give_promise()
      if signal.SIGUSR1 in numbers:
        self.on_request()

  def _give_promise(self) -> None:
    with self.lock:
      if self.promise is not None:
        return
      self.promise = BEFORE if self.step == BEFORE else self.step + 1
      promise = self.promise
    if self.client is None:
      self._settle([promise])
    else:
      self.client.key_value_set(f"{_PREEMPT}{self.index}", str(promise), allow_overwrite=True)

  def _settle(self, promises: list[int]) -> None:
    self.stop_at = max(promises)
    if self.stop_at == BEFORE:
      hostlog.say("told to stop before the first step: nothing to save; the same command goes on")
      end_now(exits.PREEMPTED)
    self.agreed.set()

  def _watch(self) -> None:
    """Polls the notes of the other processes."""
    while not self.closed.wait(self.interval):
      try:
        notes = dict(self.client.key_value_dir_get("sora_jax_note/"))
      except Exception:  # the coordinator is gone; the runtime ends this process
        continue
      stops = {k: json.loads(v) for k, v in notes.items() if _STOP in k and not k.endswith(f"/{self.index}")}
      if stops and not self.closed.is_set():
        key, note = min(stops.items(), key=lambda item: item[1]["time"])
        if note["code"] == exits.HANG:
          faulthandler.dump_traceback(hostlog.file(), all_threads=True)
        hostlog.say(f"process {key.rsplit('/')[-1]} stopped with code {note['code']}: {note['reason']}")
        if self.index == 0:  # the store lives here, and the runtime aborts those that lose it
          time.sleep(LINGER_S + self.interval)
        end_now(note["code"])
      promises = [int(v) for k, v in notes.items() if _PREEMPT in k]
      if promises:
        self._give_promise()
      if len(promises) == self.count and not self.agreed.is_set():
        self._settle(promises)


def tell_peers(code: int, reason: str) -> None:
  """Leaves a note for the others, and time to read it."""
  client, (index, count) = cluster.client(), cluster.size()
  if client is None or count == 1:
    return
  note = json.dumps({"code": code, "reason": reason[:500], "time": time.time()})
  put = threading.Thread(
    target=lambda: client.key_value_set(f"{_STOP}{index}", note, allow_overwrite=True), daemon=True
  )
  put.start()  # in a thread, for the coordinator may be dead
  put.join(LINGER_S)
  # The others shall read the note, and dump their stacks, before they notice that this process is gone.
  time.sleep(LINGER_S + min(count / 64, 5.0) if index == 0 else 1.0)


def end_now(code: int) -> None:
  """Ends this process, with no regard to threads, to buffers of others or to a barrier at exit."""
  hostlog.event("exit", code=code)
  hostlog.flush()
  os._exit(code)
