"""python -m data_pipelines.report --source=PATH [--row_tokens=512 ...]: what a data set holds.

Takes the keys of `config.data`. Text is counted in words; a run counts the tokens of its own vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from data_pipelines.cli import add_arguments
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from data_pipelines.texts import reader


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m data_pipelines.report", description=__doc__.split("\n")[0])
  add_arguments(parser)
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
  arguments = vars(parser.parse_args(argv))
  as_json = arguments.pop("json")
  try:
    config = DataConfig(**arguments)
    count = reader(config, str.split)
    report = Pipeline(build_source(config), config, batch_spec(config), count, split="all").report()
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  print(json.dumps(report.as_dict()) if as_json else report)
  return 0


if __name__ == "__main__":
  sys.exit(main())
