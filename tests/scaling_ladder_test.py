"""Ladders: a plan says what training does; a killed ladder goes on; the same noise at every compute."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs import scaling
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from sora_jax.benchmark import full_batch
from sora_jax.conditioning import tokenizer as tokenizer_lib
from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request
from sora_jax.ladder import calibrate, compare, cost
from sora_jax.ladder import run as run_command
from sora_jax.models.dit import DiTConfig
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.scaling import ladder
from sora_jax.scaling.hlo_flops import matmul_flops
from sora_jax.scaling.ladder import Plan, Run
from sora_jax.tasks import registry, text_to_video
from sora_jax.training import metrics
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.state import make_setup
from sora_jax.training.step import make_train_step
from sora_jax.types import BatchSpec
from tests import forked

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
  "width, depth, tokens",
  [(96, 3, 128), *(pytest.param(128, depth, 64, marks=pytest.mark.slow) for depth in (2, 5))],
)
def test_model_flops_are_those_of_the_compiled_step(width, depth, tokens):
  """One full segment a row, so that dense attention computes what counts and no more."""
  spec = BatchSpec(rows=2, tokens=tokens, channels=48, samples=1, text_tokens=16)
  batch = full_batch(spec, (4, 4, tokens // 16))
  task = text_to_video.build(
    model=DiTConfig(width=width, depth=depth, heads=4, remat="none"),
    text_config=TextConfig(width=64, heads=2),
    diffusion=ObjectiveConfig(),
    batch_spec=spec,
  )
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  setup = make_setup(task, optimizer=OptimizerConfig(), num_steps=10, mesh=mesh, seed=0)
  with jax.set_mesh(mesh):
    compiled = make_train_step(setup, batch=batch).lower(setup.abstract, _shapes(batch)).compile()
  counted = matmul_flops(compiled.as_text())
  assert abs(task.flops_fn(batch).sum() / counted - 1) < 0.02
  # XLA counts the body of the scan over blocks once.
  assert compiled.cost_analysis()["flops"] < 0.8 * counted


def _shapes(batch):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def test_counts_loops_and_fusions():
  def body(x, w):
    return jax.lax.map(lambda row: row @ w, jax.numpy.tanh(x @ w)), None

  def f(x, ws):
    return jax.lax.scan(body, x, ws)[0]

  compiled = jax.jit(f).lower(np.zeros((3, 8), np.float32), np.zeros((5, 8, 8), np.float32)).compile()
  # XLA on a CPU may turn products with one row into elementwise work; the others stay.
  assert matmul_flops(compiled.as_text()) in (5 * 2 * 3 * 64, 2 * 5 * 2 * 3 * 64)


@functools.cache
def debug_pipeline():
  config = scaling.get_config("debug")
  data = registry.section(DataConfig, config, "data")
  source = build_source(data)
  captions = [c for i in range(len(source)) for c in source.info(i).captions]
  words = tokenizer_lib.train(captions, vocab_size=config.text.vocab_size, max_tokens=config.text.max_tokens)
  return config, Pipeline(source, data, batch_spec(data), words)


def test_planned_flops_and_tokens_are_those_of_training():
  config, pipeline = debug_pipeline()
  costs = cost.of(config, pipeline, cost.planned(pipeline, range(12)))
  task = cost.task_of(config, pipeline)
  batches = pipeline.batches(0)
  for step in range(12):
    stats = metrics.HostStats.of(batch := next(batches), task.flops_fn(batch))
    assert costs.tokens[step] == stats.tokens and costs.flops[step] == stats.flops
  model = task.init(nnx.Rngs(0))
  assert costs.params == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert cost.total_tokens(costs, 3) == costs.tokens[:3].sum()
  assert cost.total_flops(costs, 24) == pytest.approx(2 * costs.flops.sum())


def test_steps_come_nearest_to_the_budget():
  flops = np.array([10.0, 20, 10, 20])
  for budget, steps in ((11, 1), (19, 1), (21, 2), (59, 4), (60, 4), (91, 6)):
    found, spent = ladder.steps_for(budget, flops)
    assert found == steps
    assert abs(spent - budget) <= 10
  assert ladder.steps_for(1e6, flops)[1] == pytest.approx(1e6, rel=1e-4)
  assert ladder.schedule(40, 50, 500) == {
    "train.num_steps": 40, "optimizer.warmup_steps": 4, "train.save_every": 10,
  }  # fmt: skip
  assert ladder.schedule(10_000, 50, 500)["optimizer.warmup_steps"] == 50
  assert ladder.schedule(40, 0, 0)["optimizer.warmup_steps"] == 0


def a_run(**changes) -> Run:
  values = dict(
    name="a", budget=1.0, compute=1.1, params=5, tokens=6, steps=7, seconds=8.0, overrides={"seed": 1}
  )
  return Run(**values | changes)


def a_plan(*runs: Run) -> Plan:
  return Plan(kind="isoflop", config="c.py:p", config_flags=("--config.seed=3",), hardware="h", runs=runs)


def test_a_plan_is_read_as_written_a_run_a_line(tmp_path):
  plan = a_plan(a_run(), a_run(name="b", overrides={"data.rows": 2}))
  ladder.write(tmp_path / "plan.json", plan)
  assert ladder.read(tmp_path / "plan.json") == plan
  lines = (tmp_path / "plan.json").read_text().splitlines()
  (line,) = [i for i, text in enumerate(lines) if '"name": "a"' in text]
  (tmp_path / "plan.json").write_text("\n".join(lines[:line] + lines[line + 1 :]))  # edited by hand
  assert [run.name for run in ladder.read(tmp_path / "plan.json").runs] == ["b"]
  assert plan.flags(plan.runs[1]) == ["--config=c.py:p", "--config.seed=3", "--config.data.rows=2"]
  assert "2 runs" in ladder.describe(plan) and "in all 2.2 FLOPs" in ladder.describe(plan)


def test_bad_plans_and_sizes(tmp_path):
  path = tmp_path / "plan.json"
  for text, says in (("{", "not JSON"), ('{"runs": [3]}', "not a plan"), ("{}", "not a plan")):
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
      ladder.read(path)
  ladder.write(path, a_plan(a_run(), a_run()))
  with pytest.raises(ValueError, match="two runs are named a"):
    ladder.read(path)
  assert [size.name for size in ladder.parse_sizes("64x4x2,XS")] == ["w64d4h2", "w128d4h4"]
  for text in ("64x4", "64x4x2,64x4x2", "tiny"):
    with pytest.raises(ValueError, match="--sizes"):
      ladder.parse_sizes(text)
  with pytest.raises(ValueError, match="the config has no key model.wdth"):
    cost.resolved({"model": {"width": 1}}, {"model.wdth": 2})


MAIN = "sora_jax.scaling_laws"
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def start(*args) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", MAIN, *map(str, args)],
    cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
  out, err = process.communicate(timeout=600)
  assert process.returncode == code, (out, err)
  return out, err


def fork(*args, code: int = 0) -> tuple[str, str]:
  (done,) = forked.run([(MAIN, *args)], ENVIRONMENT)
  assert done.returncode == code, (done.stdout, done.stderr)
  return done.stdout, done.stderr


PLAN = ("plan", "--config=configs/scaling.py:debug", "--sizes=8x1x1,16x1x2", "--flops_per_s=1e9")


def test_plan_and_launch(tmp_path):
  grid = ("--budgets=2e8,4e8", "--min_steps=6", "--config.data.rows=3")
  out, err = fork(*PLAN, *grid, f"--output={tmp_path}")
  plan = ladder.read(tmp_path / "plan.json")
  assert len(plan.runs) == 3 and "left out: c2e08_w16d1h2 would have 5 steps; 6 are the least" in err
  # As near to the budget as whole steps allow.
  assert all(abs(run.compute - run.budget) < 0.6 * run.compute / run.steps for run in plan.runs)
  assert plan.config_flags == ("--config.data.rows=3",) and "in all" in out
  assert [run.budget for run in plan.runs] == sorted(run.budget for run in plan.runs)
  template = "launcher --name={name} --config={config} --workdir={workdir} -- {flags}"
  out, _ = fork("run", f"--plan={tmp_path / 'plan.json'}", f"--launcher={template}")
  first = out.splitlines()[0]
  assert first.startswith("launcher --name=c2e08-w8d1h1 --config=configs/scaling.py:debug --workdir=")
  assert "-- --config.data.rows=3 --config.model.width=8" in first
  line = ("run", f"--plan={tmp_path / 'plan.json'}", "--launcher=go {workdir}", "--runs_dir=gs://b/l/")
  assert fork(*line)[0].splitlines()[0] == "go gs://b/l/c2e08_w8d1h1"
  _, err = fork(*PLAN, "--budgets=2e8", f"--output={tmp_path}", code=2)
  assert "exists; remove it" in err
  _, err = fork("run", f"--plan={tmp_path / 'plan.json'}", "--launcher=go {job}", code=2)
  assert "--launcher: 'job' is not one of {name}" in err


@pytest.mark.slow
def test_ladder_killed_resumes_and_skips_what_is_done(tmp_path):
  finish(start(*PLAN, "--budgets=3e8,3e9", f"--output={tmp_path}"))
  plan = ladder.read(tmp_path / "plan.json")
  kept = [
    dataclasses.replace(run, overrides=run.overrides | {"train.save_every": 20}) for run in plan.runs[::3]
  ]
  ladder.write(tmp_path / "plan.json", dataclasses.replace(plan, runs=tuple(kept)))
  line = ("run", f"--plan={tmp_path / 'plan.json'}", "--num_samples=2")
  small, large = (tmp_path / run.name for run in kept)
  process, deadline = start(*line), time.monotonic() + 500
  while not any((large / "checkpoints").glob("[0-9]*")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  finish(process, code=42)
  assert (small / "measure.json").exists() and not (large / "measure.json").exists()
  before = (small / "measure.json").stat().st_mtime_ns
  _, err = finish(start(*line))
  assert "done before" in err and "resumed at step" in (large / "log.txt").read_text()
  assert (small / "measure.json").stat().st_mtime_ns == before
  rows = (tmp_path / "results.csv").read_text().splitlines()
  assert len(rows) == 3 and rows[0].startswith("name,steps,params,tokens,compute")
  for run in kept:
    found = json.loads((tmp_path / run.name / "measure.json").read_text())
    assert found["compute"] == pytest.approx(run.compute, rel=1e-9) and found["tokens"] == run.tokens
    logged = [json.loads(x) for x in (tmp_path / run.name / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [x["eval/loss"] for x in logged if "eval/loss" in x][-1:]
    assert found["loss"] == pytest.approx(loss, rel=1e-4)  # the same number as training's own


def test_same_noise_and_prompts_at_every_size():
  requests = [
    Request(prompt="a", width=16, height=8, num_frames=4, fps=8.0, seed=3, index=i) for i in range(3)
  ]
  spec = BatchSpec(rows=2, tokens=16, channels=384, samples=2, text_tokens=8)
  fake = lambda spec: _Run(spec=spec, tokenizer=lambda text: [2], data=_Data((2, 8, 8)))  # noqa: E731
  first = compare.noise_hash(fake(spec), requests)
  # Rows of another size hold them in another order; the noise of each stays.
  assert first == compare.noise_hash(fake(dataclasses.replace(spec, rows=1, tokens=32)), requests)
  assert first != compare.noise_hash(fake(spec), [dataclasses.replace(r, seed=4) for r in requests])
  assert compare.prompts_hash(requests) != compare.prompts_hash(requests[:2])


@dataclasses.dataclass
class _Data:
  patch: tuple


@dataclasses.dataclass
class _Run:
  spec: BatchSpec
  tokenizer: object
  data: _Data


def test_chosen_runs(tmp_path):
  todo = []
  for name, budget, loss in (("a", 1, 3.0), ("b", 4, 2.0), ("c", 4, 1.9), ("d", 32, 1.0), ("e", 32, 1.5)):
    place = run_command.Place(a_run(name=name, budget=budget), tmp_path / name)
    place.workdir.mkdir()
    found = {"steps": 7, "loss": loss, "compute": budget, "params": 1, "accuracy": {"mean": 0.5}}
    (place.workdir / "measure.json").write_text(json.dumps(found))
    todo.append(place)
  assert [place.run.name for place in compare.choose(todo, (1, 4, 32))] == ["a", "c", "d"]
  with pytest.raises(ValueError, match="no finished run of 16x compute; there are 1x, 4x, 32x"):
    compare.choose(todo, (1, 16))
  assert compare.judge([p.measured() for p in todo[:1] + todo[2:4]]) == {
    "loss_strictly_falling": True, "accuracy_not_falling": True,
  }  # fmt: skip
  path, count = run_command.gather(todo)
  assert count == 5 and "accuracy_mean" in path.read_text().splitlines()[0]


def finished(folder: Path, *, params: int, compute: float, seconds: list[float]) -> None:
  folder.mkdir(parents=True)
  (folder / "measure.json").write_text(json.dumps({"params": params, "compute": compute}))
  lines = [json.dumps({"what": "train", "seconds": s, "cpu_s": 1, "code": 0}) for s in seconds]
  (folder / calibrate.TIMES).write_text("\n".join(lines))


def test_speed_of_finished_runs(tmp_path):
  for params, rate in ((10, 2.0), (30, 5.0)):
    for compute in (100.0, 400.0):
      took = 40 + compute / rate
      finished(tmp_path / f"{params}_{compute}", params=params, compute=compute, seconds=[took - 15, 15])
  finished(tmp_path / "alone", params=99, compute=1.0, seconds=[7])
  sizes, rates, overhead = calibrate.from_runs(tmp_path)
  assert sizes == (10, 30) and overhead == pytest.approx(40)
  np.testing.assert_allclose(rates, (2, 5))
  with pytest.raises(ValueError, match="no size has 2 finished runs"):
    calibrate.from_runs(tmp_path / "alone")


def test_a_changed_plan_is_no_finished_run(tmp_path):
  run = a_run(overrides={"optimizer.lr": 0.01, "model.width": 8})
  place = run_command.Place(run, tmp_path)
  run_command.changed(place)  # not started yet
  (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"lr": 0.01}, "model": {"width": 8}}))
  run_command.changed(place)
  (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"lr": 0.02}, "model": {"width": 8}}))
  with pytest.raises(ValueError, match="trained with optimizer.lr = 0.02, the plan says 0.01: rename"):
    run_command.changed(place)


def test_a_wrong_override_is_refused_before_anything_is_trained():
  base = scaling.get_config("debug").to_dict()
  run_command.check_overrides(a_run(overrides={"model.width": 16, "optimizer.lr": 1}), base)
  for key, value, says in (("train.num_step", 7, "no key train.num_step"), ("model.width", "wide", "wide")):
    with pytest.raises(ValueError, match=f"run a: .*{says}"):
      run_command.check_overrides(a_run(overrides={key: value}), base)
