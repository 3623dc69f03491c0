"""The adaLN-zero block: self-attention, cross-attention to text, MLP."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sora_jax.nn import layers
from sora_jax.nn.attention import attend
from sora_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockContext:
  """What every block of a network shares in one call."""

  segment_BL: Array
  text_BMD: Array
  text_segment_BM: Array
  angles_BLP: Array
  one_hot_BLN: Array  # token -> modulation slot
  condition_BND: Array  # condition of every slot, after its activation


def modulate(x: Array, shift: Array, scale: Array) -> Array:
  return layers.layer_norm(x) * (1 + scale) + shift


class Block(nnx.Module):
  """adaLN-zero (Peebles and Xie 2023, section 3.2) with QK-norm and zero-initialised cross-attention."""

  def __init__(self, width: int, heads: int, hidden: int, *, dtype, rngs: nnx.Rngs):
    head_dim = width // heads
    self.heads, self.dtype = heads, dtype

    def linear(out_dim, logical, **kwargs):
      return layers.Linear(width, out_dim, logical=logical, rngs=rngs, dtype=dtype, **kwargs)

    self.modulation = linear(6 * width, ("embed", "mlp"), zero=True)
    self.qkv = linear(3 * width, ("embed", "heads"))
    self.attention_out = linear(width, ("heads", "embed"))
    self.q_scale = layers.param(rngs, (head_dim,), (None,), mean=1.0)
    self.k_scale = layers.param(rngs, (head_dim,), (None,), mean=1.0)
    self.cross_q = linear(width, ("embed", "heads"))
    self.cross_kv = linear(2 * width, ("embed", "heads"))
    self.cross_out = linear(width, ("heads", "embed"), zero=True)
    self.cross_q_scale = layers.param(rngs, (head_dim,), (None,), mean=1.0)
    self.cross_k_scale = layers.param(rngs, (head_dim,), (None,), mean=1.0)
    self.mlp = layers.Mlp(width, hidden, width, rngs=rngs, dtype=dtype)

  def __call__(self, x: Array, context: BlockContext, backend: str) -> Array:
    modulation = layers.spread(context.one_hot_BLN, self.modulation(context.condition_BND))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    x = x + gate_a * self._self_attention(modulate(x, shift_a, scale_a), context, backend)
    x = x + self._cross_attention(layers.layer_norm(x), context, backend)
    return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))

  def _split_heads(self, x: Array) -> Array:
    return rearrange(x, "b l (k s) -> b l k s", k=self.heads)

  def _attend(self, q, k, v, context: BlockContext, k_segment, backend: str) -> Array:
    slots = context.one_hot_BLN.shape[-1] - 1
    return attend(q, k, v, context.segment_BL, k_segment, backend=backend, num_segments=slots)

  def _self_attention(self, x: Array, context: BlockContext, backend: str) -> Array:
    q, k, v = map(self._split_heads, jnp.split(self.qkv(x), 3, axis=-1))
    q = layers.rotate(layers.rms_norm(q, self.q_scale[...]), context.angles_BLP).astype(self.dtype)
    k = layers.rotate(layers.rms_norm(k, self.k_scale[...]), context.angles_BLP).astype(self.dtype)
    out = self._attend(q, k, v, context, context.segment_BL, backend)
    return self.attention_out(rearrange(out, "b l k s -> b l (k s)"))

  def _cross_attention(self, x: Array, context: BlockContext, backend: str) -> Array:
    q = self._split_heads(self.cross_q(x))
    k, v = map(self._split_heads, jnp.split(self.cross_kv(context.text_BMD), 2, axis=-1))
    q = layers.rms_norm(q, self.cross_q_scale[...]).astype(self.dtype)
    k = layers.rms_norm(k, self.cross_k_scale[...]).astype(self.dtype)
    out = self._attend(q, k, v, context, context.text_segment_BM, backend)
    return self.cross_out(rearrange(out, "b l k s -> b l (k s)"))
