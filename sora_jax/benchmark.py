"""Measures this machine: one JSON line.

  python -m sora_jax.benchmark --what=step [--width=384 --depth=12 --heads=6 --rows=8 --tokens=256]
  python -m sora_jax.benchmark --what=attention [--tokens=8192 --segments=8 --heads=6 --repeats=3]
  python -m sora_jax.benchmark --what=flops    counted, nothing is run: a table of docs/results.md
  python -m sora_jax.benchmark --what=gpu      S and XL at 8k to 64k tokens; without a GPU it says so
  python -m sora_jax.benchmark --what=packing  packed, bucketed, padded rows of one set [--rows=4 ...]
  python -m sora_jax.benchmark --what=overhead

Ours and its yardstick take turns, so that what else runs on the machine hits both alike. CPU seconds say more
than wall seconds on a shared machine.
"""

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from sora_jax import benchmark_baseline, benchmark_flops, benchmark_gpu, benchmark_overhead, benchmark_packing
from sora_jax.models.dit import DiTConfig
from sora_jax.nn.attention_chunked import attend_chunked
from sora_jax.nn.attention_dense import attend_dense
from sora_jax.types import BatchSpec, TokenBatch

_WHAT = flags.DEFINE_enum(
  "what", "step", ["step", "attention", "packing", "overhead", "flops", "gpu"], "what to measure"
)
_WIDTH = flags.DEFINE_integer("width", 384, "model width", lower_bound=8)
_DEPTH = flags.DEFINE_integer("depth", 12, "blocks", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 6, "attention heads", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 0, "rows of a batch; 0 = 8 for a step, 1 for attention")
_TOKENS = flags.DEFINE_integer("tokens", 0, "tokens of a row; 0 = 256 for a step, 8192 for attention")
_SEGMENTS = flags.DEFINE_integer("segments", 0, "equal samples of a row; 0 = 1 for a step, 8 for attention")
_CHANNELS = flags.DEFINE_integer("channels", 16, "channels of a patch", lower_bound=1)
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 16, "text tokens of a sample", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each side", lower_bound=1)
_ONLY_OURS = flags.DEFINE_bool("only_ours", False, "leave the yardstick out")

Timing = dict[str, float]


def cpu_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def take_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Timing]]:
  """Wall and CPU seconds of `repeats` calls of each run, one of each in turn, after a warm-up call."""
  for run in runs.values():
    jax.block_until_ready(run())
  timings = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), cpu_seconds()
      jax.block_until_ready(run())
      timings[name].append({"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu})
  return timings


def summary(timings: list[Timing], flops: float) -> dict[str, float]:
  """Medians, the spread (max - min) / median of the wall time, and useful work per CPU second."""
  wall = [t["wall_s"] for t in timings]
  cpu = statistics.median(t["cpu_s"] for t in timings)
  median = statistics.median(wall)
  return {
    "wall_s": round(median, 4),
    "wall_s_min": round(min(wall), 4),
    "wall_spread": round((max(wall) - min(wall)) / median, 3),
    "cpu_s": round(cpu, 4),
    "model_gflop": round(flops / 1e9, 2),
    "model_gflop_per_cpu_s": round(flops / 1e9 / cpu, 1),
  }


def machine() -> dict[str, object]:
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "cpu": platform.processor() or platform.machine(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def full_batch(spec: BatchSpec, grid: tuple[int, int, int]) -> TokenBatch:
  """Random rows without padding: `spec.samples` equal samples of `grid`, text tokens shared out alike."""
  rng = np.random.default_rng(0)
  B, L, N, M = spec.rows, spec.tokens, spec.samples, spec.text_tokens
  position = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
  return TokenBatch(
    tokens_BLC=rng.normal(size=(B, L, spec.channels)).astype(np.float32),
    segment_BL=np.tile(np.repeat(np.arange(1, N + 1, dtype=np.int32), L // N), (B, 1)),
    position_BL3=np.tile(position.astype(np.float32), (B, N, 1)),
    given_BL=np.zeros((B, L), bool),
    text_ids_BM=rng.integers(4, 200, (B, M)).astype(np.int32),
    text_segment_BM=np.tile(np.repeat(np.arange(1, N + 1, dtype=np.int32), M // N), (B, 1)),
    grid_BN3=np.tile(np.asarray(grid, np.int32), (B, N, 1)),
    fps_BN=np.full((B, N), 8, np.float32),
    label_BN=np.full((B, N), -1, np.int32),
    sample_id_BN=np.arange(B * N, dtype=np.int32).reshape(B, N),
    unreadable_B=np.zeros(B, np.int32),
  )


def our_step(spec: BatchSpec) -> tuple[Callable[[], object], float]:
  """The step that training runs, on one device."""
  length = spec.tokens // spec.samples
  frames = 4 if length % 4 == 0 else 1
  batch = full_batch(spec, (frames, 1, length // frames))
  model = DiTConfig(width=_WIDTH.value, depth=_DEPTH.value, heads=_HEADS.value)
  return benchmark_gpu.make_step(model, spec, batch)


def plain_step(spec: BatchSpec) -> tuple[Callable[[], object], float]:
  width, depth = _WIDTH.value, _DEPTH.value
  params = benchmark_baseline.init(jax.random.key(0), width=width, depth=depth, channels=spec.channels)
  optimizer, step = benchmark_baseline.make_step(heads=_HEADS.value)
  held = {"state": (params, optimizer.init(params)), "key": jax.random.key(1)}
  x = jax.random.normal(jax.random.key(2), (spec.rows, spec.tokens, spec.channels))

  def run():
    held["key"] = jax.random.fold_in(held["key"], 0)
    held["state"], loss = step(held["state"], x, held["key"])
    return loss

  tokens = spec.rows * spec.tokens
  per_token = depth * (12 * width**2 + 2 * width * spec.tokens) + 2 * spec.channels * width
  per_row = depth * 6 * width**2 + 4 * width**2
  return run, 6.0 * (tokens * per_token + spec.rows * per_row)


def measure_step() -> dict[str, object]:
  segments = _SEGMENTS.value or 1
  spec = BatchSpec(
    rows=_ROWS.value or 8,
    tokens=_TOKENS.value or 256,
    channels=_CHANNELS.value,
    samples=segments,
    text_tokens=_TEXT_TOKENS.value * segments,
  )
  sides = {"ours": our_step(spec)}
  if not _ONLY_OURS.value:
    sides["plain"] = plain_step(spec)
  timings = take_turns({name: run for name, (run, _) in sides.items()}, _REPEATS.value)
  result = {name: summary(timings[name], flops) for name, (_, flops) in sides.items()}
  if "plain" in result:
    result["ours_over_plain_wall"] = round(result["ours"]["wall_s"] / result["plain"]["wall_s"], 3)
    result["ours_over_plain_cpu"] = round(result["ours"]["cpu_s"] / result["plain"]["cpu_s"], 3)
  shape = {"width": _WIDTH.value, "depth": _DEPTH.value, "heads": _HEADS.value}
  return {**shape, "rows": spec.rows, "tokens": spec.tokens, "segments": segments, **result}


def attention_grad(attend, rows: int, tokens: int, segments: int):
  """(compiled gradient, its arguments) of attention over `segments` equal samples a row."""
  size = _WIDTH.value // _HEADS.value
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (rows, tokens, _HEADS.value, size)) for key in keys)
  segment = jnp.tile(jnp.repeat(jnp.arange(1, segments + 1, dtype=jnp.int32), tokens // segments), (rows, 1))

  def loss(q, k, v, segment):
    return jnp.square(attend(q, k, v, segment, segment)).sum()

  args = (q, k, v, segment)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args).compile(), args


def measure_attention() -> dict[str, object]:
  rows, tokens, segments = _ROWS.value or 1, _TOKENS.value or 8192, _SEGMENTS.value or 8
  sides = {"ours": attend_chunked}
  if not _ONLY_OURS.value:
    sides["dense"] = attend_dense
  runs, extra = {}, {}
  for name, attend in sides.items():
    compiled, args = attention_grad(attend, rows, tokens, segments)
    runs[name] = lambda compiled=compiled, args=args: compiled(*args)
    # Samples of one length, rows of two: linear memory doubles, quadratic memory grows fourfold.
    extra[name] = {
      str(n): attention_grad(attend, rows, n, segments * n // tokens or 1)[0].memory_analysis()
      for n in (tokens // 2, tokens)
    }
  gflop = 3 * 4 * _WIDTH.value * rows * tokens * (tokens // segments)
  result = {name: summary(t, gflop) for name, t in take_turns(runs, _REPEATS.value).items()}
  for name, by_length in extra.items():
    result[name]["temp_mb"] = {n: round(m.temp_size_in_bytes / 1e6, 1) for n, m in by_length.items()}
  if "dense" in result:
    result["dense_over_ours_wall"] = round(result["dense"]["wall_s"] / result["ours"]["wall_s"], 2)
    result["dense_over_ours_cpu"] = round(result["dense"]["cpu_s"] / result["ours"]["cpu_s"], 2)
  return {"rows": rows, "tokens": tokens, "segments": segments, "heads": _HEADS.value, **result}


def measure_packing() -> dict[str, object]:
  rows, row_tokens = _ROWS.value or 4, _TOKENS.value or 1024
  is_sized = any(flags.FLAGS[name].present for name in ("width", "depth", "heads"))
  sizes = {"width": _WIDTH.value, "depth": _DEPTH.value, "heads": _HEADS.value} if is_sized else {}
  model, lengths = DiTConfig(size="XS", **sizes), benchmark_packing.lengths_of()
  made = benchmark_packing.programs(model, rows=rows, row_tokens=row_tokens, lengths=lengths)
  timings = take_turns({str(n): p.run for n, p in enumerate(made)}, _REPEATS.value)
  medians = [
    {key: statistics.median(t[key] for t in turns) for key in turns[0]} for turns in timings.values()
  ]
  return {
    "width": model.width,
    "depth": model.depth,
    "tokens_of_a_step": rows * row_tokens,
    "samples": len(lengths),
    "tokens_of_samples": [int(lengths.min()), float(np.median(lengths)), int(lengths.max())],
    "sides": benchmark_packing.summarised(made, medians, int(lengths.sum())),
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if _WIDTH.value % (2 * _HEADS.value):
    raise app.UsageError(f"--width={_WIDTH.value} must be an even multiple of --heads={_HEADS.value}")
  logging.set_verbosity(logging.WARNING)
  if _WHAT.value == "flops":
    print(benchmark_flops.markdown(benchmark_flops.table()), flush=True)
    return
  if _WHAT.value == "gpu":
    measured = benchmark_gpu.run()
    print(json.dumps({"what": "gpu", **measured, **machine()}) if measured else "not run: no GPU", flush=True)
    return
  print(f"measuring {_WHAT.value}, {_REPEATS.value} repeats: a minute or more", file=sys.stderr, flush=True)
  measured = {
    "step": measure_step, "attention": measure_attention, "packing": measure_packing,
    "overhead": benchmark_overhead.measure,
  }[_WHAT.value]()  # fmt: skip
  print(json.dumps({"what": _WHAT.value, **measured, "repeats": _REPEATS.value, **machine()}), flush=True)


if __name__ == "__main__":
  app.run(main)
