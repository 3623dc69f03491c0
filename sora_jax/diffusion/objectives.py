"""Noise levels and the per-token denoising loss."""

import dataclasses

import jax
import jax.numpy as jnp

from sora_jax.diffusion import paths
from sora_jax.types import Array

TIME_SAMPLINGS = ("logit_normal", "uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """How samples are noised and what the network predicts.

  `shift_base_tokens`: a sample of n tokens has its t shifted by sqrt(n / shift_base_tokens), as larger grids
  need more noise to lose the same information (Esser et al. 2024, arXiv:2403.03206, eq. 23); 0 = no shift.
  `shift` multiplies that factor. `floor` bounds divisions by sigma (in the weight of the loss) and by
  alpha (of an eps prediction near t = 1).
  """

  path: str = "rectified_flow"
  prediction: str = "velocity"
  loss_space: str = "velocity"
  time_sampling: str = "logit_normal"
  logit_mean: float = 0.0
  logit_std: float = 1.0
  shift: float = 1.0
  shift_base_tokens: int = 0
  floor: float = 0.05
  caption_drop: float = 0.1

  def __post_init__(self):
    for name, value, choices in (
      ("path", self.path, paths.PATHS),
      ("prediction", self.prediction, paths.PREDICTIONS),
      ("loss_space", self.loss_space, paths.PREDICTIONS),
      ("time_sampling", self.time_sampling, TIME_SAMPLINGS),
    ):
      if value not in choices:
        raise ValueError(f"diffusion.{name}={value!r} is not one of {', '.join(choices)}")


def shift_factor(config: ObjectiveConfig, num_tokens: Array) -> Array:
  """Shift of a sample with this many tokens; training and sampling both take it from here."""
  factor = jnp.full(jnp.shape(num_tokens), config.shift, jnp.float32)
  if config.shift_base_tokens:
    factor = factor * jnp.sqrt(jnp.maximum(num_tokens, 1) / config.shift_base_tokens)
  return factor


def shift_time(t: Array, factor: Array) -> Array:
  """Esser et al. 2024, eq. 23; the ends 0 and 1 stay where they are."""
  return factor * t / (1 + (factor - 1) * t)


def sample_time(config: ObjectiveConfig, key: Array, num_tokens: Array) -> Array:
  """One noise level for one sample (vmap over samples)."""
  if config.time_sampling == "uniform":
    t = jax.random.uniform(key)
  else:
    t = jax.nn.sigmoid(config.logit_mean + config.logit_std * jax.random.normal(key))
  return shift_time(t, shift_factor(config, num_tokens))


def add_noise(config: ObjectiveConfig, x0: Array, eps: Array, t: Array) -> Array:
  c = paths.coefficients(config.path, t)
  return c.alpha * x0 + c.sigma * eps


def token_loss(
  config: ObjectiveConfig, output_BLC: Array, x0_BLC: Array, eps_BLC: Array, t_BL1: Array
) -> Array:
  """Mean squared error of each token over its channels, measured in `loss_space`, in fp32."""
  c = paths.coefficients(config.path, t_BL1)
  wanted = paths.target(config.prediction, c, x0_BLC, eps_BLC)
  error = output_BLC.astype(jnp.float32) - wanted
  gain = paths.error_gain(config.loss_space, c, config.floor) / paths.error_gain(
    config.prediction, c, config.floor
  )
  return jnp.mean(jnp.square(gain * error), axis=-1)
