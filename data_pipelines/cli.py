"""The keys of `config.data` as flags of a program."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from data_pipelines.config import DataConfig

_JSON = {
  "source_kwargs": '{"folder": "clips"}',
  "sources": '{"clips": {"source": "clips", "weight": 3}, "stills": {"source": "stills.csv", "weight": 1}}',
  "token_drop": '{"rate": 0.5}',
}


def add_arguments(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
  for field in dataclasses.fields(DataConfig):
    if isinstance(field.default, (str, bool, int, float, tuple)) and field.name not in without:
      parser.add_argument(f"--{field.name}", type=_parser_of(field.default), default=field.default)
  for name, example in _JSON.items():
    parser.add_argument(f"--{name}", type=json.loads, default={}, help=f"JSON, {example}")


def _parser_of(default: Any) -> Callable[[str], Any]:
  if isinstance(default, bool):
    return lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()]
  if default == ():
    return lambda text: tuple(json.loads(text))
  if isinstance(default, tuple):
    kind = type(default[0])
    return lambda text: tuple(kind(part) for part in text.strip("()").split(","))
  return type(default)
