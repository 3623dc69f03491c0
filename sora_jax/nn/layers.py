"""Layers shared by the networks. Parameters are fp32 and carry logical axis names in `logical`."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.nn.matmul import tokens_times_weight
from sora_jax.types import Array

Logical = tuple[str | None, ...]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], logical: Logical, *, std: float = 0.0, mean: float = 0.0):
  """A parameter of normal entries truncated at two deviations (zero std = constant `mean`)."""
  assert len(shape) == len(logical)
  value = jnp.full(shape, mean, jnp.float32)
  if std:
    value = value + std * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
  return nnx.Param(value, logical=logical)


class Linear(nnx.Module):
  """x @ w (+ b) in `dtype`. `zero` starts at zero, as adaLN-zero wants."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    *,
    rngs: nnx.Rngs,
    logical: Logical = ("embed", "mlp"),
    bias: bool = True,
    zero: bool = False,
    dtype: jnp.dtype = jnp.float32,
  ):
    # Xavier-normal, as in DiT (Peebles and Xie 2023, arXiv:2212.09748, released code).
    std = 0.0 if zero else math.sqrt(2.0 / (in_dim + out_dim))
    self.w = param(rngs, (in_dim, out_dim), logical, std=std)
    self.b = param(rngs, (out_dim,), (logical[1],)) if bias else None
    self.dtype = dtype

  def __call__(self, x: Array) -> Array:
    y = tokens_times_weight(x.astype(self.dtype), self.w[...].astype(self.dtype))
    return y if self.b is None else y + self.b[...].astype(self.dtype)


class Mlp(nnx.Module):
  """Linear, tanh-GELU, linear."""

  def __init__(self, in_dim: int, hidden: int, out_dim: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
    self.up = Linear(in_dim, hidden, rngs=rngs, logical=("embed", "mlp"), dtype=dtype)
    self.down = Linear(hidden, out_dim, rngs=rngs, logical=("mlp", "embed"), dtype=dtype)

  def __call__(self, x: Array) -> Array:
    return self.down(jax.nn.gelu(self.up(x), approximate=True))


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
  """Layer normalisation without parameters, in fp32: the variance of bf16 loses too many digits."""
  x = x.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  var = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(var + eps)


def rms_norm(x: Array, scale: Array, eps: float = 1e-6) -> Array:
  """RMS normalisation of the last axis (Zhang and Sennrich 2019, arXiv:1910.07467), in fp32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def timestep_embedding(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
  """Sinusoids of 1000 t, (...,) -> (..., dim), cosines first (Ho et al. 2020; the scale is DiT's)."""
  half = dim // 2
  freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = 1000.0 * t[..., None].astype(jnp.float32) * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_angles(position_BL3: Array, head_dim: int, theta: float) -> Array:
  """(B, L, head_dim / 2) angles of a 3-axis rotary embedding (Su et al. 2021, arXiv:2104.09864, eq. 34).

  The pairs are shared out between t, y and x, a quarter to t and the rest to y and x alike.
  """
  pairs = head_dim // 2
  pairs_y = (pairs - pairs // 4 + 1) // 2
  sizes = (pairs - 2 * pairs_y, pairs_y, pairs_y)
  angles = []
  for axis, size in enumerate(sizes):
    freqs = theta ** (-jnp.arange(size, dtype=jnp.float32) / max(size, 1))
    angles.append(position_BL3[..., axis, None].astype(jnp.float32) * freqs)
  return jnp.concatenate(angles, axis=-1)


def rotate(x_BLKS: Array, angles_BLP: Array) -> Array:
  """Rotates the pairs (x[i], x[i + S/2]) of every head by `angles`."""
  cos = jnp.cos(angles_BLP)[:, :, None, :].astype(x_BLKS.dtype)
  sin = jnp.sin(angles_BLP)[:, :, None, :].astype(x_BLKS.dtype)
  a, b = jnp.split(x_BLKS, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def slot_one_hot(slot_BL: Array, num_slots: int, dtype=jnp.float32) -> Array:
  """(B, L, num_slots): per-sample values reach tokens by a product, which shards where a gather does not."""
  return jax.nn.one_hot(slot_BL, num_slots, dtype=dtype)


def spread(one_hot_BLN: Array, value_BND: Array) -> Array:
  """Each token's row of `value`: (B, L, N) x (B, N, D) -> (B, L, D)."""
  return jnp.einsum("bln,bnd->bld", one_hot_BLN.astype(value_BND.dtype), value_BND)
