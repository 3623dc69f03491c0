"""Levenberg-Marquardt for many small problems at once: a grid of starts, or the replicas of a bootstrap."""

from collections.abc import Callable

import numpy as np

# (S, P) parameters -> predictions (S, n) and their derivatives (S, n, P)
Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
  size = np.abs(residual)
  return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def minimise(
  model: Model,
  target: np.ndarray,
  start_SP: np.ndarray,
  *,
  low_P: np.ndarray,
  high_P: np.ndarray,
  delta: float = np.inf,
  num_steps: int = 100,
  tolerance: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
  """Parameters (S, P) and costs (S,) of sum(huber(target - model)) within the box.

  Huber enters as weights min(1, delta / |r|), renewed every step, which never raises the cost.
  """
  theta = np.clip(start_SP, low_P, high_P)
  damping = np.full(len(theta), 1e-2)
  value, jacobian = model(theta)
  cost = _cost(target - value, delta)
  quiet = np.zeros(len(theta), int)
  eye = np.eye(theta.shape[1])
  for _ in range(num_steps):
    residual = target - value
    weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * weight[..., None]
    gradient = np.einsum("snp,sn->sp", weighted, residual)
    hessian = np.swapaxes(weighted, 1, 2) @ jacobian
    free = ~(((theta <= low_P) & (gradient < 0)) | ((theta >= high_P) & (gradient > 0)))
    hessian = hessian * (free[:, :, None] & free[:, None, :])
    scale = np.einsum("spp->sp", hessian)
    scale = scale + 1e-9 * scale.max(axis=1, keepdims=True) + 1e-30
    damped = hessian + (damping[:, None] * scale + ~free)[..., None] * eye + 1e-12 * scale[..., None] * eye
    step = np.linalg.solve(damped, (gradient * free)[..., None])[..., 0]
    trial = np.clip(theta + np.clip(step, -2.0, 2.0), low_P, high_P)
    new_value, new_jacobian = model(trial)
    new_cost = _cost(target - new_value, delta)
    better = new_cost < cost
    gain = np.where(better, cost - new_cost, 0.0)
    quiet = np.where(gain > tolerance * cost, 0, quiet + 1)
    theta = np.where(better[:, None], trial, theta)
    value = np.where(better[:, None], new_value, value)
    jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
    cost = np.where(better, new_cost, cost)
    damping = np.clip(np.where(better, damping / 4, damping * 6), 1e-12, 1e10)
    if (quiet >= 8).all():
      break
  return theta, cost


def _cost(residual: np.ndarray, delta: float) -> np.ndarray:
  cost = (0.5 * residual**2 if np.isinf(delta) else huber(residual, delta)).sum(axis=-1)
  return np.where(np.isfinite(cost), cost, np.inf)
