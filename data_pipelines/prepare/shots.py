"""Where one shot ends and the next begins, by PySceneDetect."""

try:
  from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
except ImportError:  # the extra `prepare`
  AdaptiveDetector = None

import numpy as np


def require() -> None:
  if AdaptiveDetector is None:
    raise ValueError(
      "the stage shots needs PySceneDetect: pip install 'sora_jax[prepare]' (or scenedetect-headless), "
      "or leave it out: --stages=probe,cut,filter,dedup,resize,write"
    )


class ShotFinder:
  """Takes the frames of a video in order."""

  def __init__(self, kind: str, threshold: float, fps: float, min_duration: float):
    require()
    length = max(1, round(min_duration * fps))
    name = "adaptive_threshold" if kind == "adaptive" else "threshold"
    given = {name: threshold} if threshold else {}
    make = AdaptiveDetector if kind == "adaptive" else ContentDetector
    self._detector, self._fps = make(min_scene_len=length, **given), fps
    self._cuts: set[int] = set()
    self._count = 0

  def add(self, frame: np.ndarray) -> None:
    found = self._detector.process_frame(self._time(), np.ascontiguousarray(frame[..., ::-1]))
    self._cuts.update(time.frame_num for time in found)
    self._count += 1

  def shots(self) -> list[tuple[int, int]]:
    """(first, stop) of each shot; together they are the whole video."""
    found = self._detector.post_process(self._time())
    self._cuts.update(time.frame_num for time in found)
    edges = [0, *sorted(c for c in self._cuts if 0 < c < self._count), self._count]
    return list(zip(edges, edges[1:]))

  def _time(self):
    return FrameTimecode(self._count, self._fps)
