"""What all figures share: their look, their files, the data beside them."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sora_jax.scaling import table

SUFFIXES = ("png", "pdf", "svg")
STYLE = {
  "font.size": 9,
  "axes.labelsize": 9,
  "legend.fontsize": 8,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
  "lines.linewidth": 1.4,
  "pdf.fonttype": 42,  # editable text
  "svg.fonttype": "none",
  "svg.hashsalt": "scaling",  # the same file from the same data
}
WIDTH, HEIGHT = 4.6, 3.3
LINE, GUESS = "#c0392b", "#2c5f8a"


class Data:
  """What a figure shows, as long rows: series, x, y and where there is one the interval."""

  def __init__(self):
    self.columns: dict[str, list] = {name: [] for name in ("series", "x", "y", "low", "high")}

  def add(self, series: str, x: np.ndarray, y: np.ndarray, low=None, high=None) -> None:
    blank = [""] * len(x)
    ends = (blank if low is None else low, blank if high is None else high)
    for name, values in zip(self.columns, ([series] * len(x), x, y, *ends)):
      self.columns[name] += [v if isinstance(v, str) else repr(float(v)) for v in values]


def save(figures: Iterable[tuple[str, Figure, Data]], folder: str | Path) -> list[Path]:
  """Paths of all files written; draws them in the style above, so give a generator."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  with matplotlib.rc_context(STYLE):
    for name, figure, data in figures:
      for suffix in SUFFIXES:
        paths.append(folder / f"{name}.{suffix}")
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[suffix]
        figure.savefig(paths[-1], dpi=200, metadata=dated)
      paths.append(folder / f"{name}.csv")
      table.write(paths[-1], data.columns)
  return paths


def figure(columns: int = 1, rows: int = 1):
  """A figure and its axes; several rows share their x."""
  size = (WIDTH if columns == 1 else 7.2, HEIGHT if rows == 1 else 1.4 * HEIGHT)
  made = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(made)
  return made, made.subplots(rows, columns, sharex=rows > 1)


def hold_y(axes: Axes, *drawn: np.ndarray) -> None:
  """Keeps points and lines, the values `drawn`, in view where a wide interval would flatten them."""
  values = np.concatenate(drawn)
  least, most = values.min(), values.max()
  room = max(1.5, most / least)
  low, high = axes.get_ylim()
  axes.set_ylim(max(low, least / room), min(high, most * room))


def plain_y(axes: Axes) -> None:
  """Losses span less than a decade: plain numbers at more places than the powers of ten."""
  low, high = axes.get_ylim()
  ratio = high / low
  if ratio > 30:
    return
  spacing = next(
    step for most, step in ((1.25, 0.05), (1.5, 0.1), (2.2, 0.2), (3.5, 0.5), (np.inf, 0)) if ratio <= most
  )
  subs = tuple(np.arange(1, 10, spacing)) if spacing else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
  axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=8))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())


def plain_x(axes: Axes) -> None:
  """Where x spans little more than a decade, few labels that do not touch."""
  low, high = axes.get_xlim()
  if high < 50 * low:
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+0", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())
