"""Step time on a GPU: packed rows against the same rows with dense attention, and against padded buckets.

All three sides train on the same samples, so at equal real tokens. Packed rows skip what is masked; "dense"
computes every score of a row and masks; "bucketed" gives each sample a row of its own, padded to the next
power of two, one program a bucket, and its time is that of all buckets.
"""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.nn import attention_gpu
from sora_jax.packing.plan import plan_window
from sora_jax.parallel import peaks
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.tasks import text_to_video
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.state import init_state, make_setup
from sora_jax.training.step import make_train_step
from sora_jax.types import BatchSpec, TokenBatch

SIZES = ("S", "XL")
ROW_TOKENS = (8192, 16384, 32768, 65536)
CHANNELS, CAPTION = 64, 64
SHORTEST = 32  # samples of a row have between 1 / SHORTEST and 1 / 2 of its tokens


def make_step(
  model: DiTConfig, spec: BatchSpec, batch: TokenBatch, text: TextConfig | None = None
) -> tuple[Callable[[], object], float]:
  """The step that training runs, on one device, and its model FLOPs."""
  task = text_to_video.build(
    model=model, text_config=text or TextConfig(), diffusion=ObjectiveConfig(), batch_spec=spec
  )
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  setup = make_setup(task, optimizer=OptimizerConfig(), num_steps=1000, mesh=mesh, seed=0)
  with jax.set_mesh(mesh):
    step = make_train_step(setup, batch=batch)
    held = {"state": init_state(setup)}
  flops = float(np.sum(task.flops_fn(batch)))
  batch = jax.device_put(batch, jax.devices()[0])

  def run():
    with jax.set_mesh(mesh):
      held["state"], scalars = step(held["state"], batch)
    return scalars

  return run, flops


def batch_of(rows: list[np.ndarray], row_tokens: int, *, channels: int, caption: int):
  """(spec, random batch) of samples of these lengths, each an image one token high."""
  rng, samples = np.random.default_rng(0), max(map(len, rows))
  spec = BatchSpec(
    rows=len(rows), tokens=row_tokens, channels=channels, samples=samples, text_tokens=samples * caption
  )
  batch = spec.zeros()
  batch.tokens_BLC[:] = rng.normal(size=batch.tokens_BLC.shape)
  batch.text_ids_BM[:] = rng.integers(4, 200, batch.text_ids_BM.shape)
  for b, lengths in enumerate(rows):
    start = 0
    for n, length in enumerate(lengths.tolist()):
      here = slice(start, start := start + length)
      batch.segment_BL[b, here] = n + 1
      batch.position_BL3[b, here, 2] = np.arange(length)
      batch.grid_BN3[b, n] = 1, 1, length
      batch.text_segment_BM[b, n * caption : (n + 1) * caption] = n + 1
      batch.sample_id_BN[b, n] = b * samples + n
  return spec, batch


def draw_lengths(row_tokens: int, rows: int) -> list[np.ndarray]:
  """Rows of samples whose lengths are log-uniform, as the planner packs them."""
  rng = np.random.default_rng(0)
  low, high = np.log(row_tokens / SHORTEST), np.log(row_tokens / 2)
  lengths = np.exp(rng.uniform(low, high, size=rows * SHORTEST)).astype(int)
  planned = plan_window(lengths, row_tokens=row_tokens, max_samples=SHORTEST)
  return [lengths[np.array(row)] for row in planned[:rows]]


def buckets_of(rows: list[np.ndarray]) -> dict[int, list[np.ndarray]]:
  """Samples by the power of two that holds them."""
  buckets: dict[int, list[np.ndarray]] = {}
  for length in np.concatenate(rows).tolist():
    buckets.setdefault(1 << (length - 1).bit_length(), []).append(np.array([length]))
  return buckets


def seconds(run: Callable[[], object], repeats: int) -> float:
  """Median of `repeats` steps, after two that compile and warm up."""
  times = []
  for i in range(repeats + 2):
    began = time.perf_counter()
    jax.block_until_ready(run())
    if i >= 2:
      times.append(time.perf_counter() - began)
  return statistics.median(times)


def measure_side(model: DiTConfig, batches: list, repeats: int) -> dict[str, object]:
  total, flops = 0.0, 0.0
  for spec, batch in batches:
    try:
      run, of_batch = make_step(model, spec, batch)
      total, flops = total + seconds(run, repeats), flops + of_batch
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {"step_s": None, "why": "out of memory"}
  peak = peaks.peak_flops(jax.devices()[:1])
  mfu = round(flops / total / peak, 4) if peak else None
  return {"step_s": round(total, 5), "model_tflop": round(flops / 1e12, 4), "mfu": mfu}


def measure(
  models: dict[str, DiTConfig], row_tokens: tuple[int, ...], *, rows: int = 1, repeats: int = 5
) -> list[dict]:
  """One dict for every model and length; `attention` of the models is set here."""
  result = []
  for name, model in models.items():
    for tokens in row_tokens:
      lengths = draw_lengths(tokens, rows)
      shape = {"channels": CHANNELS, "caption": CAPTION}
      packed = [batch_of(lengths, tokens, **shape)]
      bucketed = [batch_of(samples, size, **shape) for size, samples in sorted(buckets_of(lengths).items())]
      of = lambda attention, model=model: DiTConfig(  # noqa: E731
        width=model.width, depth=model.depth, heads=model.heads, dtype=model.dtype, attention=attention
      )
      result.append(
        {
          "model": name,
          "row_tokens": tokens,
          "real_tokens": int(sum(x.sum() for x in lengths)),
          "samples": sum(map(len, lengths)),
          "padded_tokens_of_buckets": sum(spec.rows * spec.tokens for spec, _ in bucketed),
          "cudnn": attention_gpu.refusal(model.dtype, model.width // model.heads, packed[0][0].samples)
          or "used",
          "packed": measure_side(of("auto"), packed, repeats),
          "dense": measure_side(of("dense"), packed, repeats),
          "bucketed": measure_side(of("auto"), bucketed, repeats),
        }
      )
  return result


def run() -> dict[str, object] | None:
  """The table of docs/results.md; None where there is no GPU."""
  if jax.default_backend() != "gpu":
    return None
  models = {size: DiTConfig(size=size, dtype="bfloat16") for size in SIZES}
  peak = peaks.peak_flops(jax.devices()[:1])
  return {"peak_tflops": peak and peak / 1e12, "results": measure(models, ROW_TOKENS)}
