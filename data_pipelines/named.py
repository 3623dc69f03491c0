"""What "package.module:name" in a config names."""

import importlib
from typing import Any


def named(name: str, where: str, error: type[ValueError] = ValueError) -> Any:
  """The attribute of the module; `error` says `where` the name stands if there is none."""
  module_name, _, attribute = name.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise error(f"{where}: cannot import {module_name}: {e}") from e
  found = getattr(module, attribute, None)
  if found is None:
    raise error(f"{where}: {module_name} has no {attribute}")
  return found
