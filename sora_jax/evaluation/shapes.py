"""Reads colour and direction of motion off clips of one moving shape: the judge of the synthetic world.

The palette is the caller's, so that the judge shares no table with what drew the frames.
"""

import dataclasses

import numpy as np

MIN_CONTRAST = 48.0  # RGB distance from the background at which a pixel counts as shape
MIN_TRAVEL = 1.0  # pixels from first to last frame below which there is no direction


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the tracker saw; '' where it saw nothing it could name."""

  colour: str
  direction: str
  travel_yx: tuple[float, float]


def track(frames_THWC: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> Reading:
  """Follows the centroid of what differs from the background (the median colour of the border)."""
  video = frames_THWC.astype(np.float64)
  border = np.concatenate(
    [
      video[:, 0].reshape(-1, 3),
      video[:, -1].reshape(-1, 3),
      video[:, :, 0].reshape(-1, 3),
      video[:, :, -1].reshape(-1, 3),
    ]
  )
  background = np.median(border, axis=0)
  contrast = np.linalg.norm(video - background, axis=-1)
  weight = np.maximum(contrast - MIN_CONTRAST, 0.0)
  if weight.sum() <= 0:
    return Reading("", "", (0.0, 0.0))
  return Reading(_colour(video, weight, palette), *_motion(weight))


def _colour(video: np.ndarray, weight: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
  # The strongest pixels are the inside of the shape; its edge is mixed with the background.
  inside = weight >= 0.7 * weight.max()
  mean = video[inside].mean(axis=0)
  return min(palette, key=lambda name: float(np.linalg.norm(mean - np.array(palette[name]))))


def _motion(weight_THW: np.ndarray) -> tuple[str, tuple[float, float]]:
  total = weight_THW.sum(axis=(1, 2))
  seen = np.flatnonzero(total > 0.25 * total.max())
  if len(seen) < 2:
    return "", (0.0, 0.0)
  y = (weight_THW.sum(axis=2) @ np.arange(weight_THW.shape[1]))[seen] / total[seen]
  x = (weight_THW.sum(axis=1) @ np.arange(weight_THW.shape[2]))[seen] / total[seen]
  span = seen[-1] - seen[0]
  # A straight-line fit over all frames: one bad frame does not decide.
  travel_y, travel_x = (float(np.polyfit(seen, c, 1)[0] * span) for c in (y, x))
  if max(abs(travel_y), abs(travel_x)) < MIN_TRAVEL:
    return "", (travel_y, travel_x)
  if abs(travel_x) >= abs(travel_y):
    return ("right" if travel_x > 0 else "left"), (travel_y, travel_x)
  return ("down" if travel_y > 0 else "up"), (travel_y, travel_x)
