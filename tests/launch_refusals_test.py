"""Mistakes and refusals of launch/tpu_run.sh: one line with the remedy, nothing created or asked twice."""

import json
import shutil
import sys

import pytest

from tests.stand_ins.sandbox import BASE, PLACE, commands, git, make_repository, make_sandbox

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="no git: the code is sent at its commit")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def box(repository, tmp_path):
  sandbox = make_sandbox(repository, tmp_path / "state")
  yield sandbox
  sandbox.end()


@pytest.mark.parametrize(
  "changed,says",
  [
    ("--name=Pod; rm -rf x", "is not a name"),
    ("--zone=us", "is not a zone"),
    ("--project=", "--project is needed"),
    ("--topology=v5p:4x", "is not a topology"),
    ("--topology=v5p:4x4", "v5p has 3 dimensions"),
    ("--topology=tpu7x:4x4x4", "only on GKE"),
    ("--config=configs/none.py", "there is no configs/none.py"),
    ("--config=../x.py", "name a file of the repository"),
    ("--workdir=runs/x", "all workers must see it"),
    ("--num_slices=0", "is not a whole number above 0"),
    ("--run_id=a/b", "is not a run id"),
    ("--accelerator=v5p-8", "exclude each other"),
    ("--color=red", "unknown option --color=red"),
  ],
)
def test_refuses_in_one_line(box, changed, says):
  done = box.run("tpu_run.sh", *BASE, changed, "--dry_run")
  assert done.returncode == 2 and not done.stdout
  assert says in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")


def test_refuses_what_is_not_committed(tmp_path):
  box = make_sandbox(make_repository(tmp_path / "repository"), tmp_path / "state")
  changed = box.repository / "configs" / "quickstart.py"
  changed.write_text(changed.read_text() + "# changed\n")
  done = box.run("tpu_run.sh", *BASE, "--dry_run")
  assert done.returncode == 2
  assert "configs/quickstart.py" in done.stderr and "--allow_dirty" in done.stderr
  lines = commands(box.run("tpu_run.sh", *BASE, "--dry_run", "--allow_dirty"))
  tree = next(line for line in lines if line[0] == "git")[-1]
  head = git(box.repository, "rev-parse", "HEAD")
  assert tree != head and "# changed" in git(box.repository, "show", f"{tree}:configs/quickstart.py")
  assert any(f"SORA_JAX_COMMIT={head}-dirty" in line for line in lines)


def test_no_quota_ends_at_once(box):
  box.set(create_errors=["ERROR: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded. Limit: 0"] * 9)
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == 2 and len(box.argv("create")) == 1
  assert "Limit: 0" in done.stderr and "quota" in done.stderr.splitlines()[-1]


# What Google says, and what is then said of it.
LOGIN = "run gcloud auth login"
HOPELESS = {
  "(gcloud.compute.tpus) You do not currently have an active account selected.": LOGIN,
  "There was a problem refreshing your current auth tokens: Reauthentication failed.": LOGIN,
  "SERVICE_DISABLED: Cloud TPU API has not been used in project mine": "gcloud services enable tpu.goo",
  "PERMISSION_DENIED: Permission denied on 'locations/us-east5-a' (or may not exist)": "there is no zone",
  "PERMISSION_DENIED: The caller does not have permission": "have it given the role roles/tpu.admin",
}


@pytest.mark.parametrize("verb", ["describe", "create", "delete"])
@pytest.mark.parametrize("problem", HOPELESS)
def test_what_cannot_be_helped_ends_at_once(box, verb, problem):
  """One line with the remedy, at the first question; nothing is made, and nothing is asked twice."""
  box.set(errors={verb: f"ERROR: {problem}"})
  done = box.run("tpu_run.sh", *BASE, *(["--teardown"] if verb == "delete" else []))
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error: ") and HOPELESS[problem] in last, done.stderr
  assert len(box.argv(verb)) == 1 and not box.argv("ssh") and not list(box.state.glob("nodes/*"))


@pytest.mark.parametrize(
  "problem",
  [
    "Cloud TPU received a bad request. the accelerator v5p-8 was not found in zone us-east5-a [EID: 0x1]",
    "INVALID_ARGUMENT: CloudTpu received an invalid AcceleratorType",
  ],
)
def test_a_zone_without_the_type_is_one_line(box, problem):
  box.set(create_errors=[f"ERROR: {problem}"] * 9)
  done = box.run("tpu_run.sh", *BASE)
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and len(box.argv("create")) == 1
  assert (
    "error: zone us-east5-a has no v5p:2x2x2" in last and "accelerator-types list --zone=us-east5-a" in last
  )


def test_without_gcloud_it_says_so(box):
  path = box.path_without("gcloud")
  done = box.run("tpu_run.sh", *BASE, PATH=path)
  assert done.returncode == 2 and done.stderr.startswith("error: gcloud is not on the PATH: install it")
  assert box.run("tpu_run.sh", *BASE, "--dry_run", PATH=path).returncode == 0


def put_node(box, state: str) -> None:
  (box.state / "nodes").mkdir()
  (box.state / "nodes" / "pod.json").write_text(json.dumps({"state": state, "workers": 1}))


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED"])
def test_a_machine_that_is_there_but_off(box, state):
  """Of a run before: started again where it can be, else made anew."""
  put_node(box, state)
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == 0 and f"pod is {state}" in done.stderr, done.stderr
  assert len(box.calls("train")) == 1
  made, gone, started = (len(box.argv("tpu-vm", verb)) for verb in ("create", "delete", "start"))
  assert (made, gone, started) == ((0, 0, 1) if state == "STOPPED" else (1, 1, 0))


def test_a_machine_that_cannot_be_started_for_want_of_capacity(box):
  put_node(box, "STOPPED")
  box.set(errors={"start": "There is no more capacity in the zone"})
  done = box.run("tpu_run.sh", *BASE, SORA_JAX_CREATE_TRIES="2")
  assert done.returncode == 2 and len(box.argv("start")) == 2
  assert done.stderr.splitlines()[-1].startswith("error: pod could not be started in 2 tries; try later")


def test_teardown_says_whether_anything_is_left(box):
  assert "nothing to delete" in box.run("tpu_run.sh", *PLACE, "--teardown").stderr
  box.set(ends={"*": [44]}, errors={"delete": "ERROR: INTERNAL"})
  done = box.run("tpu_run.sh", *BASE, "--teardown_at_end")
  assert done.returncode == 44 and "it costs money" in done.stderr  # of the run, not of the deletion
  done = box.run("tpu_run.sh", *PLACE, "--teardown")
  assert done.returncode == 2 and "was not deleted (above)" in done.stderr.splitlines()[-1]


def test_no_capacity_is_asked_for_again(box):
  box.set(create_errors=["There is no more capacity in the zone"] * 2)
  done = box.run("tpu_run.sh", *BASE)
  assert done.returncode == 0 and len(box.argv("create")) == 3
  box.set(create_errors=["There is no more capacity in the zone"] * 99)
  box.run("tpu_run.sh", *PLACE, "--teardown")
  done = box.run("tpu_run.sh", *BASE, SORA_JAX_CREATE_TRIES="3")
  assert done.returncode == 2 and "could not be had in 3 tries" in done.stderr


# --- the config, before anything is created


REFUSED = "error: config.model has no key heds; it has ..."


@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_wrong_config_is_said_before_anything_is_made(box, dry):
  box.set(check_code=2, check_says=f"some warning\n{REFUSED}")
  done = box.run("tpu_run.sh", *BASE, "--num_slices=2", *dry, "--", "--config.model.heds=1")
  assert done.returncode == 2 and done.stderr == REFUSED + "\n" and not done.stdout
  (asked,) = box.calls("check")
  assert {"--check_devices=16", "--check_slices=2", "--config.model.heds=1", BASE[-2]} < set(asked["argv"])
  assert not box.calls("gcloud")


def test_without_the_packages_the_config_is_not_checked(box):
  """Said so; a Python that fails by itself is no mistake in the config either."""
  done = box.run("tpu_run.sh", *BASE, "--dry_run", SORA_JAX_PYTHON="", PATH=box.path_without("python3.12"))
  assert done.returncode == 0 and "shows on the machines only" in done.stderr and not box.calls("check")


def test_a_python_that_fails_checks_nothing(box):
  box.set(check_code=1, check_says="ImportError: libfoo")
  done = box.run("tpu_run.sh", *BASE, "--dry_run")
  assert done.returncode == 0 and "not checked" in done.stderr and "ImportError: libfoo" in done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return make_repository(tmp_path_factory.mktemp("whole"), "sora_jax", "data_pipelines")


@pytest.mark.parametrize(
  "changed,says",
  [
    (["--config=configs/quickstart.py:none"], "has no preset 'none'"),
    (["--", "--config.model.heds=1"], "the config has no key config.model.heds"),
    (["--", "--config.mesh.fsdp=3"], "needs 3 devices, but there are 8"),
    (["--num_slices=2"], "mesh axis replica=1 is not a multiple of the 2 slices"),
  ],
)
def test_the_trainer_itself_reads_the_config(whole, tmp_path, changed, says):
  box = make_sandbox(whole, tmp_path / "state")
  done = box.run("tpu_run.sh", *BASE, "--dry_run", *changed, SORA_JAX_PYTHON=sys.executable)
  assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
  "script,flags,devices",
  [
    ("slurm_run.sh", ("--workdir=/shared/run", "--nodes=2", "--gpus_per_node=8"), 16),
    ("gke_run.sh", ("--name=pod", "--topology=tpu7x:2x2x2", "--workdir=gs://b/r", "--image=i"), 16),
  ],
)
def test_the_other_scripts_check_it_too(box, script, flags, devices):
  box.set(check_code=2, check_says=REFUSED)
  done = box.run(script, "--config=configs/quickstart.py", *flags)
  assert done.returncode == 2 and done.stderr == REFUSED + "\n"
  assert f"--check_devices={devices}" in box.calls("check")[0]["argv"]
  assert not box.calls("sbatch") and not box.calls("kubectl")
