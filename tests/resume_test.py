"""Killed at any point, a run resumes to the same losses, bit for bit on the same devices."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300


def start(workdir, *, steps, devices=2, task="toy"):
  command = [sys.executable, "-m", "tests.resume_worker", str(workdir), str(steps), str(devices), task]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process) -> int:
  err = process.communicate(timeout=TIMEOUT_S)[1]
  assert process.returncode in (0, 42), err[-3000:]
  return process.returncode


def losses(workdir) -> dict[int, set[float]]:
  """step -> every loss that was ever logged for it, by whichever start of the run."""
  found = {}
  path = workdir / "metrics.jsonl"
  for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
    if line.endswith("\n") and "loss" in (values := json.loads(line)):
      found.setdefault(values["step"], set()).add(values["loss"])
  return found


def wait_for(process, condition):
  """Polls until the condition holds; False where the process ended before."""
  deadline = time.monotonic() + TIMEOUT_S
  while not condition():
    if process.poll() is not None:
      return False
    assert time.monotonic() < deadline, "the run makes no progress"
    time.sleep(0.001)
  return True


def whole(tmp_path, **kwargs):
  assert finish(start(tmp_path / "whole", **kwargs)) == 0
  return losses(tmp_path / "whole")


def kill_while_training(process, workdir, rng):
  """Some steps after the point that the run had reached before, at a random moment."""
  target = max(losses(workdir), default=0) + rng.randint(2, 6)
  if wait_for(process, lambda: max(losses(workdir), default=0) >= target):
    time.sleep(rng.uniform(0, 0.06))
  process.kill()
  process.communicate()


def kill_while_saving(process, workdir, rng):
  """While a checkpoint is being written."""
  folder = workdir / "checkpoints"
  done = {path.name for path in folder.glob("*")}
  fresh = lambda: [p for p in folder.glob("*tmp*") if p.name not in done]  # noqa: E731
  if wait_for(process, fresh):
    time.sleep(rng.uniform(0, 0.15))
  process.kill()
  process.communicate()


def interrupted(tmp_path, kill, *, times, seed, **kwargs):
  rng, workdir, killed = random.Random(seed), tmp_path / "killed", 0
  for _ in range(times):
    process = start(workdir, **kwargs)
    kill(process, workdir, rng)
    killed += process.returncode == -signal.SIGKILL
  assert killed == times, "the run ended before it was killed: it needs more steps"
  assert finish(start(workdir, **kwargs)) == 0
  return losses(workdir)


def test_killed_once(tmp_path):
  expected = whole(tmp_path, steps=14)
  assert list(expected) == list(range(1, 15)) and all(len(values) == 1 for values in expected.values())
  got = interrupted(tmp_path, kill_while_training, times=1, seed=0, steps=14)
  assert got == expected


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_while_training, kill_while_saving])
def test_killed_five_times(tmp_path, kill):
  expected = whole(tmp_path, steps=60, task="dit")
  assert interrupted(tmp_path, kill, times=5, seed=1, steps=60, task="dit") == expected


@pytest.mark.slow
def test_resumed_on_other_devices(tmp_path):
  expected = whole(tmp_path, steps=16, task="dit", devices=2)
  workdir = tmp_path / "moved"
  process = start(workdir, steps=16, task="dit", devices=2)
  wait_for(process, lambda: max(losses(workdir), default=0) >= 8)
  process.kill()
  process.communicate()
  assert finish(start(workdir, steps=16, task="dit", devices=8)) == 0
  got = losses(workdir)
  assert any(len(values) > 1 or step > 8 for step, values in got.items())
  for step, (loss,) in expected.items():
    np.testing.assert_allclose(sorted(got[step]), loss, rtol=0, atol=1e-6)


def test_sigterm_saves_and_exits_with_42(tmp_path):
  process = start(tmp_path, steps=10_000)
  assert wait_for(process, lambda: max(losses(tmp_path), default=0) >= 4)
  process.send_signal(signal.SIGTERM)
  assert finish(process) == 42
  (last,) = [max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())]
  assert last >= 4 and max(losses(tmp_path)) == last
  assert finish(start(tmp_path, steps=last + 2)) == 0
  assert list(losses(tmp_path)) == list(range(1, last + 3))
