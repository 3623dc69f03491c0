"""Patches, grids and positions: how a video becomes tokens and back."""

import dataclasses
import math
from typing import Any

import numpy as np
from einops import rearrange

Patch = tuple[int, int, int]  # (frames, height, width) of one patch
WHITE = 127.5  # uint8 pixel = (value + 1) * WHITE
Grid = tuple[int, int, int]  # (T, H, W) in patches


@dataclasses.dataclass(frozen=True)
class ClipSpec:
  """Size at which a sample is read: frames, pixels (or latent cells) and frames per second (0 = image)."""

  num_frames: int
  height: int
  width: int
  fps: float = 0.0


def patchify(video_THWC: Any, patch: Patch) -> Any:
  """(T, H, W, C) -> (L, pt*ph*pw*C); tokens in order t, y, x. Works on numpy and jax arrays."""
  pt, ph, pw = patch
  T, H, W = video_THWC.shape[:3]
  if T % pt or H % ph or W % pw:
    raise ValueError(f"a video of {T}x{H}x{W} (TxHxW) is not divisible by the patch {pt}x{ph}x{pw}")
  return rearrange(video_THWC, "(t pt) (h ph) (w pw) c -> (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens_LC: Any, grid: Grid, patch: Patch) -> Any:
  """Inverse of `patchify` for a sample of `grid` patches."""
  t, h, w = grid
  pt, ph, pw = patch
  return rearrange(
    tokens_LC, "(t h w) (pt ph pw c) -> (t pt) (h ph) (w pw) c", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
  )


def positions(grid: Grid) -> np.ndarray:
  """(L, 3) float32 patch indices (t, y, x) in the order of `patchify`."""
  axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid), indexing="ij")
  return np.stack([a.reshape(-1) for a in axes], axis=-1)


def pad_frames(video_THWC: np.ndarray, temporal_patch: int) -> np.ndarray:
  """Repeats the last frame until the temporal patch divides: an image fills one patch with itself."""
  missing = -len(video_THWC) % temporal_patch
  if not missing:
    return video_THWC
  return np.concatenate([video_THWC, np.repeat(video_THWC[-1:], missing, axis=0)])


def to_float(pixels: np.ndarray) -> np.ndarray:
  """uint8 pixels as the float32 in [-1, 1] that networks see."""
  return pixels.astype(np.float32) / WHITE - 1.0


def to_uint8(values: np.ndarray) -> np.ndarray:
  """Inverse of `to_float`; what lies outside [-1, 1] is clipped."""
  return np.round((np.clip(values, -1.0, 1.0) + 1.0) * WHITE).astype(np.uint8)


def grid_of(spec: ClipSpec, patch: Patch) -> Grid:
  """Patches along each dimension; a temporal remainder counts as one more patch (see `pad_frames`)."""
  pt, ph, pw = patch
  if spec.height % ph or spec.width % pw:
    raise ValueError(f"{spec.height}x{spec.width} (HxW) is not divisible by the patch {ph}x{pw}")
  return (-(-spec.num_frames // pt), spec.height // ph, spec.width // pw)


def num_tokens(spec: ClipSpec, patch: Patch) -> int:
  return math.prod(grid_of(spec, patch))


def fit_size(
  num_frames: int,
  height: int,
  width: int,
  fps: float,
  *,
  patch: Patch,
  max_tokens: int,
  max_frames: int = 0,
  target_fps: float = 0.0,
) -> ClipSpec:
  """The size nearest to the native one that the patch divides and that costs at most `max_tokens`.

  Keeps the aspect ratio up to rounding to whole patches, never crops, never enlarges by more than that
  rounding. `target_fps` caps the frame rate (0 = native), `max_frames` the frames (0 = no cap).
  """
  pt, ph, pw = patch
  if min(num_frames, height, width, max_tokens) < 1:
    raise ValueError(f"cannot fit {num_frames}x{height}x{width} (TxHxW) into {max_tokens} tokens")
  frames, rate = 1, 0.0
  if num_frames > 1:
    rate = min(fps, target_fps) if target_fps and fps else (fps or target_fps)
    frames = max(1, int(num_frames * rate / fps + 1e-6)) if fps else num_frames
    frames = min(frames, max_frames or frames, pt * max_tokens)
    # A remainder would be padded with repeats of its last frame; drop it instead where a patch remains.
    frames = frames // pt * pt if frames >= pt else frames
  area = max_tokens // -(-frames // pt)
  rows, cols = _fit_area(height / ph, width / pw, area)
  return ClipSpec(frames, rows * ph, cols * pw, rate if frames > 1 else 0.0)


def _fit_area(height: float, width: float, area: int) -> Grid:
  """Whole (rows, cols) with rows * cols <= area, close to height:width and to the area (not above native)."""
  shrink = min(1.0, math.sqrt(area / (height * width)))
  ideal = height * shrink * width * shrink
  best, best_cost = (1, 1), math.inf
  top = max(1, round(height))
  for rows in range(max(1, int(height * shrink * 0.7)), min(area, top, int(height * shrink * 1.4) + 1) + 1):
    exact = rows * width / height
    for cols in {max(1, math.floor(exact)), max(1, math.ceil(exact))}:
      if rows * cols > area or cols > max(1, round(width)):
        continue
      # Distortion of the aspect ratio is worth four times as much as an equal loss of area.
      cost = 4 * abs(math.log(cols / exact)) + abs(math.log(max(ideal, 1) / (rows * cols)))
      if cost < best_cost:
        best, best_cost = (rows, cols), cost
  if best_cost == math.inf:  # a strip thinner than a patch: one row or column, cut to the area
    best = (min(top, area), 1) if height > width else (1, min(max(1, round(width)), area))
  return best
