"""The one entry to attention: picks a backend, and lays the work out on the mesh.

On a mesh of several devices, as set by `jax.set_mesh` around the call or around the jitted function,
attention runs inside `jax.shard_map`, rows split over (replica, fsdp) and heads over tensor. Where tokens
are split over context, a layout is picked by what divides:

  keys that are fewer than queries (text): queries stay where they are, every device has all keys;
  heads that divide over context: an all-to-all before and after, each device then has whole rows of some
    heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509);
  fewer heads than that: a ring of such groups (attention_context.py).

Axes that divide neither rows, heads nor tokens repeat the work. Without a mesh in force nothing is wrapped,
so a program over several devices must set one.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P

from sora_jax.nn import attention_context, attention_gpu, layout
from sora_jax.nn.attention_chunked import ON_ACCELERATORS, chunked
from sora_jax.nn.attention_dense import DENSE, attend_dense
from sora_jax.nn.attention_pair import Pair, attend_with
from sora_jax.nn.attention_tpu import tpu
from sora_jax.parallel.mesh import ROW_AXES
from sora_jax.types import Array

BACKENDS = ("auto", "dense", "chunked", "tpu", "gpu")
# Longest row, in tokens, that "auto" gives to the dense backend. On 2 CPU cores (6 heads of 64, fp32, forward
# and backward) dense takes 0.7 of the time of chunked at 128 tokens, 1.0 to 1.3 at 256 and, with four samples
# a row, 3 at 1,024: its scores leave the cache.
DENSE_UP_TO = 192
# On a GPU chunked walks blocks in sequence, which starves it; not measured yet.
DENSE_UP_TO_ON_GPU = 1024


def attend(
  q_BLKS: Array,
  k_BMKS: Array,
  v_BMKS: Array,
  q_segment_BL: Array,
  k_segment_BM: Array,
  *,
  backend: str = "auto",
  num_segments: int = 0,
) -> Array:
  """softmax(q k / sqrt(S)) v over the keys of the query's own segment, softmax in fp32.

  Segment 0 is padding. A query without keys, padding included, yields exactly 0 and has no gradient. Segments
  are contiguous runs in ascending order with padding last; another order is right, but skips less, and does
  not suit cuDNN, which is used only where `num_segments`, the most samples of a row, is given.
  """
  if backend not in BACKENDS:
    raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
  args = (q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM)
  run, pair = _backend(backend, q_BLKS, k_BMKS, num_segments)
  free = layout.free_axes()
  if math.prod(free.values()) > 1:
    run, in_specs, out_spec = _layout(run, pair, q_BLKS.shape, k_BMKS.shape[1], free)
    args = (*(_by_tokens(x, in_specs[0], free) for x in args[:3]), *args[3:])
    # check_vma: loop carries start as constants, which that check takes for a mismatch.
    run = jax.shard_map(run, in_specs=in_specs, out_specs=out_spec, axis_names=set(free), check_vma=False)
    return _by_tokens(run(*args), out_spec, free)
  return run(*args)


def _backend(backend: str, q_BLKS: Array, k_BMKS: Array, num_segments: int):
  """(the function of a backend, the pair that a ring can be made of)"""
  longest = max(q_BLKS.shape[1], k_BMKS.shape[1])
  if backend == "dense" or (backend == "auto" and longest <= DENSE_UP_TO):
    return attend_dense, DENSE
  if backend in ("auto", "gpu") and not attention_gpu.refusal(q_BLKS.dtype, q_BLKS.shape[-1], num_segments):
    return functools.partial(attention_gpu.attend_cudnn, num_segments=num_segments), chunked(*ON_ACCELERATORS)
  pair = tpu() if backend == "tpu" else chunked()
  if backend == "auto":
    pair = _by_platform(longest <= DENSE_UP_TO_ON_GPU)
  return functools.partial(attend_with, pair), pair


@functools.cache
def _by_platform(short: bool) -> Pair:
  """Picks when the program is lowered: what compiles ahead of time for a TPU on a CPU is then the kernel."""

  def pick(method):
    choices = {
      "tpu": getattr(tpu(everywhere=False), method),
      "cuda": getattr(DENSE if short else chunked(*ON_ACCELERATORS), method),
      "default": getattr(chunked(), method),
    }

    def run(*args):
      *arrays, dtype = args
      return jax.lax.platform_dependent(
        *arrays, **{name: functools.partial(_with_dtype, f, dtype) for name, f in choices.items()}
      )

    return run

  return Pair(pick("forward"), pick("backward"))


def _with_dtype(run, dtype, *args):
  return run(*args, dtype)


def _layout(run, pair: Pair, shape, num_keys: int, free: dict[str, int]):
  """(function of a shard, specs of its arguments, spec of its result)"""
  rows, tensor = layout.dividing(shape[0], ROW_AXES, free), layout.dividing(shape[2], ("tensor",), free)
  tokens, context = shape[1], free.get("context", 1)
  heads = shape[2] // math.prod(free[axis] for axis in tensor)
  spread, whole, segment = P(rows, "context", tensor, None), P(rows, None, tensor, None), P(rows, None)
  if context > 1 and tokens % context == 0:
    if num_keys < tokens:
      return run, (spread, whole, whole, P(rows, "context"), segment), spread
    if heads % context and num_keys == tokens:
      ulysses, ring = attention_context.split(context, heads)
      run = functools.partial(attention_context.attend_ring, pair, "context", ulysses, ring)
      return run, (spread, spread, spread, segment, segment), spread
  # Tensor first: heads that tensor parallelism has split already then move within a context group only.
  x = P(rows, None, layout.dividing(shape[2], ("tensor", "context"), free), None)
  return run, (x, x, x, segment, segment), x


def _by_tokens(x_BLKS: Array, spec: P, free: dict[str, int]) -> Array:
  """Says of q, k, v and the result that outside the exchange for heads their tokens are split over context.

  Else the partitioner splits the product that made q, k and v over context by its columns; their thirds do
  not lie where the heads do, and moving them there costs six times the bytes of the exchange. The result it
  multiplies as it lies, by heads, and sums whole rows over context: eight times the bytes.
  """
  rows, _, heads, _ = spec
  if "context" not in (heads or ()) or free["context"] == 1 or x_BLKS.shape[1] % free["context"]:
    return x_BLKS
  kept = tuple(axis for axis in heads if axis != "context")
  return jax.lax.with_sharding_constraint(x_BLKS, P(rows, "context", kept, None))
