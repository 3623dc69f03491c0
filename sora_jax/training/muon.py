"""Muon: momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024, kellerjordan.github.io)."""

import jax
import jax.numpy as jnp
import optax

from sora_jax.types import Array, PyTree

# x <- a x + b (x x^T) x + c (x x^T)^2 x, of that work: singular values land near 1 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def scale_by_muon(
  adam: optax.GradientTransformation, *, beta: float, hidden: PyTree
) -> optax.GradientTransformation:
  """`adam` (an optax.scale_by_adam whose b1 is `beta`), but for the leaves true in `hidden`.

  Those get the orthogonalised Nesterov momentum, scaled to the root mean square of an AdamW update, so that
  one learning rate serves both (Liu et al. 2025, arXiv:2502.16982, eq. 4). The state is Adam's.
  """

  def update(grads, state, params=None):
    updates, state = adam.update(grads, state, params)

    def one(is_hidden, plain, momentum, grad):
      if not is_hidden:
        return plain
      scale = 0.2 * max(grad.shape[-2:]) ** 0.5
      return scale * orthogonalize(beta * momentum + (1 - beta) * grad)

    return jax.tree.map(one, hidden, updates, state.mu, grads), state

  return optax.GradientTransformation(adam.init, update)


def orthogonalize(x: Array) -> Array:
  """The nearest matrix with all singular values near 1, over the last two dims; other dims are a stack."""
  tall = x.shape[-2] > x.shape[-1]
  x = x.mT if tall else x
  # The spectral norm must not exceed 1 for the iteration to converge.
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
  a, b, c = COEFFICIENTS
  for _ in range(NUM_ITERATIONS):
    gram = x @ x.mT
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.mT if tall else x
