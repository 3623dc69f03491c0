"""A plain DiT in plain JAX, the yardstick of benchmark.py: nothing fused, nothing skipped.

Standard adaLN-zero blocks (Peebles and Xie 2023, arXiv:2212.09748), dense attention by jax.nn, tanh-GELU,
class-free conditioning on a noise level per row, velocity loss, fp32, AdamW by optax.
"""

import jax
import jax.numpy as jnp
import optax

from sora_jax.types import Array, PyTree


def init(key: Array, *, width: int, depth: int, channels: int) -> PyTree:
  def dense(key, fan_in, fan_out, scale=1.0):
    w = scale * jax.random.normal(key, (fan_in, fan_out)) * (2 / (fan_in + fan_out)) ** 0.5
    return {"w": w, "b": jnp.zeros(fan_out)}

  def block(key):
    keys = jax.random.split(key, 5)
    return {
      "modulation": dense(keys[0], width, 6 * width, 0.02),
      "qkv": dense(keys[1], width, 3 * width),
      "out": dense(keys[2], width, width),
      "up": dense(keys[3], width, 4 * width),
      "down": dense(keys[4], 4 * width, width),
    }

  keys = jax.random.split(key, 6)
  return {
    "patch_in": dense(keys[0], channels, width),
    "time_up": dense(keys[1], width, width),
    "time_down": dense(keys[2], width, width),
    "blocks": jax.vmap(block)(jax.random.split(keys[3], depth)),
    "final": dense(keys[4], width, 2 * width, 0.02),
    "patch_out": dense(keys[5], width, channels, 0.02),
  }


def linear(p, x):
  return x @ p["w"] + p["b"]


def layer_norm(x):
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def modulate(x, shift, scale):
  return layer_norm(x) * (1 + scale) + shift


def apply(params: PyTree, x_BLC: Array, t_B: Array, *, heads: int) -> Array:
  width = params["time_up"]["w"].shape[0]
  x = linear(params["patch_in"], x_BLC)
  freqs = jnp.exp(-jnp.log(1e4) * jnp.arange(width // 2) / (width // 2))
  angles = 1000 * t_B[:, None] * freqs
  features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
  condition = linear(params["time_down"], jax.nn.silu(linear(params["time_up"], features)))
  condition = jax.nn.silu(condition)[:, None]

  def block(x, p):
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(linear(p["modulation"], condition), 6, -1)
    qkv = linear(p["qkv"], modulate(x, shift_a, scale_a))
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in jnp.split(qkv, 3, -1))
    attended = jax.nn.dot_product_attention(q, k, v)
    x = x + gate_a * linear(p["out"], attended.reshape(x.shape))
    hidden = jax.nn.gelu(linear(p["up"], modulate(x, shift_m, scale_m)), approximate=True)
    return x + gate_m * linear(p["down"], hidden), None

  x, _ = jax.lax.scan(block, x, params["blocks"])
  shift, scale = jnp.split(linear(params["final"], condition), 2, -1)
  return linear(params["patch_out"], modulate(x, shift, scale))


def make_step(*, heads: int, learning_rate: float = 1e-4):
  """(optimizer, step): step(state, x_BLC, key) -> (state, loss), state = (params, optimizer state)."""
  optimizer = optax.adamw(learning_rate)

  def loss_fn(params, x, key):
    time_key, noise_key = jax.random.split(key)
    t = jax.random.uniform(time_key, x.shape[:1])
    noise = jax.random.normal(noise_key, x.shape)
    t_B11 = t[:, None, None]
    predicted = apply(params, (1 - t_B11) * x + t_B11 * noise, t, heads=heads)
    return jnp.square(predicted - (noise - x)).mean()

  def step(state, x, key):
    params, slots = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x, key)
    updates, slots = optimizer.update(grads, slots, params)
    return (optax.apply_updates(params, updates), slots), loss

  return optimizer, jax.jit(step, donate_argnums=0)
