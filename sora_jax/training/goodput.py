"""Where the time of a run went, over all its starts: goodput is the share in steps that were needed once."""

import contextlib
import json
import os
import time
from pathlib import Path

from sora_jax.parallel import hostlog, multihost

FILE, PROGRESS = "goodput.json", "progress"
WRITE_EVERY_S = 10
# Seconds of the main thread of process 0; "step" is what is left over inside the loop.
KINDS = ("init", "compile", "restore", "data_wait", "step", "redone", "save", "eval", "hooks")
_began = [time.monotonic()]  # the first account of a process counts from its start


class Goodput:
  """Counts seconds by kind. Steps up to the furthest that a start of this workdir reached are "redone"."""

  def __init__(self, workdir: Path):
    self.folder = workdir / hostlog.FOLDER
    self.seconds = dict.fromkeys(KINDS, 0.0)
    self.active = multihost.is_main()
    self.began = _began.pop() if _began else time.monotonic()
    self.seconds["init"] = time.monotonic() - self.began
    self.inside = 0.0  # seconds of other kinds since the last step
    self.reached = self.redone = 0
    self.before = {"starts": 0, "redone_steps": 0, "seconds": dict.fromkeys(KINDS, 0.0), "wall_s": 0.0}
    self.handle = None
    if self.active:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._load()

  def _load(self) -> None:
    path, progress = self.folder / FILE, self.folder / PROGRESS
    try:
      self.before |= json.loads(path.read_text())
      self.before["seconds"] = dict.fromkeys(KINDS, 0.0) | self.before["seconds"]
    except (OSError, ValueError):
      pass  # the first start, or a file that a kill left half written: an account is no reason to stop
    with contextlib.suppress(OSError, ValueError):
      self.reached = int(progress.read_text())
    self.handle = os.open(progress, os.O_RDWR | os.O_CREAT, 0o644)

  @contextlib.contextmanager
  def spend(self, kind: str):
    began = time.monotonic()
    try:
      yield
    finally:
      self.add(kind, time.monotonic() - began)

  def add(self, kind: str, seconds: float) -> None:
    self.seconds[kind] += seconds
    self.inside += seconds

  def begin_steps(self) -> None:
    self.mark, self.inside = time.monotonic(), 0.0
    self.write()

  def step_done(self, step: int) -> None:
    """`step` steps are done; the time since the last call, less what went to other things, was this one's."""
    now = time.monotonic()
    redone = step <= self.reached
    self.seconds["redone" if redone else "step"] += max(now - self.mark - self.inside, 0.0)
    self.mark, self.inside = now, 0.0
    if redone:
      self.redone += 1
      return
    self.reached = step
    if self.handle is not None:
      # A dozen bytes into the page cache: they outlive a SIGKILL, and no disk is waited for.
      with contextlib.suppress(OSError):
        os.pwrite(self.handle, b"%012d" % step, 0)
    if now - self.written > WRITE_EVERY_S:
      self.write()

  def totals(self) -> dict:
    seconds = {kind: self.before["seconds"][kind] + self.seconds[kind] for kind in KINDS}
    return {
      "starts": self.before["starts"] + 1,
      "redone_steps": self.before["redone_steps"] + self.redone,
      "seconds": seconds,
      "wall_s": self.before["wall_s"] + time.monotonic() - self.began,
    }

  def metrics(self) -> dict[str, float]:
    totals = self.totals()
    wall = max(totals["wall_s"], 1e-9)
    other = max(wall - sum(totals["seconds"].values()), 0.0)
    seconds = {f"goodput/{kind}_s": round(s, 3) for kind, s in (totals["seconds"] | {"other": other}).items()}
    return {
      "goodput": round(totals["seconds"]["step"] / wall, 4),
      **seconds,
      "goodput/redone_steps": totals["redone_steps"],
      "goodput/starts": totals["starts"],
    }

  def write(self) -> None:
    """Now and then, so that a start that is killed counts too."""
    self.written = time.monotonic()
    if not self.active:
      return
    partial = self.folder / (FILE + ".tmp")
    with contextlib.suppress(OSError):  # a full disk
      partial.write_text(json.dumps(self.totals()) + "\n")
      partial.replace(self.folder / FILE)

  def line(self) -> str:
    values = self.metrics()
    wall = max(self.totals()["wall_s"], 1e-9)
    shares = [(values[f"goodput/{kind}_s"], kind) for kind in (*KINDS, "other")]
    shown = ", ".join(f"{kind} {s:.1f} s" for s, kind in shares if s >= 0.05)
    starts, redone = values["goodput/starts"], values["goodput/redone_steps"]
    return (
      f"goodput {values['goodput']:.1%} of {wall:.0f} s in {starts} start(s); {redone} steps redone; {shown}"
    )

  def close(self) -> None:
    self.write()
    if self.handle is not None:
      os.close(self.handle)
      self.handle = None
