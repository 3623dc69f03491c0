"""Backend "tpu": packed attention by Pallas kernels over the live tiles; interpreted on other platforms.

Which of the two is decided when the program is lowered, not when it is traced, so that a program compiled
ahead of time for a TPU topology on a machine without one holds the kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sora_jax.nn import attention_tiles as tiles_lib
from sora_jax.nn import attention_tpu_kernels as kernels
from sora_jax.nn.attention_chunked import ON_ACCELERATORS, chunked
from sora_jax.nn.attention_pair import LOWEST, Pair
from sora_jax.types import PADDING

# The list lies in the 1 MiB of SMEM of a core, with what the pipeline needs besides.
MAX_TILES = 2**17


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Largest tile, and the VMEM that a kernel may take: three fp32 tiles of scores are its bulk."""

  q: int
  k: int
  vmem_mib: int


# Start of device_kind -> tile. From VMEM, from the arithmetic of a tile against about 0.35 us for a step of
# the grid, and from what larger tiles waste at the borders of samples; not tuned on a device yet.
BLOCKS = (
  ("TPU v6 lite", Blocks(1024, 1024, 96)),
  ("TPU v5 lite", Blocks(512, 1024, 96)),
  ("TPU v5", Blocks(1024, 1024, 48)),
  ("TPU7", Blocks(1024, 1024, 48)),
  ("TPU v4", Blocks(512, 512, 14)),
)
DEFAULT = Blocks(1024, 1024, 48)


def blocks_for(device_kind: str | None = None) -> Blocks:
  """Tile sizes of a kind of device; by default that of the mesh in force, else of the first device."""
  if device_kind is None:
    device = jax.sharding.get_abstract_mesh().abstract_device
    device_kind = device.device_kind if device else jax.devices()[0].device_kind
  return next((blocks for kind, blocks in BLOCKS if device_kind.startswith(kind)), DEFAULT)


def _sizes(q_BLKS, k_BMKS, blocks: Blocks | None) -> tuple[Blocks, int]:
  """Tiles clipped to the lines of tokens, and the static length of their list."""
  (B, L), M = q_BLKS.shape[:2], k_BMKS.shape[1]
  blocks = blocks or blocks_for()
  q, k = tiles_lib.block_size(B * L, blocks.q), tiles_lib.block_size(B * M, blocks.k)
  return Blocks(q, k, blocks.vmem_mib), tiles_lib.most_tiles(B, L, M, q, k)


def _line(x_BLKS, segment_BL, block):
  """[K, B * L and padding, S], with zeros for padding tokens: 0 * NaN there would reach those beside them."""
  B, L, K, S = x_BLKS.shape
  x = jnp.where((segment_BL != PADDING)[..., None, None], x_BLKS, 0).reshape(B * L, K, S).transpose(1, 0, 2)
  return jnp.pad(x, ((0, 0), (0, -B * L % block), (0, 0)))


def _pad(x, block):
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])


def _written(x, live_major, block, axis):
  """Zeros for the blocks that no tile belongs to: nothing was written there."""
  live = jnp.repeat(live_major, block).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
  return jnp.where(live, x, jnp.zeros((), x.dtype))


def _segments(q_segment_BL, k_segment_BM, blocks):
  q, k = tiles_lib.unique_segments(q_segment_BL, k_segment_BM)
  return _pad(q, blocks.q), _pad(k, blocks.k)


def _forward_kernels(q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, *, dtype, blocks, most, interpret):
  B, L, K, S = q_BLKS.shape
  segments = _segments(q_segment_BL, k_segment_BM, blocks)
  tiles = tiles_lib.tile_list(*segments, blocks.q, blocks.k, most, by_key=False)
  o, lse = kernels.forward(
    tiles,
    _line(q_BLKS, q_segment_BL, blocks.q),
    *(_line(x, k_segment_BM, blocks.k) for x in (k_BMKS, v_BMKS)),
    *segments,
    block_q=blocks.q,
    block_k=blocks.k,
    dtype=dtype,
    vmem=blocks.vmem_mib * 2**20,
    interpret=interpret,
  )
  o = _written(o, tiles.live_major, blocks.q, 2)[:, :, : B * L].reshape(K, S, B, L).transpose(2, 3, 0, 1)
  live = jnp.repeat(tiles.live_major, blocks.q)
  lse = jnp.where(live, lse, LOWEST)[:, 0, : B * L].reshape(K, B, L).transpose(1, 0, 2)
  return o, lse


def _backward_kernels(
  q_BLKS, k_BMKS, v_BMKS, q_segment_BL, k_segment_BM, do_BLKS, lse_BKL, delta_BKL,
  *, dtype, blocks, most, interpret,
):  # fmt: skip
  B, L, K, S = q_BLKS.shape
  M = k_BMKS.shape[1]
  segments = _segments(q_segment_BL, k_segment_BM, blocks)
  rows = (_pad(x.transpose(1, 0, 2).reshape(K, 1, B * L), blocks.q) for x in (lse_BKL, delta_BKL))
  args = (
    _line(q_BLKS, q_segment_BL, blocks.q),
    *(_line(x, k_segment_BM, blocks.k) for x in (k_BMKS, v_BMKS)),
    *segments,
    _line(do_BLKS, q_segment_BL, blocks.q),
    *rows,
  )
  how = {
    "block_q": blocks.q, "block_k": blocks.k, "dtype": dtype, "vmem": blocks.vmem_mib * 2**20,
    "interpret": interpret,
  }  # fmt: skip
  by_query = tiles_lib.tile_list(*segments, blocks.q, blocks.k, most, by_key=False)
  dq = _written(kernels.backward_q(by_query, *args, **how), by_query.live_major, blocks.q, 2)
  by_key = tiles_lib.tile_list(*segments, blocks.q, blocks.k, most, by_key=True)
  dk, dv = (
    _written(x, by_key.live_major, blocks.k, 1)[:, : B * M].transpose(1, 0, 2).reshape(B, M, K, S)
    for x in kernels.backward_kv(by_key, *args, **how)
  )
  return dq[:, :, : B * L].reshape(K, S, B, L).transpose(2, 3, 0, 1), dk, dv


def _run(kernel, fallback, args, *, dtype, blocks, max_tiles, everywhere):
  blocks, most = _sizes(args[0], args[1], blocks)
  run = functools.partial(kernel, dtype=dtype, blocks=blocks)

  def listed(room, interpret, *args):
    """The kernel where the list of all tiles fits; else where that of the live ones does."""
    if most <= room:
      return run(*args, most=most, interpret=interpret)
    count = tiles_lib.count_live_in_line(*_segments(*args[3:5], blocks), blocks.q, blocks.k)
    on_list = functools.partial(run, most=room, interpret=interpret)
    return jax.lax.cond(count <= room, on_list, lambda *x: fallback(*x, dtype), *args)

  on_tpu = functools.partial(listed, max_tiles or MAX_TILES, False)
  if not everywhere:
    return on_tpu(*args)
  elsewhere = functools.partial(listed, max_tiles or most, True)
  return jax.lax.platform_dependent(*args, tpu=on_tpu, default=elsewhere)


@functools.cache
def tpu(blocks: Blocks | None = None, max_tiles: int | None = None, *, everywhere: bool = True) -> Pair:
  """The backend, at the tile of the device or at a given one (multiples of 128).

  Not `everywhere`: for programs lowered for a TPU alone.
  """
  assert blocks is None or not (blocks.q % 128 or blocks.k % 128)
  how = {"blocks": blocks, "max_tiles": max_tiles, "everywhere": everywhere}
  fallback = chunked(*ON_ACCELERATORS)

  def forward(q, k, v, q_segment, k_segment, dtype):
    return _run(_forward_kernels, fallback.forward, (q, k, v, q_segment, k_segment), dtype=dtype, **how)

  def backward(q, k, v, q_segment, k_segment, do, lse, delta, dtype):
    args = (q, k, v, q_segment, k_segment, do, lse, delta)
    return _run(_backward_kernels, fallback.backward, args, dtype=dtype, **how)

  return Pair(forward, backward)
