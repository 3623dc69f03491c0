"""python -m sora_jax.scaling_laws compare: what 1x, 4x and 32x compute make of the same noise and prompts.

Writes compare.png (a row for each prompt, a column for each compute, frames side by side), compare.mp4 (the
same, moving) and compare.json with held-out loss, attribute accuracy and the hashes of noise and prompts.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from data_pipelines import video_io
from sora_jax import evaluate, prompts, trained
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request, SampleConfig, generate_float
from sora_jax.ladder.run import Place, places
from sora_jax.scaling import ladder
from sora_jax.trained import TrainedRun

FLAGS = flags.FLAGS
NAME = "compare"
TOLERANCE = 0.3  # of the ratio of computes
CELL, GAP, FRAMES, FONT = 64, 4, 4, 12
TEXT_WIDTH, LINE = 150, FONT + 4
HOLD = 3  # times the clips are shown in the MP4


class Same(nnx.Module):
  """A network that takes its noisy input for the clean video: one step from noise gives the noise back."""

  def text_encoder(self, batch):
    width = np.zeros((*batch.text_ids_BM.shape, 1), np.float32)
    return width, np.zeros((*batch.fps_BN.shape, 1), np.float32)

  def denoiser(self, z_BLC, t_BN, batch, text_BMD, pooled_BND):
    del t_BN, batch, text_BMD, pooled_BND
    return z_BLC


def define_flags() -> None:
  flags.DEFINE_string("multiples", "1,4,32", "compare: of the smallest budget's compute.")
  flags.DEFINE_string("prompts_file", None, "compare: prompts with sizes, see sora_jax/prompts.py.")
  flags.DEFINE_integer("num_prompts", 6, "compare: without a file, scenes of the synthetic shapes.")


def main() -> int:
  if not FLAGS.plan or not FLAGS.output:
    raise ValueError("both --plan=FILE and --output=DIR are needed")
  multiples = ladder.parse_numbers(FLAGS.multiples, "multiples")
  chosen = choose(places(FLAGS.plan, FLAGS.runs_dir)[1], multiples)
  runs = [trained.load(place.workdir) for place in chosen]
  requests = _requests(runs[0])
  config = runs[0].sample
  hashes = [noise_hash(run, requests) for run in runs]
  told = prompts_hash(requests)
  for place, found in zip(chosen, hashes):
    print(f"{place.run.name}: noise {found}, prompts {told}")
  if len(set(hashes)) > 1:
    raise ValueError(f"the runs would not start from the same noise: {', '.join(hashes)}")
  videos = [trained.sample(run, requests, config) for run in runs]
  measured = [place.measured() for place in chosen]
  columns = [
    _column(multiple, place, found, chosen[0].measured()["compute"])
    for multiple, place, found in zip(multiples, chosen, measured)
  ]
  folder = Path(FLAGS.output)
  folder.mkdir(parents=True, exist_ok=True)
  captions = [request.prompt for request in requests]
  video_io.write_png(folder / f"{NAME}.png", sheet(videos, captions, columns))
  video_io.write_mp4(
    folder / f"{NAME}.mp4", moving(videos, captions, columns), max(r.fps for r in requests) or 8
  )
  result = {
    "noise_sha256": hashes[0],
    "prompts_sha256": told,
    "sampler": dataclasses.asdict(config),
    "runs": [{"multiple": m, "name": p.run.name, **f} for m, p, f in zip(multiples, chosen, measured)],
    **judge(measured),
  }
  (folder / f"{NAME}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  for column in columns:
    print(" | ".join(column))
  print(f"loss strictly falling: {result['loss_strictly_falling']}; "
        f"accuracy not falling: {result['accuracy_not_falling']}")  # fmt: skip
  print(folder / f"{NAME}.png")
  return 0


def choose(todo: Sequence[Place], multiples: Sequence[float]) -> list[Place]:
  """The run of lowest held-out loss at each multiple of the smallest budget."""
  done = [place for place in todo if place.measured()]
  if not done:
    raise ValueError("no run of the plan is measured yet: python -m sora_jax.scaling_laws run")
  least = min(place.run.budget for place in done) / min(multiples)
  chosen = []
  for multiple in multiples:
    near = [p for p in done if abs(np.log(p.run.budget / (least * multiple))) < np.log1p(TOLERANCE)]
    if not near:
      there = sorted({round(place.run.budget / least, 2) for place in done})
      raise ValueError(
        f"no finished run of {multiple:g}x compute; there are {', '.join(f'{m:g}x' for m in there)}: "
        f"--multiples={','.join(f'{m:g}' for m in there)}"
      )
    chosen.append(min(near, key=lambda place: place.measured()["loss"]))
  return chosen


def judge(measured: Sequence[dict]) -> dict:
  losses = [found["loss"] for found in measured]
  accuracy = [found["accuracy"]["mean"] for found in measured if "accuracy" in found]
  return {
    "loss_strictly_falling": bool(np.all(np.diff(losses) < 0)),
    "accuracy_not_falling": bool(np.all(np.diff(accuracy) >= 0)) if len(accuracy) == len(losses) else None,
  }


def _requests(run: TrainedRun) -> list[Request]:
  if FLAGS.prompts_file:
    lines = prompts.read(FLAGS.prompts_file)
    keys = {field.name for field in dataclasses.fields(Request)}
    wanted = ("width", "height", "num_frames", "fps")
    if any(key not in line for line in lines for key in wanted):
      raise ValueError(f"{FLAGS.prompts_file}: each prompt needs --w, --h, --f and --fps")
    return [
      Request(**{"index": i} | {k: v for k, v in line.items() if k in keys}) for i, line in enumerate(lines)
    ]
  if run.data.source != "synthetic":
    raise ValueError("--prompts_file is needed: only for synthetic shapes are there prompts without one")
  scenes = evaluate.held_out_scenes(FLAGS.num_prompts, FLAGS.seed)
  return evaluate.requests(scenes, [evaluate.fitted(run, scene) for scene in scenes], seed=FLAGS.seed)


def noise_hash(run: TrainedRun, requests: Sequence[Request]) -> str:
  """Of the noise that sampling from `run` starts at."""
  noise = generate_float(
    Same(),
    requests,
    config=SampleConfig(sampler="euler", num_inference_steps=1, guidance_scale=1.0),
    diffusion=ObjectiveConfig(path="rectified_flow", prediction="x0"),
    tokenize=run.tokenizer,
    spec=run.spec,
    patch=run.data.patch,
  )
  return _digest(np.asarray(one, np.float32).tobytes() for one in noise)


def prompts_hash(requests: Sequence[Request]) -> str:
  """Of all that is asked for: texts, sizes, seeds."""
  return _digest(repr(dataclasses.replace(r, prompt_frames=None)).encode() for r in requests)


def _digest(parts) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part)
  return digest.hexdigest()[:16]


def _column(multiple: float, place: Place, found: dict, least: float) -> list[str]:
  lines = [f"{multiple:g}x compute", f"{found['compute']:.3g} FLOPs ({found['compute'] / least:.1f}x)"]
  lines += [f"{found['params']:,} params, {found['steps']:,} steps", f"held-out loss {found['loss']:.4f}"]
  if "accuracy" in found:
    right = found["accuracy"]
    lines.append(f"colour {right['colour']:.2f}, direction {right['direction']:.2f}")
  return lines


def sheet(
  videos: Sequence[Sequence[np.ndarray]], captions: Sequence[str], columns: Sequence[list[str]]
) -> np.ndarray:
  """uint8 (H, W, 3): each cell shows FRAMES frames of its video."""
  strips = []
  for of_run in videos:
    picked = [video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)] for video in of_run]
    strips.append([[_fit(frame) for frame in frames] for frames in picked])
  return _draw(strips, captions, columns)


def moving(
  videos: Sequence[Sequence[np.ndarray]], captions: Sequence[str], columns: Sequence[list[str]]
) -> np.ndarray:
  """uint8 (T, H, W, 3): each cell plays its video, held at its end."""
  num = max(len(video) for of_run in videos for video in of_run)
  frames = []
  for t in range(num):
    cells = [[[_fit(video[min(t, len(video) - 1)])] for video in of_run] for of_run in videos]
    frames.append(_even(_draw(cells, captions, columns)))
  return np.concatenate([np.stack(frames)] * HOLD)


def _draw(cells, captions: Sequence[str], columns: Sequence[list[str]]) -> np.ndarray:
  """`cells[column][row]` are the pictures of a cell."""
  font = ImageFont.load_default(size=FONT)
  per_cell = max(len(cell) for column in cells for cell in column)
  width = (
    max(per_cell * (CELL + GAP), 8 * max(len(line) for lines in columns for line in lines[1:])) + 2 * GAP
  )
  height = CELL + 2 * GAP
  foot = LINE * max(len(lines) for lines in columns)
  size = (TEXT_WIDTH + width * len(columns), LINE + height * len(captions) + foot + GAP)
  picture = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(picture)
  for row, caption in enumerate(captions):
    words, lines = caption.split(), [""]
    for word in words:
      lines = (
        [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 22 else [*lines, word]
      )
    draw.multiline_text((GAP, LINE + row * height + GAP), "\n".join(lines[:4]), fill="black", font=font)
  for column, lines in enumerate(columns):
    x = TEXT_WIDTH + column * width
    draw.text((x, 1), lines[0], fill="black", font=font)
    for row, cell in enumerate(cells[column]):
      for place, frame in enumerate(cell):
        picture.paste(frame, (x + place * (CELL + GAP), LINE + row * height + GAP))
    draw.multiline_text((x, LINE + height * len(captions)), "\n".join(lines[1:]), fill="black", font=font)
  return np.asarray(picture)


def _fit(frame: np.ndarray) -> Image.Image:
  image = Image.fromarray(frame)
  scale = CELL / max(image.size)
  return image.resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.NEAREST)


def _even(frame: np.ndarray) -> np.ndarray:
  """H.264 wants even sides."""
  return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
