"""Shape legend and the few types that cross rooms.

Shape suffixes, always of the logical (global, unsharded) array:
  B rows of a batch          L tokens of a row          C channels of a patch vector
  N sample slots of a row    M text tokens of a row     D model width
  T frames   H height   W width   K attention heads   S size of a head   F MLP width

`t` is diffusion time in [0, 1], 1 = noise. `step` is a training step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

Array = jax.Array
PyTree = Any

# name -> (sum, count). Sums add over micro-batches, steps and hosts; a mean is taken once, at the end.
Sums = dict[str, tuple[Array, Array]]

PADDING = 0  # segment of tokens that belong to no sample
NO_SAMPLE = -1  # sample_id of an empty slot
# Text ids below those of a vocabulary: of padding, of no caption, of the start of one (or of any token of an
# embedding).
PAD_ID, NULL_ID, START_ID = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
  """Rows of packed samples: the only thing that crosses from data to model.

  The samples of a row are contiguous runs with segments 1..n in order; sample slot i (0-based) describes
  segment i + 1. Attention masks are derived from segments and never stored.
  """

  tokens_BLC: Array | np.ndarray  # float, clean patch vectors
  segment_BL: Array | np.ndarray  # int32, 0 = padding
  position_BL3: Array | np.ndarray  # float32 (t, y, x) in patches, in the sample's own grid
  given_BL: Array | np.ndarray  # bool, prompt tokens: stay clean, bear no loss
  text_ids_BM: Array | np.ndarray  # int32 token ids
  text_segment_BM: Array | np.ndarray  # int32, the sample each text token belongs to, 0 = padding
  grid_BN3: Array | np.ndarray  # int32 (T, H, W) in patches, zeros for an empty slot
  fps_BN: Array | np.ndarray  # float32, 0 for images and empty slots
  label_BN: Array | np.ndarray  # int32 class label, -1 where there is none
  sample_id_BN: Array | np.ndarray  # int32, NO_SAMPLE for an empty slot; seeds all randomness of a sample
  unreadable_B: Array | np.ndarray  # int32, samples planned for the row that could not be read
  # float16, embeddings of the text tokens by an encoder that is not trained (`text_ids` then tells START_ID
  # from NULL_ID); None where the model encodes `text_ids`. D is theirs, not the model's.
  text_BMD: Array | np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSpec:
  """Static shape of a TokenBatch."""

  rows: int  # B, over all hosts
  tokens: int  # L
  channels: int  # C
  samples: int  # N
  text_tokens: int  # M
  text_width: int = 0  # of embeddings; 0 = text is ids

  def zeros(self, rows: int | None = None) -> TokenBatch:
    """An all-padding batch of numpy arrays (`rows` overrides B)."""
    B, L, N, M = self.rows if rows is None else rows, self.tokens, self.samples, self.text_tokens
    return TokenBatch(
      tokens_BLC=np.zeros((B, L, self.channels), np.float32),
      segment_BL=np.zeros((B, L), np.int32),
      position_BL3=np.zeros((B, L, 3), np.float32),
      given_BL=np.zeros((B, L), bool),
      text_ids_BM=np.zeros((B, M), np.int32),
      text_segment_BM=np.zeros((B, M), np.int32),
      grid_BN3=np.zeros((B, N, 3), np.int32),
      fps_BN=np.zeros((B, N), np.float32),
      label_BN=np.full((B, N), -1, np.int32),
      sample_id_BN=np.full((B, N), NO_SAMPLE, np.int32),
      unreadable_B=np.zeros((B,), np.int32),
      text_BMD=np.zeros((B, M, self.text_width), np.float16) if self.text_width else None,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What the one training loop needs to know of a network and its objective.

  loss_fn(model, batch, key) -> (loss_sum, sums): `loss_sum` is the un-normalised sum over loss-bearing
  elements and sums["loss"] = (loss_sum, count). The step divides by the count over the global batch, after
  accumulation, so that a loss does not depend on how samples are split into batches. `key` is already folded
  with the step; per-sample randomness folds in sample_id.
  eval_fn(model, batch) -> sums: deterministic held-out metrics, sums["loss"] among them.
  flops_fn(batch) -> model FLOPs of forward and backward pass, from the real segments (numpy batch); of every
    row, so that the imbalance of cost can be reported, or of the whole.
  """

  name: str
  init: Callable[[nnx.Rngs], nnx.Module]
  loss_fn: Callable[[nnx.Module, TokenBatch, Array], tuple[Array, Sums]]
  eval_fn: Callable[[nnx.Module, TokenBatch], Sums]
  flops_fn: Callable[[TokenBatch], float | np.ndarray]
  batch_spec: BatchSpec
  trainable: Any = nnx.Param
