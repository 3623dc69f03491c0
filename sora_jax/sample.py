"""python -m sora_jax.sample --workdir=DIR --prompt="a red circle": videos and images from a trained run.

Writes sample_0000.mp4 (.png for one frame) with a .json of all settings beside each, and a contact sheet.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines import video_io
from sora_jax import __version__, cli, plots, prompts, trained
from sora_jax.generate import Request, SampleConfig, check
from sora_jax.packing.geometry import ClipSpec, fit_size, num_tokens
from sora_jax.trained import TrainedRun

FLAGS = flags.FLAGS
FALLBACK_FPS = 8.0
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "av")


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Workdir of the training run.")
  flags.DEFINE_multi_string("prompt", [], "What to show; may be given several times.")
  flags.DEFINE_string("prompts_file", None, "A prompt a line, with options: see sora_jax/prompts.py.")
  flags.DEFINE_string("negative_prompt", "", "What to lead away from, instead of no caption.")
  flags.DEFINE_integer("width", None, "Pixels; a multiple of the patch. Default: of the held-out samples.")
  flags.DEFINE_integer("height", None, "Pixels; a multiple of the patch. Default: of the held-out samples.")
  flags.DEFINE_integer("num_frames", None, "1 for an image, else a multiple of the patch.")
  flags.DEFINE_float("fps", None, "Frames per second of a video.")
  flags.DEFINE_integer("num_inference_steps", None, "Steps of the sampler. Default: of the run's config.")
  flags.DEFINE_float("guidance_scale", None, "1 = no guidance. Default: of the run's config.")
  flags.DEFINE_string("sampler", None, "euler, heun or ddim. Default: of the run's config.")
  flags.DEFINE_integer("seed", 0, "Of the noise.")
  flags.DEFINE_integer(
    "num_videos_per_prompt", 1, "Videos of each prompt, each of other noise.", lower_bound=1
  )
  flags.DEFINE_integer("index", 0, "Which of these comes first: that of a sample's JSON.", lower_bound=0)
  flags.DEFINE_string("image", None, "Image prompt: the first frame.")
  flags.DEFINE_string("video", None, "Video prompt: its end is the beginning of the new video.")
  flags.DEFINE_integer(
    "video_frames", None, "Frames of the video prompt. Default: at most half of num_frames."
  )
  flags.DEFINE_string("output_dir", None, "Default: WORKDIR/samples/step_XXXXXX.")
  flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.")
  flags.DEFINE_bool("ema", True, "Use the averaged weights.")
  flags.DEFINE_string("text_encoder", "", "package.module:Class, where data.text names only a hash.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A request and what it was asked with."""

  request: Request
  config: SampleConfig
  image: str
  video: str


def main(argv: list[str]) -> int:
  del argv
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing: the folder of a training run")
  asked = [{"prompt": p} for p in FLAGS.prompt]
  asked += prompts.read(FLAGS.prompts_file) if FLAGS.prompts_file else []
  if not asked:
    raise ValueError('nothing to sample: give --prompt="..." or --prompts_file=FILE')
  run = trained.load(FLAGS.workdir, step=FLAGS.step, ema=FLAGS.ema, text_encoder=FLAGS.text_encoder)
  trained.require_pixels(run)
  jobs = [job for values in asked for job in _jobs(run, values)]
  _announce(run, jobs)
  output_dir = Path(FLAGS.output_dir or run.workdir / "samples" / f"step_{run.step:06d}")
  output_dir.mkdir(parents=True, exist_ok=True)
  videos = _sample(run, jobs)
  first = _next_number(output_dir)
  for number, (job, video) in enumerate(zip(jobs, videos), first):
    path = write(output_dir / f"sample_{number:04d}", job, video)
    text = json.dumps(settings(run, job), indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(path)
  sheet = output_dir / f"sheet_{first:04d}.png"
  video_io.write_png(sheet, plots.contact_sheet(videos, [job.request.prompt for job in jobs]))
  print(sheet)
  return 0


def _announce(run: TrainedRun, jobs: list[Job]) -> None:
  """What is about to be sampled, and where that is far from what the run was trained on."""
  print(
    f"{len(jobs)} samples from step {run.step} ({run.which}) of {run.workdir}", file=sys.stderr, flush=True
  )
  requests = [job.request for job in jobs]
  texts = [r.prompt for r in requests] + [r.negative_prompt for r in requests]
  if unknown := trained.unknown_words(run.workdir, texts):
    shown = ", ".join(unknown[:20]) + ", ..." * (len(unknown) > 20)
    print(f"note: in no caption of the run, and so unknown to it: {shown}", file=sys.stderr, flush=True)
  for text in dict.fromkeys(filter(None, texts)):
    most = run.tokenizer.max_tokens
    if not run.data.text and len(run.tokenizer(text)) == most:
      print(
        f"note: {text[:40]!r}... reaches text.max_tokens={most}: what is beyond is not read",
        file=sys.stderr,
        flush=True,
      )
  trained_on = run.data.max_tokens or run.spec.tokens
  for r in {job.request.prompt: job.request for job in jobs}.values():
    tokens = num_tokens(ClipSpec(r.num_frames, r.height, r.width), run.data.patch)
    if tokens > 2 * trained_on:
      print(
        f"note: {r.width}x{r.height}x{r.num_frames} is {tokens} tokens, the run was trained on at most "
        f"{trained_on} a sample: this will be slow, and not good",
        file=sys.stderr,
        flush=True,
      )


def _jobs(run: TrainedRun, values: dict) -> list[Job]:
  """The jobs of one prompt: its own options first, then the flags, then what the run was trained on."""
  values = {key: value for key, value in FLAGS.flag_values_dict().items() if value is not None} | values
  image, video = (values.get(name) or "" for name in ("image", "video"))
  if image and video:
    raise ValueError(f"{values['prompt']!r}: an image and a video prompt at once; give one")
  config = dataclasses.replace(
    run.sample,
    **{key: values[key] for key in ("num_inference_steps", "guidance_scale", "sampler") if key in values},
  )
  size = _default_size(run, image or video)
  size |= {key: values[key] for key in size if key in values}
  request = Request(
    prompt=values["prompt"],
    negative_prompt=values.get("negative_prompt", ""),
    seed=values["seed"],
    **size,
  )
  check(request, run.data.patch)
  if image or video:
    frames = _read_image(image, request) if image else _read_video(video, request, run, FLAGS.video_frames)
    request = dataclasses.replace(request, prompt_frames=frames)
    check(request, run.data.patch)
  return [
    Job(
      request=dataclasses.replace(request, index=values["index"] + i), config=config, image=image, video=video
    )
    for i in range(FLAGS.num_videos_per_prompt)
  ]


def _default_size(run: TrainedRun, media: str) -> dict:
  """The size of the first held-out video; the aspect ratio of the prompt's image or video if there is one."""
  path = run.workdir / prompts.GRID
  names = ("width", "height", "num_frames", "fps")
  pt, ph, pw = run.data.patch
  if path.exists():
    size = {name: prompts.read(path)[0][name] for name in names}
  else:
    frames = run.data.max_frames // pt * pt or 4 * pt
    budget = (run.data.max_tokens or run.spec.tokens) // (frames // pt)
    side = max(1, int(budget**0.5))
    size = {"width": side * pw, "height": side * ph, "num_frames": frames, "fps": run.data.target_fps}
  if media:
    info = _probe(media)
    budget = (size["width"] // pw) * (size["height"] // ph)
    fit = fit_size(1, info.height, info.width, 0.0, patch=run.data.patch, max_tokens=budget)
    size |= {"width": fit.width, "height": fit.height}
  return size | {"fps": size["fps"] or FALLBACK_FPS}


def _probe(path: str) -> video_io.MediaInfo:
  try:
    return video_io.probe(path)
  except video_io.UnreadableError as error:
    raise ValueError(f"the prompt {path} cannot be read: {error}") from None


def _read_image(path: str, request: Request) -> np.ndarray:
  return video_io.read_clip(path, num_frames=1, height=request.height, width=request.width)


def _read_video(path: str, request: Request, run: TrainedRun, num_frames: int | None) -> np.ndarray:
  """The last frames of the file at the request's rate."""
  pt, info = run.data.patch[0], _probe(path)
  if info.num_frames == 1:
    return _read_image(path, request)
  there = max(1, int(info.num_frames / info.fps * request.fps + 1e-6))
  frames = num_frames or min(there, max(pt, request.num_frames // 2 // pt * pt))
  frames = frames // pt * pt if frames >= pt else frames
  if frames > there:
    raise ValueError(f"{path} has {there} frames at {request.fps:g} frames per second, not {frames}")
  return video_io.read_clip(
    path,
    num_frames=frames,
    height=request.height,
    width=request.width,
    fps=request.fps,
    start_s=(there - frames) / request.fps,
  )


def _sample(run: TrainedRun, jobs: Sequence[Job]) -> list[np.ndarray]:
  """Jobs of equal settings share their rows."""
  videos: dict[int, np.ndarray] = {}
  key = lambda i: dataclasses.astuple(jobs[i].config)  # noqa: E731
  for _, group in itertools.groupby(sorted(range(len(jobs)), key=key), key):
    group = list(group)
    made = trained.sample(run, [jobs[i].request for i in group], jobs[group[0]].config)
    videos |= dict(zip(group, made))
  return [videos[i] for i in range(len(jobs))]


def write(stem: Path, job: Job, video: np.ndarray) -> Path:
  """MP4, or PNG of a single frame."""
  if len(video) == 1:
    video_io.write_png(path := stem.with_suffix(".png"), video[0])
  else:
    video_io.write_mp4(path := stem.with_suffix(".mp4"), video, job.request.fps)
  return path


def settings(run: TrainedRun, job: Job) -> dict:
  """All that is needed to make the sample again."""
  request = {f.name: getattr(job.request, f.name) for f in dataclasses.fields(Request)}
  frames = request.pop("prompt_frames")
  return {
    **request,
    "image": job.image,
    "video": job.video,
    "prompt_frames": 0 if frames is None else len(frames),
    "sampler": job.config.sampler,
    "num_inference_steps": job.config.num_inference_steps,
    "guidance_scale": job.config.guidance_scale,
    "weights": run.which,
    "checkpoint_step": run.step,
    "config_digest": run.config_digest,
    "versions": {"sora_jax": __version__, **{name: metadata.version(name) for name in PACKAGES}},
  }


def _next_number(folder: Path) -> int:
  """The first number after those taken, so that nothing is overwritten."""
  taken = [p.stem.removeprefix("sample_") for p in folder.glob("sample_*")]
  return max((int(n) + 1 for n in taken if n.isdigit()), default=0)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
