"""One rehearsal: a config, a topology and a mode to a table of figures and lints."""

import contextlib
import dataclasses
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from sora_jax.models.dit import DiTConfig
from sora_jax.packing.geometry import Patch
from sora_jax.parallel import flags
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.rehearsal import collectives, gpu, hlo, lints, mix, program, roofline, topology, traffic
from sora_jax.rehearsal.lints import Lint
from sora_jax.rehearsal.mix import Counted
from sora_jax.rehearsal.program import Compiled, OutOfMemoryError
from sora_jax.rehearsal.topology import Topology
from sora_jax.tasks import registry
from sora_jax.training import feed
from sora_jax.training import step as step_lib
from sora_jax.training.state import Setup
from sora_jax.types import BatchSpec

# Effort of the compiler on speed (openxla.org/xla/effort_levels), as numbers: some versions of jax take no
# names. The least compiles 2 to 4 times faster and moves peak memory by a few per cent. Below O2 collectives
# stay in sequence, so that nothing can be said of their overlap.
EFFORTS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}
FAST = "O0"
OVERLAPPING = ("O2", "O3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RehearseConfig:
  """`topologies` are those that --all compiles, as v5p:8x8x8 or v5p:8x8x8*2 for two slices."""

  topologies: tuple[str, ...] = ()
  mix: str = "480p"  # sizes that the FLOPs are counted for; see rehearsal/mix.py

  def __post_init__(self):
    object.__setattr__(self, "topologies", tuple(self.topologies))
    if self.mix not in mix.MIXES:
      raise ValueError(f"config.rehearse.mix = {self.mix!r} is none of {', '.join(mix.MIXES)}")


def rehearse(
  name: str,
  config: ml_collections.ConfigDict,
  *,
  spec: BatchSpec,
  patch: Patch,
  at: Topology,
  mode: str = "train",
  effort: str = FAST,
  hlo_file: str = "",
) -> dict[str, Any]:
  """The figures of docs/rehearsal.md; `fits` = no lint fails. `hlo_file` gets the module's text."""
  how = {"spec": spec, "patch": patch, "at": at, "mode": mode, "effort": effort, "hlo_file": hlo_file}
  with gpu.cudnn_assumed() if at.is_gpu else contextlib.nullcontext():
    return _rehearse(name, config, **how)


def _rehearse(
  name: str,
  config: ml_collections.ConfigDict,
  *,
  spec: BatchSpec,
  patch: Patch,
  at: Topology,
  mode: str,
  effort: str,
  hlo_file: str,
) -> dict[str, Any]:
  if mode not in program.MODES:
    raise ValueError(f"--mode={mode} is none of {', '.join(program.MODES)}")
  config = ml_collections.ConfigDict(config.to_dict())
  mesh = make_mesh(registry.section(MeshConfig, config, "mesh"), topology.describe(at))
  if at.is_gpu:
    gpu.resolve_attention(config, registry.section(DiTConfig, config, "model"), spec.samples)
  program.resolve_attention(config)
  model = registry.section(DiTConfig, config, "model")
  sizes = registry.section(RehearseConfig, config, "rehearse").mix
  tile = program.attention_tile(model.attention, mesh, spec.tokens)
  counted = mix.count(sizes, spec, patch, width=model.width, tile=tile)
  shape = dict(mesh.shape)
  accumulate = config.train.accumulate if mode == "train" else 1
  found = [
    *lints.batch(spec.rows, accumulate, shape),
    *lints.tokens(spec.tokens, shape),
    *lints.heads(model.heads, shape),
    *lints.torus(at, roofline.spans(at, mesh), shape),
  ]
  setup = program.make_setup(config, spec, mesh)
  found += lints.replicated(program.large_replicated(setup, large=lints.LARGE))
  found += lints.shard_rows(program.state_shards(setup), mesh_shape=shape)
  result = {
    "config": name, "mode": mode, "topology": f"{at.name}*{at.num_slices}" if at.num_slices > 1 else at.name,
    "devices": mesh.size, "mesh": shape, "params": setup.num_params, "attention": model.attention,
    "tile": tile,
    "remat": model.remat, "mix": config.rehearse.mix, "rows": spec.rows, "row_tokens": spec.tokens,
    "versions": {p: importlib.metadata.version(p) for p in ("jax", at.compiler)}, "effort": effort,
    "hbm_limit_bytes": at.chip.hbm_bytes,
    **_counts(setup, model, counted, mode, spec),
  }  # fmt: skip
  if any(lint.name == "batch" for lint in found):  # no such program can be built
    return _unfit(result, found)
  options = {
    **({} if at.is_gpu else flags.flags_of(at.chip.generation)),
    "optimization_level": EFFORTS[effort],
  }
  try:
    compiled = program.compile_program(config, setup, mode, options)
  except OutOfMemoryError as error:
    limit = at.chip.hbm_bytes if math.isnan(error.limit) else error.limit
    result["hbm_peak_bytes"] = None if math.isnan(error.needed) else int(error.needed)
    if math.isnan(error.needed):
      found.append(Lint("memory", f"the compiler ran out of HBM ({error}); {lints.MEMORY_REMEDY}"))
    else:
      found += lints.memory(error.needed, limit, at_least=True)
    return _unfit(result, found)
  if hlo_file:
    Path(hlo_file).write_text(compiled.text)
  return _figures(result, found, config, setup, compiled, at, mesh)


def _counts(setup: Setup, model: DiTConfig, counted: Counted, mode: str, spec: BatchSpec) -> dict[str, Any]:
  # A sampling step runs the network forward alone, on both sides of the guidance.
  flops = float(np.sum(setup.task.flops_fn(counted.batch)))
  return {
    "tokens": counted.tokens,
    "samples": counted.samples,
    "fill": counted.tokens / (spec.rows * spec.tokens),
    "row_imbalance": counted.row_imbalance,
    "live_tile_share": counted.live_tiles / counted.all_tiles,
    "live_tile_flops_per_step": roofline.tile_flops(model, counted, train=mode == "train"),
    "model_flops_per_step": flops if mode == "train" else flops / 3,
  }


def _unfit(result: dict[str, Any], found: list[Lint]) -> dict[str, Any]:
  blank = dict.fromkeys(("compile_seconds", "roofline_step_seconds", "roofline_mfu", "hbm_peak_bytes"))
  return {
    **blank,
    "collectives": {},
    **result,
    "lints": [dataclasses.asdict(x) for x in found],
    "fits": False,
  }


def _figures(
  result: dict[str, Any],
  found: list[Lint],
  config: ml_collections.ConfigDict,
  setup: Setup,
  compiled: Compiled,
  at: Topology,
  mesh: Mesh,
) -> dict[str, Any]:
  module = hlo.parse(compiled.text)
  moved = collectives.find(module, mesh.shape)
  found = [*found, *lints.memory(compiled.memory["peak"], at.chip.hbm_bytes)]
  if at.is_gpu:
    result["notes"] = gpu.notes(compiled.memory["peak"], at.chip.hbm_bytes)
  elif result["effort"] not in OVERLAPPING:
    result["notes"] = [
      f"compiled at --effort={result['effort']}: nothing overlaps; --effort=O2 shows what does"
    ]
  if result["effort"] in OVERLAPPING:
    found += lints.overlap(moved)
  steps, scale = 1, 1.0
  if result["mode"] == "train":
    batch = feed.batch_struct(setup.task)
    with jax.set_mesh(mesh):
      step = step_lib.make_train_step(setup, batch=batch, accumulate=config.train.accumulate)
      matmuls = roofline.trace_flops(step, setup.abstract, batch)
  else:
    steps = config.sample.num_inference_steps
    scale = steps * (1 if config.sample.guidance_scale == 1.0 else 2)
    matmuls = 0.0  # of the whole program; the model's own count stands in
  flops = scale * (result["live_tile_flops_per_step"] + (matmuls or result["model_flops_per_step"]))
  seconds = roofline.times(
    flops_per_device=flops / mesh.size,
    hbm_bytes=traffic.hbm_bytes(module),
    collectives=moved,
    topology=at,
    mesh=mesh,
  )
  rate = at.chip.flops * mesh.size
  useful = scale * result["model_flops_per_step"]
  return {
    **result,
    "hbm_bytes": compiled.memory,
    "hbm_peak_bytes": compiled.memory["peak"],
    "compile_seconds": compiled.compile_seconds,
    "lower_seconds": compiled.lower_seconds,
    "compile_cpu_seconds": compiled.cpu_seconds,
    "collectives": collectives.table(moved),
    "program_flops_per_step": flops,
    "times": dataclasses.asdict(seconds),
    "roofline_step_seconds": seconds.bound,
    "roofline_mfu": useful / rate / seconds.bound,
    "serial_step_seconds": seconds.serial,
    "serial_mfu": useful / rate / seconds.serial,
    "lints": [dataclasses.asdict(x) for x in found],
    "fits": not found,
  }
