"""All stages in their order: look, choose, write, index, report."""

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import shard_bytes
from data_pipelines.config import DataConfig
from data_pipelines.prepare import dedup, hooks, plan, report, shots, state, tasks, write
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.inputs import Item, Limits, items_of_entries, items_of_source
from data_pipelines.prepare.plan import Sample, Shard
from data_pipelines.prepare.tasks import Job, Task
from data_pipelines.sources import registry
from data_pipelines.sources.registry import Located
from data_pipelines.sources.shard_index import SCHEMA
from data_pipelines.sources.shards import ABOUT, FORMAT, INDEX, VERSION

Runner = Callable[[Sequence[Task], Job, str], None]  # sees tasks through; the last is a label
_PICTURED = 1000  # files, about, of which the report may show pictures


@dataclasses.dataclass
class Outcome:
  """What came of it, for the report and the tests."""

  inputs: int
  looks: list[dict[str, Any]]
  rejects: list[tuple[str, str]]
  dropped: list[dict[str, Any]]  # name, rule, detail, start_s, thumb
  kept: list[tuple[Sample, dict[str, Any]]]  # with the clip as seen
  notes: list[dict[str, Any]]  # of shards

  @property
  def rules(self) -> dict[str, int]:
    return dict(collections.Counter(d["rule"] for d in self.dropped).most_common())


def prepare(data: DataConfig, config: PrepareConfig, out: Path, run: Runner) -> Outcome:
  if config.has("shots"):
    shots.require()
  encoders = tuple(
    hooks.encoder_hash(name) if key != "caption" else str(getattr(hooks.load(name), "hash", ""))
    for key in ("caption", "latents", "text")
    if (name := getattr(config, key))
  )
  if os.path.realpath(os.path.expanduser(data.source)) == os.path.realpath(out):
    raise ValueError(
      f"--output={out} is what is read: what is written would take its place; give another one"
    )
  items, rejects, source = _inputs(data)
  limits = Limits(min_size=data.min_size, max_aspect=data.max_aspect, decode_limit_s=data.decode_limit_s)
  job = Job(out, source, config, limits, max(1, len(items) // _PICTURED))
  with state.locked(out):
    state.remove_parts(out)
    run([t for t in items if not tasks.is_done(t, job)], job, "look")
    looks = [state.read_json(tasks.look_path(item, job)) for item in items]
    kept, dropped = choose(items, looks, config)
    dropped = [_reject(name, why) for name, why in rejects] + dropped
    notes: list[dict[str, Any]] = []
    if config.has("write"):
      shards = _shards(kept, config, encoders)
      notes = _write(shards, job, run)
      dropped += [d for note in notes for d in note["dropped"]]
    state.remove_parts(out)  # of workers that died
    outcome = Outcome(len(items), looks, rejects, dropped, [(s, clip) for _, s, clip in kept], notes)
    _write_lines(out / "dropped.jsonl", dropped)
    report.write(out / "report.html", outcome, config)
  if not outcome.kept:
    reasons = ", ".join(f"{n} {rule}" for rule, n in outcome.rules.items())
    raise ValueError(f"no clip of {len(items)} files is left ({reasons}): see {out / 'report.html'}")
  return outcome


def choose(
  items: Sequence[Item], looks: Sequence[dict[str, Any]], config: PrepareConfig
) -> tuple[list[tuple[str, Sample, dict[str, Any]]], list[dict[str, Any]]]:
  """([(bucket, sample, clip)], what is dropped), in the order of the input."""
  candidates, dropped, seen = [], [], set()
  for item, result in zip(items, looks):
    dropped += [{"name": item.name, **d} for d in result["dropped"]]
    for clip in result["clips"]:
      try:
        bucket, sample = plan.sample_of(item, result, clip, config)
        if sample.id in seen:
          raise plan.UnfitError("repeated", "the input names it twice")
      except plan.UnfitError as e:
        dropped.append(_dropped(item.name, clip, e.rule, e.detail))
        continue
      seen.add(sample.id)
      candidates.append((bucket, sample, clip))
  if not config.has("dedup"):
    return candidates, dropped
  repeats = dedup.duplicates([clip for *_, clip in candidates], config.dedup_distance, config.dedup_cell)
  for i, j in repeats.items():
    first = candidates[j][1]
    detail = f"like {first.item.name} at {first.start_s:g} s"
    dropped.append(_dropped(candidates[i][1].item.name, candidates[i][2], "duplicate", detail))
  return [c for i, c in enumerate(candidates) if i not in repeats], dropped


def _dropped(name: str, clip: dict[str, Any], rule: str, detail: str) -> dict[str, Any]:
  return {"name": name, "rule": rule, "detail": detail, "start_s": clip["start_s"], "thumb": clip["thumb"]}


def _reject(name: str, why: str) -> dict[str, Any]:
  rule, _, detail = why.partition(": ")
  return {"name": name, "rule": rule, "detail": detail, "start_s": 0.0, "thumb": ""}


def _inputs(data: DataConfig) -> tuple[list[Item], list[tuple[str, str]], Any]:
  """(items, rejects, the source they are of, None for files)."""
  located = registry.locate(data)
  if isinstance(located, Located):
    return items_of_entries(located.found.entries), list(located.found.rejects), None
  if held := getattr(located, "encoder_hash", ""):
    raise ValueError(f"{located.name} holds latents of encoder {held}: only pixels can be prepared")
  return items_of_source(located), list(located.rejects), located


def _shards(
  kept: Sequence[tuple[str, Sample, dict[str, Any]]], config: PrepareConfig, encoders: tuple[str, ...]
) -> list[Shard]:
  buckets: dict[str, list[Sample]] = collections.defaultdict(list)
  for bucket, sample, _ in kept:
    buckets[bucket].append(sample)
  return plan.shards_of(buckets, config, encoders)


def _write(shards: list[Shard], job: Job, run: Runner) -> list[dict[str, Any]]:
  """Writes what is not finished, takes away what is of no plan any more, then the index."""
  pending = [s for s in shards if not tasks.is_done(s, job)]
  paths = {s.path for s in shards}
  for old in sorted((job.out / state.FOLDER / "shards").glob("*.json")):
    note = state.read_json(old)
    if note is None or note.get("path") not in paths:
      (job.out / ABOUT).unlink(missing_ok=True)
      if note is not None:
        (job.out / note["path"]).unlink(missing_ok=True)
      old.unlink()
  if pending:
    (job.out / ABOUT).unlink(missing_ok=True)  # what is there now is not whole
    run(pending, job, "write")
  notes = [write.finished_note(job.out, s) for s in shards]
  lost = [s.path for s, note in zip(shards, notes) if note is None]
  assert not lost, f"shards not written: {lost}"
  if any(note["records"] for note in notes):
    _write_index(job.out, notes)
  return notes


def _write_index(out: Path, notes: list[dict[str, Any]]) -> None:
  rows = [
    {**row, "shard": note["path"], "record": k, "bucket": note["bucket"]}
    for note in notes
    for k, row in enumerate(note["rows"])
  ]
  sink = pa.BufferOutputStream()
  pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
  index = sink.getvalue().to_pybytes()
  about = {
    "format": FORMAT,
    "version": VERSION,
    "samples": len(rows),
    "tokens": sum(row["tokens"] for row in rows),
    "encoder": rows[0]["encoder"],
    "text_encoder": rows[0]["text_encoder"],
    "index_checksum": shard_bytes.digest(index),
    "shards": [{k: note[k] for k in ("path", "records", "bytes", "checksum")} for note in notes],
  }
  _replace(out / INDEX, index)
  _replace(out / ABOUT, (json.dumps(about, indent=1) + "\n").encode())  # the last: with it a set is whole


def _write_lines(path: Path, dropped: Sequence[dict[str, Any]]) -> None:
  lines = [json.dumps({k: v for k, v in d.items() if k != "thumb"}, sort_keys=True) for d in dropped]
  _replace(path, "".join(line + "\n" for line in lines).encode())


def _replace(path: Path, data: bytes) -> None:
  if path.is_file() and path.read_bytes() == data:
    return
  part = path.with_name(f".{path.name}.part")
  with open(part, "wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  part.replace(path)
  shard_bytes.fsync_folder(path.parent)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
