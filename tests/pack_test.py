import numpy as np
import pytest

from sora_jax.packing.pack import PackedSample, pack_row, share_text, stack_rows
from sora_jax.types import NO_SAMPLE, BatchSpec

SPEC = BatchSpec(rows=2, tokens=20, channels=3, samples=3, text_tokens=8)


def make_sample(grid, sample_id, text=(), **kwargs) -> PackedSample:
  tokens = np.full((np.prod(grid), 3), float(sample_id), np.float32)
  return PackedSample(tokens_LC=tokens, grid=grid, sample_id=sample_id, text_ids=text, **kwargs)


def test_a_row_holds_runs_positions_and_what_describes_them():
  given = np.arange(8) < 4
  row = pack_row(
    [make_sample((2, 2, 2), 7, (5, 6), fps=8.0, label=2, given_L=given), make_sample((1, 2, 3), 9, (4,))],
    SPEC,
  )
  assert row.segment_BL[0].tolist() == [1] * 8 + [2] * 6 + [0] * 6
  assert row.tokens_BLC[0, :, 0].tolist() == [7.0] * 8 + [9.0] * 6 + [0.0] * 6
  assert row.position_BL3[0, 7].tolist() == [1, 1, 1] and row.position_BL3[0, 13].tolist() == [0, 1, 2]
  assert row.given_BL[0].tolist() == [True] * 4 + [False] * 16
  assert row.text_ids_BM[0].tolist() == [5, 6, 4, 0, 0, 0, 0, 0]
  assert row.text_segment_BM[0].tolist() == [1, 1, 2, 0, 0, 0, 0, 0]
  assert row.grid_BN3[0].tolist() == [[2, 2, 2], [1, 2, 3], [0, 0, 0]]
  assert row.sample_id_BN[0].tolist() == [7, 9, NO_SAMPLE]
  assert row.fps_BN[0].tolist() == [8, 0, 0] and row.label_BN[0].tolist() == [2, -1, -1]


def test_rows_stack_into_the_shapes_of_the_spec():
  batch = stack_rows([pack_row([make_sample((1, 2, 2), 1)], SPEC), pack_row([], SPEC, unreadable=2)])
  for name, zeros in vars(SPEC.zeros()).items():
    array = getattr(batch, name)
    if zeros is None:  # text as ids
      assert array is None, name
      continue
    assert array.shape == zeros.shape and array.dtype == zeros.dtype, name
  assert batch.unreadable_B.tolist() == [0, 2]


@pytest.mark.parametrize(
  "counts,capacity,kept",
  [
    ([3, 4], 8, [3, 4]),
    ([10, 2, 10], 8, [3, 2, 3]),
    ([10, 10], 5, [3, 2]),
    ([], 8, []),
    ([5, 0, 1], 3, [2, 0, 1]),
  ],
)
def test_long_captions_give_way_first(counts, capacity, kept):
  shares = share_text(counts, capacity)
  assert sorted(shares) == sorted(kept) and sum(shares) == min(sum(counts), capacity)
  assert all(k <= c for k, c in zip(shares, counts))


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="do not fit a row of 3 samples and 20 tokens"):
    pack_row([make_sample((3, 3, 3), 1)], SPEC)
  with pytest.raises(ValueError, match="4 samples"):
    pack_row([make_sample((1, 1, 1), i) for i in range(4)], SPEC)
