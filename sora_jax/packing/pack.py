"""Samples into rows of fixed size."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sora_jax.packing.geometry import Grid, positions
from sora_jax.types import NULL_ID, START_ID, BatchSpec, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSample:
  """One sample as tokens, ready to be placed in a row."""

  tokens_LC: np.ndarray
  grid: Grid
  sample_id: int
  text_ids: Sequence[int] = ()
  text_MD: np.ndarray | None = None  # of each id, where the text is embeddings
  fps: float = 0.0
  label: int = -1
  given_L: np.ndarray | None = None
  position_L3: np.ndarray | None = None  # of `grid` where None


def text_of(made: Sequence[int] | np.ndarray) -> dict[str, Sequence[int] | np.ndarray]:
  """The text fields of a PackedSample, of ids or of an embedding (M, D), of M = 0 without a caption."""
  if getattr(made, "ndim", 1) != 2:
    return {"text_ids": made}
  if not len(made):
    return {"text_ids": [NULL_ID], "text_MD": np.zeros((1, made.shape[1]), made.dtype)}
  return {"text_ids": [START_ID] * len(made), "text_MD": made}


def tokens_of_samples(segment_BL: np.ndarray, slots: int) -> np.ndarray:
  """[B, slots] tokens of segments 1..slots of every row, of clips or of texts, in one pass."""
  B, stride = len(segment_BL), slots + 1
  place = segment_BL + np.arange(B)[:, None] * stride
  return np.bincount(place.reshape(-1), minlength=B * stride).reshape(B, stride)[:, 1:]


def share_text(counts: Sequence[int], capacity: int) -> list[int]:
  """Text tokens each caption may keep: all where they fit, else the longest give way first, evenly."""
  kept, left = [0] * len(counts), capacity
  for place, i in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
    kept[i] = min(counts[i], left // (len(counts) - place))
    left -= kept[i]
  return kept


def pack_row(samples: Sequence[PackedSample], spec: BatchSpec, *, unreadable: int = 0) -> TokenBatch:
  """One row (B = 1) of the samples in order; what they leave is padding.

  Captions that do not fit into the row's text tokens are cut as `share_text` says, at the end.
  """
  row = spec.zeros(1)
  total = sum(len(s.tokens_LC) for s in samples)
  if total > spec.tokens or len(samples) > spec.samples:
    raise ValueError(
      f"{len(samples)} samples of {total} tokens do not fit a row of "
      f"{spec.samples} samples and {spec.tokens} tokens"
    )
  token, text = 0, 0
  kept = share_text([len(s.text_ids) for s in samples], spec.text_tokens)
  for slot, (sample, num_text) in enumerate(zip(samples, kept)):
    span = slice(token, token + len(sample.tokens_LC))
    row.tokens_BLC[0, span] = sample.tokens_LC
    row.segment_BL[0, span] = slot + 1
    row.position_BL3[0, span] = positions(sample.grid) if sample.position_L3 is None else sample.position_L3
    if sample.given_L is not None:
      row.given_BL[0, span] = sample.given_L
    text_span = slice(text, text + num_text)
    row.text_ids_BM[0, text_span] = sample.text_ids[:num_text]
    row.text_segment_BM[0, text_span] = slot + 1
    if row.text_BMD is not None:
      row.text_BMD[0, text_span] = sample.text_MD[:num_text]
    row.grid_BN3[0, slot] = sample.grid
    row.fps_BN[0, slot] = sample.fps
    row.label_BN[0, slot] = sample.label
    row.sample_id_BN[0, slot] = sample.sample_id
    token, text = span.stop, text_span.stop
  row.unreadable_B[0] = unreadable
  return row


def stack_rows(rows: Sequence[TokenBatch]) -> TokenBatch:
  """Rows, or batches of rows, one after another."""
  columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(TokenBatch)}
  return TokenBatch(
    **{k: None if parts[0] is None else np.concatenate(parts) for k, parts in columns.items()}
  )
