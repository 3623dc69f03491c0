"""Matrix product of tokens with a weight."""

import jax

from sora_jax.types import Array


def tokens_times_weight(x: Array, w: Array) -> Array:
  """x @ w over the last dim of x.

  On one device all leading dims are merged first: XLA on a CPU then contracts the weight's gradient as the
  operands lie, where for (B, L, D) it transposes a copy, at up to twice the time of both gradients. On a mesh
  they stay apart: merged rows and tokens could not keep the shardings of both.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if x.ndim <= 2 or mesh.size > 1:
    return x @ w
  return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])
