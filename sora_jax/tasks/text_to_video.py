"""Text-, image- and video-conditioned denoising of packed videos and images."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.conditioning import text
from sora_jax.conditioning.text import TextConfig, TextEncoder
from sora_jax.diffusion import objectives
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models import dit
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.nn import layers
from sora_jax.types import NO_SAMPLE, Array, BatchSpec, Sums, Task, TokenBatch

NUM_BINS = 10  # of noise level, for the loss by bin
EVAL_TIMES = tuple((i + 0.5) / 8 for i in range(8))  # held-out loss: the same levels at every evaluation


class TextToVideo(nnx.Module):
  """A denoiser and the text encoder that conditions it."""

  def __init__(self, model: DiTConfig, text_config: TextConfig, spec: BatchSpec, *, rngs: nnx.Rngs):
    self.text_encoder = TextEncoder(text_config, embedding_width=spec.text_width, rngs=rngs)
    self.denoiser = DiT(model, channels=spec.channels, text_dim=text_config.width, rngs=rngs)

  def __call__(self, z_BLC: Array, t_BN: Array, batch: TokenBatch) -> Array:
    text_BMD, pooled_BND = self.text_encoder(batch)
    return self.denoiser(z_BLC, t_BN, batch, text_BMD, pooled_BND)


def build(
  *,
  model: DiTConfig,
  text_config: TextConfig,
  diffusion: ObjectiveConfig,
  batch_spec: BatchSpec,
  parts: Mapping[str, int] | None = None,
) -> Task:
  """`parts`: a loss of each source of a mixture, by name, with the first sample_id beyond it."""
  return Task(
    name="text_to_video",
    init=lambda rngs: TextToVideo(model, text_config, batch_spec, rngs=rngs),
    loss_fn=functools.partial(loss, diffusion, parts=tuple((parts or {}).items())),
    eval_fn=functools.partial(held_out_loss, diffusion),
    flops_fn=functools.partial(model_flops, model, text_config, batch_spec),
    batch_spec=batch_spec,
  )


def model_flops(model: DiTConfig, text_config: TextConfig, spec: BatchSpec, batch: TokenBatch) -> np.ndarray:
  """[B], forward and backward pass of denoiser and text encoder, from the real segments."""
  denoiser = dit.model_flops(model, batch, channels=spec.channels, text_dim=text_config.width)
  return denoiser + text.model_flops(text_config, batch, spec.text_width)


def sample_keys(key: Array, sample_id_BN: Array) -> Array:
  """One key per sample slot, a function of the step's key and the sample alone."""
  fold = functools.partial(jax.random.fold_in, key)
  return jax.vmap(jax.vmap(fold))(sample_id_BN.astype(jnp.uint32))


def num_tokens(batch: TokenBatch) -> Array:
  return jnp.prod(batch.grid_BN3, axis=-1)


def spread_to_tokens(batch: TokenBatch, value_BN: Array) -> Array:
  """Each token's value of its sample, (B, L, 1); padding gets 0."""
  one_hot = layers.slot_one_hot(batch.segment_BL, value_BN.shape[1] + 1)[..., 1:]
  return jnp.einsum("bln,bn->bl", one_hot, value_BN.astype(jnp.float32))[..., None]


def token_noise(batch: TokenBatch, keys_BN: Array) -> Array:
  """Normal noise (B, L, C): a function of the sample and the token's place in it, not of the row."""
  channels = batch.tokens_BLC.shape[-1]
  slot_BL = jnp.maximum(batch.segment_BL - 1, 0)
  key_data = jax.random.key_data(keys_BN)
  token_data = jnp.take_along_axis(key_data, slot_BL[..., None], axis=1)
  place_BL = text.place_in_segment(batch.segment_BL)

  def draw(data, place):
    return jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(data), place), (channels,))

  return jax.vmap(jax.vmap(draw))(token_data, place_BL)


def token_sums(
  config: ObjectiveConfig, model, batch: TokenBatch, t_BN: Array, keys_BN: Array
) -> tuple[Array, Array]:
  """Loss of each token and whether it counts: tokens given as prompts and padding do not."""
  t_BL1 = spread_to_tokens(batch, t_BN)
  eps = token_noise(batch, keys_BN)
  clean = batch.tokens_BLC.astype(jnp.float32)
  z = jnp.where(batch.given_BL[..., None], clean, objectives.add_noise(config, clean, eps, t_BL1))
  losses = objectives.token_loss(config, model(z, t_BN, batch), clean, eps, t_BL1)
  counts = (batch.segment_BL > 0) & ~batch.given_BL
  return jnp.where(counts, losses, 0.0), counts.astype(jnp.float32)


def loss(
  config: ObjectiveConfig,
  model,
  batch: TokenBatch,
  key: Array,
  *,
  parts: tuple[tuple[str, int], ...] = (),
) -> tuple[Array, Sums]:
  """Sum of token losses at each sample's own random noise level."""
  keys = sample_keys(key, batch.sample_id_BN)
  time_keys, noise_keys, drop_keys = (
    jax.vmap(jax.vmap(lambda k, i=i: jax.random.fold_in(k, i)))(keys) for i in range(3)
  )
  t_BN = jax.vmap(jax.vmap(functools.partial(objectives.sample_time, config)))(time_keys, num_tokens(batch))
  drop_BN = jax.vmap(jax.vmap(jax.random.uniform))(drop_keys) < config.caption_drop
  dropped = text.drop_captions(batch, drop_BN)
  losses, counts = token_sums(config, model, dropped, t_BN, noise_keys)
  sums = {"loss": (losses.sum(), counts.sum())}
  bins_BL = jnp.clip(spread_to_tokens(batch, t_BN)[..., 0] * NUM_BINS, 0, NUM_BINS - 1).astype(jnp.int32)
  for i in range(NUM_BINS):
    inside = counts * (bins_BL == i)
    sums[f"loss/t{i / NUM_BINS:.1f}-{(i + 1) / NUM_BINS:.1f}"] = ((losses * inside).sum(), inside.sum())
  sums |= losses_by_part(batch, losses, counts, parts)
  is_sample = batch.sample_id_BN != NO_SAMPLE
  sums["t_mean"] = (jnp.where(is_sample, t_BN, 0).sum(), is_sample.sum())
  sums["caption_drop"] = ((drop_BN & is_sample).sum(), is_sample.sum())
  return sums["loss"][0], sums


def losses_by_part(
  batch: TokenBatch, losses_BL: Array, counts_BL: Array, parts: tuple[tuple[str, int], ...]
) -> Sums:
  """Of each source of a mixture: samples of one have ids that follow on those of another."""
  sums, first = {}, 0
  for name, end in parts:
    of_part_BN = (batch.sample_id_BN >= first) & (batch.sample_id_BN < end)
    inside = counts_BL * spread_to_tokens(batch, of_part_BN)[..., 0]
    sums[f"loss/{name}"] = ((losses_BL * inside).sum(), inside.sum())
    first = end
  return sums


def held_out_loss(config: ObjectiveConfig, model, batch: TokenBatch) -> Sums:
  """Loss at fixed noise levels and fixed noise, captions kept; by level too."""
  keys = sample_keys(jax.random.key(0), batch.sample_id_BN)

  def at_level(t):
    t_BN = jnp.full(batch.fps_BN.shape, t, jnp.float32)
    losses, counts = token_sums(config, model, batch, t_BN, keys)
    return losses.sum(), counts.sum()

  # One level after another: the memory of one, not of all.
  totals, counts = jax.lax.map(at_level, jnp.asarray(EVAL_TIMES))
  sums = {"loss": (totals.sum(), counts.sum())}
  for i, t in enumerate(EVAL_TIMES):
    sums[f"loss/t{t:.2f}"] = (totals[i], counts[i])
  return sums
