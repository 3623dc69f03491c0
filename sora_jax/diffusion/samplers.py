"""Deterministic samplers of the probability-flow ODE, with a noise level of their own for every sample.

`euler`: z + (s - t) dz/dt. `heun`: its trapezoidal correction (Karras et al. 2022, arXiv:2206.00364, alg. 1).
`ddim`: alpha(s) x0 + sigma(s) eps (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta 0); on the
rectified-flow path it is Euler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.diffusion import objectives, paths
from sora_jax.types import Array

SAMPLERS = ("euler", "heun", "ddim")

# (z_BLC, t_BN) -> network output of the objective's prediction type
Denoiser = Callable[[Array, Array], Array]
# t_BN -> t_BL1: the noise level of each token
Spread = Callable[[Array], Array]


def time_grid(config: objectives.ObjectiveConfig, num_steps: int, num_tokens_BN: Array) -> Array:
  """(num_steps + 1, B, N) noise levels from 1 to 0, shifted per sample as in training."""
  t = jnp.linspace(1.0, 0.0, num_steps + 1)[:, None, None]
  return objectives.shift_time(t, objectives.shift_factor(config, num_tokens_BN)[None])


def guide(conditional: Array, unconditional: Array, scale: Array | float) -> Array:
  """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6 with w = scale - 1)."""
  return unconditional + scale * (conditional - unconditional)


def sample(
  config: objectives.ObjectiveConfig,
  denoiser: Denoiser,
  noise_BLC: Array,
  grid_KBN: Array,
  spread: Spread,
  *,
  method: str = "euler",
  given_BL1: Array | None = None,
  clean_BLC: Array | None = None,
) -> Array:
  """Integrates from noise to clean tokens along `grid_KBN`; given tokens stay at `clean_BLC` throughout."""
  if method not in SAMPLERS:
    raise ValueError(f"unknown sampler {method!r}; choose one of {', '.join(SAMPLERS)}")

  def hold(z):
    return z if given_BL1 is None else jnp.where(given_BL1, clean_BLC, z)

  def predict(z, t_BN):
    c = paths.coefficients(config.path, spread(t_BN))
    x0, eps = paths.to_x0_eps(config.prediction, c, z, denoiser(z, t_BN), config.floor)
    return x0, eps, c.d_alpha * x0 + c.d_sigma * eps

  def step(z, times):
    t_BN, s_BN = times
    dt = spread(s_BN) - spread(t_BN)
    x0, eps, slope = predict(z, t_BN)
    if method == "ddim":
      c = paths.coefficients(config.path, spread(s_BN))
      return hold(c.alpha * x0 + c.sigma * eps), None
    ahead = hold(z + dt * slope)
    if method == "euler":
      return ahead, None
    _, _, slope_ahead = predict(ahead, s_BN)
    # At s = 0 the slope divides by sigma = 0: the last step stays Euler.
    corrected = hold(z + dt * 0.5 * (slope + slope_ahead))
    return jnp.where(spread(s_BN) > 0, corrected, ahead), None

  z, _ = jax.lax.scan(step, hold(noise_BLC), (grid_KBN[:-1], grid_KBN[1:]))
  return z
