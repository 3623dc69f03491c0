"""Figures of a fitted law, each as PNG, PDF and SVG with its data beside it as CSV."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sora_jax.scaling import bootstrap, canvas, hyper, hyper_figures, report, table
from sora_jax.scaling.canvas import GUESS, LINE, Data
from sora_jax.scaling.hyper import HyperFit
from sora_jax.scaling.isoflop import Result
from sora_jax.scaling.laws import Fit
from sora_jax.scaling.report import Optimum
from sora_jax.scaling.table import Table, budgets

NUM_POINTS = 120
MAX_CURVES = 10  # IsoFLOP curves shown of a parametric law


def write(
  law: str, runs: Table, fitted: Fit | Result | HyperFit, folder: str | Path, *, extrapolate: float = 10.0
) -> list[Path]:
  """Paths of all files written."""
  return canvas.save(draw(law, runs, fitted, extrapolate=extrapolate), folder)


def draw(law: str, runs: Table, fitted: Fit | Result | HyperFit, *, extrapolate: float) -> Iterator:
  """(name, figure, data) of each figure that the law allows."""
  if law in hyper.LAWS:
    yield from hyper_figures.draw(fitted, extrapolate=extrapolate)
    return
  if runs.compute is not None:
    yield "loss_compute", *loss_compute(law, runs, fitted, extrapolate=extrapolate)
  if law in ("chinchilla", "isoflop"):
    yield "isoflop", *isoflop_curves(runs, fitted)
  if law in ("chinchilla", "isoflop", "envelope"):
    yield "optimal", *optimal(runs, fitted, extrapolate=extrapolate)
  if law != "envelope":
    yield "residuals", *residuals(runs, fitted)


def loss_compute(law: str, runs: Table, fitted: Fit | Result, *, extrapolate: float) -> tuple[Figure, Data]:
  figure, axes = canvas.figure()
  data = Data()
  _runs(figure, axes, runs, runs.loss)
  data.add("runs", runs.compute, runs.loss)
  shown = [runs.loss]
  front = table.frontier(runs)
  label = "best run of each budget"
  axes.plot(front.compute, front.loss, color="0.35", linewidth=0.9, label=label)
  data.add("frontier", front.compute, front.loss)
  if isinstance(fitted, Result):
    optima = fitted.optima
    label = "minima of the parabolas" if law == "isoflop" else "envelope of the curves"
    axes.plot(optima.compute, optima.loss, "D-", color=LINE, markersize=4, label=label)
    data.add("minima", optima.compute, optima.loss)
  else:
    grid = _grid(runs.compute, extrapolate)
    if law == "chinchilla":
      value = report.best_loss(fitted, runs, grid)
      low, high = _best_loss_ends(fitted, runs, grid) if fitted.samples_KP is not None else (None, None)
    else:
      at = Table(loss=np.ones_like(grid), compute=grid)
      value, low, high = fitted.predict(at), None, None
      if fitted.samples_KP is not None:
        low, high = bootstrap.interval(fitted.predict(at, fitted.samples_KP))
    what = "fit at the best size" if law == "chinchilla" else "fit"
    _line(axes, grid, value, low, high, until=runs.compute.max(), label=what)
    shown.append(value)
    data.add("fit", grid, value, low, high)
    if law != "chinchilla":
      _letters(axes, fitted)
  axes.set(xscale="log", yscale="log", xlabel="compute", ylabel="loss")
  canvas.hold_y(axes, *shown)
  canvas.plain_y(axes)
  axes.legend(frameon=False, loc="upper right")
  return figure, data


def isoflop_curves(runs: Table, fitted: Fit | Result) -> tuple[Figure, Data]:
  """Loss by size at equal compute: parabolas, or cuts of the parametric law."""
  figure, axes = canvas.figure()
  data = Data()
  cuts = list(_parabola_cuts(runs, fitted) if isinstance(fitted, Result) else _law_cuts(runs, fitted))
  norm = LogNorm(*_span(np.array([compute for compute, *_ in cuts])))
  colours = matplotlib.colormaps["viridis"]
  for compute, rows, sizes, losses, _ in cuts:
    colour = colours(0.9 * norm(compute))
    axes.plot(runs.params[rows], runs.loss[rows], "o", color=colour, markersize=3.5, markeredgewidth=0)
    axes.plot(sizes, losses, color=colour, linewidth=1.1)
    data.add(f"runs at compute {compute:.6g}", runs.params[rows], runs.loss[rows])
    data.add(f"fit at compute {compute:.6g}", sizes, losses)
    axes.annotate(f"{compute:.2g}", (sizes[-1], losses[-1]), (3, 0), textcoords="offset points", **SMALL)
  minima = np.array([best for *_, best in cuts]).T
  axes.plot(*minima, "D--", color=LINE, markersize=4, linewidth=1, label="minima")
  data.add("minima", *minima)
  axes.set(xscale="log", yscale="log", xlabel="parameters (labels: compute)", ylabel="loss")
  axes.margins(x=0.12)
  canvas.plain_x(axes)
  canvas.plain_y(axes)
  axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
  return figure, data


SMALL = {"fontsize": 6.5, "va": "center"}


def optimal(runs: Table, fitted: Fit | Result, *, extrapolate: float) -> tuple[Figure, Data]:
  """Best size and tokens by compute."""
  figure, panels = canvas.figure(columns=2)
  data = Data()
  lines: Optimum = report.optimum(fitted, runs)
  grid = _grid(np.array(lines.compute_range), extrapolate)
  for axes, which, exponent, name in zip(panels, ("params", "tokens"), "ab", ("parameters", "tokens")):
    letter = "N" if which == "params" else "D"
    value, low, high = lines.line(which, grid)
    ends = f" {_between(lines.samples[exponent])}" if lines.samples else ""
    label = f"${letter}_{{opt}} \\propto C^{{{lines.letters[exponent]:.3f}}}$" + ends
    _line(axes, grid, value, low, high, until=lines.compute_range[1], label=label)
    shown = [value]
    data.add(f"optimal {name}", grid, value, *((low, high) if lines.samples else ()))
    if isinstance(fitted, Result):
      points = getattr(fitted.optima, which)
      axes.plot(fitted.optima.compute, points, "D", color="0.2", markersize=4, label="minima")
      shown.append(points)
      data.add(f"minima {name}", fitted.optima.compute, points)
    else:
      values = getattr(runs, which)
      compute = runs.compute
      axes.plot(compute, values, ".", color="0.6", markersize=3, label="runs", zorder=0)
      shown.append(values)
      data.add(f"runs {name}", compute, values)
    axes.set(xscale="log", yscale="log", xlabel="compute", ylabel=f"best number of {name}")
    canvas.hold_y(axes, *shown)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
  return figure, data


def residuals(runs: Table, fitted: Fit | Result) -> tuple[Figure, Data]:
  """How far each run lies from the fit, relative to its loss."""
  figure, axes = canvas.figure()
  data = Data()
  if isinstance(fitted, Result):
    runs, missed = runs.rows(fitted.rows), np.expm1(fitted.residuals)
  else:
    missed = np.expm1(fitted.residuals())
  _runs(figure, axes, runs, 100 * missed)
  axes.axhline(0, color=LINE, linewidth=1)
  rms = 100 * float(np.sqrt(np.mean(missed**2)))
  axes.axhspan(-rms, rms, color=LINE, alpha=0.08, linewidth=0, label=f"root mean square: {rms:.2g} %")
  data.add("loss / fit - 1", runs.compute, missed)
  axes.set(xscale="log", xlabel="compute", ylabel="loss above the fit (%)")
  axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
  return figure, data


def _parabola_cuts(runs: Table, result: Result) -> Iterator:
  del runs
  for parabola in result.parabolas:
    low, high = parabola.span
    sizes = np.exp(np.linspace(low - 0.15, high + 0.15, NUM_POINTS) + parabola.centre)
    size, _, loss = parabola.minimum()
    yield parabola.compute, parabola.rows, sizes, parabola.loss(sizes), (float(size), float(loss))


def _law_cuts(runs: Table, fitted: Fit) -> Iterator:
  """At the budgets of the data where they share some, else spread over the compute seen."""
  k = report.flops_per_param_token(runs)
  groups = [rows for rows in budgets(runs.compute) if len(rows) >= 3]
  groups = [rows for rows in groups if table.is_one_budget(runs.compute[rows])]
  if not 2 <= len(groups) <= MAX_CURVES:
    edges = np.linspace(*np.log(_span(runs.compute)), 7)
    # Only runs near the middle of a slice lie near its curve.
    middle = (edges[1:] + edges[:-1]) / 2
    near = [np.abs(np.log(runs.compute) - at) < 0.15 * (edges[1] - edges[0]) for at in middle]
    groups, computes = [np.flatnonzero(mask) for mask in near], np.exp(middle)
  else:
    computes = [np.exp(np.log(runs.compute[rows]).mean()) for rows in groups]
  lines = report.optimum(fitted, runs)
  for compute, rows in zip(computes, groups):
    one = np.array([compute])
    best = float(lines.line("params", one)[0][0])
    spread = np.append(runs.params[rows], best)
    sizes = np.geomspace(min(spread.min(), best / 3), max(spread.max(), best * 3), NUM_POINTS)
    at = Table(loss=np.ones_like(sizes), params=sizes, tokens=compute / (k * sizes))
    yield (
      float(compute),
      rows,
      sizes,
      fitted.predict(at),
      (best, float(report.best_loss(fitted, runs, one)[0])),
    )


def _best_loss_ends(fitted: Fit, runs: Table, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Interval of the loss at each replica's own best size."""
  samples = report.optimum(fitted, runs).samples
  n, d = (samples[k][:, None] * grid ** samples[e][:, None] for k, e in (("k_N", "a"), ("k_D", "b")))
  letters = {letter: values[:, None] for letter, values in fitted.sampled_letters().items()}
  loss = letters["E"] + letters["A"] * n ** -letters["alpha"] + letters["B"] * d ** -letters["beta"]
  return bootstrap.interval(loss)


def _runs(figure: Figure, axes: Axes, runs: Table, values: np.ndarray) -> None:
  """Runs as points, coloured by size where it is known."""
  if runs.params is None or np.ptp(runs.params) == 0:
    axes.plot(runs.compute, values, "o", color=GUESS, markersize=3.5, markeredgewidth=0, label="runs")
    return
  norm = LogNorm(*_span(runs.params))
  axes.scatter(runs.compute, values, c=runs.params, norm=norm, s=12, linewidths=0, label="runs")
  figure.colorbar(ScalarMappable(norm), ax=axes, label="parameters", pad=0.02)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, low, high, *, until: float, label: str) -> None:
  """Solid over the data, dashed beyond."""
  seen = x <= until * (1 + 1e-9)
  axes.plot(x[seen], y[seen], color=LINE, label=label)
  if not seen.all():
    axes.plot(x[seen.sum() - 1 :], y[seen.sum() - 1 :], "--", color=LINE, label="extrapolated")
  if low is not None and np.any(high > low):
    axes.fill_between(
      x, low, high, color=LINE, alpha=0.18, linewidth=0, label=f"{bootstrap.LEVEL:.0%} interval"
    )


def _letters(axes: Axes, fitted: Fit) -> None:
  values = fitted.letters()
  text = "\n".join([fitted.law.form, *(f"{letter} = {value:.4g}" for letter, value in values.items())])
  axes.text(0.03, 0.04, text, transform=axes.transAxes, fontsize=7.5, va="bottom")


def _between(samples: np.ndarray) -> str:
  low, high = bootstrap.interval(samples)
  return f"[{low:.3f}, {high:.3f}]"


def _grid(compute: np.ndarray, extrapolate: float) -> np.ndarray:
  low, high = _span(compute)
  grid = np.geomspace(low, high * extrapolate, NUM_POINTS)
  return np.unique(np.append(grid, high))


def _span(values: np.ndarray) -> tuple[float, float]:
  return float(values.min()), float(values.max())
