"""The very programs of training and sampling, lowered for devices that are not there."""

import dataclasses
import re
import time
from importlib import metadata

import jax
import ml_collections
from jax.sharding import Mesh

from sora_jax import generate
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import SampleConfig
from sora_jax.nn import attention, attention_chunked, attention_tiles, attention_tpu
from sora_jax.rehearsal import gpu
from sora_jax.tasks import registry
from sora_jax.training import feed
from sora_jax.training import state as state_lib
from sora_jax.training import step as step_lib
from sora_jax.training.loop import TrainConfig
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.state import Setup
from sora_jax.types import BatchSpec, PyTree

MODES = ("train", "sample")


class OutOfMemoryError(RuntimeError):
  """The compiler found no way to fit the program; `needed` and `limit` in bytes where it said them."""

  def __init__(self, needed: float, limit: float, text: str):
    super().__init__(text)
    self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  text: str  # optimised HLO
  memory: dict[str, int]  # bytes on one device
  lower_seconds: float
  compile_seconds: float
  cpu_seconds: float  # of all threads, tracing and compiling: what does not depend on what else runs


def resolve_attention(config: ml_collections.ConfigDict) -> None:
  """ "auto" asks for the platform of this process, which is not that of the topology."""
  if config.model.attention == "auto":
    config.model.attention = "tpu" if "tpu" in attention.BACKENDS else "chunked"


def attention_tile(backend: str, mesh: Mesh, row_tokens: int) -> tuple[int, int]:
  """Queries and keys that attention computes or skips together on the devices of the mesh."""
  if backend == "gpu":
    return gpu.TILE
  if backend != "tpu":
    return attention_chunked.standard_block_q(row_tokens), attention_chunked.BLOCK_K
  blocks = attention_tpu.blocks_for(mesh.devices.flat[0].device_kind)
  return blocks.q, attention_tiles.keys_at_once(blocks.k)


def make_setup(config: ml_collections.ConfigDict, spec: BatchSpec, mesh: Mesh) -> Setup:
  task = registry.build(config, batch_spec=spec, vocab_size=config.text.vocab_size)
  train = dataclasses.replace(registry.section(TrainConfig, config, "train"), seed=config.seed)
  return state_lib.make_setup(
    task,
    optimizer=registry.section(OptimizerConfig, config, "optimizer"),
    num_steps=train.num_steps,
    mesh=mesh,
    seed=config.seed,
  )


def lower(config: ml_collections.ConfigDict, setup: Setup, mode: str) -> jax.stages.Lowered:
  batch = feed.batch_struct(setup.task)
  with jax.set_mesh(setup.mesh):
    if mode == "train":
      step = step_lib.make_train_step(setup, batch=batch, accumulate=config.train.accumulate)
      return step.lower(setup.abstract, batch)
    return generate.lower_denoiser(
      setup.model(setup.abstract["params"], setup.abstract["rest"]),
      batch,
      config=registry.section(SampleConfig, config, "sample"),
      diffusion=registry.section(ObjectiveConfig, config, "diffusion"),
    )


def compile_program(
  config: ml_collections.ConfigDict, setup: Setup, mode: str, options: dict[str, str | bool | float]
) -> Compiled:
  """ValueError for a flag that the compiler does not know, OutOfMemoryError where it finds no room."""
  began, cpu_began = time.monotonic(), time.process_time()
  lowered = lower(config, setup, mode)
  lowered_at = time.monotonic()
  try:
    with jax.set_mesh(setup.mesh):
      compiled = lowered.compile(compiler_options=options)
  except Exception as error:  # of several types, by jax version
    raise _explained(error) from error
  stats = compiled.memory_analysis()
  memory = {
    "arguments": stats.argument_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "output": stats.output_size_in_bytes,
    "output_in_place": stats.alias_size_in_bytes,  # of the output, what takes the place of arguments
    "code": stats.generated_code_size_in_bytes,
  }
  memory["peak"] = sum(memory.values()) - 2 * memory["output_in_place"]
  return Compiled(
    text=compiled.as_text(),
    memory=memory,
    lower_seconds=lowered_at - began,
    compile_seconds=time.monotonic() - lowered_at,
    cpu_seconds=time.process_time() - cpu_began,
  )


def _explained(error: Exception) -> Exception:
  text = str(error)
  if "No such compile option" in text or "Unknown" in text and "flag" in text:
    return ValueError(f"the compiler does not know an XLA flag: {text.splitlines()[0]}")
  if "Failed to deserialize the Mosaic module" in text:
    return ValueError(_libtpu_too_old())
  if "RESOURCE_EXHAUSTED" not in text:
    return error
  sizes = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text) or re.search(
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text
  )
  if not sizes:
    return OutOfMemoryError(float("nan"), float("nan"), text.splitlines()[0])
  unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  needed, limit = (float(sizes[i]) * unit[sizes[i + 1]] for i in (1, 3))
  return OutOfMemoryError(needed, limit, text.splitlines()[0])


def _libtpu_too_old() -> str:
  jax_version, libtpu = metadata.version("jax"), metadata.version("libtpu")
  wanted = [x.split(";")[0].strip() for x in metadata.requires("jax") or () if x.startswith("libtpu")]
  needed = wanted[0] if wanted else "the libtpu of its release"
  return f"libtpu {libtpu} is too old for the kernels of jax {jax_version}; pip install '{needed}'"


def large_replicated(setup: Setup, *, large: int) -> list[tuple[str, tuple[int, ...]]]:
  """State tensors over `large` elements of which every device would hold a whole copy."""
  found = []

  def one(path, x) -> None:
    if x.size > large and x.sharding.is_fully_replicated and setup.mesh.size > 1:
      found.append((jax.tree_util.keystr(path), x.shape))

  jax.tree_util.tree_map_with_path(one, setup.abstract)
  return found


def state_shards(setup: Setup) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
  """(name, shape, shape of one device's shard) of every parameter."""

  def one(path, x):
    return jax.tree_util.keystr(path), x.shape, x.sharding.shard_shape(x.shape)

  tree: PyTree = jax.tree_util.tree_map_with_path(one, setup.abstract["params"])
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
