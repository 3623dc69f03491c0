"""python -m sora_jax.scaling_laws measure --workdir=RUN: what a finished run of a ladder is worth.

Held-out loss at fixed noise, by resolution and duration as well; on the synthetic shapes also how often
samples show the colour and direction asked for. Written to RUN/measure.json, with the exact compute.
"""

import collections
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from flax import nnx

from data_pipelines.pipeline import Pipeline, build_source
from sora_jax import evaluate, trained
from sora_jax.ladder import cost
from sora_jax.nn import layers
from sora_jax.tasks import text_to_video
from sora_jax.trained import TrainedRun
from sora_jax.types import Array, TokenBatch

FLAGS = flags.FLAGS
RESULT = "measure.json"


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "measure, probe: a training run.")
  flags.DEFINE_integer("num_samples", 64, "Videos to judge on synthetic shapes; 0: none.", lower_bound=0)


def main() -> int:
  if not FLAGS.workdir:
    raise ValueError("--workdir is missing: the folder of a training run")
  result = measure(Path(FLAGS.workdir), num_samples=FLAGS.num_samples, seed=FLAGS.seed)
  (Path(FLAGS.workdir) / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  print(
    f"{FLAGS.workdir}: loss {result['loss']:.4f}, {result['compute']:.4g} FLOPs, {result['params']:,} params"
  )
  return 0


def measure(workdir: Path, *, num_samples: int, seed: int) -> dict:
  run = trained.load(workdir)
  config = ml_collections.ConfigDict(json.loads((workdir / trained.CONFIG).read_text(encoding="utf-8")))
  source = build_source(run.data)
  pipeline = Pipeline(source, run.data, run.spec, run.tokenizer)
  costs = cost.of(config, pipeline, cost.planned(pipeline, range(min(run.step, cost.MOST_STEPS))))
  result = {
    "steps": run.step,
    "params": costs.params,
    "tokens": cost.total_tokens(costs, run.step),
    "compute": cost.total_flops(costs, run.step),
    "batch": round(float(costs.tokens.mean())),  # tokens a step
    "rows": run.data.rows,
    "lr": config.optimizer.lr,
    "width": run.model.denoiser.config.width,
    "depth": run.model.denoiser.config.depth,
    "seed": config.seed,
    "weights": run.which,
  }
  if run.data.num_eval or run.data.eval_fraction:
    result |= held_out(run, Pipeline(source, run.data, run.spec, run.tokenizer, split="eval"))
  if num_samples and run.data.source == "synthetic":
    result |= attributes(run, num_samples, seed)
  return result


def held_out(run: TrainedRun, pipeline: Pipeline) -> dict:
  """As text_to_video.held_out_loss, and by the size of the samples."""
  sums, counts, groups = [], [], []
  graphdef, state = nnx.split(run.model)
  with jax.set_mesh(run.mesh):
    for batch in pipeline.epoch_batches():
      loss_BN, count_BN = jax.device_get(_sample_losses(graphdef, state, run.diffusion, batch))
      real = count_BN > 0
      sums += loss_BN[real].tolist()
      counts += count_BN[real].tolist()
      groups += [pipeline.specs[int(i)] for i in batch.sample_id_BN[real]]
  by: dict[str, dict[str, list]] = {
    "resolution": collections.defaultdict(list),
    "frames": collections.defaultdict(list),
  }
  for one in zip(groups, sums, counts):
    by["resolution"][f"{one[0].width}x{one[0].height}"].append(one[1:])
    by["frames"][str(one[0].num_frames)].append(one[1:])
  mean = lambda pairs: float(sum(s for s, _ in pairs) / sum(c for _, c in pairs))  # noqa: E731
  result = {"loss": mean(list(zip(sums, counts))), "num_eval": len(sums)}
  for name, parts in by.items():
    order = sorted(parts, key=lambda key: [int(n) for n in key.split("x")])
    result[f"loss_by_{name}"] = {key: mean(parts[key]) for key in order}
  return result


@jax.jit(static_argnums=(0, 2))
def _sample_losses(graphdef, state, diffusion, batch: TokenBatch) -> tuple[Array, Array]:
  """(B, N) sums over noise levels and tokens of each sample's loss, and their counts."""
  model = nnx.merge(graphdef, state)
  keys = text_to_video.sample_keys(jax.random.key(0), batch.sample_id_BN)
  one_hot_BLN = layers.slot_one_hot(batch.segment_BL, batch.fps_BN.shape[1] + 1)[..., 1:]

  def at_level(t):
    t_BN = jnp.full(batch.fps_BN.shape, t, jnp.float32)
    both = text_to_video.token_sums(diffusion, model, batch, t_BN, keys)
    return [jnp.einsum("bl,bln->bn", x, one_hot_BLN) for x in both]

  losses, counts = jax.lax.map(at_level, jnp.asarray(text_to_video.EVAL_TIMES))
  return losses.sum(0), counts.sum(0)


def attributes(run: TrainedRun, num_samples: int, seed: int) -> dict:
  """Shares of samples of held-out combinations with the right colour and direction."""
  scenes = evaluate.held_out_scenes(num_samples, seed)
  specs = [evaluate.fitted(run, scene) for scene in scenes]
  videos = trained.sample(run, evaluate.requests(scenes, specs, seed=seed), run.sample)
  judged = evaluate.compare(scenes, specs, videos)
  accuracy = judged["samples"] | {"mean": float(np.mean(list(judged["samples"].values())))}
  return {"accuracy": accuracy, "chance": judged["shuffled_prompts"], "num_samples": num_samples}


def load(workdir: str | Path) -> dict | None:
  """What was measured; None where nothing was yet."""
  path = Path(workdir) / RESULT
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except json.JSONDecodeError:  # cut off while it was written
    return None
