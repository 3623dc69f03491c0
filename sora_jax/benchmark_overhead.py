"""What the training loop costs the host per step, beside the model's own computation."""

import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.tasks import text_to_video
from sora_jax.training.hooks import Hook
from sora_jax.training.loop import TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.types import BatchSpec, TokenBatch

EVERY, WINDOWS = 50, 8
# One row of few tokens: all parameters of XS, hardly any work. What is left is the host's.
SPEC = BatchSpec(rows=1, tokens=8, channels=48, samples=2, text_tokens=8)


def tiny_batch() -> TokenBatch:
  out, rng = SPEC.zeros(), np.random.default_rng(0)
  out.tokens_BLC[:] = rng.normal(size=out.tokens_BLC.shape)
  out.segment_BL[:, :6], out.sample_id_BN[:, 0], out.grid_BN3[:, 0] = 1, 0, (1, 2, 3)
  out.text_segment_BM[:, :4] = 1
  return out


def measure(size: str = "XS") -> dict[str, object]:
  """CPU seconds of the main thread per step of `fit` itself, all that it does included but the data.

  Waiting for the device is no CPU time of the thread. Where the CPU is the device, computation that the
  runtime does in the calling thread counts too: an upper bound.
  """
  task = text_to_video.build(
    model=DiTConfig(size=size), text_config=TextConfig(), diffusion=ObjectiveConfig(), batch_spec=SPEC
  )
  batch, marks = tiny_batch(), []

  def same(start: int) -> Iterator[TokenBatch]:
    while True:
      yield batch

  def mark(moment) -> None:
    marks.append((time.thread_time(), time.perf_counter()))

  with tempfile.TemporaryDirectory() as workdir:
    fit(
      task,
      config=TrainConfig(num_steps=EVERY * (WINDOWS + 2), log_every=10, save_every=0, tensorboard=False),
      optimizer=OptimizerConfig(),
      mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
      train_batches=same,
      workdir=workdir,
      resolved_config={},
      hooks=[Hook(every=EVERY, run=mark, at_end=False)],
    )
  steps = [((b[0] - a[0]) / EVERY * 1e3, (b[1] - a[1]) / EVERY * 1e3) for a, b in zip(marks[:-1], marks[1:])]
  cpu, wall = zip(*steps)
  return {
    "size": size,
    "tokens": SPEC.tokens,
    "steps": EVERY * len(steps),
    "main_thread_cpu_ms_per_step": round(statistics.median(cpu), 3),
    "main_thread_cpu_ms_per_step_min": round(min(cpu), 3),
    "main_thread_cpu_ms_per_step_max": round(max(cpu), 3),
    "wall_ms_per_step": round(statistics.median(wall), 3),
  }
