"""What runs of a ladder really took: the speed that a plan expects of the next ones."""

import json
from pathlib import Path

import numpy as np

from sora_jax.ladder import measure

TIMES = "times.jsonl"
LEAST = 2  # runs of a size, of different compute


def from_runs(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...], float]:
  """(parameters, FLOP/s of each, seconds of a run besides its steps), by least squares over finished runs."""
  by_params: dict[int, list[tuple[float, float]]] = {}
  for path in sorted(Path(folder).glob(f"*/{TIMES}")):
    found, spent = measure.load(path.parent), seconds(path)
    if found and spent:
      by_params.setdefault(found["params"], []).append((found["compute"], spent))
  sizes = sorted(p for p, runs in by_params.items() if len({c for c, _ in runs}) >= LEAST)
  if not sizes:
    raise ValueError(
      f"--calibrate={folder}: no size has {LEAST} finished runs of different compute with {TIMES} beside them"
    )
  # seconds = overhead + compute / rate of the size; relative errors count, so that long runs do not rule.
  rows, targets = [], []
  for place, params in enumerate(sizes):
    for compute, spent in by_params[params]:
      rows.append(np.r_[1.0, np.where(np.arange(len(sizes)) == place, compute, 0.0)] / spent)
      targets.append(1.0)
  scale = np.abs(rows).max(axis=0)
  solved = np.linalg.lstsq(np.array(rows) / scale, np.array(targets), rcond=None)[0] / scale
  overhead, per_flop = float(solved[0]), solved[1:]
  if (per_flop <= 0).any():
    slow = ", ".join(f"{p:,}" for p, s in zip(sizes, per_flop) if s <= 0)
    raise ValueError(f"--calibrate={folder}: longer runs of {slow} parameters took no longer than short ones")
  return tuple(map(float, sizes)), tuple(float(1 / s) for s in per_flop), max(overhead, 0.0)


def seconds(path: Path) -> float:
  """By the clock, of all starts of a run together."""
  lines = path.read_text(encoding="utf-8").splitlines()
  return float(sum(json.loads(line)["seconds"] for line in lines if line.strip()))
