"""Backend "gpu": cuDNN's fused attention over packed samples (its ragged, or THD, layout).

jax has it in a private module only, so every use of it stands behind `refusal`: the module must be there, the
default backend must be a Hopper or later GPU, and a small packed case must come out as the reference does,
forward and backward. Where anything is missing the chunked backend runs instead.

cuDNN wants samples as contiguous runs in ascending order, as `packing` lays them out, and how many there may
be. Its statistics have no name for a remat policy to save: under remat it runs forward a second time.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.nn.attention_dense import attend_dense
from sora_jax.types import PADDING, Array

try:
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:
  cudnn = None

MIN_CUDNN = 90600  # packed layout
MIN_CAPABILITY = (9, 0)
DTYPES = ("bfloat16", "float16")
_TOLERANCE = 0.05  # of the trial, in bfloat16


def offsets(q_segment_BL: Array, k_segment_BM: Array, num_segments: int) -> tuple[Array, Array, Array, Array]:
  """(lengths of queries, of keys, first queries, first keys) of every segment as cuDNN wants them.

  Lengths are [B, N], firsts [B, N + 1], where N is at least 2: one segment would mean another layout.
  Entries of segments without a query or without a key are -1, wherever they stand.
  """
  numbers = jnp.arange(1, max(num_segments, 2) + 1, dtype=jnp.int32)

  def lengths_and_firsts(segment):
    lengths = (segment[:, None, :] == numbers[:, None]).sum(-1, dtype=jnp.int32)
    return lengths, jnp.cumsum(lengths, axis=1) - lengths

  (q_lengths, q_firsts), (k_lengths, k_firsts) = map(lengths_and_firsts, (q_segment_BL, k_segment_BM))
  live = (q_lengths > 0) & (k_lengths > 0)
  lengths = [jnp.where(live, x, -1) for x in (q_lengths, k_lengths)]
  firsts = [
    jnp.pad(jnp.where(live, x, -1), ((0, 0), (0, 1)), constant_values=-1) for x in (q_firsts, k_firsts)
  ]
  return *lengths, *firsts


def attend_cudnn(
  q_BLKS: Array, k_BMKS: Array, v_BMKS: Array, q_segment_BL: Array, k_segment_BM: Array, *, num_segments: int
) -> Array:
  """Attention within segments 1..num_segments; only where `refusal` is None."""
  q_lengths, k_lengths, q_firsts, k_firsts = offsets(q_segment_BL, k_segment_BM, num_segments)
  # A segment without keys is left out above, so nothing is written for its queries.
  number = jnp.arange(1, q_lengths.shape[1] + 1, dtype=jnp.int32)
  one_hot_BLN = q_segment_BL[..., None] == number
  live_BL = (one_hot_BLN & (q_lengths > 0)[:, None]).any(-1)[..., None, None]
  k_live_BM = (k_segment_BM != PADDING)[..., None, None]
  o_BLKS = cudnn.dot_product_attention(
    jnp.where(live_BL, q_BLKS, 0),
    jnp.where(k_live_BM, k_BMKS, 0),
    jnp.where(k_live_BM, v_BMKS, 0),
    q_seqlen=q_lengths,
    kv_seqlen=k_lengths,
    q_offsets=q_firsts,
    kv_offsets=k_firsts,
    scale=1 / math.sqrt(q_BLKS.shape[-1]),
    mask_type=cudnn.MaskType.NO_MASK,
    qkv_layout="BTNH",
  )
  return jnp.where(live_BL, o_BLKS, 0)


def refusal(dtype, head: int, num_segments: int) -> str | None:
  """Why cuDNN's packed attention is not used; None where it may be."""
  if num_segments < 1:
    return "the number of samples in a row is not given"
  if str(jnp.dtype(dtype)) not in DTYPES:
    return f"it takes {' or '.join(DTYPES)}, not {jnp.dtype(dtype)}"
  if head % 8 or head > 256:
    return f"heads of {head} are no multiple of 8 up to 256"
  return _refusal_of_device()


@functools.cache
def _refusal_of_device() -> str | None:
  if cudnn is None:
    return "this jax has no jax._src.cudnn.fused_attention_stablehlo"
  if jax.default_backend() != "gpu":
    return f"the default backend is {jax.default_backend()}, not gpu"
  try:
    device = jax.local_devices()[0]
    capability = tuple(int(part) for part in str(device.compute_capability).split("."))
    if capability < MIN_CAPABILITY:
      return f"compute capability {device.compute_capability} is below 9.0"
    if (version := cudnn.check_cudnn_version()) < MIN_CUDNN:
      return f"cuDNN {version} is below {MIN_CUDNN}"
    # The caller may be tracing: the trial runs beside it.
    with jax.ensure_compile_time_eval(), jax.default_device(device):
      return trial(attend_cudnn)
  except Exception as error:  # a private module may fail in any way; the chunked backend always works
    return f"trying it failed: {type(error).__name__}: {error}"


def trial(attend) -> str | None:
  """Whether two small rows come out as the reference does, value and gradients; None if so."""
  rng = np.random.default_rng(0)
  segment = np.zeros((2, 256), np.int32)
  segment[0, :200] = np.repeat([1, 2, 3], [70, 1, 129])
  segment[1, :] = 1
  q, k, v, w = (jnp.asarray(rng.normal(size=(2, 256, 2, 64)), jnp.bfloat16) for _ in range(4))

  def value_and_grads(run, *x):
    def total(q, k, v):
      o = run(q, k, v, segment, segment)
      return (o.astype(jnp.float32) * w.astype(jnp.float32)).sum(), o

    grads, o = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*x)
    return o, *grads

  want = value_and_grads(attend_dense, *(x.astype(jnp.float32) for x in (q, k, v)))
  got = value_and_grads(functools.partial(attend, num_segments=3), q, k, v)
  for name, a, b in zip(("o", "dq", "dk", "dv"), got, want):
    error = float(jnp.abs(a.astype(jnp.float32) - b).max())
    if not error <= _TOLERANCE * max(float(jnp.abs(b).max()), 1.0):
      return f"its {name} differs from the reference by {error:.3g} in a trial"
  return None
