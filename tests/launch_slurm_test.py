"""launch/slurm_run.sh: what it would submit, and jobs that run, save, requeue, stop on a recording SLURM."""

import os
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.stand_ins.sandbox import PATIENCE_S, git, make_repository, make_sandbox

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="no git: the code is sent at its commit")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def box(repository, tmp_path):
  return make_sandbox(repository, tmp_path / "state")


def arguments(box, *more: str, gpus: int = 2) -> tuple[str, ...]:
  workdir = f"--workdir={box.state}/a 'run'"
  return (
    "--config=configs/quickstart.py",
    workdir,
    "--nodes=2",
    f"--gpus_per_node={gpus}",
    "--run_id=r",
    *more,
  )


def job_log(box) -> str:
  return (box.state / "a 'run'" / "slurm" / "r" / "job.log").read_text()


def test_dry_run(box):
  done = box.run(
    "slurm_run.sh",
    *arguments(box, "--time=24:00:00", "--partition=big", "--sbatch_flag=--qos=x y", "--dry_run"),
  )
  assert done.returncode == 0, done.stderr
  assert not box.calls("sbatch") and not (box.state / "a 'run'").exists()
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [line[0] for line in lines] == ["mkdir", "git", "tar", "ln", "env", "printf", "sbatch"]
  assert lines[4][-2:] == ["install", "cuda12"]
  wanted = {
    "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue", "--signal=TERM@120",
    "--time=24:00:00", "--partition=big", "--qos=x y", "--job-name=r",
  }  # fmt: skip
  assert wanted < set(lines[-1])


def test_dry_run_can_be_pasted(box):
  flag = "--config.data.source=$(touch oops) 'x' \"y\""
  done = box.run("slurm_run.sh", *arguments(box, "--dry_run", "--", flag))
  for line in done.stdout.splitlines():
    if not line.startswith(("env ", "sbatch ")):
      subprocess.run(["bash", "-c", line], check=True, cwd=box.state)
  env = box.state / "a 'run'" / "slurm" / "r" / "run.env"
  code = 'source "$1"; printf "%s" "${SORA_JAX_FLAGS[0]}"'
  read = subprocess.run(
    ["bash", "-c", code, "-", env], capture_output=True, text=True, check=True, cwd=box.state
  )
  assert read.stdout == flag and not (box.state / "oops").exists()
  assert (env.parent / "code" / "launch" / "lib_worker.sh").is_file()


@pytest.mark.parametrize(
  "changed,says",
  [
    ("--config=configs/none.py", "there is no configs/none.py"),
    ("--nodes=0", "is not a whole number above 0"),
    ("--gpus_per_node=", "--gpus_per_node is needed"),
    ("--time=soon", "is not a time limit"),
    ("--x=1", "unknown option --x=1"),
  ],
)
def test_refuses_in_one_line(box, changed, says):
  done = box.run("slurm_run.sh", *arguments(box, changed, "--dry_run"))
  assert done.returncode == 2 and not done.stdout and says in done.stderr.splitlines()[-1]


def test_a_job_to_its_end(box):
  flag = '--config.data.source=it\'s "here"'
  done = box.run("slurm_run.sh", *arguments(box, "--", flag))
  assert done.returncode == 0, done.stderr
  assert "job 4711 is submitted" in done.stderr
  trained = box.calls("train")
  assert sorted(call["host"] for call in trained) == ["n00", "n01", "n12", "n13"]  # a process for each GPU
  head = git(box.repository, "rev-parse", "HEAD")
  for call in trained:
    assert call["argv"] == ["--config=configs/quickstart.py", f"--workdir={box.state}/a 'run'", flag]
    assert call["env"]["SORA_JAX_COMMIT"] == head and call["env"]["SORA_JAX_DISTRIBUTED"] == "1"
    assert call["env"]["LIBTPU_INIT_ARGS"] is None and call["code"] == f"code-{head}"
  installs = [call["argv"] for call in box.calls("python") if call["argv"][1:3] == ["pip", "install"]]
  assert any(argv[-1].startswith("jax[cuda12]==") for argv in installs)
  logs = box.state / "a 'run'" / "slurm" / "r" / "start_0000"
  assert {path.name for path in logs.iterdir()} == {"n0.0", "n0.1", "n1.2", "n1.3"}
  assert "resumed from step 0" in (logs / "n1.2" / "train.log").read_text()


def test_time_limit_and_hang_requeue_and_resume(box):
  box.set(ends={"*": [42, 43, 0]})
  assert box.run("slurm_run.sh", *arguments(box, gpus=0)).returncode == 0
  assert len(box.calls("scontrol")) == 2
  assert [call["resumed"] for call in box.calls("train") if call["host"] == "n00"] == [0, 10, 20]
  assert "ended with 42: stopped from outside, saved" in job_log(box) and "ended with 0" in job_log(box)


def test_a_mistake_is_not_requeued_and_is_shown(box):
  box.set(ends={"n11": [2]})
  box.run("slurm_run.sh", *arguments(box, gpus=0))
  assert not box.calls("scontrol") and (box.state / "job_code").read_text() == "2"
  assert "first on n1.1" in job_log(box) and "error: n11 ends with 2" in job_log(box)


def test_restarts_are_bounded(box):
  box.set(ends={"*": [137]})
  box.run("slurm_run.sh", *arguments(box, "--max_restarts=1", gpus=0))
  assert len(box.calls("scontrol")) == 1 and (box.state / "job_code").read_text() == "137"
  assert "giving up" in job_log(box)


def test_scancel_saves_and_does_not_come_back(box):
  box.set(ends={"*": ["wait"]})
  running = box.start("slurm_run.sh", *arguments(box, gpus=0))
  box.wait_for_trainers(running, 2)
  os.kill(int((box.state / "job_pid").read_text()), signal.SIGTERM)
  running.communicate(timeout=PATIENCE_S)
  assert (box.state / "job_code").read_text() == "42" and not box.calls("scontrol")
  assert "not requeued" in job_log(box)


def test_a_refused_job(box):
  box.set(sbatch_error="sbatch: error: Invalid account")
  done = box.run("slurm_run.sh", *arguments(box, gpus=0))
  assert done.returncode == 2 and "Invalid account" in done.stderr


def test_without_slurm_it_says_so(box):
  (box.state / "bin" / "sbatch").unlink()
  done = box.run("slurm_run.sh", *arguments(box))
  assert done.returncode == 2 and done.stderr.startswith(
    "error: sbatch is not on the PATH: start this on a login"
  )
  assert not (box.state / "a 'run'").exists()


@pytest.mark.parametrize(
  "ends,code",
  [
    ("100 137 a\n140 1 b", 137),  # b lost its peer
    ("100 0 a\n101 2 b", 2),
    ("100 42 a\n100 42 b", 42),
    ("100 42 a\n102 44 b", 44),
    ("100 0 a\n100 0 b", 0),
    ("200 1 b\n100 134 a", 134),
  ],
)
def test_which_end_decides(repository, ends, code):
  script = 'source "$1/launch/lib_common.sh"; decide; echo "$CODE"'
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script, "-", repository], input=ends, capture_output=True, text=True
  )
  assert done.stdout.strip() == str(code), done.stderr


def test_what_no_job_could_use_is_refused(box):
  for more, message in (
    (("--workdir=gs://bucket/run",), "a path that all nodes share"),
    (("--", "--workdir=/x"), "sets --workdir itself"),
    (("--", "--config.seed", "1"), "--flag=VALUE"),
  ):
    done = box.run("slurm_run.sh", *arguments(box, *more))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not box.calls("sbatch")
