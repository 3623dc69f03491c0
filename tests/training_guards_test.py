"""Bad steps: left out, then passed over by going back; hangs; traces; where the time went."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from sora_jax.parallel.mesh import MeshConfig
from sora_jax.training import guards, profile
from sora_jax.training.guards import Skips, stream
from sora_jax.training.hooks import Hook
from sora_jax.training.loop import DivergedError, TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig
from tests import toy
from tests.cluster_runs import ROOT


def fit_toy(workdir, *, steps, data, hooks=(), **train):
  train = {"log_every": 1, "save_every": 3, "tensorboard": False, "max_skipped": 3} | train
  return fit(
    toy.task(),
    config=TrainConfig(num_steps=steps, **train),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    mesh=MeshConfig(fsdp=2, replica=4),
    train_batches=data,
    workdir=workdir,
    resolved_config={},
    hooks=hooks,
  )


def bad_data(numbers, *, factor=math.nan, seen=None):
  """The toy's batches, those of `numbers` times a factor."""

  def batches(start):
    for number, batch in enumerate(toy.batches(start), start):
      if seen is not None:
        seen.append(number)
      if number in numbers:
        batch.tokens_BLC[:] *= factor
      yield batch

  return batches


def logged(workdir, key="loss"):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line[key] for line in lines if key in line}


def test_skips_are_a_pure_function_of_the_step():
  skips = Skips()
  assert [skips.at(k) for k in range(3)] == [0, 0, 0]
  skips = skips.back_to(6, bad_until=10)  # batches 6 to 9 are passed over
  assert [k + skips.at(k) for k in (0, 5, 6, 7)] == [0, 5, 10, 11]
  again = skips.back_to(6, bad_until=8)  # steps 6 and 7 had batches 10 and 11
  assert again.at(6) + 6 == 12 and again.times(6) == 2 and again.times(5) == 0
  later = skips.back_to(9, bad_until=12)
  assert [k + later.at(k) for k in (5, 6, 8, 9)] == [5, 10, 12, 16]
  earlier = later.back_to(3, bad_until=5)
  assert earlier.entries == ((3, 2, 1),)
  assert Skips.of(json.loads(json.dumps(later.entries))) == later


def test_the_stream_follows_the_skips():
  numbers = lambda start: iter(range(start, start + 100))  # noqa: E731
  taken = lambda skips, start, n: [x for x, _ in zip(stream(numbers, skips, start), range(n))]  # noqa: E731
  skips = Skips(((3, 2, 1), (5, 7, 1)))
  assert taken(skips, 0, 8) == [0, 1, 2, 5, 6, 12, 13, 14]
  assert taken(skips, 4, 3) == taken(skips, 0, 7)[4:]
  with pytest.raises(ValueError, match="data ended"):
    list(stream(lambda start: iter(()), Skips(), 0))


def stopped_at(number, data):
  """SIGTERM to this process while it draws a batch, once."""
  left = [number]

  def batches(start):
    for k, batch in enumerate(data(start), start):
      if left and k == left[0]:
        left.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # for the sentinel to hear of it
      yield batch

  return batches


def test_goes_back_past_bad_data_and_resumes_exactly(tmp_path, capsys):
  """Batches 7 to 9 are no numbers: back to checkpoint 6, on with batch 10. Stopped amid them: the same."""
  seen, data = [], bad_data(range(7, 10))
  whole = fit_toy(tmp_path / "a", steps=12, data=bad_data(range(7, 10), seen=seen))
  assert "not finite for 3 steps in a row, up to step 10: back to step 6" in capsys.readouterr().err
  # Batch 10 had been drawn when step 10 was judged; it is not lost.
  assert seen[:10] == list(range(10)) and seen[10:].count(10) == 2
  assert (whole.step, int(whole.state["counters"]["skipped"])) == (12, 0)
  assert json.loads((tmp_path / "a" / guards.FILE).read_text()) == [[6, 4, 1]]
  a = logged(tmp_path / "a")
  assert list(a) == list(range(1, 13)) and all(math.isfinite(x) for x in a.values())
  for name, number in (("amid", 9), ("before", 7)):
    stopped = fit_toy(tmp_path / name, steps=12, data=stopped_at(number, data))
    assert stopped.preempted and 7 <= stopped.step <= 9
    meta = tmp_path / name / "checkpoints" / str(stopped.step) / "meta" / "metadata"
    assert json.loads(meta.read_text())["streak"] == max(stopped.step - 7, 0)
    fit_toy(tmp_path / name, steps=12, data=data)
    assert logged(tmp_path / name) == a


def test_killed_after_going_back_resumes_to_the_same(tmp_path):
  """The offset lives beside the checkpoint that was gone back to, until a later one holds it."""
  data = bad_data(range(7, 10))
  fit_toy(tmp_path / "a", steps=12, data=data)

  class Killed(Exception):
    pass

  def dying(start):
    for number, batch in enumerate(data(start), start):
      if number == 12 and start >= 10:  # after going back to 6, before the save of step 9
        raise Killed
      yield batch

  with pytest.raises(Killed):
    fit_toy(tmp_path / "b", steps=12, data=dying)
  assert max(int(p.name) for p in (tmp_path / "b" / "checkpoints").iterdir()) == 6
  fit_toy(tmp_path / "b", steps=12, data=data)
  assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_retries_are_bounded(tmp_path):
  for start in range(2):  # a new start does not begin to count anew
    with pytest.raises(DivergedError, match=r"went back to step 3 2 times \(max_rollbacks\)"):
      fit_toy(tmp_path, steps=99, data=bad_data(range(3, 999)), max_rollbacks=2)
    assert start or json.loads((tmp_path / guards.FILE).read_text())[0][0] == 3


def test_a_spike_is_left_out_and_spikes_in_a_row_go_back(tmp_path, capsys):
  settings = {"spike_zscore": 6.0, "spike_window": 8}
  one = fit_toy(tmp_path / "a", steps=14, data=bad_data([12], factor=30.0), **settings)
  assert int(one.state["counters"]["skipped"]) == 1
  off = fit_toy(tmp_path / "b", steps=14, data=bad_data([12], factor=30.0))
  assert int(off.state["counters"]["skipped"]) == 0
  # Two programs, which sum in different orders.
  before, unguarded = (
    [loss for step, loss in logged(tmp_path / name).items() if step <= 13] for name in ("a", "b")
  )
  np.testing.assert_allclose(before, unguarded, rtol=1e-6)
  many = fit_toy(tmp_path / "c", steps=16, data=bad_data(range(12, 16), factor=30.0), **settings)
  assert "the loss spiked for 3 steps in a row" in capsys.readouterr().err
  assert many.step == 16 and json.loads((tmp_path / "c" / guards.FILE).read_text())


def test_spike_statistics():
  """Against numpy: z-score of the log-loss to a mean that becomes exponential after `window` steps."""
  rng, state = np.random.default_rng(0), guards.spike_state()
  losses = np.exp(rng.normal(0, 0.1, 40)).astype(np.float32)
  for loss in losses[:10]:
    spike, state = guards.spike_update(state, loss, zscore=4.0, window=10)
    assert not spike
  logs = np.log(losses[:10])
  np.testing.assert_allclose(state["mean"], logs.mean(), rtol=1e-4)
  np.testing.assert_allclose(state["var"], logs.var(), rtol=1e-3)
  z = lambda k: math.exp(logs.mean() + k * logs.std())  # noqa: E731
  judge = lambda loss, zscore: bool(guards.spike_update(state, loss, zscore=zscore, window=10)[0])  # noqa: E731
  assert judge(z(4.1), 4.0) and not judge(z(3.9), 4.0) and not judge(z(-9), 4.0) and not judge(z(99), 0.0)


@pytest.mark.slow
def test_profile_steps(tmp_path):
  assert profile.parse("10:13") == (10, 13) and profile.parse("") is None
  for wrong in ("10", "5:5", "a:b"):
    with pytest.raises(ValueError, match="must be FIRST:LAST"):
      TrainConfig(num_steps=1, profile_steps=wrong)
  asked = Hook(every=6, run=lambda moment: os.kill(os.getpid(), signal.SIGUSR1), at_end=False)
  fit_toy(tmp_path, steps=40, data=toy.batches, save_every=0, hooks=[asked], profile_steps="1:3")
  traces = list((tmp_path / "profile" / "host_00000").rglob("*.xplane.pb"))
  said = (tmp_path / "logs" / "host_00000.log").read_text()
  assert "profiling from step 1\n" in said and said.count("profiler trace in") >= 2, said
  assert traces and all(path.stat().st_size > 1000 for path in traces)


HANG = """
import sys, time
from sora_jax.parallel import hostlog
from sora_jax.training.watchdog import Watchdog
hostlog.open_in(sys.argv[1], 0)
dog = Watchdog(1.0).start()
for _ in range(8):
  time.sleep(0.25)
  dog.beat()
with dog.patience("compiling"):
  time.sleep(2)
def asleep():
  time.sleep(100)
asleep()
"""


def test_the_watchdog_ends_a_process_that_hangs(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(HANG), str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120
  )
  assert done.returncode == 43, done.stderr
  log = (tmp_path / "logs" / "host_00000.log").read_text()
  assert re.search(r"no progress for \d+ s in a step", log) and "in asleep" in log


STUCK = """
import ctypes, sys, time
from sora_jax.parallel import hostlog
from sora_jax.training import watchdog
watchdog.C_GRACE_S = 1
hostlog.open_in(sys.argv[1], 0)
dog = watchdog.Watchdog(2.0).start()
time.sleep(1)
def holding_the_lock():
  ctypes.PyDLL(None).sleep(600)
holding_the_lock()
"""


def test_the_watchdog_ends_a_process_whose_interpreter_is_stuck(tmp_path):
  """A call into C that keeps the interpreter's lock stops the watchdog's own thread too."""
  done = subprocess.run(
    [sys.executable, "-c", STUCK, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=300
  )
  assert done.returncode == -signal.SIGALRM, done.stderr  # 142 to a shell
  assert "in holding_the_lock" in (tmp_path / "logs" / "host_00000.log").read_text()


def test_goodput_adds_up_over_starts(tmp_path, capsys):
  """Stopped by a fault at step 8, after the checkpoint of step 6: steps 7 and 8 are done twice."""

  def failing(start):
    for number, batch in enumerate(toy.batches(start), start):
      if number == 9:
        raise ArithmeticError("no more")
      yield batch

  with pytest.raises(ArithmeticError):
    fit_toy(tmp_path, steps=12, data=failing)
  reached = int((tmp_path / "logs" / "progress").read_text())
  assert reached in (7, 8)  # of the last step dispatched nobody knows
  fit_toy(tmp_path, steps=12, data=toy.batches)
  last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
  assert last["goodput/starts"] == 2 and last["goodput/redone_steps"] == reached - 6
  seconds = {k: v for k, v in last.items() if k.startswith("goodput/") and k.endswith("_s")}
  total = json.loads((tmp_path / "logs" / "goodput.json").read_text())["wall_s"]
  assert sum(seconds.values()) == pytest.approx(total, rel=0.05)
  assert min(seconds[f"goodput/{kind}_s"] for kind in ("step", "redone", "compile", "save", "restore")) > 0
  assert last["goodput"] == pytest.approx(seconds["goodput/step_s"] / total, rel=0.05)
  line = [text for text in capsys.readouterr().err.splitlines() if text.startswith("goodput")][-1]
  assert f"in 2 start(s); {reached - 6} steps redone" in line


def test_wrong_settings_are_refused():
  for wrong in ({"spike_window": 0}, {"profile_num_steps": 0}, {"max_rollbacks": -1}, {"hang_timeout_s": -1}):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
      TrainConfig(num_steps=1, **wrong)
  assert dataclasses.asdict(TrainConfig(num_steps=1))["spike_zscore"] == 0.0
  assert jax.process_count() == 1
