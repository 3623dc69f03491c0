"""Figures of the laws of batch and learning rate: the sweeps with their minima, and the law through these."""

from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sora_jax.scaling import bootstrap, canvas
from sora_jax.scaling.canvas import LINE, Data
from sora_jax.scaling.hyper import HyperFit

MOST_NAMED = 8  # curves in a legend
NAMES = {"batch": "tokens a step", "lr": "learning rate"}


def draw(fitted: HyperFit, *, extrapolate: float) -> Iterator[tuple[str, Figure, Data]]:
  if any(cell.coefficients is not None for cell in fitted.cells):
    yield f"{fitted.law}_sweep", *sweeps(fitted)
  yield f"{fitted.law}_law", *law(fitted, extrapolate=extrapolate)


def sweeps(fitted: HyperFit) -> tuple[Figure, Data]:
  """Loss by the setting, a curve for each size and number of tokens."""
  figure, axes = canvas.figure()
  data = Data()
  for cell, colour in zip(fitted.cells, _colours([cell.tokens for cell in fitted.cells])):
    if cell.coefficients is None:
      continue
    name = f"{cell.params:.3g} parameters, {cell.tokens:.3g} tokens"
    axes.plot(cell.values, cell.losses, "o", color=colour, markersize=3.5, markeredgewidth=0)
    grid = np.geomspace(cell.values[0], cell.values[-1], 60)
    axes.plot(grid, cell.curve(grid), color=colour, linewidth=1, label=name)
    axes.plot(cell.best, cell.curve(np.array([cell.best])), "D", color=LINE, markersize=4)
    data.add(f"runs of {name}", cell.values, cell.losses)
    data.add(f"best of {name}", np.array([cell.best]), cell.curve(np.array([cell.best])))
  axes.set(xscale="log", yscale="log", xlabel=NAMES[fitted.law], ylabel="loss")
  canvas.plain_y(axes)
  if len(fitted.cells) <= MOST_NAMED:
    axes.legend(frameon=False, fontsize=6)
  return figure, data


def law(fitted: HyperFit, *, extrapolate: float) -> tuple[Figure, Data]:
  """Best value by tokens, a line for each size, with the interval of the law."""
  figure, axes = canvas.figure()
  data = Data()
  sizes = np.unique([cell.params for cell in fitted.cells])
  most = max(cell.tokens for cell in fitted.cells)
  for size, colour in zip(sizes, _colours(sizes)):
    cells = [cell for cell in fitted.cells if cell.params == size]
    tokens, best = (np.array([getattr(cell, key) for cell in cells]) for key in ("tokens", "best"))
    grid = np.geomspace(tokens.min(), most * extrapolate, 80)
    value = fitted.predict(np.full_like(grid, size), grid)
    low = high = None
    if fitted.samples_KP is not None:
      x = np.stack([np.log(grid), np.full_like(grid, np.log(size))]) - fitted.shift[:, None]
      low, high = bootstrap.interval(np.exp(fitted.samples_KP[:, :1] + fitted.samples_KP[:, 1:] @ x))
      axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    seen = grid <= most
    axes.plot(grid[seen], value[seen], color=colour, label=f"{size:.3g} parameters")
    axes.plot(grid[~seen], value[~seen], "--", color=colour)
    axes.plot(tokens, best, "D", color=colour, markersize=4)
    data.add(f"best at {size:.6g} parameters", tokens, best)
    data.add(f"law at {size:.6g} parameters", grid, value, low, high)
  letters = fitted.letters()
  name = "B" if fitted.law == "batch" else "\\eta"
  title = f"${name} = {letters['k']:.3g}\\; T^{{{letters['a']:.3f}}} N^{{{letters['b']:.3f}}}$"
  axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"best {NAMES[fitted.law]}")
  axes.set_title(title, fontsize=9)
  axes.legend(frameon=False, fontsize=7)
  return figure, data


def _colours(values) -> list:
  values = np.asarray(values, float)
  scale = LogNorm(values.min(), max(values.max(), values.min() * 1.01))
  return [matplotlib.colormaps["viridis"](0.9 * scale(value)) for value in values]
