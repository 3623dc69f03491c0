"""Faults done to runs of several real processes: how they end, and that they go on to the same losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.cluster_runs import (
  ROOT,
  TIMEOUT_S,
  checkpoints,
  codes,
  events,
  finish,
  local_run,
  log_of,
  losses,
  metrics_of,
  note,
  pid_of,
  reached,
  wait_for,
  wait_for_step,
)

STEPS = 14
PLAIN = {"steps": STEPS, "train": {"keep": 5, "hang_timeout_s": 60}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """processes -> (workdir, losses) of a run without faults."""
  found = {}

  def get(processes):
    if processes not in found:
      workdir = tmp_path_factory.mktemp(f"whole{processes}")
      code, console = finish(local_run(workdir, PLAIN, processes=processes))
      assert code == 0, console[-3000:]
      expected = losses(workdir)
      assert list(expected) == list(range(1, STEPS + 1)) and all(len(v) == 1 for v in expected.values())
      found[processes] = workdir, expected
    return found[processes]

  return get


def go_on(workdir, expected, *, processes, before: int):
  """The same command again: finishes with the losses of the run without faults, bit for bit."""
  code, console = finish(local_run(workdir, PLAIN, processes=processes))
  assert code == 0, console[-3000:]
  assert losses(workdir) == expected
  start = events(workdir, 0, "start")[-1]["step"]
  redone = metrics_of(workdir, "goodput/redone_steps")[-1]
  assert 0 <= before - start <= redone + 1
  return {"reached": before, "resumed_at": start, "steps_redone": redone, "equal": "bitwise"}


def signalled(whole, tmp_path, *, number, victim, processes, name, settings=PLAIN):
  """A signal to one process after step 5: (codes, console), the rows noted once it went on."""
  expected = whole(processes)[1]
  process = local_run(tmp_path, settings, processes=processes, GRACE_S=30)
  wait_for_step(process, tmp_path, 5)
  began = time.monotonic()
  os.kill(pid_of(tmp_path, victim), number)
  code, console = finish(process)
  seconds = round(time.monotonic() - began, 1)
  row = go_on(tmp_path, expected, processes=processes, before=reached(tmp_path))
  note(name, processes=processes, code=code, codes=codes(console), ended_after_s=seconds, **row)
  return code, codes(console), console


@pytest.mark.slow
def test_sigkill_of_one_host(whole, tmp_path):
  code, each, _ = signalled(
    whole, tmp_path, number=signal.SIGKILL, victim=2, processes=4, name="SIGKILL of one host"
  )
  assert code == 134 and each == [134, 134, 137, 134]


@pytest.mark.slow
def test_sigkill_of_the_coordinator(whole, tmp_path):
  code, each, _ = signalled(
    whole, tmp_path, number=signal.SIGKILL, victim=0, processes=4, name="SIGKILL of the coordinator"
  )
  assert code in (134, 137) and each == [137, 134, 134, 134]


@pytest.mark.slow
def test_sigstop_of_one_host(whole, tmp_path):
  """A frozen host: the others end by the heartbeat, it is killed by the script."""
  code, each, console = signalled(
    whole, tmp_path, number=signal.SIGSTOP, victim=1, processes=4, name="SIGSTOP of one host"
  )
  assert code == 134 and each == [134, 137, 134, 134]
  assert "process 1 is still there" in console


def test_sigterm_to_one_host_saves_on_all(whole, tmp_path):
  code, each, console = signalled(
    whole, tmp_path, number=signal.SIGTERM, victim=1, processes=2, name="SIGTERM to one host"
  )
  assert code == 42 and each == [42, 42] and "told to stop: saved step" in console
  stops = [events(tmp_path, i, "preempted")[0]["step"] for i in range(2)]
  assert stops[0] == stops[1] == events(tmp_path, 0, "start")[1]["step"]
  assert metrics_of(tmp_path, "goodput/redone_steps")[-1] == 0


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_all_at_once(tmp_path):
  code, console = finish(local_run(tmp_path, PLAIN | {"stop_before_join": {"1": "SIGTERM"}}))
  assert code == 42 and codes(console) == [42, 42]
  assert "before the first step: nothing to save" in console and not checkpoints(tmp_path)
  note("SIGTERM while starting", processes=2, code=code, codes=codes(console), steps_redone=0)


@pytest.mark.slow
def test_a_hang_in_python_is_ended_with_stacks(whole, tmp_path):
  expected = whole(2)[1]
  began = time.monotonic()
  process = local_run(tmp_path, PLAIN | {"hang": {"1": 8}, "train": {"hang_timeout_s": 12}})
  wait_for_step(process, tmp_path, 6)
  began, (code, console) = time.monotonic(), finish(process)
  seconds = round(time.monotonic() - began, 1)
  assert code == 43 and codes(console) == [43, 43]
  # The host that hangs shows where; the other, stuck in a collective or just out of it, shows its own stacks.
  assert "fault_worker.py" in log_of(tmp_path, 1) and "in batches" in log_of(tmp_path, 1)
  assert "no progress for" in log_of(tmp_path, 0) + log_of(tmp_path, 1)
  assert "most recent call first" in log_of(tmp_path, 0) and "in batches" not in log_of(tmp_path, 0)
  row = go_on(tmp_path, expected, processes=2, before=reached(tmp_path))
  note("Python hang (limit 12 s)", processes=2, code=code, codes=codes(console), ended_after_s=seconds, **row)


@pytest.mark.slow
def test_kill_while_saving(whole, tmp_path):
  expected = whole(2)[1]
  process = local_run(tmp_path, PLAIN, GRACE_S=30)
  folder = tmp_path / "checkpoints"
  wait_for_step(process, tmp_path, 4)
  done = {path.name for path in folder.glob("*")}
  began = lambda: [p for p in folder.glob("*tmp*") if p.name not in done]  # noqa: E731
  wait_for(process, began, "a checkpoint was begun")
  torn = began()
  for i in range(2):
    os.kill(pid_of(tmp_path, i), signal.SIGKILL)
  code, console = finish(process)
  assert codes(console) == [137, 137] and any(path.exists() for path in torn), "the save was over before"
  row = go_on(tmp_path, expected, processes=2, before=reached(tmp_path))
  assert not list(folder.glob("*tmp*"))
  note("SIGKILL of all while saving", processes=2, code=code, codes=codes(console), **row)


def data_files(folder):
  """The files that hold arrays."""
  return [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]


def test_a_flipped_bit_and_a_truncated_file(whole, tmp_path):
  """The newest checkpoint has one bit changed, the one before is cut short: all hosts put both aside."""
  done, expected = whole(2)
  workdir = tmp_path / "run"
  shutil.copytree(done, workdir)
  folder = workdir / "checkpoints"
  shutil.rmtree(folder / "14")
  largest = max(data_files(folder / "12" / "params"), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  largest = max(data_files(folder / "9" / "opt"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  code, console = finish(local_run(workdir, PLAIN))
  assert code == 0 and codes(console) == [0, 0], console[-3000:]
  assert sorted(path.name.split("-")[0] for path in (workdir / "checkpoints_bad").iterdir()) == ["12", "9"]
  assert "resumed at step 6" in console and losses(workdir) == expected
  reasons = [event["reason"] for event in events(workdir, 1, "checkpoint_damaged")]
  note("flipped bit, truncated file", processes=2, code=code, resumed_at=6, steps_redone=8, reasons=reasons)


@pytest.mark.slow
def test_resumed_on_another_number_of_hosts(whole, tmp_path):
  done, expected = whole(2)
  workdir = tmp_path / "run"
  shutil.copytree(done, workdir)
  for step in (9, 12, 14):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  (workdir / "metrics.jsonl").unlink()
  code, console = finish(local_run(workdir, PLAIN, processes=1, devices=2))
  assert code == 0 and "resumed at step 6" in console, console[-3000:]
  got = losses(workdir)
  assert list(got) == list(range(7, STEPS + 1))
  worst = max(abs(min(got[step]) - min(expected[step])) for step in got)
  assert worst < 1e-6
  note("resumed on 1 process, 2 devices", code=code, largest_difference=worst)


@pytest.mark.slow
def test_a_host_that_cannot_write_ends_no_run(whole, tmp_path):
  """RLIMIT_FSIZE of one process, lifted later: the save of step 6 fails for all, that of step 12 is whole."""
  expected = whole(2)[1]
  process = local_run(tmp_path, PLAIN | {"slow_s": 0.5})
  wait_for_step(process, tmp_path, 4)
  prlimit = ["prlimit", f"--pid={pid_of(tmp_path, 1)}"]
  limit = lambda n: subprocess.run([*prlimit, f"--fsize={n}"], check=True)  # noqa: E731
  limit("600:unlimited")
  wait_for(process, lambda: events(tmp_path, 0, "save_failed"), "a save failed")
  limit("unlimited:unlimited")
  code, console = finish(process)
  assert code == 0, console[-3000:]
  assert "File too large; training goes on" in console and losses(tmp_path) == expected
  failed = [event["step"] for event in events(tmp_path, 0, "save_failed")]
  assert failed == [event["step"] for event in events(tmp_path, 1, "save_failed")]
  assert checkpoints(tmp_path) == [step for step in (3, 6, 9, 12, 14) if step not in failed]
  note("one host cannot write", processes=2, code=code, failed_saves=failed, kept=checkpoints(tmp_path))


@pytest.fixture
def small_disk(tmp_path):
  """A disk of its own of 8 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("no right to mount")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
  """Until nothing more goes onto the disk."""
  with (disk / "filler").open("wb", buffering=0) as file:
    try:
      while True:
        file.write(b"\0" * 4096)
    except OSError as error:
      assert error.errno == 28


@pytest.mark.slow
def test_a_full_disk(whole, tmp_path, small_disk):
  """Full from step 4 on: training goes on to its end, the last save fails with code 1, the first is whole."""
  expected, workdir = whole(2)[1], small_disk / "run"
  process = local_run(workdir, PLAIN | {"slow_s": 0.3})
  wait_for(process, lambda: checkpoints(workdir) == [3], "step 3 was saved")
  fill(small_disk)
  code, console = finish(process)
  assert code == 1 and codes(console) == [1, 1], console[-3000:]
  last = [line for line in console.splitlines() if line.startswith("error:")][-1]
  assert "checkpoint of step 14 could not be written: No space left on device" in last
  assert "14/14 loss" in console and checkpoints(workdir) == [3]
  assert console.count("training goes on") >= 3
  (small_disk / "filler").unlink()
  row = go_on(workdir, expected, processes=2, before=STEPS)
  note("disk full", processes=2, code=code, codes=codes(console), **row)


def test_a_read_only_disk_is_one_line(small_disk):
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  flags = ["--config=configs/quickstart.py:debug", "--config.data.rows=8", f"--workdir={small_disk}/run"]
  done = subprocess.run(
    [sys.executable, "-m", "sora_jax.train", *flags], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: ") and "Read-only file system" in done.stderr
  note("read-only disk", processes=1, code=done.returncode)


def test_a_host_that_never_starts(tmp_path):
  """The one that waits for it ends in bounded time, with a code that asks for a restart."""
  address = {"COORDINATOR_ADDRESS": "localhost:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
  env = os.environ | address | {"SORA_JAX_JOIN_S": "3", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "tests.fault_worker", f"--workdir={tmp_path}"]
  done = subprocess.run(command, env=env, capture_output=True, cwd=ROOT, timeout=TIMEOUT_S)
  assert done.returncode == -signal.SIGABRT  # 134 to a shell
  note("a host never starts (SORA_JAX_JOIN_S)", processes=2, code=134, steps_redone=0)


def test_hosts_that_differ_are_named(tmp_path):
  """Process 1 of 2 runs at another commit."""
  script = tmp_path / "worker.py"
  script.write_text(
    "import os, runpy\n"
    "os.environ['SORA_JAX_COMMIT'] = 'abc' if os.environ['PROCESS_ID'] == '0' else 'def'\n"
    "runpy.run_module('tests.fault_worker', run_name='__main__')\n"
  )
  code, console = finish(local_run(tmp_path / "run", PLAIN, worker=str(script)))
  assert code == 2 and codes(console) == [2, 2]
  assert 'commit is "def" on host 1, "abc" on the others' in console
  assert 'commit is "def" on host 1' in log_of(tmp_path / "run", 1, ".stderr")
  note("hosts that differ", processes=2, code=code, codes=codes(console))


def test_losses_are_numbers(whole):
  """The yardstick of this file itself."""
  values = [min(v) for v in whole(2)[1].values()]
  assert np.isfinite(values).all() and len(set(values)) == STEPS
  assert json.loads((whole(2)[0] / "logs" / "goodput.json").read_text())["starts"] == 1
