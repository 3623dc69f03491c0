"""Laws of the loss: their forms, and fits of them to runs.

power       L = a C^-b
saturating  L = a (C + d)^-b + c                  Zhai et al., Scaling Vision Transformers
chinchilla  L = E + A / N^alpha + B / D^beta      Hoffmann et al., approach 3: Huber loss on log L, delta 1e-3

Errors of the loss are taken as relative to it, so all fits compare log L. Inside, each variable is divided
by its geometric mean: a prefactor at C = 1 and an exponent are nearly collinear.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from scipy import optimize

from sora_jax.scaling import solver
from sora_jax.scaling.table import Table

HUBER_DELTA = 1e-3
EXPONENTS = (1e-3, 5.0)  # between which alpha and beta are searched
MIN_RATIO = 2.0  # of the largest to the smallest value of a variable
MAX_CORRELATION = 0.999  # of log N with log D, above which alpha and beta cannot be told apart


@dataclasses.dataclass(frozen=True)
class Law:
  """A form of the loss. `theta` are its inner parameters: logarithms, at the mean of the data."""

  name: str
  form: str
  columns: tuple[str, ...]
  letters: tuple[str, ...]
  min_points: int
  delta: float
  evaluate: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
  starts: Callable[[np.ndarray, np.ndarray], np.ndarray]
  box: Callable[[np.ndarray, np.ndarray], tuple[list[float], list[float]]]
  to_letters: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law; `samples` are its bootstrap replicas, none before bootstrap.of."""

  law: Law
  table: Table
  shift_V: np.ndarray  # mean of the log of each variable
  theta_P: np.ndarray
  cost: float
  samples_KP: np.ndarray | None = None

  def letters(self) -> dict[str, float]:
    values = self.law.to_letters(self.theta_P[None], self.shift_V)[0]
    return {letter: float(value) for letter, value in zip(self.law.letters, values)}

  def sampled_letters(self) -> dict[str, np.ndarray]:
    return dict(zip(self.law.letters, self.law.to_letters(self.samples_KP, self.shift_V).T))

  def predict(self, table: Table, theta_SP: np.ndarray | None = None) -> np.ndarray:
    """Loss (S, n); (n,) of the fit itself."""
    variables = log_variables(self.law, table) - self.shift_V[:, None]
    theta = self.theta_P[None] if theta_SP is None else theta_SP
    loss = np.exp(self.law.evaluate(theta, variables)[0])
    return loss[0] if theta_SP is None else loss

  def residuals(self) -> np.ndarray:
    """Of log loss; nearly the relative error."""
    return np.log(self.table.loss) - np.log(self.predict(self.table))


def log_variables(law: Law, table: Table) -> np.ndarray:
  return np.log([getattr(table, column) for column in law.columns])


def fit(law: Law, table: Table) -> Fit:
  """The best fit over a grid of starts."""
  check(law, table)
  variables = log_variables(law, table)
  shift = variables.mean(axis=1)
  variables = variables - shift[:, None]
  target = np.log(table.loss)
  theta, cost = solve(law, variables, target, law.starts(variables, target)[:, :], num_steps=60, finish=12)
  theta, cost = _polish(law, variables, target, theta, cost)
  return Fit(law, table, shift, theta, cost)


def solve(
  law: Law,
  variables: np.ndarray,
  target: np.ndarray,
  starts_SP: np.ndarray,
  *,
  num_steps: int,
  finish: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Least squares first, then the law's Huber loss from there; `finish` keeps that many of the starts."""
  low, high = (np.array(side) for side in law.box(variables, target))
  model = lambda theta: law.evaluate(theta, variables)  # noqa: E731
  theta, cost = solver.minimise(model, target, starts_SP, low_P=low, high_P=high, num_steps=num_steps)
  if finish:
    best = np.argsort(cost)[:finish]
    theta, _ = solver.minimise(model, target, theta[best], low_P=low, high_P=high, num_steps=300)
  if np.isinf(law.delta):
    return theta, solver.huber(target - law.evaluate(theta, variables)[0], 1e9).sum(axis=1)
  # Straight to delta = 1e-3 the weights are so uneven that steps stall.
  for delta, steps in ((10 * law.delta, num_steps), (law.delta, 300 if finish else 2 * num_steps)):
    theta, cost = solver.minimise(
      model, target, theta, low_P=low, high_P=high, delta=delta, num_steps=steps, tolerance=1e-9
    )
  return theta, cost


def _polish(law: Law, variables: np.ndarray, target: np.ndarray, theta_SP: np.ndarray, cost_S: np.ndarray):
  """BFGS from the best: reweighting closes in on the optimum of a Huber loss only slowly."""
  best = int(np.argmin(cost_S))
  theta, cost = theta_SP[best], float(cost_S[best])
  if np.isinf(law.delta):
    return theta, cost

  def objective(x):
    value, jacobian = law.evaluate(x[None], variables)
    residual = target - value[0]
    slope = np.clip(residual, -law.delta, law.delta)
    # In units of delta^2: BFGS stops at an absolute size of the gradient.
    unit = law.delta**2
    return solver.huber(residual, law.delta).sum() / unit, -(slope @ jacobian[0]) / unit

  found = optimize.minimize(objective, theta, jac=True, method="BFGS", options={"gtol": 1e-4})
  found_cost = float(found.fun) * law.delta**2
  return (found.x, found_cost) if found_cost < cost else (theta, cost)


def check(law: Law, table: Table) -> None:
  """Refuses what cannot determine the law."""
  if len(table) < law.min_points:
    raise ValueError(f"the law {law.name} needs at least {law.min_points} runs, there are {len(table)}")
  for column in law.columns:
    values = getattr(table, column)
    if values.max() < MIN_RATIO * values.min():
      raise ValueError(
        f"the law {law.name} needs {column} that differ by a factor of {MIN_RATIO:g} or more; they span "
        f"{values.min():.4g} to {values.max():.4g}"
      )
    distinct = len(np.unique(values))
    least = 3 if len(law.columns) > 1 else law.min_points
    if distinct < least:
      raise ValueError(f"the law {law.name} needs {least} different values of {column}, there are {distinct}")
  if len(law.columns) > 1:
    correlation = np.corrcoef(log_variables(law, table))[0, 1]
    if abs(correlation) > MAX_CORRELATION:
      raise ValueError(
        f"the law {law.name} cannot tell params from tokens: they move together in every run (correlation "
        f"of their logarithms {correlation:.4f}); add runs of one size with different tokens"
      )


def _power(theta, variables):
  log_a, b = theta[:, 0:1], theta[:, 1:2]
  x = variables[0][None]
  jacobian = np.stack(np.broadcast_arrays(np.ones_like(b), -x), axis=-1)
  return log_a - b * x, np.broadcast_to(jacobian, (len(theta), x.shape[1], 2))


def _power_letters(theta, shift):
  return np.stack([np.exp(theta[:, 0] + theta[:, 1] * shift[0]), theta[:, 1]], axis=1)


def _saturating(theta, variables):
  """theta: log a, log b, log c, log d."""
  log_a, log_b, log_c, log_d = (theta[:, i : i + 1] for i in range(4))
  x, b = variables[0][None], np.exp(log_b)
  reach = np.logaddexp(x, log_d)  # log(C + d)
  falling = log_a - b * reach
  value = np.logaddexp(falling, log_c)
  share = np.exp(falling - value)
  jacobian = [share, -share * b * reach, 1 - share, -share * b * np.exp(log_d - reach)]
  return value, np.stack(jacobian, axis=-1)


def _saturating_starts(variables, target):
  x, least = variables[0], target.min()
  grid = itertools.product((0.05, 0.15, 0.35, 0.7, 1.2), (0.05, 0.4, 0.7, 0.9, 0.98), (-3.0, 0.0, 2.0))
  starts = []
  for b, share, beyond in grid:
    log_c, log_d = least + np.log(share), x.min() + beyond
    rest = np.log(np.maximum(np.exp(target) - np.exp(log_c), 1e-3 * np.exp(least)))
    starts.append([np.median(rest + b * np.logaddexp(x, log_d)), np.log(b), log_c, log_d])
  return np.array(starts)


def _saturating_box(variables, target):
  x = variables[0]
  low = [target.min() - 60, np.log(1e-3), target.min() - 12, x.min() - 7]
  return low, [target.max() + 120, np.log(10.0), target.max(), x.max()]


def _saturating_letters(theta, shift):
  b = np.exp(theta[:, 1])
  return np.stack(
    [np.exp(theta[:, 0] + b * shift[0]), b, np.exp(theta[:, 2]), np.exp(theta[:, 3] + shift[0])], axis=1
  )


def _chinchilla(theta, variables):
  """theta: log E, log A, log B, alpha, beta."""
  log_e, log_a, log_b, alpha, beta = (theta[:, i : i + 1] for i in range(5))
  n, d = variables[0][None], variables[1][None]
  by_size, by_data = log_a - alpha * n, log_b - beta * d
  value = np.logaddexp(np.logaddexp(by_size, by_data), log_e)
  size, data = np.exp(by_size - value), np.exp(by_data - value)
  jacobian = [np.exp(log_e - value), size, data, -size * n, -data * d]
  return value, np.stack(jacobian, axis=-1)


def _chinchilla_starts(variables, target):
  exponents = (0.1, 0.3, 0.5, 0.8, 1.3)
  starts = []
  for alpha, beta, share, split in itertools.product(exponents, exponents, (0.2, 0.6, 0.9), (0.2, 0.5, 0.8)):
    log_e = target.min() + np.log(share)
    rest = max(np.exp(np.median(target)) - np.exp(log_e), 1e-3 * np.exp(log_e))
    starts.append([log_e, np.log(split * rest), np.log((1 - split) * rest), alpha, beta])
  return np.array(starts)


def _chinchilla_box(variables, target):
  del variables
  least, most = EXPONENTS
  low = [target.min() - 12, target.min() - 20, target.min() - 20, least, least]
  return low, [target.max(), target.max() + 5, target.max() + 5, most, most]


def _chinchilla_letters(theta, shift):
  log_e, log_a, log_b, alpha, beta = theta.T
  scale_n, scale_d = log_a + alpha * shift[0], log_b + beta * shift[1]
  a = beta / (alpha + beta)
  g = np.exp((np.log(alpha / beta) + scale_n - scale_d) / (alpha + beta))
  return np.stack([np.exp(log_e), np.exp(scale_n), np.exp(scale_d), alpha, beta, a, 1 - a, g], axis=1)


POWER = Law(
  "power",
  "L = a C^-b",
  ("compute",),
  ("a", "b"),
  5,
  np.inf,
  _power,
  lambda variables, target: np.array([[target.mean(), 0.1]]),
  lambda variables, target: ([-1e3, -10.0], [1e3, 10.0]),
  _power_letters,
)
SATURATING = Law(
  "saturating",
  "L = a (C + d)^-b + c",
  ("compute",),
  ("a", "b", "c", "d"),
  6,
  np.inf,
  _saturating,
  _saturating_starts,
  _saturating_box,
  _saturating_letters,
)
CHINCHILLA = Law(
  "chinchilla",
  "L = E + A / N^alpha + B / D^beta; N_opt = G (C / k)^a, D_opt = (C / k)^b / G, C = k N D",
  ("params", "tokens"),
  ("E", "A", "B", "alpha", "beta", "a", "b", "G"),
  7,
  HUBER_DELTA,
  _chinchilla,
  _chinchilla_starts,
  _chinchilla_box,
  _chinchilla_letters,
)
LAWS = {law.name: law for law in (POWER, SATURATING, CHINCHILLA)}
