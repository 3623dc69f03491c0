"""AdamW or Muon with warm-up, a schedule and clipping, and the EMA of the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sora_jax.parallel import rules
from sora_jax.training import muon
from sora_jax.types import Array, PyTree

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear", "rsqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """`muon` updates matrices inside the network with Muon (see training/muon.py) and all else with AdamW."""

  name: str = "adamw"
  lr: float = 1e-3  # peak
  warmup_steps: int = 100
  schedule: str = "constant"  # after warm-up: constant | cosine | linear | rsqrt
  final_lr_ratio: float = 0.0  # of the peak, reached by cosine and linear at the last step
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0  # matrices only
  clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
  ema_decay: float = 0.999

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      raise ValueError(f"optimizer.name = {self.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f"optimizer.schedule = {self.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
      )
    if self.lr < 0 or self.warmup_steps < 0 or not 0 <= self.ema_decay < 1 or self.clip_norm < 0:
      raise ValueError(
        f"optimizer: lr = {self.lr}, warmup_steps = {self.warmup_steps} and clip_norm = {self.clip_norm} "
        f"must be >= 0, and ema_decay = {self.ema_decay} in [0, 1)"
      )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """The rate of the update after `count` updates; the first one is not zero."""
  decay_steps = max(num_steps - config.warmup_steps, 1)

  def rate(count: Array) -> Array:
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1) / max(config.warmup_steps, 1))
    done = jnp.clip((count - config.warmup_steps) / decay_steps, 0.0, 1.0)
    floor = config.final_lr_ratio
    if config.schedule == "cosine":
      after = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif config.schedule == "linear":
      after = 1 - (1 - floor) * done
    elif config.schedule == "rsqrt":
      start = max(config.warmup_steps, 1)
      after = jnp.sqrt(start / jnp.maximum(count, start))
    else:
      after = 1.0
    return config.lr * warm * after

  return rate


def decay_mask(abstract: nnx.State) -> PyTree:
  """True for matrices: not for vectors, nor for vectors stacked over layers."""

  def one(path, variable) -> bool:
    names, ndim = rules.logical_names(variable), len(variable.get_value().shape)
    if names is not None:
      return ndim - (rules.LAYERS in names) >= 2
    return ndim >= 2 and str(getattr(path[-1], "key", path[-1])) not in ("bias", "scale", "b")

  mask = jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return nnx.to_pure_dict(mask)


def hidden_mask(abstract: nnx.State) -> PyTree:
  """True for matrices whose rows and columns are both dims of the network: not for embeddings or ends."""

  def one(variable) -> bool:
    names = [n for n in rules.logical_names(variable) or () if n != rules.LAYERS]
    return len(names) == 2 and not {None, "vocab"} & set(names)

  mask = jax.tree.map(one, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return nnx.to_pure_dict(mask)


def make_optimizer(
  config: OptimizerConfig, *, num_steps: int, abstract: nnx.State
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  schedule, mask = learning_rate(config, num_steps), decay_mask(abstract)
  scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.name == "muon":
    scale = muon.scale_by_muon(scale, beta=config.b1, hidden=hidden_mask(abstract))
  tx = optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    scale,
    optax.add_decayed_weights(config.weight_decay, mask=mask) if config.weight_decay else optax.identity(),
    optax.scale_by_learning_rate(schedule),
  )
  return tx, schedule


def ema_update(config: OptimizerConfig, ema: PyTree, params: PyTree, count: Array) -> PyTree:
  """Exponential mean with a decay that warms up, so that it forgets the initial weights soon."""
  count = count.astype(jnp.float32)
  decay = jnp.minimum(config.ema_decay, (1 + count) / (10 + count))
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
