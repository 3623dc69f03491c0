"""A profiler trace of a few steps: named by the config, or asked for with SIGUSR1."""

import contextlib
import re
from pathlib import Path

import jax

from sora_jax.parallel import hostlog

FOLDER = "profile"


def parse(text: str) -> tuple[int, int] | None:
  """ "10:13" -> (10, 13): from before step 10 to after step 12."""
  if not text:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(f"train.profile_steps = {text!r} must be FIRST:LAST, as 10:13 for steps 10, 11 and 12")
  return int(match[1]), int(match[2])


class Profiler:
  """Each process writes its own trace, to WORKDIR/profile/host_00003."""

  def __init__(self, workdir: Path, *, steps: str = "", on_request: int = 3):
    self.folder = workdir / FOLDER / f"host_{jax.process_index():05d}"
    self.range, self.length = parse(steps), on_request
    self.requested, self.running = False, False

  def request(self) -> None:
    """Of the next steps; may be called from any thread."""
    self.requested = True

  def before(self, step: int) -> None:
    if self.requested and not self.running:
      self.requested, self.range = False, (step, step + self.length)
    if self.range is None:
      return
    if step >= self.range[1]:
      self.close()
      self.range = None
    elif step >= self.range[0] and not self.running:
      self._guarded(lambda: jax.profiler.start_trace(str(self.folder)), f"profiling from step {step}")
      self.running = True

  def close(self) -> None:
    if self.running:
      self.running = False
      self._guarded(jax.profiler.stop_trace, f"profiler trace in {self.folder}")

  def _guarded(self, call, done: str) -> None:
    # A trace is never worth the run: a full disk, another trace under way.
    with jax.transfer_guard("allow"):
      try:
        call()
      except (RuntimeError, OSError, ValueError) as error:
        done = f"no profiler trace: {str(error).splitlines()[0]}"
    hostlog.say(done)


@contextlib.contextmanager
def profiling(workdir: Path, *, steps: str, on_request: int):
  profiler = Profiler(workdir, steps=steps, on_request=on_request)
  try:
    yield profiler
  finally:
    profiler.close()
