"""python -m sora_jax.scaling_laws run: trains and measures the runs of a plan, one after another.

The same command again goes on where it was stopped: finished runs are skipped, a run that was killed resumes
from its checkpoint. Given several times at once, or with --workers, each takes the next free run. With
--launcher the commands of a cluster are printed, or run with --submit.
"""

import dataclasses
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from absl import flags

from sora_jax.ladder import cost, measure
from sora_jax.ladder.calibrate import TIMES
from sora_jax.ladder.plan import BASE, cpu_seconds, say
from sora_jax.parallel import exits
from sora_jax.scaling import ladder, table
from sora_jax.scaling.ladder import Plan, Run
from sora_jax.trained import CONFIG, TOKENIZER, WORDS

FLAGS = flags.FLAGS
RESULTS, LOG, COMPILED = "results.csv", "log.txt", "compiled"
IN_USE = -1000  # no exit code: another process holds the run
PLACES = ("name", "config", "workdir", "flags")
ROOT = Path(__file__).resolve().parents[2]


def define_flags() -> None:
  flags.DEFINE_string("plan", None, "run, compare: the plan.json of a ladder.")
  flags.DEFINE_string("runs_dir", None, "run, compare: where the runs go. Default: the plan's folder.")
  flags.DEFINE_string(
    "launcher", None, "run: a command with {name}, {config}, {workdir}, {flags}: one job a run."
  )
  flags.DEFINE_integer("workers", 1, "run: how many runs at once on this machine.", lower_bound=1)
  flags.DEFINE_bool("helper", False, "run: set by --workers: says nothing of runs that it leaves alone.")
  flags.DEFINE_bool("submit", False, "run --launcher: start the jobs, not only print them.")


@dataclasses.dataclass(frozen=True)
class Place:
  """A run and where it lies."""

  run: Run
  workdir: Path

  def measured(self) -> dict | None:
    """Its measurements, if those of all its steps."""
    found = measure.load(self.workdir)
    return found if found and found["steps"] == self.run.steps else None


def places(plan_file: str, runs_dir: str | None) -> tuple[Plan, list[Place]]:
  plan = ladder.read(plan_file)
  folder = Path(runs_dir or Path(plan_file).parent)
  return plan, [Place(run, folder / run.name) for run in plan.runs]


def main() -> int:
  if not FLAGS.plan:
    raise ValueError("--plan is missing: the plan.json that `plan` wrote")
  plan, todo = places(FLAGS.plan, FLAGS.runs_dir)
  path = Path(FLAGS.plan).parent / BASE
  base = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
  for place in todo:
    if base is not None:
      check_overrides(place.run, base)
    changed(place)
  if FLAGS.launcher:
    return launch(plan, todo)
  began, helpers = time.monotonic(), _helpers(FLAGS.workers - 1)
  failed = {}
  for number, place in enumerate(todo, 1):
    if place.measured():
      if not FLAGS.helper:
        say(f"[{number}/{len(todo)}] {place.run.name}: done before")
      continue
    told = f"{place.run.steps:,} steps, about {place.run.seconds:.0f} s"
    code = work(plan, place, f"[{number}/{len(todo)}] {place.run.name}: {told}")
    if code in (exits.PREEMPTED, -signal.SIGINT, -signal.SIGTERM):
      for helper in helpers:
        helper.send_signal(signal.SIGTERM)
      _waited(helpers)
      say(f"stopped in {place.run.name}; the same command goes on there")
      return exits.PREEMPTED
    if code == IN_USE:
      if not (FLAGS.helper or helpers):
        say(f"[{number}/{len(todo)}] {place.run.name}: another process is at it")
    elif code:
      failed[place.run.name] = f"exit code {code}{_reason(place.workdir / LOG)}"
      say(f"{place.run.name}: {failed[place.run.name]}; see {place.workdir / LOG}")
    gather(todo)
  codes, stopped = _waited(helpers)
  if stopped or exits.PREEMPTED in codes:
    return exits.PREEMPTED
  path, count = gather(todo)
  if FLAGS.helper:
    return 0
  say(f"{count} of {len(todo)} runs in {(time.monotonic() - began) / 60:.1f} min, {cpu_seconds():.0f} CPU s")
  print(path)
  if failed:
    raise ValueError("; ".join(f"{name}: {why}" for name, why in failed.items()))
  if count < len(todo):
    say("some runs are another process's, or failed there; the same command again shows what is left")
  return 0


def work(plan: Plan, place: Place, told: str) -> int:
  """Trains and measures one run in processes of their own; what they say goes to its log."""
  place.workdir.mkdir(parents=True, exist_ok=True)
  commands = {
    "train": ["sora_jax.train", *plan.flags(place.run)],
    "measure": [
      "sora_jax.scaling_laws",
      "measure",
      f"--num_samples={FLAGS.num_samples}",
      f"--seed={FLAGS.seed}",
    ],
  }
  cache = place.workdir.resolve().parent / COMPILED
  with (place.workdir / LOG).open("a", encoding="utf-8") as log:
    # Commands inherit the lock: it lives on where this process was killed and left one behind.
    try:
      fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return IN_USE
    if place.measured():  # meanwhile
      return 0
    say(told)
    _same_vocabulary(place)
    for what, command in commands.items():
      began, cpu = time.monotonic(), cpu_seconds()
      code = _call([sys.executable, "-m", *command, f"--workdir={place.workdir}"], log, cache)
      spent = {
        "what": what,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(cpu_seconds() - cpu, 1),
      }
      with (place.workdir / TIMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(spent | {"code": code}) + "\n")
      if code:
        return code
  return 0


def _call(command: list[str], log: TextIO, cache: Path) -> int:
  """Exit code; a signal that stops us stops the command first, which saves before it ends."""
  # Runs of one size share most of their programs.
  env = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
  process = subprocess.Popen(
    command, cwd=ROOT, env=env | os.environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
  )
  (code,), stopped = _waited([process])
  return exits.PREEMPTED if stopped else code


def _waited(processes: list[subprocess.Popen]) -> tuple[list[int], bool]:
  """Their exit codes, and whether a signal came meanwhile, which they get as SIGTERM."""
  stopped: list[int] = []

  def forward(number, frame):
    del frame
    stopped.append(number)
    for process in processes:
      process.send_signal(signal.SIGTERM)

  old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    codes = [process.wait() for process in processes]
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
  return codes, bool(stopped)


def _helpers(num: int) -> list[subprocess.Popen]:
  """Processes that give the same command: each takes the next run that nobody is at."""
  command = [sys.executable, "-m", "sora_jax.scaling_laws", "run", *sys.argv[1:], "--workers=1", "--helper"]
  quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
  return [subprocess.Popen(command, **quiet) for _ in range(num)]


def _reason(log: Path) -> str:
  """The last error that a command told of."""
  lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
  return f" ({lines[-1].removeprefix('error: ')})" if lines else ""


def check_overrides(run: Run, base: dict) -> None:
  """Before anything is trained, for each run would fail by itself, minutes apart."""
  try:
    cost.resolved(base, run.overrides)
  except (ValueError, TypeError) as error:
    raise ValueError(f"the plan, run {run.name}: {error}") from None


def changed(place: Place) -> None:
  """A run that was started under other settings than the plan has now would be taken for what it is not."""
  path = place.workdir / CONFIG
  if not path.is_file():
    return
  used = json.loads(path.read_text(encoding="utf-8"))
  for key, value in place.run.overrides.items():
    found = used
    for part in key.split("."):
      found = found.get(part) if isinstance(found, dict) else None
    if found != value:
      raise ValueError(
        f"{place.workdir} was trained with {key} = {found}, the plan says {value}: rename the run in the "
        "plan, or remove that folder"
      )


def _same_vocabulary(place: Place) -> None:
  """All runs of a ladder share the vocabulary that the plan counted with."""
  for name in (WORDS, TOKENIZER):
    known, own = Path(FLAGS.plan).parent / name, place.workdir / name
    if known.is_file() and not own.is_file():
      own.write_bytes(known.read_bytes())


def launch(plan: Plan, todo: list[Place]) -> int:
  """Prints or starts the job of every run that is not finished."""
  known = [place for place in todo if not place.measured()]
  for place in known:
    config, *rest = plan.flags(place.run)
    values = {
      "name": place.run.name.lower().replace("_", "-").replace(".", "-"),
      "config": config.split("=", 1)[1],
      # As given: a Path would make gs:/ of gs://.
      "workdir": f"{FLAGS.runs_dir.rstrip('/')}/{place.run.name}" if FLAGS.runs_dir else str(place.workdir),
      "flags": shlex.join(rest),
    }
    try:
      line = FLAGS.launcher.format(**values)
    except (KeyError, IndexError, ValueError) as error:
      raise ValueError(
        f"--launcher: {error} is not one of {', '.join('{' + p + '}' for p in PLACES)}"
      ) from None
    print(line, flush=True)
    if FLAGS.submit and (code := os.waitstatus_to_exitcode(os.system(line))):
      raise ValueError(f"{place.run.name}: the launcher ended with exit code {code}")
  say(f"{len(known)} jobs {'started' if FLAGS.submit else 'printed; --submit starts them'}")
  say("once they have ended, the same command without --launcher measures them and gathers the results")
  return 0


def gather(todo: list[Place]) -> tuple[Path, int]:
  """results.csv beside the runs: a row for each run that is measured."""
  rows = [row(place.run, found) for place in todo if (found := place.measured())]
  path = todo[0].workdir.parent / RESULTS
  names = list(dict.fromkeys(key for one in rows for key in one))
  # Others may be at it too.
  part = path.with_name(f"{RESULTS}.{os.getpid()}")
  table.write(part, {name: [one.get(name, "") for one in rows] for name in names})
  part.replace(path)
  return path, len(rows)


def row(run: Run, found: dict) -> dict:
  flat = {"name": run.name}
  for key, value in found.items():
    if isinstance(value, dict):
      prefix = {"loss_by_resolution": "loss_", "loss_by_frames": "loss_frames_"}.get(key, f"{key}_")
      flat |= {f"{prefix}{part}": number for part, number in value.items()}
    else:
      flat[key] = value
  return flat
