"""A ladder of runs: which sizes at which budgets, and the file that says so.

The file is JSON with a run on each line: delete lines, or change their overrides, as you like.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.models.dit import SIZES

KINDS = ("isoflop", "frontier", "sweep")
MIN_STEPS = 5
WARMUP_SHARE, MOST_WARMUP = 0.1, 1000
SAVES = 4  # checkpoints on the way, at least
_SIZE = re.compile(r"(\d+)x(\d+)x(\d+)")
_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class Size:
  width: int
  depth: int
  heads: int

  @property
  def name(self) -> str:
    return f"w{self.width}d{self.depth}h{self.heads}"

  @property
  def overrides(self) -> dict[str, int]:
    return {"model.width": self.width, "model.depth": self.depth, "model.heads": self.heads}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """`compute` is what `steps` steps cost, `budget` what was asked for; `overrides` is what trains."""

  name: str
  budget: float
  compute: float  # model FLOPs
  params: int
  tokens: int
  steps: int
  seconds: float  # expected
  overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  kind: str
  config: str  # as of --config
  config_flags: tuple[str, ...]  # --config.KEY=VALUE of the command line
  hardware: str
  runs: tuple[Run, ...]

  @property
  def compute(self) -> float:
    return sum(run.compute for run in self.runs)

  @property
  def seconds(self) -> float:
    return sum(run.seconds for run in self.runs)

  def flags(self, run: Run) -> list[str]:
    """Flags of sora_jax.train, but for the workdir."""
    changed = [f"--config.{key}={value}" for key, value in run.overrides.items()]
    return [f"--config={self.config}", *self.config_flags, *changed]


def parse_sizes(text: str) -> list[Size]:
  """ "64x4x2,S" -> width x depth x heads each, or a name of models/dit.SIZES."""
  sizes = []
  for part in text.split(","):
    if part in SIZES:
      sizes.append(Size(*SIZES[part]))
    elif match := _SIZE.fullmatch(part.strip()):
      sizes.append(Size(*map(int, match.groups())))
    else:
      raise ValueError(
        f"--sizes: {part!r} is neither WIDTHxDEPTHxHEADS, as 64x4x2, nor one of {', '.join(SIZES)}"
      )
  twice = [size.name for size in sizes if sizes.count(size) > 1]
  if twice:
    raise ValueError(f"--sizes: {twice[0]} appears twice")
  return sizes


def parse_numbers(text: str, flag: str, *, least: float = 0.0) -> list[float]:
  try:
    values = [float(part) for part in text.split(",")]
  except ValueError:
    raise ValueError(f"--{flag}={text}: numbers with commas between them are expected") from None
  if not all(math.isfinite(v) and v > least for v in values):
    raise ValueError(f"--{flag}={text}: every value must be above {least:g}")
  return values


def parse_seeds(text: str) -> list[int]:
  seeds = parse_numbers(text, "seeds", least=-1)
  if any(seed != int(seed) or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
    raise ValueError(f"--seeds={text}: different whole numbers from 0 are expected")
  return [int(seed) for seed in seeds]


def spread_budgets(low: float, high: float, num: int) -> list[float]:
  return [float(f"{value:.4g}") for value in np.geomspace(low, high, num)]


def steps_for(budget: float, flops_per_step: np.ndarray) -> tuple[int, float]:
  """(steps, their FLOPs) nearest to the budget; past the steps given, their mean goes on."""
  total = np.cumsum(flops_per_step)
  if budget > total[-1]:
    mean = total[-1] / len(total)
    more = max(0, round((budget - total[-1]) / mean))
    return len(total) + more, float(total[-1] + more * mean)
  steps = int(np.searchsorted(total, budget)) + 1
  if steps > 1 and budget - total[steps - 2] < total[steps - 1] - budget:
    steps -= 1
  return steps, float(total[steps - 1])


def schedule(steps: int, warmup_steps: int, save_every: int) -> dict[str, int]:
  """Overrides that follow from the length of a run: a short one warms up and saves in its own measure."""
  warmup = min(warmup_steps or MOST_WARMUP, max(1, round(WARMUP_SHARE * steps)))
  return {
    "train.num_steps": steps,
    "optimizer.warmup_steps": warmup if warmup_steps else 0,
    "train.save_every": min(save_every or steps, max(1, steps // SAVES)),
  }


def write(path: str | Path, plan: Plan) -> None:
  head = dataclasses.asdict(plan) | {"total_compute": plan.compute, "total_seconds": round(plan.seconds, 1)}
  runs = head.pop("runs")
  lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
  rows = ",\n".join(f"    {json.dumps(run)}" for run in runs)
  Path(path).write_text("{\n" + "".join(lines) + '  "runs": [\n' + rows + "\n  ]\n}\n", encoding="utf-8")


def read(path: str | Path) -> Plan:
  try:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    keys = [field.name for field in dataclasses.fields(Plan) if field.name != "runs"]
    runs = tuple(_run(path, run) for run in values["runs"])
    plan = Plan(runs=runs, **{key: values[key] for key in keys})
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not JSON ({error})") from None
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not a plan of sora_jax.scaling_laws plan: {error}") from None
  if not runs:
    raise ValueError(f"{path}: no run is left")
  names = [run.name for run in runs]
  if twice := [name for name in names if names.count(name) > 1]:
    raise ValueError(f"{path}: two runs are named {twice[0]}; each needs a name of its own")
  return dataclasses.replace(plan, config_flags=tuple(plan.config_flags))


def _run(path: str | Path, values: dict) -> Run:
  """People edit plans: what would be run under another name or length than it says is refused."""
  name = values.get("name", "")
  if not _NAME.fullmatch(str(name)):
    raise ValueError(
      f"{path}: a run is named {name!r}: letters, digits and ._- are allowed, as in a folder's name"
    )
  known = [field.name for field in dataclasses.fields(Run)]
  if unknown := sorted(set(values) - set(known)):
    raise ValueError(f"{path}, run {name}: no key {', '.join(unknown)}; there are {', '.join(known)}")
  if missing := [key for key in known if key not in values]:
    raise ValueError(f"{path}, run {name}: {', '.join(missing)} is missing")
  run = Run(**values)
  if (steps := run.overrides.get("train.num_steps", run.steps)) != run.steps:
    raise ValueError(
      f"{path}, run {name}: steps is {run.steps}, its override train.num_steps is {steps}; make them the same"
    )
  return run


def describe(plan: Plan) -> str:
  """A table, cheapest first."""
  width = max(len(run.name) for run in plan.runs)
  head = f"{'run':<{width}}  {'params':>10}  {'tokens':>10}  {'steps':>7}  {'compute':>9}  {'time':>8}"
  lines = [f"{plan.kind}: {len(plan.runs)} runs of {plan.config} on {plan.hardware}", head]
  for run in plan.runs:
    lines.append(
      f"{run.name:<{width}}  {run.params:>10,}  {run.tokens:>10,}  {run.steps:>7,}  {run.compute:>9.3g}  "
      f"{_time(run.seconds):>8}"
    )
  return "\n".join([*lines, f"in all {plan.compute:.3g} FLOPs, {_time(plan.seconds)}"])


def _time(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
