"""Patches, grids, and sizes that fit a token budget."""

import math

import numpy as np
import pytest

from sora_jax.packing import geometry
from sora_jax.packing.geometry import ClipSpec, fit_size


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 4, 3), (4, 8, 8)])
def test_unpatchify_inverts_patchify(patch):
  pt, ph, pw = patch
  grid = (2, 3, 4)
  video = np.random.default_rng(0).normal(size=(grid[0] * pt, grid[1] * ph, grid[2] * pw, 3))
  tokens = geometry.patchify(video, patch)
  assert tokens.shape == (math.prod(grid), math.prod(patch) * 3)
  np.testing.assert_array_equal(
    geometry.unpatchify(
      tokens,
      grid,
      patch,
    ),
    video,
  )


def test_positions_follow_the_token_order():
  grid, patch = (2, 3, 2), (1, 1, 1)
  index = np.stack(
    np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1
  )  # THW3: each cell holds its place
  np.testing.assert_array_equal(geometry.patchify(index, patch), geometry.positions(grid))


def test_patchify_names_what_does_not_divide():
  with pytest.raises(ValueError, match="3x8x8 .* patch 2x4x4"):
    geometry.patchify(np.zeros((3, 8, 8, 3)), (2, 4, 4))


def test_fit_keeps_the_aspect_ratio_and_the_budget():
  rng = np.random.default_rng(1)
  worst = 0.0
  for _ in range(400):
    height, width = rng.integers(90, 1400, size=2)
    if not 0.4 < height / width < 2.5:
      continue
    spec = fit_size(
      60, int(height), int(width), 30.0, patch=(2, 8, 8), max_tokens=400, max_frames=8, target_fps=10
    )
    assert spec.num_frames == 8 and spec.fps == 10
    assert geometry.num_tokens(spec, (2, 8, 8)) <= 400
    assert geometry.num_tokens(spec, (2, 8, 8)) >= 0.75 * 400  # the budget is used
    worst = max(worst, abs(math.log(spec.height / spec.width * width / height)))
  assert worst < math.log(1.1)


def test_fit_never_enlarges_beyond_rounding():
  spec = fit_size(1, 50, 70, 0.0, patch=(1, 16, 16), max_tokens=10_000)
  assert (spec.height, spec.width) == (48, 64) and spec.num_frames == 1 and spec.fps == 0


def test_fit_resamples_time_and_drops_the_remainder():
  spec = fit_size(100, 64, 64, 30.0, patch=(4, 8, 8), max_tokens=10_000, target_fps=8)
  assert spec.fps == 8 and spec.num_frames == 24  # 100 / 30 * 8 = 26.7
  slow = fit_size(10, 64, 64, 2.0, patch=(1, 8, 8), max_tokens=10_000, target_fps=8)
  assert slow.fps == 2 and slow.num_frames == 10  # frames are never invented


def test_fit_of_a_strip_and_of_a_long_video():
  assert fit_size(1, 80, 1280, 0.0, patch=(1, 16, 16), max_tokens=20).height == 16
  spec = fit_size(10_000, 64, 64, 24.0, patch=(1, 16, 16), max_tokens=40)
  assert geometry.num_tokens(spec, (1, 16, 16)) <= 40


def test_pad_frames_repeats_an_image():
  image = np.arange(12).reshape(1, 2, 2, 3)
  padded = geometry.pad_frames(image, 4)
  assert padded.shape[0] == 4 and (padded == image).all()
  assert geometry.grid_of(ClipSpec(1, 8, 8), (4, 4, 4)) == (1, 2, 2)
