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

  # data_pipelines/config.py DataConfig, where each key is explained
  config.data = ml_collections.ConfigDict()
  config.data.source = "synthetic"
  config.data.source_kwargs = ml_collections.ConfigDict()
  config.data.data_root = ""
  config.data.media_column = ""
  config.data.caption_column = ""
  config.data.captions_optional = False
  config.data.allow_outside_root = False
  config.data.min_size = 32
  config.data.max_aspect = 8.0
  config.data.decode_limit_s = 120.0
  config.data.index_dir = ""
  config.data.num_samples = 100_000
  config.data.seed = 0
  config.data.patch = (1, 16, 16)
  config.data.max_tokens = 0
  config.data.max_padding = 0.0
  config.data.max_frames = 0
  config.data.target_fps = 0.0
  config.data.random_start = True
  config.data.rows = 8
  config.data.row_tokens = 1024
  config.data.row_samples = 16
  config.data.row_text_tokens = 256
  config.data.packing = "best_fit"
  config.data.packing_window = 4096
  config.data.packing_cost = (1.0, 0.0004)  # 24 d sum(l) + 4 sum(l^2) at width d = 384
  config.data.given_probability = 0.0
  config.data.given_image_share = 0.5
  config.data.num_eval = 0
  config.data.eval_fraction = 0.0
  config.data.threads = 4
  config.data.workers = 0
  config.data.prefetch = 2
  config.data.cache_mb = 1024

  # sora_jax/training/optimizer.py OptimizerConfig
  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adamw"
  config.optimizer.lr = 1e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.schedule = "constant"
  config.optimizer.final_lr_ratio = 0.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.999

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
