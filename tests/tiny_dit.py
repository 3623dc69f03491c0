"""A tiny text-to-video task and packed rows for it, images and videos mixed."""

import numpy as np

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.packing.pack import PackedSample, pack_row, stack_rows
from sora_jax.tasks import text_to_video
from sora_jax.types import BatchSpec, Task, TokenBatch

SPEC = BatchSpec(rows=8, tokens=32, channels=12, samples=3, text_tokens=12)
GRIDS = ((1, 3, 4), (2, 2, 3), (1, 2, 2), (3, 2, 2), (1, 1, 5))


def task(*, spec: BatchSpec = SPEC, dtype: str = "float32", caption_drop: float = 0.2) -> Task:
  return text_to_video.build(
    model=DiTConfig(width=16, depth=2, heads=2, dtype=dtype),
    text_config=TextConfig(vocab_size=300, width=8, depth=1, heads=2),
    diffusion=ObjectiveConfig(caption_drop=caption_drop),
    batch_spec=spec,
  )


def row(index: int, spec: BatchSpec = SPEC) -> TokenBatch:
  rng = np.random.default_rng([3, index])
  samples, left = [], spec.tokens
  for slot in range(spec.samples):
    grid = GRIDS[rng.integers(len(GRIDS))]
    length = int(np.prod(grid))
    if length > left:
      break
    left -= length
    given = np.zeros(length, bool)
    given[:2] = slot == 1
    samples.append(
      PackedSample(
        tokens_LC=rng.uniform(-1, 1, (length, spec.channels)).astype(np.float32),
        grid=grid,
        sample_id=index * spec.samples + slot,
        text_ids=[2, *rng.integers(3, 300, rng.integers(0, 6))],
        fps=8.0 if grid[0] > 1 else 0.0,
        given_L=given,
      )
    )
  return pack_row(samples, spec)


def batch(step: int, spec: BatchSpec = SPEC) -> TokenBatch:
  return stack_rows([row(step * spec.rows + i, spec) for i in range(spec.rows)])


def batches(start: int):
  while True:
    yield batch(start)
    start += 1
