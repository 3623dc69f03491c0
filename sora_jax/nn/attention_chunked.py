"""Chunked, segment-skipping attention in plain XLA, with its own backward pass. Runs on any device.

Samples are contiguous runs of a row, so the queries of one block need one contiguous range of keys. Each
query block walks that range in chunks with an online softmax (Milakov and Gimelshein 2018; Rabe and Staats
2021, arXiv:2112.05682; the backward pass is that of Dao et al. 2022, arXiv:2205.14135). Keys outside the
range are never read, so the cost is that of the live tiles and memory is linear in the row length.

Rows are walked one after another, not vmapped: under vmap every row would run as many chunks as the longest.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.nn.attention_pair import LOWEST, Pair, attend_with
from sora_jax.types import PADDING, Array

# Over tiles of 256 x 512, on 2 idle CPU cores (6 heads of 64, fp32, forward and backward, taking turns):
# 8 samples in 2,048 tokens take 0.60 of the time at 256 x 256, 0.83 at 512 x 256; 2 samples there, and 2 or 8
# in 8,192 tokens, 1.09 and 0.82. Longer rows mostly hold longer samples.
BLOCK_Q, BLOCK_K = 256, 256
LONG, LONG_BLOCK_Q = 2048, 512
ON_ACCELERATORS = (256, 512)  # not measured
# A finite stand-in for minus infinity, below the initial running maximum LOWEST: exp(score - maximum) is
# exactly 0 even for a query that has met no key yet.
_MASKED = -1e30


def key_ranges(q_segment_BL: Array, k_segment_BM: Array, block_q: int) -> tuple[Array, Array]:
  """First key that each query block needs and the number of keys from there, int32 [B, blocks]; 0 if none.

  Exact for segments in order, and still a superset of what is needed for any other order.
  """
  B, L = q_segment_BL.shape
  last = jnp.iinfo(jnp.int32).max
  blocks = _pad(q_segment_BL, -L % block_q).reshape(B, -1, block_q)
  lowest = jnp.where(blocks == PADDING, last, blocks).min(-1)
  highest = blocks.max(-1)
  # Both bounds ascend, whatever the order of the segments: that is what the binary searches need.
  upper_BM = lax.cummax(k_segment_BM, axis=1)
  lower_BM = lax.cummin(jnp.where(k_segment_BM == PADDING, last, k_segment_BM), axis=1, reverse=True)
  first = jax.vmap(functools.partial(jnp.searchsorted, side="left"))(upper_BM, lowest)
  stop = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(lower_BM, highest)
  length = jnp.where(highest == PADDING, 0, jnp.maximum(stop - first, 0))
  return first.astype(jnp.int32), length.astype(jnp.int32)


def num_tiles(q_segment_BL: Array, k_segment_BM: Array, *, block_q: int, block_k: int) -> Array:
  """Live tiles of a batch: what attend_chunked computes, of ceil(L / block_q) * ceil(M / block_k) per row."""
  _, length = key_ranges(q_segment_BL, k_segment_BM, block_q)
  return ((length + block_k - 1) // block_k).sum()


def attend_chunked(
  q_BLKS: Array,
  k_BMKS: Array,
  v_BMKS: Array,
  q_segment_BL: Array,
  k_segment_BM: Array,
  *,
  block_q: int = 0,
  block_k: int = BLOCK_K,
) -> Array:
  """Attention within segments; a query without keys (padding included) yields 0 and has no gradient."""
  return attend_with(chunked(block_q, block_k), q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM)


@functools.cache
def chunked(block_q: int = 0, block_k: int = BLOCK_K) -> Pair:
  """The backend at a size of tile, the same object for the same; 0 queries = by the length of the row."""
  sizes = {"block_q": block_q, "block_k": block_k}
  return Pair(functools.partial(_forward, **sizes), functools.partial(_backward, **sizes))


def standard_block_q(tokens: int) -> int:
  """Of a row of so many."""
  return BLOCK_Q if tokens <= LONG else LONG_BLOCK_Q


def _clip(q_BLKS, k_BMKS, block_q, block_k):
  block_q = block_q or standard_block_q(q_BLKS.shape[1])
  return min(block_q, _round_up(q_BLKS.shape[1], 8)), min(block_k, _round_up(k_BMKS.shape[1], 8))


def _forward(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, dtype, *, block_q, block_k):
  B, L, K, S = q_BLKS.shape
  block_q, block_k = _clip(q_BLKS, k_BMKS, block_q, block_k)
  q = _heads_first(q_BLKS, q_segment_BL, -L % block_q)
  k_pad = _key_padding(k_BMKS.shape[1], block_k)
  k, v = (_heads_first(x, k_segment_BM, k_pad) for x in (k_BMKS, v_BMKS))
  q_segment, k_segment = _pad(q_segment_BL, -L % block_q), _pad(k_segment_BM, k_pad)
  first, length = _ranges(q_segment_BL, k_segment_BM, block_q, block_k)

  def query_block(_, tile):
    row, start, first_key, num_keys = tile
    q_KqS = _slice_tokens(q, row, start, block_q)
    segment_q = _slice_segment(q_segment, row, start, block_q)

    def chunk(j, carry):
      maximum_Kq, total_Kq, o_KqS = carry
      at = first_key + j * block_k
      k_KkS, v_KkS = (_slice_tokens(x, row, at, block_k) for x in (k, v))
      score_Kqk = _scores(q_KqS, k_KkS, segment_q, _slice_segment(k_segment, row, at, block_k))
      new_maximum_Kq = jnp.maximum(maximum_Kq, score_Kqk.max(-1))
      p_Kqk = jnp.exp(score_Kqk - new_maximum_Kq[..., None])
      shrink_Kq = jnp.exp(maximum_Kq - new_maximum_Kq)
      o_KqS = o_KqS * shrink_Kq[..., None] + _dot("Kqk,KkS->KqS", p_Kqk.astype(v.dtype), v_KkS)
      return new_maximum_Kq, total_Kq * shrink_Kq + p_Kqk.sum(-1), o_KqS

    # Softmax statistics and sums in fp32: they run over the whole sample.
    start_carry = (
      jnp.full((K, block_q), LOWEST, jnp.float32),
      jnp.zeros((K, block_q), jnp.float32),
      jnp.zeros((K, block_q, S), jnp.float32),
    )
    maximum, total, o = lax.fori_loop(0, (num_keys + block_k - 1) // block_k, chunk, start_carry)
    live = total > 0
    safe_total = jnp.where(live, total, 1.0)
    o = jnp.where(live[..., None], o / safe_total[..., None], 0.0)
    lse = jnp.where(live, maximum + jnp.log(safe_total), LOWEST)
    return None, (o.astype(dtype), lse)

  _, (o, lse) = lax.scan(query_block, None, _tile_list(first, length, block_q))
  lse_BKL = lse.reshape(B, -1, K, block_q).transpose(0, 2, 1, 3).reshape(B, K, -1)[..., :L]
  return _tokens_first(o, B, L), lse_BKL


def _backward(
  q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, do_BLKS, lse_BKL, delta_BKL, dtype, *, block_q, block_k
):
  B, L, K, S = q_BLKS.shape
  M = k_BMKS.shape[1]
  block_q, block_k = _clip(q_BLKS, k_BMKS, block_q, block_k)
  q, do = (_heads_first(x, q_segment_BL, -L % block_q) for x in (q_BLKS, do_BLKS))
  lse_BKL, delta_BKL = (jnp.pad(x, ((0, 0), (0, 0), (0, -L % block_q))) for x in (lse_BKL, delta_BKL))
  k_pad = _key_padding(k_BMKS.shape[1], block_k)
  k, v = (_heads_first(x, k_segment_BM, k_pad) for x in (k_BMKS, v_BMKS))
  q_segment, k_segment = _pad(q_segment_BL, -L % block_q), _pad(k_segment_BM, k_pad)
  first, length = _ranges(q_segment_BL, k_segment_BM, block_q, block_k)

  def query_block(carry, tile):
    row, start, first_key, num_keys = tile
    q_KqS, do_KqS = (_slice_tokens(x, row, start, block_q) for x in (q, do))
    of_block = functools.partial(
      lax.dynamic_slice, start_indices=(row, 0, start), slice_sizes=(1, K, block_q)
    )
    lse_Kq, delta_Kq = of_block(lse_BKL)[0], of_block(delta_BKL)[0]
    segment_q = _slice_segment(q_segment, row, start, block_q)

    def chunk(j, carry):
      dq_KqS, dk, dv = carry
      at = first_key + j * block_k
      k_KkS, v_KkS = (_slice_tokens(x, row, at, block_k) for x in (k, v))
      score_Kqk = _scores(q_KqS, k_KkS, segment_q, _slice_segment(k_segment, row, at, block_k))
      p_Kqk = jnp.exp(score_Kqk - lse_Kq[..., None])
      dp_Kqk = _dot("KqS,KkS->Kqk", do_KqS, v_KkS)
      ds_Kqk = (p_Kqk * (dp_Kqk - delta_Kq[..., None]) * (1 / math.sqrt(S))).astype(q.dtype)
      dv = _add_tokens(dv, row, at, _dot("Kqk,KqS->KkS", p_Kqk.astype(do.dtype), do_KqS))
      dk = _add_tokens(dk, row, at, _dot("Kqk,KqS->KkS", ds_Kqk, q_KqS))
      return dq_KqS + _dot("Kqk,KkS->KqS", ds_Kqk, k_KkS), dk, dv

    dq0 = jnp.zeros((K, block_q, S), jnp.float32)
    dq, dk, dv = lax.fori_loop(0, (num_keys + block_k - 1) // block_k, chunk, (dq0, *carry))
    return (dk, dv), dq.astype(dtype)

  # Sums over query blocks: fp32 so that bf16 inputs lose nothing on the way.
  zeros = jnp.zeros((B, K, M + k_pad, S), jnp.float32)
  (dk, dv), dq = lax.scan(query_block, (zeros, zeros), _tile_list(first, length, block_q))
  dk, dv = (x[:, :, :M].transpose(0, 2, 1, 3).astype(dtype) for x in (dk, dv))
  return _tokens_first(dq, B, L), dk, dv


def _key_padding(num_keys, block_k):
  """A chunk may start at any key, so one chunk of padding follows; none where one chunk holds all keys."""
  return block_k if num_keys > block_k else block_k - num_keys


def _ranges(q_segment_BL, k_segment_BM, block_q, block_k):
  """key_ranges, or all keys for every block that needs any where one chunk holds them."""
  first, length = key_ranges(q_segment_BL, k_segment_BM, block_q)
  num_keys = k_segment_BM.shape[1]
  if num_keys > block_k:
    return first, length
  return jnp.zeros_like(first), jnp.where(length > 0, num_keys, 0)


def _scores(q_KqS, k_KkS, segment_q, segment_k):
  live_qk = (segment_q[:, None] == segment_k[None, :]) & (segment_q != PADDING)[:, None]
  score_Kqk = _dot("KqS,KkS->Kqk", q_KqS, k_KkS) * (1 / math.sqrt(q_KqS.shape[-1]))
  return jnp.where(live_qk, score_Kqk, _MASKED)


def _dot(pattern, a, b):
  return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def _tile_list(first, length, block_q):
  B, num_blocks = first.shape
  row = jnp.repeat(jnp.arange(B, dtype=jnp.int32), num_blocks)
  start = jnp.tile(jnp.arange(num_blocks, dtype=jnp.int32) * block_q, B)
  return row, start, first.reshape(-1), length.reshape(-1)


def _heads_first(x_BLKS, segment_BL, pad):
  """[B, K, L + pad, S], with zeros for padding tokens: 0 * NaN there would reach the samples beside them."""
  x_BLKS = jnp.where((segment_BL != PADDING)[..., None, None], x_BLKS, 0)
  return jnp.pad(x_BLKS.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, pad), (0, 0)))


def _tokens_first(x_wKqS, rows, tokens):
  """Blocks in the order of the tile list -> [B, L, K, S]."""
  _, K, block, S = x_wKqS.shape
  return x_wKqS.reshape(rows, -1, K, block, S).transpose(0, 1, 3, 2, 4).reshape(rows, -1, K, S)[:, :tokens]


def _pad(segment_BL, pad):
  return jnp.pad(segment_BL, ((0, 0), (0, pad)), constant_values=PADDING)


def _slice_tokens(x_BKLS, row, start, size):
  _, K, _, S = x_BKLS.shape
  return lax.dynamic_slice(x_BKLS, (row, 0, start, 0), (1, K, size, S))[0]


def _slice_segment(segment_BL, row, start, size):
  return lax.dynamic_slice(segment_BL, (row, start), (1, size))[0]


def _add_tokens(x_BKLS, row, start, update_KkS):
  _, K, _, S = x_BKLS.shape
  old = lax.dynamic_slice(x_BKLS, (row, 0, start, 0), (1, *update_KkS.shape))
  return lax.dynamic_update_slice(x_BKLS, old + update_KkS[None], (row, 0, start, 0))


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
