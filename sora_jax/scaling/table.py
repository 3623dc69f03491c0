"""Runs as a table: params, tokens, compute and loss of each, read from a CSV."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("params", "tokens", "compute", "loss")
BUDGET_TOLERANCE = 0.1  # runs closer than this share a budget
MOST_SPREAD = 1.4  # of compute within a budget
SETTINGS = ("batch", "lr", "steps")  # tokens a step, learning rate, steps: read only where asked for
FLOPS_PER_PARAM_TOKEN = 6.0  # forward and backward of a dense network; used only where a column is missing


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns of equal length; None where the file has none."""

  loss: np.ndarray
  compute: np.ndarray | None = None
  params: np.ndarray | None = None
  tokens: np.ndarray | None = None
  batch: np.ndarray | None = None
  lr: np.ndarray | None = None
  steps: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.loss)

  def rows(self, index: np.ndarray) -> "Table":
    """The rows that `index` (mask or numbers) names."""
    columns = (*COLUMNS, *SETTINGS)
    return Table(**{c: None if (v := getattr(self, c)) is None else v[index] for c in columns})

  def has(self, columns: Sequence[str]) -> bool:
    return all(getattr(self, column) is not None for column in columns)


def read(path: str | Path, settings: Sequence[str] = ()) -> Table:
  """Every column of COLUMNS and `settings` that the file has; other columns are left alone."""
  wanted = (*COLUMNS, *settings)
  with open(path, newline="", encoding="utf-8-sig") as file:
    try:
      text = file.read()
      lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text)))
    except (csv.Error, UnicodeDecodeError) as error:
      raise ValueError(f"{path}: not a CSV file ({error})") from None
  if not lines:
    raise ValueError(f"{path}: empty file; it needs a header line with {', '.join(wanted)}")
  header = [cell.strip().lower() for cell in lines[0]]
  twice = [column for column in wanted if header.count(column) > 1]
  if twice:
    raise ValueError(f"{path}: the column {twice[0]} appears twice in the header")
  if "loss" not in header and not {"batch", "lr"} & set(settings):
    raise ValueError(f"{path}: no column loss; its header is {', '.join(header)}")
  places = {column: header.index(column) for column in wanted if column in header}
  values: dict[tuple[float, ...], int] = {}
  for number, line in enumerate(lines[1:], 2):
    if not any(cell.strip() for cell in line):
      continue
    if any(cell.strip() for cell in line[len(header) :]):
      raise ValueError(f"{path}: row {number}: {len(line)} cells, the header has {len(header)}")
    row = tuple(_number(path, number, column, line, place) for column, place in places.items())
    if row in values:
      raise ValueError(f"{path}: row {number} is a duplicate of row {values[row]}; take one of them out")
    values[row] = number
  if not values:
    raise ValueError(f"{path}: a header and no rows")
  columns = np.array(list(values), np.float64).T
  found = dict(zip(places, columns))
  # A table of best settings needs no losses.
  return complete(Table(**{"loss": np.ones(columns.shape[1])} | found))


def _delimiter(text: str) -> str:
  """Spreadsheets write semicolons where a comma is the decimal sign, or tabs."""
  header = text.partition("\n")[0]
  return next((mark for mark in ",;\t" if mark in header), ",")


def complete(table: Table) -> Table:
  """Of params, tokens and compute, the one that is missing from the other two by C = 6 N D."""
  n, d, c = table.params, table.tokens, table.compute
  if c is None and n is not None and d is not None:
    return dataclasses.replace(table, compute=FLOPS_PER_PARAM_TOKEN * n * d)
  if d is None and n is not None and c is not None:
    return dataclasses.replace(table, tokens=c / (FLOPS_PER_PARAM_TOKEN * n))
  if n is None and d is not None and c is not None:
    return dataclasses.replace(table, params=c / (FLOPS_PER_PARAM_TOKEN * d))
  return table


def require(table: Table, columns: Sequence[str], *, law: str, path: str | Path) -> None:
  missing = [column for column in columns if getattr(table, column) is None]
  if missing:
    raise ValueError(
      f"{path}: no column {', '.join(missing)}; the law {law} needs {', '.join((*columns, 'loss'))}"
    )


def of_length(table: Table, least: int, *, path: str | Path) -> Table:
  """Without runs of fewer steps: one of a few dozen is warm-up as much as training."""
  if table.steps is None:
    raise ValueError(f"{path}: no column steps; --min_steps needs it")
  kept = table.rows(table.steps >= least)
  if not len(kept):
    raise ValueError(f"{path}: no run has {least} steps; the longest has {table.steps.max():.0f}")
  return kept


def frontier(table: Table) -> Table:
  """The run of lowest loss of each compute budget, by compute."""
  best = [rows[np.argmin(table.loss[rows])] for rows in slices(table.compute)]
  return table.rows(np.array(best))


def slices(compute: np.ndarray) -> list[np.ndarray]:
  """As `budgets`; a chain of close computes (points of training curves) is cut where it grows too wide."""
  found = []
  for rows in budgets(compute):
    if is_one_budget(compute[rows]):
      found.append(rows)
      continue
    place = np.log(compute[rows] / compute[rows[0]]) // math.log1p(BUDGET_TOLERANCE)
    found += np.split(rows, np.flatnonzero(np.diff(place)) + 1)
  return found


def budgets(compute: np.ndarray, *, tolerance: float = BUDGET_TOLERANCE) -> list[np.ndarray]:
  """Indices of the runs of each compute budget, ascending; runs closer than `tolerance` share one."""
  order = np.argsort(compute, kind="stable")
  gaps = np.diff(np.log(compute[order])) > math.log1p(tolerance)
  return np.split(order, np.flatnonzero(gaps) + 1)


def is_one_budget(compute: np.ndarray) -> bool:
  """Whether the runs of a group really share a budget: close neighbours may form a chain without end."""
  return float(compute.max() / compute.min()) < MOST_SPREAD


def write(path: str | Path, columns: dict[str, Sequence]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _number(path: str | Path, number: int, column: str, line: list[str], place: int) -> float:
  where = f"{path}: row {number}: column {column}"
  if place >= len(line) or not line[place].strip():
    raise ValueError(f"{where}: empty cell")
  cell = line[place].strip()
  try:
    value = float(cell)
  except ValueError:
    raise ValueError(f"{where}: {cell!r} is not a number") from None
  if not (math.isfinite(value) and value > 0):
    raise ValueError(
      f"{where}: {cell} is not a positive, finite number; leave the row out where its run diverged"
    )
  return value
