"""The keys of `config.data` as flags of a program."""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from data_pipelines.config import DataConfig

_MAPS = {
  "source_kwargs": '{"folder": "clips"}',
  "sources": '{"clips": {"source": "clips", "weight": 3}, "stills": {"source": "stills.csv", "weight": 1}}',
  "token_drop": '{"rate": 0.5}',
}
_REMARK = re.compile(r"^  (\w+): [^#\n]*(?:\(\n[^#\n]*)?  # (.+)$", re.MULTILINE)
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def remarks(kind: type) -> dict[str, str]:
  """What the comment behind each field of a dataclass says of it."""
  found = dict(_REMARK.findall(inspect.getsource(kind)))
  return {field.name: found.get(field.name, "") for field in dataclasses.fields(kind)}


def new_parser(program: str, doc: str) -> argparse.ArgumentParser:
  usage, _, rest = doc.partition(": ")
  return argparse.ArgumentParser(
    prog=f"python -m data_pipelines.{program}",
    usage=usage,
    description=rest,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_arguments(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
  """A flag for each key, as sora_jax.train takes them behind --config.data."""
  keys = parser.add_argument_group("keys of config.data, see docs/data.md")
  said = remarks(DataConfig)
  for field in dataclasses.fields(DataConfig):
    if isinstance(field.default, (str, bool, int, float, tuple)) and field.name not in without:
      read, default = functools.partial(_value, field.default), str(field.default) or '""'
      text = f"{said[field.name]} [{default}]".strip().replace("%", "%%")
      metavar = "true|false" if isinstance(field.default, bool) else "VALUE"
      keys.add_argument(f"--{field.name}", type=read, default=field.default, metavar=metavar, help=text)
  for name, example in _MAPS.items():
    read = functools.partial(_map, example)
    keys.add_argument(f"--{name}", type=read, default={}, metavar="MAP", help=f"such as {example}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
  """As the other programs read them, --KEY and --noKEY too, where the value is true or false."""
  given = list(sys.argv[1:] if argv is None else argv)
  switches = {f"--{f.name}" for f in dataclasses.fields(DataConfig) if isinstance(f.default, bool)}
  for i, text in enumerate(given):
    is_bare = i + 1 == len(given) or given[i + 1].lower() not in _TRUTHS
    if text in switches and is_bare:
      given[i] = f"{text}=true"
    elif text.startswith("--no") and f"--{text[4:]}" in switches:
      given[i] = f"--{text[4:]}=false"
  return vars(parser.parse_args(given))


def _value(default: Any, text: str) -> Any:
  if isinstance(default, bool):
    if text.lower() not in _TRUTHS:
      raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return _TRUTHS[text.lower()]
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


def _map(example: str, text: str) -> dict:
  """JSON or a dict as Python writes it."""
  for read in (json.loads, ast.literal_eval):
    try:
      value = read(text)
    except (ValueError, SyntaxError):
      continue
    if isinstance(value, dict):
      return value
  raise argparse.ArgumentTypeError(f"{text!r} is no map of names to values such as {example}")
