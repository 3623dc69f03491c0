"""Several processes as one run: how they find each other, agree and compute the same."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sora_jax.parallel import agreement
from sora_jax.parallel.cluster import Cluster, find
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.parallel.rules import Rules
from sora_jax.training.loop import TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig
from tests import tiny_dit
from tests.cluster_runs import ROOT, codes, events, finish, local_run, log_of, losses, note

EXPLICIT = {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
SLURM = {
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_JOB_ID": "9",
  "SLURM_STEP_NODELIST": "n[1-2]",
  "SLURM_LOCALID": "0",
}
JOBSET = {
  "NUM_PROCESSES": "8",
  "JOB_COMPLETION_INDEX": "1",
  "JOB_INDEX": "1",
  "PROCESSES_IN_JOB": "4",
  "JOBSET_NAME": "run",
  "REPLICATED_JOB_NAME": "slice",
}


def where(cluster):
  return cluster and (cluster.address, cluster.num_processes, cluster.process_id)


def test_clusters_by_environment():
  assert find({}) is None
  assert where(find(EXPLICIT)) == ("host:1234", 4, 3)
  assert where(find({"JAX_" + k: v for k, v in EXPLICIT.items()})) == ("host:1234", 4, 3)
  flags = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}
  assert where(find(EXPLICIT, flags=flags)) == ("a:1", 2, 0)
  assert where(find(EXPLICIT, flags=dict.fromkeys(flags))) == ("host:1234", 4, 3)
  assert find(SLURM) == Cluster(source="SLURM", method="slurm")
  assert find(SLURM | {"SLURM_NTASKS": "1"}) is None and find(SLURM | {"SORA_JAX_DISTRIBUTED": "0"}) is None
  assert where(find(JOBSET)) == ("run-slice-0-0.run:8476", 8, 5)
  assert where(find(JOBSET | {"COORDINATOR_ADDRESS": "x:1", "PROCESS_ID": "2"})) == ("x:1", 8, 2)
  assert find({"TPU_WORKER_HOSTNAMES": "a,b"}) is None
  assert find({"TPU_WORKER_HOSTNAMES": "a,b"}, tpu=True).source == "TPU"
  assert find({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu=True) is None
  assert find({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, tpu=True) is None
  assert find({"SORA_JAX_DISTRIBUTED": "1"}).method is None


@pytest.mark.parametrize(
  "env,flags,says",
  [
    ({"COORDINATOR_ADDRESS": "h:1"}, {}, "COORDINATOR_ADDRESS given, but not NUM_PROCESSES and PROCESS_ID"),
    ({"NUM_PROCESSES": "2", "PROCESS_ID": "0"}, {}, "but not COORDINATOR_ADDRESS: set all three or none"),
    ({}, {"process_id": 1}, "--process_id given, but not --coordinator_address and --num_processes"),
    (EXPLICIT | {"PROCESS_ID": "4"}, {}, "PROCESS_ID=4 must be in 0..3: there are 4 processes"),
    (EXPLICIT | {"NUM_PROCESSES": "x"}, {}, "NUM_PROCESSES='x' is not a number"),
    (EXPLICIT | {"COORDINATOR_ADDRESS": "host"}, {}, "COORDINATOR_ADDRESS='host' must be host:port"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {}, "start with srun, or set SORA_JAX_DISTRIBUTED=0"),
    ({"SORA_JAX_DISTRIBUTED": "yes"}, {}, "SORA_JAX_DISTRIBUTED=yes must be 0 or 1"),
  ],
)
def test_half_set_environments_are_one_line(env, flags, says):
  with pytest.raises(ValueError) as error:
    find(env, flags=flags)
  assert says in str(error.value) and "\n" not in str(error.value)


def test_differences_name_the_hosts_in_the_minority():
  same = {"jax": "1", "config.train.num_steps": 5}
  assert agreement.differences({0: same, 1: same, 2: same}) == []
  odd = agreement.differences({0: same, 1: same | {"jax": "2"}, 2: same, 3: same | {"config.x": 1}})
  assert odd == [
    'jax is "2" on host 1, "1" on the others',
    "config.x is 1 on host 3, null on the others",
  ]
  assert agreement.differences({0: same, 1: same | {"jax": "2"}})[0].startswith('jax is "2" on host 1')
  many = {i: {"jax": str(i < 5)} for i in range(25)}
  assert agreement.differences(many) == ['jax is "True" on hosts 0, 1, 2, 3, 4, "False" on the others']


def test_the_hash_of_the_sources_sees_a_changed_byte(tmp_path):
  for folder in agreement.SOURCES:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.py").write_text("x = 1\n")
  before = agreement.source_hash(tmp_path)
  assert before == agreement.source_hash(tmp_path)
  (tmp_path / "configs" / "a.py").write_text("x = 2\n")
  assert agreement.source_hash(tmp_path) != before


MESHES = {
  "fsdp": {"fsdp": 8},
  "replica": {"replica": 8, "fsdp": 1},
  "context": {"fsdp": 1, "context": 8},
  "tensor": {"fsdp": 4, "tensor": 2},
  "fsdp_context": {"fsdp": 2, "context": 4},
  "all": {"fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.mark.slow
def test_four_processes_compute_what_one_device_does(tmp_path):
  """Two devices each, fsdp, context, tensor and mixtures: losses to 1e-5 of one device."""
  settings = {"task": "dit", "steps": 5, "slow_s": 0, "meshes": MESHES, "train": {"save_every": 0}}
  code, console = finish(local_run(tmp_path, settings, processes=4, SORA_JAX_HEARTBEAT_S=120))
  assert code == 0 and codes(console) == [0] * 4, console[-3000:]
  fit(
    tiny_dit.task(),
    config=TrainConfig(num_steps=5, log_every=1, save_every=0, tensorboard=False),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    train_batches=tiny_dit.batches,
    workdir=tmp_path / "one",
    resolved_config={},
    rules=Rules(small=0),
  )
  expected = [min(v) for v in losses(tmp_path / "one").values()]
  assert len(expected) == 5 and len(set(expected)) == 5
  for name in MESHES:
    got = [min(v) for v in losses(tmp_path / name).values()]
    worst = float(np.abs(np.subtract(got, expected)).max())
    note("4 processes of 2 devices against one device", mesh=MESHES[name], largest_difference=worst)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_slurm_names_the_cluster(tmp_path):
  """Two processes that find each other by what srun sets."""
  shared = os.environ | {
    "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1", "JAX_PLATFORMS": "cpu", "SORA_JAX_HEARTBEAT_S": "120",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",  # eight of each would be more than rows
  }  # fmt: skip
  settings = json.dumps({"steps": 3, "slow_s": 0})
  command = [sys.executable, "-m", "tests.fault_worker", f"--workdir={tmp_path}", f"--settings={settings}"]
  processes = [
    subprocess.Popen(command, cwd=ROOT, env=shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(2)
  ]
  assert [process.wait(timeout=300) for process in processes] == [0, 0]
  assert events(tmp_path, 1, "start")[0]["devices"] == 4


@pytest.mark.slow
def test_the_training_main_on_two_processes(tmp_path):
  """sora_jax.train itself: trains, evaluates and samples as one run; the same command says it is finished."""
  flags = ["--config=configs/quickstart.py:debug", "--config.data.rows=4"]
  env = {"worker": "-m sora_jax.train", "flags": flags, "SORA_JAX_HEARTBEAT_S": 120}
  start = lambda: finish(local_run(tmp_path, processes=2, **env))  # noqa: E731
  code, console = start()
  assert code == 0 and codes(console) == [0, 0], console[-3000:]
  assert console.count("4/4 loss") == 1 and "goodput" in console
  assert "4/4 loss" in log_of(tmp_path, 1)
  code, console = start()
  assert code == 0 and "is finished at step 4 of 4" in console


@pytest.mark.parametrize(
  "args,says",
  [
    (["--processes=2"], "error: unknown option --processes=2 (flags of the training go after --)"),
    (["--num_processes=x"], "must be numbers >= 1"),
    (["--", "--config=a.py"], "error: --workdir=DIR must be among the flags after --"),
  ],
)
def test_local_run_refuses_in_one_line(args, says):
  command = ["bash", "launch/local_run.sh", *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
