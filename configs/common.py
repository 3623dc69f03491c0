"""Defaults shared by every config. Each section splats into the dataclass named beside it."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = "text_to_video"
  config.seed = 0

  # sora_jax/models/dit.py DiTConfig
  config.model = ml_collections.ConfigDict()
  config.model.size = "S"
  config.model.dtype = "float32"
  config.model.remat = "dots"
  config.model.attention = "auto"

  # sora_jax/conditioning/text.py TextConfig; vocab_size is an upper bound, the captions decide
  config.text = ml_collections.ConfigDict()
  config.text.vocab_size = 4096
  config.text.max_tokens = 64
  config.text.width = 256
  config.text.depth = 2
  config.text.heads = 4

  # sora_jax/diffusion/objectives.py ObjectiveConfig
  config.diffusion = ml_collections.ConfigDict()
  config.diffusion.path = "rectified_flow"
  config.diffusion.prediction = "velocity"
  config.diffusion.loss_space = "velocity"
  config.diffusion.time_sampling = "logit_normal"
  config.diffusion.logit_mean = 0.0
  config.diffusion.logit_std = 1.0
  config.diffusion.shift = 1.0
  config.diffusion.shift_base_tokens = 0
  config.diffusion.floor = 0.05
  config.diffusion.caption_drop = 0.1

  # data_pipelines/pipeline.py DataConfig
  config.data = ml_collections.ConfigDict()
  config.data.source = "synthetic"
  config.data.patch = (1, 16, 16)
  config.data.rows = 8
  config.data.row_tokens = 1024

  # sora_jax/training/optimizer.py OptimizerConfig
  config.optimizer = ml_collections.ConfigDict()

  # sora_jax/parallel/mesh.py MeshConfig
  config.mesh = ml_collections.ConfigDict()
  config.mesh.replica = 1
  config.mesh.fsdp = -1
  config.mesh.context = 1
  config.mesh.tensor = 1

  # sora_jax/training/loop.py TrainConfig
  config.train = ml_collections.ConfigDict()
  config.train.num_steps = 10_000

  # sora_jax/generate.py SampleConfig: the defaults of sora_jax.sample and of the grids during training
  config.sample = ml_collections.ConfigDict()
  config.sample.sampler = "euler"
  config.sample.num_inference_steps = 25
  config.sample.guidance_scale = 4.0
  return config
