"""launch/gke_run.sh: its JobSet, run by a kubectl that follows the manifest's own rules; XPK; the image."""

import re
import shlex
import shutil

import pytest

from tests.stand_ins.sandbox import ROOT, git, make_repository, make_sandbox

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="no git: the code is sent at its commit")
BASE = (
  "--name=pod", "--topology=v6e:2x4", "--config=configs/quickstart.py:debug", "--workdir=gs://bucket/a 'run'",
  "--image=us-docker.pkg.dev/p/r/sora:1",
)  # fmt: skip
XPK = ("--backend=xpk", "--cluster=c", "--zone=us-east5-a", "--project=p")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def box(repository, tmp_path):
  sandbox = make_sandbox(repository, tmp_path / "state")
  sandbox.set(image=str(repository))
  return sandbox


def rendered(box, *args: str) -> dict:
  done = box.run("gke_run.sh", "--dry_run", *args)
  assert done.returncode == 0, done.stderr
  assert not box.calls("kubectl")
  return yaml.safe_load(done.stdout.split("<<'JOBSET'\n")[1].split("\nJOBSET\n")[0])


@pytest.mark.parametrize(
  "topology,accelerator,dims,hosts",
  [
    ("v5e:4x4", "tpu-v5-lite-podslice", "4x4", 4),
    ("v5p:4x4x4", "tpu-v5p-slice", "4x4x4", 16),
    ("v6e:8x8", "tpu-v6e-slice", "8x8", 16),
    ("tpu7x:2x2x2", "tpu7x", "2x2x2", 2),
  ],
)
def test_the_jobset_of_a_topology(box, topology, accelerator, dims, hosts):
  manifest = rendered(box, *BASE, f"--topology={topology}", "--num_slices=2")
  (job,) = manifest["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  assert job["replicas"] == 2
  (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [42, 43, *range(127, 256)]
  assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"] == hosts
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": dims,
  }
  assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}


def test_optional_parts_of_the_jobset(box):
  bare = rendered(box, *BASE)
  pod = bare["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert len(pod["spec"]["volumes"]) == 1
  assert "serviceAccountName" not in pod["spec"]
  full = rendered(box, *BASE, "--spot", "--queue=q", "--service_account=trainer", "--namespace=ns")
  pod = full["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert (
    full["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q" and full["metadata"]["namespace"] == "ns"
  )
  assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["spec"]["serviceAccountName"] == "trainer"
  assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"


def test_odd_values_stay_what_they_are(box):
  """Into YAML, through Kubernetes' own $(NAME), to the trainer."""
  odd = "--config.data.source=@IMAGE@ & $(HOME) 'x' \"y\" \\n \\ #: {}"
  manifest = rendered(box, *BASE, "--", odd)
  assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
    "args"
  ] == [odd.replace("$(", "$$(")]
  done = box.run("gke_run.sh", *BASE, "--follow", "--", odd)
  assert done.returncode == 0, done.stderr
  workdir = f"{box.state}/buckets/bucket/a 'run'"
  assert box.calls("train")[0]["argv"] == [
    "--config=configs/quickstart.py:debug",
    f"--workdir={workdir}",
    odd,
  ]


def test_a_run_to_its_end(box):
  done = box.run("gke_run.sh", *BASE, "--follow")
  assert done.returncode == 0 and "pod: done" in done.stderr
  trained = box.calls("train")
  assert sorted(call["host"] for call in trained) == ["pod-0", "pod-1"]
  env = trained[0]["env"]
  assert (
    env["SORA_JAX_RUN_ID"] == "pod"
    and env["SORA_JAX_COMMIT"] == "built"
    and env["SORA_JAX_DISTRIBUTED"] == "1"
  )
  assert env["LIBTPU_INIT_ARGS"] == "--xla_for=v6e --xla_other=true"
  logs = box.run("collect_logs.sh", "--kind=gke", "--name=pod", f"--output_dir={box.state}/logs")
  assert logs.returncode == 0, logs.stderr
  assert "resumed from step 0" in (box.state / "logs" / "pod-1" / "train.log").read_text()


@pytest.mark.parametrize("code", [42, 43, 134, 137])
def test_restarts(box, code):
  box.set(image=str(box.repository), ends={"pod-0": [code, 0]})
  assert box.run("gke_run.sh", *BASE, "--follow").returncode == 0
  assert [call["resumed"] for call in box.calls("train") if call["host"] == "pod-0"] == [0, 10]


@pytest.mark.parametrize("code", [1, 2, 44])
def test_does_not_restart_and_shows_why(box, code):
  box.set(image=str(box.repository), ends={"pod-1": [code, 0]})
  done = box.run("gke_run.sh", *BASE, "--follow")
  assert done.returncode == code
  assert len(box.calls("train")) == 2
  assert f"pod pod-1 ended first, with {code}" in done.stderr
  assert f"error: pod-1 ends with {code}" in done.stdout


def test_restarts_are_bounded(box):
  box.set(image=str(box.repository), ends={"*": [43]})
  assert box.run("gke_run.sh", *BASE, "--max_restarts=1", "--follow").returncode == 43
  assert len(box.calls("train")) == 2 * 2


def test_builds_the_commit(box):
  assert box.run("gke_run.sh", *BASE, "--build").returncode == 0
  build, push = (call for call in box.calls("docker"))
  assert f"COMMIT={git(box.repository, 'rev-parse', 'HEAD')}" in build["argv"] and build["stdin"] > 10_000
  assert push["argv"] == ["push", "us-docker.pkg.dev/p/r/sora:1"]


def test_the_dockerfile_names_what_is_there():
  text = (ROOT / "launch" / "templates" / "Dockerfile").read_text()
  (pins,) = re.findall(r"COPY (launch\S+)", text)
  version = re.search(r"python:3\.(\d+)", text)[1]
  assert pins == f"launch/requirements/py3{version}.txt" and (ROOT / pins).is_file()
  assert (ROOT / re.search(r'"(launch/\S+\.sh)", "pod"', text)[1]).is_file()


def test_xpk(box):
  flag = "--config.data.source=it's"
  done = box.run("gke_run.sh", *BASE, *XPK, "--num_slices=2", "--", flag)
  assert done.returncode == 0, done.stderr
  assert "gs://bucket must be attached" in done.stderr and not box.calls("kubectl")
  (call,) = box.calls("xpk")
  wanted = {
    "--workload=pod", "--cluster=c", "--tpu-type=v6e-8", "--num-slices=2", "--restart-on-exit-codes=43",
    "--max-restarts=50", "--docker-image=us-docker.pkg.dev/p/r/sora:1",
  }  # fmt: skip
  assert wanted < set(call["argv"]) and call["argv"][:2] == ["workload", "create"]
  command = next(arg for arg in call["argv"] if arg.startswith("--command="))[len("--command=") :]
  words = shlex.split(command)
  assert words[-4:] == ["bash", "launch/lib_worker.sh", "pod", flag]
  assert "SORA_JAX_WORKDIR=gs://bucket/a 'run'" in words


def test_teardown(box):
  assert box.run("gke_run.sh", "--name=pod", "--teardown").returncode == 0
  assert box.calls("kubectl")[0]["argv"][:3] == ["delete", "jobset", "pod"]
  assert box.run("gke_run.sh", "--name=pod", "--teardown", *XPK).returncode == 0
  assert box.calls("xpk")[0]["argv"][:2] == ["workload", "delete"]


@pytest.mark.parametrize(
  "changed,says",
  [
    ("--name=a b", "is not a name"),
    ("--topology=v6e:8", "is not a topology"),
    ("--topology=v6e:3x3", "do not divide"),
    ("--image=a b", "is not the name of an image"),
    ("--workdir=gs://Bad Bucket/x", "is not a bucket"),
    ("--workdir=x", "name gs://BUCKET/RUN"),
    ("--workdir=/shared/x", "name gs://BUCKET/RUN"),
    ("--topology=v6e:4x4x4", "v6e has 2 dimensions"),
    ("--topology=v5p:4x4", "v5p has 3 dimensions"),
    ("--topology=v6e:32x8", "ends at 16x16"),
    ("--topology=v5p:3x4x4", "multiple of 4"),
    ("--backend=xpk", "--cluster is needed"),
  ],
)
def test_refuses_in_one_line(box, changed, says):
  done = box.run("gke_run.sh", *BASE, changed)
  assert done.returncode == 2 and not box.calls("kubectl")
  assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
  "problem,says",
  [
    ("error: You must be logged in to the server (Unauthorized)", "clusters get-credentials"),
    (
      'Get "http://localhost:8080/openapi/v2": dial tcp [::1]:8080: connect: connection refused',
      "clusters get-credentials",
    ),
    (
      'no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"',
      "has no JobSet controller: https://",
    ),
    ("JobSet is invalid: spec.replicatedJobs: field is immutable", "end it with --teardown"),
    ("quota exceeded", "kubectl refused "),
  ],
)
def test_what_kubectl_refuses_is_one_line_with_the_remedy(box, problem, says):
  box.set(apply_error=problem)
  done = box.run("gke_run.sh", *BASE, "--follow")
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2 and last.startswith("error: ") and says in last, done.stderr


def test_an_image_that_may_not_be_pushed(box):
  box.set(errors={"docker push": "denied: Permission artifactregistry.repositories.uploadArtifacts denied"})
  done = box.run("gke_run.sh", *BASE, "--build")
  assert (
    done.returncode == 2 and "gcloud auth configure-docker us-docker.pkg.dev" in done.stderr.splitlines()[-1]
  )
  assert not box.calls("kubectl")


def test_without_kubectl_it_says_so(box):
  done = box.run("gke_run.sh", *BASE, PATH=box.path_without("kubectl"))
  assert done.returncode == 2 and done.stderr.startswith("error: kubectl is not on the PATH")
