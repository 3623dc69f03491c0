"""The TPU kernels, interpreted: right, skipping, masked only where needed; and they compile for TPUs."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.nn import attention_tiles
from sora_jax.nn import attention_tpu_kernels as kernels
from sora_jax.nn.attention import attend
from sora_jax.nn.attention_dense import DENSE, attend_dense
from sora_jax.nn.attention_pair import attend_with
from sora_jax.nn.attention_tpu import Blocks, tpu
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.rehearsal.run import EFFORTS
from tests.attention_test import inputs, packing

SMALL = tpu(Blocks(128, 128, 16))
L, M = 300, 90  # neither is a multiple of the block, nor are two rows of them
SELF = {
  "one segment": packing([300], [299], total=L),
  "many": packing([13, 1, 1, 90, 1, 150], [40] * 7, total=L),
  "single tokens": packing([1] * 300, [1] * 5, total=L),
  "padding rows": packing([], [200, 27], total=L),
  "all padding": packing([], [], total=L),
}
CROSS = {
  "captions": (packing([100, 80, 60], [256, 20], total=L), packing([7, 30, 2], [40, 50], total=M)),
  "missing captions": (packing([100, 80, 60], [256, 20], total=L), packing([0, 30], [40], total=M)),
}


@functools.cache
def compiled(run):
  """value and gradients, with the segments as arguments: one program serves all packings of a shape."""

  def all_of(q, k, v, w, q_segment, k_segment):
    def total(q, k, v):
      o = run(q, k, v, q_segment, k_segment)
      return (o.astype(jnp.float32) * w).sum(), o

    grads, o = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return (o, *grads)

  return jax.jit(all_of)


RUN = {"tpu": functools.partial(attend_with, SMALL), "dense pair": functools.partial(attend_with, DENSE)}


def assert_as_reference(run, q_segment, k_segment, seed=0):
  args = (*inputs(q_segment, k_segment, seed=seed), q_segment, k_segment)
  for got, want in zip(compiled(run)(*args), compiled(attend_dense)(*args)):
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("backend", RUN)
def test_self_attention(backend):
  for segment in SELF.values():
    assert_as_reference(RUN[backend], segment, segment)


@pytest.mark.parametrize("backend", RUN)
def test_cross_attention(backend):
  for segments in CROSS.values():
    assert_as_reference(RUN[backend], *segments)


def test_random_packings():
  rng = np.random.default_rng(0)
  for seed in range(12):
    parts = rng.integers(1, 40)
    lengths = rng.multinomial(rng.integers(1, L + 1), np.ones(parts) / parts, size=2)
    segment = packing(*lengths, total=L)
    assert_as_reference(RUN["tpu"], segment, segment, seed)
    k_lengths = rng.multinomial(rng.integers(1, M + 1), np.ones(parts) / parts, size=2)
    assert_as_reference(RUN["tpu"], segment, packing(*k_lengths, total=M), seed)


def test_any_order_of_segments_is_right():
  segment = np.random.default_rng(2).integers(0, 5, (2, L)).astype(np.int32)
  assert_as_reference(RUN["tpu"], segment, segment)
  # Runs that return: blocks of one segment with blocks of another between them.
  segment = np.repeat(np.array([[1, 2, 1, 3, 1, 1, 2]], np.int32), 128, axis=1)[:, : 2 * L].reshape(2, L)
  assert_as_reference(RUN["tpu"], segment, segment)


def test_queries_without_keys_are_zero():
  q_segment, k_segment = CROSS["missing captions"]
  args = inputs(q_segment, k_segment)
  o, dq, dk, dv = map(np.asarray, compiled(RUN["tpu"])(*args, q_segment, k_segment))
  lonely = ~(q_segment[:, :, None] == np.where(k_segment, k_segment, -1)[:, None]).any(-1)
  assert (o[lonely] == 0).all() and (dq[lonely] == 0).all() and (o[~lonely] != 0).all()
  assert (dk[k_segment == 0] == 0).all() and (dv[k_segment == 0] == 0).all()


def test_nan_in_padding_reaches_nothing():
  for q_segment, k_segment in ((SELF["many"],) * 2, CROSS["captions"]):
    clean = inputs(q_segment, k_segment)
    places = (q_segment, k_segment, k_segment, q_segment)
    dirty = [jnp.where((s == 0)[..., None, None], jnp.nan, x) for x, s in zip(clean, places)]
    dirty[3] = clean[3]
    want, got = (compiled(RUN["tpu"])(*x, q_segment, k_segment) for x in (clean, dirty))
    for g, w in zip(got, want):
      np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("poisoned", range(4), ids=["q", "k", "v", "do"])
def test_tiles_without_a_live_pair_are_not_computed(poisoned):
  """NaN in one sample would reach the others through any tile that holds both, masked or not: 0 * NaN."""
  segment = np.stack([np.repeat([1, 2], [128, 172]), np.repeat([1, 2], [84, 216])]).astype(np.int32)
  # In the line of both rows the borders are at 128, 300 and 384; blocks are of 128.
  bad = np.zeros_like(segment, bool)
  bad[1] = segment[1] == 2
  clean = inputs(segment, segment)
  dirty = list(clean)
  dirty[poisoned] = jnp.where(bad[..., None, None], jnp.nan, clean[poisoned])
  want, got = (compiled(RUN["tpu"])(*x, segment, segment) for x in (clean, dirty))
  for g, w in zip(got, want):
    np.testing.assert_array_equal(np.asarray(g)[~bad], np.asarray(w)[~bad])
  assert any(np.isnan(np.asarray(g)[bad]).any() for g in got)


def test_inner_tiles_do_no_mask_arithmetic():
  """With a list that lies, calling a tile of two samples inner, all its pairs are computed."""
  segment = jnp.asarray(np.repeat([1, 2], 64), jnp.int32)
  q, k, v, _ = inputs(segment[None], segment[None], heads=1)
  lines = [x[0].transpose(1, 0, 2) for x in (q, k, v)]
  flags = attention_tiles.FIRST | attention_tiles.LAST
  results = {}
  for inner in (0, attention_tiles.INNER):
    tiles = attention_tiles.TileList(jnp.full(1, flags | inner, jnp.int32), jnp.int32(1), jnp.ones(1, bool))
    how = {"block_q": 128, "block_k": 128, "dtype": jnp.float32, "vmem": None, "interpret": True}
    results[inner] = kernels.forward(tiles, *lines, segment, segment, **how)[0].transpose(2, 0, 1)[None]
  np.testing.assert_allclose(results[0], attend_dense(q, k, v, segment[None], segment[None]), atol=2e-5)
  one = jnp.ones_like(segment)[None]
  np.testing.assert_allclose(results[attention_tiles.INNER], attend_dense(q, k, v, one, one), atol=2e-5)


@pytest.mark.parametrize("poisoned", [1, 2, 3], ids=["k", "v", "do"])
def test_keys_of_a_tile_that_no_query_meets_are_not_computed(poisoned):
  """One tile of keys holds both samples; NaN in its last part reaches no query of the first sample alone."""
  segment = np.repeat([1, 2], [300, 724]).astype(np.int32)[None]
  run = functools.partial(attend_with, tpu(Blocks(128, 1024, 16)))
  clean = inputs(segment, segment)
  dirty = list(clean)
  dirty[poisoned] = clean[poisoned].at[:, 512:].set(jnp.nan)
  want, got = (compiled(run)(*x, segment, segment) for x in (clean, dirty))
  for g, w in zip(got[:2], want[:2]):
    np.testing.assert_array_equal(g[:, :256], w[:, :256])  # o, dq
  assert_as_reference(run, segment, segment)
  if poisoned == 3:  # keys that meet no query of the second sample
    for g, w in zip(got[2:], want[2:]):
      np.testing.assert_array_equal(g[:, :256], w[:, :256])
  assert any(np.isnan(np.asarray(g)).any() for g in got)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("block_k", [1024, 640])  # five times 128 keys in three parts of two
def test_a_tile_says_which_of_its_keys_are_live(by_key, block_k):
  rng = np.random.default_rng(0)
  block_q, tokens = 256, 5120
  at_once = attention_tiles.keys_at_once(block_k)
  for count in (1, 3, 10, 40):
    lengths = rng.multinomial(tokens - 100, np.ones(count) / count)
    line = jnp.asarray(packing(lengths, total=tokens)[0])
    most = attention_tiles.most_tiles(1, tokens, tokens, block_q, block_k)
    tiles, num, _ = attention_tiles.tile_list(line, line, block_q, block_k, most, by_key=by_key)
    tiles = np.asarray(tiles)[: int(num)]
    q, k = (np.asarray(line).reshape(-1, n) for n in (block_q, at_once))
    for tile in tiles:
      i, j = int(attention_tiles.major(tile)), int(attention_tiles.minor(tile))
      i, j = (j, i) if by_key else (i, j)
      start, stop = map(int, attention_tiles.live_keys(tile, block_k))
      per = block_k // at_once
      live = [n for n in range(per) if set(q[i]) & set(k[j * per + n]) - {0}]
      step = -(-per // 4)
      assert start == live[0] // step * step and stop == min((live[-1] // step + 1) * step, per)


def every_tile(q_segment, k_segment, block):
  """Live pairs of blocks, the long way, and whether all their pairs of tokens are."""
  q, k = (np.asarray(x) for x in attention_tiles.unique_segments(q_segment, k_segment))
  q, k = (np.pad(x, (0, -len(x) % block)).reshape(-1, block) for x in (q, k))
  pairs = ((i, j, set(q[i]), set(k[j])) for i in range(len(q)) for j in range(len(k)))
  return {(i, j): len(a | b) == 1 for i, j, a, b in pairs if (a & b) - {0}}


@pytest.mark.parametrize("by_key", [False, True])
def test_list_is_that_of_live_tiles(by_key):
  cases = [(s, s) for s in SELF.values()] + [CROSS["captions"]]
  for q_segment, k_segment in cases:
    block, most = 32, attention_tiles.most_tiles(2, L, k_segment.shape[1], 32, 32)
    q_line, k_line = attention_tiles.unique_segments(q_segment, k_segment)
    q_line, k_line = (jnp.pad(x, (0, -len(x) % block)) for x in (q_line, k_line))
    tiles, count, live = attention_tiles.tile_list(q_line, k_line, block, block, most, by_key=by_key)
    assert tiles.shape == (most,)
    tiles = np.asarray(tiles)[: int(count)]
    listed = list(zip(attention_tiles.major(tiles).tolist(), attention_tiles.minor(tiles).tolist()))
    inner = {(j, i) if by_key else (i, j): v for (i, j), v in every_tile(q_segment, k_segment, block).items()}
    np.testing.assert_array_equal(np.flatnonzero(live), sorted({i for i, _ in inner}))
    if not inner:
      assert listed == [(0, 0)] and tiles[0] == attention_tiles.FIRST | attention_tiles.LAST
      continue
    assert listed == sorted(inner)
    for at, (pair, tile) in enumerate(zip(listed, tiles.tolist())):
      first = at == 0 or listed[at - 1][0] != pair[0]
      last = at + 1 == len(listed) or listed[at + 1][0] != pair[0]
      assert tile & 7 == first * attention_tiles.FIRST + last * attention_tiles.LAST + (
        inner[pair] * attention_tiles.INNER
      )


def test_static_length_is_enough_and_tight():
  for rows, tokens, keys in ((1, 1000, 1000), (3, 1000, 1000), (5, 70, 20), (64, 256, 100)):
    segments = np.ones((rows, tokens), np.int32), np.ones((rows, keys), np.int32)
    want = len(every_tile(*segments, 128))
    assert attention_tiles.most_tiles(rows, tokens, keys, 128, 128) == want


def test_tiles_counted_on_the_host():
  segment = packing([32, 32, 32, 32], [128], total=128)
  assert attention_tiles.count_live(segment, 16, 16) == (4 * 2 * 2 + 8 * 8, 2 * 8 * 8)
  assert attention_tiles.count_live(np.zeros((2, 40), np.int32), 16, 16) == (0, 18)
  assert attention_tiles.count_live(packing([40], total=40), 1024, 1024) == (1, 1)


def test_bfloat16():
  segment = SELF["many"]
  args = inputs(segment, segment)
  low = [x.astype(jnp.bfloat16) for x in args[:3]]
  wanted = compiled(attend_dense)(*args, segment, segment)
  for got, want in zip(compiled(RUN["tpu"])(*low, args[3], segment, segment), wanted):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.06)


def test_remat_keeps_named_residuals():
  segment = SELF["many"]

  def stacked(policy, q):
    def layer(x, _):
      return x + attend(x, x, x, segment, segment, backend="tpu"), None

    return jax.lax.scan(jax.checkpoint(layer, policy=policy), q, None, length=2)[0].sum()

  names = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")
  q = inputs(segment, segment)[0]
  calls = {
    policy: str(jax.make_jaxpr(jax.grad(functools.partial(stacked, policy)))(q)).count(
      "name=packed_attention_forward"
    )
    for policy in (names, jax.checkpoint_policies.nothing_saveable)
  }
  assert calls[names] * 2 == calls[jax.checkpoint_policies.nothing_saveable] > 0


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def topology(generation):
  """One chip of a TPU that is not there."""
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # compiling alone may share the library
  topologies = pytest.importorskip("jax.experimental.topologies")
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices
  except Exception as error:
    pytest.skip(f"no TPU compiler for {generation}: {type(error).__name__}: {str(error)[:200]}")


def compile_for(generation, tokens, *, head, dtype=jnp.bfloat16, keys=0, heads=2, backend="tpu", mesh=None):
  mesh = mesh or make_mesh(MeshConfig(), devices=topology(generation)[:1])
  split = NamedSharding(mesh, P(None, "context"))
  whole = NamedSharding(mesh, P())
  q = jax.ShapeDtypeStruct((1, tokens, heads, head), dtype, sharding=split)
  k = jax.ShapeDtypeStruct((1, keys or tokens, heads, head), dtype, sharding=whole if keys else split)
  q_segment, k_segment = (jax.ShapeDtypeStruct(x.shape[:2], jnp.int32, sharding=x.sharding) for x in (q, k))

  def total(q, k, v, q_segment, k_segment):
    return attend(q, k, v, q_segment, k_segment, backend=backend).astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, q_segment, k_segment)
  # Less effort at scheduling, a third of the time.
  return lowered.compile(compiler_options={"optimization_level": EFFORTS["O0"]})


def kernels_of(compiled):
  return sorted(set(re.findall(r"packed_attention_\w+", compiled.as_text())))


KERNELS = ["packed_attention_dkv", "packed_attention_dq", "packed_attention_forward"]


@pytest.mark.parametrize("generation, head", [("v5e", 64), ("v5p", 128), ("v6e", 72), ("tpu7x", 128)])
def test_compiles(generation, head):
  compiled = compile_for(generation, 8192, head=head, backend="auto")
  assert kernels_of(compiled) == KERNELS
  assert compiled.memory_analysis().temp_size_in_bytes < 2**27  # scores would be 2**28 a head and more


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8192, 65536, 262144])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles_at_every_length(generation, tokens):
  for head, dtype in ((72, jnp.bfloat16), (128, jnp.bfloat16), (64, jnp.float32)):
    assert kernels_of(compile_for(generation, tokens, head=head, dtype=dtype)) == KERNELS
  assert kernels_of(compile_for(generation, tokens, head=128, keys=512)) == KERNELS


@pytest.mark.slow
def test_compiles_beyond_the_list():
  """Where the list of all tiles is too long for SMEM, the program also holds the chunked path."""
  compiled = compile_for("v5e", 524288, head=128, heads=1)
  assert kernels_of(compiled) == KERNELS and "conditional" in compiled.as_text()


def test_long_lists_fall_back():
  """With room for few tiles: the kernel where what is live fits, else the chunked path; both are right."""
  run = functools.partial(attend_with, tpu(Blocks(128, 128, 15), max_tiles=14))
  counts = []
  for lengths in ([300], [60] * 5):
    segment = packing(lengths, lengths, total=L)
    counts.append(len(every_tile(segment, segment, 128)))
    assert_as_reference(run, segment, segment)
  assert counts[0] > 14 >= counts[1]
