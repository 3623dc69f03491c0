"""Rehearsals by the real compiler; skipped where libtpu is not installed (launch/test.sh installs it)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax.parallel import flags
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu")
CONTRACT = {
  "params", "devices", "hbm_peak_bytes", "hbm_limit_bytes", "compile_seconds", "collectives", "lints",
  "model_flops_per_step", "roofline_step_seconds", "fits",
}  # fmt: skip


MAIN = "sora_jax.rehearse"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def rehearse(*args):
  (done,) = forked.run([(MAIN, *args)], ENVIRONMENT)
  return done


def test_a_tiny_pod_is_rehearsed_as_a_user_would(tmp_path):
  out = tmp_path / "table.json"
  args = ("--config=configs/t2v_700m.py:debug", "--topology=v5e:2x2", f"--json={out}")
  command = [sys.executable, "-m", MAIN, *args]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=900)
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())
  assert set(result) >= CONTRACT
  assert result["devices"] == 4 and result["fits"] and not result["lints"]
  assert result["attention"] == "tpu" and 0 < result["hbm_peak_bytes"] < result["hbm_limit_bytes"]
  # Parameters are gathered and their gradients reduced over the one axis that has several devices.
  assert result["collectives"]["all-gather"]["fsdp"]["count"] > 0
  assert set().union(*result["collectives"].values()) == {"fsdp"}
  assert "HBM per chip" in done.stdout and "roofline step" in done.stdout


def test_an_oversized_run_is_refused_with_figure_and_remedy(tmp_path):
  out = tmp_path / "table.json"
  size = ["--config.mesh.fsdp=4", "--config.mesh.context=1", "--config.data.rows=4"]
  done = rehearse("--config=configs/t2v_30b.py", "--topology=v5p:2x2x1", f"--json={out}", *size)
  assert done.returncode == 1, done.stderr
  result = json.loads(out.read_text())
  (lint,) = result["lints"]
  assert not result["fits"] and lint["name"] == "memory"
  assert "GiB of HBM per chip" in lint["message"] and "model.remat" in lint["message"]
  assert result["hbm_peak_bytes"] > result["hbm_limit_bytes"]


def test_a_batch_that_does_not_divide_is_a_lint(tmp_path):
  """Of two programs, each in a process of its own: in order, and libtpu says nothing."""
  out = tmp_path / "table.json"
  two = "--config.rehearse.topologies=('v5e:2x2', 'v6e:2x4')"
  config = ("--config=configs/t2v_700m.py:debug", "--config.data.rows=6", two)
  done = rehearse(*config, "--jobs=2", f"--json={out}")
  assert done.returncode == 1 and not done.stderr
  assert done.stdout.count("lint batch: data.rows = 6") == 2
  assert done.stdout.count("does NOT pass: batch") == 2
  assert "2 programs in" in done.stdout
  assert [r["topology"] for r in json.loads(out.read_text())] == ["v5e:2x2", "v6e:2x4"]


def test_a_mistake_in_one_of_several_is_one_line():
  two = "--config.rehearse.topologies=('v5e:2x2', 'v5e:7x9')"
  done = rehearse("--config=configs/t2v_700m.py:debug", "--config.data.rows=6", two, "--jobs=2")
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "libtpu does not take topology v5e:7x9" in done.stderr


@pytest.mark.parametrize("generation", flags.FLAGS)
def test_the_compiler_knows_every_flag(generation):
  """LIBTPU_INIT_ARGS is read once a process; an unknown flag ends it."""
  code = (
    "import jax, jax.numpy as jnp; from sora_jax.rehearsal import topology;"
    f"at = topology.parse({generation!r} + (':2x2' if {generation!r} in ('v5e', 'v6e') else ':2x2x1'));"
    "s = jax.sharding.SingleDeviceSharding(topology.describe(at)[0]);"
    "jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=s)).compile()"
  )

  def compiled(args):
    env = os.environ | {"LIBTPU_INIT_ARGS": args, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)

  done = compiled(flags.init_args(generation))
  assert done.returncode == 0, done.stderr[-2000:]
  if generation == "v5p":  # the check sees what it is for
    wrong = compiled("--xla_tpu_no_such_flag=true")
    assert wrong.returncode != 0 and "xla_tpu_no_such_flag" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", ["700m", "5b", "30b"])
def test_the_debug_preset_of_a_pod_trains(size, tmp_path):
  command = [sys.executable, "-m", "sora_jax.train", f"--config=configs/t2v_{size}.py:debug"]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
  done = subprocess.run(
    [*command, f"--workdir={tmp_path}", "--config.train.tensorboard=False"],
    capture_output=True, text=True, cwd=ROOT, env=env, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert "done: step 2" in done.stderr
