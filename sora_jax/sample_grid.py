"""Grids of samples during training."""

from collections.abc import Callable, Mapping, Sequence

from data_pipelines.sources.base import SampleInfo
from data_pipelines.video_io import write_png
from sora_jax import plots, prompts
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request, SampleConfig, generate
from sora_jax.packing.geometry import ClipSpec, Patch
from sora_jax.parallel import multihost
from sora_jax.training.hooks import Hook, Moment
from sora_jax.types import BatchSpec

FOLDER = "samples"


def requests_of(
  infos: Mapping[int, SampleInfo], specs: Mapping[int, ClipSpec], *, patch: Patch, num_samples: int
) -> list[Request]:
  """Requests for the captions and sizes of samples spread over a data set, captioned videos first."""
  order = sorted(infos, key=lambda i: (not infos[i].captions, specs[i].num_frames == 1))
  requests = []
  num_samples = min(num_samples, len(order))
  for index in range(num_samples):
    i = order[index * len(order) // num_samples]
    spec = specs[i]
    # A clip shorter than a patch is padded when trained on; it is asked for as a whole patch.
    frames = spec.num_frames if spec.num_frames == 1 else -(-spec.num_frames // patch[0]) * patch[0]
    requests.append(
      Request(
        prompt=next(iter(infos[i].captions), ""),
        width=spec.width,
        height=spec.height,
        num_frames=frames,
        fps=spec.fps,
        index=index,
      )
    )
  return requests


def sample_hook(
  requests: Sequence[Request],
  labels: Sequence[str],
  *,
  config: SampleConfig,
  diffusion: ObjectiveConfig,
  tokenize: Callable[[str], list[int]],
  spec: BatchSpec,
  patch: Patch,
) -> Hook:
  """WORKDIR/samples/step_XXXXXX.png every `config.every` steps and after the last, from the EMA weights."""

  def run(moment: Moment) -> None:
    videos = generate(
      moment.model("ema"),
      requests,
      config=config,
      diffusion=diffusion,
      tokenize=tokenize,
      spec=spec,
      patch=patch,
    )
    if not multihost.is_main():
      return
    sheet = plots.contact_sheet(videos, labels)
    (moment.workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    path = moment.workdir / FOLDER / f"step_{moment.step:06d}.png"
    write_png(path, sheet)
    prompts.write(moment.workdir / prompts.GRID, requests)
    moment.writer.image(moment.step, "samples", sheet)
    moment.writer.say(f"step {moment.step} samples: {path}")

  return Hook(every=config.every, run=run)
