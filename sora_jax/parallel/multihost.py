"""Several processes as one program."""

import jax
import numpy as np
from jax.experimental import multihost_utils

_TEXT_BYTES = 256


def is_main() -> bool:
  return jax.process_index() == 0


def to_global(batch, shardings, rows: int):
  """A batch of this process's rows (numpy) -> global arrays; `rows` counts those of all processes."""

  if jax.process_count() == 1:
    return jax.device_put(batch, shardings)  # all at once: a call for each array costs more than the copies

  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

  with jax.transfer_guard("allow"):  # this is the transfer that a loop has; JAX takes it for an implicit one
    return jax.tree.map(one, batch, shardings)


def scalars_over_processes(*values: float) -> list[float]:
  """The sum of each value over all processes; a collective, so every process must call it."""
  if jax.process_count() == 1:
    return [float(v) for v in values]
  with jax.transfer_guard("allow"):
    gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
  return [float(v) for v in gathered.sum(0)]


def over_processes(x: np.ndarray) -> np.ndarray:
  """The array of every process, stacked; a collective."""
  if jax.process_count() == 1:
    return x[None]
  with jax.transfer_guard("allow"):
    return multihost_utils.process_allgather(x.astype(np.float32))


def any_process(value: bool) -> bool:
  """Whether it is so in any process; a collective."""
  if jax.process_count() == 1:
    return value
  return scalars_over_processes(float(value))[0] > 0


def from_main(value: float) -> float:
  """The value that process 0 has, in fp32; a collective."""
  return scalars_over_processes(value if is_main() else 0.0)[0]


def first_text(text: str) -> str:
  """The text of the first process that has one, cut to 256 bytes; a collective."""
  if jax.process_count() == 1:
    return text
  mine = np.frombuffer(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), np.uint8)
  with jax.transfer_guard("allow"):
    texts = [bytes(row).rstrip(b"\0") for row in np.asarray(multihost_utils.process_allgather(mine))]
  return next((found.decode(errors="replace") for found in texts if found), "")


def host_scalar(value, sharding):
  """A host number as a replicated global array, placed explicitly so that the transfer guard allows it."""
  x = np.asarray(value)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def barrier(name: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
