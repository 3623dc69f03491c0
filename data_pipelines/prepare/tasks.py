"""The two kinds of work, run by worker processes of any runner; the results are files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.prepare import state
from data_pipelines.prepare.config import PrepareConfig, mark_of
from data_pipelines.prepare.inputs import Item, Limits
from data_pipelines.prepare.look import look
from data_pipelines.prepare.plan import Shard
from data_pipelines.prepare.write import finished_note, write_shard


@dataclasses.dataclass(frozen=True)
class Job:
  """What every worker holds."""

  out: Path
  source: Any  # of items that are no files; else None
  config: PrepareConfig
  limits: Limits
  thumb_every: int  # files of which one keeps pictures for the report


Task = Item | Shard


def name_of(task: Task) -> str:
  return task.name if isinstance(task, Item) else task.path


def num_samples(task: Task) -> int:
  return 1 if isinstance(task, Item) else len(task.samples)


def is_done(task: Task, job: Job) -> bool:
  if isinstance(task, Item):
    return state.read_json(look_path(task, job)) is not None
  return finished_note(job.out, task) is not None


def run(task: Task, job: Job, at: Callable[[str], None]) -> None:
  """`at` says which sample is worked on from now."""
  if isinstance(task, Item):
    thumbs = int(task.key, 16) % job.thumb_every == 0
    result = look(task, job.source, job.config, job.limits, thumbs=thumbs, beat=lambda: at(task.key))
    state.write_json(look_path(task, job), result)
    return
  failed = {s.id: why for s in task.samples if (why := state.read_json(failed_path(job.out, s.id)))}
  write_shard(task, job.out, job.source, job.config, failed, at)


def blame(task: Task, job: Job, sample: str, why: str) -> None:
  """Leaves out the sample that ended a worker, this time and the next."""
  if isinstance(task, Item):
    rule, _, detail = why.partition(": ")
    dropped = {"rule": rule, "detail": detail, "start_s": 0.0, "thumb": ""}
    result = {"name": task.name, "whole": None, "info": None, "note": "", "shots": 0, "clips": []}
    state.write_json(look_path(task, job), result | {"dropped": [dropped]})
  else:
    state.write_json(failed_path(job.out, sample), why)


def look_path(item: Item, job: Job) -> Path:
  mark = mark_of((job.config.look_mark(), job.limits))
  return job.out / state.FOLDER / f"look-{mark}" / item.key[:2] / f"{item.key}.json"


def failed_path(out: Path, sample: str) -> Path:
  return out / state.FOLDER / "failed" / f"{sample}.json"
