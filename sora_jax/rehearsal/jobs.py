"""Several rehearsals at a time, each in a process of its own: half of a compile keeps one core alone busy."""

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import ml_collections

from sora_jax.packing.geometry import Patch
from sora_jax.rehearsal import run, topology
from sora_jax.types import BatchSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One program to rehearse, as plain data: it goes to another process."""

  name: str
  config: dict[str, Any]
  spec: BatchSpec
  patch: Patch
  at: topology.Topology
  mode: str
  effort: str
  hlo_file: str = ""


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rehearse(job: Job) -> dict[str, Any]:
  how = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
  return run.rehearse(**how | {"config": ml_collections.ConfigDict(job.config)})


def rehearse_all(jobs: Sequence[Job], *, processes: int) -> Iterator[dict[str, Any]]:
  """The results in the order of the jobs; those of most devices, the slowest to compile, begin first."""
  if min(processes, len(jobs)) < 2:
    yield from map(rehearse, jobs)
    return
  spawn = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(
    processes, mp_context=spawn, initializer=_start, max_tasks_per_child=1
  ) as pool:
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].at.num_devices)
    running = {i: pool.submit(rehearse, jobs[i]) for i in order}
    try:
      for i in range(len(jobs)):
        yield running[i].result()
    finally:
      pool.shutdown(cancel_futures=True)


def _start() -> None:
  jax.config.update("jax_platforms", "cpu")  # nothing runs; a TPU that is there stays free
