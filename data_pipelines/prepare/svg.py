"""Small plots as SVG text, for pages that must not wait for a plotting library."""

import html
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 190, 34, 34, 10
_BINS = 30
_COLORS = ("#7aa6d1", "#d9822b")
_TICK_STEPS = (1, 2, 2.5, 5, 10)


def histogram(series: dict[str, Sequence[float]], label: str, *, logarithmic: bool = False) -> str:
  """Counts of each series in common bins, drawn over each other."""
  values = [v for part in series.values() for v in part if not logarithmic or v > 0]
  if not values:
    return _frame("", label, series)
  place = math.log10 if logarithmic else float
  low, high = place(min(values)), place(max(values))
  if high - low < 1e-9:
    low, high = low - 0.5, high + 0.5
  counts = {}
  for name, part in series.items():
    bins = [0] * _BINS
    for v in part:
      if not logarithmic or v > 0:
        bins[min(_BINS - 1, int((place(v) - low) / (high - low) * _BINS))] += 1
    counts[name] = bins
  most = max(max(bins) for bins in counts.values())
  inner_w, inner_h = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - _TOP
  parts = []
  for color, bins in zip(_COLORS, counts.values()):
    for k, n in enumerate(bins):
      if n:
        h = inner_h * n / most
        x = _LEFT + inner_w * k / _BINS
        parts.append(
          f'<rect x="{x:.1f}" y="{_TOP + inner_h - h:.1f}" width="{inner_w / _BINS:.1f}" height="{h:.1f}" '
          f'fill="{color}" fill-opacity=".7"/>'
        )
  ticks = _log_ticks(low, high) if logarithmic else [(t, f"{t:g}") for t in _ticks(low, high)]
  for at, text in ticks:
    x = _LEFT + inner_w * (at - low) / (high - low)
    parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{text}</text>')
  for n in _ticks(0, most):
    if n == int(n):
      y = _TOP + inner_h * (1 - n / most)
      parts.append(f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{int(n)}</text>')
  return _frame("".join(parts), label, series)


def _frame(body: str, label: str, series: dict[str, Sequence[float]]) -> str:
  legend = "".join(
    f'<text x="{_WIDTH - 10}" y="{_TOP + 10 + 12 * k}" text-anchor="end" fill="{color}">'
    f"{html.escape(name)}</text>"
    for k, (color, name) in enumerate(zip(_COLORS, series))
    if len(series) > 1
  )
  base = _HEIGHT - _BOTTOM
  return (
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" font-size="10" role="img">'
    f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - 8}" stroke="#888" fill="none"/>{body}{legend}'
    f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">'
    f"{html.escape(label)}</text></svg>"
  )


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
  raw = (high - low) / count
  power = 10 ** math.floor(math.log10(raw))
  step = next(s * power for s in _TICK_STEPS if s * power >= raw)
  first = math.ceil(low / step - 1e-9)
  return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
  values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
  inside = [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
  return [(math.log10(v), f"{v:g}") for v in inside[:: max(1, len(inside) // 6)]]
