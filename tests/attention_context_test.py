"""Context parallelism beyond the number of heads: ring, and ring of all-to-all groups, equal one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.nn import attention_context
from sora_jax.nn.attention import attend
from sora_jax.nn.attention_dense import attend_dense
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from tests.attention_test import inputs, packing, value_and_grads
from tests.attention_tpu_test import compile_for, kernels_of, topology

# Rows: one sample over all chunks, samples within chunks, across their borders, padding only, uneven ends.
SEGMENT = packing([64], [8] * 8, [9, 11, 12], [1, 2, 3, 40], [], [1] * 64, [61, 3], [30], total=64)
TEXT = packing([3], [1] * 8, [3, 7, 2], [1, 0, 5], [], [1] * 20, [2, 2], [], total=20)


def on_mesh(sizes, run, args):
  mesh = make_mesh(MeshConfig(**dict(zip(("replica", "fsdp", "context", "tensor"), sizes))))
  rows = ("replica", "fsdp")
  spread, whole = P(rows, "context"), P(rows)
  keys = whole if args[1].shape[1] != args[0].shape[1] else spread
  specs = [spread, keys, keys, spread, spread, keys]
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs)]
    compiled = jax.jit(functools.partial(value_and_grads, run)).lower(*placed).compile()
    return compiled(*placed), compiled.as_text()


def counts(text):
  return {
    name: text.count(f" {name}(") + text.count(f" {name}-start(")
    for name in ("all-to-all", "collective-permute")
  }


@pytest.mark.parametrize(
  "sizes, heads, layout",
  [
    ((1, 1, 8, 1), 1, "ring"),
    ((1, 1, 8, 1), 2, "both"),
    ((1, 2, 4, 1), 6, "both"),
    ((1, 1, 4, 2), 4, "both"),
    ((2, 1, 4, 1), 3, "ring"),
    ((1, 2, 4, 1), 4, "all-to-all"),
    ((1, 1, 2, 4), 8, "all-to-all"),
  ],
)
def test_equals_one_device(sizes, heads, layout):
  args = (*inputs(SEGMENT, SEGMENT, heads=heads), SEGMENT, SEGMENT)
  want = value_and_grads(attend_dense, *args)
  got, text = on_mesh(sizes, functools.partial(attend, backend="chunked"), args)
  for one, other in zip(got, want):
    np.testing.assert_allclose(one, other, atol=1e-5)
  found = counts(text)
  assert (found["all-to-all"] > 0) == (layout != "ring"), found
  assert (found["collective-permute"] > 0) == (layout != "all-to-all"), found


@pytest.mark.parametrize("backend", ["dense", "tpu"])
def test_ring_of_any_backend(backend):
  args = (*inputs(SEGMENT, SEGMENT, heads=2), SEGMENT, SEGMENT)
  got, _ = on_mesh((2, 1, 4, 1), functools.partial(attend, backend=backend), args)
  for one, other in zip(got, value_and_grads(attend_dense, *args)):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_text_stays_whole():
  """Queries of a context shard meet all keys of the text: nothing is exchanged forward."""
  args = (*inputs(SEGMENT, TEXT, heads=3), SEGMENT, TEXT)
  got, text = on_mesh((1, 1, 8, 1), functools.partial(attend, backend="chunked"), args)
  for one, other in zip(got, value_and_grads(attend_dense, *args)):
    np.testing.assert_allclose(one, other, atol=1e-5)
  assert not any(counts(text).values())


def test_split():
  assert attention_context.split(8, 16) == (8, 1)
  assert attention_context.split(16, 8) == (8, 2)
  assert attention_context.split(8, 6) == (2, 4)
  assert attention_context.split(4, 3) == (1, 4)


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_steps_without_a_live_tile_compute_nothing(poisoned):
  """NaN in chunk 2 of keys stays with the samples of that chunk: the chunks of the others meet it nowhere."""
  segment = np.repeat(np.arange(1, 9, dtype=np.int32), 8)[None].repeat(2, 0)
  clean = inputs(segment, segment, heads=1)
  bad = segment == 3
  dirty = [
    np.where(bad[..., None, None], np.nan, x) if name == poisoned else x for name, x in zip("qkvw", clean)
  ]
  run = functools.partial(attend, backend="dense")  # computes every pair of a chunk it is called for
  (want, _), (got, _) = (on_mesh((1, 1, 8, 1), run, (*x, segment, segment)) for x in (clean, dirty))
  for g, w in zip(got, want):
    np.testing.assert_array_equal(np.asarray(g)[~bad], np.asarray(w)[~bad])
  assert any(np.isnan(np.asarray(g)[bad]).any() for g in got)


def test_remat_keeps_named_residuals():
  mesh = make_mesh(MeshConfig(fsdp=1, context=8))
  segment = SEGMENT[:1]
  q = inputs(segment, segment, heads=1)[0]

  def stacked(policy, q):
    def layer(x, _):
      return x + attend(x, x, x, segment, segment, backend="chunked"), None

    return jax.lax.scan(jax.checkpoint(layer, policy=policy), q, None, length=2)[0].sum()

  def exponentials(policy):
    with jax.set_mesh(mesh):
      return str(jax.make_jaxpr(jax.grad(functools.partial(stacked, policy)))(q)).count("exp ")

  names = jax.checkpoint_policies.save_only_these_names("attention_o", "attention_lse")
  assert 0 < exponentials(names) < exponentials(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_compiles_for_four_chips(heads):
  """Ring, both, and all-to-all around the kernels."""
  mesh = make_mesh(MeshConfig(fsdp=1, context=4), devices=topology("v5p"))
  compiled = compile_for("v5p", 65536, head=128, heads=heads, backend="auto", mesh=mesh)
  assert len(kernels_of(compiled)) == 3
