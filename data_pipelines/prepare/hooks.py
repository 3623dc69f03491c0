"""`module:name` of someone else's code: captions, scores, encoders."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.named import named


class HookError(ValueError):
  """A hook is missing, or does not do what it must."""


@functools.cache
def load(name: str) -> Callable[..., Any]:
  """The function, or an instance of the class; one a process."""
  found = named(name, name, HookError)
  return found() if inspect.isclass(found) else found


def call(name: str, where: str, *arguments: Any) -> Any:
  function = load(name)
  if not callable(function):
    raise HookError(f"{name} is a {type(function).__name__}, which cannot be called")
  try:
    return function(*arguments)
  except Exception as e:  # noqa: BLE001, code of others
    raise HookError(f"{name} fails on {where}: {type(e).__name__}: {e}") from e


def score(name: str, where: str, frames_THWC: np.ndarray, captions: tuple[str, ...]) -> float:
  made = call(name, where, frames_THWC, captions)
  try:
    return float(made)
  except (TypeError, ValueError):
    raise HookError(f"{name} gives {_shown(made)} for {where}: a number is needed") from None


def captions(name: str, where: str, frames_THWC: np.ndarray, before: tuple[str, ...]) -> list[str]:
  made = call(name, where, frames_THWC, before)
  texts = [made] if isinstance(made, str) else made
  if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
    raise HookError(f"{name} gives {_shown(made)} for {where}: a text or a list of texts is needed")
  return list(texts)


def _shown(value: Any) -> str:
  return f"{type(value).__name__} {repr(value)[:40]}" if value is not None else "None"


def encoder_hash(name: str) -> str:
  """`.hash` of an encoder: a text that changes when what it computes does."""
  mark = getattr(load(name), "hash", None)
  if not isinstance(mark, str) or not mark:
    raise HookError(f"{name} has no .hash, a text that tells this encoder from others")
  return mark


def encode(name: str, where: str, frames_THWC: np.ndarray) -> np.ndarray:
  """Latents (t, h, w, C) of an encoder with `factors` and `encode`, as config.data.latents names one."""
  made = load(name)
  latent_factors(name)
  try:
    values = made.encode(frames_THWC)
  except Exception as e:  # noqa: BLE001, code of others
    raise HookError(f"{name}.encode fails on {where}: {type(e).__name__}: {e}") from e
  return array(name, where, values, 4)


def latent_factors(name: str) -> tuple[int, int, int]:
  factors = getattr(load(name), "factors", None)
  is_fine = isinstance(factors, tuple) and len(factors) == 3
  if not is_fine or not all(isinstance(n, int) and n > 0 for n in factors):
    raise HookError(f"{name} has no .factors, (frames, height, width) in pixels of a latent cell")
  if not callable(getattr(load(name), "encode", None)):
    raise HookError(f"{name} has no .encode(frames_THWC)")
  return factors


def array(name: str, where: str, value: Any, dims: int) -> np.ndarray:
  made = np.asarray(value, np.float32)
  if made.ndim != dims or not made.size or not np.isfinite(made).all():
    raise HookError(
      f"{name} gives an array of shape {made.shape} for {where}: finite, {dims} dims are needed"
    )
  return made
