"""Text to video, 5 B parameters, rows of 65,536 tokens, on 64 chips.

python -m sora_jax.train --config=configs/t2v_5b.py --workdir=DIR --config.data.source=MANIFEST
python -m sora_jax.rehearse --config=configs/t2v_5b.py

Hardware: one slice v5p:4x4x4 (64 chips). Not run on hardware; rehearsed: 27.2 of 95.7 GiB a chip, a step of
4.1 s at best (docs/results.md).

Trains on pixels with the geometry of latents, as configs/t2v_700m.py says. Preset "debug": a tiny one for a
CPU.
"""

import ml_collections

from configs import common


def get_config(preset: str = "") -> ml_collections.ConfigDict:
  config = common.pod()
  config.model.width, config.model.depth, config.model.heads = 3072, 24, 24
  config.model.patch_bottleneck = 512
  config.text.width, config.text.heads = 1024, 8
  config.data.rows = 32
  config.data.row_tokens = 65_536
  config.data.row_samples = 64
  config.data.row_text_tokens = 2048
  config.optimizer.lr = 1e-4
  config.mesh.context = 4  # one dim of the torus
  config.rehearse.topologies = ("v5p:4x4x4",)
  return common.debug(config, preset, __file__)
