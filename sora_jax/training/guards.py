"""Bad steps: left out one by one, and after many in a row the run goes back and passes over the data."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp

from sora_jax.types import Array, PyTree, TokenBatch

FILE = "data_skips.json"
STD_FLOOR = 0.01  # of the log-loss; below it every wiggle would be a spike


class DivergedError(ArithmeticError):
  """Too many bad steps in a row, and all retries spent."""


class GoBackError(Exception):
  """Raised in the loop to leave it for the last checkpoint; `step`: the first that was not judged bad."""

  def __init__(self, step: int, reason: str):
    super().__init__(reason)
    self.step, self.reason = step, reason


# --- in the step


def spike_state() -> dict[str, Array]:
  """Running mean and variance of the log-loss over steps that were taken."""
  return {name: jnp.zeros((), jnp.float32) for name in ("mean", "var", "count")}


def spike_update(
  state: dict[str, Array], loss: Array, *, zscore: float, window: int
) -> tuple[Array, dict[str, Array]]:
  """(whether the loss is a spike, the state had the step been taken).

  A spike: log-loss more than `zscore` standard deviations above its exponential mean over `window` steps,
  judged once `window` steps have been seen; zscore 0 = never.
  """
  x = jnp.log(jnp.maximum(loss, 1e-30)).astype(jnp.float32)
  count = state["count"] + 1
  rate = jnp.maximum(1 / count, 1.0 / window)  # a plain mean at first
  delta = x - state["mean"]
  std = jnp.maximum(jnp.sqrt(state["var"]), STD_FLOOR)
  spike = (zscore > 0) & (state["count"] >= window) & (delta > zscore * std)
  new = {
    "mean": state["mean"] + rate * delta,
    "var": (1 - rate) * (state["var"] + rate * delta**2),
    "count": count,
  }
  return spike, new


# --- beside the step


def judge(scalars: PyTree, step: int, limit: int) -> int:
  """Bad steps in a row up to `step`, from the results of the step before it; raises at the limit."""
  streak = int(scalars["streak"])
  if streak >= limit:
    values = (float(scalars["sums"]["loss"][0]), float(scalars["grad_norm"]))
    what = "spiked" if all(map(math.isfinite, values)) else "was not finite"
    raise GoBackError(step, f"the loss {what} for {streak} steps in a row, up to step {step}")
  return streak


@dataclasses.dataclass(frozen=True)
class Skips:
  """Which data a step trains on: batch number step + at(step), a pure function of the step.

  Entries (from_step, offset, times), by step: from `from_step` on, `offset` batches have been passed over;
  the run went back to that step `times` times.
  """

  entries: tuple[tuple[int, int, int], ...] = ()

  def at(self, step: int) -> int:
    return next((offset for start, offset, _ in reversed(self.entries) if start <= step), 0)

  def times(self, step: int) -> int:
    return next((times for start, _, times in self.entries if start == step), 0)

  def back_to(self, step: int, *, bad_until: int) -> "Skips":
    """Back at `step`, the batches of all steps before `bad_until` are passed over."""
    offset = bad_until + self.at(bad_until - 1) - step
    kept = tuple(entry for entry in self.entries if entry[0] < step)
    return Skips((*kept, (step, offset, self.times(step) + 1)))

  @staticmethod
  def of(entries: list) -> "Skips":
    return Skips(tuple(tuple(int(x) for x in entry) for entry in entries))


def stream(batches: Callable[[int], Iterator[TokenBatch]], skips: Skips, start: int) -> Iterator[TokenBatch]:
  """The batches of steps `start`, start + 1, ..."""
  step = start
  while True:
    offset = skips.at(step)
    numbered = batches(step + offset)
    try:
      while skips.at(step) == offset:
        batch = next(numbered, None)
        if batch is None:
          raise ValueError("the training data ended before train.num_steps; an endless stream is expected")
        yield batch
        step += 1
    finally:
      if hasattr(numbered, "close"):
        numbered.close()


def load_skips(workdir: Path) -> list | None:
  path = workdir / FILE
  return json.loads(path.read_text()) if path.is_file() else None


def save_skips(workdir: Path, skips: Skips) -> None:
  partial = (workdir / FILE).with_suffix(".tmp")
  partial.write_text(json.dumps(skips.entries) + "\n")
  partial.replace(workdir / FILE)
