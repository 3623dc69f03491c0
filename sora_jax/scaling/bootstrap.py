"""Intervals by resampling residuals: the runs stay where they are, their errors are drawn anew."""

import dataclasses

import numpy as np
from scipy import stats

from sora_jax.scaling import laws
from sora_jax.scaling.laws import Fit

LEVEL = 0.9


def widened(residual: np.ndarray, *, num_parameters: int, level: float = LEVEL) -> np.ndarray:
  """Residuals as wide as the errors behind them.

  A fit takes up part of the errors (n / (n - p)); quantiles of a bootstrap are those of a normal
  distribution where Student's are due.
  """
  freedom = max(len(residual) - num_parameters, 1)
  tail = 0.5 + level / 2
  return residual * np.sqrt(len(residual) / freedom) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)


def draw(residual: np.ndarray, num: int, *, num_runs: int, num_parameters: int, seed: int) -> np.ndarray:
  """(num, num_runs) errors."""
  pool = widened(residual - residual.mean(), num_parameters=num_parameters)
  return np.random.default_rng(seed).choice(pool, (num, num_runs))


def of(fit: Fit, *, num: int, seed: int) -> Fit:
  """The fit with `num` replicas."""
  variables = laws.log_variables(fit.law, fit.table) - fit.shift_V[:, None]
  residuals = fit.residuals()
  if np.isfinite(fit.law.delta):
    # A Huber fit this sharp runs through as many runs as it has parameters: no errors, but zeros.
    residuals = residuals[np.argsort(np.abs(residuals))[len(fit.theta_P) :]]
  errors = draw(residuals, num, num_runs=len(fit.table), num_parameters=len(fit.theta_P), seed=seed)
  targets = np.log(fit.predict(fit.table)) + errors
  starts = np.repeat(fit.theta_P[None], num, axis=0)
  samples, _ = laws.solve(fit.law, variables, targets, starts, num_steps=40)
  return dataclasses.replace(fit, samples_KP=samples)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
  """Lower and upper end over the first dim."""
  tail = 0.5 - level / 2
  low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
  return low, high
