"""The keys of `config.data` as flags of a program."""

import argparse
import ast
import dataclasses
import functools
import json
from typing import Any

from data_pipelines.config import DataConfig

_MAPS = {
  "source_kwargs": '{"folder": "clips"}',
  "sources": '{"clips": {"source": "clips", "weight": 3}, "stills": {"source": "stills.csv", "weight": 1}}',
  "token_drop": '{"rate": 0.5}',
}


def add_arguments(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
  """A flag for each key, as sora_jax.train takes them behind --config.data."""
  parser.usage = "%(prog)s [--KEY=VALUE ...]; --help lists the keys, config.data of docs/data.md among them"
  for field in dataclasses.fields(DataConfig):
    if isinstance(field.default, (str, bool, int, float, tuple)) and field.name not in without:
      read = functools.partial(_value, field.default)
      parser.add_argument(f"--{field.name}", type=read, default=field.default, metavar="VALUE")
  for name, example in _MAPS.items():
    parser.add_argument(f"--{name}", type=_map, default={}, metavar="MAP", help=f"such as {example}")


def _value(default: Any, text: str) -> Any:
  if isinstance(default, bool):
    if text.lower() not in ("true", "1", "false", "0"):
      raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")
  if isinstance(default, tuple):
    return _tuple(default, text)
  try:
    return type(default)(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r} is no {type(default).__name__}") from None


def _tuple(default: tuple, text: str) -> tuple:
  """(2, 8, 8), [2, 8, 8] or 2,8,8."""
  example = repr(default) if default else "((0, 1024), (2000, 4096)) or (0.7, 0.3)"
  try:
    parts = ast.literal_eval(text)
    parts = tuple(parts) if isinstance(parts, (tuple, list)) else (parts,)
    return tuple(type(default[0])(part) for part in parts) if default else parts
  except (ValueError, SyntaxError, TypeError):
    raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as {example}") from None


def _map(text: str) -> dict:
  """JSON or a dict as Python writes it."""
  for read in (json.loads, ast.literal_eval):
    try:
      value = read(text)
    except (ValueError, SyntaxError):
      continue
    if isinstance(value, dict):
      return value
  raise argparse.ArgumentTypeError(f'{text!r} is no map of names to values such as {{"rate": 0.5}}')
