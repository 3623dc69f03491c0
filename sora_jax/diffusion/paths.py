"""Noising paths z_t = alpha(t) x0 + sigma(t) eps, with t = 1 pure noise.

`rectified_flow`: alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv:2209.03003, eq. 1).
`cosine`: alpha = cos(pi t / 2), sigma = sin(pi t / 2), the continuous variance-preserving cosine schedule
(Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17, with offset 0; Salimans and Ho 2022, arXiv:2202.00512).

A network's output may mean any of PREDICTIONS; all are linear in (x0, eps), so each converts to each:
  x0, eps     the clean sample, the noise
  v           alpha eps - sigma x0 (Salimans and Ho 2022, section 4)
  velocity    dz/dt = alpha' x0 + sigma' eps (eps - x0 for rectified flow)
"""

import dataclasses
import math

import jax.numpy as jnp

from sora_jax.types import Array

PATHS = ("rectified_flow", "cosine")
PREDICTIONS = ("x0", "eps", "v", "velocity")


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """alpha, sigma and their time derivatives, in the shape of t."""

  alpha: Array
  sigma: Array
  d_alpha: Array
  d_sigma: Array

  @property
  def determinant(self) -> Array:
    """alpha sigma' - sigma alpha'; 1 for rectified flow, pi / 2 for cosine."""
    return self.alpha * self.d_sigma - self.sigma * self.d_alpha


def coefficients(path: str, t: Array) -> Coefficients:
  if path == "rectified_flow":
    return Coefficients(1 - t, t, -jnp.ones_like(t), jnp.ones_like(t))
  if path == "cosine":
    angle = 0.5 * math.pi * t
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Coefficients(cos, sin, -0.5 * math.pi * sin, 0.5 * math.pi * cos)
  raise ValueError(f"unknown path {path!r}; choose one of {', '.join(PATHS)}")


def target(prediction: str, c: Coefficients, x0: Array, eps: Array) -> Array:
  """What a network that predicts `prediction` should output."""
  if prediction == "x0":
    return x0
  if prediction == "eps":
    return eps
  if prediction == "v":
    return c.alpha * eps - c.sigma * x0
  if prediction == "velocity":
    return c.d_alpha * x0 + c.d_sigma * eps
  raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")


def to_x0_eps(prediction: str, c: Coefficients, z: Array, output: Array, floor: float) -> tuple[Array, Array]:
  """The clean sample and the noise that `output` implies at `z`; `floor` bounds the division by alpha."""
  if prediction == "x0":
    # Only against 0 / 0: a larger bound here would leave noise in the sample at the last step.
    return output, (z - c.alpha * output) / jnp.maximum(c.sigma, 1e-5)
  if prediction == "eps":
    return (z - c.sigma * output) / jnp.maximum(c.alpha, floor), output
  if prediction == "v":
    norm = c.alpha**2 + c.sigma**2
    return (c.alpha * z - c.sigma * output) / norm, (c.sigma * z + c.alpha * output) / norm
  if prediction == "velocity":
    det = c.determinant
    return (c.d_sigma * z - c.sigma * output) / det, (c.alpha * output - c.d_alpha * z) / det
  raise ValueError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}")


def error_gain(space: str, c: Coefficients, floor: float) -> Array:
  """|error in `space`| per unit of x0 error at fixed z (sigma bounded below by `floor`)."""
  sigma = jnp.maximum(c.sigma, floor)
  if space == "x0":
    return jnp.ones_like(sigma)
  if space == "eps":
    return jnp.maximum(c.alpha, floor) / sigma
  if space == "v":
    return (c.alpha**2 + c.sigma**2) / sigma
  if space == "velocity":
    return c.determinant / sigma
  raise ValueError(f"unknown loss space {space!r}; choose one of {', '.join(PREDICTIONS)}")
