"""Defaults shared by every config. Each section splats into the dataclass named beside it."""

import ml_collections


def model() -> ml_collections.ConfigDict:
  """sora_jax/models/dit.py DiTConfig; width, depth, heads 0 = those of the size."""
  c = ml_collections.ConfigDict()
  c.size = "S"
  c.width = 0
  c.depth = 0
  c.heads = 0
  c.mlp_ratio = 4.0
  c.patch_bottleneck = 0
  c.rope_theta = 100.0
  c.dtype = "float32"
  c.remat = "dots"
  c.attention = "auto"
  return c


def text() -> ml_collections.ConfigDict:
  """sora_jax/conditioning/text.py TextConfig; vocab_size is an upper bound, the captions decide."""
  c = ml_collections.ConfigDict()
  c.vocab_size = 4096
  c.max_tokens = 64
  c.width = 256
  c.depth = 2
  c.heads = 4
  return c


def diffusion() -> ml_collections.ConfigDict:
  """sora_jax/diffusion/objectives.py ObjectiveConfig."""
  c = ml_collections.ConfigDict()
  c.path = "rectified_flow"
  c.prediction = "velocity"
  c.loss_space = "velocity"
  c.time_sampling = "logit_normal"
  c.logit_mean = 0.0
  c.logit_std = 1.0
  c.shift = 1.0
  c.shift_base_tokens = 0
  c.floor = 0.05
  c.caption_drop = 0.1
  return c


def data() -> ml_collections.ConfigDict:
  """data_pipelines/config.py DataConfig, where each key is explained."""
  c = ml_collections.ConfigDict()
  c.source = "synthetic"
  c.source_kwargs = ml_collections.ConfigDict()
  c.format = ""
  c.data_root = ""
  c.media_column = ""
  c.caption_column = ""
  c.captions_optional = False
  c.allow_outside_root = False
  c.frame_rate = 24.0
  c.min_size = 32
  c.max_aspect = 8.0
  c.decode_limit_s = 120.0
  c.index_dir = ""
  c.num_samples = 100_000
  c.sources = ml_collections.ConfigDict()
  c.seed = 0
  c.latents = ""
  c.latent_channels = 0
  c.patch = (1, 16, 16)
  c.max_tokens = 0
  c.max_padding = 0.0
  c.max_frames = 0
  c.target_fps = 0.0
  c.curriculum = ()
  c.resolutions = (1.0,)
  c.token_drop = token_drop()
  c.random_start = True
  c.rows = 8
  c.row_tokens = 1024
  c.row_samples = 16
  c.row_text_tokens = 256
  c.packing = "best_fit"
  c.packing_window = 4096
  c.packing_cost = (1.0, 0.0004)  # 24 d sum(l) + 4 sum(l^2) at width d = 384
  c.caption_weights = ()
  c.given_probability = 0.0
  c.given_image_share = 0.5
  c.num_eval = 0
  c.eval_fraction = 0.0
  c.threads = 4
  c.workers = 0
  c.prefetch = 2
  c.cache_mb = 1024
  return c


def token_drop() -> ml_collections.ConfigDict:
  """sora_jax/packing/token_drop.py TokenDrop."""
  c = ml_collections.ConfigDict()
  c.rate = 0.0
  c.schedule = "constant"
  c.final_rate = 0.0
  c.sigmoid_steps = 0
  c.distribution = "fixed"
  c.concentration = 4.0
  c.levels = 8
  c.most = 0.9
  c.stop_step = 0
  c.select = "random"
  return c


def optimizer() -> ml_collections.ConfigDict:
  """sora_jax/training/optimizer.py OptimizerConfig."""
  c = ml_collections.ConfigDict()
  c.name = "adamw"
  c.lr = 1e-3
  c.warmup_steps = 100
  c.schedule = "constant"
  c.final_lr_ratio = 0.0
  c.b1 = 0.9
  c.b2 = 0.95
  c.eps = 1e-8
  c.weight_decay = 0.0
  c.clip_norm = 1.0
  c.ema_decay = 0.999
  return c


def mesh() -> ml_collections.ConfigDict:
  """sora_jax/parallel/mesh.py MeshConfig; -1 = the rest of the devices."""
  c = ml_collections.ConfigDict()
  c.replica = 1
  c.fsdp = -1
  c.context = 1
  c.tensor = 1
  return c


def train() -> ml_collections.ConfigDict:
  """sora_jax/training/loop.py TrainConfig; its seed is config.seed."""
  c = ml_collections.ConfigDict()
  c.num_steps = 10_000
  c.accumulate = 1
  c.log_every = 10
  c.eval_every = 0
  c.save_every = 500
  c.keep = 3
  c.max_skipped = 50
  c.tensorboard = True
  return c


def sample() -> ml_collections.ConfigDict:
  """sora_jax/generate.py SampleConfig: the defaults of sora_jax.sample and of the grids during training."""
  c = ml_collections.ConfigDict()
  c.sampler = "euler"
  c.num_inference_steps = 25
  c.guidance_scale = 4.0
  c.every = 0
  c.num_samples = 8
  c.num_seen = 0
  return c


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.task = "text_to_video"
  config.seed = 0
  config.model = model()
  config.text = text()
  config.diffusion = diffusion()
  config.data = data()
  config.optimizer = optimizer()
  config.mesh = mesh()
  config.train = train()
  config.sample = sample()
  return config
