"""Captioned moving shapes, drawn on the fly: every sample is a function of (seed, index).

A world small enough to be learned in minutes on two cores, with attributes that a tracker can read back
(`sora_jax/evaluation/shapes.py`). Some combinations of colour, shape and direction are held out of training.
"""

import dataclasses
import itertools

import numpy as np

from data_pipelines.sources.base import SampleInfo
from sora_jax.packing.geometry import ClipSpec

COLOURS = {
  "red": (220, 40, 40),
  "green": (40, 190, 60),
  "blue": (50, 80, 230),
  "yellow": (230, 210, 40),
  "purple": (170, 60, 200),
  "cyan": (40, 200, 210),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
SPEEDS = {"slowly": 0.6, "quickly": 1.1}  # of the room across the frame, per second
BACKGROUNDS = {"black": (12, 12, 12), "grey": (120, 120, 120), "white": (240, 240, 240)}
SIZES = ((24, 24), (24, 32), (32, 24), (32, 32), (24, 40), (40, 24))
NUM_FRAMES = (4, 8)
FPS = 8.0
JITTER = 0.6  # share of the room left beside the path that its middle may use
HELD_OUT_EVERY = 6  # one combination of this many is held out


@dataclasses.dataclass(frozen=True)
class Scene:
  """Attributes of one sample; sizes in native pixels. An image has one frame and no motion."""

  colour: str
  shape: str
  direction: str
  speed: str
  background: str
  num_frames: int
  height: int
  width: int
  radius: float
  start_yx: tuple[float, float]

  @property
  def velocity_yx(self) -> tuple[float, float]:
    """Pixels a frame at the native size and FPS."""
    if self.num_frames == 1:
      return 0.0, 0.0
    return _velocity(
      self.direction, self.speed, (self.height - 2 * self.radius, self.width - 2 * self.radius)
    )

  @property
  def caption(self) -> str:
    thing = f"a {self.colour} {self.shape}"
    motion = "" if self.num_frames == 1 else f" moving {self.direction} {self.speed}"
    return f"{thing}{motion} on a {self.background} background"


def is_held_out(colour: str, shape: str, direction: str) -> bool:
  """A Latin-square choice: every colour, shape and direction is seen in training, this combination never."""
  c, s, d = list(COLOURS).index(colour), SHAPES.index(shape), list(DIRECTIONS).index(direction)
  return (c + 2 * s + 3 * d) % HELD_OUT_EVERY == 0


def combinations(*, held_out: bool) -> list[tuple[str, str, str]]:
  """(colour, shape, direction) of one side of the split."""
  return [c for c in itertools.product(COLOURS, SHAPES, DIRECTIONS) if is_held_out(*c) == held_out]


def make_scene(rng: np.random.Generator, *, held_out: bool, image_share: float) -> Scene:
  choices = combinations(held_out=held_out)
  colour, shape, direction = choices[rng.integers(len(choices))]
  background = str(rng.choice(list(BACKGROUNDS)))
  speed = str(rng.choice(list(SPEEDS)))
  height, width = SIZES[rng.integers(len(SIZES))]
  radius = float(rng.uniform(0.2, 0.26)) * min(height, width)
  num_frames = 1 if rng.random() < image_share else int(rng.choice(NUM_FRAMES))
  room = (height - 2 * radius, width - 2 * radius)
  velocity = (0.0, 0.0) if num_frames == 1 else _velocity(direction, speed, room)
  start = []
  for axis in (0, 1):
    # The middle of the path lies near the middle of the frame: where a shape is then tells its direction.
    travel = velocity[axis] * (num_frames - 1)
    slack = max(0.0, room[axis] - abs(travel)) * JITTER
    start.append(radius + room[axis] / 2 + float(rng.uniform(-0.5, 0.5)) * slack - travel / 2)
  return Scene(
    colour, shape, direction, speed, background, num_frames, height, width, radius, (start[0], start[1])
  )


def _velocity(direction: str, speed: str, room: tuple[float, float]) -> tuple[float, float]:
  """Pixels a frame along (y, x)."""
  dy, dx = DIRECTIONS[direction]
  return dy * SPEEDS[speed] * room[0] / FPS, dx * SPEEDS[speed] * room[1] / FPS


def render(scene: Scene, spec: ClipSpec) -> np.ndarray:
  """uint8 (T, H, W, 3) at the size of `spec`, edges antialiased over one pixel."""
  scale_y, scale_x = spec.height / scene.height, spec.width / scene.width
  y = (np.arange(spec.height) + 0.5)[None, :, None] / scale_y
  x = (np.arange(spec.width) + 0.5)[None, None, :] / scale_x
  # Frames of another rate show the same motion in time.
  rate = FPS / spec.fps if spec.fps else 1.0
  time = np.arange(spec.num_frames)[:, None, None] * rate
  vy, vx = scene.velocity_yx
  y, x = y - scene.start_yx[0] - vy * time, x - scene.start_yx[1] - vx * time
  distance = _distance(scene.shape, y, x, scene.radius)
  coverage = np.clip(0.5 - distance * min(scale_y, scale_x), 0, 1)[..., None]
  background, colour = (
    np.array(c, np.float64) for c in (BACKGROUNDS[scene.background], COLOURS[scene.colour])
  )
  return np.round(background + coverage * (colour - background)).astype(np.uint8)


def _distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
  """Signed distance (negative inside) to a shape of about equal area for each name, centred at 0."""
  if shape == "circle":
    return np.hypot(y, x) - radius
  if shape == "square":
    return np.maximum(np.abs(y), np.abs(x)) - 0.88 * radius
  half = 0.5 * np.sqrt(3.0)
  return np.maximum(y - 0.6 * radius, half * np.abs(x) - 0.5 * y - 0.6 * radius)


def moving_scenes(num: int, rng: np.random.Generator, *, held_out: bool) -> list[Scene]:
  """Scenes of more than one frame, in the order that they are drawn."""
  scenes: list[Scene] = []
  while len(scenes) < num:
    scene = make_scene(rng, held_out=held_out, image_share=0.0)
    if scene.num_frames > 1:
      scenes.append(scene)
  return scenes


class SyntheticSource:
  """A random-access source of scenes (see `data_pipelines/sources/base.py`)."""

  def __init__(self, num_samples: int, seed: int = 0, *, held_out: bool = False, image_share: float = 0.15):
    self.name = "synthetic"
    self.num_samples, self.seed, self.held_out, self.image_share = num_samples, seed, held_out, image_share
    self.rejects: list[tuple[str, str]] = []

  def __len__(self) -> int:
    return self.num_samples

  def scene(self, i: int) -> Scene:
    rng = np.random.default_rng([self.seed, int(self.held_out), i])
    return make_scene(rng, held_out=self.held_out, image_share=self.image_share)

  def info(self, i: int) -> SampleInfo:
    s = self.scene(i)
    fps = FPS if s.num_frames > 1 else 0.0
    return SampleInfo(
      id=i,
      name=f"synthetic-{i:06d}",
      num_frames=s.num_frames,
      height=s.height,
      width=s.width,
      fps=fps,
      captions=(s.caption,),
    )

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    scene = self.scene(i)
    vy, vx = scene.velocity_yx
    y, x = scene.start_yx
    ahead = start_s * FPS
    return render(dataclasses.replace(scene, start_yx=(y + vy * ahead, x + vx * ahead)), spec)

  def fingerprint(self) -> str:
    return f"synthetic-v2-{self.num_samples}-{self.seed}-{int(self.held_out)}-{self.image_share}"
