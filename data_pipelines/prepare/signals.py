"""What small pictures tell of a clip: light, motion, black bars, hashes."""

import dataclasses

import numpy as np
from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BAR_LEVEL = 14  # of 255: darker than this is a bar
_CELLS = 12
_HASH_AT = (0.1, 0.5, 0.9)  # of a clip


@dataclasses.dataclass(frozen=True)
class Signals:
  """One entry per frame."""

  luma: np.ndarray
  contrast: np.ndarray
  change: np.ndarray  # mean change of a pixel since the frame before; 0 for the first
  rows: np.ndarray  # (frames, height): how bright each row is
  columns: np.ndarray
  grids: np.ndarray  # (frames, 8, 9) grey
  cells: np.ndarray  # (frames, 12, 12, 3)


class Collector:
  """Takes frames in order, uint8 (H, W, 3), all of one size."""

  def __init__(self):
    self._parts: list[tuple] = []
    self._last: np.ndarray | None = None

  def add(self, frame: np.ndarray) -> None:
    grey = (frame @ _LUMA).astype(np.uint8)
    change = 0.0
    if self._last is not None:
      change = float(np.abs(grey.astype(np.int16) - self._last).mean())
    self._last = grey.astype(np.int16)
    height, width = grey.shape
    self._parts.append((
      grey.mean(),
      grey.std(),
      change,
      np.partition(grey, int(0.95 * (width - 1)), axis=1)[:, int(0.95 * (width - 1))],
      np.partition(grey, int(0.95 * (height - 1)), axis=0)[int(0.95 * (height - 1))],
      np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX)),
      np.asarray(Image.fromarray(frame).resize((_CELLS, _CELLS), Image.Resampling.BOX)),
    ))  # fmt: skip

  def __len__(self) -> int:
    return len(self._parts)

  def signals(self) -> Signals:
    columns = list(zip(*self._parts))
    return Signals(*(np.array(c, np.float32) for c in columns[:3]), *(np.stack(c) for c in columns[3:]))


def cut(signals: Signals, first: int, stop: int) -> Signals:
  part = Signals(*(getattr(signals, f.name)[first:stop].copy() for f in dataclasses.fields(Signals)))
  part.change[0] = 0.0  # since a frame of another clip
  return part


def scores(signals: Signals) -> dict[str, float]:
  moves = signals.change[1:]
  return {
    "luma": round(float(signals.luma.mean()), 3),
    "contrast": round(float(signals.contrast.mean()), 3),
    "motion": round(float(moves.mean()), 4) if len(moves) else 0.0,
    "jump": round(float(moves.max()), 3) if len(moves) else 0.0,
  }


def bars(signals: Signals) -> tuple[float, float, float, float]:
  """Shares of (left, right, top, bottom) that stay black throughout; bars come in pairs of about one size."""
  left, right = _pair(signals.columns.max(axis=0))
  top, bottom = _pair(signals.rows.max(axis=0))
  return left, right, top, bottom


def _pair(brightest: np.ndarray) -> tuple[float, float]:
  lit = np.flatnonzero(brightest > _BAR_LEVEL)
  if not lit.size:
    return 0.0, 0.0
  count = len(brightest)
  first, last = int(lit[0]), count - 1 - int(lit[-1])
  if min(first, last) < 2 or abs(first - last) > max(2, 0.25 * max(first, last)):
    return 0.0, 0.0
  return (first + 1) / count, (last + 1) / count  # the edge itself is half black


def hashes(signals: Signals) -> tuple[list[str], str]:
  """dHash of frames of a clip (64 bits: is a cell brighter than its left neighbour), and their colours."""
  count = len(signals.luma)
  places = [int(share * count) for share in _HASH_AT] if count > 1 else [0]
  marks = []
  for place in places:
    grid = signals.grids[place].astype(np.int16)
    bits = (grid[:, 1:] > grid[:, :-1]).reshape(-1)
    marks.append(np.packbits(bits).tobytes().hex())
  return marks, signals.cells[places].tobytes().hex()
