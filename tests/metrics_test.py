"""What the host counts of its rows."""

import numpy as np

from sora_jax.benchmark_gpu import batch_of
from sora_jax.models.dit import DiTConfig, model_flops
from sora_jax.training.metrics import HostStats, Window

SCALARS = {
  "grad_norm": np.float32(1),
  "lr": 0.1,
  "skipped": 0,
  "sums": {"loss": (np.float32(2), np.float32(4))},
}


def test_tiles_and_imbalance():
  model, shape = DiTConfig(width=32, depth=2, heads=2), {"channels": 4, "text_dim": 8}
  window = Window(peak=None)
  steps = [([2048], [1024, 1024]), ([512] * 4, [512] * 4)]
  want_imbalance = []
  for rows in steps:
    _, batch = batch_of([np.array(r) for r in rows], 2048, channels=4, caption=2)
    flops = model_flops(model, batch, **shape)
    want_imbalance.append(flops.max() / flops.mean())
    window.add(SCALARS, HostStats.of(batch, flops))
  report = window.report()
  # Tiles of 1,024 by 1,024: 4 and 2 in the first step, 2 and 2 in the second, of 4 in every row.
  assert report["live_tiles"] == (4 + 2 + 2 + 2) / 2
  assert report["live_tile_share"] == 10 / 16
  np.testing.assert_allclose(report["cost_imbalance"], np.mean(want_imbalance))
  assert want_imbalance[0] > 1.05 and want_imbalance[1] == 1


def test_flops_of_the_whole_batch_leave_imbalance_out():
  _, batch = batch_of([np.array([40, 20])], 64, channels=4, caption=2)
  window = Window(peak=None)
  window.add(SCALARS, HostStats.of(batch, 5.0))
  report = window.report()
  assert "cost_imbalance" not in report and report["live_tile_share"] == 1
