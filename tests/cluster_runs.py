"""Runs of several real processes on this machine through launch/local_run.sh, and faults done to them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 900  # generous: what is asserted is what happens, not how fast a busy machine is
HEARTBEAT_S = 10


def local_run(
  workdir, settings=None, *, processes=2, devices=2, worker="-m tests.fault_worker", flags=(), **env
):
  """Popen of the launch script; its output is the console of process 0."""
  kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
  env = os.environ | {
    "SORA_JAX_PYTHON": sys.executable,
    "SORA_JAX_WORKER": worker,
    "SORA_JAX_HEARTBEAT_S": str(HEARTBEAT_S),
    "XLA_FLAGS": " ".join(kept),
    "GRACE_S": "60",
    **{name: str(value) for name, value in env.items()},
  }
  if settings is not None:
    flags = (*flags, f"--settings={json.dumps(settings)}")
  command = [
    "bash", "launch/local_run.sh", f"--num_processes={processes}", f"--devices_per_process={devices}", "--",
    f"--workdir={workdir}", *flags,
  ]  # fmt: skip
  return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process) -> tuple[int, str]:
  """(exit code, console)."""
  try:
    console = process.communicate(timeout=TIMEOUT_S)[1]
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)
    time.sleep(5)
    process.kill()
    raise
  return process.returncode, console


def codes(console: str) -> list[int]:
  """The exit code of each process, as the script prints them."""
  (line,) = [line for line in console.splitlines() if line.startswith("exit codes of processes")]
  return [int(code) for code in re.findall(r"-?\d+", line.split(":", 1)[1])]


def losses(workdir) -> dict[int, set[float]]:
  """step -> every loss that was ever logged for it."""
  found, path = {}, Path(workdir) / "metrics.jsonl"
  for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
    if line.endswith("\n") and "loss" in (values := json.loads(line)):
      found.setdefault(values["step"], set()).add(values["loss"])
  return found


def reached(workdir) -> int:
  return max(losses(workdir), default=0)


def events(workdir, process: int, name: str) -> list[dict]:
  path = Path(workdir) / "logs" / f"host_{process:05d}.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  found = [json.loads(line) for line in lines if line.endswith("\n")]
  return [event for event in found if event["event"] == name]


def log_of(workdir, process: int, suffix=".log") -> str:
  return (Path(workdir) / "logs" / f"host_{process:05d}{suffix}").read_text()


def pid_of(workdir, process: int) -> int:
  """Of the latest start."""
  return events(workdir, process, "start")[-1]["pid"]


def wait_for(process, condition, what: str) -> None:
  deadline = time.monotonic() + TIMEOUT_S
  while not condition():
    assert process.poll() is None, f"the run ended before {what}: {process.communicate()[1][-3000:]}"
    assert time.monotonic() < deadline, f"never {what}"
    time.sleep(0.005)


def wait_for_step(process, workdir, step: int) -> None:
  wait_for(process, lambda: reached(workdir) >= step, f"step {step}")


def checkpoints(workdir) -> list[int]:
  folder = Path(workdir) / "checkpoints"
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def metrics_of(workdir, key: str) -> list:
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [values[key] for values in map(json.loads, lines) if key in values]


def note(fault: str, **facts) -> None:
  """A row of the table in docs/faults.md, where SORA_JAX_FAULT_TABLE names a file."""
  if path := os.environ.get("SORA_JAX_FAULT_TABLE"):
    with open(path, "a") as file:
      file.write(json.dumps({"fault": fault, **facts}) + "\n")
