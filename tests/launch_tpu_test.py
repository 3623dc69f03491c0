"""launch/tpu_run.sh against a gcloud that keeps state; what workers shall do is done for real, in folders."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.stand_ins.sandbox import BASE, PATIENCE_S, PLACE, commands, git, make_repository, make_sandbox

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="no git: the code is sent at its commit")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def box(repository, tmp_path):
  sandbox = make_sandbox(repository, tmp_path / "state")
  yield sandbox
  sandbox.end()


def tpu(line: list[str]) -> str:
  return " ".join(line[3:5]) if line[:3] == ["gcloud", "compute", "tpus"] else line[0]


# --- dry run ---


def test_dry_run_prints_every_command_and_runs_none(box):
  done = box.run("tpu_run.sh", *BASE, "--spot", "--dry_run", "--teardown_at_end", "--", "--config.seed=1")
  lines = commands(done)
  assert not box.calls("gcloud")
  assert [tpu(line) for line in lines] == [
    "tpu-vm describe", "tpu-vm create", "git", "printf", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh",
    "tpu-vm ssh", "tpu-vm ssh", "bash", "tpu-vm delete",
  ]  # fmt: skip
  create = lines[1]
  assert {"--spot", "--type=v5p", "--topology=2x2x2", "--version=v2-alpha-tpuv5"} < set(create)
  for line in lines:
    if line[0] == "gcloud":
      assert {"--zone=us-east5-a", "--project=mine", "--quiet"} < set(line)
  setup, start, status, follow = [line for line in lines if "ssh" in line]
  assert "--worker=all" in setup and "tar -xzf" in setup[-1] and "lib_worker.sh setup pod" in setup[-1]
  assert "--worker=all" in start and start[-1].endswith("lib_worker.sh start pod 1")
  assert "--worker=0" in follow


def test_dry_run_can_be_pasted(box, tmp_path):
  """The lines a shell can run here do what they say, with names that hold quotes and spaces."""
  flag = """--config.data.source=it's "a" $(touch oops); `touch oops` & b"""
  lines = box.run("tpu_run.sh", *BASE, "--dry_run", "--", flag).stdout.splitlines()
  for line in lines:
    if line.startswith(("git ", "printf ")):
      subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path)
  env = box.state / "sora_jax-pod.env"
  code = 'source "$1"; printf "%s\\n" "${SORA_JAX_FLAGS[@]}" "$SORA_JAX_WORKDIR"'
  read = subprocess.run(
    ["bash", "-c", code, "-", env], capture_output=True, text=True, check=True, cwd=tmp_path
  )
  assert read.stdout.splitlines() == [flag, "gs://bucket/a run"]
  assert not list(tmp_path.rglob("oops"))
  assert (box.state / "sora_jax-pod.tar.gz").stat().st_size > 0


def test_dry_run_of_slices(box):
  lines = commands(box.run("tpu_run.sh", *BASE, "--num_slices=3", "--reserved", "--dry_run"))
  create = next(line for line in lines if "create" in line)
  assert tpu(create) == "queued-resources create"
  assert {"--node-count=3", "--node-prefix=pod", "--reserved", "--runtime-version=v2-alpha-tpuv5"} < set(
    create
  )
  started = {line[5] for line in lines if "ssh" in line and line[-1].endswith("start pod 1")}
  assert started == {"pod-0", "pod-1", "pod-2"}


@pytest.mark.parametrize(
  "topology,flags,version",
  [
    ("--topology=v5e:4x4", {"--type=v5litepod", "--topology=4x4"}, "v2-alpha-tpuv5-lite"),
    ("--topology=v6e:8x8", {"--type=v6e", "--topology=8x8"}, "v2-alpha-tpuv6e"),
    ("--accelerator=v5litepod-16", {"--accelerator-type=v5litepod-16"}, "v2-alpha-tpuv5-lite"),
    ("--accelerator=v5p-128", {"--accelerator-type=v5p-128"}, "v2-alpha-tpuv5"),
  ],
)
def test_what_is_created(box, topology, flags, version):
  args = [arg for arg in BASE if not arg.startswith("--topology")]
  lines = commands(box.run("tpu_run.sh", *args, topology, "--dry_run"))
  create = next(line for line in lines if "create" in line)
  assert flags | {f"--version={version}"} < set(create)
  assert any(line[0] == "printf" and f"SORA_JAX_GENERATION={topology[11:14]}" in line for line in lines) or (
    "accelerator" in topology
  )


# --- runs ---


def test_a_run_from_nothing_to_its_end(box):
  box.set(workers=2)
  flag = '--config.data.source=gs://data/it\'s "here"'
  done = box.run("tpu_run.sh", *BASE, "--", flag, "--config.seed=1")
  assert done.returncode == 0, done.stderr
  head = git(box.repository, "rev-parse", "HEAD")
  trained = box.calls("train")
  assert sorted(call["host"] for call in trained) == ["pod-w-0", "pod-w-1"]
  for call in trained:
    buckets = box.state / "homes" / call["host"] / "sora_jax" / "buckets"
    assert call["argv"] == [
      "--config=configs/quickstart.py:debug",
      f"--workdir={buckets}/bucket/a run",
      f'--config.data.source={buckets}/data/it\'s "here"',
      "--config.seed=1",
    ]
    env = call["env"]
    assert (
      env["SORA_JAX_COMMIT"] == head
      and env["SORA_JAX_DISTRIBUTED"] == "1"
      and env["SORA_JAX_RUN_ID"] == "pod"
    )
    assert env["LIBTPU_INIT_ARGS"] == "--xla_for=v5p --xla_other=true"
    assert call["code"] == f"code-{head}"
  assert (box.state / "buckets" / "bucket" / "a run" / "steps_pod-w-0").read_text() == "." * 10
  assert "pod-w-0: resumed from step 0" in done.stdout  # the log was followed
  logs = box.repository / "runs" / "pod" / "logs"
  assert "pod-w-1: resumed" in (logs / "pod-w-1" / "attempt_0001" / "train.log").read_text()
  assert not box.argv("delete") and "cost money" in done.stderr


def test_pins_and_accelerator_are_installed_once(box):
  assert box.run("tpu_run.sh", *BASE).returncode == 0
  assert box.run("tpu_run.sh", *BASE).returncode == 0  # the same command once more
  installs = [call["argv"][3:] for call in box.calls("python") if call["argv"][1:3] == ["pip", "install"]]
  pins = [argv for argv in installs if any("/launch/requirements/py3" in arg for arg in argv)]
  jax = [argv[-1] for argv in installs if argv not in pins]
  assert len(pins) == len(jax) == 1
  assert all(re.fullmatch(r"jax\[tpu\]==[\d.]+", name) for name in jax)


def test_preemption_then_success(box):
  """Its machine goes away: created anew, the same run id and workdir, and what was done is found there."""
  box.set(workers=2, hosts=2, ends={"pod-w-1": ["preempt", 0], "*": ["wait", 0]})
  done = box.run("tpu_run.sh", *BASE, "--spot", "--run_id=first")
  assert done.returncode == 0, done.stderr
  assert len(box.argv("tpu-vm", "create")) == 2 and len(box.argv("tpu-vm", "delete")) == 1
  trained = [call for call in box.calls("train") if call["host"] == "pod-w-1"]
  assert [call["resumed"] for call in trained] == [0, 10]
  assert {call["env"]["SORA_JAX_RUN_ID"] for call in trained} == {"first"}
  assert len({tuple(call["argv"]) for call in trained}) == 1
  assert "PREEMPTED" in done.stderr and "attempt 2" in done.stderr


def test_restarts_on_the_same_machines(box):
  box.set(ends={"*": [42, 43, 134, 137, 142, 0]})
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == 0, done.stderr
  assert len(box.argv("tpu-vm", "create")) == 1
  assert [call["resumed"] for call in box.calls("train")] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("code", [1, 44])
def test_does_not_restart(box, code):
  box.set(ends={"*": [code, 0]})
  assert box.run("tpu_run.sh", *BASE).returncode == code
  assert len(box.calls("train")) == 1


def test_a_failed_worker_ends_the_run_and_is_shown(box):
  """The others hang in a collective: they are stopped."""
  code = 2
  box.set(workers=2, hosts=2, ends={"pod-w-1": [code], "*": ["wait"]})
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == code
  assert len(box.calls("train")) == 2
  assert f"worker pod-w-1 of pod ended first, with {code}" in done.stderr
  assert f"error: pod-w-1 ends with {code}" in done.stdout
  folder = box.state / "homes" / "pod-w-0" / "sora_jax" / "pod" / "attempt_0001"
  assert (folder / "exit_code").read_text().startswith("42 ")  # by SIGTERM, so that it could save


def test_restarts_are_bounded(box):
  box.set(ends={"*": [43]})
  done = box.run("tpu_run.sh", *BASE, "--max_restarts=1")
  assert done.returncode == 43
  assert len(box.calls("train")) == 2 and "giving up" in done.stderr


def test_reuses_and_tears_down(box):
  assert box.run("tpu_run.sh", *BASE).returncode == 0
  done = box.run("tpu_run.sh", *BASE, "--teardown_at_end")
  assert done.returncode == 0 and len(box.argv("create")) == 1
  assert len(box.argv("delete")) == 1 and not list(box.state.glob("homes/*"))
  assert [call["resumed"] for call in box.calls("train")] == [0, 10]


def test_queued_resource_becomes_active(box):
  box.set(queue_polls=3)
  done = box.run("tpu_run.sh", *BASE, "--queued", "--spot", "--teardown_at_end")
  assert done.returncode == 0, done.stderr
  create = box.argv("queued-resources", "create")
  assert len(create) == 1 and {"--node-id=pod", "--spot"} < set(create[0])
  assert len(box.argv("queued-resources", "describe")) >= 4 and "WAITING_FOR_RESOURCES" in done.stderr
  assert len(box.argv("queued-resources", "delete", "--force")) == 1


def test_a_queued_resource_that_fails(box):
  box.set(queue_polls=1, queue_fails=True)
  done = box.run("tpu_run.sh", *BASE, "--queued")
  assert done.returncode == 2 and "no such quota" in done.stderr and not box.calls("train")


def test_slices_train_together_and_one_is_preempted(box):
  box.set(hosts=2, ends={"pod-1-w-0": ["preempt", 0], "*": ["wait", 0]})
  done = box.run("tpu_run.sh", *BASE, "--num_slices=2", "--spot")
  assert done.returncode == 0, done.stderr
  hosts = ["pod-0-w-0", "pod-1-w-0"]
  ends = {host: [c["resumed"] for c in box.calls("train") if c["host"] == host] for host in hosts}
  assert all(resumed[-1] == 10 for resumed in ends.values()), ends
  assert len(box.argv("queued-resources", "create")) == 2
  logs = box.repository / "runs" / "pod" / "logs"
  assert set(hosts) <= {path.name for path in logs.iterdir()}


def test_a_bucket_that_may_not_be_read(box):
  box.set(forbidden_buckets=["bucket"])
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == 2 and not box.calls("train")
  assert "gs://bucket cannot be mounted" in done.stderr


def test_detach_and_attach_again(box):
  """Ctrl-C leaves the run going; the same command finds it, and does not start a second."""
  box.set(ends={"*": ["wait", 0]})
  first = box.start("tpu_run.sh", *BASE)
  box.wait_for_trainers(first)
  first.send_signal(signal.SIGINT)
  _, said = first.communicate(timeout=PATIENCE_S)
  assert first.returncode == 130 and "Attach again: bash launch/tpu_run.sh --name=pod" in said
  second = box.start("tpu_run.sh", *BASE)
  said = ""
  while "attached to run pod, attempt 1" not in said and (line := second.stderr.readline()):
    said += line
  assert "attached to run pod, attempt 1" in said
  assert len(box.calls("train")) == 1
  for pid in box.state.glob("homes/*/sora_jax/pod/attempt_0001/pid"):
    subprocess.run(["kill", "-TERM", pid.read_text().strip()], check=True)  # as a shutdown does
  second.communicate(timeout=PATIENCE_S)
  assert second.returncode == 0
  assert len(box.calls("train")) == 2  # 42, so attempt 2


def test_a_trace_is_asked_of_all_workers(box):
  """And the run goes on as before."""
  done = box.run("tpu_run.sh", *PLACE, "--trace")
  assert done.returncode == 2 and "error: not all" in done.stderr
  box.set(workers=2, ends={"*": ["wait", 0]})
  running = box.start("tpu_run.sh", *BASE)
  box.wait_for_trainers(running, 2)
  done = box.run("tpu_run.sh", *PLACE, "--trace")
  assert done.returncode == 0 and "profile/ in the workdir" in done.stderr, done.stderr
  box.wait_for(running, lambda: len(box.calls("traced")) == 2)
  assert {call["host"] for call in box.calls("traced")} == {"pod-w-0", "pod-w-1"}
  assert len(box.calls("train")) == 2
  for pid in box.state.glob("homes/*/sora_jax/pod/attempt_0001/pid"):
    subprocess.run(["kill", "-TERM", pid.read_text().strip()], check=True)
  running.communicate(timeout=PATIENCE_S)
  assert running.returncode == 0 and len(box.calls("train")) == 4  # 42, so attempt 2


def test_a_worker_killed_with_its_supervisor_is_noticed(box):
  box.set(ends={"*": ["wait", 0]})
  running = box.start("tpu_run.sh", *BASE)
  pids = lambda: any(p.read_text() for p in box.state.glob("homes/*/sora_jax/pod/attempt_0001/pid"))  # noqa: E731
  box.wait_for(running, lambda: box.calls("train") and pids())
  box.end()
  _, said = running.communicate(timeout=PATIENCE_S)
  assert running.returncode == 0 and "137, killed" in said


def real_python(box) -> str:
  """This interpreter; XLA flags of TPUs are of no use to it."""
  path = box.state / "bin" / "real_python"
  path.write_text(f'#!/bin/sh\n[ "$2" != sora_jax.xla_flags ] || exit 0\nexec {sys.executable} "$@"\n')
  path.chmod(0o755)
  return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_real_trainer_is_preempted_and_resumes(tmp_path, workers):
  """Processes of sora_jax.train, joined as on a slice; the machines go away after a checkpoint."""
  repository = make_repository(tmp_path / "repository", "sora_jax", "data_pipelines")
  box = make_sandbox(repository, tmp_path / "state")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  env = {"SORA_JAX_PYTHON": real_python(box), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device}
  env |= {"COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": str(workers), "PROCESS_ID": "WORKER"}
  box.set(workers=workers, remote_env=env)
  flags = [f"--config.train.{key}" for key in ("num_steps=200", "save_every=20", "log_every=1")]
  running = box.start("tpu_run.sh", *BASE, "--spot", "--", *flags, "--config.sample.num_samples=0")
  workdir = box.state / "buckets" / "bucket" / "a run"
  try:
    deadline = time.monotonic() + 300
    # A checkpoint on its way has a longer name.
    while not any(p.name.isdigit() for p in workdir.glob("checkpoints/*")) and time.monotonic() < deadline:
      assert running.poll() is None, running.communicate()
      time.sleep(0.2)
    before = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    (box.state / "nodes" / "pod.json").write_text('{"state": "PREEMPTED", "workers": 0}')
    box.end()
    out, said = running.communicate(timeout=400)
  finally:
    running.kill()
    box.end()
  assert running.returncode == 0, said + out
  assert before < 200 and "PREEMPTED" in said and "attempt 2" in said
  steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert steps.count(1) == 1 and set(range(1, 201)) <= set(steps)  # not from scratch, and to the end
  log = (repository / "runs" / "pod" / "logs" / "pod-w-0" / "attempt_0002" / "train.log").read_text()
  assert f"commit {git(repository, 'rev-parse', 'HEAD')}" in log
