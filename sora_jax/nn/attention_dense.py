"""Dense masked attention: the reference for the other backends, and the fastest for short rows on a CPU."""

import math

import jax
import jax.numpy as jnp

from sora_jax.nn.attention_pair import LOWEST, Pair
from sora_jax.types import PADDING, Array


def attend_dense(
  q_BLKS: Array, k_BMKS: Array, v_BMKS: Array, q_segment_BL: Array, k_segment_BM: Array
) -> Array:
  """Attention within segments; a query without keys (padding included) yields 0 and has no gradient."""
  (q_BLKS,), (k_BMKS, v_BMKS) = _clean(q_segment_BL, q_BLKS), _clean(k_segment_BM, k_BMKS, v_BMKS)
  score_BKLM, live_B1LM = _scores(q_BLKS, k_BMKS, q_segment_BL, k_segment_BM)
  p_BKLM = jax.nn.softmax(score_BKLM, axis=-1)
  # Without keys the softmax above is uniform, not zero.
  p_BKLM = jnp.where(live_B1LM, p_BKLM, 0).astype(v_BMKS.dtype)
  o_BLKS = jnp.einsum("BKLM,BMKS->BLKS", p_BKLM, v_BMKS, preferred_element_type=jnp.float32)
  return o_BLKS.astype(q_BLKS.dtype)


def _clean(segment_BL, *xs):
  """Zeros for padding tokens: 0 * NaN there would reach the samples beside them."""
  return [jnp.where((segment_BL != PADDING)[..., None, None], x, 0) for x in xs]


def _scores(q_BLKS, k_BMKS, q_segment_BL, k_segment_BM):
  same_BLM = (q_segment_BL[:, :, None] == k_segment_BM[:, None, :]) & (q_segment_BL != PADDING)[:, :, None]
  live_B1LM = same_BLM[:, None]
  # Softmax in fp32: its sum runs over the whole row.
  score_BKLM = jnp.einsum("BLKS,BMKS->BKLM", q_BLKS, k_BMKS, preferred_element_type=jnp.float32)
  return jnp.where(live_B1LM, score_BKLM * (1 / math.sqrt(q_BLKS.shape[-1])), -1e30), live_B1LM


def _forward(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, dtype):
  (q_BLKS,), (k_BMKS, v_BMKS) = _clean(q_segment_BL, q_BLKS), _clean(k_segment_BM, k_BMKS, v_BMKS)
  score_BKLM, live_B1LM = _scores(q_BLKS, k_BMKS, q_segment_BL, k_segment_BM)
  lse_BKL = jnp.where(live_B1LM.any(-1), jax.nn.logsumexp(score_BKLM, axis=-1), LOWEST)
  p_BKLM = jnp.where(live_B1LM, jnp.exp(score_BKLM - lse_BKL[..., None]), 0).astype(v_BMKS.dtype)
  o_BLKS = jnp.einsum("BKLM,BMKS->BLKS", p_BKLM, v_BMKS, preferred_element_type=jnp.float32)
  return o_BLKS.astype(dtype), lse_BKL


def _backward(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, do_BLKS, lse_BKL, delta_BKL, dtype):
  q_BLKS, do_BLKS = _clean(q_segment_BL, q_BLKS, do_BLKS)
  k_BMKS, v_BMKS = _clean(k_segment_BM, k_BMKS, v_BMKS)
  score_BKLM, live_B1LM = _scores(q_BLKS, k_BMKS, q_segment_BL, k_segment_BM)
  p_BKLM = jnp.where(live_B1LM, jnp.exp(score_BKLM - lse_BKL[..., None]), 0)

  def dot(pattern, a, b):
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)

  dp_BKLM = dot("BLKS,BMKS->BKLM", do_BLKS, v_BMKS)
  scale = 1 / math.sqrt(q_BLKS.shape[-1])
  ds_BKLM = (p_BKLM * (dp_BKLM - delta_BKL[..., None]) * scale).astype(q_BLKS.dtype)
  dq, dk = dot("BKLM,BMKS->BLKS", ds_BKLM, k_BMKS), dot("BKLM,BLKS->BMKS", ds_BKLM, q_BLKS)
  dv = dot("BKLM,BLKS->BMKS", p_BKLM.astype(do_BLKS.dtype), do_BLKS)
  return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype)


# The same with a backward pass of its own, which computes the scores again instead of keeping them.
DENSE = Pair(_forward, _backward)
