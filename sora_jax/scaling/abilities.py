"""Emergent abilities: scores by compute, a dot for each run, so that no mean hides the seeds.

A score with a threshold may seem to emerge at once where what lies under it grows smoothly (Schaeffer et al.
2023, arXiv:2304.15004): the loss of the same runs is drawn below.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sora_jax.scaling import canvas
from sora_jax.scaling.canvas import Data

PREFIX, CHANCE = "accuracy_", "chance_"
COLOURS = ("#c0392b", "#2c5f8a", "#3a7d44", "#8e6c8a")
SAME = 0.1  # computes this close share a budget


def write(rows: Sequence[Mapping[str, str]], folder: str | Path, *, where: str) -> list[Path]:
  """abilities.png, .pdf, .svg and .csv of the rows of a results.csv."""
  names = [key for key in (rows[0] if rows else {}) if key.startswith(PREFIX) and key != f"{PREFIX}mean"]
  if not names or "compute" not in rows[0]:
    raise ValueError(f"{where}: it has no columns compute and {PREFIX}...; `run` writes such a table")
  rows = [row for row in rows if all(row.get(key) for key in ("compute", "loss", *names))]
  if not rows:
    raise ValueError(f"{where}: no run has scores")
  return canvas.save((("abilities", *draw(rows, names)) for _ in range(1)), folder)


def draw(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> tuple[Figure, Data]:
  figure, (above, below) = canvas.figure(rows=2)
  data = Data()
  compute, loss = (np.array([float(row[key]) for row in rows]) for key in ("compute", "loss"))
  for name, colour in zip(names, COLOURS):
    label = name.removeprefix(PREFIX)
    score = np.array([float(row[name]) for row in rows])
    above.plot(compute, score, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
    budgets, best = _best(compute, loss, score)
    above.plot(budgets, best, color=colour, label=f"{label}, run of lowest loss")
    data.add(label, compute, score)
    data.add(f"{label} of the run of lowest loss", budgets, best)
    chance = [float(row[CHANCE + label]) for row in rows if row.get(CHANCE + label)]
    if chance:
      above.axhline(np.mean(chance), color=colour, linestyle=":", linewidth=1)
      data.add(f"{label} by chance", compute[:1], np.array([np.mean(chance)]))
  below.plot(compute, loss, "o", color="0.4", markersize=4, alpha=0.6, markeredgewidth=0)
  data.add("loss", compute, loss)
  above.set(xscale="log", ylim=(-0.03, 1.03), ylabel="share right (dotted: chance)")
  below.set(xscale="log", yscale="log", xlabel="compute", ylabel="loss")
  canvas.plain_y(below)
  canvas.plain_x(below)
  above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
  return figure, data


def _best(compute: np.ndarray, loss: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Compute and score of the run of lowest loss at each budget."""
  order = np.argsort(compute)
  groups = np.split(order, np.flatnonzero(np.diff(np.log(compute[order])) > np.log1p(SAME)) + 1)
  best = [group[np.argmin(loss[group])] for group in groups]
  return compute[best], score[best]
