"""python -m sora_jax.scaling_laws COMMAND: scaling laws, from one command to the curve.

plan --config=FILE.py --sizes=... --budgets=... --output=DIR    a ladder of runs and what it costs
run --plan=DIR/plan.json                                        trains and measures it; again: resumes
fit --csv=DIR/results.csv --law=LAW [--json=FILE]               the law's letters with their intervals
plot --csv=DIR/results.csv --law=LAW --output=DIR               figures, the data beside each as CSV
compare --plan=DIR/plan.json --output=DIR                       samples at 1x, 4x, 32x compute
probe --workdir=RUN                                             what a frozen model's features know
measure --workdir=RUN                                           loss and accuracy of one finished run
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from sora_jax import cli
from sora_jax.ladder import compare, measure, probe
from sora_jax.ladder import plan as plan_command
from sora_jax.ladder import run as run_command
from sora_jax.scaling import bootstrap, figures, hyper, report, table
from sora_jax.scaling.table import Table

FLAGS = flags.FLAGS
COMMANDS = {
  "plan": plan_command.main,
  "run": run_command.main,
  "measure": measure.main,
  "fit": lambda: fit_or_plot("fit"),
  "plot": lambda: fit_or_plot("plot"),
  "compare": compare.main,
  "probe": probe.main,
}


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "plan: FILE.py or FILE.py:PRESET that all runs share.")
  for command in (plan_command, run_command, measure, compare, probe):
    command.define_flags()
    flags.adopt_module_key_flags(command)  # so that --help shows them
  flags.DEFINE_string("csv", None, "Table of runs: columns params, tokens, compute, loss as the law needs.")
  flags.DEFINE_string("law", None, f"One of {', '.join(report.NAMES)}.")
  flags.DEFINE_string("json", None, "fit: where to write the result.")
  flags.DEFINE_string("output", None, "plan, plot, compare, probe: folder for what is written.")
  flags.DEFINE_bool("frontier", False, "Take only the run of lowest loss of each compute budget.")
  flags.DEFINE_integer("min_steps", 0, "plan, fit, plot: no run of fewer steps.", lower_bound=0)
  flags.DEFINE_integer("bootstrap", 500, "Replicas behind the intervals; 0: none.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Of the bootstrap, of scenes and of sampling noise.")
  flags.DEFINE_float("extrapolate", 10.0, "plot: draw up to this multiple of compute.", lower_bound=1.0)


def main(command: str) -> int:
  if command not in COMMANDS:
    what = f"no such command {command!r}" if command else "a command is missing"
    raise ValueError(f"{what}; there are: {', '.join(COMMANDS)}")
  return COMMANDS[command]()


def fit_or_plot(command: str) -> int:
  missing = [name for name in ("csv", "law") if not getattr(FLAGS, name)]
  if command == "plot" and not FLAGS.output:
    missing.append("output")
  if missing:
    raise ValueError(f"--{missing[0]} is missing (python -m sora_jax.scaling_laws {command} --help)")
  if FLAGS.law not in report.NAMES:
    raise ValueError(f"--law={FLAGS.law}: not one of {', '.join(report.NAMES)}")
  if FLAGS.bootstrap and FLAGS.bootstrap < 20:
    raise ValueError(f"--bootstrap={FLAGS.bootstrap}: an interval needs 20 replicas or more, or 0 for none")
  runs = load(FLAGS.csv, FLAGS.law, frontier=FLAGS.frontier)
  # Replicas of runs that determine little go to infinity, and their intervals with them.
  with np.errstate(all="ignore"):
    return _fit_or_plot(command, runs)


def _fit_or_plot(command: str, runs: Table) -> int:
  try:
    fitted = report.fit(FLAGS.law, runs, num=FLAGS.bootstrap, seed=FLAGS.seed)
  except ValueError as error:
    raise ValueError(f"{FLAGS.csv}: {error}") from error
  if command == "plot":
    for path in figures.write(FLAGS.law, runs, fitted, FLAGS.output, extrapolate=FLAGS.extrapolate):
      print(path)
    return 0
  result = report.summary(FLAGS.law, runs, fitted, num=FLAGS.bootstrap, seed=FLAGS.seed)
  if FLAGS.json:
    path = Path(FLAGS.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
  print(describe(result))
  return 0


def _finite(value):
  """JSON has no infinity: null."""
  if isinstance(value, dict):
    return {key: _finite(part) for key, part in value.items()}
  if isinstance(value, list):
    return [_finite(part) for part in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def load(path: str, law: str, *, frontier: bool = False) -> Table:
  settings = ((law,) if law in hyper.LAWS else ()) + (("steps",) if FLAGS.min_steps else ())
  runs = table.read(path, settings=settings)
  table.require(runs, report.COLUMNS[law], law=law, path=path)
  if FLAGS.min_steps:
    runs = table.of_length(runs, FLAGS.min_steps, path=path)
  if not frontier:
    return runs
  if law not in ("power", "saturating"):
    raise ValueError(f"--frontier is for power and saturating; {law} needs the other runs as well")
  return table.frontier(runs)


def describe(result: dict) -> str:
  lines = [f"{result['law']}: {result['form']}  ({result['num_runs']} runs)"]
  keys = list(result)
  letters = keys[keys.index("form") + 1 : keys.index("intervals")]
  for letter in letters:
    value, ends = result[letter], result["intervals"].get(letter)
    if isinstance(value, float):
      between = f"  {bootstrap.LEVEL:.0%} [{ends[0]:.6g}, {ends[1]:.6g}]" if ends else ""
      lines.append(f"  {letter:6} {value:.6g}{between}")
  missed = result["held_out"]
  if "refused" in missed:
    lines.append(f"  largest run held out: not possible ({missed['refused']})")
  else:
    lines.append(f"  largest run held out: predicted within {missed['relative_error']:.2%}")
  for law, error in result.get("comparison", {}).items():
    shown = f"{error:.2%}" if isinstance(error, float) else error
    lines.append(f"  held-out error of {law}: {shown}")
  return "\n".join([*lines, *(f"  note: {note}" for note in result["notes"])])


if __name__ == "__main__":
  # The command comes first; every other argument is a flag.
  NAMED = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
  COMMAND = sys.argv.pop(1) if NAMED else ""
  define_flags()
  cli.run(lambda argv: main(COMMAND))
