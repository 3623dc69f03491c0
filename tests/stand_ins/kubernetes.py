"""kubectl runs the pods of a JobSet here, and again where the manifest itself says so; xpk and docker."""

import json
import os
import subprocess
import sys

import yaml

from tests.stand_ins.state import STATE, fail, options, record, scenario


def run_pods(name: str, spec: dict) -> list[dict]:
  """All pods of all slices once, in a copy of the image: the repository that the test names."""
  pods = []
  for job in spec["replicatedJobs"]:
    job_spec = job["template"]["spec"]
    pod = job_spec["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    for volume in pod["volumes"]:
      bucket = volume["csi"]["volumeAttributes"]["bucketName"]
      assert mounts[volume["name"]] == f"/buckets/{bucket}"
      (STATE / "buckets" / bucket).mkdir(parents=True, exist_ok=True)
    for index in range(job["replicas"] * job_spec["completions"]):
      host = f"{name}-{index}"
      env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
      env |= {variable["name"]: variable["value"].replace("$$(", "$(") for variable in container["env"]}
      env |= {"SORA_JAX_HOST": host, "SORA_JAX_BUCKETS": str(STATE / "buckets"), "SORA_JAX_COMMIT": "built"}
      env["PYTHON"] = str(STATE / "bin" / "python3.12")
      words = container["command"] + [arg.replace("$$(", "$(") for arg in container["args"]]
      done = subprocess.run(
        words, env=env, cwd=scenario("image"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      (STATE / f"log_{host}").write_text(done.stdout)
      pods.append({"name": host, "code": done.returncode % 256, "ended": f"2026-01-01T00:00:{index:02}Z"})
  return pods


def apply(manifest: dict) -> None:
  spec, name = manifest["spec"], manifest["metadata"]["name"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  # https://kubernetes.io/docs/tasks/job/pod-failure-policy wants both.
  assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
  codes = rule["onExitCodes"]["values"]
  assert len(codes) <= 255 and 0 not in codes
  assert spec["failurePolicy"]["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  state = "Failed"
  for _ in range(spec["failurePolicy"]["maxRestarts"] + 1):
    pods = run_pods(name, spec)
    failed = [pod["code"] for pod in pods if pod["code"]]
    if not failed:
      state = "Completed"
    if not failed or any(code not in codes for code in failed):
      break
  (STATE / "jobset.json").write_text(json.dumps({"state": state, "pods": pods}))


def kubectl(argv: list[str]) -> None:
  plain, flags = options(argv)
  jobset = STATE / "jobset.json"
  match plain:
    case ["apply"]:
      if error := scenario("apply_error"):
        fail(error)
      with open(flags["filename"]) as file:
        apply(yaml.safe_load(file))
    case ["get", "jobset", _]:
      print(json.loads(jobset.read_text())["state"])
    case ["get", "pods"]:
      for pod in json.loads(jobset.read_text())["pods"]:
        if flags["output"] == "name":
          print(f"pod/{pod['name']}")
        else:
          print(pod["ended"], pod["code"], pod["name"])
    case ["logs", pod]:
      print((STATE / f"log_{pod.removeprefix('pod/')}").read_text())


def main(argv: list[str]) -> None:
  tool = os.environ["TOOL"]
  record(tool, argv, stdin=len(sys.stdin.buffer.read()) if tool == "docker" and argv[-1] == "-" else 0)
  if tool == "kubectl":
    kubectl(argv)
  elif error := scenario("errors", {}).get(f"{tool} {argv[0]}"):
    fail(error)


if __name__ == "__main__":
  main(sys.argv[1:])
