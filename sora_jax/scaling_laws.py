"""python -m sora_jax.scaling_laws fit|plot --csv=FILE --law=LAW: scaling laws of runs in a table.

fit prints the law's letters with their bootstrap intervals and writes them to --json; plot writes figures
(PNG, PDF, SVG) to --output, the data beside each as CSV.
"""

import json
import sys
from pathlib import Path

from absl import flags

from sora_jax import cli
from sora_jax.scaling import bootstrap, figures, report, table
from sora_jax.scaling.table import Table

FLAGS = flags.FLAGS
COMMANDS = ("fit", "plot")
PLANNED = ("plan", "run", "compare", "probe")


def define_flags() -> None:
  flags.DEFINE_string("csv", None, "Table of runs: columns params, tokens, compute, loss as the law needs.")
  flags.DEFINE_string("law", None, f"One of {', '.join(report.NAMES)}.")
  flags.DEFINE_string("json", None, "fit: where to write the result.")
  flags.DEFINE_string("output", None, "plot: folder for the figures.")
  flags.DEFINE_bool("frontier", False, "Take only runs that none of as little compute beats.")
  flags.DEFINE_integer("bootstrap", 500, "Replicas behind the intervals; 0: none.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Of the bootstrap.")
  flags.DEFINE_float("extrapolate", 10.0, "plot: draw up to this multiple of compute.", lower_bound=1.0)


def main(command: str) -> int:
  if command not in COMMANDS:
    raise ValueError(_unknown(command))
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
    path.write_text(json.dumps(result, indent=2) + "\n")
  print(describe(result))
  return 0


def load(path: str, law: str, *, frontier: bool = False) -> Table:
  runs = table.read(path)
  table.require(runs, report.COLUMNS[law], law=law, path=path)
  if not frontier:
    return runs
  if law not in ("power", "saturating"):
    raise ValueError(f"--frontier is for power and saturating; {law} needs the other runs as well")
  return table.frontier(runs)


def describe(result: dict) -> str:
  lines = [f"{result['law']}: {result['form']}  ({result['num_runs']} runs)"]
  letters = [key for key in result if key in result["intervals"]] or list(result)[2:8]
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


def _unknown(command: str) -> str:
  what = f"{command!r} is not there yet" if command in PLANNED else f"no such command {command!r}"
  return f"{what if command else 'a command is missing'}; there are: {', '.join(COMMANDS)}"


if __name__ == "__main__":
  # The command comes first; every other argument is a flag.
  NAMED = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
  COMMAND = sys.argv.pop(1) if NAMED else ""
  define_flags()
  cli.run(lambda argv: main(COMMAND))
