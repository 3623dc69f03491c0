"""The best batch and learning rate by tokens and size: B = k T^a N^b (Yin et al. 2024, arXiv:2411.17470).

From a sweep, the best value of each size and number of tokens is the minimum of a parabola in its logarithm;
a table of best values (a row for each size and number of tokens) is taken as it is.
"""

import dataclasses

import numpy as np

from sora_jax.scaling import bootstrap
from sora_jax.scaling.table import Table, budgets

LAWS = ("batch", "lr")
LETTERS = ("k", "a", "b")
MIN_CELLS, MIN_VALUES = 5, 3
MIN_RATIO, MAX_CORRELATION = 2.0, 0.999


@dataclasses.dataclass(frozen=True)
class Cell:
  """One size and number of tokens: the values tried, the best loss of each, and the best value."""

  params: float
  tokens: float
  values: np.ndarray
  losses: np.ndarray
  best: float
  coefficients: np.ndarray | None  # of log loss by log value; None where the best value was given

  def curve(self, values: np.ndarray) -> np.ndarray:
    return np.exp(np.polyval(self.coefficients, np.log(values)))


@dataclasses.dataclass(frozen=True)
class HyperFit:
  law: str
  cells: tuple[Cell, ...]
  theta: np.ndarray  # log k, a, b at the mean of log T and log N
  shift: np.ndarray
  samples_KP: np.ndarray | None
  notes: tuple[str, ...] = ()

  def letters(self) -> dict[str, float]:
    return {letter: float(value[0]) for letter, value in self._letters(self.theta[None]).items()}

  def sampled_letters(self) -> dict[str, np.ndarray]:
    return {} if self.samples_KP is None else self._letters(self.samples_KP)

  def predict(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    x = np.stack([np.log(tokens), np.log(params)]) - self.shift[:, None]
    return np.exp(self.theta[0] + self.theta[1:] @ x)

  def residuals(self) -> np.ndarray:
    """Of the logarithm of the best value."""
    params, tokens, best = (
      np.array([getattr(c, k) for c in self.cells]) for k in ("params", "tokens", "best")
    )
    return np.log(best) - np.log(self.predict(params, tokens))

  def _letters(self, theta_KP: np.ndarray) -> dict[str, np.ndarray]:
    log_k = theta_KP[:, 0] - theta_KP[:, 1:] @ self.shift
    return {"k": np.exp(log_k), "a": theta_KP[:, 1], "b": theta_KP[:, 2]}


def fit(law: str, table: Table, *, num: int = 0, seed: int = 0) -> HyperFit:
  cells, notes = find_cells(law, table)
  return fit_cells(law, cells, notes, num=num, seed=seed)


def fit_cells(law: str, cells: list[Cell], notes: list[str], *, num: int = 0, seed: int = 0) -> HyperFit:
  """A plane through the logarithms, by least squares; replicas draw its residuals anew."""
  if len(cells) < MIN_CELLS:
    raise ValueError(
      f"the law {law} needs {MIN_CELLS} or more best values, each of another size or number of tokens; there "
      f"are {len(cells)}" + "".join(f"; {note}" for note in notes)
    )
  x = np.log([[cell.tokens for cell in cells], [cell.params for cell in cells]])
  for name, values in zip(("tokens", "params"), x):
    if np.ptp(values) < np.log(MIN_RATIO):
      raise ValueError(f"the law {law} needs {name} that differ by a factor of {MIN_RATIO:g} or more")
  if abs(np.corrcoef(x)[0, 1]) > MAX_CORRELATION:
    raise ValueError(f"the law {law} cannot tell params from tokens: they move together in every run")
  shift = x.mean(axis=1)
  design = np.column_stack([np.ones(len(cells)), (x - shift[:, None]).T])
  y = np.log([cell.best for cell in cells])
  theta = np.linalg.lstsq(design, y, rcond=None)[0]
  samples = None
  if num:
    residual = y - design @ theta
    errors = bootstrap.draw(residual, num, num_runs=len(y), num_parameters=len(theta), seed=seed)
    samples = np.linalg.lstsq(design, (design @ theta + errors).T, rcond=None)[0].T
  return HyperFit(law, tuple(cells), theta, shift, samples, tuple(notes))


def find_cells(law: str, table: Table) -> tuple[list[Cell], list[str]]:
  """Best values by size and tokens, and why others are left out."""
  values = getattr(table, law)
  cells, notes = [], []
  for size in np.unique(table.params):
    same = np.flatnonzero(table.params == size)
    for group in budgets(table.tokens[same]):
      rows = same[group]
      tried = np.unique(values[rows])
      # Where the other setting was swept too, the best of it counts.
      losses = np.array([table.loss[rows[values[rows] == v]].min() for v in tried])
      tokens = float(np.exp(np.log(table.tokens[rows]).mean()))
      cell, why = _best(float(size), tokens, tried, losses)
      if cell:
        cells.append(cell)
      else:
        notes.append(f"{size:.4g} parameters, {tokens:.4g} tokens: {why}")
  return cells, notes


def _best(params: float, tokens: float, tried: np.ndarray, losses: np.ndarray) -> tuple[Cell | None, str]:
  if len(tried) == 1:
    return Cell(params, tokens, tried, losses, float(tried[0]), None), ""
  if len(tried) < MIN_VALUES:
    return None, f"{len(tried)} values tried, {MIN_VALUES} are the least"
  x = np.log(tried)
  near = np.argsort(losses)[: max(MIN_VALUES, len(tried) // 2 + 1)]  # far from the best it is no parabola
  coefficients = np.polyfit(x[near], np.log(losses[near]), 2)
  bend, slope, _ = coefficients
  if bend <= 0 or not x[0] <= -slope / (2 * bend) <= x[-1]:
    return None, "the best value does not lie among those tried"
  return Cell(params, tokens, tried, losses, float(np.exp(-slope / (2 * bend))), coefficients), ""


def held_out(law: str, table: Table) -> dict:
  """The law without the largest cell (by params x tokens), and how far it misses its best value."""
  try:
    cells, notes = find_cells(law, table)
    if not cells:
      raise ValueError("; ".join(notes))
    largest = max(cells, key=lambda cell: cell.params * cell.tokens)
    rest = fit_cells(law, [cell for cell in cells if cell is not largest], notes)
  except ValueError as error:
    return {"refused": str(error)}
  predicted = float(rest.predict(np.array([largest.params]), np.array([largest.tokens]))[0])
  error = abs(predicted / largest.best - 1)
  return {
    "params": largest.params,
    "tokens": largest.tokens,
    law: largest.best,
    "predicted": predicted,
    "relative_error": error,
  }
