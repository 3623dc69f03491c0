"""Several processes as one program."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize_from_env() -> None:
  """Joins the other processes where the environment names any; must run before any device is used.

  COORDINATOR_ADDRESS=host:port with NUM_PROCESSES and PROCESS_ID names them; SORA_JAX_DISTRIBUTED=1 lets JAX
  find the cluster itself (TPU pod, SLURM, GKE).
  """
  env = os.environ
  if address := env.get("COORDINATOR_ADDRESS"):
    missing = [name for name in ("NUM_PROCESSES", "PROCESS_ID") if name not in env]
    if missing:
      raise ValueError(f"COORDINATOR_ADDRESS is set but {' and '.join(missing)} not; set all three or none")
    if env.get("JAX_PLATFORMS") == "cpu":
      jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A dead peer is noticed after the heartbeat; the default of 100 s holds the others for as long.
    jax.distributed.initialize(
      address, int(env["NUM_PROCESSES"]), int(env["PROCESS_ID"]), heartbeat_timeout_seconds=30
    )
  elif env.get("SORA_JAX_DISTRIBUTED") == "1":
    jax.distributed.initialize(heartbeat_timeout_seconds=30)


def is_main() -> bool:
  return jax.process_index() == 0


def to_global(batch, shardings, rows: int):
  """A batch of this process's rows (numpy) -> global arrays; `rows` counts those of all processes."""

  def one(x, sharding):
    x = np.asarray(x)
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

  return jax.tree.map(one, batch, shardings)


def scalars_over_processes(*values: float) -> list[float]:
  """The sum of each value over all processes; a collective, so every process must call it."""
  if jax.process_count() == 1:
    return [float(v) for v in values]
  return [float(v) for v in multihost_utils.process_allgather(np.asarray(values, np.float32)).sum(0)]


def over_processes(x: np.ndarray) -> np.ndarray:
  """The array of every process, stacked; a collective."""
  if jax.process_count() == 1:
    return x[None]
  return multihost_utils.process_allgather(x.astype(np.float32))


def preempted(step: int, local: bool) -> bool:
  """Whether any process was told to stop; several processes agree on the step."""
  if jax.process_count() == 1:
    return local
  return multihost_utils.reached_preemption_sync_point(step)


def host_scalar(value, sharding):
  """A host number as a replicated global array, placed explicitly so that the transfer guard allows it."""
  x = np.asarray(value)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def barrier(name: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
