"""Pallas TPU kernels of packed attention over a list of live tiles: forward, dq, and dk with dv.

FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) with a grid of (heads, live tiles) whose
second bound is a traced number: a dead tile costs nothing, not even a grid step. Scores are held transposed,
keys by queries: the softmax statistics are then rows of lanes, reduced and broadcast along sublanes.

Shapes: q, do [K, T, S], k, v [K, U, S], segments [1, T] and [1, U], lse, delta [K, 1, T]; o and dq come out
as [K, S, T], where a small head costs no padding of lanes. `bk`, `bq` are the sizes of a tile.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sora_jax.nn import attention_tiles as tiles_lib

# Finite stand-ins for minus infinity. A masked score lies below the initial running maximum, hence
# exp2(score - maximum) is exactly 0 even for a query that has met no key yet.
_MASKED = -1e30
_LOWEST = -1e29
_LOG2_E = math.log2(math.e)
_NO_Q, _NO_K = -1, -2  # segments of padding, which match nothing


def _dot(a, b, contract):
  # fp32 inputs are asked for fp32 products: the MXU would round them to bf16.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(
    a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _scores(q, k, q_segment, k_segment, keys, masked):
  """[keys, bq] scores in base 2: the scale rides on the factor that exp2 wants anyway."""
  score = _dot(k[keys], q[...], (1, 1)) * (_LOG2_E / math.sqrt(q.shape[-1]))
  if masked:
    same = jnp.expand_dims(k_segment[0, keys], -1) == q_segment[...]
    score = jnp.where(same, score, _MASKED)
  return score


def _on_tile(tiles_ref, block_k, init, update, finish):
  """Runs what the flags of this tile ask for; inner tiles, where every pair is live, do no mask arithmetic.

  A tile is updated some keys at a time, so that scores stay small and programs short, and that of a tile on
  the border of a sample only the keys from the first to the last live ones are.
  """
  tile = tiles_ref[pl.program_id(1)]
  is_inner = tile & tiles_lib.INNER != 0
  size = tiles_lib.keys_at_once(block_k)

  def walk(start, stop, masked):
    def some_keys(i, _):
      update(pl.ds(pl.multiple_of(i * size, size), size), masked)
      return 0

    lax.fori_loop(start, stop, some_keys, 0)

  pl.when(tile & tiles_lib.FIRST != 0)(init)
  pl.when(is_inner)(lambda: walk(0, block_k // size, masked=False))
  pl.when(jnp.logical_not(is_inner))(lambda: walk(*tiles_lib.live_keys(tile, block_k), masked=True))
  pl.when(tile & tiles_lib.LAST != 0)(finish)


def _forward_kernel(tiles, q, k, v, q_segment, k_segment, o, lse, maximum, total, sum_):
  def init():
    maximum[...] = jnp.full_like(maximum, _LOWEST)
    total[...] = jnp.zeros_like(total)
    sum_[...] = jnp.zeros_like(sum_)

  def update(keys, masked):
    score = _scores(q, k, q_segment, k_segment, keys, masked)
    old = maximum[...]
    new = jnp.maximum(old, score.max(0, keepdims=True))
    p = jnp.exp2(score - new)
    shrink = jnp.exp2(old - new)
    maximum[...] = new
    total[...] = total[...] * shrink + p.sum(0, keepdims=True)
    sum_[...] = sum_[...] * shrink + _dot(v[keys], p.astype(v.dtype), (0, 0))

  def finish():
    live = total[...] > 0
    safe = jnp.where(live, total[...], 1.0)
    o[...] = jnp.where(live, sum_[...] / safe, 0.0).astype(o.dtype)
    lse[...] = jnp.where(live, (maximum[...] + jnp.log2(safe)) / _LOG2_E, _LOWEST)

  _on_tile(tiles, k.shape[0], init, update, finish)


def _dq_kernel(tiles, q, k, v, q_segment, k_segment, do, lse, delta, dq, sum_):
  def init():
    sum_[...] = jnp.zeros_like(sum_)

  def update(keys, masked):
    p = jnp.exp2(_scores(q, k, q_segment, k_segment, keys, masked) - lse[...] * _LOG2_E)
    ds = p * (_dot(v[keys], do[...], (1, 1)) - delta[...])
    sum_[...] += _dot(k[keys], ds.astype(k.dtype), (0, 0))

  def finish():
    dq[...] = (sum_[...] * (1 / math.sqrt(q.shape[-1]))).astype(dq.dtype)

  _on_tile(tiles, k.shape[0], init, update, finish)


def _dkv_kernel(tiles, q, k, v, q_segment, k_segment, do, lse, delta, dk, dv, dk_sum, dv_sum):
  def init():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  def update(keys, masked):
    p = jnp.exp2(_scores(q, k, q_segment, k_segment, keys, masked) - lse[...] * _LOG2_E)
    dv_sum[keys] += _dot(p.astype(do.dtype), do[...], (1, 0))
    ds = p * (_dot(v[keys], do[...], (1, 1)) - delta[...])
    dk_sum[keys] += _dot(ds.astype(q.dtype), q[...], (1, 0))

  def finish():
    dk[...] = (dk_sum[...] * (1 / math.sqrt(q.shape[-1]))).astype(dk.dtype)
    dv[...] = dv_sum[...].astype(dv.dtype)

  _on_tile(tiles, k.shape[0], init, update, finish)


_BACKWARD_INPUTS = ("q", "k", "k", "q_segment", "k_segment", "q", "row", "row")


def _specs(head, block_q, block_k, by_key):
  """Block specs: tokens of queries, tokens of keys, rows of queries, rows of keys, segments, S by queries."""
  q_of = tiles_lib.minor if by_key else tiles_lib.major
  k_of = tiles_lib.major if by_key else tiles_lib.minor
  return {
    "q": pl.BlockSpec((None, block_q, head), lambda h, i, tiles: (h, q_of(tiles[i]), 0)),
    "k": pl.BlockSpec((None, block_k, head), lambda h, i, tiles: (h, k_of(tiles[i]), 0)),
    "q_segment": pl.BlockSpec((1, block_q), lambda h, i, tiles: (0, q_of(tiles[i]))),
    "k_segment": pl.BlockSpec((1, block_k), lambda h, i, tiles: (0, k_of(tiles[i]))),
    "row": pl.BlockSpec((None, 1, block_q), lambda h, i, tiles: (h, 0, q_of(tiles[i]))),
    "q_across": pl.BlockSpec((None, head, block_q), lambda h, i, tiles: (h, 0, q_of(tiles[i]))),
  }


def _call(kernel, name, tiles, heads, in_specs, out_specs, out_shape, scratch, args, *, vmem, interpret):
  return pl.pallas_call(
    kernel,
    name=name,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(heads, tiles.count),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    ),
    interpret=interpret,
  )(tiles.tiles, *args)


def _lines(q_segment_T, k_segment_U):
  mark = lambda segment, value: jnp.where(segment == 0, value, segment)[None]  # noqa: E731
  return mark(q_segment_T, _NO_Q), mark(k_segment_U, _NO_K)


def forward(tiles, q, k, v, q_segment_T, k_segment_U, *, block_q, block_k, dtype, vmem, interpret):
  """(o [K, S, T] in `dtype`, lse [K, 1, T]); lse is -1e29 for queries without keys. `tiles` by queries."""
  K, T, S = q.shape
  spec = _specs(S, block_q, block_k, by_key=False)
  return _call(
    _forward_kernel,
    "packed_attention_forward",
    tiles,
    K,
    [spec["q"], spec["k"], spec["k"], spec["q_segment"], spec["k_segment"]],
    [spec["q_across"], spec["row"]],
    [jax.ShapeDtypeStruct((K, S, T), dtype), jax.ShapeDtypeStruct((K, 1, T), jnp.float32)],
    [(1, block_q), (1, block_q), (S, block_q)],
    (q, k, v, *_lines(q_segment_T, k_segment_U)),
    vmem=vmem,
    interpret=interpret,
  )


def backward_q(
  tiles, q, k, v, q_segment_T, k_segment_U, do, lse, delta, *, block_q, block_k, dtype, vmem, interpret
):
  """dq [K, S, T]; `tiles` by queries, `lse` finite for all queries."""
  K, T, S = q.shape
  spec = _specs(S, block_q, block_k, by_key=False)
  return _call(
    _dq_kernel,
    "packed_attention_dq",
    tiles,
    K,
    [spec[name] for name in _BACKWARD_INPUTS],
    spec["q_across"],
    jax.ShapeDtypeStruct((K, S, T), dtype),
    [(S, block_q)],
    (q, k, v, *_lines(q_segment_T, k_segment_U), do, lse, delta),
    vmem=vmem,
    interpret=interpret,
  )


def backward_kv(
  tiles, q, k, v, q_segment_T, k_segment_U, do, lse, delta, *, block_q, block_k, dtype, vmem, interpret
):
  """dk and dv [K, U, S]; `tiles` by keys."""
  K, U, S = k.shape
  spec = _specs(S, block_q, block_k, by_key=True)
  return _call(
    _dkv_kernel,
    "packed_attention_dkv",
    tiles,
    K,
    [spec[name] for name in _BACKWARD_INPUTS],
    [spec["k"], spec["k"]],
    [jax.ShapeDtypeStruct((K, U, S), dtype)] * 2,
    [(block_k, S), (block_k, S)],
    (q, k, v, *_lines(q_segment_T, k_segment_U), do, lse, delta),
    vmem=vmem,
    interpret=interpret,
  )
