"""What a backend of attention is: a forward pass that returns lse and a backward pass that takes it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from sora_jax.types import Array

# lse of a query without keys: finite, and exp(LOWEST - anything else) is 0.
LOWEST = -1e29


@dataclasses.dataclass(frozen=True)
class Pair:
  """forward(q, k, v, q_segment, k_segment, dtype) -> (o_BLKS in dtype, lse_BKL in fp32)
  backward(q, k, v, q_segment, k_segment, do, lse, delta, dtype) -> (dq, dk, dv) in dtype

  lse is the logarithm of the sum of exponentials of the scores, LOWEST for a query without keys. The backward
  pass takes finite lse and delta = sum(do * o), both [B, K, L]; they may be those of a longer row of which k
  and v are a part.
  """

  forward: Callable
  backward: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_with(pair: Pair, q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM) -> Array:
  """Attention within segments; a query without keys (padding included) yields 0 and has no gradient."""
  return pair.forward(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, q_BLKS.dtype)[0]


def _forward(pair, q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM):
  o_BLKS, lse_BKL = pair.forward(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, q_BLKS.dtype)
  o_BLKS, lse_BKL = named(o_BLKS, lse_BKL)
  return o_BLKS, (q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, o_BLKS, lse_BKL)


def _backward(pair, residuals, do_BLKS):
  *inputs, o_BLKS, lse_BKL = residuals
  lse_BKL, delta_BKL = for_backward(o_BLKS, lse_BKL, do_BLKS, inputs[3])
  return *pair.backward(*inputs, do_BLKS, lse_BKL, delta_BKL, do_BLKS.dtype), None, None


attend_with.defvjp(_forward, _backward)


def named(o_BLKS, lse_BKL):
  """Named inside the rule, so that a remat policy which saves them need not run the forward pass again."""
  name = jax.ad_checkpoint.checkpoint_name
  return name(o_BLKS, "attention_o"), name(lse_BKL, "attention_lse")


def for_backward(o_BLKS, lse_BKL, do_BLKS, q_segment_BL):
  """(finite lse, delta) of the whole row."""
  # A product with NaN in padding would pass it on.
  delta_BLK = jnp.where(
    (q_segment_BL != 0)[..., None], (do_BLKS.astype(jnp.float32) * o_BLKS.astype(jnp.float32)).sum(-1), 0
  )
  return jnp.where(lse_BKL > LOWEST / 2, lse_BKL, 0.0), delta_BLK.transpose(0, 2, 1)
