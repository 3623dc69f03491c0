"""The best size for a compute budget: minima of IsoFLOP parabolas, and the envelope of training curves.

Hoffmann et al., Training Compute-Optimal Large Language Models, approaches 2 and 1:
N_opt = k_N C^a, D_opt = k_D C^b.
"""

import dataclasses

import numpy as np

from sora_jax.scaling import bootstrap
from sora_jax.scaling.table import Table, budgets, is_one_budget

LETTERS = ("k_N", "a", "k_D", "b")
MIN_BUDGETS, MIN_SIZES = 3, 4
MIN_CURVES, MIN_CURVE_POINTS = 5, 3
ENVELOPE_POINTS = 200
MOST_DEGREE = 3  # of the polynomial through a training curve
BEND = 3  # parameters of a parabola


@dataclasses.dataclass(frozen=True)
class Optima:
  """Best size, tokens and loss of G budgets; leading dims of the replicas where it holds those.

  `by_size`: sizes are exact and computes found for them, not the other way round.
  """

  compute: np.ndarray
  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray
  by_size: bool = False

  def letters(self) -> dict[str, np.ndarray]:
    """Straight lines through logarithms, of what was found on what was set: errors of x flatten a line."""
    compute, params, tokens = np.log(self.compute), np.log(self.params), np.log(self.tokens)
    if self.by_size:
      a = 1 / _slope(params, compute)
      b = _slope(params, tokens) * a
    else:
      a, b = _slope(compute, params), _slope(compute, tokens)
    at = compute.mean(axis=-1)
    k_n, k_d = (np.exp(y.mean(axis=-1) - e * at) for y, e in ((params, a), (tokens, b)))
    return dict(zip(LETTERS, (k_n, a, k_d, b)))


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  centred = x - x.mean(axis=-1, keepdims=True)
  return (centred * y).sum(axis=-1) / (centred**2).sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class Curve:
  """The training curve of one size: log loss as a polynomial in log compute; `smooth` maps losses to it."""

  size: float
  compute: np.ndarray  # logarithms
  tokens: np.ndarray
  loss: np.ndarray
  smooth: np.ndarray

  @classmethod
  def of(cls, table: Table, rows: np.ndarray) -> "Curve":
    rows = rows[np.argsort(table.compute[rows])]
    compute, tokens, loss = (np.log(getattr(table, key)[rows]) for key in ("compute", "tokens", "loss"))
    place = (compute - compute.mean()) / max(float(np.ptp(compute)), 1e-9)
    powers = np.vander(place, min(MOST_DEGREE, len(rows) - 2) + 1)
    return cls(float(table.params[rows[0]]), compute, tokens, loss, powers @ np.linalg.pinv(powers))

  @property
  def freedom(self) -> int:
    return round(float(np.trace(self.smooth)))


@dataclasses.dataclass(frozen=True)
class Parabola:
  """log L = p0 x^2 + p1 x + p2 of one budget, x = log N - centre; tokens follow N by a straight line."""

  rows: np.ndarray
  compute: float
  centre: float
  coefficients: np.ndarray
  tokens_line: np.ndarray
  span: tuple[float, float]

  def loss(self, params: np.ndarray) -> np.ndarray:
    return np.exp(np.polyval(self.coefficients, np.log(params) - self.centre))

  def minimum(self, coefficients: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size, tokens and loss there; NaN for a parabola that opens downwards."""
    p = (self.coefficients if coefficients is None else coefficients).T
    x = np.where(p[0] > 0, -p[1] / (2 * np.where(p[0] > 0, p[0], 1.0)), np.nan)
    # A replica with hardly a bend has its minimum anywhere: no further than one span beyond the sizes.
    width = self.span[1] - self.span[0]
    x = np.clip(x, self.span[0] - width, self.span[1] + width)
    tokens = np.exp(np.polyval(self.tokens_line, x))
    return np.exp(x + self.centre), tokens, np.exp(p[0] * x**2 + p[1] * x + p[2])


@dataclasses.dataclass(frozen=True)
class Result:
  """`samples` holds the letters of the replicas; `notes` says what was left out."""

  optima: Optima
  samples: dict[str, np.ndarray] | None
  parabolas: tuple[Parabola, ...] = ()
  residuals: np.ndarray | None = None
  rows: np.ndarray | None = None
  notes: tuple[str, ...] = ()

  def letters(self) -> dict[str, float]:
    return {letter: float(value) for letter, value in self.optima.letters().items()}

  def sampled_letters(self) -> dict[str, np.ndarray]:
    return self.samples


def parabolas(table: Table, *, num: int = 0, seed: int = 0) -> Result:
  """Approach 2. Errors are drawn from the residuals of all budgets together."""
  fitted, notes = _usable(table)
  rows = np.concatenate([parabola.rows for parabola in fitted])
  values = [np.log(parabola.loss(table.params[parabola.rows])) for parabola in fitted]
  residuals = np.log(table.loss[rows]) - np.concatenate(values)
  minima = [parabola.minimum() for parabola in fitted]
  compute = np.array([parabola.compute for parabola in fitted])
  optima = Optima(compute, *(np.array(column) for column in zip(*minima)))
  if not num:
    return Result(optima, None, tuple(fitted), residuals, rows, tuple(notes))
  errors = bootstrap.draw(residuals, num, num_runs=len(rows), num_parameters=BEND * len(fitted), seed=seed)
  drawn, begin = [], 0
  for parabola, value in zip(fitted, values):
    target = value + errors[:, begin : begin + len(value)]
    x = np.log(table.params[parabola.rows]) - parabola.centre
    drawn.append(parabola.minimum(np.polyfit(x, target.T, 2).T))
    begin += len(value)
  columns = [np.stack(column, axis=-1) for column in zip(*drawn)]
  bent = np.isfinite(columns[0]).all(axis=1)
  if not bent.any():
    raise ValueError(
      "the losses are too noisy for IsoFLOP parabolas: no replica bends upwards at all budgets"
    )
  if not bent.all():
    notes.append(f"{(~bent).mean():.1%} of the replicas had a parabola without a minimum and were left out")
  samples = Optima(np.broadcast_to(compute, columns[0].shape)[bent], *(column[bent] for column in columns))
  return Result(optima, samples.letters(), tuple(fitted), residuals, rows, tuple(notes))


def envelope(table: Table, *, num: int = 0, seed: int = 0) -> Result:
  """Approach 1: at each compute, the size whose training curve is lowest.

  Rows of one size are one curve. Replicas draw errors of its points from the residuals of all curves.
  """
  by_size = [np.flatnonzero(table.params == size) for size in np.unique(table.params)]
  curves = [
    Curve.of(table, rows) for rows in by_size if len(np.unique(table.compute[rows])) >= MIN_CURVE_POINTS
  ]
  if len(curves) < MIN_CURVES:
    raise ValueError(
      f"the envelope needs {MIN_CURVES} or more sizes with {MIN_CURVE_POINTS} or more points of their "
      f"training curve, there are {len(curves)}"
    )
  fitted = [curve.smooth @ curve.loss for curve in curves]
  grid = np.linspace(np.log(table.compute.min()), np.log(table.compute.max()), ENVELOPE_POINTS)
  optima = _lowest(grid, curves, fitted)
  if optima is None:
    raise ValueError(
      "the envelope has fewer than three inner sizes that are the best at some compute: the curves must "
      "cross; train more sizes, or for longer"
    )
  if not num:
    return Result(optima, None)
  residuals = np.concatenate([curve.loss - line for curve, line in zip(curves, fitted)])
  freedom = sum(curve.freedom for curve in curves)
  errors = bootstrap.draw(residuals, num, num_runs=len(residuals), num_parameters=freedom, seed=seed)
  ends = np.cumsum([len(line) for line in fitted])[:-1]
  drawn = []
  for error in errors:
    parts = zip(curves, fitted, np.split(error, ends))
    drawn.append(_lowest(grid, curves, [curve.smooth @ (line + part) for curve, line, part in parts]))
  kept = [one for one in drawn if one is not None]
  notes = [] if len(kept) == num else [f"{1 - len(kept) / num:.1%} of the replicas had too few curves"]
  if not kept:
    raise ValueError("too few curves for an interval: no replica keeps three sizes; use --bootstrap=0")
  letters = [one.letters() for one in kept]
  samples = {letter: np.array([one[letter] for one in letters]) for letter in LETTERS}
  return Result(optima, samples, notes=tuple(notes))


def _lowest(grid: np.ndarray, curves: list[Curve], losses: list[np.ndarray]) -> Optima | None:
  """Of each inner size the middle of where it leads: else sizes that lead for long count many times."""
  lines = np.stack([np.interp(grid, c.compute, y, left=np.inf, right=np.inf) for c, y in zip(curves, losses)])
  best = np.where(np.isfinite(lines.min(axis=0)), np.argmin(lines, axis=0), -1)
  # The smallest and the largest size are the best of those tried, not the best there is.
  leading = [(i, np.flatnonzero(best == i)) for i in range(1, len(curves) - 1)]
  points = [(i, int(np.median(at))) for i, at in leading if len(at)]
  points = [(i, at) for i, at in points if np.isfinite(lines[i, at])]
  if len(points) < 3:
    return None
  compute, tokens, loss = np.array(
    [(grid[at], np.interp(grid[at], curves[i].compute, curves[i].tokens), lines[i, at]) for i, at in points]
  ).T
  sizes = np.array([curves[i].size for i, _ in points])
  return Optima(np.exp(compute), sizes, np.exp(tokens), np.exp(loss), by_size=True)


def _usable(table: Table) -> tuple[list[Parabola], list[str]]:
  """Parabolas with a minimum among their sizes, and why others are left out."""
  groups = budgets(table.compute)
  chained = [rows for rows in groups if not is_one_budget(table.compute[rows])]
  groups = [rows for rows in groups if is_one_budget(table.compute[rows])]
  large = [rows for rows in groups if len(np.unique(table.params[rows])) >= MIN_SIZES]
  if len(large) < MIN_BUDGETS:
    raise ValueError(
      f"the law isoflop needs {MIN_BUDGETS} or more compute budgets with {MIN_SIZES} or more sizes each, "
      f"there are {len(large)} (of {len(groups)} budgets)"
    )
  fitted, notes = [], []
  if chained:
    count = sum(map(len, chained))
    notes.append(f"{count} runs whose computes run into each other share no budget: left out")
  if len(large) < len(groups):
    few = len(groups) - len(large)
    notes.append(f"{few} budgets with fewer than {MIN_SIZES} sizes were left out")
  for rows in large:
    parabola = _parabola(table, rows)
    x = np.log(parabola.minimum()[0]) - parabola.centre
    if np.isfinite(x) and parabola.span[0] <= x <= parabola.span[1]:
      fitted.append(parabola)
    else:
      notes.append(f"no minimum among the sizes at compute {parabola.compute:.3g}: left out")
  if len(fitted) < MIN_BUDGETS:
    raise ValueError(
      f"the law isoflop needs {MIN_BUDGETS} budgets whose best size lies among the sizes tried, there are "
      f"{len(fitted)} (of {len(large)}); add smaller or larger sizes"
    )
  return fitted, notes


def _parabola(table: Table, rows: np.ndarray) -> Parabola:
  x = np.log(table.params[rows])
  centre = float(x.mean())
  x = x - centre
  return Parabola(
    rows,
    float(np.exp(np.log(table.compute[rows]).mean())),
    centre,
    np.polyfit(x, np.log(table.loss[rows]), 2),
    np.polyfit(x, np.log(table.tokens[rows]), 1),
    (float(x.min()), float(x.max())),
  )
