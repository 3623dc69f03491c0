"""Dense masked attention: the reference for the other backends, and the fastest for short rows on a CPU."""

import math

import jax
import jax.numpy as jnp

from sora_jax.types import PADDING, Array


def attend_dense(
  q_BLKS: Array, k_BMKS: Array, v_BMKS: Array, q_segment_BL: Array, k_segment_BM: Array
) -> Array:
  """Attention within segments; a query without keys (padding included) yields 0 and has no gradient."""
  # Zeros for padding tokens: 0 * NaN there would reach the samples beside them.
  q_real_BL, k_real_BM = q_segment_BL != PADDING, k_segment_BM != PADDING
  q_BLKS = jnp.where(q_real_BL[..., None, None], q_BLKS, 0)
  k_BMKS, v_BMKS = (jnp.where(k_real_BM[..., None, None], x, 0) for x in (k_BMKS, v_BMKS))
  same_BLM = (q_segment_BL[:, :, None] == k_segment_BM[:, None, :]) & q_real_BL[:, :, None]
  live_B1LM = same_BLM[:, None]
  # Softmax in fp32: its sum runs over the whole row.
  score_BKLM = jnp.einsum("BLKS,BMKS->BKLM", q_BLKS, k_BMKS, preferred_element_type=jnp.float32)
  score_BKLM = jnp.where(live_B1LM, score_BKLM * (1 / math.sqrt(q_BLKS.shape[-1])), -1e30)
  p_BKLM = jax.nn.softmax(score_BKLM, axis=-1)
  # Without keys the softmax above is uniform, not zero.
  p_BKLM = jnp.where(live_B1LM, p_BKLM, 0).astype(v_BMKS.dtype)
  o_BLKS = jnp.einsum("BKLM,BMKS->BLKS", p_BKLM, v_BMKS, preferred_element_type=jnp.float32)
  return o_BLKS.astype(q_BLKS.dtype)
