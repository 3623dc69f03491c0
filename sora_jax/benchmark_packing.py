"""Packed, bucketed and padded rows of the same samples, through the step that training runs.

Compute is equal in that a step of every layout holds as many tokens, padding included. A side is a list of
programs, each with the number of its steps that all samples take; padded and bucketed rows hold one sample.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.benchmark_packing import bucketed
from data_pipelines.mixes import MIXES, draw
from sora_jax.benchmark_gpu import batch_of, make_step
from sora_jax.models.dit import DiTConfig
from sora_jax.packing.plan import plan_window

MIX, SCALE = "NaViT-like images at 8k", 8  # rows and samples of an eighth: a CPU is slow
CHANNELS, CAPTION = 64, 16
SAMPLES = 4096
MOST = 24  # samples of a row: text has room for as many captions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  side: str
  run: Callable[[], object]
  steps: float  # of it, that all samples take
  slots: int  # tokens of a step, padding included
  flops: float  # of a step


def lengths_of(samples: int = SAMPLES) -> np.ndarray:
  return np.maximum(draw(MIXES[MIX], samples) // SCALE, 1)


def packed_rows(lengths: np.ndarray, row_tokens: int, method: str, width: int) -> list[np.ndarray]:
  planned = plan_window(
    lengths,
    row_tokens=row_tokens,
    max_samples=MOST,
    method=method,
    cost=(24.0 * width, 4.0),
  )
  return [lengths[np.array(row)] for row in planned]


def layouts(lengths: np.ndarray, rows: int, row_tokens: int, width: int) -> dict[str, list[tuple]]:
  """{side: [(rows of a step, length of its rows, steps)]}; rows of a step are spread over all there are."""
  spread = lambda items, count: [items[i] for i in np.linspace(0, len(items) - 1, count).astype(int)]  # noqa: E731
  sides = {}
  for method in ("best_fit", "greedy"):
    planned = packed_rows(lengths, row_tokens, method, width)
    sides[f"packed, {method}"] = [(spread(planned, rows), row_tokens, len(planned) / rows)]
  for side, padded in (("bucketed", bucketed(lengths)), ("padded", np.full(len(lengths), lengths.max()))):
    sides[side] = []
    for length in np.unique(padded).astype(int).tolist():
      own = np.sort(lengths[padded == length])
      count = max(1, rows * row_tokens // length)
      sides[side].append((spread(own[:, None], count), length, len(own) / count))
  return sides


def programs(model: DiTConfig, *, rows: int, row_tokens: int, lengths: np.ndarray) -> list[Program]:
  made = []
  for side, batches in layouts(lengths, rows, row_tokens, model.width).items():
    for chosen, length, steps in batches:
      spec, batch = batch_of(chosen, length, channels=CHANNELS, caption=CAPTION)
      run, flops = make_step(model, spec, batch)
      made.append(Program(side=side, run=run, steps=steps, slots=spec.rows * spec.tokens, flops=flops))
  return made


def summarised(made: list[Program], seconds: list[dict[str, float]], tokens: int) -> dict[str, dict]:
  """By side: padding, real tokens a second (of wall and of CPU time), and how many times those of padding."""
  result = {}
  for side in dict.fromkeys(p.side for p in made):
    own = [(p, s) for p, s in zip(made, seconds) if p.side == side]
    slots = sum(p.steps * p.slots for p, _ in own)
    wall, cpu = (sum(p.steps * s[key] for p, s in own) for key in ("wall_s", "cpu_s"))
    result[side] = {
      "programs": len(own),
      "padding_percent": round(100 * (1 - tokens / slots), 2),
      "tokens_per_s": round(tokens / wall, 1),
      "tokens_per_cpu_s": round(tokens / cpu, 1),
    }
  for side in result.values():
    base = result["padded"]
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
      side[f"{key}_over_padded"] = round(side[key] / base[key], 2)
  return result
