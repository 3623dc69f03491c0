"""python -m sora_jax.scaling_laws plan: a ladder of runs, each with what it will cost."""

import dataclasses
import itertools
import json
import resource
import sys
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from sora_jax import train
from sora_jax.ladder import calibrate, cost
from sora_jax.ladder.cost import Costs
from sora_jax.parallel import multihost
from sora_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from sora_jax.scaling import ladder
from sora_jax.scaling.ladder import Plan, Run, Size
from sora_jax.tasks import registry
from sora_jax.training import state as state_lib
from sora_jax.training import step as step_lib
from sora_jax.training.optimizer import OptimizerConfig

FLAGS = flags.FLAGS
PLAN, BASE = "plan.json", "base_config.json"
TIMED_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Speed:
  """FLOP/s by parameters, and what a run takes besides its steps."""

  hardware: str
  params: tuple[float, ...]
  flops_per_s: tuple[float, ...]
  overhead_s: float

  def seconds(self, params: int, flops: float) -> float:
    rate = np.exp(np.interp(np.log(params), np.log(self.params), np.log(self.flops_per_s)))
    return float(flops / rate + self.overhead_s)


class Costing:
  """Costs of configs on the data at hand; batches are planned once for each layout of rows."""

  def __init__(self, base: ml_collections.ConfigDict, folder: Path):
    self.base, self.folder = base.to_dict(), folder
    self.source, self.tokenizer = None, None
    self.pipelines: dict[str, tuple[Pipeline, list]] = {}
    self.costs: dict[str, Costs] = {}

  def config(self, overrides: dict) -> ml_collections.ConfigDict:
    return cost.resolved(self.base, overrides)

  def pipeline(self, overrides: dict) -> tuple[Pipeline, list]:
    data = registry.section(DataConfig, self.config(overrides), "data")
    if self.source is None:
      self.source = build_source(data)
      text = ml_collections.ConfigDict(self.base).text
      self.tokenizer = train.text_reader(self.folder, self.source, data, text)
    key = repr(data)
    if key not in self.pipelines:
      self.pipelines[key] = (Pipeline(self.source, data, batch_spec(data), self.tokenizer), [])
    return self.pipelines[key]

  def of(self, overrides: dict, budget: float) -> Costs:
    """Known for at least as many steps as the budget buys, up to cost.MOST_STEPS."""
    pipeline, batches = self.pipeline(overrides)
    config = self.config(overrides)
    if not batches:
      batches += cost.planned(pipeline, range(16))
    first = cost.of(config, pipeline, batches[:16])
    num = min(cost.MOST_STEPS, int(1.05 * budget / first.flops.mean()) + 16)
    if num > len(batches):
      batches += cost.planned(pipeline, range(len(batches), num))
    key = json.dumps(overrides, sort_keys=True)
    if key not in self.costs or len(self.costs[key].flops) < num:
      self.costs[key] = cost.of(config, pipeline, batches[:num])
    return self.costs[key]


def define_flags() -> None:
  flags.DEFINE_enum("kind", "isoflop", ladder.KINDS, "plan: every size at every budget, one size at every "
                    "budget, or batches and rates at every size and budget.")  # fmt: skip
  flags.DEFINE_string("sizes", None, "plan: WIDTHxDEPTHxHEADS or a name, with commas. Default: the config's.")
  flags.DEFINE_string("budgets", None, "plan: model FLOPs of the runs, with commas.")
  flags.DEFINE_string("compute_range", None, "plan: LOWEST,HIGHEST instead of --budgets.")
  flags.DEFINE_integer("num_budgets", 4, "plan: spread over --compute_range.", lower_bound=1)
  flags.DEFINE_string("seeds", None, "plan, probe: with commas. Default: the config's; probe: 0,1,2.")
  flags.DEFINE_string("batches", None, "plan --kind=sweep: values of data.rows.")
  flags.DEFINE_string("lrs", None, "plan --kind=sweep: values of optimizer.lr.")
  flags.DEFINE_float("flops_per_s", None, "plan: model FLOP/s of the hardware. Default: measured here.")
  flags.DEFINE_float("overhead_s", None, "plan: seconds of a run besides its steps. Default: measured here.")
  flags.DEFINE_string("calibrate", None, "plan: folder of finished runs; expects the speed that they had.")
  flags.DEFINE_string("hardware", None, "plan: what --flops_per_s or --calibrate was measured on.")


def main() -> int:
  if FLAGS.config is None or not FLAGS.output:
    raise ValueError("both --config=FILE.py and --output=DIR are needed")
  folder = Path(FLAGS.output)
  plan_file = folder / PLAN
  if plan_file.exists():
    raise ValueError(f"{plan_file} exists; remove it, or give another --output")
  config = FLAGS.config
  if unknown := sorted(set(config) - train.SECTIONS):
    raise ValueError(
      f"config has no section {', '.join(unknown)}; it has {', '.join(sorted(train.SECTIONS))}"
    )
  folder.mkdir(parents=True, exist_ok=True)
  costing = Costing(config, folder)
  cells = _cells(config)
  found, fewest = {}, max(ladder.MIN_STEPS, FLAGS.min_steps)
  for name, budget, overrides in cells:
    costs = costing.of(overrides, budget)
    steps, flops = ladder.steps_for(budget, costs.flops)
    if steps < fewest:
      say(f"left out: {name} would have {steps} steps; {fewest} are the least")
      continue
    found[name] = (budget, overrides, costs, steps, flops)
  if not found:
    raise ValueError("no run is left: raise the budgets, or lower data.rows or the sizes")
  speed = _speed(costing, found)
  runs = []
  for name, (budget, overrides, costs, steps, flops) in found.items():
    follow = ladder.schedule(steps, config.optimizer.warmup_steps, config.train.save_every)
    runs.append(
      Run(
        name=name,
        budget=budget,
        compute=flops,
        params=costs.params,
        tokens=cost.total_tokens(costs, steps),
        steps=steps,
        seconds=round(speed.seconds(costs.params, flops), 1),
        overrides=overrides | follow,
      )
    )
  runs.sort(key=lambda run: (run.budget, run.params))
  plan = Plan(
    kind=FLAGS.kind,
    config=config_file(),
    config_flags=tuple(arg for arg in sys.argv if arg.startswith("--config.")),
    hardware=speed.hardware,
    runs=tuple(runs),
  )
  (folder / BASE).write_text(json.dumps(costing.base, indent=2) + "\n", encoding="utf-8")
  ladder.write(plan_file, plan)
  print(ladder.describe(plan))
  print(plan_file)
  return 0


def config_file() -> str:
  """FILE.py or FILE.py:PRESET as given."""
  for place, arg in enumerate(sys.argv):
    if arg.startswith("--config="):
      return arg.split("=", 1)[1]
    if arg == "--config":
      return sys.argv[place + 1]
  raise ValueError("--config=FILE.py is missing")


def _cells(config: ml_collections.ConfigDict) -> list[tuple[str, float, dict]]:
  """(name, budget, overrides) of every run."""
  model = config.model
  sizes = ladder.parse_sizes(FLAGS.sizes) if FLAGS.sizes else [Size(model.width, model.depth, model.heads)]
  if not all((sizes[0].width, sizes[0].depth, sizes[0].heads)):
    sizes = ladder.parse_sizes(model.size)
  if FLAGS.kind == "frontier" and len(sizes) > 1:
    raise ValueError(f"--kind=frontier trains one model for longer and longer; --sizes names {len(sizes)}")
  if FLAGS.kind != "sweep" and (FLAGS.batches or FLAGS.lrs):
    raise ValueError("--batches and --lrs are for --kind=sweep")
  seeds = ladder.parse_seeds(FLAGS.seeds) if FLAGS.seeds else [None]
  batches, lrs = [None], [None]
  if FLAGS.kind == "sweep":
    if not (FLAGS.batches or FLAGS.lrs):
      raise ValueError("--kind=sweep needs --batches or --lrs, or both")
    batches = [int(b) for b in ladder.parse_numbers(FLAGS.batches, "batches")] if FLAGS.batches else [None]
    lrs = ladder.parse_numbers(FLAGS.lrs, "lrs") if FLAGS.lrs else [None]
  cells = []
  for budget, size, batch, lr, seed in itertools.product(_budgets(), sizes, batches, lrs, seeds):
    parts, overrides = [f"c{budget:.3g}".replace("+", ""), size.name], dict(size.overrides)
    for value, letter, key in ((batch, "b", "data.rows"), (lr, "lr", "optimizer.lr"), (seed, "s", "seed")):
      if value is not None:
        parts.append(f"{letter}{value:g}")
        overrides[key] = value
    cells.append(("_".join(parts), budget, overrides))
  return cells


def _budgets() -> list[float]:
  if bool(FLAGS.budgets) == bool(FLAGS.compute_range):
    raise ValueError("give --budgets=C1,C2,... or --compute_range=LOWEST,HIGHEST (model FLOPs of a run)")
  if FLAGS.budgets:
    return sorted(set(ladder.parse_numbers(FLAGS.budgets, "budgets")))
  ends = ladder.parse_numbers(FLAGS.compute_range, "compute_range")
  if len(ends) != 2 or ends[0] >= ends[1]:
    raise ValueError(f"--compute_range={FLAGS.compute_range}: LOWEST,HIGHEST is expected")
  return ladder.spread_budgets(*ends, FLAGS.num_budgets)


def _speed(costing: Costing, found: dict) -> Speed:
  """As told, as finished runs had it, or measured on the smallest, the middle and the largest model."""
  device = jax.devices()[0]
  if FLAGS.calibrate:
    return Speed(FLAGS.hardware or f"what {FLAGS.calibrate} ran on", *calibrate.from_runs(FLAGS.calibrate))
  if FLAGS.flops_per_s:
    return Speed(
      FLAGS.hardware or "hardware not named", (1.0,), (FLAGS.flops_per_s,), FLAGS.overhead_s or 0.0
    )
  by_params = {costs.params: (overrides, costs) for _, overrides, costs, *_ in found.values()}
  ordered = sorted(by_params)
  chosen = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
  rates, overheads = [], []
  for params in chosen:
    overrides, costs = by_params[params]
    rate, overhead = _measure(costing, overrides, costs)
    say(f"measured: {params:,} parameters, {rate:.3g} FLOP/s, {overhead:.0f} s to compile")
    rates.append(rate)
    overheads.append(overhead)
  overhead = FLAGS.overhead_s if FLAGS.overhead_s is not None else max(overheads)
  hardware = FLAGS.hardware or f"{jax.device_count()} x {device.device_kind}, measured"
  return Speed(hardware, tuple(map(float, chosen)), tuple(rates), overhead)


def _measure(costing: Costing, overrides: dict, costs: Costs) -> tuple[float, float]:
  """(model FLOP/s of the train step, seconds until it ran first)."""
  pipeline, _ = costing.pipeline(overrides)
  config = costing.config(overrides)
  mesh = make_mesh(registry.section(MeshConfig, config, "mesh"))
  optimizer = registry.section(OptimizerConfig, config, "optimizer")
  setup = state_lib.make_setup(
    cost.task_of(config, pipeline), optimizer=optimizer, num_steps=100, mesh=mesh, seed=0
  )
  batch = next(pipeline.batches())
  began = time.monotonic()
  with jax.set_mesh(mesh):
    step = step_lib.make_train_step(setup, batch=batch, accumulate=config.train.accumulate)
    state = state_lib.init_state(setup)
    batch = multihost.to_global(batch, batch_sharding(mesh, batch), pipeline.spec.rows)
    state, scalars = step(state, batch)
    jax.block_until_ready(scalars)
    overhead = time.monotonic() - began
    began = time.monotonic()
    for _ in range(TIMED_STEPS):
      state, scalars = step(state, batch)
    jax.block_until_ready(scalars)
  return float(costs.flops[0] * TIMED_STEPS / (time.monotonic() - began)), overhead


def cpu_seconds(who: int = resource.RUSAGE_CHILDREN) -> float:
  usage = resource.getrusage(who)
  return usage.ru_utime + usage.ru_stime


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
