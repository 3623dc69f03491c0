"""A linear probe: what a frozen feature says of a label that a single linear layer can read off."""

import dataclasses

import numpy as np
from scipy import optimize

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # on squared weights; the best on a fifth of the training set is taken
HELD_BACK = 5
MOST_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Space:
  """Standardised features, of which only the span of the clips learned from is kept: weights lie in it."""

  mean_F: np.ndarray
  scale_F: np.ndarray
  basis_FR: np.ndarray

  def of(self, features_NF: np.ndarray) -> np.ndarray:
    standard = (np.asarray(features_NF, np.float64) - self.mean_F) / self.scale_F
    return np.column_stack([standard @ self.basis_FR, np.ones(len(standard))])


@dataclasses.dataclass(frozen=True)
class Probe:
  """Multinomial logistic regression; the last row of the weights is the bias."""

  weights_RK: np.ndarray
  classes: np.ndarray
  penalty: float

  def predict(self, z_NR: np.ndarray) -> np.ndarray:
    return self.classes[np.argmax(z_NR @ self.weights_RK, axis=1)]

  def accuracy(self, z_NR: np.ndarray, labels_N: np.ndarray) -> float:
    return float(np.mean(self.predict(z_NR) == labels_N))


def space(features_NF: np.ndarray) -> Space:
  x_NF = np.asarray(features_NF, np.float64)
  mean_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0)
  scale_F = np.where(scale_F > 1e-8, scale_F, 1.0)
  num, width = x_NF.shape
  if width <= num:
    return Space(mean_F, scale_F, np.eye(width))
  standard = (x_NF - mean_F) / scale_F
  # The singular vectors by way of the smaller Gram matrix.
  squares, left = np.linalg.eigh(standard @ standard.T)
  kept = squares > 1e-10 * squares.max()
  return Space(mean_F, scale_F, standard.T @ (left[:, kept] / np.sqrt(squares[kept])))


def fit(z_NR: np.ndarray, labels_N: np.ndarray, *, seed: int = 0) -> Probe:
  """A probe of the penalty that does best on a held-back fifth, then fitted to all."""
  order = np.random.default_rng(seed).permutation(len(labels_N))
  held, rest = order[::HELD_BACK], np.delete(order, np.s_[::HELD_BACK])
  scores = [
    fit_at(z_NR[rest], labels_N[rest], penalty).accuracy(z_NR[held], labels_N[held]) for penalty in PENALTIES
  ]
  # Of equals the strongest penalty.
  best = max(range(len(PENALTIES)), key=lambda i: (scores[i], PENALTIES[i]))
  return fit_at(z_NR, labels_N, PENALTIES[best])


def fit_at(z_NR: np.ndarray, labels_N: np.ndarray, penalty: float) -> Probe:
  classes, index_N = np.unique(labels_N, return_inverse=True)
  if len(classes) < 2:
    raise ValueError(f"a probe needs two classes or more; the labels are all {classes[0]!r}")
  target_NK = np.eye(len(classes))[index_N]
  shape = (z_NR.shape[1], len(classes))

  def objective(flat):
    weights = flat.reshape(shape)
    logits = z_NR @ weights
    logits = logits - logits.max(axis=1, keepdims=True)
    p_NK = np.exp(logits)
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    right = np.maximum((p_NK * target_NK).sum(axis=1), 1e-300)
    gradient = z_NR.T @ (p_NK - target_NK) / len(z_NR)
    gradient[:-1] += penalty * weights[:-1]  # the bias bears no penalty
    return -np.log(right).mean() + 0.5 * penalty * (weights[:-1] ** 2).sum(), gradient.ravel()

  start = np.zeros(shape[0] * shape[1])
  options = {"maxiter": MOST_STEPS}
  found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
  return Probe(found.x.reshape(shape), classes, penalty)
