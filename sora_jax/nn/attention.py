"""The one entry to attention: picks a backend, and lays the work out on the mesh.

On a mesh of several devices, as set by `jax.set_mesh` around the call or around the jitted function,
attention runs inside `jax.shard_map`: rows split over (replica, fsdp), heads over (tensor, context), all
tokens of a row on one device. Activations that come in with their tokens split over context are exchanged by
an all-to-all before and after (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509), and no loop of a
backend ever meets split tokens. Axes that do not divide the rows or heads repeat the work instead. Without a
mesh in force nothing is wrapped, so a program over several devices must set one.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sora_jax.nn.attention_chunked import attend_chunked
from sora_jax.nn.attention_dense import attend_dense
from sora_jax.types import Array

BACKENDS = ("auto", "dense", "chunked")
ROW_AXES = ("replica", "fsdp")
# Tensor first: heads that tensor parallelism has split already then move within a context group only.
HEAD_AXES = ("tensor", "context")
# Longest row, in tokens, that "auto" gives to the dense backend. On 2 CPU cores (6 heads of 64, fp32, forward
# and backward) dense takes 0.7 of the time of chunked at 128 tokens, 1.0 to 1.3 at 256 and, with four samples
# a row, 3 at 1,024: its scores leave the cache. Elsewhere chunked walks blocks in sequence, which starves a
# wide device; not measured yet.
DENSE_UP_TO = {"cpu": 192}
DENSE_UP_TO_ELSEWHERE = 1024


def attend(
  q_BLKS: Array,
  k_BMKS: Array,
  v_BMKS: Array,
  q_segment_BL: Array,
  k_segment_BM: Array,
  *,
  backend: str = "auto",
) -> Array:
  """softmax(q k / sqrt(S)) v over the keys of the query's own segment, softmax in fp32.

  Segment 0 is padding. A query without keys, padding included, yields exactly 0 and has no gradient. Segments
  are contiguous runs in ascending order with padding last; another order is right, but skips less.
  """
  if backend not in BACKENDS:
    raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
  if backend == "auto":
    limit = DENSE_UP_TO.get(jax.default_backend(), DENSE_UP_TO_ELSEWHERE)
    backend = "dense" if max(q_BLKS.shape[1], k_BMKS.shape[1]) <= limit else "chunked"
  run = attend_dense if backend == "dense" else attend_chunked
  mesh = jax.sharding.get_abstract_mesh()
  # Axes that are manual already belong to a shard_map around this call.
  axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
  free = {axis: size for axis, size, kind in axes if kind == AxisType.Auto}
  if math.prod(free.values()) > 1:
    rows = _dividing(q_BLKS.shape[0], ROW_AXES, free)
    heads = _dividing(q_BLKS.shape[2], HEAD_AXES, free)
    x, segment = P(rows, None, heads, None), P(rows, None)
    q_BLKS, k_BMKS, v_BMKS = (_split_by_tokens(x, rows, heads, free) for x in (q_BLKS, k_BMKS, v_BMKS))
    # check_vma: loop carries start as constants, which that check takes for a mismatch.
    run = jax.shard_map(
      run, in_specs=(x, x, x, segment, segment), out_specs=x, axis_names=set(free), check_vma=False
    )
  return run(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM)


def _split_by_tokens(
  x_BLKS: Array, rows: tuple[str, ...], heads: tuple[str, ...], free: dict[str, int]
) -> Array:
  """The layout before the exchange, said of each operand lest the product that made q, k and v be split over
  context by columns: its thirds do not lie where heads do, and cost 6 times the bytes of the exchange.
  """
  context = "context" if x_BLKS.shape[1] % free.get("context", 1) == 0 and "context" in free else None
  return jax.lax.with_sharding_constraint(x_BLKS, P(rows, context, "tensor" if "tensor" in heads else None))


def _dividing(size: int, axes: tuple[str, ...], free: dict[str, int]) -> tuple[str, ...]:
  """The leading `axes` whose sizes together divide `size`, skipping those that would not."""
  taken = ()
  for axis in axes:
    if axis in free and size % math.prod(free[a] for a in (*taken, axis)) == 0:
      taken += (axis,)
  return taken
