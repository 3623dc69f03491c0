"""The parts of a rehearsal that need no compiler: reading HLO, counts, lints, comparison."""

import dataclasses
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.parallel import flags
from sora_jax.parallel.peaks import CHIPS
from sora_jax.rehearsal import collectives, hlo, lints, mix, program, report, roofline, topology, traffic
from sora_jax.rehearsal.collectives import Collective
from sora_jax.types import BatchSpec

ROOT = Path(__file__).resolve().parent.parent
MESH = {"replica": 1, "fsdp": 4, "context": 2, "tensor": 1}
# The shape of what libtpu prints, cut down: a loop of 36 with a gather and a woven reduction, a loop of
# unknown length, an exchange that runs beside a fusion and one that does not.
MODULE = """HloModule jit_step, is_scheduled=true

%cond (p.1: (s32[], bf16[8,64])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(36)
  %p.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.4), direction=LT
}

%all-reduce-scatter.1 (input.1: f32[64,64]) -> f32[16,64] {
  %input.1 = f32[64,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,64]{1,0:T(8,128)} all-reduce(%input.1), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,64}
}

%body (p.2: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p.2 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %g.1 = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%g.1), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %rs = f32[16,64]{1,0:T(8,128)} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%g.1, %g.1)
}

%cond.2 (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %n.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=1
  ROOT %lt.3 = pred[]{:T(512)} compare(%i.3, %n.3), direction=LT
}

%body.2 (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %cp = bf16[8,64]{1,0} collective-permute(%p.4), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %t.4 = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%p.4)
}

ENTRY %main (a: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) while(%a), condition=%cond, body=%body
  %w.2 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%a), condition=%cond.2, body=%body.2
  %s.1 = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) all-to-all-start(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
  %f.1 = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%a), kind=kLoop, calls=%fused
  %d.1 = bf16[8,64]{1,0} all-to-all-done(%s.1)
  %s.2 = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[]{:S(2)}) all-to-all-start(%f.1), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}
  ROOT %d.2 = bf16[8,64]{1,0} all-to-all-done(%s.2)
}

%fused (q: bf16[8,64]) -> bf16[8,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  ROOT %n = bf16[8,64]{1,0} negate(%q)
}
"""  # noqa: E501


def of_kind(kind):
  return [c for c in collectives.find(hlo.parse(MODULE), MESH) if c.kind == kind]


def test_loops_are_multiplied_out_and_unknown_lengths_said():
  runs = hlo.runs(hlo.parse(MODULE))
  assert runs["body"] == (36, True) and runs["body.2"] == (1, False) and runs["main"] == (1, True)


def test_collectives_by_axis_and_bytes():
  (gather,), (scatter,), (permute,) = map(of_kind, ("all-gather", "reduce-scatter", "collective-permute"))
  assert (gather.axes, gather.group, gather.count) == (("fsdp",), 4, 36)
  assert gather.bytes_per_step == 36 * (32 * 64 * 2) * 3 / 4
  assert (scatter.axes, scatter.count, scatter.bytes_per_step) == (("fsdp",), 36, 36 * 64 * 64 * 4 * 3 / 4)
  assert (permute.axes, permute.exact, permute.bytes_per_step) == (("context",), False, 8 * 64 * 2)
  beside, alone = of_kind("all-to-all")
  assert beside.axes == ("context",) and beside.bytes_per_step == 8 * 64 * 2 / 2
  assert beside.overlapped and not alone.overlapped


def test_groups_over_two_axes_are_named_by_both():
  groups = np.arange(8)[None]
  assert collectives.axes_of(groups, MESH) == ("fsdp", "context")
  assert collectives.axes_of(np.arange(8)[:, None], MESH) == ()


def test_traffic_counts_loops_and_not_what_is_fused():
  body = 36 * (32 * 64 * 2 + 16 * 64 * 4)  # the gather and the scattered sum
  entry = 8 * 64 * 2 + 2 * (2 * 8 * 64 * 2 + 4)  # the fusion and the two starts; their dones are free
  other = 8 * 64 * 2  # the permutation, once
  assert traffic.hbm_bytes(hlo.parse(MODULE)) == pytest.approx(2 * (body + entry + other), rel=0.2)


def test_matmul_flops_multiply_scans():
  w = jnp.zeros((4, 8, 8))

  def step(x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  assert roofline.trace_flops(jax.jit(step), jnp.zeros((2, 8))) == 4 * 2 * 2 * 8 * 8


def test_live_tiles_are_those_of_a_mask():
  lengths = np.array([300, 1000, 512, 40])
  segment = np.repeat(np.arange(4), lengths)
  q, k = 256, 512
  live = sum(
    bool({*segment[i : i + q]} & {*segment[j : j + k]})
    for i in range(0, len(segment), q)
    for j in range(0, len(segment), k)
  )
  assert mix.live_tiles(lengths, q, k) == live


@pytest.mark.parametrize("name", mix.MIXES)
def test_mixes_fill_their_rows(name):
  spec = BatchSpec(rows=4, tokens=262_144, channels=3072, samples=256, text_tokens=1024)
  counted = mix.count(name, spec, (4, 16, 16), width=6144, tile=(512, 512))
  assert counted.tokens > 0.9 * 4 * 262_144
  assert counted.live_tiles < 0.5 * counted.all_tiles and counted.row_imbalance < 1.3


def gather_of(payload, axes, group):
  return Collective(
    kind="all-gather", axes=axes, group=group, count=1, payload=payload, overlapped=False, exact=True
  )


def test_link_time_of_rings_lines_and_the_network():
  at = topology.parse("v5p:4x4x4*2")
  rate, n = at.chip.link_rate, 10**9
  visits = {"replica": [2, 1, 1, 1, 1], "fsdp": [1, 4, 4, 1, 1], "context": [1, 1, 1, 4, 1]}
  seconds = lambda c, at=at: roofline.collective_seconds(c, visits, at)  # noqa: E731
  assert seconds(gather_of(n, ("context",), 4)) == (pytest.approx(n * 3 / 4 / (2 * rate)), 0)
  assert seconds(gather_of(n, ("fsdp",), 16)) == (pytest.approx(n * 15 / 16 / (4 * rate)), 0)
  assert seconds(gather_of(n, ("replica",), 2)) == (0, pytest.approx(n / 2 / at.chip.network_rate))
  line = topology.parse("v6e:8x8")  # too small to close to rings
  flat = {"fsdp": [1, 8, 8, 1]}
  links, _ = roofline.collective_seconds(gather_of(n, ("fsdp",), 64), flat, line)
  assert links == pytest.approx(n * 63 / 64 / (2 * line.chip.link_rate))


@pytest.mark.parametrize(
  "found,says",
  [
    (lints.replicated([("['w']", (2048, 1024))]), "2,097,152 elements.*mesh.fsdp divides"),
    (
      lints.shard_rows([("['w']", (6144, 6144), (12, 6144))], mesh_shape={"fsdp": 512}),
      "leaves 12; lower mesh.fsdp",
    ),
    (
      lints.torus(topology.parse("v5p:8x8x8"), {"context": [1, 1, 4, 1, 1]}, {"context": 4}),
      "context = 4 spans 4 of 8 chips .* 8, 64, 512",
    ),
    (lints.overlap([gather_of(10**10, ("fsdp",), 4)]), "none of 7.5 GB .*xla_flags"),
    (lints.memory(90 * 2**30, 95 * 2**30), "needs 90.0 GiB .* 95% of its 95.0 GiB.*remat"),
    (lints.batch(48, 1, {"replica": 1, "fsdp": 32}), "data.rows = 48 .* make data.rows 32 or 64"),
    (lints.tokens(1000, {"context": 16}), "make it a multiple of 16"),
    (lints.heads(16, {"context": 3, "tensor": 1}), "heads = 16 does not divide"),
  ],
)
def test_lints_name_figure_and_remedy(found, says):
  (lint,) = found
  assert re.search(says, lint.message), lint.message


def test_sound_plans_pass():
  at = topology.parse("v5p:8x8x8")
  sizes = {"replica": 1, "fsdp": 64, "context": 8, "tensor": 1}
  assert not lints.torus(at, {"fsdp": [1, 8, 8, 1, 1], "context": [1, 1, 1, 8, 1]}, sizes)
  assert not lints.batch(128, 2, sizes) and not lints.tokens(1024, sizes) and not lints.heads(48, sizes)
  assert not lints.shard_rows([("['w']", (36, 6144, 6144), (36, 96, 6144))], mesh_shape=sizes)
  assert not lints.memory(80 * 2**30, 95 * 2**30)
  assert not lints.overlap([dataclasses.replace(gather_of(10**10, ("fsdp",), 4), overlapped=True)])


@pytest.mark.parametrize(
  "name,says",
  [
    ("v5p", "is not GENERATION:AxBxC"),
    ("v9:4x4", "'v9' is none of v5e, v5p, v6e, tpu7x"),
    ("v5p:8x8", "a v5p slice has 3 dims"),
  ],
)
def test_topologies_are_refused_by_name(name, says):
  with pytest.raises(ValueError, match=says):
    topology.parse(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install '\.\[rehearse\]'"):
    topology.describe(topology.parse("v5e:4x4"))


def test_running_out_of_memory_is_read_from_the_compilers_words():
  text = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 150.40G of 95.74G hbm. Exceeded by 54.66G."
  )
  error = program._explained(RuntimeError(text))
  assert error.needed == pytest.approx(150.4 * 2**30) and error.limit == pytest.approx(95.74 * 2**30)
  text = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.13G) "
  )
  error = program._explained(RuntimeError(text + "exceeds available HBM (15.75G)."))
  assert error.needed == pytest.approx(20.13 * 2**30) and error.limit == pytest.approx(15.75 * 2**30)
  unknown = program._explained(RuntimeError("INVALID_ARGUMENT: No such compile option: 'xla_tpu_foo'"))
  assert isinstance(unknown, ValueError) and "xla_tpu_foo" in str(unknown)


def test_what_crosses_slices_is_counted_over_the_outermost_axis():
  text = """HloModule m
ENTRY %main (p: bf16[4]) -> bf16[4] {
  %p = bf16[4]{0} parameter(0)
  %t = token[] after-all()
  %r = (bf16[48,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%t), channel_id=7, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:511}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %f = bf16[4]{0} dot(%p, %p)
  ROOT %d = (bf16[48,8,128]{2,1,0}, token[]) recv-done(%r)
}
"""
  mesh = {"replica": 2, "fsdp": 64, "context": 8}
  (found,) = collectives.find(hlo.parse(text), mesh)
  assert (found.kind, found.axes, found.group, found.overlapped) == ("all-reduce", ("replica",), 2, True)
  assert found.payload == found.bytes_per_step == 48 * 8 * 128 * 2


def test_golden_files_show_what_changed(tmp_path):
  result = {
    "versions": {"jax": "1"}, "effort": "O0", "params": 10, "devices": 4, "hbm_bytes": {"peak": 10 * 2**20},
    "collectives": {"all-gather": {"fsdp": {"count": 3, "bytes": 10**8}}},
  }  # fmt: skip
  path = tmp_path / "golden.json"
  assert report.compare_golden(path, result) == ["golden.json is missing; write it with --write_golden"]
  report.write_golden(path, result)
  near = result | {"collectives": {"all-gather": {"fsdp": {"count": 3, "bytes": 10**8 + 10**6}}}}
  assert report.compare_golden(path, result) == report.compare_golden(path, near) == []
  more = result | {
    "collectives": {"all-gather": {"fsdp": {"count": 4, "bytes": 10**8}, "context": {"count": 1}}}
  }
  assert report.compare_golden(path, more) == [
    'collectives/all-gather/context: new, {"count": 1}',
    "collectives/all-gather/fsdp/count: 3 -> 4",
  ]
  assert report.compare_golden(path, result | {"versions": {"jax": "2"}}) is None
  assert report.compare_golden(path, result | {"effort": "O1"}) is None


def test_flag_sets_are_kept_apart_by_generation():
  assert set(flags.FLAGS) == set(CHIPS)
  # Elsewhere later compilers refuse them; v6e computes NaN with them.
  assert [x for x in flags.FLAGS if "collective_fusion=true" in flags.init_args(x)] == ["v5e"]
  for generation in ("v5e", "v5p", "v6e"):
    assert "sparse_core" not in flags.init_args(generation), generation
  assert "sparse_core" in flags.init_args("tpu7x")


def test_flags_are_printed_on_one_line_without_jax():
  program_text = (
    "import sys; sys.argv = ['x', '--generation=v5p']; from absl import flags; "
    "import sora_jax.xla_flags as m; "
    "flags.FLAGS(sys.argv); code = m.main(['x']); sys.exit(code or 'jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", program_text], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("\n") == 1 and done.stdout.startswith("--xla_") and "\\" not in done.stdout
  wrong = subprocess.run(
    [sys.executable, "-m", "sora_jax.xla_flags", "--generation=v9"], capture_output=True, text=True, cwd=ROOT
  )
  assert wrong.returncode == 2 and wrong.stderr.startswith(
    "error: no XLA flags are known for chip generation 'v9'"
  )


def test_large_replicated_tensors_are_found():
  sharding = lambda whole: types.SimpleNamespace(is_fully_replicated=whole)  # noqa: E731
  tensor = lambda size, whole: types.SimpleNamespace(size=size, shape=(size,), sharding=sharding(whole))  # noqa: E731
  setup = types.SimpleNamespace(
    mesh=types.SimpleNamespace(size=4),
    abstract={"a": tensor(2_000_000, True), "b": tensor(2_000_000, False), "c": tensor(10, True)},
  )
  assert [name for name, _ in program.large_replicated(setup, large=lints.LARGE)] == ["['a']"]
