"""python -m data_pipelines.report --source=PATH [--row_tokens=512 ...]: what a data set holds.

Takes the keys of `config.data`. Text is counted in words; a run counts the tokens of its own vocabulary. Exit
code 1 where shards are missing.
"""

import json
import sys
from collections.abc import Sequence

from data_pipelines.cli import add_arguments, new_parser, parse
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from data_pipelines.sources.base import faults_of
from data_pipelines.texts import reader


def main(argv: Sequence[str] | None = None) -> int:
  parser = new_parser("report", __doc__)
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
  add_arguments(parser)
  arguments = parse(parser, argv)
  as_json = arguments.pop("json")
  try:
    config = DataConfig(**arguments)
    count = reader(config, str.split)
    source = build_source(config)
    report = Pipeline(source, config, batch_spec(config), count, split="all").report()
    faults = list(faults_of(source))
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  print(json.dumps(report.as_dict()) if as_json else report)
  for line in faults:
    print(f"wrong: {line}", file=sys.stderr)
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
