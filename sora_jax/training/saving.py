"""The parts of a checkpoint that several processes must agree on."""

import math
import shutil
import threading
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from sora_jax.parallel import cluster, multihost
from sora_jax.types import PyTree

_FOLDER = "sora_jax_save"
_MEETINGS = {"async_write_complete": "written", "async_commit_complete": "committed"}
_WRITER = "async_save"  # orbax's thread; the error that ends it shows only after all have met
RELEASE_S = 1200  # as long as orbax waits


class PeerError(RuntimeError):
  """Another process could not write its share."""


class Rendezvous:
  """The barriers of a write: all have written; process 0 has committed.

  Orbax alone would wait 20 minutes for a process whose disk is full. Here that process comes to the barrier
  all the same, having left a note that it failed, and nobody commits.
  """

  def __init__(self):
    self.number, self.arrived = 0, set()
    self.is_named = False  # the thread that writes bears the name known here

  def begin(self) -> None:
    self.number += 1
    self.arrived = set()

  def _path(self, name: str) -> str:
    return f"{_FOLDER}/{self.number}/{name}"

  def barrier(self, *, key: str, timeout_ms: int) -> None:
    """What orbax calls in its thread."""
    client = cluster.client()
    if client is None:
      return
    name = next((name for orbax_name, name in _MEETINGS.items() if orbax_name in key), None)
    if name is None:  # orbax has others, which a failed process comes to as well
      client.wait_at_barrier(f"{_FOLDER}/{key}", timeout_ms)
      return
    self.arrived.add(name)
    client.wait_at_barrier(self._path(name), timeout_ms)
    if failed := client.key_value_dir_get(self._path("failed/")):
      raise PeerError(f"process {failed[0][0].rsplit('/')[-1]} could not write its share")

  def release_if_dead(self) -> None:
    """Where the writing thread of this process ended short of a barrier, comes there in its stead."""
    client, (index, _) = cluster.client(), cluster.size()
    if client is None:
      return
    if any(thread.name == _WRITER for thread in threading.enumerate()):
      self.is_named = True
      return
    missing = [name for name in _MEETINGS.values() if name not in self.arrived]
    if not missing or not self.is_named:
      return
    self.arrived |= set(missing)
    client.key_value_set(self._path(f"failed/{index}"), "1", allow_overwrite=True)
    args = (self._path(missing[0]), RELEASE_S * 1000)
    threading.Thread(target=client.wait_at_barrier, args=args, daemon=True).start()


def lack_of_room(folder: Path, items: PyTree) -> str:
  """Why the disk does not hold one more checkpoint, "" where it does; all hear what process 0 sees."""
  needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(items)) + 2**20
  free = shutil.disk_usage(folder).free if multihost.is_main() else 0
  free = multihost.from_main(free)
  if free >= needed:
    return ""
  return f"No space left on device: {free / 1e6:.0f} MB free in {folder}, {needed / 1e6:.0f} MB needed"


def reason_of(error: Exception) -> str:
  """One line. Orbax wraps what the system said; that is what a user wants to read."""
  text = str(error) or type(error).__name__
  for known in ("No space left on device", "File too large", "Read-only file system", "Permission denied"):
    if known in text:
      return known
  return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def read_alone(folder: Path, abstract: PyTree) -> PyTree:
  """An item of a checkpoint, without a word to the other processes."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"
  )
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
  with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
    return reader.restore(folder, args=ocp.args.StandardRestore(abstract))
