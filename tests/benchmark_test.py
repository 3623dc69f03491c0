"""The benchmarks' counts, and the GPU benchmark's code path at a tiny size."""

import numpy as np
import pytest

from sora_jax import benchmark_flops, benchmark_gpu, benchmark_packing
from sora_jax.models.dit import DiTConfig, linear_flops, model_flops
from sora_jax.nn.attention_tpu import Blocks

TINY = DiTConfig(width=16, depth=1, heads=2)


def test_counted_flops():
  """Samples of whole tiles: skipping counts their squares, dense the square of the row."""
  rows = [np.array([128, 256, 128])] * 2
  counted = benchmark_flops.count(TINY, rows, 512, Blocks(128, 128, 0))
  linear = 3 * linear_flops(
    TINY, tokens=1024, text_tokens=2 * 3 * 128, samples=6, channels=64, text_dim=benchmark_flops.TEXT_DIM
  )
  pair = 2 * 16 * 9  # a product of one pair of tokens over all heads
  text = 128 * (128 + 256 + 128)
  np.testing.assert_allclose(counted["skipping"], linear + 2 * pair * (128**2 + 256**2 + 128**2 + text))
  np.testing.assert_allclose(counted["dense"], linear + 2 * pair * (512**2 + 512 * 384))
  assert counted["live_share"] == (1 + 4 + 1) / 16


def test_flops_by_row_add_up():
  _, batch = benchmark_gpu.batch_of([np.array([40, 20]), np.array([60])], 64, channels=4, caption=3)
  flops = model_flops(TINY, batch, channels=4, text_dim=8)
  assert flops.shape == (2,)
  shape = {"channels": 4, "text_dim": 8}
  linear = [linear_flops(TINY, tokens=60, text_tokens=3 * n, samples=n, **shape) for n in (2, 1)]
  pairs = [40**2 + 20**2 + 60 * 3, 60**2 + 60 * 3]
  np.testing.assert_allclose(flops, [3 * (a + 4 * 16 * b) for a, b in zip(linear, pairs)])


@pytest.mark.slow
def test_gpu_benchmark_runs():
  """Every side, at a tiny size on this machine: same real tokens and model FLOPs on all."""
  (line,) = benchmark_gpu.measure({"tiny": TINY}, (256,), repeats=1)
  assert line["samples"] >= 2 and 128 < line["real_tokens"] <= 256 <= line["padded_tokens_of_buckets"]
  sides = [line[side] for side in ("packed", "dense", "bucketed")]
  assert all(side["step_s"] > 0 and side["mfu"] is None for side in sides)
  assert len({side["model_tflop"] for side in sides}) == 1
  assert "float32" in line["cudnn"]
  assert benchmark_gpu.run() is None


def test_buckets():
  buckets = benchmark_gpu.buckets_of([np.array([8, 9]), np.array([16, 5])])
  assert {size: [int(x[0]) for x in samples] for size, samples in buckets.items()} == {8: [8, 5], 16: [9, 16]}


def test_layouts_hold_the_same_samples_at_equal_compute():
  lengths = benchmark_packing.lengths_of(600)
  sides = benchmark_packing.layouts(lengths, 4, 1024, 128)
  assert list(sides) == ["packed, best_fit", "packed, greedy", "bucketed", "padded"]
  for side, batches in sides.items():
    slots = 0.0
    for rows, length, steps in batches:
      assert all(row.sum() <= length for row in rows) and 3072 < len(rows) * length <= 4096, side
      slots += steps * len(rows) * length
    waste = 1 - lengths.sum() / slots
    assert waste < {"packed, best_fit": 0.03, "packed, greedy": 0.04, "bucketed": 0.12, "padded": 0.9}[side]
    if not side.startswith("packed"):
      assert sum(len(rows) * steps for rows, _, steps in batches) == pytest.approx(len(lengths))
  planned = np.concatenate(benchmark_packing.packed_rows(lengths, 1024, "best_fit", 128))
  assert sorted(planned.tolist()) == sorted(lengths.tolist())


@pytest.mark.slow
def test_packing_benchmark_runs():
  lengths = benchmark_packing.lengths_of(40) // 8
  made = benchmark_packing.programs(TINY, rows=1, row_tokens=128, lengths=lengths)
  for program in made:
    program.run()
  times = [{"wall_s": float(p.slots), "cpu_s": 2.0 * p.slots} for p in made]  # as if all slots cost alike
  result = benchmark_packing.summarised(made, times, int(lengths.sum()))
  for side in result.values():
    assert side["tokens_per_s"] == pytest.approx(1 - side["padding_percent"] / 100, abs=0.06)
  assert result["packed, best_fit"]["tokens_per_s_over_padded"] > 1.3 and result["padded"]["programs"] == 1
