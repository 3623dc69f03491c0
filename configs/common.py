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
  c.text = ""
  c.text_width = 0
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
  """sora_jax/training/config.py TrainConfig; its seed is config.seed."""
  c = ml_collections.ConfigDict()
  c.num_steps = 10_000
  c.accumulate = 1
  c.log_every = 10
  c.eval_every = 0
  c.save_every = 500
  c.keep = 3
  c.max_skipped = 50
  c.max_rollbacks = 3
  c.spike_zscore = 0.0
  c.spike_window = 200
  c.hang_timeout_s = 600.0
  c.profile_steps = ""
  c.profile_num_steps = 3
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


def rehearse() -> ml_collections.ConfigDict:
  """sora_jax/rehearsal/run.py RehearseConfig: what sora_jax.rehearse compiles for; training ignores it."""
  c = ml_collections.ConfigDict()
  c.topologies = ()
  c.mix = "480p"
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
  config.rehearse = rehearse()
  return config


def shapes() -> ml_collections.ConfigDict:
  """What the configs on captioned moving shapes share: a small network on patches of raw pixels."""
  config = get_config()
  config.model.patch_bottleneck = 32
  config.text.vocab_size = 512
  config.text.max_tokens = 16
  config.text.depth = 1
  # In pixel space a token is wider than the network: predict the clean patch, not its noise.
  config.diffusion.prediction = "x0"
  config.diffusion.floor = 0.3
  # A patch of hundreds of alike pixels can be read through much noise: what and where is decided at t ~ 0.9.
  config.diffusion.shift = 4.0
  config.data.patch = (2, 8, 8)
  # Short rows: on a CPU the cost of attention follows the row, not the sample.
  config.data.row_tokens = 96
  config.data.row_samples = 8
  config.data.row_text_tokens = 80
  config.optimizer.lr = 5e-3
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.01
  config.optimizer.warmup_steps = 50
  config.optimizer.schedule = "cosine"
  config.optimizer.ema_decay = 0.98
  config.sample.num_inference_steps = 20
  config.sample.guidance_scale = 1.5
  return config


def pod() -> ml_collections.ConfigDict:
  """What the configs for slices of many chips share."""
  config = get_config()
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.text.vocab_size = 32_768
  config.text.max_tokens = 128
  config.text.depth = 4
  # Pixels in the geometry of latents: 4 frames x 8 x 8 pixels compressed to one, in patches of 1 x 2 x 2.
  config.data.patch = (4, 16, 16)
  config.diffusion.prediction = "x0"
  config.diffusion.shift = 3.0
  config.data.given_probability = 0.2
  config.data.num_eval = 64
  config.optimizer.warmup_steps = 2000
  config.optimizer.weight_decay = 0.01
  config.optimizer.ema_decay = 0.9999
  config.train.num_steps = 200_000
  config.train.log_every = 20
  config.train.save_every = 1000
  return config


def debug(config: ml_collections.ConfigDict, preset: str, file: str) -> ml_collections.ConfigDict:
  """`config` of a pod, or, for the preset "debug", with the sizes that two CPU cores train in seconds."""
  if preset not in ("", "debug"):
    raise ValueError(f"{file} has no preset {preset!r}; presets: debug")
  if preset == "debug":
    config.model.width, config.model.depth, config.model.heads = 32, 2, 2
    config.model.patch_bottleneck = 16
    config.text.width, config.text.depth, config.text.heads, config.text.max_tokens = 16, 1, 2, 16
    config.data.rows, config.data.row_tokens, config.data.row_samples = 8, 32, 4
    config.data.row_text_tokens, config.data.num_samples, config.data.num_eval = 64, 100, 4
    config.mesh.replica, config.mesh.fsdp, config.mesh.context = 1, -1, 1
    config.train.num_steps = config.train.log_every = 2
    config.train.save_every = 0
    config.sample.num_inference_steps = config.sample.num_samples = 2
    config.rehearse.topologies = ()
  return config
