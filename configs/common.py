"""Defaults shared by every config. Each section splats into the dataclass named beside it."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = "text_to_video"
  config.seed = 0

  # sora_jax/models/dit.py DiTConfig; width, depth, heads 0 = those of the size
  config.model = ml_collections.ConfigDict()
  config.model.size = "S"
  config.model.width = 0
  config.model.depth = 0
  config.model.heads = 0
  config.model.mlp_ratio = 4.0
  config.model.patch_bottleneck = 0
  config.model.rope_theta = 100.0
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

  config.data = _data()

  config.optimizer = _optimizer()

  # sora_jax/parallel/mesh.py MeshConfig; -1 = the rest of the devices
  config.mesh = ml_collections.ConfigDict()
  config.mesh.replica = 1
  config.mesh.fsdp = -1
  config.mesh.context = 1
  config.mesh.tensor = 1

  # sora_jax/training/loop.py TrainConfig; its seed is config.seed
  config.train = ml_collections.ConfigDict()
  config.train.num_steps = 10_000
  config.train.accumulate = 1
  config.train.log_every = 10
  config.train.eval_every = 0
  config.train.save_every = 500
  config.train.keep = 3
  config.train.max_skipped = 50
  config.train.tensorboard = True

  # sora_jax/generate.py SampleConfig: the defaults of sora_jax.sample and of the grids during training
  config.sample = ml_collections.ConfigDict()
  config.sample.sampler = "euler"
  config.sample.num_inference_steps = 25
  config.sample.guidance_scale = 4.0
  config.sample.every = 0
  config.sample.num_samples = 8
  config.sample.num_seen = 0
  return config


def _data() -> ml_collections.ConfigDict:
  """data_pipelines/config.py DataConfig, where each key is explained."""
  data = ml_collections.ConfigDict()
  data.source = "synthetic"
  data.source_kwargs = ml_collections.ConfigDict()
  data.format = ""
  data.data_root = ""
  data.media_column = ""
  data.caption_column = ""
  data.captions_optional = False
  data.allow_outside_root = False
  data.frame_rate = 24.0
  data.min_size = 32
  data.max_aspect = 8.0
  data.decode_limit_s = 120.0
  data.index_dir = ""
  data.num_samples = 100_000
  data.seed = 0
  data.patch = (1, 16, 16)
  data.max_tokens = 0
  data.max_padding = 0.0
  data.max_frames = 0
  data.target_fps = 0.0
  data.random_start = True
  data.rows = 8
  data.row_tokens = 1024
  data.row_samples = 16
  data.row_text_tokens = 256
  data.packing = "best_fit"
  data.packing_window = 4096
  data.packing_cost = (1.0, 0.0004)  # 24 d sum(l) + 4 sum(l^2) at width d = 384
  data.given_probability = 0.0
  data.given_image_share = 0.5
  data.num_eval = 0
  data.eval_fraction = 0.0
  data.threads = 4
  data.workers = 0
  data.prefetch = 2
  data.cache_mb = 1024
  return data


def _optimizer() -> ml_collections.ConfigDict:
  """sora_jax/training/optimizer.py OptimizerConfig."""
  optimizer = ml_collections.ConfigDict()
  optimizer.name = "adamw"
  optimizer.lr = 1e-3
  optimizer.warmup_steps = 100
  optimizer.schedule = "constant"
  optimizer.final_lr_ratio = 0.0
  optimizer.b1 = 0.9
  optimizer.b2 = 0.95
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.0
  optimizer.clip_norm = 1.0
  optimizer.ema_decay = 0.999
  return optimizer
