"""Text to video, 0.8 B parameters (DiT-XL class), rows of 8,192 tokens, on 16 or 64 small chips.

python -m sora_jax.train --config=configs/t2v_700m.py --workdir=DIR --config.data.source=MANIFEST
python -m sora_jax.rehearse --config=configs/t2v_700m.py

Hardware: one slice v5e:4x4 (16 chips) or v6e:8x8 (64). Not run on hardware; rehearsed: 9.1 of 15.8 GiB a chip
and 2.9 of 31.2 (docs/results.md).

Trains on pixels: a patch of 4 x 16 x 16 pixels is a token, the geometry of a latent compressed 4 x 8 x 8 with
patches of 1 x 2 x 2, through a bottleneck. With latents only data.patch and the bottleneck change. Preset
"debug": a tiny one for a CPU.
"""

import ml_collections

from configs import common


def get_config(preset: str = "") -> ml_collections.ConfigDict:
  config = common.pod()
  # 1024 rather than DiT-XL's 1152: split over 64 chips it leaves whole tiles.
  config.model.width, config.model.depth, config.model.heads = 1024, 30, 16
  config.model.patch_bottleneck = 256
  config.text.width, config.text.depth, config.text.heads = 1024, 2, 16  # width: for the same reason
  config.data.rows = 64
  config.data.row_tokens = 8192  # of 16,384 a v5e would need 18.8 GiB
  config.data.row_samples = 32
  config.data.row_text_tokens = 1024
  config.optimizer.lr = 2e-4
  config.rehearse.mix = "256px"
  config.rehearse.topologies = ("v5e:4x4", "v6e:8x8")
  return common.debug(config, preset, __file__)
