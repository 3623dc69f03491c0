"""Rehearsals for GPUs; those by the real compiler want a jaxlib for CUDA, pip install '.[rehearse-gpu]'."""

import json
import os
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.nn import attention, attention_gpu
from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.rehearsal import collectives, gpu, hlo, lints, roofline, topology
from sora_jax.rehearsal.collectives import Collective
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
by_compiler = pytest.mark.skipif(gpu.compiler() is None, reason="no jaxlib for CUDA")


def rehearse(*args):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  (done,) = forked.run([("sora_jax.rehearse", *args)], env)
  return done


def collective(kind, axes, group, payload=8e9):
  return Collective(
    kind=kind, axes=axes, group=group, count=1, payload=int(payload), overlapped=False, exact=True
  )


def test_names():
  at = topology.parse("h200:8x4")
  assert at.is_gpu and at.dims == (8, 4) and at.key == "h200_8x4"
  for name, word in (("h200:8", "2 dims"), ("h200:1x8*2", "no slices"), ("b9:1x8", "none of")):
    with pytest.raises(ValueError, match=word):
      topology.parse(name)


@pytest.mark.skipif(gpu.compiler() is not None, reason="there is a jaxlib for CUDA")
def test_without_the_compiler_it_is_one_line():
  done = rehearse("--config=configs/t2v_700m.py:debug", "--topology=h200:1x8")
  assert done.returncode == 2 and "rehearse-gpu" in done.stderr.splitlines()[-1], done.stderr
  assert "Traceback" not in done.stderr


def test_seconds_on_nvlink_and_network():
  chip = gpu.GPUS["h200"]
  visits = {"fsdp": [1, 8, 2, 1], "context": [1, 1, 4, 1], "replica": [1, 4, 1, 1]}

  def seconds(kind, *axes, group):
    return gpu.collective_seconds(collective(kind, axes, group), visits, chip)

  # 8 GB among 4 GPUs of a host: each sends 6 GB.
  assert seconds("all-gather", "context", group=4) == pytest.approx((6e9 / 4.5e11, 0))
  assert seconds("all-reduce", "context", group=4) == pytest.approx((12e9 / 4.5e11, 0))
  # Over 8 hosts, 2 GPUs each: a host misses 7 GB, which come in by 2 adapters.
  assert seconds("all-gather", "fsdp", group=16) == pytest.approx((7.5e9 / 4.5e11, 3.5e9 / 5e10))
  # One GPU of each of 4 hosts: nothing to be had from a neighbour.
  assert seconds("reduce-scatter", "replica", group=4) == pytest.approx((0, 6e9 / 5e10))
  # Of an exchange each GPU sends 1/16 to its neighbour and 14/16 to other hosts.
  assert seconds("all-to-all", "fsdp", group=16) == pytest.approx((0.5e9 / 4.5e11, 7e9 / 5e10))
  assert seconds("collective-permute", "fsdp", group=2) == pytest.approx((0, 8e9 / 5e10))


def test_exchanges_between_hosts_are_a_lint():
  at = topology.parse("h200:2x8")
  visits = {"replica": [1, 1, 1, 1], "fsdp": [1, 1, 1, 1], "context": [1, 2, 8, 1], "tensor": [1, 1, 1, 1]}
  shape = {"replica": 1, "fsdp": 1, "context": 16, "tensor": 1}
  (lint,) = lints.torus(at, visits, shape)
  assert lint.name == "hosts" and "mesh.context = 16 spans 2 hosts of h200:2x8" in lint.message
  # Half of a host's GPUs is no part of a torus, and parameters may cross hosts.
  assert not lints.torus(at, visits | {"fsdp": [1, 2, 2, 1], "context": [1, 1, 4, 1]}, shape)


def test_several_arrays_of_one_start_all_count():
  groups = "replica_groups={{0,1,2,3}}, dimensions={0}"
  text = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[8,64]) -> bf16[32,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %s = ((bf16[8,64]{1,0}, f32[16]{0}), (bf16[32,64]{1,0}, f32[64]{0})) all-gather-start(%a, %b), GROUPS
  %d = (bf16[32,64]{1,0}, f32[64]{0}) all-gather-done(%s)
  %r = ((f32[64]{0}, f32[32]{0}), (f32[16]{0}, f32[8]{0})) reduce-scatter-start(%b, %b), GROUPS
  %e = (f32[16]{0}, f32[8]{0}) reduce-scatter-done(%r)
  ROOT %o = bf16[32,64]{1,0} get-tuple-element(%d), index=0
}
"""
  gather, scatter = collectives.find(hlo.parse(text.replace("GROUPS", groups)), {"fsdp": 4})
  assert gather.payload == 32 * 64 * 2 + 64 * 4 and scatter.payload == (64 + 32) * 4


def test_hosts_of_gpus_are_no_slices():
  """jax numbers slices of GPUs by host; parameters are split over hosts all the same, context within one."""

  def devices(platform):
    return [
      types.SimpleNamespace(
        id=i, platform=platform, device_kind="NVIDIA H200", slice_index=i // 4, coords=None
      )
      for i in range(8)
    ]

  ids = np.vectorize(lambda d: d.id)(mesh_lib._arrange((1, 4, 2, 1), devices("gpu")))
  np.testing.assert_array_equal(ids.reshape(4, 2), np.arange(8).reshape(4, 2))
  with pytest.raises(ValueError, match="slices"):
    mesh_lib._arrange((1, 4, 2, 1), devices("other"))


def test_what_is_assumed_ends_with_the_rehearsal():
  before = attention_gpu._refusal_of_device
  with pytest.raises(ZeroDivisionError), gpu.cudnn_assumed():
    assert attention_gpu._refusal_of_device is not before
    raise ZeroDivisionError
  assert attention_gpu._refusal_of_device is before
  assert "backend is cpu" in attention_gpu.refusal(jnp.bfloat16, 64, 4)


def compiled_attention(sizes, *, dtype=jnp.bfloat16, tokens=1024, keys=0, heads=8, head=64, remat=False):
  """HLO of the gradients of attention with backend "gpu" on h200:1x8."""
  at = topology.parse("h200:1x8")
  mesh = make_mesh(MeshConfig(**dict(zip(mesh_lib.AXES, sizes))), topology.describe(at))

  def struct(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(("replica", "fsdp"), *spec)))

  q = struct((8, tokens, heads, head), dtype, "context", "tensor")
  q_segment = struct((8, tokens), jnp.int32, "context")
  k = struct((8, keys, heads, head), dtype, None, "tensor") if keys else q
  k_segment = struct((8, keys), jnp.int32) if keys else q_segment

  def total(q, k, v, q_segment, k_segment):
    def run(q, k, v):
      return attention.attend(q, k, v, q_segment, k_segment, backend="gpu", num_segments=6)

    o = (jax.checkpoint(run) if remat else run)(jnp.sin(q), k, v)
    return jnp.square(o.astype(jnp.float32)).sum()

  with gpu.cudnn_assumed(), jax.set_mesh(mesh):
    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return grad.lower(q, k, k, q_segment, k_segment).compile().as_text()


def calls(text):
  return [
    len(re.findall(rf'custom_call_target="__cudnn\$fmhaSoftmax{end}"', text)) for end in ("", "Backward")
  ]


@by_compiler
@pytest.mark.parametrize(
  "case, forward",
  (
    (dict(sizes=(1, 8, 1, 1)), 1),
    (dict(sizes=(1, 8, 1, 1), remat=True), 2),
    (dict(sizes=(1, 2, 4, 1), remat=True), 2),
    (dict(sizes=(2, 1, 2, 2), head=128), 1),
    (dict(sizes=(1, 2, 4, 1), keys=256, remat=True), 2),
    (dict(sizes=(1, 8, 1, 1), dtype=jnp.float32), 0),
    (dict(sizes=(1, 8, 1, 1), head=36), 0),
  ),
  ids=("fsdp", "remat", "context", "tensor", "text", "float32 falls back", "heads of 36 fall back"),
)
def test_packed_attention_compiles_for_hopper(case, forward):
  assert calls(compiled_attention(**case)) == [forward, min(forward, 1)]


@pytest.mark.slow
@by_compiler
def test_a_tiny_pod_is_rehearsed_as_a_user_would(tmp_path):
  out = tmp_path / "table.json"
  size = ["--config.mesh.context=2", "--config.data.rows=8"]
  done = rehearse("--config=configs/t2v_700m.py:debug", "--topology=h100:2x4", f"--json={out}", *size)
  assert done.returncode == 0, done.stderr
  result = json.loads(out.read_text())
  assert result["devices"] == 8 and result["fits"] and not result["lints"]
  assert result["attention"] == "gpu" and 0 < result["hbm_peak_bytes"] < result["hbm_limit_bytes"]
  assert "context" in result["collectives"]["all-to-all"] and result["times"]["network"] > 0
  assert "HBM per chip" in done.stdout and "nothing is tuned" in done.stdout


@by_compiler
def test_places_are_hosts_and_their_gpus():
  at = topology.parse("h200:2x4")
  mesh = make_mesh(MeshConfig(fsdp=4, context=2), topology.describe(at))
  visits = roofline.spans(at, mesh)
  assert visits["fsdp"] == [1, 2, 2, 1] and visits["context"] == [1, 1, 2, 1]
