"""Killed, crashed, hung, in any number of processes: the same shards, and every sample accounted for."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig
from data_pipelines.prepare import beam_runner, local_runner, write
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.run import prepare
from data_pipelines.sources.shards import ShardSource
from tests.prepared import SMALL, STAGES, contents, make_set, run_inline

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
  "--resolutions=32", "--multiple=16", "--durations=1,9", "--shard_samples=2", "--min_duration=0.4",
  "--min_size=16", f"--stages={','.join(STAGES)}",
]  # fmt: skip

ODD = """
import os, signal, sys, time
import numpy as np
from data_pipelines.sources.base import SampleInfo, UnreadableError
from tests.prepared import moving

WAYS = ("fine", "killed", "aborted", "stuck", "unreadable", "killed_late", "once", "last")

class Odd:
  name, rejects = "odd", []
  def __init__(self, folder):
    self.folder = folder
  def __len__(self):
    return len(WAYS)
  def info(self, i):
    return SampleInfo(
      id=i, name=WAYS[i], num_frames=12, height=48, width=64, fps=12.0, captions=(WAYS[i],)
    )
  def fingerprint(self):
    return "odd"
  def load(self, i, spec, start_s=0.0):
    way, is_small = WAYS[i], spec.height == 48
    if way == "killed" or (way == "killed_late" and not is_small):
      os.kill(os.getpid(), signal.SIGKILL)
    if way == "aborted":
      os.abort()
    if way == "stuck":
      time.sleep(600)
    if way == "unreadable":
      raise UnreadableError("truncated", "as told")
    if way == "once" and not os.path.exists(self.folder + "/once"):
      open(self.folder + "/once", "w").close()
      os.kill(os.getpid(), signal.SIGKILL)
    return moving(i, 12, (spec.width, spec.height))[: spec.num_frames]
"""


def start(data: Path, out: Path, *more: str) -> subprocess.Popen:
  command = [sys.executable, "-m", "data_pipelines.prepare", f"--input={data}", f"--output={out}", *FLAGS]
  with open(out.with_suffix(".log"), "a") as log:
    # Where these tests run in the background of a script, SIGINT is ignored.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
      [*command, "--workers=2", *more],
      cwd=ROOT,
      stdout=log,
      stderr=log,
      start_new_session=True,
      preexec_fn=heard,
    )


def finish(data: Path, out: Path, *more: str) -> None:
  assert start(data, out, *more).wait(300) == 0, out.with_suffix(".log").read_text()


def steps_done(out: Path) -> int:
  """Files looked through and shards written."""
  state = out / ".prepare"
  return len(list(state.glob("look-*/*/*.json"))) + len(list((state / "shards").glob("*.json")))


def kill_at(data: Path, out: Path, steps: int, delay: float, *, whole_group: bool, more=()) -> bool:
  """Kills a run once that many steps are done, and a little later; False where it was done before."""
  process, limit = start(data, out, *more), time.monotonic() + 300
  while steps_done(out) < steps and process.poll() is None:
    assert time.monotonic() < limit
    time.sleep(0.002)
  time.sleep(delay)
  was_running = process.poll() is None
  if was_running:
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
  process.wait()
  return was_running


def check_no_half(out: Path, whole: dict[str, bytes]) -> None:
  """Every shard that has its name is a whole one; a set is called one only once all are there."""
  found = {str(p.relative_to(out)): p.read_bytes() for p in out.glob("*/*.array_record")}
  for name, data in found.items():
    assert whole[name] == data, f"{name} is half a shard that looks whole"
  if (out / "shards.json").exists():
    assert set(found) == {name for name in whole if name.endswith(".array_record")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """(data, what it becomes)."""
  folder = tmp_path_factory.mktemp("undisturbed")
  data = make_set(folder / "data", clips=7)
  run_inline(data, folder / "out")
  return data, contents(folder / "out")


def survive(data, whole, out, kills, seed, more=()) -> None:
  rng, hits = random.Random(seed), 0
  total = 7 + sum(name.endswith(".array_record") for name in whole)  # files to look through, shards
  for k in range(kills):
    group = k % 2 == 0  # else the parent alone
    hits += kill_at(data, out, rng.randrange(total), rng.random() * 0.05, whole_group=group, more=more)
    check_no_half(out, whole)
  assert hits  # points near the end may come too late
  time.sleep(1.0)  # workers whose parent was killed end by themselves, in silence
  if not more:
    assert "Traceback" not in (log := out.with_suffix(".log").read_text()), log
  finish(data, out, *more)
  assert contents(out) == whole
  assert not list(out.rglob("*.part"))


def test_stopped_by_hand_goes_on_from_there(undisturbed, tmp_path):
  (data, whole), out = undisturbed, tmp_path / "out"
  process, limit = start(data, out), time.monotonic() + 300
  while not steps_done(out):
    assert process.poll() is None and time.monotonic() < limit
    time.sleep(0.002)
  stop_by_hand(process, out)
  finish(data, out)
  assert contents(out) == whole


def test_stopped_by_hand_while_the_workers_start(undisturbed, tmp_path):
  out = tmp_path / "out"
  process, limit = start(undisturbed[0], out), time.monotonic() + 300
  while not is_starting_workers(process.pid):
    assert process.poll() is None and time.monotonic() < limit
    time.sleep(0.002)
  stop_by_hand(process, out)


def stop_by_hand(process: subprocess.Popen, out: Path) -> None:
  os.killpg(process.pid, signal.SIGINT)  # ^C reaches the workers too
  assert process.wait(60) == 130
  time.sleep(1.0)
  log = out.with_suffix(".log").read_text()
  assert log.endswith("stopped: the same command goes on from here\n") and "Traceback" not in log, log
  assert "died" not in log and "crashed" not in log, log


def is_starting_workers(pid: int) -> bool:
  with contextlib.suppress(OSError):  # of a process that ended between
    children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    return any(b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children.split())
  return False


def test_killed_twice(undisturbed, tmp_path):
  survive(*undisturbed, tmp_path / "out", kills=2, seed=1)


@pytest.mark.slow
def test_killed_at_ten_random_points(undisturbed, tmp_path):
  for seed in range(5):
    survive(*undisturbed, tmp_path / f"out{seed}", kills=2, seed=10 + seed)


def test_any_number_of_workers(undisturbed, tmp_path):
  data, whole = undisturbed
  config = PrepareConfig(stages=STAGES, **SMALL)
  for workers in (1, 3):
    out = tmp_path / f"out{workers}"

    def run(todo, job, label, workers=workers):
      local_runner.run(todo, job, workers=workers, limit_s=120, label=label)

    prepare(DataConfig(source=str(data), min_size=16), config, out, run)
    assert contents(out) == whole


@pytest.mark.slow
def test_workers_that_die_or_hang_cost_their_sample_alone(tmp_path, monkeypatch, capfd):
  (tmp_path / "odd_source.py").write_text(ODD)
  monkeypatch.syspath_prepend(str(tmp_path))
  config = PrepareConfig(stages=("probe", "cut", "resize", "write"), **{**SMALL, "shard_samples": 9})
  data = DataConfig(
    source="odd_source:Odd", source_kwargs={"folder": str(tmp_path)}, min_size=16, captions_optional=True
  )

  def run(todo, job, label):
    local_runner.run(todo, job, workers=2, limit_s=4.0, label=label)

  began = time.monotonic()
  outcome = prepare(data, config, tmp_path / "out", run)
  assert time.monotonic() - began < 200
  rules = {d["name"]: (d["rule"], d["detail"]) for d in outcome.dropped}
  assert {name: rule for name, (rule, _) in rules.items()} == {
    "killed": "crashed",
    "aborted": "crashed",
    "stuck": "time_limit",
    "unreadable": "truncated",
    "killed_late": "crashed",
  }
  assert "SIGKILL" in rules["killed"][1] and "SIGABRT" in rules["aborted"][1]
  source = ShardSource(str(tmp_path / "out"))
  assert {source.row(i)["source"] for i in range(len(source))} == {"fine", "once", "last"}
  assert "the worker process died of SIGKILL" in capfd.readouterr().err
  before = contents(tmp_path / "out")
  prepare(data, config, tmp_path / "out", run)  # what was given up stays so
  assert contents(tmp_path / "out") == before


def test_a_shard_cut_short_never_has_its_name(undisturbed, tmp_path, monkeypatch):
  """The run ends after the bytes of a shard, before its name; the next one clears up and goes on."""
  (data, whole), out, replace = undisturbed, tmp_path / "out", os.replace

  def no_space(part, path):
    if str(path).endswith(".array_record"):
      raise OSError(28, "No space left on device")
    replace(part, path)

  with monkeypatch.context() as patch:
    patch.setattr(write.os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
      run_inline(data, out)
  assert not list(out.glob("*/*.array_record")) and not (out / "shards.json").exists()
  part = next(out.glob("*/.*.part"))
  part.rename(part.with_name(part.name.replace(str(os.getpid()), "1")))  # as of a process that is gone
  run_inline(data, out)
  assert contents(out) == whole


def test_beam_writes_the_same(undisturbed, tmp_path):
  pytest.importorskip("apache_beam")
  data, whole = undisturbed
  out = tmp_path / "out"
  finish(data, out, "--runner=beam", "--beam_args=--runner=DirectRunner --direct_num_workers=1")
  assert contents(out) == whole


@pytest.mark.slow
def test_beam_killed_at_ten_random_points(undisturbed, tmp_path):
  pytest.importorskip("apache_beam")
  for seed in range(5):
    survive(*undisturbed, tmp_path / f"out{seed}", kills=2, seed=20 + seed, more=("--runner=beam",))


def test_beam_missing_is_one_line(monkeypatch):
  monkeypatch.setattr(beam_runner, "beam", None)
  with pytest.raises(ValueError, match="pip install 'sora_jax\\[beam\\]'"):
    beam_runner.require()


def test_the_list_of_what_was_dropped_is_the_same_too(undisturbed, tmp_path):
  """Thumbnails aside, which are for the eye, the account of a run is a function of its input."""
  data, whole = undisturbed
  outcome = run_inline(data, tmp_path / "out")
  assert contents(tmp_path / "out") == whole
  lines = [json.loads(line) for line in whole["dropped.jsonl"].splitlines()]
  assert len(lines) == len(outcome.dropped)
  again = run_inline(data, tmp_path / "out")
  assert contents(tmp_path / "out") == whole and again.dropped == outcome.dropped
