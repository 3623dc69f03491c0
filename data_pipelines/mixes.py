"""Mixes of sizes to measure packing with: token counts of samples, drawn from a seed."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
  """Sides of a square of the same area; a latent cell is 8 pixels and 4 frames, a patch 2x2 cells."""

  sides: tuple[int, ...]
  frames: tuple[int, int]  # of videos, from and to
  image_share: float
  most_tokens: int
  row_tokens: int
  max_samples: int
  width: int  # of the network: rows cost 24 d sum(l) + 4 sum(l^2)

  @property
  def cost(self) -> tuple[float, float]:
    return 24.0 * self.width, 4.0


MIXES = {
  "480p at 131k": Mix(
    sides=(256, 360, 480, 640), frames=(17, 121), image_share=0.2, most_tokens=49_290, row_tokens=131_072,
    max_samples=64, width=3072,
  ),
  "720p at 262k": Mix(
    sides=(480, 640, 800, 960), frames=(17, 121), image_share=0.2, most_tokens=111_600, row_tokens=262_144,
    max_samples=64, width=3072,
  ),
  "images and short video at 64k": Mix(
    sides=(192, 256, 320, 384, 512), frames=(8, 49), image_share=0.6, most_tokens=65_536 // 4,
    row_tokens=65_536, max_samples=128, width=1152,
  ),
  "NaViT-like images at 8k": Mix(
    sides=(224, 256, 320, 384, 448, 512, 640, 768, 1024), frames=(1, 1), image_share=1.0, most_tokens=4096,
    row_tokens=8192, max_samples=64, width=1152,
  ),
}  # fmt: skip


def draw(mix: Mix, count: int, seed: int = 0) -> np.ndarray:
  """int32 tokens of each sample; aspect ratios from 0.3 to 3.3, evenly in the logarithm."""
  rng = np.random.default_rng(seed)
  side, ratio = rng.choice(mix.sides, count), np.exp(rng.uniform(-1.2, 1.2, count) / 2)
  height, width = np.rint(side * ratio / 16), np.rint(side / ratio / 16)
  latent_frames = 1 + (rng.integers(mix.frames[0], mix.frames[1] + 1, count) - 1) // 4
  latent_frames = np.where(rng.random(count) < mix.image_share, 1, latent_frames)
  tokens = np.maximum(height, 1) * np.maximum(width, 1) * latent_frames
  return np.minimum(tokens, mix.most_tokens).astype(np.int32)
