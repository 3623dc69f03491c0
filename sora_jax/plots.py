"""Pictures of a run: contact sheets of samples, the loss curve.

python -m sora_jax.plots --workdir=DIR writes DIR/loss.png.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from sora_jax import cli

GAP, TEXT_WIDTH, FONT_SIZE = 4, 200, 13


def contact_sheet(
  videos: Sequence[np.ndarray], captions: Sequence[str], *, num_frames: int = 8, cell: int = 96
) -> np.ndarray:
  """uint8 (H, W, 3): a sample a line, its caption, then up to `num_frames` frames spread over its time.

  Frames are enlarged by whole factors and shrunk freely, to a longer side of about `cell` pixels.
  """
  font = ImageFont.load_default(size=FONT_SIZE)
  strips = [[_fit(frame, cell) for frame in _spread(video, num_frames)] for video in videos]
  texts = ["\n".join(textwrap.wrap(caption, 30)[:7]) for caption in captions]
  line = FONT_SIZE + 5
  heights = [max(strip[0].height, line * (text.count("\n") + 1)) for strip, text in zip(strips, texts)]
  width = TEXT_WIDTH + max(sum(frame.width + GAP for frame in strip) for strip in strips) + GAP
  sheet = Image.new("RGB", (width, sum(heights) + GAP * (len(heights) + 1)), "white")
  draw = ImageDraw.Draw(sheet)
  y = GAP
  for strip, text, height in zip(strips, texts, heights):
    draw.multiline_text((GAP, y), text, fill="black", font=font)
    x = TEXT_WIDTH
    for frame in strip:
      sheet.paste(frame, (x, y))
      x += frame.width + GAP
    y += height + GAP
  return np.asarray(sheet)


def _spread(video: np.ndarray, num_frames: int) -> list[np.ndarray]:
  index = np.linspace(0, len(video) - 1, min(num_frames, len(video))).round().astype(int)
  return [video[i] for i in index]


def _fit(frame: np.ndarray, cell: int) -> Image.Image:
  image = Image.fromarray(frame)
  longer = max(image.size)
  if longer > cell:
    return image.resize([max(1, round(n * cell / longer)) for n in image.size], Image.Resampling.LANCZOS)
  factor = max(1, round(cell / longer))
  return image.resize([n * factor for n in image.size], Image.Resampling.NEAREST)


def loss_plot(workdir: str | Path, path: str | Path) -> bool:
  """PNG of the training and held-out loss by step; False where the run has logged nothing yet."""
  curves = {key: _curve(workdir, key) for key in ("loss", "eval/loss")}
  if not any(curves.values()):
    return False
  figure = Figure(figsize=(7, 4), layout="tight")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for curve, label, style in zip(curves.values(), ("training", "held out (EMA)"), ("-", "o-")):
    if curve:
      axes.plot(list(curve), list(curve.values()), style, label=label, linewidth=1, markersize=3)
  axes.set(xlabel="step", ylabel="loss")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
  return True


def _curve(workdir: str | Path, key: str) -> dict[int, float]:
  """Step -> value; of steps logged twice (a resumed run), the later line."""
  curve = {}
  path = Path(workdir) / "metrics.jsonl"
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      values = json.loads(line)
    except json.JSONDecodeError:  # a run killed while it wrote
      continue
    if values.get(key) is not None:
      curve[values["step"]] = values[key]
  return dict(sorted(curve.items()))


def main(argv: list[str]) -> None:
  del argv
  workdir = flags.FLAGS.workdir
  if not workdir:
    raise ValueError("--workdir is missing: the folder of a training run")
  path = Path(workdir) / "loss.png"
  if not loss_plot(workdir, path):
    raise ValueError(f"{workdir} holds no losses (metrics.jsonl)")
  print(path)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Workdir of a training run.")
  cli.run(main)
