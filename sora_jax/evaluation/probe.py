"""A linear probe: what a frozen feature says of a label that a single linear layer can read off."""

import dataclasses

import numpy as np
from scipy import optimize

PENALTIES = (
  1e-4,
  1e-3,
  1e-2,
  1e-1,
  1.0,
)  # on squared weights; the best on a fifth of the training set is taken
HELD_BACK = 5


@dataclasses.dataclass(frozen=True)
class Probe:
  """Multinomial logistic regression on standardised features; the penalty was chosen within the training set."""

  mean_F: np.ndarray
  scale_F: np.ndarray
  weights_FK: np.ndarray  # the last row is the bias
  classes: np.ndarray
  penalty: float

  def predict(self, features_NF: np.ndarray) -> np.ndarray:
    return self.classes[np.argmax(_with_one(self, features_NF) @ self.weights_FK, axis=1)]

  def accuracy(self, features_NF: np.ndarray, labels_N: np.ndarray) -> float:
    return float(np.mean(self.predict(features_NF) == labels_N))


def fit(features_NF: np.ndarray, labels_N: np.ndarray, *, seed: int = 0) -> Probe:
  """A probe of the penalty that does best on a held-back fifth, then fitted to all."""
  order = np.random.default_rng(seed).permutation(len(labels_N))
  held, rest = order[::HELD_BACK], np.delete(order, np.s_[::HELD_BACK])
  scores = [
    fit_at(features_NF[rest], labels_N[rest], penalty).accuracy(features_NF[held], labels_N[held])
    for penalty in PENALTIES
  ]
  # Of equals the strongest penalty.
  best = max(range(len(PENALTIES)), key=lambda i: (scores[i], PENALTIES[i]))
  return fit_at(features_NF, labels_N, PENALTIES[best])


def fit_at(features_NF: np.ndarray, labels_N: np.ndarray, penalty: float) -> Probe:
  features_NF = np.asarray(features_NF, np.float64)
  classes, index_N = np.unique(labels_N, return_inverse=True)
  if len(classes) < 2:
    raise ValueError(f"a probe needs two classes or more; the labels are all {classes[0]!r}")
  scale_F = features_NF.std(axis=0)
  probe = Probe(
    features_NF.mean(axis=0), np.where(scale_F > 1e-8, scale_F, 1.0), np.zeros(0), classes, penalty
  )
  x_NF = _with_one(probe, features_NF)[:, :-1]
  # More features than clips: the weights lie in the span of the clips, so the search may stay there.
  is_wide = x_NF.shape[1] > len(x_NF)
  basis_FR = np.linalg.svd(x_NF, full_matrices=False)[2].T if is_wide else np.eye(x_NF.shape[1])
  x_NF = np.column_stack([x_NF @ basis_FR, np.ones(len(x_NF))])
  target_NK = np.eye(len(classes))[index_N]
  shape = (x_NF.shape[1], len(classes))

  def objective(flat):
    weights = flat.reshape(shape)
    logits = x_NF @ weights
    logits = logits - logits.max(axis=1, keepdims=True)
    p_NK = np.exp(logits)
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    free = weights[:-1]  # the bias bears no penalty
    loss = (
      -np.log(np.maximum((p_NK * target_NK).sum(axis=1), 1e-300)).mean() + 0.5 * penalty * (free**2).sum()
    )
    gradient = x_NF.T @ (p_NK - target_NK) / len(x_NF)
    gradient[:-1] += penalty * free
    return loss, gradient.ravel()

  found = optimize.minimize(
    objective, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options={"maxiter": 200}
  )
  *free, bias = found.x.reshape(shape)
  return dataclasses.replace(probe, weights_FK=np.vstack([basis_FR @ np.array(free), bias]))


def _with_one(probe: Probe, features_NF: np.ndarray) -> np.ndarray:
  standard = (np.asarray(features_NF, np.float64) - probe.mean_F) / probe.scale_F
  return np.column_stack([standard, np.ones(len(standard))])
