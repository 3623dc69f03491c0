"""The training step and loop: sharding, batching, precision, restore, bad steps."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sora_jax.parallel.mesh import MeshConfig, local_rows, make_mesh
from sora_jax.parallel.rules import Rules
from sora_jax.training.hooks import Hook
from sora_jax.training.loop import DivergedError, TrainConfig, fit
from sora_jax.training.muon import orthogonalize
from sora_jax.training.optimizer import (
  OptimizerConfig,
  decay_mask,
  hidden_mask,
  learning_rate,
  make_optimizer,
)
from sora_jax.training.scalars import pack, unpack
from sora_jax.training.state import init_state, make_setup
from sora_jax.training.step import make_train_step
from tests import tiny_dit, toy

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.01, clip_norm=1.0)
ONE = MeshConfig(fsdp=1)


def run(task, data, *, mesh=ONE, num_devices=1, steps=5, accumulate=1, optimizer=OPTIMIZER):
  """(losses, final state on the host) of the bare step."""
  mesh = make_mesh(mesh, jax.devices()[:num_devices])
  setup = make_setup(
    task, optimizer=optimizer, num_steps=steps, mesh=mesh, seed=0, rules=Rules(small=0, tile=1)
  )
  state = init_state(setup)
  batch = data(0)
  step = make_train_step(setup, batch=batch, accumulate=accumulate)
  losses = []
  for i in range(steps):
    state, scalars = step(state, data(i))
    total, count = unpack(scalars)["sums"]["loss"]
    losses.append(float(total) / float(count))
  assert step._cache_size() == min(steps, 1), "the step was compiled again"
  return np.array(losses), jax.device_get(state)


@functools.cache
def one_device():
  return run(tiny_dit.task(), tiny_dit.batch)


OTHERS = [(8, 1, 1, 1), (2, 4, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (4, 1, 1, 2)]


@pytest.mark.parametrize(
  "sizes",
  [(1, 2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)],
  ids=str,
)
def test_meshes_agree(sizes):
  mesh = MeshConfig(**dict(zip(("replica", "fsdp", "context", "tensor"), sizes)))
  losses, state = run(tiny_dit.task(), tiny_dit.batch, mesh=mesh, num_devices=8)
  expected, expected_state = one_device()
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
  for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected_state["params"])):
    np.testing.assert_allclose(a, b, atol=2e-3)  # Adam amplifies rounding where gradients are nearly zero


def test_accumulation_agrees():
  losses, _ = run(tiny_dit.task(), tiny_dit.batch, accumulate=4)
  np.testing.assert_allclose(losses, one_device()[0], rtol=0, atol=1e-5)
  losses, _ = run(tiny_dit.task(), tiny_dit.batch, accumulate=2, mesh=MeshConfig(fsdp=4), num_devices=4)
  np.testing.assert_allclose(losses, one_device()[0], rtol=0, atol=1e-5)


def test_loss_does_not_depend_on_the_split_into_batches():
  """The same 128 rows as batches of 1, 2 and 128: sums and gradients add up to the same."""
  task = tiny_dit.task()
  rows = [tiny_dit.row(i) for i in range(128)]
  graphdef, params = nnx.split(task.init(nnx.Rngs(0)), nnx.Param)
  # Away from the zero initialisation, where the output is zero whatever the input.
  params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), params)
  key = jax.random.key(5)

  @jax.jit
  def grads(batch):
    return jax.grad(lambda p: task.loss_fn(nnx.merge(graphdef, p), batch, key), has_aux=True)(params)

  def total(size):
    stack = lambda group: jax.tree.map(lambda *x: np.concatenate(x), *group)  # noqa: E731
    parts = [grads(stack(rows[i : i + size])) for i in range(0, len(rows), size)]
    return jax.tree.map(lambda *x: np.sum(np.stack(x), 0, dtype=np.float64), *parts)

  expected_grads, expected_sums = total(128)
  for size in (1, 2):
    part_grads, sums = total(size)
    assert sums["loss"][1] == expected_sums["loss"][1]
    np.testing.assert_allclose(sums["loss"][0], expected_sums["loss"][0], rtol=1e-5)
    norm, diff = optax.tree.norm(expected_grads), jax.tree.map(np.subtract, part_grads, expected_grads)
    assert optax.tree.norm(diff) < 1e-4 * norm


def test_bf16_compute_moves_weights_at_a_small_rate():
  optimizer = OptimizerConfig(lr=1e-5, warmup_steps=0, clip_norm=0.0)
  task = toy.task(dtype=jnp.bfloat16)
  before = run(task, toy.batch, steps=0, optimizer=optimizer)[1]["params"]
  _, state = run(task, toy.batch, steps=3, optimizer=optimizer)
  for name, value in state["params"].items():
    moved = np.abs(value - before[name])
    assert value.dtype == np.float32
    assert (moved > 0).mean() > 0.95 and moved.max() < 1e-4, name


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
  def data(step):
    batch = toy.batch(step)
    if step == 1:
      batch.tokens_BLC[0, 0] = np.inf
      batch.given_BL[0, 0] = False
    return batch

  one = run(toy.task(), data, steps=1)[1]
  losses, two = run(toy.task(), data, steps=2)
  assert not np.isfinite(losses[1])
  for name in ("params", "ema", "opt"):
    jax.tree.map(np.testing.assert_array_equal, two[name], one[name])
  assert two["counters"] == {"step": 2, "updates": 1, "skipped": 1, "streak": 1}
  assert np.isfinite(run(toy.task(), data, steps=3)[0][2])


def test_noise_differs_from_step_to_step():
  still = OptimizerConfig(lr=0.0)
  losses, _ = run(toy.task(), lambda step: toy.batch(0), steps=3, optimizer=still)
  again, _ = run(toy.task(), lambda step: toy.batch(0), steps=3, optimizer=still)
  assert len(set(losses)) == 3 and (losses == again).all()


def test_only_trainable_variables_move():
  _, state = run(toy.task(), toy.batch, steps=2)
  assert set(state["rest"]) == {"frozen"} and (state["rest"]["frozen"] == 1).all()
  assert "frozen" not in state["params"]


def test_ema_follows_the_parameters():
  steps, decay = 4, 0.2
  optimizer = dataclasses.replace(OPTIMIZER, ema_decay=decay)
  run_toy = functools.partial(run, toy.task(), toy.batch, optimizer=optimizer)
  params = [run_toy(steps=i)[1]["params"]["up"] for i in range(steps + 1)]
  ema = params[0]
  for i in range(steps):
    d = min(decay, (1 + i) / (10 + i))
    ema = d * ema + (1 - d) * params[i + 1]
  got = run_toy(steps=steps)[1]["ema"]["up"]
  np.testing.assert_allclose(got, ema, atol=1e-6)


def test_adamw_is_that_of_optax():
  """Against optax.adamw, decay on matrices alone, stacked vectors not taken for matrices."""
  _, params = nnx.split(nnx.eval_shape(lambda: toy.Toy(nnx.Rngs(0))), nnx.Param, ...)[:2]
  mask = decay_mask(params)
  assert mask == {"up": True, "blocks": True, "blocks_down": True, "scale": False, "down": True}
  config = OptimizerConfig(lr=0.1, warmup_steps=0, weight_decay=0.3, clip_norm=0.0)
  tx, _ = make_optimizer(config, num_steps=10, abstract=params)
  reference = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.3, mask=mask)
  values = jax.tree.map(
    lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) - 3, nnx.to_pure_dict(params)
  )
  got, want = (t.update(values, t.init(values), values)[0] for t in (tx, reference))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_orthogonalize_evens_out_singular_values():
  for shape in [(6, 6), (3, 4, 9), (2, 9, 4)]:
    singular = jnp.linalg.svd(orthogonalize(jax.random.normal(jax.random.key(0), shape)), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_touches_matrices_inside_the_network_alone():
  """All else gets AdamW's update; the muon update is as large as Adam's would be."""
  _, params = nnx.split(nnx.eval_shape(lambda: toy.Toy(nnx.Rngs(0))), nnx.Param, ...)[:2]
  hidden = hidden_mask(params)
  assert hidden["blocks"] and not hidden["scale"]
  config = OptimizerConfig(name="muon", lr=0.1, warmup_steps=0, clip_norm=0.0)
  plain = OptimizerConfig(lr=0.1, warmup_steps=0, clip_norm=0.0)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  values = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), nnx.to_pure_dict(params))
  txs = [make_optimizer(c, num_steps=10, abstract=params)[0] for c in (config, plain)]
  got, want = (tx.update(values, tx.init(values), values)[0] for tx in txs)
  for name, is_hidden in hidden.items():
    assert np.allclose(got[name], want[name]) != is_hidden, name
    ratio = float(jnp.sqrt(jnp.mean(got[name] ** 2) / jnp.mean(want[name] ** 2)))
    assert 0.1 < ratio < 1.5, (name, ratio)


@pytest.mark.parametrize(
  "schedule,last", [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1), ("rsqrt", 0.1**0.5)]
)
def test_schedules(schedule, last):
  rate = learning_rate(
    OptimizerConfig(lr=1.0, warmup_steps=10, schedule=schedule, final_lr_ratio=0.1), num_steps=100
  )
  assert rate(0) == pytest.approx(0.1) and rate(9) == pytest.approx(1.0)
  assert rate(100) == pytest.approx(last, rel=1e-5)


def test_wrong_settings_are_refused():
  with pytest.raises(ValueError, match="schedule = 'step' is unknown"):
    OptimizerConfig(schedule="step")
  with pytest.raises(TypeError, match="learning_rate"):
    OptimizerConfig(learning_rate=1)
  with pytest.raises(ValueError, match="needs a multiple of 3 devices, but there are 8"):
    MeshConfig(replica=3).sizes(8)
  with pytest.raises(ValueError, match="at most one may be -1"):
    MeshConfig(replica=-1).sizes(8)
  with pytest.raises(ValueError, match="6 rows .* do not divide over the 8 devices"):
    spec = dataclasses.replace(toy.SPEC, rows=6)
    run(toy.task(spec=spec), lambda i: toy.batch(i, spec), mesh=MeshConfig(), num_devices=8)
  with pytest.raises(ValueError, match="does not split into train.accumulate = 3"):
    run(toy.task(), toy.batch, accumulate=3)
  assert local_rows(make_mesh(MeshConfig()), 16) == slice(0, 16)


def test_rules():
  mesh = make_mesh(MeshConfig(replica=1, fsdp=4, tensor=2))
  spec = lambda shape, names: tuple(Rules(small=64, large=1000).spec(shape, names, mesh, "w"))  # noqa: E731
  assert spec((8, 6), ("embed", "mlp")) == ("fsdp", "tensor")
  assert spec((3, 8, 6), ("layers", "embed", "mlp")) == (None, "fsdp", "tensor")
  assert spec((4, 8), ("layers", "embed")) == (None, None)  # a stack of vectors
  assert spec((8, 8), ("embed", "embed")) == ("fsdp", None)
  assert spec((6, 12), ("embed", "vocab")) == (None, "fsdp")  # 6 does not divide over 4
  assert spec((8, 16), None) == (None, "fsdp")
  assert spec((3, 5), None) == (None, None)  # small
  with pytest.raises(ValueError, match="parameter w of shape .* would be copied whole"):
    spec((4, 33, 35), ("layers", None, None))


def test_rules_split_over_context_too_where_whole_tiles_are_left():
  mesh = make_mesh(MeshConfig(fsdp=4, context=2))
  first = lambda shape, tile: Rules(tile=tile).spec(shape, ("embed", "mlp"), mesh, "w")[0]  # noqa: E731
  assert first((128, 64), 16) == ("fsdp", "context")
  assert first((64, 64), 16) == "fsdp"  # 8 rows would be half a tile
  assert first((64, 64), 8) == ("fsdp", "context")


def fit_toy(workdir, *, steps, data=toy.batches, **kwargs):
  train = {"log_every": 1, "save_every": 3, "tensorboard": False} | kwargs.pop("train", {})
  settings = {
    "config": TrainConfig(num_steps=steps, **train),
    "optimizer": OPTIMIZER,
    "mesh": MeshConfig(fsdp=4, replica=2),
    "train_batches": data,
    "workdir": workdir,
    "resolved_config": {"model": {"width": 16}, "train": {"num_steps": steps}},
  }
  return fit(toy.task(), **settings | kwargs)


def logged(workdir, key="loss"):
  """step -> value, the last line of a step counts."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line[key] for line in lines if key in line}


def test_resume_is_exact(tmp_path):
  """Stopped at step 4 and resumed: the same losses, parameters, EMA and optimizer, bit for bit."""
  whole = fit_toy(tmp_path / "a", steps=7, eval_batches=lambda: [toy.batch(99)], train={"eval_every": 3})
  fit_toy(tmp_path / "b", steps=4)
  resumed = fit_toy(tmp_path / "b", steps=7, eval_batches=lambda: [toy.batch(99)], train={"eval_every": 3})
  assert logged(tmp_path / "a") == logged(tmp_path / "b") and len(logged(tmp_path / "a")) == 7
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.state), jax.device_get(resumed.state))
  assert int(resumed.state["opt"][1].count) == 7
  assert whole.evals["eval/loss"] == resumed.evals["eval/loss"] != resumed.evals["eval_raw/loss"]
  assert list(logged(tmp_path / "a", "eval/loss")) == [3, 6, 7]


def test_resume_on_other_devices(tmp_path):
  whole = fit_toy(tmp_path / "a", steps=6)
  fit_toy(tmp_path / "b", steps=3)
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
  other = fit_toy(tmp_path / "b", steps=6, mesh=mesh)
  assert other.state["params"]["up"].sharding.num_devices == 2
  a, b = logged(tmp_path / "a"), logged(tmp_path / "b")
  np.testing.assert_allclose([b[i] for i in a], list(a.values()), rtol=0, atol=1e-6)
  assert whole.step == other.step == 6


def test_hooks_and_reports(tmp_path, capsys):
  seen = []
  hook = Hook(every=2, run=lambda moment: seen.append((moment.step, type(moment.model("ema")))))
  fit_toy(tmp_path, steps=5, hooks=[hook])
  assert seen == [(2, toy.Toy), (4, toy.Toy), (5, toy.Toy)]
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
  expected = {
    "step", "loss", "loss/t0.4-0.6", "grad_norm", "lr", "skipped", "tokens_per_s", "samples_per_s", "step_s",
    "padding", "unreadable", "flops_per_s", "data_wait", "live_tiles", "live_tile_share",
  }  # fmt: skip
  assert set(line) == expected
  batch = toy.batch(0)
  assert line["padding"] == pytest.approx((batch.segment_BL == 0).mean())
  out = capsys.readouterr().err
  assert "5/5 loss" in out and "MFU" not in out


def test_a_finished_run_says_so(tmp_path, capsys):
  fit_toy(tmp_path, steps=2)
  result = fit_toy(tmp_path, steps=2)
  assert result.step == 2 and "finished at step 2 of 2" in capsys.readouterr().err


def test_a_workdir_of_another_model_is_refused(tmp_path):
  fit_toy(tmp_path, steps=1)
  with pytest.raises(ValueError, match=r"model.width was 16, now 32"):
    fit_toy(tmp_path, steps=2, resolved_config={"model": {"width": 32}})


def test_a_diverged_run_stops(tmp_path):
  def poisoned(start):
    for batch in toy.batches(start):
      batch.tokens_BLC[:] = np.nan
      yield batch

  with pytest.raises(DivergedError, match="not finite for 3 steps in a row"):
    fit_toy(tmp_path, steps=9, data=poisoned, train={"max_skipped": 3})


def test_packed_numbers_come_back_as_they_were():
  tree = {"a": (jnp.float32(0.1), jnp.int32(2**31 - 1)), "b": [jnp.float32(jnp.nan), jnp.int32(3)], "c": True}
  packed = jax.jit(lambda: pack(tree))()
  assert len(jax.tree.leaves(packed)) == 3
  got = unpack(packed)
  assert np.isnan(got["b"][0]) and got["a"] == (float(np.float32(0.1)), 2**31 - 1)
  assert got["b"][1] == 3 and got["c"] is True
