"""Diffusion transformer over packed spacetime tokens (Peebles and Xie 2023, arXiv:2212.09748).

A row holds several samples; each has its own noise level, text and size. What belongs to a sample
(modulation) is computed once per sample slot and handed to its tokens; slot 0 is the modulation of given
tokens, which are clean: they are conditioned on t = 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.models.blocks import Block, BlockContext, modulate
from sora_jax.nn import layers
from sora_jax.nn.layout import by_rows
from sora_jax.packing.pack import tokens_of_samples
from sora_jax.types import Array, TokenBatch

# width, depth, heads: Peebles and Xie 2023, table 1; XS is for two CPU cores
SIZES = {
  "XS": (128, 4, 4),
  "S": (384, 12, 6),
  "B": (768, 12, 12),
  "L": (1024, 24, 16),
  "XL": (1152, 28, 16),
}
TIME_FEATURES = 128
SIZE_FEATURES = 5
POSITION_FREQUENCIES = 4
POSITION_FEATURES = 3 * 2 * POSITION_FREQUENCIES
REMAT_POLICIES = ("none", "full", "dots", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
  """`size` names width, depth and heads; any of them may be set by itself (0 = from the size)."""

  size: str = "S"
  width: int = 0
  depth: int = 0
  heads: int = 0
  mlp_ratio: float = 4.0
  patch_bottleneck: int = 0  # dims a patch passes through on its way in; 0 = none
  rope_theta: float = 100.0
  dtype: str = "float32"
  # "dots" is also the fastest on a CPU: what it computes again costs less than storing it.
  remat: str = "dots"
  attention: str = "auto"

  def __post_init__(self):
    if self.size not in SIZES:
      raise ValueError(f"model.size={self.size!r} is not one of {', '.join(SIZES)}")
    for name, value in zip(("width", "depth", "heads"), SIZES[self.size]):
      if not getattr(self, name):
        object.__setattr__(self, name, value)
    if self.width % (2 * self.heads):
      raise ValueError(f"model.width={self.width} must be an even multiple of model.heads={self.heads}")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"model.remat={self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"model.dtype={self.dtype!r} is not float32 or bfloat16")


def remat_policy(name: str):
  """What the backward pass may keep of a block's forward pass; None keeps only the block's input."""
  if name == "dots":
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names("attention_o", "attention_lse")
    return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention)
  if name == "attention":
    return jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")
  return None


class DiT(nnx.Module):
  """(noised tokens, noise levels, text) -> the prediction for every token, in fp32."""

  def __init__(self, config: DiTConfig, *, channels: int, text_dim: int, rngs: nnx.Rngs):
    self.config = config
    D, dtype = config.width, jnp.dtype(config.dtype)
    self.dtype = dtype
    linear = functools.partial(layers.Linear, rngs=rngs, dtype=dtype)
    # Where a patch has more channels than the network has width, its noise would fill every dimension of
    # the stream and drown positions; through a bottleneck it fills a few (Li and He 2025, arXiv:2511.13720).
    narrow = config.patch_bottleneck
    self.patch_down = linear(channels, narrow, logical=(None, None), bias=False) if narrow else None
    self.patch_in = linear(narrow or channels, D, logical=(None, "embed"))
    self.position_in = linear(POSITION_FEATURES, D, logical=(None, "embed"), bias=False)
    # Conditions are few and steer every token: fp32.
    mlp = functools.partial(layers.Mlp, rngs=rngs)
    self.time_mlp = mlp(TIME_FEATURES, D, D)
    self.size_mlp = mlp(SIZE_FEATURES, D, D)
    self.pooled_mlp = mlp(text_dim, D, D)
    self.text_in = linear(text_dim, D, logical=(None, "embed"))

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=0, out_axes=0, axis_size=config.depth)
    def stack(rngs):
      return Block(D, config.heads, int(D * config.mlp_ratio), dtype=dtype, rngs=rngs)

    self.blocks = stack(rngs)
    self.final_modulation = linear(D, 2 * D, zero=True, logical=("embed", "mlp"))
    self.patch_out = linear(D, channels, zero=True, logical=("embed", None))

  def __call__(
    self, z_BLC: Array, t_BN: Array, batch: TokenBatch, text_BMD: Array, pooled_BND: Array
  ) -> Array:
    x, context = self._enter(z_BLC, t_BN, batch, text_BMD, pooled_BND)
    x, _ = self._run_blocks(x, context)
    modulation = layers.spread(context.one_hot_BLN, self.final_modulation(context.condition_BND))
    shift, scale = jnp.split(modulation, 2, axis=-1)
    return self.patch_out(modulate(x, shift, scale).astype(self.dtype)).astype(jnp.float32)

  def streams(
    self, z_BLC: Array, t_BN: Array, batch: TokenBatch, text_BMD: Array, pooled_BND: Array
  ) -> Array:
    """(depth, B, L, D): the residual stream after each block."""
    return self._run_blocks(*self._enter(z_BLC, t_BN, batch, text_BMD, pooled_BND), keep=True)[1]

  def _enter(
    self, z_BLC: Array, t_BN: Array, batch: TokenBatch, text_BMD: Array, pooled_BND: Array
  ) -> tuple[Array, BlockContext]:
    """The stream before the first block, and what the blocks share."""
    slots = t_BN.shape[1] + 1
    # Given tokens and padding look up slot 0.
    slot_BL = jnp.where(batch.given_BL, 0, batch.segment_BL)
    one_hot = layers.slot_one_hot(slot_BL, slots)
    condition = by_rows(jax.nn.silu(self._condition(t_BN, batch, pooled_BND)))
    patches = self.patch_in(self.patch_down(z_BLC) if self.patch_down else z_BLC)
    x = patches + self.position_in(_position_features(batch))
    context = BlockContext(
      segment_BL=batch.segment_BL,
      text_BMD=by_rows(self.text_in(text_BMD)),
      text_segment_BM=batch.text_segment_BM,
      angles_BLP=layers.rotary_angles(
        batch.position_BL3, self.config.width // self.config.heads, self.config.rope_theta
      ),
      one_hot_BLN=one_hot,
      condition_BND=condition,
    )
    return by_rows(x, tokens=True), context

  def _condition(self, t_BN: Array, batch: TokenBatch, pooled_BND: Array) -> Array:
    """(B, N + 1, D) condition of every slot; slot 0 is that of a clean token and knows no sample."""
    sample = self.time_mlp(layers.timestep_embedding(t_BN, TIME_FEATURES))
    sample = sample + self.size_mlp(_size_features(batch)) + self.pooled_mlp(pooled_BND)
    clean = self.time_mlp(layers.timestep_embedding(jnp.zeros((t_BN.shape[0], 1)), TIME_FEATURES))
    return jnp.concatenate([clean, sample], axis=1)

  def _run_blocks(self, x: Array, context: BlockContext, *, keep: bool = False) -> tuple[Array, Array | None]:
    """The stream after the last block and, to `keep`, after each."""
    config = self.config
    graph, stacked = nnx.split(self.blocks)

    def body(x, params):
      x = by_rows(nnx.merge(graph, params)(x, context, config.attention), tokens=True)
      return x, x if keep else None

    if config.remat != "none":
      body = jax.checkpoint(body, policy=remat_policy(config.remat), prevent_cse=False)
    return jax.lax.scan(body, x, stacked)


def _size_features(batch: TokenBatch) -> Array:
  """Log sizes of the sample's grid, whether it is a video, and its frame rate, (B, N, 5), of order 1."""
  log_grid = jnp.log(jnp.maximum(batch.grid_BN3, 1).astype(jnp.float32)) / 4
  fps = batch.fps_BN[..., None]
  return jnp.concatenate([log_grid, (fps > 0).astype(jnp.float32), fps / 30], axis=-1)


def _position_features(batch: TokenBatch) -> Array:
  """Sinusoids of the token's place as a fraction of its sample's grid, (B, L, 24).

  Rotary positions are relative; these say where the borders are (fractional factorised positions of Dehghani
  et al. 2023, arXiv:2307.06304, section 3.2, with fixed frequencies).
  """
  one_hot = layers.slot_one_hot(batch.segment_BL, batch.grid_BN3.shape[1] + 1)[..., 1:]
  grid_BL3 = layers.spread(one_hot, batch.grid_BN3.astype(jnp.float32))
  fraction = (batch.position_BL3 + 0.5) / jnp.maximum(grid_BL3, 1)
  freqs = jnp.pi * 2.0 ** jnp.arange(POSITION_FREQUENCIES)
  angles = (fraction[..., None] * freqs).reshape(*fraction.shape[:-1], -1)
  # Twice, so that positions enter the stream as strong as patches do.
  return 2 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def model_flops(config: DiTConfig, batch: TokenBatch, *, channels: int, text_dim: int) -> np.ndarray:
  """Model FLOPs [B] of forward and backward pass (3x forward) from the real segments; padding costs nothing.

  Those of `linear_flops`, and 4 D sum(l_q l_k) for the two products of attention.
  """
  lengths = _lengths(batch)
  text_lengths = tokens_of_samples(np.asarray(batch.text_segment_BM), lengths.shape[1])
  linear = linear_flops(
    config,
    tokens=lengths.sum(-1),
    text_tokens=(np.asarray(batch.text_segment_BM) > 0).sum(-1),
    samples=(lengths > 0).sum(-1),
    channels=channels,
    text_dim=text_dim,
  )
  pairs = (lengths**2).sum(-1) + (lengths * text_lengths).sum(-1)
  return 3 * (linear + 4.0 * config.width * config.depth * pairs)


def _lengths(batch: TokenBatch) -> np.ndarray:
  """[B, N] tokens of every sample: those there are, for some may be dropped; of a plan, all of its grid."""
  grid_BN3 = np.asarray(batch.grid_BN3, np.float64)
  if batch.segment_BL is None or len(batch.segment_BL) != len(grid_BN3):
    return np.prod(grid_BN3, axis=-1)
  return tokens_of_samples(np.asarray(batch.segment_BL), grid_BN3.shape[1]).astype(np.float64)


def linear_flops(config: DiTConfig, *, tokens, text_tokens, samples, channels: int, text_dim: int):
  """Forward FLOPs but for attention: 2 per multiply-add of every matrix product that a token (or text token,
  or sample) goes through."""
  D, F = config.width, int(config.width * config.mlp_ratio)
  patch_in = config.patch_bottleneck * (channels + D) if config.patch_bottleneck else channels * D
  per_token = (
    config.depth * (4 * D * D + 2 * D * D + 2 * D * F) + patch_in + (channels + POSITION_FEATURES) * D
  )
  per_text = config.depth * 2 * D * D + text_dim * D
  per_sample = config.depth * 6 * D * D + 2 * D * D + (TIME_FEATURES + SIZE_FEATURES + text_dim + 3 * D) * D
  return 2.0 * (tokens * per_token + text_tokens * per_text + samples * per_sample)
