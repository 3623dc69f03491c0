"""python -m sora_jax.scaling_laws probe --workdir=RUN: what a linear layer reads off frozen features.

Clips of synthetic shapes, noised a little and without their captions, go through the trained network up to
a middle block; a linear layer learns colour, shape and direction from what comes out: its mean over each half
of the time, and its maximum. Beside it stand the same network with random weights, and the raw pixels. The
digest of the weights is taken before and after. With --csv=DIR/results.csv: ability by compute, a dot a run.
"""

import csv
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from data_pipelines.sources import synthetic
from data_pipelines.sources.synthetic import Scene
from sora_jax import trained
from sora_jax.diffusion import objectives
from sora_jax.evaluate import fitted
from sora_jax.evaluation import probe as probe_lib
from sora_jax.nn import layers
from sora_jax.packing.geometry import ClipSpec, Patch, grid_of, patchify, to_float
from sora_jax.packing.pack import PackedSample, pack_row, stack_rows
from sora_jax.scaling import abilities
from sora_jax.tasks import text_to_video
from sora_jax.trained import TrainedRun
from sora_jax.training.digest import digest
from sora_jax.types import NULL_ID, Array, TokenBatch

FLAGS = flags.FLAGS
RESULT = "probe.json"
LABELS = ("colour", "shape", "direction")
PIXELS = (8, 24, 24)  # clips as the pixel probe sees them
HALVES = 2
ROWS = 32  # clips embedded at once


class Through(nnx.Module):
  """Hands its input on, where a layer was."""

  def __call__(self, x: Array) -> Array:
    return x


def define_flags() -> None:
  flags.DEFINE_integer("num_clips", 1200, "probe: clips; two thirds of them to learn from.", lower_bound=30)
  flags.DEFINE_integer("blocks", None, "probe: blocks that features come through. Default: half of them.")
  flags.DEFINE_float("noise_level", 0.1, "probe: of the clips, t in [0, 1).", lower_bound=0, upper_bound=0.99)


def main() -> int:
  if FLAGS.csv:
    return curves()
  if not FLAGS.workdir:
    raise ValueError("--workdir=RUN or --csv=results.csv is needed")
  run = trained.load(FLAGS.workdir)
  depth = run.model.denoiser.config.depth
  blocks = FLAGS.blocks if FLAGS.blocks is not None else (depth + 1) // 2
  if not 1 <= blocks <= depth:
    raise ValueError(f"--blocks={blocks}: the model has {depth}")
  before = weights_digest(run.model)
  result = {
    "step": run.step, "blocks": blocks, "noise_level": FLAGS.noise_level, "num_clips": FLAGS.num_clips,
    **probe(run, blocks=blocks, noise_level=FLAGS.noise_level, num_clips=FLAGS.num_clips, seed=FLAGS.seed),
  }  # fmt: skip
  after = weights_digest(run.model)
  result |= {"digest_before": before, "digest_after": after, "unchanged": before == after}
  (run.workdir / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  print(describe(result))
  print(run.workdir / RESULT)
  return 0


def probe(run: TrainedRun, *, blocks: int, noise_level: float, num_clips: int, seed: int) -> dict:
  """{"trained" | "random" | "pixels": {label: accuracy}} on the last third of the clips."""
  scenes = clips(num_clips, seed)
  specs = [fitted(run, scene) for scene in scenes]
  videos = [synthetic.render(scene, spec) for scene, spec in zip(scenes, specs)]
  batches = pack(run, videos, [spec.fps for spec in specs])
  features = {
    "trained": embed(run, run.model, batches, blocks=blocks, noise_level=noise_level),
    "random": embed(run, random_weights(run.model, seed), batches, blocks=blocks, noise_level=noise_level),
    "pixels": np.stack([pixels(scene) for scene in scenes]),
  }
  split = 2 * num_clips // 3
  result = {}
  for name, x in features.items():
    space, result[name] = probe_lib.space(x[:split]), {}
    learn, judge = space.of(x[:split]), space.of(x[split:])
    for label in LABELS:
      y = np.array([getattr(scene, label) for scene in scenes])
      result[name][label] = probe_lib.fit(learn, y[:split], seed=seed).accuracy(judge, y[split:])
    result[name]["mean"] = float(np.mean([result[name][label] for label in LABELS]))
  return result


def clips(num: int, seed: int) -> list[Scene]:
  """Moving scenes that training did not draw."""
  return synthetic.moving_scenes(num, np.random.default_rng([seed, 65]), held_out=False)


def pack(run: TrainedRun, videos: Sequence[np.ndarray], fps: Sequence[float]) -> list[TokenBatch]:
  """A clip a row; sample_id is its number."""
  patch: Patch = run.data.patch
  rows = []
  for i, (video, rate) in enumerate(zip(videos, fps)):
    tokens = to_float(patchify(video, patch))
    grid = grid_of(ClipSpec(*video.shape[:3]), patch)
    # The caption would give the labels away.
    sample = PackedSample(tokens_LC=tokens, grid=grid, sample_id=i, fps=rate, text_ids=[NULL_ID])
    rows.append(pack_row([sample], run.spec))
  rows += [run.spec.zeros(1)] * (-len(rows) % ROWS)
  return [stack_rows(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


def embed(
  run: TrainedRun, model: nnx.Module, batches: Sequence[TokenBatch], *, blocks: int, noise_level: float
) -> np.ndarray:
  """(clips, (HALVES + 1) * D): of the tokens after `blocks` blocks: mean over halves of time, maximum."""
  graphdef, state = nnx.split(truncated(model, blocks))
  with jax.set_mesh(run.mesh):
    found = [jax.device_get(_embed(graphdef, state, run.diffusion, noise_level, batch)) for batch in batches]
  real = np.concatenate([batch.sample_id_BN[:, 0] >= 0 for batch in batches])
  return np.concatenate(found)[real]


def truncated(model: nnx.Module, blocks: int) -> nnx.Module:
  """A copy whose output is its normalised stream after `blocks` blocks."""
  copy = nnx.clone(model)
  denoiser = copy.denoiser
  graph, stacked = nnx.split(denoiser.blocks)
  denoiser.blocks = nnx.merge(graph, jax.tree.map(lambda x: x[:blocks], stacked))
  # Without shift and scale the last modulation is the layer norm alone.
  denoiser.final_modulation.w[...] = jnp.zeros_like(denoiser.final_modulation.w[...])
  denoiser.final_modulation.b[...] = jnp.zeros_like(denoiser.final_modulation.b[...])
  denoiser.patch_out = Through()
  return copy


@jax.jit(static_argnums=(0, 2, 3))
def _embed(graphdef, state, diffusion, noise_level: float, batch: TokenBatch) -> Array:
  """(B, (HALVES + 1) * D)."""
  model = nnx.merge(graphdef, state)
  keys = text_to_video.sample_keys(jax.random.key(0), batch.sample_id_BN)
  noise = text_to_video.token_noise(batch, keys)
  t_BN = jnp.full(batch.fps_BN.shape, noise_level, jnp.float32)
  clean = batch.tokens_BLC.astype(jnp.float32)
  z = objectives.add_noise(diffusion, clean, noise, jnp.float32(noise_level))
  x_BLD = model(z, t_BN, batch)
  place = batch.position_BL3[..., 0] * HALVES // jnp.maximum(batch.grid_BN3[:, :1, 0], 1)
  share_BLH = layers.slot_one_hot(place.astype(jnp.int32), HALVES) * (batch.segment_BL == 1)[..., None]
  total = jnp.einsum("blh,bld->bhd", share_BLH, x_BLD)
  mean = (total / jnp.maximum(share_BLH.sum(1), 1)[..., None]).reshape(len(total), -1)
  # A shape fills a few tokens of many: the mean alone dilutes what they say.
  most = jnp.where((batch.segment_BL == 1)[..., None], x_BLD, -jnp.inf).max(axis=1)
  return jnp.concatenate([mean, jnp.where(jnp.isfinite(most), most, 0)], axis=-1)


def random_weights(model: nnx.Module, seed: int) -> nnx.Module:
  """A copy whose matrices are all drawn, also those that training starts at zero."""
  copy = nnx.clone(model)
  graphdef, state = nnx.split(copy)
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(seed), len(leaves))

  def draw(key, x):
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return jax.random.normal(key, x.shape, x.dtype) * (2 / (x.shape[-2] + x.shape[-1])) ** 0.5

  return nnx.merge(graphdef, jax.tree.unflatten(tree, [draw(k, x) for k, x in zip(keys, leaves)]))


def pixels(scene: Scene) -> np.ndarray:
  """The clip at one size for all, flat."""
  frames, height, width = PIXELS
  fps = synthetic.FPS * frames / scene.num_frames  # the whole of it
  video = synthetic.render(scene, ClipSpec(frames, height, width, fps))
  return to_float(video).ravel()


def weights_digest(model: nnx.Module) -> str:
  return digest(nnx.to_pure_dict(nnx.state(model)))


def describe(result: dict) -> str:
  lines = [f"{'linear probe of':<18}" + "".join(f"{label:>11}" for label in (*LABELS, "mean"))]
  for name in ("trained", "random", "pixels"):
    lines.append(f"{name:<18}" + "".join(f"{result[name][label]:>11.3f}" for label in (*LABELS, "mean")))
  lines.append(
    f"backbone {'unchanged' if result['unchanged'] else 'CHANGED'}: digest {result['digest_after']}"
  )
  return "\n".join(lines)


def curves() -> int:
  """Ability by compute of every measured run."""
  if not FLAGS.output:
    raise ValueError("--output is missing: the folder for the figure")
  with open(FLAGS.csv, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  for path in abilities.write(rows, FLAGS.output, where=FLAGS.csv):
    print(path)
  return 0
