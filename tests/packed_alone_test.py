"""Invariant 1: what a sample gets in a packed row is what it gets alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.packing import geometry
from sora_jax.tasks import text_to_video
from sora_jax.types import BatchSpec

CHANNELS = 12
GRIDS = [(2, 3, 4), (1, 5, 3), (4, 2, 2), (1, 1, 1)]  # videos and images
SPEC = BatchSpec(rows=1, tokens=80, channels=CHANNELS, samples=4, text_tokens=24)


def make_batch(samples, *, given=()):
  """One row of the samples (indices into GRIDS) in that order; a sample's contents depend on it alone."""
  batch = SPEC.zeros()
  token = word = 0
  for slot, i in enumerate(samples):
    rng = np.random.default_rng(i)
    grid = GRIDS[i]
    n, words = int(np.prod(grid)), 3 + i
    here = slice(token, token + n)
    batch.tokens_BLC[0, here] = rng.normal(size=(n, CHANNELS))
    batch.segment_BL[0, here] = slot + 1
    batch.position_BL3[0, here] = geometry.positions(grid)
    if i in given:
      batch.given_BL[0, token : token + n // grid[0]] = True
    batch.text_ids_BM[0, word : word + words] = rng.integers(3, 50, size=words)
    batch.text_segment_BM[0, word : word + words] = slot + 1
    batch.grid_BN3[0, slot] = grid
    batch.fps_BN[0, slot] = 8.0 if grid[0] > 1 else 0.0
    batch.sample_id_BN[0, slot] = i
    token, word = token + n, word + words
  return batch


def part(batch, x_BLC, sample):
  slot = int(np.flatnonzero(batch.sample_id_BN[0] == sample)[0])
  return np.asarray(x_BLC)[0][batch.segment_BL[0] == slot + 1]


@pytest.fixture(scope="module", params=["dense", "chunked", pytest.param("tpu", marks=pytest.mark.slow)])
def setup(request):
  task = text_to_video.build(
    model=DiTConfig(width=32, depth=2, heads=2, attention=request.param),
    text_config=TextConfig(vocab_size=50, max_tokens=8, width=16, depth=1, heads=2),
    diffusion=ObjectiveConfig(shift_base_tokens=10),
    batch_spec=SPEC,
  )
  graph, state = nnx.split(task.init(nnx.Rngs(0)))
  leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
  rng = np.random.default_rng(5)
  # Zero-initialised gates would hide every leak.
  params = jax.tree.unflatten(tree, [x + 0.05 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])

  def predict(params, tokens_BLC, batch):
    t_BN = 0.1 + 0.2 * batch.sample_id_BN.clip(0).astype(jnp.float32)
    return nnx.merge(graph, params)(tokens_BLC, t_BN, batch)

  def total(params, batch):
    return task.loss_fn(nnx.merge(graph, params), batch, jax.random.key(3))

  return params, jax.jit(predict), jax.jit(jax.value_and_grad(total, has_aux=True))


def test_outputs_and_order(setup):
  params, predict, _ = setup
  alone = {i: part(b := make_batch([i], given=(0,)), predict(params, b.tokens_BLC, b), i) for i in range(4)}
  for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
    batch = make_batch(order, given=(0,))
    out = predict(params, batch.tokens_BLC, batch)
    for i in order:
      np.testing.assert_allclose(part(batch, out, i), alone[i], atol=1e-5)


def test_losses_and_gradients_add_up(setup):
  params, _, loss = setup
  (packed, sums), gradient = loss(params, make_batch([2, 0, 3, 1], given=(0, 2)))
  alone = [loss(params, make_batch([i], given=(0, 2))) for i in range(4)]
  np.testing.assert_allclose(packed, sum(float(a[0][0]) for a in alone), rtol=1e-5)
  assert sums["loss"][1] == sum(float(a[0][1]["loss"][1]) for a in alone)
  summed = jax.tree.map(lambda *g: sum(g), *(a[1] for a in alone))
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(summed))
  for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed)):
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_jacobian_across_samples_is_zero(setup):
  params, predict, _ = setup
  batch = make_batch([0, 1, 2])

  def squares_of_first(tokens):
    return jnp.where((batch.segment_BL == 1)[..., None], predict(params, tokens, batch), 0.0).sum()

  gradient = np.asarray(jax.grad(squares_of_first)(batch.tokens_BLC))
  assert np.abs(gradient[batch.segment_BL == 1]).max() > 0
  np.testing.assert_array_equal(gradient[batch.segment_BL != 1], 0.0)


def test_given_and_padding_tokens_bear_no_loss(setup):
  params, _, loss = setup
  batch = make_batch([0, 1], given=(0,))
  (_, sums), _ = loss(params, batch)
  assert sums["loss"][1] == (24 - 12) + 15
  (_, sums), _ = loss(params, dataclasses.replace(batch, given_BL=batch.segment_BL > 0))
  assert sums["loss"] == (0.0, 0.0)


def test_given_tokens_condition_the_rest(setup):
  """Prompt tokens reach the model clean: what the others become depends on their content."""
  params, predict, _ = setup
  batch = make_batch([0], given=(0,))
  changed = np.array(batch.tokens_BLC)
  changed[0, :12] += 1.0
  out, other = (part(batch, predict(params, x, batch), 0) for x in (batch.tokens_BLC, changed))
  assert np.abs(out[12:] - other[12:]).max() > 1e-4


def test_nan_stays_within_the_tiles_of_its_sample():
  """Samples that share no tile (256 queries by 256 keys) with a poisoned one come out as if it were sound."""
  grids, spec = [(4, 8, 8), (2, 16, 16), (2, 10, 10)], dataclasses.replace(SPEC, tokens=1024)
  batch = spec.zeros()
  rng, start = np.random.default_rng(0), 0
  for slot, grid in enumerate(grids):
    here = slice(start, start := start + int(np.prod(grid)))
    batch.tokens_BLC[0, here] = rng.normal(size=batch.tokens_BLC[0, here].shape)
    batch.segment_BL[0, here] = slot + 1
    batch.position_BL3[0, here] = geometry.positions(grid)
    batch.grid_BN3[0, slot], batch.fps_BN[0, slot], batch.sample_id_BN[0, slot] = grid, 8.0, slot
    batch.text_ids_BM[0, 4 * slot : 4 * slot + 4] = [2, 5, 6, 7]
    batch.text_segment_BM[0, 4 * slot : 4 * slot + 4] = slot + 1
  task = text_to_video.build(
    model=DiTConfig(width=16, depth=1, heads=2, attention="chunked"),
    text_config=TextConfig(vocab_size=50, max_tokens=8, width=16, depth=1, heads=2),
    diffusion=ObjectiveConfig(),
    batch_spec=spec,
  )
  graph, state = nnx.split(task.init(nnx.Rngs(0)))
  params = jax.tree.map(lambda x: x + 0.05, nnx.to_pure_dict(state))
  predict = jax.jit(lambda x: nnx.merge(graph, params)(x, jnp.full((1, 4), 0.5), batch))
  poisoned = np.where((batch.segment_BL == 1)[..., None], np.nan, batch.tokens_BLC)
  sound, out = np.asarray(predict(batch.tokens_BLC)), np.asarray(predict(poisoned))
  assert np.isnan(out[batch.segment_BL == 1]).all()
  others = batch.segment_BL > 1
  np.testing.assert_array_equal(out[others], sound[others])
