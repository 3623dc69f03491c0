"""python -m data_pipelines.prepare --input=PATH_OR_SOURCE --output=DIR [--stages=...] [--workers=N] ...

Videos and images into shards of clips: shots found and cut, filtered, near-duplicates removed, resized into
buckets, captioned or encoded by hooks. Started again it goes on where it was; the shards are the same bytes
however often it was stopped. See docs/prepare.md.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from data_pipelines.cli import remarks
from data_pipelines.config import DataConfig
from data_pipelines.prepare import beam_runner, local_runner
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.run import Outcome, prepare
from data_pipelines.prepare.tasks import Job, Task

FLAGS = flags.FLAGS
# Keys of config.data that decide what is read and how.
_DATA = (
  "format", "data_root", "media_column", "caption_column", "captions_optional", "allow_outside_root",
  "frame_rate", "min_size", "max_aspect", "decode_limit_s", "num_samples", "seed",
)  # fmt: skip


def define_flags() -> None:
  flags.DEFINE_string("input", None, "What data.source takes: a path, a registered name, module:MySource.")
  flags.DEFINE_string("output", None, "Folder of the shards.")
  flags.DEFINE_string("source_kwargs", "{}", "JSON, of a source that is no path.")
  flags.DEFINE_integer("workers", os.cpu_count() or 1, "Worker processes.")
  flags.DEFINE_float("time_limit_s", 300.0, "Seconds without a sign of life before a file is given up.")
  flags.DEFINE_enum("runner", "local", ["local", "beam"], "What runs the work.")
  flags.DEFINE_string("beam_args", "", "Of Beam: --runner=FlinkRunner --flink_master=...")
  for kind in (PrepareConfig, DataConfig):
    said = remarks(kind)
    for field in dataclasses.fields(kind):
      if kind is PrepareConfig or field.name in _DATA:
        _define(field.name, field.default, said[field.name])


def _define(name: str, default: object, remark: str) -> None:
  if isinstance(default, tuple):
    flags.DEFINE_list(name, [str(v) for v in default], remark)
    return
  kinds = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  kinds[type(default)](name, default, remark)


def _value(field: dataclasses.Field) -> object:
  value = FLAGS[field.name].value
  if not isinstance(field.default, tuple):
    return value
  kind = int if field.default and isinstance(field.default[0], int) else str
  try:
    return tuple(kind(v) for v in value)
  except ValueError as e:
    raise ValueError(f"--{field.name}={','.join(value)} is no list of numbers") from e


def parse(argv: Sequence[str]) -> list[str]:
  try:
    return FLAGS(list(argv))
  except SystemExit:  # --help, which absl ends with 1
    sys.exit(0)
  except flags.Error as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str]) -> int:
  try:
    return _main(argv)
  except (ValueError, OSError) as e:
    text = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
    for ours, here in (("--config.data.", "--"), ("data.source=", "--input=")):
      text = text.replace(ours, here)
    print(f"error: {text}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped: the same command goes on from here", file=sys.stderr)
    return 130


def _main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise ValueError(f"what is {argv[1]!r}? Everything is a flag: --input=... --output=...")
  if not FLAGS.input or not FLAGS.output:
    raise ValueError("both --input=PATH_OR_SOURCE and --output=DIR are needed")
  try:
    kwargs = json.loads(FLAGS.source_kwargs)
  except ValueError as e:
    raise ValueError(f"--source_kwargs is not JSON: {e}") from e
  config = PrepareConfig(**{f.name: _value(f) for f in dataclasses.fields(PrepareConfig)})
  data = DataConfig(source=FLAGS.input, source_kwargs=kwargs, **{k: FLAGS[k].value for k in _DATA})
  if FLAGS.runner == "beam":
    beam_runner.require()
  outcome = prepare(data, config, Path(FLAGS.output).absolute(), _run)
  print(summary(outcome, Path(FLAGS.output)))
  return 0


def _run(todo: Sequence[Task], job: Job, label: str) -> None:
  if not todo:
    return
  if FLAGS.runner == "beam":
    beam_runner.run(todo, job, limit_s=FLAGS.time_limit_s, label=label, arguments=FLAGS.beam_args.split())
  else:
    local_runner.run(todo, job, workers=FLAGS.workers, limit_s=FLAGS.time_limit_s, label=label)


def summary(outcome: Outcome, out: Path) -> str:
  rules = "".join(f"; {n} {rule}" for rule, n in outcome.rules.items())
  records = sum(note["records"] for note in outcome.notes)
  lines = [
    f"input    {outcome.inputs} files, {sum(r['shots'] for r in outcome.looks)} shots",
    f"dropped  {len(outcome.dropped)}{rules}",
    f"kept     {len(outcome.kept)} clips",
  ]
  if outcome.notes:
    size = sum(note["bytes"] for note in outcome.notes) / 1e6
    buckets = len({note["bucket"] for note in outcome.notes})
    lines.append(
      f"written  {records} records, {len(outcome.notes)} shards of {buckets} buckets, {size:.1f} MB"
    )
  return "\n".join([*lines, f"report   {out / 'report.html'}"])


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse)
