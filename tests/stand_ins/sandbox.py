"""A repository of its own, a PATH of stand-ins, and their state: what a launch script is run in."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
  "gcloud": "gcloud", "python3.12": "python", "sbatch": "slurm", "srun": "slurm", "scontrol": "slurm",
  "kubectl": "kubernetes", "xpk": "kubernetes", "docker": "kubernetes",
  "gcsfuse": "buckets", "mountpoint": "buckets",
}  # fmt: skip
SYSTEM = (
  "awk", "basename", "bash", "cat", "date", "dirname", "env", "git", "head", "mkdir", "mktemp", "paste", "rm",
  "sed", "sort", "tr",
)  # fmt: skip
PATIENCE_S = 900
# Of tpu_run.sh.
PLACE = ("--name=pod", "--zone=us-east5-a", "--project=mine")
BASE = (*PLACE, "--topology=v5p:2x2x2", "--config=configs/quickstart.py:debug", "--workdir=gs://bucket/a run")
FAST = {
  "SORA_JAX_POLL_S": "0.1", "SORA_JAX_BACKOFF_S": "0", "SORA_JAX_GRACE_S": "1", "SORA_JAX_STOP_S": "30",
}  # fmt: skip


def make_repository(folder: Path, *folders: str) -> Path:
  """The launch scripts of this checkout, committed, whatever state this checkout is in."""
  for name in ("launch", "configs", *folders):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  (folder / ".gitignore").write_text("__pycache__/\n/runs/\n")
  (folder / "setup.cfg").write_text((ROOT / "setup.cfg").read_text())
  git(folder, "init", "-q")
  git(folder, "add", "-A")
  git(folder, "commit", "-q", "-m", "code")
  return folder


def git(folder: Path, *args: str) -> str:
  who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
  done = subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True, text=True)
  return done.stdout.strip()


@dataclasses.dataclass(frozen=True)
class Sandbox:
  repository: Path
  state: Path

  def set(self, **scenario) -> None:
    (self.state / "scenario.json").write_text(json.dumps(scenario))

  def env(self, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SORA_JAX_", "SLURM_"))}
    kept["COLUMNS"] = "40"  # as a terminal may say: what reads the output of ps must not be cut by it
    path = f"{self.state / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {
      "STAND_IN_STATE": self.state,
      "TMPDIR": self.state,
      "SORA_JAX_PYTHON": self.state / "bin" / "python3.12",
    }
    return kept | FAST | {"PATH": path} | {name: str(value) for name, value in own.items()} | more

  def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", str(self.repository / "launch" / script), *args]
    return subprocess.run(
      command, capture_output=True, text=True, env=self.env(**env), timeout=PATIENCE_S, cwd=self.state
    )

  def start(self, script: str, *args: str) -> subprocess.Popen:
    command = ["bash", str(self.repository / "launch" / script), *args]
    pipe = subprocess.PIPE
    # Where these tests run in the background of a script, SIGINT is ignored, and bash could not trap it.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
      command, stdout=pipe, stderr=pipe, text=True, env=self.env(), cwd=self.state, preexec_fn=heard
    )

  def wait_for(self, running: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Bounded only against a hang: a busy machine may take its time."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
      assert running.poll() is None, running.communicate()
      assert time.monotonic() < deadline, "what was waited for did not come"
      time.sleep(0.05)

  def wait_for_trainers(self, running: subprocess.Popen, count: int = 1) -> None:
    self.wait_for(running, lambda: len(self.calls("train")) >= count)

  def path_without(self, tool: str) -> str:
    """A PATH of the stand-ins but one, and of what the scripts use of the system."""
    (self.state / "bin" / tool).unlink()
    (self.state / "system").mkdir()
    for name in SYSTEM:
      (self.state / "system" / name).symlink_to(shutil.which(name))
    return f"{self.state / 'bin'}{os.pathsep}{self.state / 'system'}"

  def calls(self, tool: str) -> list[dict]:
    path = self.state / "calls.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [call for call in map(json.loads, lines) if call["tool"] == tool]

  def argv(self, *words: str) -> list[list[str]]:
    """The calls of gcloud that have these words."""
    return [call["argv"] for call in self.calls("gcloud") if set(words) <= set(call["argv"])]

  def end(self) -> None:
    """Ends what runs detached on the workers, each by its number."""
    for pid in self.state.glob("homes/*/sora_jax/*/attempt_*/pid"):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)


def make_sandbox(repository: Path, state: Path) -> Sandbox:
  (state / "bin").mkdir(parents=True)
  for tool, module in TOOLS.items():
    path = state / "bin" / tool
    # What a script asks Python itself (its version, that of jax), the real one answers.
    real = f'[ "$1" != -c ] || exec {sys.executable} "$@"\n' if module == "python" else ""
    lean = "" if module == "kubernetes" else "-S "  # it reads YAML
    call = f'exec {sys.executable} {lean}-P -m tests.stand_ins.{module} "$@"'
    path.write_text(f'#!/bin/sh\n{real}TOOL={tool} PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}" {call}\n')
    path.chmod(0o755)
  sandbox = Sandbox(repository, state)
  sandbox.set()
  return sandbox


def commands(done) -> list[list[str]]:
  """What a dry run printed, read as a shell would."""
  assert done.returncode == 0, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]
