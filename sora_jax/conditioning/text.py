"""A small text encoder, trained with the denoiser: over token ids, or embeddings of a large frozen one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sora_jax.nn import layers
from sora_jax.nn.attention import attend
from sora_jax.nn.layout import by_rows
from sora_jax.packing.pack import tokens_of_samples
from sora_jax.types import NULL_ID, Array, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """`max_tokens` bounds one caption; longer captions are cut."""

  vocab_size: int = 1024
  max_tokens: int = 64
  width: int = 128
  depth: int = 1
  heads: int = 4

  def __post_init__(self):
    if self.width % (2 * self.heads):
      raise ValueError(f"text.width={self.width} must be an even multiple of text.heads={self.heads}")


class TextBlock(nnx.Module):
  """Pre-norm bidirectional transformer block."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.heads = heads
    self.qkv = layers.Linear(width, 3 * width, logical=("embed", "heads"), rngs=rngs)
    self.out = layers.Linear(width, width, logical=("heads", "embed"), rngs=rngs)
    self.mlp = layers.Mlp(width, 4 * width, width, rngs=rngs)

  def __call__(self, x: Array, segment_BM: Array) -> Array:
    q, k, v = (
      rearrange(a, "b m (k s) -> b m k s", k=self.heads)
      for a in jnp.split(self.qkv(layers.layer_norm(x)), 3, axis=-1)
    )
    out = attend(q, k, v, segment_BM, segment_BM)
    x = x + self.out(rearrange(out, "b m k s -> b m (k s)"))
    return x + self.mlp(layers.layer_norm(x))


class TextEncoder(nnx.Module):
  """Packed token ids, or embeddings of `embedding_width` -> features of every token and one pooled vector a
  sample."""

  def __init__(self, config: TextConfig, *, embedding_width: int = 0, rngs: nnx.Rngs):
    self.config = config
    if embedding_width:
      self.project = layers.Linear(embedding_width, config.width, logical=(None, "embed"), rngs=rngs)
      self.null = layers.param(rngs, (config.width,), ("embed",), std=1.0)
    else:
      self.table = layers.param(rngs, (config.vocab_size, config.width), ("vocab", "embed"), std=1.0)
      self.position = layers.param(rngs, (config.max_tokens, config.width), (None, "embed"), std=0.1)
    self.blocks = nnx.List([TextBlock(config.width, config.heads, rngs=rngs) for _ in range(config.depth)])

  def __call__(self, batch: TokenBatch) -> tuple[Array, Array]:
    """Returns text_BMD (fp32) and pooled_BND, the mean over each sample's tokens."""
    segment = batch.text_segment_BM
    x = self._looked_up(batch) if batch.text_BMD is None else self._embedded(batch)
    x = layers.layer_norm(self._run_blocks(x, segment))
    one_hot = layers.slot_one_hot(segment, batch.fps_BN.shape[1] + 1)[..., 1:]
    total = jnp.einsum("bmn,bmd->bnd", one_hot, x)
    return x, total / jnp.maximum(one_hot.sum(axis=1), 1)[..., None]

  def _looked_up(self, batch: TokenBatch) -> Array:
    place = jnp.minimum(place_in_segment(batch.text_segment_BM), self.config.max_tokens - 1)
    return by_rows(self.table[...][batch.text_ids_BM]) + by_rows(self.position[...][place])

  def _embedded(self, batch: TokenBatch) -> Array:
    """Embeddings know their places; a caption that is dropped, or was never there, is one learned vector."""
    x = self.project(layers.layer_norm(batch.text_BMD))
    return by_rows(jnp.where((batch.text_ids_BM == NULL_ID)[..., None], self.null[...], x))

  def _run_blocks(self, x: Array, segment_BM: Array) -> Array:
    """Stacked here and run as a loop they compile in the time of one; for two it is not worth the copies."""
    if len(self.blocks) <= 2:
      for block in self.blocks:
        x = by_rows(block(x, segment_BM))
      return x
    graph = nnx.graphdef(self.blocks[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, self.blocks))
    return jax.lax.scan(lambda x, p: (by_rows(nnx.merge(graph, p)(x, segment_BM)), None), x, stacked)[0]


def place_in_segment(segment_BM: Array) -> Array:
  """0, 1, 2, ... within each contiguous run of equal segments."""
  index = jnp.arange(segment_BM.shape[1])
  starts = jnp.concatenate(
    [jnp.ones_like(segment_BM[:, :1], bool), segment_BM[:, 1:] != segment_BM[:, :-1]], axis=1
  )
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def drop_captions(batch: TokenBatch, drop_BN: Array) -> TokenBatch:
  """Puts [NULL] for every text token of the samples in `drop_BN`: the unconditional text of guidance."""
  one_hot = layers.slot_one_hot(batch.text_segment_BM, drop_BN.shape[1] + 1)[..., 1:]
  drop_BM = jnp.einsum("bmn,bn->bm", one_hot, drop_BN.astype(jnp.float32)) > 0
  return dataclasses.replace(batch, text_ids_BM=jnp.where(drop_BM, NULL_ID, batch.text_ids_BM))


def model_flops(config: TextConfig, batch: TokenBatch, embedding_width: int = 0) -> np.ndarray:
  """As models/dit.model_flops: [B], forward and backward pass of the encoder, from the real segments."""
  D, slots = config.width, np.shape(batch.grid_BN3)[1]
  lengths_BN = tokens_of_samples(np.asarray(batch.text_segment_BM), slots).astype(np.float64)
  linear = 2.0 * lengths_BN.sum(-1) * (config.depth * 12 * D * D + embedding_width * D)
  return 3 * (linear + config.depth * 4.0 * D * (lengths_BN**2).sum(-1))
