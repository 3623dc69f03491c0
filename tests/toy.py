"""A tiny task and its data, for tests of the training room."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.types import BatchSpec, Task, TokenBatch

SPEC = BatchSpec(rows=8, tokens=16, channels=8, samples=3, text_tokens=4)


class Toy(nnx.Module):
  def __init__(self, rngs: nnx.Rngs, *, width: int = 16, dtype=jnp.float32):
    def matrix(shape, logical):
      return nnx.Param(0.2 * jax.random.normal(rngs.params(), shape), logical=logical)

    self.up = matrix((8, width), (None, "embed"))
    self.blocks = matrix((3, width, 2 * width), ("embed", "mlp"))
    self.blocks_down = matrix((3, 2 * width, width), ("mlp", "embed"))
    self.scale = nnx.Param(jnp.ones((3, width)), logical=("embed",))
    self.down = matrix((width, 8), ("embed", None))
    self.frozen = nnx.Variable(jnp.ones(8))
    self.dtype = dtype

  def __call__(self, x_BLC):
    cast = lambda p: p[...].astype(self.dtype)  # noqa: E731
    h = x_BLC.astype(self.dtype) @ cast(self.up)

    def block(h, p):
      up, down, scale = p
      return h + jax.nn.silu((h * scale) @ up) @ down, None

    h, _ = jax.lax.scan(block, h, (cast(self.blocks), cast(self.blocks_down), cast(self.scale)))
    return (h @ cast(self.down)).astype(jnp.float32) * self.frozen[...]


def _losses(model, batch, key, t):
  keys = jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(batch.sample_id_BN.astype(jnp.uint32))
  L, C = batch.tokens_BLC.shape[1:]
  noise_BNLC = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (L, C))))(keys)
  slot = jax.nn.one_hot(batch.segment_BL - 1, batch.sample_id_BN.shape[1])
  noise = jnp.einsum("bln,bnlc->blc", slot, noise_BNLC)
  out = model((1 - t) * batch.tokens_BLC + t * noise)
  counts = ((batch.segment_BL > 0) & ~batch.given_BL).astype(jnp.float32)
  return jnp.square(out - (noise - batch.tokens_BLC)).mean(-1) * counts, counts


def _loss(model, batch, key):
  losses, counts = _losses(model, batch, key, 0.5)
  loss = losses.sum()
  return loss, {"loss": (loss, counts.sum()), "loss/t0.4-0.6": (loss, counts.sum())}


def _eval(model, batch):
  losses, counts = _losses(model, batch, jax.random.key(0), 0.3)
  return {"loss": (losses.sum(), counts.sum())}


def task(*, spec: BatchSpec = SPEC, width: int = 16, dtype=jnp.float32) -> Task:
  return Task(
    name="toy",
    init=lambda rngs: Toy(rngs, width=width, dtype=dtype),
    loss_fn=_loss,
    eval_fn=_eval,
    flops_fn=lambda batch: 6.0 * 2000 * float((batch.segment_BL > 0).sum()),
    batch_spec=spec,
  )


def batch(step: int, spec: BatchSpec = SPEC) -> TokenBatch:
  """Rows of two samples each and some padding; a function of the step alone."""
  rng = np.random.default_rng([7, step])
  out = spec.zeros()
  for row in range(spec.rows):
    first, second = rng.integers(3, 8, 2)
    out.segment_BL[row, :first], out.segment_BL[row, first : first + second] = 1, 2
    out.sample_id_BN[row, :2] = (step * spec.rows + row) * 2 + np.arange(2)
    out.given_BL[row, 0] = row % 2
    ramp = np.linspace(-1, 1, spec.channels) * rng.normal()
    out.tokens_BLC[row, : first + second] = ramp + 0.1 * rng.normal(size=(first + second, spec.channels))
  return out


def batches(start: int):
  while True:
    yield batch(start)
    start += 1
