"""python -m sora_jax.evaluate --workdir=DIR: how often samples show the colour and direction asked for.

For runs on the synthetic shapes: generates videos of combinations of colour, shape and direction that
training never showed, and reads them with a tracker (sora_jax/evaluation/shapes.py). Beside the figures of
the samples stand those on rendered truth (the ceiling) and on samples held against others' prompts (chance).
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines import video_io
from data_pipelines.sources import synthetic
from data_pipelines.sources.synthetic import Scene
from sora_jax import cli, plots, trained
from sora_jax.evaluation import shapes
from sora_jax.generate import Request
from sora_jax.packing.geometry import ClipSpec, fit_size
from sora_jax.trained import TrainedRun

FLAGS = flags.FLAGS
RESULT, SHEET = "evaluation.json", "evaluation.png"
SHOWN = 8  # samples on the sheet


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Workdir of a training run on the synthetic source.")
  flags.DEFINE_integer("num_samples", 64, "Videos to judge.", lower_bound=2)
  flags.DEFINE_integer("seed", 0, "Of the scenes and of the noise.")
  flags.DEFINE_integer("num_inference_steps", None, "Default: of the run's config.")
  flags.DEFINE_float("guidance_scale", None, "Default: of the run's config.")
  flags.DEFINE_string("sampler", None, "Default: of the run's config.")
  flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.")
  flags.DEFINE_bool("ema", True, "Use the averaged weights.")


def main(argv: list[str]) -> int:
  del argv
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing: the folder of a training run")
  run = trained.load(FLAGS.workdir, step=FLAGS.step, ema=FLAGS.ema)
  if run.data.source != "synthetic":
    raise ValueError(f"{run.workdir} was trained on {run.data.source}; only synthetic shapes can be judged")
  asked = {name: getattr(FLAGS, name) for name in ("num_inference_steps", "guidance_scale", "sampler")}
  config = dataclasses.replace(run.sample, **{k: v for k, v in asked.items() if v is not None})
  scenes = held_out_scenes(FLAGS.num_samples, FLAGS.seed)
  specs = [fitted(run, scene) for scene in scenes]
  started = time.monotonic()
  videos = trained.sample(run, requests(scenes, specs, seed=FLAGS.seed), config)
  result = {
    **compare(scenes, specs, videos),
    "num_samples": len(scenes),
    "seconds": round(time.monotonic() - started, 1),
    "checkpoint_step": run.step,
    "weights": run.which,
    "config_digest": run.config_digest,
    "seed": FLAGS.seed,
    **{k: getattr(config, k) for k in asked},
  }
  (run.workdir / RESULT).write_text(json.dumps(result, indent=2) + "\n")
  sheet = plots.contact_sheet(videos[:SHOWN], [s.caption for s in scenes[:SHOWN]])
  video_io.write_png(run.workdir / SHEET, sheet)
  print(describe(result, run.workdir))
  return 0


def held_out_scenes(num: int, seed: int) -> list[Scene]:
  """Moving scenes of held-out combinations, as drawn for the held-out source but never an image."""
  return synthetic.moving_scenes(num, np.random.default_rng([seed, 64]), held_out=True)


def fitted(run: TrainedRun, scene: Scene) -> ClipSpec:
  """The size at which training would read the scene, in whole temporal patches."""
  spec = fit_size(
    scene.num_frames,
    scene.height,
    scene.width,
    synthetic.FPS,
    patch=run.data.patch,
    max_tokens=run.data.max_tokens or run.spec.tokens,
    max_frames=run.data.max_frames,
    target_fps=run.data.target_fps,
  )
  pt = run.data.patch[0]
  return dataclasses.replace(spec, num_frames=-(-spec.num_frames // pt) * pt)


def requests(scenes: Sequence[Scene], specs: Sequence[ClipSpec], *, seed: int) -> list[Request]:
  return [
    Request(
      prompt=scene.caption,
      width=spec.width,
      height=spec.height,
      num_frames=spec.num_frames,
      fps=spec.fps,
      seed=seed,
      index=index,
    )
    for index, (scene, spec) in enumerate(zip(scenes, specs))
  ]


def compare(scenes: Sequence[Scene], specs: Sequence[ClipSpec], videos: Sequence[np.ndarray]) -> dict:
  """Shares right: of the samples, of rendered truth, and of the samples against others' prompts."""
  seen = [shapes.track(video, synthetic.COLOURS) for video in videos]
  truth = [shapes.track(synthetic.render(s, spec), synthetic.COLOURS) for s, spec in zip(scenes, specs)]
  shuffled = [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))]
  return {
    "samples": accuracy(seen, scenes),
    "rendered_truth": accuracy(truth, scenes),
    "shuffled_prompts": accuracy(seen, shuffled),
  }


def accuracy(readings: Sequence[shapes.Reading], scenes: Sequence[Scene]) -> dict[str, float]:
  pairs = list(zip(readings, scenes))
  return {
    "colour": sum(r.colour == s.colour for r, s in pairs) / len(pairs),
    "direction": sum(r.direction == s.direction for r, s in pairs) / len(pairs),
  }


def describe(result: dict, workdir: Path) -> str:
  num, step = result["num_samples"], result["checkpoint_step"]
  lines = [f"{num} samples of combinations never seen in training, step {step}"]
  lines.append(f"{'':<18}colour  direction")
  for key in ("samples", "rendered_truth", "shuffled_prompts"):
    lines.append(f"{key.replace('_', ' '):<18}{result[key]['colour']:6.2f}  {result[key]['direction']:9.2f}")
  lines.append(f"written: {workdir / RESULT}, {workdir / SHEET}")
  return "\n".join(lines)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
