"""Which tiles of packed attention have a pair of tokens to compute: the list that the TPU kernels walk.

A tile is a block of queries by a block of keys. Segments give every block an interval of numbers; a tile is
live where the intervals of its two blocks meet, which for samples that lie in order is exactly where some
query has some key (where both hold every number between their first and last; else a few tiles too many are
live, never one too few). The live tiles of a block are taken for a range. A tile on a border says besides
which of its keys the kernel has to walk: from the first to the last part with a live pair. Building the list
takes no more memory than (query blocks) x (parts of key blocks).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sora_jax.types import PADDING, Array

# A tile is one int32: block that the kernel stays on << 19 | block that it walks << 7 | last live part of the
# keys << 5 | first << 3 | flags.
_MAJOR_SHIFT, _MINOR_SHIFT, _LAST_PART_SHIFT, _FIRST_PART_SHIFT, MAX_BLOCKS = 19, 7, 5, 3, 2**12 - 1
FIRST, LAST, INNER = 1, 2, 4
_PARTS = 4  # of the keys of a tile, at most
_DEAD = np.int32(2**31 - 1)


class TileList(NamedTuple):
  """Live tiles in front, `count` of them (at least 1: tile 0 is computed and thrown away if none is live)."""

  tiles: Array  # int32 [static maximum]
  count: Array  # int32 []
  live_major: Array  # bool [blocks]: those that occur in the list; the kernel writes nothing for others


def major(tile):
  return tile >> _MAJOR_SHIFT


def minor(tile):
  return (tile >> _MINOR_SHIFT) & MAX_BLOCKS


def keys_at_once(block_k: int) -> int:
  """Keys that a kernel computes at a time: what of a tile is skipped or not."""
  return next((size for size in (256, 128) if block_k % size == 0), block_k)


def _of_part(block_k: int) -> tuple[int, int]:
  """(of a tile, of a part of it) how often the kernel computes `keys_at_once`."""
  num = block_k // keys_at_once(block_k)
  return num, -(-num // _PARTS)


def live_keys(tile, block_k: int):
  """First and one past the last `keys_at_once` of a tile to be computed."""
  num, part = _of_part(block_k)
  first, last = ((tile >> shift) & (_PARTS - 1) for shift in (_FIRST_PART_SHIFT, _LAST_PART_SHIFT))
  return first * part, jnp.minimum((last + 1) * part, num)


def unique_segments(q_segment_BL: Array, k_segment_BM: Array) -> tuple[Array, Array]:
  """All rows in one line, [B * L] and [B * M]: numbers differ between rows, padding stays padding."""
  stride = jnp.maximum(q_segment_BL.max(), k_segment_BM.max()) + 1

  def line(segment):
    row = jnp.arange(segment.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(segment == PADDING, PADDING, row * stride + segment).reshape(-1).astype(jnp.int32)

  return line(q_segment_BL), line(k_segment_BM)


def _intervals(segment_T, block: int, xp):
  """Lowest and highest number of every block (an empty interval where all is padding), and where the whole
  block is one segment."""
  blocks = segment_T.reshape(*segment_T.shape[:-1], -1, block)
  high, low = blocks.max(-1), blocks.min(-1)
  lowest = xp.where(blocks == PADDING, _DEAD, blocks).min(-1)
  return lowest, high, (low == high) & (low != PADDING)


def _live(q, k):
  """[..., query blocks, key blocks]"""
  (q_low, q_high, _), (k_low, k_high, _) = q, k
  return (q_low[..., :, None] <= k_high[..., None, :]) & (k_low[..., None, :] <= q_high[..., :, None])


def most_tiles(rows: int, tokens: int, keys: int, block_q: int, block_k: int) -> int:
  """Tiles of rows that are one segment each, no packing has more: the static length of the list."""

  def rows_of_blocks(length, block):
    first = np.arange(-(-rows * length // block)) * block
    return first // length, np.minimum(first + block - 1, rows * length - 1) // length

  (q_first, q_last), (k_first, k_last) = rows_of_blocks(tokens, block_q), rows_of_blocks(keys, block_k)
  # Rows ascend with blocks, so that the key blocks of a query block are a range.
  return int((np.searchsorted(k_first, q_last, "right") - np.searchsorted(k_last, q_first, "left")).sum())


def tile_list(q_segment_T: Array, k_segment_T: Array, block_q: int, block_k: int, most: int, *, by_key: bool):
  """The TileList of lines of unique segments, padded to whole blocks.

  `by_key`: the kernel stays on a block of keys and walks queries, else the other way round.
  """
  q, k = _intervals(q_segment_T, block_q, jnp), _intervals(k_segment_T, block_k, jnp)
  live = _live(q, k)
  inner = q[2][:, None] & k[2][None, :] & (q[1][:, None] == k[1][None, :])
  live, inner = (live.T, inner.T) if by_key else (live, inner)
  assert max(live.shape) <= MAX_BLOCKS, "a line of more than 4,095 blocks"
  first, length = _range(live)
  inner_first, inner_length = _range(inner)
  # Inner tiles with a gap between them, which segments in order never have, are computed with the mask.
  inner_length = jnp.where(inner.sum(1) == inner_length, inner_length, 0)
  stop = jnp.cumsum(length)
  index = jnp.arange(most, dtype=jnp.int32)
  # Of the whole line of keys, in `keys_at_once`: what each block of queries meets.
  at_once = keys_at_once(block_k)
  meets = _range(_live(q, _intervals(k_segment_T, at_once, jnp)))
  block, (start, end, first, inner_first, inner_length, *met) = _look_up(
    index, stop, (stop - length, stop, first, inner_first, inner_length, *(() if by_key else meets))
  )
  other = first + index - start
  parts = _parts_of(block if by_key else other, *(_pick(other, meets) if by_key else met), block_k)
  is_inner = (inner_first <= other) & (other < inner_first + inner_length)
  tiles = (block << _MAJOR_SHIFT) | (other << _MINOR_SHIFT) | parts | jnp.where(is_inner, INNER, 0)
  tiles = tiles | jnp.where(index == start, FIRST, 0) | jnp.where(index == end - 1, LAST, 0)
  count = length.sum(dtype=jnp.int32)
  return TileList(jnp.where(index < count, tiles, FIRST | LAST), jnp.maximum(count, 1), length > 0)


def _parts_of(key_block, first, length, block_k: int):
  """Bits of the first and last part of a block of keys, of a range that is counted along the whole line."""
  num, part = _of_part(block_k)
  first, last = (jnp.clip(x - key_block * num, 0, num - 1) // part for x in (first, first + length - 1))
  return (last << _LAST_PART_SHIFT) | (first << _FIRST_PART_SHIFT)


def _pick(index, tables):
  """Entries of tables at indices, as sums for the reason that `_look_up` has."""
  same = index[:, None] == jnp.arange(len(tables[0]), dtype=jnp.int32)[None, :]
  return [jnp.where(same, table[None, :], 0).sum(1, dtype=jnp.int32) for table in tables]


def _range(mask):
  """First true entry of every row of a matrix, and how many there are from there to the last."""
  first = jnp.argmax(mask, axis=1).astype(jnp.int32)
  last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
  return first, jnp.where(mask.any(1), last - first + 1, 0)


def _look_up(index, stop, tables):
  """The block whose tiles, before `stop`, hold each index, and its entry of each table.

  By sums of differences over all blocks: cheap for a vector unit, where a gather or a sort is not (and the
  sort of 65,536 numbers takes XLA 6 s to compile).
  """
  before = stop[None, :] <= index[:, None]
  entries = [
    table[0] + jnp.where(before[:, :-1], (table[1:] - table[:-1])[None, :], 0).sum(1, dtype=jnp.int32)
    for table in tables
  ]
  return before.sum(1, dtype=jnp.int32), entries


def count_live_in_line(q_segment_T: Array, k_segment_T: Array, block_q: int, block_k: int) -> Array:
  """Length of the list, dead tiles within the range of a block included."""
  live = _live(_intervals(q_segment_T, block_q, jnp), _intervals(k_segment_T, block_k, jnp))
  # dkv takes ranges along the other side, which only segments out of order make longer.
  return jnp.maximum(_range(live)[1].sum(dtype=jnp.int32), _range(live.T)[1].sum(dtype=jnp.int32))


def count_live(
  segment_BL: np.ndarray, block_q: int, block_k: int, k_segment_BM: np.ndarray | None = None
) -> tuple[int, int]:
  """(live tiles, all tiles) row by row, on the host; of self-attention unless keys are given."""
  q, k = segment_BL, segment_BL if k_segment_BM is None else k_segment_BM

  def intervals(segment, block):
    block = min(block, segment.shape[1])
    padded = np.pad(segment, ((0, 0), (0, -segment.shape[1] % block)), constant_values=PADDING)
    return _intervals(padded, block, np)

  live = _live(intervals(np.asarray(q), block_q), intervals(np.asarray(k), block_k))
  return int(live.sum()), live.size


@functools.cache
def block_size(tokens: int, largest: int) -> int:
  """`largest`, or the whole line in multiples of the 128 lanes where that is shorter."""
  return min(largest, -(-tokens // 128) * 128)
