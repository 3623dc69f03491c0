"""Text to video, 0.8 B parameters (DiT-XL class), rows of 8,192 tokens, on 16 or 64 small chips.

python -m sora_jax.train --config=configs/t2v_700m.py --workdir=DIR --config.data.source=MANIFEST
python -m sora_jax.rehearse --config=configs/t2v_700m.py[:v6e]

Hardware: one slice v5e:4x4 (16 chips), or v6e:8x8 (64) with the preset "v6e". Not run on hardware; rehearsed:
9.1 of 15.8 GiB a chip and 4.8 of 31.2 (docs/results.md).

Trains on pixels: a patch of 4 x 16 x 16 pixels is a token, the geometry of a latent compressed 4 x 8 x 8 with
patches of 1 x 2 x 2, through a bottleneck. With latents only data.patch and the bottleneck change. Presets:
"v6e", and "debug", a tiny one for a CPU.
"""

import ml_collections

from configs import common

PODS = ("", "v6e")  # presets that rehearse --all compiles


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
  config.rehearse.topologies = ("v5e:4x4",)
  if preset == "v6e":
    config.mesh.replica = 8  # split over all 64 chips, 16 rows of a weight a chip, gathers go as all-reduces
    config.rehearse.topologies = ("v6e:8x8",)
    return config
  return common.debug(config, preset, __file__)
