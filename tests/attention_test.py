"""Attention backends agree with the reference, skip what is masked, and shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.nn.attention import attend
from sora_jax.nn.attention_chunked import attend_chunked, key_ranges, num_tiles
from sora_jax.nn.attention_dense import attend_dense
from sora_jax.parallel.mesh import MeshConfig, make_mesh

BACKENDS = {
  "dense": attend_dense,
  "chunked": functools.partial(attend_chunked, block_q=8, block_k=16),
  "one tile": functools.partial(attend_chunked, block_q=256, block_k=256),
}


def packing(*rows, total):
  """Rows of segments 1, 2, ... of the given lengths, padding to the end; length 0 leaves its number out."""

  def of_row(lengths):
    segment = np.zeros(total, np.int32)
    segment[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segment

  return np.stack([of_row(r) for r in rows])


SELF = {
  "one segment": (packing([24], total=24),) * 2,
  "many, single tokens": (packing([1, 5, 1, 1, 9, 3], [2, 2, 2, 2, 2], total=24),) * 2,
  "padding rows": (packing([], [40], [], [7], total=40),) * 2,
  "uneven": (packing([13, 20, 4], [37], total=37),) * 2,
  "cross": (packing([9, 11, 1, 12], [33], total=33), packing([3, 7, 0, 5], [0, 4], total=21)),
  "cross, long keys": (packing([5, 4], [2], total=10), packing([20, 30], [50], total=50)),
}


def inputs(q_segment, k_segment, heads=2, size=8, seed=0):
  rng = np.random.default_rng(seed)
  (B, L), (_, M) = q_segment.shape, k_segment.shape
  return tuple(jnp.asarray(rng.normal(size=(B, n, heads, size)), jnp.float32) for n in (L, M, M, L))


def value_and_grads(run, q, k, v, w, q_segment, k_segment):
  def total(q, k, v):
    o = run(q, k, v, q_segment, k_segment)
    return (o * w).sum(), o

  grads, o = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return (o, *grads)


def by_hand(q, k, v, q_segment, k_segment):
  """float64 numpy, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  o = np.zeros_like(q)
  for b, i, h in np.ndindex(q.shape[:3]):
    keys = (k_segment[b] == q_segment[b, i]) & (q_segment[b, i] > 0)
    if keys.any():
      p = np.exp(k[b, keys, h] @ q[b, i, h] / np.sqrt(q.shape[-1]))
      o[b, i, h] = p @ v[b, keys, h] / p.sum()
  return o


@pytest.mark.parametrize("name", SELF)
def test_dense_is_the_definition(name):
  q, k, v, _ = inputs(*SELF[name])
  np.testing.assert_allclose(attend_dense(q, k, v, *SELF[name]), by_hand(q, k, v, *SELF[name]), atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "dense"])
@pytest.mark.parametrize("name", SELF)
def test_values_and_gradients_match_dense(name, backend):
  args = (*inputs(*SELF[name]), *SELF[name])
  for got, want in zip(value_and_grads(BACKENDS[backend], *args), value_and_grads(attend_dense, *args)):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_random_packings():
  rng = np.random.default_rng(1)
  compiled = jax.jit(functools.partial(value_and_grads, BACKENDS["chunked"]))
  reference = jax.jit(functools.partial(value_and_grads, attend_dense))
  for seed in range(20):
    q_lengths, k_lengths = (rng.multinomial(rng.integers(1, 45), np.ones(6) / 6, size=2) for _ in range(2))
    segments = packing(*q_lengths, total=45), packing(*k_lengths, total=45)
    args = (*inputs(*segments, seed=seed), *segments)
    for got, want in zip(compiled(*args), reference(*args)):
      np.testing.assert_allclose(got, want, atol=2e-5)


def test_any_order_of_segments_is_right():
  segment = np.random.default_rng(2).integers(0, 5, (2, 40)).astype(np.int32)
  args = (*inputs(segment, segment), segment, segment)
  for got, want in zip(value_and_grads(BACKENDS["chunked"], *args), value_and_grads(attend_dense, *args)):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_are_zero(backend):
  q_segment, k_segment = SELF["cross"]
  q, k, v, w = inputs(q_segment, k_segment)
  o, dq, dk, dv = value_and_grads(BACKENDS[backend], q, k, v, w, q_segment, k_segment)
  lonely = ~(q_segment[:, :, None] == np.where(k_segment, k_segment, -1)[:, None]).any(-1)
  assert lonely.any() and not lonely.all()
  assert (np.asarray(o)[lonely] == 0).all() and (np.asarray(dq)[lonely] == 0).all()
  assert (np.asarray(o)[~lonely] != 0).all()
  assert (np.asarray(dk)[k_segment == 0] == 0).all() and (np.asarray(dv)[k_segment == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_padding_reaches_nothing(backend):
  q_segment, k_segment = SELF["cross"]
  clean = inputs(q_segment, k_segment)
  dirty = [
    jnp.where((s == 0)[..., None, None], jnp.nan, x)
    for x, s in zip(clean[:3], (q_segment, k_segment, k_segment))
  ]
  want = value_and_grads(BACKENDS[backend], *clean, q_segment, k_segment)
  got = value_and_grads(BACKENDS[backend], *dirty, clean[3], q_segment, k_segment)
  for g, w in zip(got, want):
    np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "do"])
def test_nan_stays_within_shared_tiles(poisoned):
  # Segments of whole blocks share no tile, whichever of them is poisoned.
  segment = packing([16, 8, 24], [8, 8, 32], total=48)
  clean = inputs(segment, segment)
  bad = segment == 2
  which = "qkv".find(poisoned) if poisoned != "do" else 3
  dirty = list(clean)
  dirty[which] = jnp.where(bad[..., None, None], jnp.nan, clean[which])
  run = functools.partial(attend_chunked, block_q=8, block_k=8)
  want, got = (value_and_grads(run, *x, segment, segment) for x in (clean, dirty))
  for g, w in zip(got, want):
    np.testing.assert_array_equal(np.asarray(g)[~bad], np.asarray(w)[~bad])
  assert any(np.isnan(np.asarray(g)[bad]).any() for g in got)


def test_only_live_tiles_are_visited():
  segment = packing([32, 32, 32, 32], [128], total=128)
  assert num_tiles(segment[:1], segment[:1], block_q=16, block_k=16) == 4 * 2 * 2
  assert num_tiles(segment[1:], segment[1:], block_q=16, block_k=16) == 8 * 8
  assert num_tiles(np.zeros_like(segment), segment, block_q=16, block_k=16) == 0
  first, length = key_ranges(packing([10, 6, 9], total=32), packing([3, 0, 5], total=20), 8)
  np.testing.assert_array_equal(first[0, :1], [0])
  np.testing.assert_array_equal(length[0], [3, 3, 5, 5])


def test_memory_is_linear_in_length():
  def temp_bytes(run, tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)
    segment = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    grad = jax.grad(lambda q, k, v, s: run(q, k, v, s, s).sum(), argnums=(0, 1, 2))
    return jax.jit(grad).lower(x, x, x, segment).compile().memory_analysis().temp_size_in_bytes

  run = functools.partial(attend_chunked, block_q=64, block_k=64)
  assert temp_bytes(run, 8192) < 2.2 * temp_bytes(run, 4096)
  assert temp_bytes(attend_dense, 4096) > 3 * temp_bytes(attend_dense, 2048)  # the test can tell


def test_bfloat16():
  segments = SELF["uneven"]
  args = inputs(*segments)
  low = [x.astype(jnp.bfloat16) for x in args]
  wanted = value_and_grads(attend_dense, *args, *segments)
  for got, want in zip(value_and_grads(BACKENDS["chunked"], *low, *segments), wanted):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.06)


def stacked(policy, q, k, v, w, q_segment, k_segment):
  """Two layers of attention under scan and remat."""

  def layer(x, _):
    return x + attend(x, k, v, q_segment, k_segment, backend="chunked"), None

  def total(q):
    return (jax.lax.scan(jax.checkpoint(layer, policy=policy), q, None, length=2)[0] * w).sum()

  return jax.value_and_grad(total)(q)


def test_remat_keeps_named_residuals():
  args = (*inputs(*SELF["uneven"]), *SELF["uneven"])
  names = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")
  results, loops = {}, {}
  for name, policy in {"named": names, "nothing": jax.checkpoint_policies.nothing_saveable}.items():
    run = jax.jit(functools.partial(stacked, policy))
    results[name], loops[name] = run(*args), str(jax.make_jaxpr(run)(*args)).count("exp ")
  for a, b in zip(results["named"], results["nothing"]):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert loops["named"] < loops["nothing"]  # the backward pass runs no second forward


@pytest.mark.parametrize(
  "backend, sizes", [("chunked", (2, 4, 1, 1)), ("chunked", (1, 2, 2, 2)), ("dense", (1, 1, 4, 2))]
)
def test_sharded_equals_single(backend, sizes):
  segments = packing(*[[9, 11, 12], [33], [2, 30], []] * 2, total=36), packing(*[[3, 7, 2]] * 8, total=20)
  args = (*inputs(*segments, heads=4), *segments)
  run = functools.partial(attend, backend=backend)
  want = value_and_grads(run, *args)
  mesh = make_mesh(MeshConfig(**dict(zip(("replica", "fsdp", "context", "tensor"), sizes))))
  rows = ("replica", "fsdp")
  specs = [P(rows, "context", "tensor")] * 4 + [P(rows, "context")] * 2
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs)]
    for got, one in zip(jax.jit(functools.partial(value_and_grads, run))(*placed), want):
      np.testing.assert_allclose(got, one, atol=1e-5)
    remat = jax.jit(functools.partial(stacked, jax.checkpoint_policies.save_only_these_names("attention_o")))
    value, grad = remat(*placed)
  value_one, grad_one = stacked(jax.checkpoint_policies.nothing_saveable, *args)
  np.testing.assert_allclose(value, value_one, rtol=1e-5)
  np.testing.assert_allclose(grad, grad_one, atol=2e-5)


def test_unknown_backend():
  with pytest.raises(ValueError, match="fast.*dense"):
    attend(*inputs(*SELF["uneven"])[:3], *SELF["uneven"], backend="fast")
