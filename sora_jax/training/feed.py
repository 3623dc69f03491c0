"""Batches on their way to the devices."""

import time
from collections.abc import Callable, Iterator

import jax

from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel import multihost
from sora_jax.training import metrics
from sora_jax.training.state import Setup
from sora_jax.types import Task, TokenBatch


def batch_struct(task: Task) -> TokenBatch:
  """Shapes and types of the task's global batch."""
  spec = task.batch_spec
  # By way of no rows: the global batch of a pod would not fit this host.
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((spec.rows, *x.shape[1:]), x.dtype), spec.zeros(rows=0))


class Feed:
  """Keeps the next batch on the device."""

  def __init__(
    self,
    batches: Iterator[TokenBatch],
    setup: Setup,
    window: metrics.Window,
    count: Callable[[TokenBatch], dict[str, float]] | None = None,
  ):
    struct = batch_struct(setup.task)
    self.batches, self.setup, self.window = batches, setup, window
    self.count = count or (lambda batch: {})
    self.rows = struct.segment_BL.shape[0]
    self.shardings = mesh_lib.batch_sharding(setup.mesh, struct)
    self.held = None

  def fill(self) -> float:
    """Seconds that the batch took to come."""
    began = time.monotonic()
    with self.window.waiting():
      batch = next(self.batches)
    waited = time.monotonic() - began
    stats = metrics.HostStats.of(batch, self.setup.task.flops_fn(batch), self.count(batch))
    self.held = multihost.to_global(batch, self.shardings, self.rows), stats
    return waited

  def take(self) -> tuple[TokenBatch, metrics.HostStats]:
    if self.held is None:
      self.fill()
    held, self.held = self.held, None
    return held

  def close(self) -> None:
    self.batches.close()
