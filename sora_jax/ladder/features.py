"""What a frozen denoiser makes of clips of synthetic shapes: a vector for each clip, block and noise level.

Clips are noised and bear no caption; of the normalised stream after a block stand the mean over each half of
the time and the maximum. Beside a trained network go the same network as it was initialised, and one whose
matrices are all drawn; beside them the raw pixels.
"""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from data_pipelines.sources import synthetic
from data_pipelines.sources.synthetic import Scene
from sora_jax import trained
from sora_jax.diffusion import objectives
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.evaluate import fitted
from sora_jax.nn import layers
from sora_jax.packing.geometry import ClipSpec, grid_of, patchify, to_float
from sora_jax.packing.pack import PackedSample, pack_row, stack_rows, text_of
from sora_jax.tasks import registry, text_to_video
from sora_jax.trained import TrainedRun
from sora_jax.types import NULL_ID, Array, TokenBatch

PIXELS = (8, 24, 24)  # clips as the pixel probe sees them
HALVES = 2
ROWS = 16  # embedded at once


def clips(num: int, seed: int) -> list[Scene]:
  """Moving scenes that training did not draw."""
  return synthetic.moving_scenes(num, np.random.default_rng([seed, 65]), held_out=False)


def pack(run: TrainedRun, scenes: Sequence[Scene]) -> list[TokenBatch]:
  """The clips at the sizes of training, in order; sample_id is the number of each."""
  # The caption would give the labels away.
  width = run.spec.text_width
  no_caption = text_of(np.zeros((0, width), np.float16) if width else [NULL_ID])
  rows, row, left = [], [], run.spec.tokens
  for i, scene in enumerate(scenes):
    spec = fitted(run, scene)
    tokens = to_float(patchify(synthetic.render(scene, spec), run.data.patch))
    grid = grid_of(ClipSpec(spec.num_frames, spec.height, spec.width), run.data.patch)
    if row and (len(tokens) > left or len(row) == run.spec.samples):
      rows.append(pack_row(row, run.spec))
      row, left = [], run.spec.tokens
    row.append(PackedSample(tokens_LC=tokens, grid=grid, sample_id=i, fps=spec.fps, **no_caption))
    left -= len(tokens)
  rows.append(pack_row(row, run.spec))
  rows += [run.spec.zeros(1)] * (-len(rows) % ROWS)
  return [stack_rows(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]


def embed(
  run: TrainedRun, model: nnx.Module, batches: Sequence[TokenBatch], *, noise_level: float, seed: int
) -> np.ndarray:
  """(depth, clips, F) of clips in order; F = (HALVES + 1) * width."""
  graphdef, state = nnx.split(model)
  level, key = jnp.float32(noise_level), jax.random.key(seed)
  with jax.set_mesh(run.mesh):
    found = [jax.device_get(_embed(graphdef, state, run.diffusion, level, key, batch)) for batch in batches]
  # Slots without a clip come after those with one in every row, so that the rest stays in order.
  return np.concatenate([x[:, batch.sample_id_BN >= 0] for x, batch in zip(found, batches)], axis=1)


@jax.jit(static_argnums=(0, 2))
def _embed(graphdef, state, diffusion: ObjectiveConfig, level: Array, key: Array, batch: TokenBatch) -> Array:
  """(depth, B, N, F)."""
  model = nnx.merge(graphdef, state)
  noise = text_to_video.token_noise(batch, text_to_video.sample_keys(key, batch.sample_id_BN))
  z_BLC = objectives.add_noise(diffusion, batch.tokens_BLC.astype(jnp.float32), noise, level)
  t_BN = jnp.broadcast_to(level, batch.fps_BN.shape)
  streams_KBLD = model.denoiser.streams(z_BLC, t_BN, batch, *model.text_encoder(batch))
  slots = batch.fps_BN.shape[1]
  member_BLN = layers.slot_one_hot(batch.segment_BL, slots + 1)[..., 1:]
  frames_BL = layers.spread(member_BLN, batch.grid_BN3[..., :1].astype(jnp.float32))[..., 0]
  half_BL = (batch.position_BL3[..., 0] * HALVES // jnp.maximum(frames_BL, 1)).astype(jnp.int32)
  share_BLNH = member_BLN[..., None] * layers.slot_one_hot(half_BL, HALVES)[:, :, None]

  def of_block(x_BLD: Array) -> Array:
    x_BLD = layers.layer_norm(x_BLD)
    total = jnp.einsum("blnh,bld->bnhd", share_BLNH, x_BLD)
    mean = (total / jnp.maximum(share_BLNH.sum(1), 1)[..., None]).reshape(*total.shape[:2], -1)
    # A shape fills a few tokens of many: the mean alone dilutes what they say.
    inside = member_BLN.swapaxes(1, 2)[..., None] > 0
    most = jnp.where(inside, x_BLD[:, None], -jnp.inf).max(axis=2)
    return jnp.concatenate([mean, jnp.where(jnp.isfinite(most), most, 0)], axis=-1)

  return jax.lax.map(of_block, streams_KBLD)


def initial_weights(run: TrainedRun, seed: int) -> nnx.Module:
  """The network as training with this seed would start: its blocks still hand on what comes in."""
  config = ml_collections.ConfigDict(json.loads((run.workdir / trained.CONFIG).read_text(encoding="utf-8")))
  task = registry.build(config, batch_spec=run.spec, vocab_size=run.tokenizer.vocab_size)
  return task.init(nnx.Rngs(seed))


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
