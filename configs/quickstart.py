"""Captioned moving shapes, learned on two CPU cores in minutes.

python -m sora_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Presets: "own_data" for your own clips (with --config.data.source=FOLDER_OR_MANIFEST), "debug" for a run of
seconds. Hardware: 2 CPU cores, about 6 minutes. Expected: colour 1.00 and direction 1.00 of 64 held-out
combinations (docs/results.md).
"""

import ml_collections

from configs import common


def get_config(preset: str = "") -> ml_collections.ConfigDict:
  config = common.shapes()
  config.model.size = "XS"
  config.text.width = 64
  config.text.heads = 2
  config.data.rows = 16
  config.data.given_probability = 0.1
  config.data.num_eval = 64
  config.data.num_samples = 20_000
  config.optimizer.name = "muon"
  config.optimizer.b1 = 0.95
  config.train.num_steps = 1200
  config.train.log_every = 25
  config.train.eval_every = 300
  config.train.save_every = 300
  if preset == "own_data":
    config.text.vocab_size = 2048
    config.text.max_tokens = 48
    config.data.max_frames = 8
    config.data.target_fps = 8.0
    config.data.rows = 4
    config.data.row_tokens = 384
    config.data.max_tokens = 192
    config.data.max_padding = 0.03
    config.data.row_samples = 8
    config.data.row_text_tokens = 256
    config.data.num_eval = 8
    # Natural textures do not pass through so narrow a neck as flat shapes.
    config.model.patch_bottleneck = 96
    config.diffusion.shift = 3.0
    config.sample.num_samples = 10
    config.sample.num_seen = 5
    config.optimizer.lr = 4e-3
    config.train.num_steps = 800
    config.train.eval_every = 20
  elif preset == "debug":
    config.model.width, config.model.depth, config.model.heads = 32, 2, 2
    config.data.rows = 2
    config.data.num_samples = 200
    config.data.num_eval = 8
    config.train.num_steps = 4
    config.train.log_every = 2
    config.train.eval_every = 0
    config.train.save_every = 0
    config.sample.num_inference_steps = 2
    config.sample.num_samples = 3
  elif preset:
    raise ValueError(f"configs/quickstart.py has no preset {preset!r}; presets: own_data, debug")
  return config
