"""Which processes make up a run: from flags or the environment, joined and left in bounded time."""

import dataclasses
import importlib.util
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
from jax._src import distributed  # the key-value store has no public name

JOIN_S = 300  # where not all have started by then, the runtime aborts
HEARTBEAT_S = 30  # a dead peer is noticed after it; the default of JAX, 100 s, holds the others for as long
LEAVE_S = 60
PORT = 8476  # where a JobSet names the coordinator, but no port

NAMES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
  """How to join: the three facts, or the method by which JAX finds them."""

  source: str
  address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  method: str | None = None  # of JAX's own detection; None = whichever applies


def find(env: Mapping[str, str], *, flags: Mapping[str, object] | None = None, tpu: bool = False):
  """The cluster that flags or else the environment name; None for one process alone.

  In this order: the three flags; COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID (a JobSet or an indexed job
  of Kubernetes may leave the id, and a JobSet the address, to the names that it sets itself); SLURM with more
  than one task; a TPU of several workers (`tpu`: this machine has one); SORA_JAX_DISTRIBUTED=1: whatever JAX
  finds. SORA_JAX_DISTRIBUTED=0: none of the last three.
  """
  flags = {name: value for name, value in (flags or {}).items() if value is not None}
  if flags:
    return _explicit("flags", {name.upper(): str(value) for name, value in flags.items()}, style="--{}")
  given = {name: env.get(name) or env.get("JAX_" + name) for name in NAMES}
  given = {name: value for name, value in given.items() if value}
  if given:
    given = _kubernetes(env) | given if "NUM_PROCESSES" in given else given
    return _explicit("environment", given, style="{}")
  wanted = env.get("SORA_JAX_DISTRIBUTED", "")
  if wanted not in ("", "0", "1"):
    raise ValueError(f"SORA_JAX_DISTRIBUTED={wanted} must be 0 or 1")
  if wanted == "0":
    return None
  if _number(env, "SLURM_NTASKS") > 1 and "SLURM_PROCID" in env:
    missing = [n for n in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID") if n not in env]
    if missing:
      raise ValueError(
        f"SLURM_NTASKS={env['SLURM_NTASKS']} names several tasks but {' and '.join(missing)} is not set: "
        "start with srun, or set SORA_JAX_DISTRIBUTED=0 for one process alone"
      )
    return Cluster(source="SLURM", method="slurm")
  if tpu and "cpu" not in env.get("JAX_PLATFORMS", ""):
    workers = [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(workers) != 1 or "MEGASCALE_NUM_SLICES" in env:
      return Cluster(source="TPU")
  return Cluster(source="SORA_JAX_DISTRIBUTED=1") if wanted == "1" else None


def _kubernetes(env: Mapping[str, str]) -> dict[str, str]:
  """What an indexed job says of the process, and a JobSet of the coordinator (its first pod)."""
  found = {}
  if "JOB_COMPLETION_INDEX" in env:
    per_job, job = _number(env, "PROCESSES_IN_JOB"), _number(env, "JOB_INDEX")
    found["PROCESS_ID"] = str(_number(env, "JOB_COMPLETION_INDEX") + job * per_job)
  name, replicated = env.get("JOBSET_NAME"), env.get("REPLICATED_JOB_NAME")
  if name and replicated:
    found["COORDINATOR_ADDRESS"] = f"{name}-{replicated}-0-0.{name}:{PORT}"
  return found


def _explicit(source: str, given: Mapping[str, str], *, style: str) -> Cluster:
  shown = {name: style.format(name.lower() if style.startswith("-") else name) for name in NAMES}
  missing = [shown[name] for name in NAMES if name not in given]
  if missing:
    have = " and ".join(shown[name] for name in NAMES if name in given)
    raise ValueError(f"{have} given, but not {' and '.join(missing)}: set all three or none")
  numbers = {}
  for name in NAMES[1:]:
    try:
      numbers[name] = int(given[name])
    except ValueError:
      raise ValueError(f"{shown[name]}={given[name]!r} is not a number") from None
  count, index = numbers["NUM_PROCESSES"], numbers["PROCESS_ID"]
  if not 0 <= index < count:
    raise ValueError(f"{shown['PROCESS_ID']}={index} must be in 0..{count - 1}: there are {count} processes")
  address = given["COORDINATOR_ADDRESS"]
  if not address.rpartition(":")[2].isdigit() or not address.rpartition(":")[0]:
    raise ValueError(f"{shown['COORDINATOR_ADDRESS']}={address!r} must be host:port")
  return Cluster(source=source, address=address, num_processes=count, process_id=index)


def _number(env: Mapping[str, str], name: str) -> int:
  try:
    return int(env.get(name, "0") or 0)
  except ValueError:
    raise ValueError(f"{name}={env[name]!r} is not a number") from None


def has_tpu() -> bool:
  """Whether this machine holds a TPU chip: libtpu alone says nothing, it compiles without one too."""
  vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
  google = any(path.read_text().strip() == "0x1ae0" for path in vendors)
  return google and importlib.util.find_spec("libtpu") is not None


def join(cluster: Cluster | None) -> None:
  """Joins the other processes; must run before any device is used."""
  if cluster is None or jax.distributed.is_initialized():
    return
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  times = {
    "heartbeat_timeout_seconds": heartbeat_s(),
    "shutdown_timeout_seconds": LEAVE_S,
    "initialization_timeout": seconds("SORA_JAX_JOIN_S", JOIN_S),
  }
  try:
    if cluster.address:
      jax.distributed.initialize(cluster.address, cluster.num_processes, cluster.process_id, **times)
    else:
      jax.distributed.initialize(cluster_detection_method=cluster.method, **times)
  except (RuntimeError, ValueError, TypeError) as error:
    first = str(error).splitlines()[0]
    raise ValueError(f"could not join the other processes ({cluster.source}): {first}") from None


def heartbeat_s() -> int:
  return seconds("SORA_JAX_HEARTBEAT_S", HEARTBEAT_S)


def seconds(name: str, otherwise: int) -> int:
  """A time that the environment may set."""
  text = os.environ.get(name, str(otherwise))
  if not text.isdigit() or int(text) < 2:
    raise ValueError(f"{name}={text!r} must be a number of seconds >= 2")
  return int(text)


def client():
  """The key-value store of the run; None for one process alone. It works without any device."""
  return distributed.global_state.client


def size() -> tuple[int, int]:
  """(index of this process, number of processes), without touching a device."""
  state = distributed.global_state
  return (state.process_id, state.num_processes) if state.client else (0, 1)


def leave() -> None:
  """Leaves the others once all are done; in bounded time."""
  if client() is None:
    return
  # In a thread: the shutdown waits for all the others, and one of them may be dead.
  thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  thread.start()
  thread.join(LEAVE_S + 5)
