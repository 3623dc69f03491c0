"""Base of a scaling ladder on captioned moving shapes: what all its runs share.

python -m sora_jax.scaling_laws plan --config=configs/scaling.py --sizes=16x2x1,24x2x2,32x3x2,48x3x3,64x4x4 \\
  --budgets=2.5e10,5e10,1e11,1.4e11,2e11,2.8e11,4e11,8e11 --min_steps=250 --seeds=1 --output=runs/ladder
python -m sora_jax.scaling_laws run --plan=runs/ladder/plan.json --workers=2

The quickstart's recipe (Muon) with smaller batches, so that small budgets still buy some steps. The plan sets
width, depth, heads, steps and warm-up of each run. Preset "debug": runs of seconds. Hardware: 2 CPU cores;
figures: docs/scaling_laws.md.
"""

import ml_collections

from configs import common


def get_config(preset: str = "") -> ml_collections.ConfigDict:
  config = common.shapes()
  config.model.width, config.model.depth, config.model.heads = 32, 3, 4
  config.model.remat = "none"  # little to store, and quicker to compile
  config.text.width = 16
  config.text.heads = 1
  config.data.rows = 4
  config.data.num_eval = 128
  config.data.num_samples = 10_000
  # Its own products are no model FLOPs; at equal compute it is 10 % ahead of AdamW all the same (width 32).
  config.optimizer.name = "muon"
  config.optimizer.b1 = 0.95
  config.train.num_steps = 1000
  config.train.log_every = 50
  config.train.save_every = 500
  config.train.keep = 1
  config.train.tensorboard = False
  config.sample.num_samples = 0  # no grids on the way: `measure` samples at the end
  if preset == "debug":
    config.data.rows = 2
    config.data.num_samples = 200
    config.data.num_eval = 16
    config.train.log_every = 5
    config.sample.num_inference_steps = 2
  elif preset:
    raise ValueError(f"configs/scaling.py has no preset {preset!r}; presets: debug")
  return config
