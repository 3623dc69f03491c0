"""The training main: a user's mistake is one clear line and exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
DEBUG = "--config=configs/quickstart.py:debug"


def environment() -> dict[str, str]:
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def start(*arguments):
  command = [sys.executable, "-m", "sora_jax.train", *arguments]
  return subprocess.Popen(
    command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


MISTAKES = {
  "no_workdir": ([DEBUG], "both --config=FILE.py and --workdir=DIR are needed"),
  "unknown_key": ([DEBUG, "--workdir=W", "--config.model.foo=1"], "the config has no key config.model.foo"),
  "wrong_type": ([DEBUG, "--workdir=W", "--config.train.num_steps=abc"], "--config.train.num_steps=abc"),
  "no_config": (["--config=configs/nope.py", "--workdir=W"], "--config=configs/nope.py: no such file"),
  "no_preset": (["--config=configs/quickstart.py:nope", "--workdir=W"], "has no preset 'nope'; presets:"),
  "workdir_is_a_file": ([DEBUG, "--workdir=FILE/run"], "FILE"),
  "devices": ([DEBUG, "--workdir=W", "--config.mesh.fsdp=3"], "needs 3 devices, but there are 1"),
  "no_data": ([DEBUG, "--workdir=W", "--config.data.source=nowhere/at/all"], "data.source='nowhere/at/all'"),
}


def test_mistakes_are_one_line(tmp_path):
  (tmp_path / "FILE").write_text("")
  place = lambda arg: arg.replace("=W", f"={tmp_path}/W").replace("=FILE", f"={tmp_path}/FILE")  # noqa: E731
  lines = [("sora_jax.train", *map(place, arguments)) for arguments, _ in MISTAKES.values()]
  for (name, (_, says)), done in zip(MISTAKES.items(), forked.run(lines, environment())):
    out = done.stdout + done.stderr
    last = out.strip().splitlines()[-1]
    assert done.returncode == 2, (name, out)
    assert last.startswith("error: ") and says in last, (name, out)
    assert "Traceback" not in out, (name, out)


@pytest.mark.slow
def test_trains_stops_and_resumes(tmp_path):
  """SIGTERM: exit code 42; the same command goes on; another model is refused; a finished run says so."""
  workdir = f"--workdir={tmp_path}"
  process = start(DEBUG, workdir, "--config.train.num_steps=100000")
  metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 300
  while not (metrics.exists() and metrics.read_text().count("\n") > 2):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  out = process.communicate(timeout=120)[0]
  assert process.returncode == 42, out
  (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
  steps = f"--config.train.num_steps={step + 2}"
  process = start(DEBUG, workdir, steps)
  out = process.communicate(timeout=300)[0]
  assert process.returncode == 0 and f"resumed at step {step}" in out, out
  *_, last, goodput = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert last["step"] == step + 2 and "eval/loss" in last
  assert goodput["goodput/starts"] == 2 and goodput["goodput/redone_steps"] == 0
  assert list((tmp_path / "samples").glob("*.png"))
  process = start(DEBUG, workdir, steps, "--config.model.width=64")
  assert "model.width was 32, now 64" in process.communicate(timeout=120)[0] and process.returncode == 2
  process = start(DEBUG, workdir, steps)
  assert "is finished at step" in process.communicate(timeout=120)[0] and process.returncode == 0
