"""`module:name` of someone else's code: captions, scores, encoders."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


class HookError(ValueError):
  """A hook is missing, or does not do what it must."""


@functools.cache
def load(name: str) -> Callable[..., Any]:
  """The function, or an instance of the class; one a process."""
  module_name, _, attribute = name.partition(":")
  try:
    module = importlib.import_module(module_name)
  except ImportError as e:
    raise HookError(f"{name}: cannot import {module_name}: {e}") from e
  found = getattr(module, attribute, None)
  if found is None:
    raise HookError(f"{name}: {module_name} has no {attribute}")
  made = found() if inspect.isclass(found) else found
  if not callable(made):
    raise HookError(f"{name} is a {type(made).__name__}, which cannot be called")
  return made


def call(name: str, where: str, *arguments: Any) -> Any:
  try:
    return load(name)(*arguments)
  except HookError:
    raise
  except Exception as e:  # noqa: BLE001, code of others
    raise HookError(f"{name} fails on {where}: {type(e).__name__}: {e}") from e


def encoder_hash(name: str) -> str:
  """`.hash` of an encoder: a text that changes when what it computes does."""
  mark = getattr(load(name), "hash", None)
  if not isinstance(mark, str) or not mark:
    raise HookError(f"{name} has no .hash, a text that tells this encoder from others")
  return mark


def latent_stride(name: str) -> tuple[int, int, int]:
  stride = getattr(load(name), "stride", None)
  if (
    not isinstance(stride, tuple) or len(stride) != 3 or not all(isinstance(n, int) and n > 0 for n in stride)
  ):
    raise HookError(f"{name} has no .stride, (frames, height, width) of a latent cell")
  return stride


def array(name: str, where: str, value: Any, dims: int) -> np.ndarray:
  made = np.asarray(value, np.float32)
  if made.ndim != dims or not made.size or not np.isfinite(made).all():
    raise HookError(
      f"{name} gives an array of shape {made.shape} for {where}: finite, {dims} dims are needed"
    )
  return made
