"""Text to video, 30 B parameters, rows of 262,144 tokens, on 512 chips, or 1,024 in two slices.

python -m sora_jax.train --config=configs/t2v_30b.py --workdir=DIR --config.data.source=MANIFEST
python -m sora_jax.rehearse --config=configs/t2v_30b.py

Hardware: v5p:8x8x8 (512 chips), or two such slices, each holding all parameters: then gradients alone cross
the network between them. Not run on hardware; rehearsed: 60.0 of 95.7 GiB a chip, a step of 18.0 s at best
(docs/results.md).

Trains on pixels with the geometry of latents, as configs/t2v_700m.py says. Presets: "two_slices",
and "debug", a tiny one for a CPU.
"""

import ml_collections

from configs import common

PODS = ("", "two_slices")  # presets that rehearse --all compiles


def get_config(preset: str = "") -> ml_collections.ConfigDict:
  config = common.pod()
  # 22 width^2 a block with its modulation and cross-attention: 36 blocks are 30 B (64 would be 53 B).
  config.model.width, config.model.depth, config.model.heads = 6144, 36, 48
  config.model.patch_bottleneck = 1024
  config.text.width, config.text.heads = 1024, 8
  config.data.rows = 64
  config.data.row_tokens = 262_144
  config.data.row_samples = 128
  config.data.row_text_tokens = 4096
  config.optimizer.lr = 5e-5
  config.mesh.replica = -1  # one a slice
  config.mesh.fsdp = 64  # two dims of the torus
  config.mesh.context = 8  # the third
  config.rehearse.topologies = ("v5p:8x8x8",)
  if preset == "two_slices":
    config.data.rows = 128
    config.rehearse.topologies = ("v5p:8x8x8*2",)
    return config
  return common.debug(config, preset, __file__)
