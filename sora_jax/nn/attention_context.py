"""Context parallelism beyond the number of heads: a ring of devices, each group of them an all-to-all.

The `context` axis of size U * R falls into R groups of U neighbours. Within a group an all-to-all trades
tokens for heads (DeepSpeed-Ulysses, arXiv:2309.14509); between groups keys and values go round a ring, and
partial results are merged by their lse (Ring Attention, Liu et al. 2023, arXiv:2310.01889). Both together are
USP (Fang and Zhao 2024, arXiv:2405.07719). A step of the ring whose chunks share no segment computes nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.nn.attention_pair import LOWEST, Pair, for_backward, named
from sora_jax.types import PADDING, Array


def split(context: int, heads: int) -> tuple[int, int]:
  """(devices of an all-to-all, devices of a ring) for so many heads on a device of the context axis."""
  ulysses = math.gcd(context, heads)
  return ulysses, context // ulysses


def attend_ring(
  pair: Pair, axis: str, ulysses: int, ring: int, q_BLKS, k_BLKS, v_BLKS, q_segment_BL, k_segment_BL
) -> Array:
  """Inside shard_map: q, k, v hold this device's tokens of `axis`, the segments those of the whole row."""
  groups = [[r * ulysses + u for u in range(ulysses)] for r in range(ring)]

  def exchange(x, split_axis, concat_axis):
    if ulysses == 1:
      return x
    return lax.all_to_all(x, axis, split_axis, concat_axis, axis_index_groups=groups, tiled=True)

  q, k, v = (exchange(x, 2, 1) for x in (q_BLKS, k_BLKS, v_BLKS))
  return exchange(_ring(pair, axis, ulysses, ring, q, k, v, q_segment_BL, k_segment_BL), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _ring(pair, axis, ulysses, ring, q, k, v, q_segment, k_segment):
  return _ring_forward(pair, axis, ulysses, ring, q, k, v, q_segment, k_segment)[0]


class _Place:
  """Where this device is in its ring: chunk of queries, and the chunk of keys it holds at a step."""

  def __init__(self, axis, ulysses, ring, tokens):
    self.axis, self.ring, self.tokens = axis, ring, tokens
    self.at = lax.axis_index(axis) // ulysses
    size = ulysses * ring
    self.hops = [(i, (i + ulysses) % size) for i in range(size)]

  def pass_on(self, xs):
    return jax.tree.map(lambda x: lax.ppermute(x, self.axis, self.hops), xs)

  def chunk(self, segment, i):
    return lax.dynamic_slice_in_dim(segment, i * self.tokens, self.tokens, axis=1)

  def keys_at(self, segment, step):
    return self.chunk(segment, (self.at - step) % self.ring)


def _meet(q_segment, k_segment):
  """Whether the two chunks may share a segment, in any row."""

  def bounds(segment):
    return jnp.where(segment == PADDING, jnp.iinfo(jnp.int32).max, segment).min(1), segment.max(1)

  (q_low, q_high), (k_low, k_high) = bounds(q_segment), bounds(k_segment)
  return ((q_low <= k_high) & (k_low <= q_high)).any()


def _ring_forward(pair, axis, ulysses, ring, q, k, v, q_segment, k_segment):
  place = _Place(axis, ulysses, ring, q.shape[1])
  q_chunk = place.chunk(q_segment, place.at)

  def partial_result(k, v, k_chunk):
    return pair.forward(q, k, v, q_chunk, k_chunk, jnp.float32)

  def nothing(k, v, k_chunk):
    return jnp.zeros(q.shape, jnp.float32), jnp.full_like(lse, LOWEST)

  def one(carry, step):
    o, lse, k, v = carry
    after = place.pass_on((k, v))  # travels while this step computes
    k_chunk = place.keys_at(k_segment, step)
    o_part, lse_part = lax.cond(_meet(q_chunk, k_chunk), partial_result, nothing, k, v, k_chunk)
    top = jnp.maximum(lse, lse_part)
    old, new = jnp.exp(lse - top), jnp.exp(lse_part - top)
    share_old, share_new = (
      (x / (old + new)).transpose(0, 2, 1)[..., None] for x in (old, new)
    )  # [B, L, K, 1]
    return (o * share_old + o_part * share_new, top + jnp.log(old + new), *after), None

  B, L, K, _ = q.shape
  lse = jnp.full((B, K, L), LOWEST, jnp.float32)
  start = (jnp.zeros(q.shape, jnp.float32), lse, k, v)
  (o, lse, _, _), _ = lax.scan(one, start, jnp.arange(ring))
  return o.astype(q.dtype), lse


def _ring_fwd(pair, axis, ulysses, ring, q, k, v, q_segment, k_segment):
  o, lse = named(*_ring_forward(pair, axis, ulysses, ring, q, k, v, q_segment, k_segment))
  return o, (q, k, v, q_segment, k_segment, o, lse)


def _ring_bwd(pair, axis, ulysses, ring, residuals, do):
  q, k, v, q_segment, k_segment, o, lse = residuals
  place = _Place(axis, ulysses, ring, q.shape[1])
  q_chunk = place.chunk(q_segment, place.at)
  lse, delta = for_backward(o, lse, do, q_chunk)

  def partial_result(k, v, k_chunk):
    return pair.backward(q, k, v, q_chunk, k_chunk, do, lse, delta, jnp.float32)

  def nothing(k, v, k_chunk):
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))

  def one(carry, step):
    dq, k, v, dk, dv = carry
    after = place.pass_on((k, v))
    k_chunk = place.keys_at(k_segment, step)
    parts = lax.cond(_meet(q_chunk, k_chunk), partial_result, nothing, k, v, k_chunk)
    # The gradients of keys go round with their keys, and are home after the last step.
    dk, dv = place.pass_on((dk + parts[1], dv + parts[2]))
    return (dq + parts[0], *after, dk, dv), None

  start = (jnp.zeros(q.shape, jnp.float32), k, v, *(jnp.zeros(x.shape, jnp.float32) for x in (k, v)))
  (dq, _, _, dk, dv), _ = lax.scan(one, start, jnp.arange(ring))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_fwd, _ring_bwd)
