"""gcloud compute tpus: nodes and queued resources are files, a worker is a folder where ssh runs commands."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.stand_ins.state import STATE, count, fail, options, record, scenario

KNOWN = {
  "tpu-vm create": {"version", "accelerator-type", "type", "topology", "spot", "reserved", "network"},
  "tpu-vm delete": set(),
  "tpu-vm start": set(),
  "tpu-vm describe": {"format"},
  "tpu-vm ssh": {"worker", "command", "output-directory", "tunnel-through-iap"},
  "tpu-vm scp": {"worker", "tunnel-through-iap"},
  "queued-resources create": {
    "runtime-version", "accelerator-type", "type", "topology", "spot", "reserved", "node-id", "node-count",
    "node-prefix",
  },
  "queued-resources delete": {"force"},
  "queued-resources describe": {"format"},
}  # fmt: skip


def file_of(kind: str, name: str) -> Path:
  path = STATE / kind / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  return path


def get(kind: str, name: str) -> dict:
  path = file_of(kind, name)
  if not path.is_file():
    fail(f"ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/{kind}/{name}' was not found")
  return json.loads(path.read_text())


def put(kind: str, name: str, **values) -> None:
  file_of(kind, name).write_text(json.dumps(values))


def home(node: str, worker: int) -> Path:
  return STATE / "homes" / f"{node}-w-{worker}"


def add_node(name: str) -> None:
  put("nodes", name, state="READY", workers=scenario("workers", 1))
  for worker in range(scenario("workers", 1)):
    home(name, worker).mkdir(parents=True, exist_ok=True)


def drop_node(name: str) -> None:
  file_of("nodes", name).unlink(missing_ok=True)
  for pid in (STATE / "homes").glob(f"{name}-w-*/sora_jax/*/attempt_*/pid"):
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(pid.read_text()), signal.SIGKILL)
  for folder in (STATE / "homes").glob(f"{name}-w-*"):
    shutil.rmtree(folder, ignore_errors=True)


def create(kind: str, name: str, flags: dict) -> None:
  errors = scenario("create_errors", [])
  if (tried := count("create")) < len(errors):
    fail(errors[tried])
  if kind == "tpu-vm":
    add_node(name)
  else:
    n = int(flags.get("node-count", "1"))
    names = [f"{flags['node-prefix']}-{i}" for i in range(n)] if n > 1 else [flags["node-id"]]
    put("queues", name, nodes=names, polls=scenario("queue_polls", 0))


def describe_queue(name: str) -> str:
  queue = get("queues", name)
  if queue["polls"] > 0:
    put("queues", name, nodes=queue["nodes"], polls=queue["polls"] - 1)
    return "WAITING_FOR_RESOURCES" if queue["polls"] > 1 else "PROVISIONING"
  if scenario("queue_fails"):
    return "FAILED"
  for node in queue["nodes"]:
    if not file_of("nodes", node).is_file():
      add_node(node)
    if get("nodes", node)["state"] == "PREEMPTED":
      return "SUSPENDED"
  return "ACTIVE"


def workers(node: str, flags: dict) -> list[int]:
  found = get("nodes", node)
  if found["state"] != "READY":
    fail(f"ERROR: (gcloud) cannot connect: {node} is {found['state']}", 255)
  return list(range(found["workers"])) if flags["worker"] == "all" else [int(flags["worker"])]


def ssh(node: str, flags: dict) -> None:
  running = []
  for worker in workers(node, flags):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "SORA_JAX_PYTHON")}
    env |= {"HOME": str(home(node, worker)), "SORA_JAX_HOST": f"{node}-w-{worker}"}
    env |= {k: v.replace("WORKER", str(worker)) for k, v in scenario("remote_env", {}).items()}
    running.append(
      subprocess.Popen(
        ["bash", "-c", flags["command"]], cwd=home(node, worker), env=env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
      )
    )  # fmt: skip
  for worker, process in enumerate(running):
    out, problems = process.communicate()
    # The connection ends, and all that is of it.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    print(problems, end="", file=sys.stderr)
    if folder := flags.get("output-directory"):
      Path(folder, f"{worker}.log").write_text("SSH: attempting to connect\n" + out)
    else:
      print(out, end="", flush=True)
  sys.exit(max(process.returncode for process in running))


def scp(node: str, sources: list[str], flags: dict) -> None:
  for worker in workers(node, flags):
    for source in sources:
      shutil.copy(source, home(node, worker))


def main(argv: list[str]) -> None:
  record("gcloud", argv)
  assert argv[:2] == ["compute", "tpus"], argv
  kind, verb, *rest = argv[2:]
  plain, flags = options(rest)
  unknown = set(flags) - KNOWN[f"{kind} {verb}"] - {"zone", "project", "quiet"}
  assert not unknown and {"zone", "project", "quiet"} <= set(flags), (argv, unknown)
  if error := scenario("errors", {}).get(verb):
    fail(error)
  match kind, verb:
    case "tpu-vm", "start":
      get("nodes", plain[0])
      add_node(plain[0])
    case _, "create":
      create(kind, plain[0], flags)
    case "tpu-vm", "describe":
      print(get("nodes", plain[0])["state"])
    case "queued-resources", "describe":
      print(describe_queue(plain[0]) if "format" in flags else "error: no such quota")
    case "tpu-vm", "delete":
      get("nodes", plain[0])
      drop_node(plain[0])
    case "queued-resources", "delete":
      for node in get("queues", plain[0])["nodes"]:
        drop_node(node)
      file_of("queues", plain[0]).unlink()
    case "tpu-vm", "ssh":
      ssh(plain[0], flags)
    case "tpu-vm", "scp":
      scp(plain[-1].rstrip(":"), plain[:-1], flags)


if __name__ == "__main__":
  main(sys.argv[1:])
