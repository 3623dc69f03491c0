"""What the training loop costs the host per step, beside the model's own computation."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.parallel import multihost
from sora_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from sora_jax.tasks import text_to_video
from sora_jax.training import metrics
from sora_jax.training.feed import batch_struct
from sora_jax.training.hooks import Hook
from sora_jax.training.loop import TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.scalars import Packed, unpack
from sora_jax.training.state import init_state, make_setup
from sora_jax.training.step import make_train_step
from sora_jax.types import BatchSpec, PyTree, Task, TokenBatch

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
  """CPU seconds of the main thread per step: of `fit`, all that it does but the data, and of a bare loop.

  The bare loop calls the same compiled step on a batch that lies on the device, and nothing else. Waiting
  for the device is no CPU time of the thread; but where the CPU is the device, its threads take the caches of
  this one, and what the runtime computes in the calling thread counts: of both loops, so that their
  difference is what `fit` adds.
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
  alone, parts = bare(task), pieces(task)
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
    "bare_loop_cpu_ms_per_step": round(alone, 3),
    "added_by_fit_cpu_ms_per_step": round(statistics.median(cpu) - alone, 3),
    **{f"{name}_cpu_ms": round(value, 3) for name, value in parts.items()},
    "sum_of_pieces_cpu_ms": round(sum(parts.values()), 3),
  }


def bare(task: Task) -> float:
  """CPU milliseconds of the main thread per step of a loop that only calls the step; median of windows."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  setup = make_setup(task, optimizer=OptimizerConfig(), num_steps=1, mesh=mesh, seed=0)
  struct, times = batch_struct(task), []
  program = make_train_step(setup, batch=struct).lower(setup.abstract, struct).compile()
  state, held = init_state(setup), multihost.to_global(tiny_batch(), batch_sharding(mesh, struct), SPEC.rows)
  for _ in range(WINDOWS + 1):
    began, before = time.thread_time(), None
    for _ in range(EVERY):
      state, packed = program(state, held)
      jax.block_until_ready(before)  # as many steps in flight as `fit` has
      before = packed.arrays
    times.append((time.thread_time() - began) / EVERY * 1e3)
    jax.block_until_ready(state)
  return statistics.median(times[1:])


def pieces(task: Task) -> dict[str, float]:
  """CPU milliseconds of the main thread for each thing that a step has the host do; medians over 450 steps.

  The call is that of a program with the arrays of the step, coming and going, that computes next to nothing:
  what is left of a step where its computation is another device's.
  """
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  setup = make_setup(task, optimizer=OptimizerConfig(), num_steps=1, mesh=mesh, seed=0)
  struct, batch, window = batch_struct(task), tiny_batch(), metrics.Window(peak=None)
  shardings = batch_sharding(mesh, struct)
  numbers = jax.eval_shape(make_train_step(setup, batch=struct), setup.abstract, struct)[1]

  def idle(state: PyTree, batch: TokenBatch) -> tuple[PyTree, Packed]:
    count = state["counters"]["step"] + 1
    arrays = {name: jnp.full(x.shape, count, x.dtype) for name, x in numbers.arrays.items()}
    return state | {"counters": state["counters"] | {"step": count}}, Packed(arrays, numbers.layout)

  jitted = jax.jit(idle, donate_argnums=0, in_shardings=(setup.shardings, shardings), keep_unused=True)
  program, state = jitted.lower(setup.abstract, struct).compile(), init_state(setup)
  times = {name: [] for name in ("put", "call", "fetch", "count")}

  def timed(name: str, run: Callable, *args):
    began = time.thread_time()
    result = run(*args)
    times[name].append((time.thread_time() - began) * 1e3)
    return jax.block_until_ready(result)

  def fetch(packed: Packed, stats: metrics.HostStats) -> None:
    window.add(unpack(packed), stats)

  for _ in range(9 * EVERY):
    stats = timed("count", lambda: metrics.HostStats.of(batch, task.flops_fn(batch)))
    held = timed("put", multihost.to_global, batch, shardings, SPEC.rows)
    state, packed = timed("call", program, state, held)
    timed("fetch", fetch, packed, stats)
  return {name: statistics.median(values) for name, values in times.items()}
